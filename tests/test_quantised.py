"""A quantised base: its weights stay quantised, the prefix stays float32 and trains."""

import models
import pytest
import torch
from test_models import randomise
from torch import nn

import apt_kernels


class Rounded(nn.Module):
    """A stand-in for a quantised linear layer: 8-bit weights in a buffer, one scale a row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def stand_in(model):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(parent, name, Rounded(child))


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def check(model, given, quantise_first, quantise):
    if quantise_first:
        quantise(model)
        plain = model(**given).logits.detach()
        apt_kernels.patch(model, prefix_length=3)
    else:
        apt_kernels.patch(model, prefix_length=3)
        quantise(model)
        with apt_kernels.disabled(model):
            plain = model(**given).logits.detach()
    randomise(model)
    for prefix in apt_kernels.prefixes(model).values():
        assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in prefix.parameters())
    logits = model.train()(**given).logits
    assert (logits - plain).abs().max() > 1e-2, "the prefix has no influence"
    logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".apt." in n)
    assert all(p.grad is None for n, p in model.named_parameters() if ".apt." not in n)
    return logits.detach()


@pytest.mark.proves("quantised base")
@pytest.mark.parametrize("quantise", [stand_in, torchao])
@pytest.mark.parametrize("family", models.FAMILIES if models.EVERY else ["bert", "llama", "t5"])
def test_a_quantised_base_trains_its_prefix(family, quantise):
    given = models.inputs(family, "right")
    before, after = (check(models.build(family), given, first, quantise) for first in (True, False))
    torch.testing.assert_close(before, after)
