"""A prefix for each row in the Triton kernels: interpreted where there is no CUDA device, compiled where there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

import apt_kernels
from apt_kernels.impl.inputs import DIFFERENTIABLE
from apt_kernels.ops import choose
from helpers import accuracy
from helpers.cases import CASES, Case, examples, mixtures
from helpers.kernels import BACKWARD, DEVICE, check_same_bits_twice

pytest.importorskip("triton", reason="the package triton is not installed")

SMALL = {
    "kv_heads": (1, 1, 2),
    "group": (1, 1, 2),
    "queries": (1, 4, 17, 20),
    "keys": (1, 16, 20, 33),
    "length": (1, 7, 18),
    "head_dim": (16, 24, 40),
    "value_dim": (16, 24, 40),
    "dtype": (torch.float32, torch.float32, torch.bfloat16),
}


def hold(case: Case) -> None:
    accuracy.check(case.inputs(DEVICE), "triton", generator=torch.Generator().manual_seed(7))


@examples(20)
@given(mixtures(batch=(1, 2, 3, 5, 9), dropout=(0.0, 0.0, 0.3), **SMALL))
def test_any_mixture(case):
    hold(case)


# So many rows that a partial sum of the prefix's gradient has several of one adapter.
MANY = replace(
    CASES["mixed"], batch=9, group=1, queries=3, keys=3, head_dim=16, value_dim=16, length=18,
    adapters=(18, 2, 3, 0, 17), rows=(4, -1, 0, 4, 4, 2, 1, 4, -1),
)  # fmt: skip


@pytest.mark.parametrize("rows", [MANY.rows, (2,) * 9, (-1,) * 9, (0, 1, 2, 3, 4, 0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("gate", ["none", "row", "query", "indexed", "indexed_query"])
def test_many_rows(gate, rows):
    from apt_kernels.impl.triton.arguments import Problem
    from apt_kernels.impl.triton.columns import _parts

    case = replace(MANY, gate=gate, rows=rows)
    problem = Problem(case.inputs(DEVICE))
    if problem.architecture == "interpreter":
        assert _parts(problem, problem.tile("prefix"))[0] > 1
    hold(case)


@pytest.mark.parametrize("gate", ["none", "row", "query"])
@pytest.mark.parametrize("causal", [False, True])
def test_tokens_of_a_stock_kernel(gate, causal, monkeypatch):
    from apt_kernels.impl.triton import tiles

    monkeypatch.setitem(tiles._MERGED, (tiles.architecture(torch.device(DEVICE)), 32), ("merge", 1))
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    case = replace(CASES["mixed"], gate=gate, causal=causal, dtype=dtype, prefix_dtype=torch.float32)
    assert choose.choose(case.inputs(DEVICE), "triton").strategy == "merge"
    hold(case)


@pytest.mark.parametrize("gate", ["row", "query", "indexed"])
def test_same_bits_twice(gate):
    check_same_bits_twice("triton", replace(MANY, gate=gate).inputs(DEVICE))


def neighbour(problem) -> None:
    adapters = problem.gate.adapters
    problem.gate = problem.gate._replace(adapters=adapters._replace(index=adapters.index.roll(1)))


def length_of_neighbour(problem) -> None:
    adapters = problem.gate.adapters
    problem.gate = problem.gate._replace(adapters=adapters._replace(lengths=adapters.lengths.roll(1)))


def gradient_into_another(problem) -> None:
    gate = problem.ordered_gate()
    others = gate.adapters._replace(first=gate.adapters.first.roll(-1))
    problem.ordered_gate = lambda: gate._replace(adapters=others)


def nothing(problem) -> None:
    pass


@pytest.mark.parametrize("name", ["mixed", "mixed_gate_query", "mixed_gate_none_scaled"])
@pytest.mark.parametrize("fault", [nothing, neighbour, length_of_neighbour, gradient_into_another])
def test_planted_faults_are_noticed(fault, name, monkeypatch):
    from apt_kernels.impl.triton import attend, gradients
    from apt_kernels.impl.triton.arguments import Problem

    def faulty(x):
        problem = Problem(x)
        fault(problem)
        return problem

    x = replace(CASES[name], spread=3.0, kv_heads=1).inputs(DEVICE)
    # What a neighbour's length reaches is finite, so that only the error rule notices it.
    x = replace(x, prefix_key=x.prefix_key.nan_to_num(1.0), prefix_value=x.prefix_value.nan_to_num(1.0))
    for module in (attend, gradients):
        monkeypatch.setattr(module, "Problem", faulty)
    if fault is nothing:
        accuracy.check(x, "triton", generator=torch.Generator().manual_seed(7))
    else:
        with pytest.raises(AssertionError, match="is off by"):
            accuracy.check(x, "triton", generator=torch.Generator().manual_seed(7))


def _launched(case: Case, monkeypatch) -> list:
    """What compiled code depends on in each launch of a case, forward and backward."""
    from apt_kernels.impl.triton import BACKEND, arguments

    kept, execute = [], arguments.execute

    def keep(kernel, programs, *given, **named):
        kept.append((kernel.__name__, arguments._signature(kernel.fn).key(given, named)))
        execute(kernel, programs, *given, **named)

    x = case.inputs(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(arguments, "execute", keep)
        plan = BACKEND.plan(x)
        result = BACKEND.forward(x, plan)
        needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
        BACKEND.backward(x, plan, result, torch.ones_like(result.out), None, needs)
    return kept


@pytest.mark.parametrize("gate", ["indexed", "query"])
@pytest.mark.parametrize("queries", [1, 9])
def test_another_mixture_is_the_same_launches_and_no_compilation(queries, gate, monkeypatch):
    case = replace(CASES["mixed"], kv_heads=1, queries=queries, gate=gate)
    one = _launched(case, monkeypatch)
    names = {"split_attention", "merge_shares"} if queries == 1 else {"attention_forward"}
    assert sorted(name for name, _ in one) == sorted(names | BACKWARD)
    others = {"adapters": (1,), "rows": (0, -1, 0, 0)}, {"adapters": (5,) * 7, "rows": (6, 3, -1, 0)}
    for change in others:
        assert _launched(replace(case, **change), monkeypatch) == one


def test_an_adapter_without_rows_has_no_gradient():
    case = replace(CASES["mixed_gate_static"], batch=3, adapters=(5, 2, 3, 4), rows=(1, -1, 3))
    x = case.inputs(DEVICE)
    names = "prefix_key", "prefix_value", "layer_scale"
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    out = torch.ops.apt_kernels.attention(*replace(x, **leaves).flat(), "triton")[0]
    key, value, scale = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    used = torch.zeros(4, 5, dtype=torch.bool, device=DEVICE)
    used[1, :2] = used[3, :4] = True
    for grad in (key, value):
        assert ((grad != 0).all(-1) == used[:, None]).all()
    assert (scale != 0).tolist() == [False, True, False, True]


def test_a_row_without_a_prefix_that_sees_nothing():
    query, key, value = torch.randn(3, 3, 2, 4, 16, device=DEVICE).requires_grad_().unbind()
    prefix = torch.randn(2, 2, 2, 5, 16, device=DEVICE)
    padding = torch.tensor([[False], [False], [True]], device=DEVICE).expand(-1, 4)
    for queries in (1, 4):
        out, logsumexp = apt_kernels.attention(
            query[:, :, :queries], key, value, *prefix, prefix_index=torch.tensor([-1, 0, -1], device=DEVICE),
            mask=apt_kernels.Mask(key_padding=padding), implementation="triton", return_logsumexp=True,
        )  # fmt: skip
        assert bool((out[0] == 0).all())
        assert bool(torch.isneginf(logsumexp[0]).all())
        assert bool(torch.isfinite(logsumexp[1:]).all())
        grads = torch.autograd.grad(out.square().sum(), (query, key, value), retain_graph=True)
        assert all(bool((grad[0] == 0).all()) for grad in grads)
