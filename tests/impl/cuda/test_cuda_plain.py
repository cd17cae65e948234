"""The straight loops of the CUDA library's forward: which calls they compute, and their results, on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

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
    assert Problem(x).is_plain()
    check(x, "cuda", wanted=["query"], generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("step", ["8", "16"])
@pytest.mark.parametrize("gate", GATES)
def test_gates(gate, step, monkeypatch):
    monkeypatch.setenv("APT_HALF_STEP", step)
    hold(replace(PLAIN, gate=gate))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_types_and_widths(width, dtype):
    hold(replace(PLAIN, batch=1, group=1, head_dim=width, value_dim=width, dtype=dtype, gate="query"))


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
    assert not Problem(replace(PLAIN, **change).inputs()).is_plain()


@pytest.mark.parametrize("width", [64, 128])
def test_before_8_0_wide_heads_with_query_gates_take_the_general_loop(width, monkeypatch):
    monkeypatch.setenv("APT_HALF_STEP", "8")
    for gate in ("none", "query", "indexed_query"):
        x = replace(PLAIN, head_dim=width, value_dim=width, gate=gate).inputs()
        assert Problem(x).is_plain() == (width == 64 or gate == "none")


def test_rows_without_vectors_take_the_general_loop():
    x = PLAIN.inputs()
    odd = torch.empty(*x.key.shape[:-1], 65, dtype=x.key.dtype)[..., :64].copy_(x.key)
    assert not Problem(replace(x, key=odd)).is_plain()
