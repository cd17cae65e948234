"""The structure of the Triton backward: separate launches, partial sums, descriptors, the order of programs."""

from __future__ import annotations

import contextvars
import itertools
from dataclasses import replace

import pytest
import torch

from helpers.accuracy import check, differentiable
from helpers.cases import CASES, Case
from helpers.kernels import BACKWARD, DEVICE

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
import triton.language as tl

from apt_kernels.impl.triton.primitives import longest_first

_SMALL = Case(batch=2, kv_heads=1, group=2, queries=20, keys=33, length=18, causal=True)


@pytest.fixture
def launches():
    """Counts kernel launches by name, from zero."""
    from apt_kernels.impl.triton.arguments import LAUNCHES

    LAUNCHES.clear()
    return LAUNCHES


def _identity(softcap: float | None, dropout: float, gate_rows: int):
    """Gradients of prefix key, prefix value and gate by `columns._prefix`'s sums, and by autograd, in float64."""
    generator = torch.Generator().manual_seed(gate_rows)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch, heads, queries, length, dim, scale, keep = 3, 2, 5, 4, 6, 0.4, 1 - dropout
    q, grad_out, tokens = (
        draw(batch, heads, queries, dim),
        draw(batch, heads, queries, dim),
        draw(batch, heads, queries, 7),
    )
    pk, pv, g = (draw(heads, length, dim), draw(heads, length, dim), draw(gate_rows, 1, 1, length))
    kept = (torch.rand(batch, heads, queries, length, generator=generator) < keep).double() / keep
    leaves = [t.requires_grad_() for t in (pk, pv, g)]

    s = scale * q @ pk.mT
    z = g * s if softcap is None else softcap * torch.tanh(g * s / softcap)
    logsumexp = torch.cat([z, tokens], -1).logsumexp(-1, keepdim=True)
    p = (z - logsumexp).exp()
    out = (p * kept * g) @ pv
    expected = torch.autograd.grad(out, leaves, grad_out)

    with torch.no_grad():
        delta = (out * grad_out).sum(-1, keepdim=True)
        dz = p * (kept * (grad_out @ pv.mT) * g - delta)
        if softcap is not None:
            dz = dz * (1 - (z / softcap) ** 2)
        rows_k, rows_v = scale * dz.mT @ q, (p * kept).mT @ grad_out  # [B, H, M, D], before the gate
        gate = g.reshape(gate_rows, 1, length, 1)
        found_g = ((rows_k * pk).sum(-1) + (rows_v * pv).sum(-1)).sum(1).reshape(batch, 1, 1, length)
        found = [(gate * rows_k).sum(0), (gate * rows_v).sum(0), found_g.sum_to_size(g.shape)]
    return found, expected


@pytest.mark.parametrize(("softcap", "dropout", "gate_rows"), list(itertools.product((None, 2.0), (0.0, 0.4), (1, 3))))
def test_a_gate_by_column_multiplies_sums_not_tiles(softcap, dropout, gate_rows):
    """dPk = scale g sum(dz q), dPv = g sum(p dO), dg = scale <Pk, sum dz q> + <Pv, sum p dO>, for each batch row."""
    for found, expected in zip(*_identity(softcap, dropout, gate_rows)):
        assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.fixture
def apart(monkeypatch):
    """The prefix's gradient in a separate launch."""
    from apt_kernels.impl.triton import tiles

    monkeypatch.setitem(tiles._INTERPRETER, "prefix", tiles.Tile(16, 16, 4, 1, 0))
    if DEVICE == "cuda":
        pytest.skip("the interpreter's tiles are changed")


@pytest.mark.parametrize("name", ["gate_static", "causal_gate_query", "gate_indexed", "everything"])
def test_the_prefix_in_a_launch_of_its_own(name, apart, launches):
    x = replace(CASES[name], kv_heads=1).inputs(DEVICE)
    check(x, "triton")
    assert {*BACKWARD, "prefix_column_gradients"} <= set(launches)
    assert set(launches.values()) == {1}


def test_only_the_prefix_is_one_launch_less(apart, launches):
    x = replace(CASES["gate_row"] if "gate_row" in CASES else CASES["plain"], kv_heads=1).inputs(DEVICE)
    check(x, "triton", wanted=["prefix_key"])
    assert set(launches) == {"attention_forward", "query_gradient", "prefix_column_gradients", "finish_gradients"}


@pytest.mark.parametrize("name", ["plain", "bias"])
def test_a_window_without_a_right_bound(name):
    check(replace(CASES[name], window=(8, None), kv_heads=1).inputs(DEVICE), "triton")


@pytest.mark.parametrize("gate", ["row", "static", "indexed", "none"])
def test_batch_rows_that_share_a_partial_sum(gate, monkeypatch):
    """Rows with different gates are summed in order by the program that owns the sum."""
    from apt_kernels.impl.triton import columns

    made = []
    parts = columns._parts
    monkeypatch.setattr(columns, "_parts", lambda *given: made.append(parts(*given)) or made[-1])
    x = replace(_SMALL, batch=7, kv_heads=2, group=1, queries=5, keys=5, gate=gate).inputs(DEVICE)
    check(
        x,
        "triton",
        wanted=[name for name in differentiable(x) if name in ("prefix_key", "prefix_value", "gate", "layer_scale")],
    )
    if DEVICE == "cpu":
        assert made[0][0] > 1


