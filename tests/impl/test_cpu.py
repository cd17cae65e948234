"""The CPU implementation: the error rule on all inputs of the specification, and the choice of the strategy."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import example, given

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl import cpu
from apt_kernels.impl.cpu import BACKEND as CPU
from bench.common import naive
from bench.speed.timing import peak_bytes
from helpers import accuracy
from helpers.cases import CASES, Case, cases, examples
from helpers.memory import Largest, kept_bytes

GENERATOR = torch.Generator
_LEAVES = ("query", "key", "value", "prefix_key", "prefix_value", "gate", "layer_scale")


@pytest.mark.parametrize("logsumexp_gradient", [True, False], ids=["lse", "out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case(name, dtype, logsumexp_gradient):
    x = replace(CASES[name], dtype=dtype).inputs()
    accuracy.check(x, "cpu", logsumexp_gradient=logsumexp_gradient, generator=GENERATOR().manual_seed(0))


@pytest.mark.parametrize("name", ["plain", "causal", "gate_query", "causal_gate_query", "bias", "window"])
def test_rows_that_are_not_contiguous(name):
    x = CASES[name].inputs()
    columns = {
        part: getattr(x, part).mT.contiguous().mT
        for part in ("query", "key", "value", "prefix_key", "prefix_value", "bias")
        if getattr(x, part) is not None
    }
    accuracy.check(replace(x, **columns), "cpu", generator=GENERATOR().manual_seed(0))


@pytest.mark.parametrize(("queries", "keys", "way"), [(200, 320, "concat"), (321, 321, "merge"), (700, 900, "merge")])
def test_causal_squares_of_both_ways(queries, keys, way):
    x = Case(batch=2, kv_heads=1, queries=queries, keys=keys, causal=True).inputs()
    assert CPU.strategy(x) == way
    accuracy.check(x, "cpu", generator=GENERATOR().manual_seed(0))


# The dominant logit here is a product summed in one chain, for which the rule's constant allows.
_CHAIN = Case(batch=1, kv_heads=1, group=3, queries=1, keys=25, length=40, head_dim=64, value_dim=26, gate="static",
              layer_scale=None, spread=4.0, scale=0.3, dense="1HT1", seed=279)  # fmt: skip


@examples(150)
@given(cases())
@example(_CHAIN)
def test_any_inputs(case):
    accuracy.check(case.inputs(), "cpu", generator=GENERATOR().manual_seed(case.seed))


# One row of the batch sees no key, and there are more queries than the keys that any row sees.
_NOTHING_SEEN = Case(batch=2, kv_heads=1, group=1, queries=16, keys=16, length=1, head_dim=16, gate="none",
                     causal=True, padding="all")  # fmt: skip


@examples(150)
@example(_NOTHING_SEEN)
@given(
    cases(
        dropout=(0.0,), softcap=(0.0,), segments=(False,), window=(None,), dense=("",), bias=("",),
        dtype=(torch.float32, torch.bfloat16),
    )
)  # fmt: skip
def test_any_inputs_of_the_stock_kernel(case):
    case = replace(case, value_dim=case.head_dim)
    accuracy.check(case.inputs(), "cpu", logsumexp_gradient=False, generator=GENERATOR().manual_seed(case.seed))


@examples(50)
@example(_NOTHING_SEEN)
@given(
    cases(
        causal=(True,), dropout=(0.0,), softcap=(0.0,), segments=(False,), window=(None,), dense=("",), bias=("",),
        dtype=(torch.float32, torch.bfloat16),
    )
)  # fmt: skip
def test_any_causal_inputs_merged(case):
    case = replace(case, value_dim=case.head_dim)
    with mock.patch.object(cpu, "CAUSAL_KEYS", 0):  # drawn inputs have few keys, which are concatenated
        accuracy.check(case.inputs(), "cpu", logsumexp_gradient=False, generator=GENERATOR().manual_seed(case.seed))


# The strategy for each kind of inputs.
WAYS = {
    "plain": "concat",
    "gate_none": "concat",
    "gate_static": "concat",
    "gate_indexed": "concat",
    "gate_query": "merge",
    "gate_indexed_query": "merge",
    "right_padding": "concat",
    "left_padding": "concat",
    "all_padding": "concat",
    "sinks": "concat",
    "dense_keys": "concat",
    "bias": "concat",
    "causal": "concat",
    "causal_gate_query": "merge",
    "causal_left_padding": "concat",
    "causal_more_keys": "concat",
    "causal_fewer_keys": "concat",
    "causal_offset_tensor": "concat",
    "causal_decode": "merge",
    "causal_decode_padding": "merge",
    "window_decode": "merge",
    "dropout": "blockwise",
    "softcap": "blockwise",
    "window": "blockwise",
    "segments": "blockwise",
    "value_dim_larger": "blockwise",
    "causal_offset_row": "blockwise",
    "everything": "blockwise",
}


@pytest.mark.parametrize("name", sorted(WAYS))
def test_which_inputs_go_where(name):
    assert CPU.strategy(CASES[name].inputs()) == WAYS[name]


@pytest.mark.parametrize(
    "fields",
    [{"causal": True}, {"padding": "right"}, {"causal": True, "window": (50, None)}, {"causal": True, "gate": "query"}],
    ids=str,
)
def test_no_square_matrix(fields):
    size = 2048
    x = Case(batch=1, kv_heads=1, group=1, queries=size, keys=size, head_dim=16, value_dim=16, **fields).inputs()
    with Largest() as largest:
        plan = CPU.plan(x)
        result = CPU.forward(x, plan)
        CPU.backward(x, plan, result, torch.randn_like(result.out), None, [True] * 7 + [False, False])
    assert largest.elements < size * size // 4


_MEMORY = {
    "padded": {"padding": "right"},
    "causal": {"causal": True},
    "causal_padded": {"causal": True, "padding": "right"},
    "long_prefix": {"causal": True, "length": 400, "gate": "none", "layer_scale": None},
    "long_prefix_gate_by_row": {"causal": True, "length": 400, "gate": "row"},
}


@pytest.mark.parametrize("name", sorted(_MEMORY))
def test_memory_of_a_short_call_is_at_most_the_naive_one(name):
    fields = {"gate": "row", "length": 24, **_MEMORY[name]}
    case = Case(batch=4, kv_heads=4, group=1, queries=64, keys=64, head_dim=64, value_dim=64, **fields)
    x = case.inputs()
    assert CPU.strategy(x) == "concat"
    mask = Mask(causal=x.causal, key_padding=x.key_padding)
    leaves = {part: getattr(x, part) for part in _LEAVES if getattr(x, part) is not None}
    if x.gate is not None:
        leaves["gate"] = x.gate[:, 0]
    leaves = {part: leaf.detach().requires_grad_() for part, leaf in leaves.items()}

    def step(way):
        out = way(**leaves, mask=mask)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    kept, peak = {}, {}
    for way in (apt_kernels.attention, naive.attention):
        step(way)  # the naive way keeps the mask of the first call
        kept[way] = kept_bytes(lambda way=way: way(**leaves, mask=mask), leaves.values())
        peak[way] = peak_bytes(torch.device("cpu"), lambda way=way: step(way))
    assert kept[apt_kernels.attention] <= kept[naive.attention]
    # What the backward was given lives until it returns, beside the prefix's gradients; autograd frees the naive one's.
    beside = 2 * (x.prefix_key.nbytes + x.prefix_value.nbytes) if "long_prefix" in name else 0
    assert peak[apt_kernels.attention] <= peak[naive.attention] + beside


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["merge", "blockwise"])
def test_a_gate_per_query_needs_little_beside_its_gradient(dropout):
    x = Case(batch=4, kv_heads=1, group=1, queries=2048, keys=64, head_dim=16, value_dim=16, length=512, gate="query",
             dropout=dropout).inputs()  # fmt: skip
    plan, results = CPU.plan(x), []
    forward = peak_bytes(torch.device("cpu"), lambda: results.append(CPU.forward(x, plan)))
    grad_out = torch.randn_like(results[0].out)
    needs = [True] * 7 + [False, False]
    backward = peak_bytes(torch.device("cpu"), lambda: CPU.backward(x, plan, results[0], grad_out, None, needs))
    # Besides, a block's buffers.
    assert forward < 0.75 * x.gate.nbytes
    assert backward < 2 * x.gate.nbytes


def test_the_gradient_of_a_gate_per_query_in_parts(monkeypatch):
    from apt_kernels.impl.cpu import blocks_backward

    monkeypatch.setattr(blocks_backward, "BLOCK_ROWS", 2)
    for name in ("gate_query", "gate_indexed_query"):
        accuracy.check(CASES[name].inputs(), "cpu", generator=GENERATOR().manual_seed(0))


@pytest.mark.parametrize("name", ["plain", "causal", "causal_gate_query", "dropout", "everything", "gate_indexed"])
def test_the_same_bits_twice(name):
    x = replace(CASES[name], batch=3, queries=65, keys=65).inputs()
    grads = torch.randn(x.query.shape[:3] + x.value.shape[3:])
    first, second = (
        accuracy.evaluate(
            lambda leaves: torch.ops.apt_kernels.attention(*leaves.flat(), "cpu")[:2],
            x,
            accuracy.differentiable(x),
            grads,
            None,
        )
        for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_what_is_needed_is_computed(monkeypatch):
    from apt_kernels.impl.cpu import stock

    calls, original = [], stock._flash_backward
    monkeypatch.setattr(stock, "_flash_backward", lambda *a, **k: calls.append(a[2].shape[2]) or original(*a, **k))
    x = replace(CASES["causal_gate_query"], queries=40, keys=40).inputs()
    prefix = x.prefix_key.detach().requires_grad_()
    out = apt_kernels.attention(
        x.query, x.key, x.value, prefix, x.prefix_value, x.gate, x.layer_scale, mask=Mask(causal=True)
    )
    out.sum().backward()
    assert calls == []
    assert prefix.grad.abs().max() > 0
