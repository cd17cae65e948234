"""The Triton kernels against the specification: interpreted where there is no CUDA device, compiled where there is."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import apt_kernels
from apt_kernels.errors import ImplementationError
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from apt_kernels.ops import choose
from helpers import models
from helpers.accuracy import check, differentiable
from helpers.cases import CASES, Case, cases, examples
from helpers.kernels import (
    BACKWARD,
    DEVICE,
    HIDDEN_BY,
    SEEDS,
    check_dropout_is_the_shared_stream,
    check_hidden_tiles_are_not_read,
    check_query_offset_is_read_by_the_kernel,
    check_same_bits_twice,
    check_torch_compile,
)
from helpers.patched import randomise

pytest.importorskip("triton", reason="the package triton is not installed")

FORWARD = {"fused": {"attention_forward"}, "split": {"split_attention", "merge_shares"}}


@pytest.fixture
def launches():
    """Counts kernel launches by name, from zero."""
    from apt_kernels.impl.triton.arguments import LAUNCHES

    LAUNCHES.clear()
    return LAUNCHES


def hold(x: Inputs, wanted=None) -> None:
    """Check the kernels by the error rule; an error, or more or fewer launches than expected, is a failure."""
    from apt_kernels.impl.triton.arguments import LAUNCHES

    strategy = choose.choose(x, "triton").strategy
    LAUNCHES.clear()
    check(x, "triton", wanted=wanted, generator=torch.Generator().manual_seed(7))
    expected = FORWARD[strategy] | BACKWARD
    if "bias" in differentiable(x):
        expected = expected | {"token_bias_gradient"}
    assert dict(LAUNCHES) == dict.fromkeys(expected, 1)


def small(name: str) -> Case:
    """A named case with few heads, since the interpreter is slow; cases about heads keep theirs."""
    return CASES[name] if name.startswith("multi") else replace(CASES[name], kv_heads=1)


# tests/impl/test_backends.py holds every case to the error rule; these differ in what is launched.
@pytest.mark.parametrize("name", ["plain", "multi_query", "causal_decode", "bias_keys_gradient", "mixed", "everything"])
def test_launches(name):
    hold(small(name).inputs(DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["plain", "causal_gate_query", "everything"])
def test_dtype(name, dtype):
    prefix_dtype = None if dtype == torch.float64 else torch.float32
    hold(replace(small(name), dtype=dtype, prefix_dtype=prefix_dtype).inputs(DEVICE))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (1, 3), (80, 128), (96, 32), (256, 256), (8, 8)])
def test_head_sizes(head_dim, value_dim):
    hold(Case(batch=1, kv_heads=1, group=1, head_dim=head_dim, value_dim=value_dim, causal=True).inputs(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads_with_a_gate_for_each_query(dtype):
    """The products of wide heads are summed over parts of a head."""
    sizes = {"batch": 1, "kv_heads": 1, "group": 2, "queries": 5, "keys": 5, "length": 3}
    hold(Case(**sizes, head_dim=160, value_dim=256, gate="query", causal=True, dtype=dtype).inputs(DEVICE))


def test_prefix_of_many_tiles():
    hold(Case(batch=1, kv_heads=1, group=1, queries=3, keys=3, length=500, gate="row", sinks=True).inputs(DEVICE))


@pytest.mark.parametrize("mask", [{"causal": True}, {"window": (70, None)}, {"padding": "left"}], ids=str)
def test_decoding_over_many_tiles(mask):
    """Every share of the keys and of the prefix has several tiles, so that earlier sums are rescaled."""
    case = Case(batch=4, kv_heads=2, group=1, queries=1, keys=100, length=100, spread=2.0, **mask)
    assert choose.choose(case.inputs(DEVICE), "triton").strategy == "split"
    hold(case.inputs(DEVICE))


@examples(60)
@given(
    cases(
        batch=(1, 1, 1, 2),
        kv_heads=(1, 1, 1, 2),
        group=(1, 1, 2),
        queries=(1, 4, 17, 20),
        keys=(1, 16, 20, 33),
        length=(1, 7, 18),
        head_dim=(16, 24, 40),
        value_dim=(16, 24, 40),
        dtype=(torch.float32, torch.float32, torch.bfloat16, torch.float16),
    )
)
def test_any_inputs(case):
    hold(case.inputs(DEVICE))


@pytest.mark.parametrize("name", ["everything", "gate_indexed_query", "bias_keys_gradient"])
def test_same_bits_twice(name, launches):
    check_same_bits_twice("triton", small(name).inputs(DEVICE))
    assert set(launches.values()) == {2}


_TINY = Case(batch=1, kv_heads=1, group=2, queries=2, keys=3, length=2, head_dim=2, value_dim=3, dtype=torch.float64)


@pytest.mark.parametrize(
    "case",
    [
        replace(_TINY, causal=True, sinks=True),
        replace(_TINY, gate="query", softcap=1.5, spread=2.0),
        replace(_TINY, gate="indexed_query", dropout=0.3),
        replace(_TINY, gate="static", bias="1HTS", bias_grad=True, window=(1, 1)),
    ],
    ids=["row", "query", "indexed_query", "static"],
)
def test_gradcheck(case, launches):
    x = case.inputs(DEVICE)
    names = differentiable(x)

    def op(*tensors):
        return torch.ops.apt_kernels.attention(*Inputs(**{**x.__dict__, **dict(zip(names, tensors))}).flat(), "triton")[
            :2
        ]

    leaves = [getattr(x, name).detach().requires_grad_() for name in names]
    # The derivative along a drawn direction: element by element it takes half a minute in the interpreter.
    assert gradcheck(op, leaves, nondet_tol=0.0, fast_mode=True)
    assert launches["attention_forward"] > 2 * len(names)
    assert launches["column_gradients"]


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_is_the_shared_stream(seed, launches):
    check_dropout_is_the_shared_stream("triton", seed, DEVICE)
    assert launches["attention_forward"] == 2


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        (["query"], set()),
        (["key"], {"column_gradients"}),
        (["value"], {"column_gradients"}),
        (["prefix_key"], {"column_gradients", "finish_gradients"}),
        (["prefix_value"], {"column_gradients", "finish_gradients"}),
        (["gate"], {"column_gradients", "finish_gradients"}),
        (["layer_scale"], {"column_gradients", "finish_gradients"}),
        (["sinks"], {"finish_gradients"}),
        (["bias"], {"token_bias_gradient"}),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_only_what_is_needed(wanted, kernels, launches):
    x = replace(small("sinks"), bias="1HTS", bias_grad=True).inputs(DEVICE)
    check(x, "triton", wanted=wanted, logsumexp_gradient=False)
    assert launches == dict.fromkeys({"attention_forward", "query_gradient"} | kernels, 1)


def test_only_a_gate_by_query(launches):
    check(small("gate_query").inputs(DEVICE), "triton", wanted=["gate"])
    assert launches == dict.fromkeys({"attention_forward", "query_gradient", "column_gradients"}, 1)


class _Computed(TorchDispatchMode):
    """The ATen operators that were called, except those that only allocate or view: each is a launch on a device."""

    def __init__(self):
        super().__init__()
        self.names, self.launching = set(), False

    @contextlib.contextmanager
    def without_launches(self, monkeypatch):
        """Record, except inside a launch, where the interpreter copies tensors."""
        from apt_kernels.impl.triton import arguments

        def execute(*args, **named):
            self.launching = True
            try:
                real(*args, **named)
            finally:
                self.launching = False

        real = arguments.execute
        monkeypatch.setattr(arguments, "execute", execute)
        with self:
            yield

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if not self.launching and not function.is_view and not name.startswith(("empty", "new_empty")):
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["causal_gate_query", "everything", "gate_indexed", "causal_decode", "segments"])
def test_nothing_else_is_launched(name, launches, monkeypatch):
    """One launch forward (two with "split"), three backward, and no other operator of PyTorch."""
    from apt_kernels.impl.triton import BACKEND

    x = replace(small(name), dtype=torch.bfloat16, prefix_dtype=torch.float32, bias="").inputs(DEVICE)
    needs = [getattr(x, part) is not None for part in DIFFERENTIABLE]
    computed = _Computed()
    with computed.without_launches(monkeypatch):
        plan = BACKEND.plan(x)
        result = BACKEND.forward(x, plan)
        forward = launches.total()
        BACKEND.backward(x, plan, result, torch.ones_like(result.out), torch.ones_like(result.logsumexp), needs)
    assert forward == (2 if plan.strategy == "split" else 1)
    assert launches.total() - forward == 3
    assert computed.names <= {"ones_like", "fill_"}


def _strided(x: Inputs, change) -> Inputs:
    return Inputs(**{name: change(part) if name in DIFFERENTIABLE[:5] else part for name, part in x.__dict__.items()})


def _last_dim_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(tensor):
    wide = torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    return wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]


@pytest.mark.parametrize("change", [_last_dim_strided, _sliced])
def test_strides(change):
    x = _strided(small("causal").inputs(DEVICE), change)
    assert not x.query.is_contiguous()
    hold(x)


def test_expanded_inputs_and_output_gradient(launches):
    q = torch.randn(2, 4, 17, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(1, 1, 17, 16, device=DEVICE).expand(2, 2, 17, 16)
    p = torch.randn(1, 5, 16, device=DEVICE).expand(2, 5, 16)
    grads = []
    for implementation in ("triton", "reference"):
        out = apt_kernels.attention(q, k, k, p, p, implementation=implementation)
        grads.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*grads)
    assert launches["query_gradient"] == 1


@pytest.mark.parametrize(("keys", "stride"), [(17, 2**27), (9, 2**28)], ids=["between_tiles", "within_a_tile"])
def test_rows_beyond_32_bit_offsets(keys, stride, launches):
    """The last keys are 2^31 elements into their storage; memory between the rows is never accessed."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of GPU memory")
    case = replace(CASES["plain"], batch=1, kv_heads=1, group=1, keys=keys, dtype=torch.bfloat16)
    x = case.inputs(DEVICE)
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(x.key.shape, (0, 0, stride, 1))
    far.copy_(x.key)
    found = []
    for key in (x.key, far):
        leaves = replace(x, query=x.query.detach().requires_grad_(), key=key.detach().requires_grad_())
        out = torch.ops.apt_kernels.attention(*leaves.flat(), "triton")[0]
        found.append([out, *torch.autograd.grad(out.float().sum(), (leaves.query, leaves.key))])
    assert all(torch.equal(near, distant) for near, distant in zip(*found))
    assert launches["attention_forward"] == launches["query_gradient"] == launches["column_gradients"] == 2


