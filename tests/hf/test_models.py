"""A patched model equals an eager model that attends over concatenated prefixes: outputs and every gradient."""

import pytest

from helpers import models
from helpers.patched import check_equals_the_oracle

GATES = {"encoder": ("first", "mean", "token", "static", "none"), "decoder": ("first", "token", "static", "none")}


def gates(family):
    return GATES["encoder" if family in models.ENCODERS else "decoder"]


@pytest.mark.proves("outputs and gradients, padding on either side")
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("family", "gate"), [(f, g) for f in models.FAMILIES for g in gates(f)])
def test_outputs_and_gradients_equal_the_oracle(family, gate, padding):
    check_equals_the_oracle(family, gate, padding)
