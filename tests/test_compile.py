"""`torch.compile` of whole models: one graph for every length."""

import models
import pytest
import torch
from test_models import randomise

import apt_kernels


@pytest.mark.proves("torch.compile, dynamic lengths")
@pytest.mark.parametrize(
    ("family", "dynamic"),
    [(family, None) for family in (models.FAMILIES if models.EVERY else ["llama"])] + [("bert", True)],
)
def test_lengths_share_their_graphs(family, dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = apt_kernels.patch(models.build(family), prefix_length=4)
    randomise(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    lengths = (7, 9, 12, 14, 15, 17, 20, 21)
    for length in lengths:
        given = {**models.inputs(family, "right", length=length), "use_cache": False}
        if family in models.ENCODERS:
            del given["use_cache"]
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    # The first length, the general graph, and at most one more where the CPU's strategy changes with the length.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
