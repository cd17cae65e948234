"""The strategy "merge_flash4": the tokens by flash-attn-4, whose place a stand-in takes.

Our own part is interpreted without a CUDA device, compiled with one.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given

from apt_kernels.ops import choose
from helpers import flash4 as stand_in
from helpers.cases import Case, cases, examples
from helpers.kernels import DEVICE
from helpers.merged import MASK_TENSORS, hold, use

pytest.importorskip("triton", reason="the package triton is not installed")

INTERFACE = "flash_attn.cute.interface"
PLAIN = Case(batch=2, kv_heads=1, group=2, dtype=torch.bfloat16, prefix_dtype=torch.float32)


def found():
    """The module that calls flash-attn-4; the library is looked for anew."""
    from apt_kernels.impl.triton.stock import flash4

    flash4.library.cache_clear()
    return flash4


@pytest.fixture(autouse=True)
def merged(monkeypatch):
    """The stand-in as the library, on what is taken for Hopper."""
    flash4 = found()
    library = flash4.library
    use(monkeypatch, "merge_flash4")
    monkeypatch.setitem(sys.modules, INTERFACE, stand_in)
    monkeypatch.setattr(flash4, "_major", lambda device: 9)
    yield flash4
    library.cache_clear()


@pytest.mark.parametrize("gate", ["none", "static", "row", "query", "indexed", "indexed_query"])
@pytest.mark.parametrize("causal", [False, True])
def test_gates(gate, causal):
    hold(replace(PLAIN, gate=gate, causal=causal).inputs(DEVICE), "merge_flash4")


@pytest.mark.parametrize(
    "change",
    [
        {"kv_heads": 3, "group": 1},
        {"kv_heads": 2, "group": 3, "causal": True},
        {"keys": 40, "causal": True},
        {"queries": 40, "keys": 9, "causal": True},
        {"queries": 40, "keys": 9},
        {"value_dim": 40},
        {"heads_last": False},
        {"scale": 0.5},
        {"softcap": 2.0, "causal": True},
        {"sinks": True},
        {"sinks": True, "causal": True, "queries": 40, "keys": 9},
        {"window": (3, None), "causal": True},
        {"window": (3, 5)},
        {"window": (None, 2), "keys": 40},
        {"spread": 6.0, "causal": True},
        {"dtype": torch.float16, "causal": True},
    ],
    ids=str,
)
def test_features(change):
    """What cuDNN does not take as well: windows, soft-cap, sinks, unequal head sizes, the log-sum-exp's gradient."""
    hold(replace(PLAIN, **change).inputs(DEVICE), "merge_flash4")


@examples(30)
@given(
    cases(
        batch=(1, 1, 2),
        kv_heads=(1, 1, 2),
        group=(1, 1, 2),
        queries=(17, 20, 33),
        keys=(1, 17, 20, 33),
        length=(1, 7, 18),
        head_dim=(16, 24, 40),
        value_dim=(16, 24, 40),
        dtype=(torch.bfloat16, torch.float16),
        dropout=(0.0,),
        offset=(None,),
        padding=("",),
        segments=(False,),
        dense=("",),
        bias=("",),
    )
)
def test_any_inputs(case):
    case = replace(case, scale=None if case.scale is None else abs(case.scale))
    hold(case.inputs(DEVICE), "merge_flash4")


def test_what_the_library_receives(monkeypatch):
    """Its backward is asked to be deterministic and receives the log-sum-exp of all columns and its gradient."""
    given, own = [], stand_in._flash_attn_bwd
    lse = SimpleNamespace(tokens=None)

    def forward(*args, **named):
        results = stand_in._flash_attn_fwd(*args, **named)
        lse.tokens = results[1]
        return results

    def backward(*args, **named):
        given.append((args, named))
        return own(*args, **named)

    monkeypatch.setattr(found(), "library", lambda: SimpleNamespace(forward=forward, backward=backward))
    x = replace(PLAIN, causal=True).inputs(DEVICE)
    for name in ("query", "key", "value"):
        getattr(x, name).requires_grad_()
    out, logsumexp = torch.ops.apt_kernels.attention(*x.flat(), "triton")[:2]
    (out.float().sum() + logsumexp.sum()).backward()
    (args, named) = given[0]
    assert named["deterministic"] is True
    assert torch.equal(args[5], logsumexp)
    assert not torch.equal(args[5], lse.tokens)
    assert named["dlse"].shape == logsumexp.shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((change, f"without {name}") for name, change in MASK_TENSORS.items()),
        ({"dropout": 0.1}, "no dropout"),
        ({"causal": True, "keys": 40, "offset": 0}, "the last query at the last key"),
        ({"scale": -0.3}, "takes positive ones"),
        ({"dtype": torch.float32}, "takes bfloat16 and float16"),
        ({"head_dim": 20, "value_dim": 24}, "head sizes are 20 and 24"),
        ({"head_dim": 24, "value_dim": 264}, "head sizes are 24 and 264; flash-attn-4 takes multiples of 8 up to 256"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_fused(change, reason, merged):
    x = replace(PLAIN, **change).inputs(DEVICE)
    assert reason in merged.obstacle(x)
    if change.get("value_dim", 0) <= 256:
        assert choose.choose(x, "triton").strategy == "fused"


@pytest.mark.parametrize(("major", "most"), [(None, 0), (8, 0), (9, 256), (10, 128), (11, 128), (12, 0)])
def test_devices(major, most, merged, monkeypatch):
    monkeypatch.setattr(merged, "_major", lambda device: major)
    for dim in (64, 128, 256):
        obstacle = merged.obstacle(replace(PLAIN, head_dim=dim, value_dim=dim).inputs(DEVICE))
        assert (obstacle is None) == (dim <= most)
        if not most:
            assert obstacle == "flash-attn-4 is called on compute capability 9.x, 10.x and 11.x"


def test_without_the_library(merged, monkeypatch):
    monkeypatch.setitem(sys.modules, INTERFACE, None)
    found()
    assert merged.obstacle(PLAIN.inputs(DEVICE)).startswith("flash-attn-4 cannot be imported (")
    assert choose.choose(PLAIN.inputs(DEVICE), "triton").strategy == "fused"


def test_another_release_of_the_library(merged, monkeypatch):
    """It is a beta, whose private functions are called: what is missing is named."""

    def backward(q, k, v, out, dout, lse):
        raise NotImplementedError

    changed = SimpleNamespace(_flash_attn_fwd=stand_in._flash_attn_fwd, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, INTERFACE, changed)
    found()
    message = merged.obstacle(PLAIN.inputs(DEVICE))
    assert "where _flash_attn_bwd has no argument 'softmax_scale'; install 4.0.0b36, which has it" in message
    monkeypatch.setitem(sys.modules, INTERFACE, SimpleNamespace())
    found()
    assert "where there is no _flash_attn_fwd; install 4.0.0b36" in merged.obstacle(PLAIN.inputs(DEVICE))
