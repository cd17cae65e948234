"""The straight loops of the CUDA library: which calls they compute, and their results, on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl.cuda.launch import Problem
from helpers import cuda_host
from helpers.accuracy import check
from helpers.cases import GATES, Case
from helpers.kernels import results

HALVES = (torch.float16, torch.bfloat16)
# More than one tile of queries and of the prefix, and tokens with tiles before, inside and after what all queries see.
PLAIN = Case(
    batch=2, kv_heads=1, group=2, queries=70, keys=260, length=70, head_dim=64, value_dim=64, causal=True,
    dtype=torch.float16, prefix_dtype=torch.float32,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _host():
    cuda_host.use()


def hold(case: Case) -> None:
    """Check a plain call by the error rule."""
    x = case.inputs()
    assert Problem(x).is_plain("forward")
    check(x, "cuda", generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("step", ["8", "16"])
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, step, monkeypatch):
    monkeypatch.setenv("APT_HALF_STEP", step)
    hold(replace(PLAIN, gate=gate))


@pytest.mark.parametrize("step", ["8", "16"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_types_and_widths(width, dtype, step, monkeypatch):
    """Before 8.0 one tile of keys is in memory at a time, then two."""
    monkeypatch.setenv("APT_HALF_STEP", step)
    gate = "row" if (width, step) == (128, "8") else "query"
    hold(replace(PLAIN, batch=1, group=1, head_dim=width, value_dim=width, dtype=dtype, gate=gate))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, (63, 0), (64, 0), (65, 0), (130, None), (None, 64), (0, 0)], ids=str)
def test_windows(window, sinks):
    hold(replace(PLAIN, batch=1, group=1, causal=False, window=window, sinks=sinks))


@pytest.mark.parametrize("queries", [1, 63, 64, 65])
@pytest.mark.parametrize("keys", [1, 64, 65, 192])
@pytest.mark.parametrize("offset", [-70, 0, "row"])
def test_edges(queries, keys, offset):
    """Queries that see no token, one tile, and every position of the last tile's end."""
    hold(replace(PLAIN, group=1, queries=queries, keys=keys, offset=offset, length=64))


def test_same_bits_twice():
    x = PLAIN.inputs()
    first, second = results("cuda", x), results("cuda", x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 20.0}, {"dropout": 0.1}, {"padding": "left"}, {"segments": True}, {"dense": "TS"}, {"bias": "1HTS"},
        {"head_dim": 48}, {"value_dim": 56}, {"value_dim": 128}, {"scale": -0.1}, {"head_dim": 256, "value_dim": 256},
    ],
    ids=str,
)  # fmt: skip
def test_other_calls_take_the_general_loop(change):
    assert not Problem(replace(PLAIN, **change).inputs()).is_plain("forward")


@pytest.mark.parametrize("width", [64, 128])
def test_before_8_0_wide_heads_with_query_gates_take_the_general_loop(width, monkeypatch):
    monkeypatch.setenv("APT_HALF_STEP", "8")
    for gate in ("none", "query", "indexed_query"):
        x = replace(PLAIN, head_dim=width, value_dim=width, gate=gate).inputs()
        assert Problem(x).is_plain("forward") == (width == 64 or gate == "none")


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("step", ["8", "16"])
def test_kernels_of_the_backward(step, width, monkeypatch):
    """dk and dv take the straight loops from 8.0 on, those of the prefix up to 64 columns."""
    monkeypatch.setenv("APT_HALF_STEP", step)
    problem = Problem(replace(PLAIN, head_dim=width, value_dim=width, gate="row").inputs())
    plain = {name for name in ("query", "key_value", "prefix", "gate", "delta") if problem.is_plain(name)}
    keys = {"key_value", "prefix"} if width == 64 else {"key_value"}
    assert plain == {"query"} | (keys if step == "16" else set())


def _odd(tensor):
    """Rows that begin at no multiple of 16 bytes."""
    return torch.empty(*tensor.shape[:-1], 65, dtype=tensor.dtype)[..., :64].copy_(tensor)


def _far(tensor):
    """Rows that are 2^31 bytes apart; none is read, so that the memory is not used."""
    return tensor.new_empty((1 << 30) + 64).as_strided((*tensor.shape[:2], 2, 64), (0, 0, 1 << 30, 1))


def _whole(tensor):
    return tensor


@pytest.mark.parametrize(("change", "plain"), [(_whole, True), (_odd, False), (_far, False)])
def test_only_rows_of_vectors_take_the_straight_loops(change, plain):
    x = PLAIN.inputs()
    assert Problem(replace(x, key=change(x.key))).is_plain("forward") == plain
    assert Problem(x).is_plain("query", grad_out=change(x.query)) == plain


def test_an_output_gradient_without_vectors():
    """The forward is straight, dq is not."""
    x = replace(PLAIN, dtype=torch.float32).inputs()
    q = x.query.clone().requires_grad_()
    rest = (x.key, x.value, x.prefix_key, x.prefix_value)
    causal = Mask(causal=True)
    outs = [apt_kernels.attention(q, *rest, mask=causal, implementation=name) for name in ("cuda", "reference")]
    grad = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(7)).to(q.dtype)
    odd = torch.autograd.grad(outs[0], q, _odd(grad))[0]
    torch.testing.assert_close(odd, torch.autograd.grad(outs[1], q, grad)[0])
