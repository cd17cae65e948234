"""Calls of the Triton implementation whose tokens a library's kernel computes, checked by the error rule."""

from __future__ import annotations

import pytest
import torch

from apt_kernels.ops import choose

from .accuracy import check
from .kernels import BACKWARD, DEVICE

# Changes of a plain case by which it gets a mask or bias as a tensor, by the name of the input.
MASK_TENSORS = {
    "key_padding": {"padding": "right"},
    "query_segments": {"segments": True},
    "dense": {"dense": "TS"},
    "bias": {"bias": "1HTS"},
    "query_offset": {"causal": True, "offset": "row"},
}


def use(monkeypatch, strategy: str) -> None:
    """Use a stock kernel for every head size, from one token on."""
    from apt_kernels.impl.triton import tiles

    architecture = tiles.architecture(torch.device(DEVICE))
    for dim in (16, 32, 64, 128, 256):
        monkeypatch.setitem(tiles._MERGED, (architecture, dim), (strategy, 1))


def hold(x, strategy: str, *, forward_alone: bool = False, **options) -> None:
    """Check it by the error rule; the stock kernel computes the tokens in the forward, and in the backward unless
    ``forward_alone``."""
    from apt_kernels.impl.triton import stock
    from apt_kernels.impl.triton.arguments import LAUNCHES

    assert choose.choose(x, "triton").strategy == strategy
    LAUNCHES.clear()
    calls, own = [], stock.KERNELS[strategy]
    counted = own._replace(
        forward=lambda *args: calls.append("forward") or own.forward(*args),
        backward=lambda *args: calls.append("backward") or own.backward(*args),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stock.KERNELS, strategy, counted)
        check(x, "triton", generator=torch.Generator().manual_seed(7), **options)
    assert dict(LAUNCHES) == dict.fromkeys({"attention_forward"} | BACKWARD, 1)
    assert calls == (["forward"] if forward_alone else ["forward", "backward"])