@pytest.mark.parametrize("wanted", [None, ["key"], ["value", "sinks"]], ids=str)
@pytest.mark.parametrize("shares", [2, 4])
def test_shares_of_a_group(shares, wanted, monkeypatch, launches):
    """dk and dv from several programs, each with some of a group's heads, whose partial sums are then added."""
    from apt_kernels.impl.triton import tiles

    monkeypatch.setattr(tiles, "shares", lambda *given: shares)
    case = replace(_SMALL, group=4, queries=17, keys=17, sinks=True, prefix_dtype=torch.float32, dtype=torch.bfloat16)
    check(case.inputs(DEVICE), "triton", wanted=wanted)
    assert launches["finish_gradients"] == launches["column_gradients"] == 1


@triton.jit
def _place(p_found, tiles, heads, band):
    i = tl.program_id(0)
    i_tile, i_head = longest_first(i, tiles, heads, band)
    tl.store(p_found + 2 * i, i_tile)
    tl.store(p_found + 2 * i + 1, i_head)


@pytest.mark.parametrize(("tiles", "heads", "band"), [(1, 1, 1), (3, 5, 2), (4, 6, 3), (2, 7, 100)])
def test_every_program_has_its_tile_and_longest_come_first(tiles, heads, band):
    found = torch.full((tiles * heads, 2), -1, dtype=torch.int32, device=DEVICE)
    _place[(tiles * heads,)](found, tiles, heads, band)
    order = [tuple(row) for row in found.tolist()]
    assert sorted(order) == list(itertools.product(range(tiles), range(heads)))
    for first in range(0, heads, band):
        within = [tile for tile, head in order if first <= head < first + band]
        assert within == sorted(within)
    assert [head // band for _, head in order] == sorted(head // band for _, head in order)


def test_memory_for_descriptors_is_given_to_one_launch_alone():
    """Triton reads the allocator from a context variable: the user's value is kept."""
    from triton import set_allocator
    from triton.runtime import _allocation

    from apt_kernels.impl.triton import arguments

    class Constants:
        DESCRIPTORS = True

    def used(*given, **named):
        return _allocation._allocator.get(), given, named

    def run():
        def own(size, alignment, stream):
            raise AssertionError

        set_allocator(own)
        assert arguments._with_scratch({"C": Constants}, used, 1, a=2) == (arguments._allocate, (1,), {"a": 2})
        assert arguments._with_scratch({}, used)[0] is own
        assert _allocation._allocator.get() is own

    contextvars.copy_context().run(run)


def test_descriptors_take_what_they_can():
    from apt_kernels.impl.triton.arguments import Problem

    def described(**change):
        x = Case(head_dim=16, value_dim=16).inputs()
        return Problem(replace(x, **{name: make(getattr(x, name)) for name, make in change.items()})).constants()

    def shifted(t):
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    assert (DEVICE == "cpu") == described().DESCRIPTORS
    assert not described(query=shifted).DESCRIPTORS
    assert not described(key=lambda t: t[:, :, :1].expand(t.shape)).DESCRIPTORS
    assert not described(value=lambda t: t[:, :1].expand(t.shape)).DESCRIPTORS


@pytest.mark.parametrize(
    ("shape", "columns", "aligned"),
    [((2, 5, 8), 8, True), ((2, 5, 6), 6, False), ((1, 1, 6), 6, False), ((2, 5, 8), 6, False)],
)
def test_gates_per_query_load_as_vectors_where_all_rows_consist_of_them(shape, columns, aligned):
    from apt_kernels.impl.triton.arguments import Problem

    logits = torch.zeros(shape)[..., :columns]
    x = Case(batch=shape[0], queries=shape[1], length=columns).inputs()
    assert aligned == Problem(replace(x, gate=logits)).constants().GATE_ALIGNED
    assert not Problem(replace(x, gate=torch.zeros(logits.numel() + 1)[1:].view(logits.shape))).constants().GATE_ALIGNED
    assert not Problem(replace(x, gate=None)).constants().GATE_ALIGNED


def test_short_prefixes_have_narrow_tiles():
    from apt_kernels.impl.triton import tiles

    def columns(length, kernel="forward", architecture="sm_90", gate_per_query=True, width=2, dim=128):
        return tiles.prefix_columns(kernel, architecture, width, dim, gate_per_query, length)

    assert (columns(16), columns(32), columns(33)) == (32, 32, 64)
    assert (columns(64, architecture="sm_80"), columns(64, "query", "sm_80")) == (16, 64)
    assert (columns(64, width=4), columns(64, width=4, gate_per_query=False), columns(64, dim=256)) == (16, 32, 16)