@pytest.mark.parametrize("queries", [1, 2], ids=["split", "fused"])
@pytest.mark.parametrize("hidden_by", HIDDEN_BY)
def test_hidden_tiles_are_not_read(hidden_by, queries, launches):
    from apt_kernels.impl.triton import tiles

    architecture = tiles.architecture(torch.device(DEVICE))
    half = max(tiles.tile(kernel, architecture, 4, 16).columns for kernel in ("forward", "query", "key_value"))
    heads = 1 if queries == 1 else 32  # too many rows for the strategy "split"
    check_hidden_tiles_are_not_read("triton", hidden_by, half, heads, queries, DEVICE)
    assert launches["split_attention" if queries == 1 else "attention_forward"] == 2


def test_refuses_large_heads():
    x = Case(batch=1, kv_heads=1, group=1, queries=1, keys=1, length=1, head_dim=264, value_dim=16).inputs(DEVICE)
    with pytest.raises(ImplementationError, match="head sizes are 264 and 16; it takes up to 256"):
        choose.choose(x, "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about the CPU")
def test_cpu_tensors_only_under_the_interpreter(monkeypatch):
    x = CASES["plain"].inputs()
    assert choose.choose(x).name != "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET" in choose.info()["implementations"]["triton"]
    with pytest.raises(ImplementationError, match="TRITON_INTERPRET=1 is not set"):
        choose.choose(x, "triton")


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_first_choice_on_cuda():
    assert choose.choose(CASES["plain"].inputs("cuda")).name == "triton"


def test_query_offset_needs_no_host_sync(launches):
    x = small("causal_offset_row").inputs(DEVICE)
    check_query_offset_is_read_by_the_kernel("triton", x)
    hold(x)


def test_torch_compile(launches):
    check_torch_compile("triton", small("causal_gate_query").inputs(DEVICE))
    assert launches["attention_forward"] == 2


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_torch_compile_of_models(family, launches, monkeypatch):
    """One graph through a patched model, forward and backward, with the kernels in it."""
    monkeypatch.setenv(choose.VARIABLE, "triton")
    model = apt_kernels.patch(models.build(family), prefix_length=4).to(DEVICE)
    randomise(model)
    given = {name: tensor.to(DEVICE) for name, tensor in models.inputs(family, "right").items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = run(**given).logits
        results.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)
    layers = len(apt_kernels.prefixes(model))
    assert launches == dict.fromkeys(FORWARD["fused"] | BACKWARD, 2 * layers)
