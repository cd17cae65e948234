"""The naive baseline computes the results of the specification."""

from __future__ import annotations

import pytest
import torch

import apt_kernels
from apt_kernels import Mask
from bench.common import naive

B, HQ, HKV, T, S, M, D = 2, 4, 2, 5, 7, 3, 8


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def _padding() -> torch.Tensor:
    seen = torch.ones(B, S, dtype=torch.bool)
    seen[0, 4:] = False
    seen[1] = False  # a row that sees no token still sees the prefix
    return seen


GATES = {"none": None, "static": (M,), "row": (B, M), "query": (B, T, M)}
MASKS = {
    "open": lambda: None,
    "causal": lambda: Mask(causal=True),
    "window": lambda: Mask(window=(2, 1)),
    "padding": lambda: Mask(key_padding=_padding()),
    "segments": lambda: Mask(query_segments=torch.arange(B * T).view(B, T) // 3, key_segments=torch.zeros(B, S).long()),
    "dense": lambda: Mask(causal=True, dense=torch.rand(B, HQ, T, S) > 0.4),
    "bias": lambda: Mask(key_padding=_padding(), bias=_double(HQ, T, S)),
}
OPTIONS = {
    "plain": dict,
    "scale": lambda: {"scale": 0.3},
    "softcap": lambda: {"softcap": 1.5},
    "sinks": lambda: {"sinks": _double(HQ)},
    "logsumexp": lambda: {"return_logsumexp": True},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("gate", GATES)
def test_equals_the_specification(gate, mask, option):
    torch.manual_seed(0)
    inputs = [_double(B, HQ, T, D), _double(B, HKV, S, D), _double(B, HKV, S, D + 1)]
    inputs += [_double(HKV, M, D), _double(HKV, M, D + 1)]
    inputs += [None if GATES[gate] is None else _double(*GATES[gate]), _double(1)]
    seen, options = MASKS[mask](), OPTIONS[option]()
    leaves = [t for t in (*inputs, seen and seen.bias, options.get("sinks")) if t is not None]

    def run(attention, **more):
        out = attention(*inputs, mask=seen, **options, **more)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in out)
        return *out, *torch.autograd.grad(total, leaves)

    for found, expected in zip(run(naive.attention), run(apt_kernels.attention, implementation="reference")):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gate_index():
    torch.manual_seed(0)
    inputs = [torch.randn(B, HQ, T, D), torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, D)]
    inputs += [torch.randn(HKV, M, D), torch.randn(HKV, M, D), torch.randn(5, M)]
    for index in (torch.tensor([3, 0]), torch.randint(5, (B, T))):
        expected = apt_kernels.attention(*inputs, gate_index=index, implementation="reference")
        torch.testing.assert_close(naive.attention(*inputs, gate_index=index), expected)


@pytest.mark.parametrize("gate", ["row", "query"])
def test_dropout_keeps_the_mean(gate):
    torch.manual_seed(0)
    inputs = [torch.randn(B, HQ, T, D), torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, D)]
    inputs += [torch.randn(HKV, M, D), torch.randn(HKV, M, D), torch.randn(GATES[gate])]
    mean = torch.stack([naive.attention(*inputs, dropout_p=0.2) for _ in range(2000)]).mean(dim=0)
    torch.testing.assert_close(mean, naive.attention(*inputs), rtol=0, atol=0.08)


def test_the_dense_mask_is_built_once_for_each_mask():
    inputs = [torch.randn(B, HQ, T, D), torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, D)]
    inputs += [torch.randn(HKV, M, D), torch.randn(HKV, M, D)]
    mask = Mask(causal=True)
    naive.attention(*inputs, mask=mask)
    first = naive._dense_masks[mask]
    naive.attention(*inputs, mask=mask)
    assert naive._dense_masks[mask] is first
    assert first.shape == (B, 1, T, M + S)
    assert first[..., :M].all()
