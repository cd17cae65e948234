"""Generation by patched models, and how two generations are compared."""

import torch

import apt_kernels

from . import models
from .patched import randomise

NEW = 6


def tuned(family, gate, **settings):
    model = apt_kernels.patch(models.build(family).double(), prefix_length=4, gate=gate, **settings)
    randomise(model)
    return model


def generate(model, given, **options):
    given = {name: tensor for name, tensor in given.items() if name != "decoder_input_ids"}
    options = {"output_logits": True, "return_dict_in_generate": True, **options}
    out = model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)
    return out.sequences, torch.stack(out.logits)


def assert_same(found, expected):
    """Check that two generations have the same tokens, chosen from the same logits."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
