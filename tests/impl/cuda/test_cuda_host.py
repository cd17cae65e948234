"""The CUDA C++ kernels against the specification: the same source, built for the host, with every thread."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given

import apt_kernels
from apt_kernels.errors import ImplementationError
from apt_kernels.impl.cuda import attend, library
from apt_kernels.impl.cuda.launch import LAUNCHES, Problem
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from apt_kernels.ops import choose
from helpers import cuda_host
from helpers.accuracy import check, differentiable
from helpers.cases import CASES, ONE_PREFIX, Case, cases, examples
from helpers.kernels import (
    HIDDEN_BY,
    SEEDS,
    check_dropout_is_the_shared_stream,
    check_hidden_tiles_are_not_read,
    check_query_offset_is_read_by_the_kernel,
    check_same_bits_twice,
    check_torch_compile,
    results,
)

HALVES = (torch.float16, torch.bfloat16)
EVERY_KERNEL = {"forward", "delta", "query", "key_value", "prefix"}


@pytest.fixture(autouse=True)
def _host():
    cuda_host.use()
    LAUNCHES.clear()


def hold(x: Inputs, wanted=None) -> None:
    """Check the kernels by the error rule; an error, or a call without one of the kernels, is a failure."""
    assert choose.choose(x, "cuda").strategy == "fused"
    LAUNCHES.clear()
    check(x, "cuda", wanted=wanted, generator=torch.Generator().manual_seed(7))
    expected = EVERY_KERNEL | ({"gate"} if x.gate_per_query else set())
    expected |= {"index"} if x.gate_index is not None else set()
    expected |= {"bias"} if "bias" in differentiable(x) else set()
    assert set(LAUNCHES) == expected


def small(name: str) -> Case:
    """A named case with few heads, to save time; cases about heads keep theirs."""
    return CASES[name] if name.startswith("multi") else replace(CASES[name], kv_heads=1)


@pytest.mark.parametrize("name", ONE_PREFIX)
def test_feature(name):
    hold(CASES[name].inputs())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ONE_PREFIX)
def test_feature_in_half_precision(name, dtype):
    hold(replace(small(name), batch=1, dtype=dtype, prefix_dtype=torch.float32).inputs())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(1, 3), (16, 64), (64, 64), (80, 128), (128, 96), (136, 8), (256, 256)]
)
def test_head_sizes(head_dim, value_dim, dtype):
    case = Case(batch=1, kv_heads=1, group=2, causal=True, dtype=dtype, head_dim=head_dim, value_dim=value_dim)
    hold(case.inputs())


@pytest.mark.parametrize(
    ("name", "head_dim", "value_dim"),
    [("everything", 24, 40), ("gate_indexed_query", 40, 24), ("causal", 72, 128), ("bias_keys_gradient", 136, 256)],
)
def test_float16_as_on_turing(name, head_dim, value_dim, monkeypatch):
    """Compute capability 7.5 multiplies by eight inner elements, not sixteen: other sums, within the rule."""
    x = replace(small(name), batch=1, dtype=torch.float16, head_dim=head_dim, value_dim=value_dim).inputs()
    whole = results("cuda", x)
    monkeypatch.setenv("APT_HALF_STEP", "8")
    hold(x)
    halves = results("cuda", x)
    assert any(not torch.equal(whole[result], halves[result]) for result in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tiles(dtype):
    """More than one tile of queries, of keys and of the prefix, for every tile size of the kernels."""
    case = Case(batch=1, kv_heads=1, group=1, queries=150, keys=160, length=140, causal=True, gate="query", dtype=dtype)
    hold(case.inputs())


@pytest.mark.parametrize(
    ("window", "offset"),
    [
        *product([(1, None), (None, 0), (0, 62), (64, 0)], [-1, 0, 1]),
        ((None, 0), 30),  # the first query of a tile misses one key of a tile of 32
        ((30, None), 0),  # its last query does
    ],
    ids=str,
)
def test_windows_that_end_at_the_edge_of_a_tile(window, offset):
    """One query or key beyond a tile's edge is the only one of its tile to be seen, or not to be."""
    sizes = {"batch": 1, "kv_heads": 1, "group": 1, "queries": 99, "keys": 131, "head_dim": 8, "value_dim": 8}
    hold(Case(window=window, offset=offset, **sizes).inputs())


@pytest.mark.parametrize(
    ("batch", "blocks", "parts"), [(1, 512, (1, 1, 6)), (1, 4, (1, 1, 4)), (7, 2, (3, 3, 1))], ids=str
)
def test_partial_sums(batch, blocks, parts, monkeypatch):
    """Few rows are split, with a shorter last split; many rows share a partial sum, with a smaller last chunk."""
    monkeypatch.setattr(attend, "_BLOCKS", blocks)
    x = Case(batch=batch, kv_heads=1, group=2, queries=70, keys=3, head_dim=8, value_dim=8).inputs()
    assert attend._parts(Problem(x)) == parts
    hold(x)


@examples(100)
@given(cases(dtype=(torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16), batch=(1, 1, 2)))
def test_any_inputs(case):
    hold(case.inputs())


@pytest.mark.parametrize("name", ["everything", "gate_indexed_query", "bias_keys_gradient"])
def test_same_bits_twice(name):
    check_same_bits_twice("cuda", small(name).inputs())


@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_is_the_shared_stream(seed):
    check_dropout_is_the_shared_stream("cuda", seed, "cpu")


@pytest.mark.parametrize(
    ("wanted", "kernels"),
    [
        (["query"], {"query"}),
        (["key"], {"key_value"}),
        (["value"], {"key_value"}),
        (["prefix_key"], {"prefix"}),
        (["prefix_value"], {"prefix"}),
        (["gate"], {"prefix"}),
        (["layer_scale"], {"prefix"}),
        (["sinks"], set()),
        (["bias"], {"bias"}),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_only_what_is_needed(wanted, kernels):
    x = replace(small("sinks"), bias="1HTS", bias_grad=True).inputs()
    check(x, "cuda", wanted=wanted, logsumexp_gradient=False)
    assert set(LAUNCHES) == {"forward", "delta"} | kernels


def _last_dim_strided(tensor):
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(tensor):
    wide = torch.cat([torch.full_like(tensor, torch.nan), tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    return wide[..., tensor.shape[-1] : 2 * tensor.shape[-1]]


def _odd(tensor):
    """Rows that begin at no multiple of 16 bytes."""
    wide = torch.cat([torch.full_like(tensor[..., :1], torch.nan), tensor], dim=-1)
    return wide[..., 1:]


@pytest.mark.parametrize("change", [_last_dim_strided, _sliced, _odd])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(change, dtype):
    x = replace(small("causal"), dtype=dtype).inputs()
    x = Inputs(**{name: change(part) if name in DIFFERENTIABLE[:5] else part for name, part in x.__dict__.items()})
    assert not x.query.is_contiguous()
    hold(x)


def test_expanded_inputs_and_output_gradient():
    q = torch.randn(2, 4, 17, 16, requires_grad=True)
    k = torch.randn(1, 1, 17, 16).expand(2, 2, 17, 16)
    p = torch.randn(1, 5, 16).expand(2, 5, 16)
    grads = []
    for implementation in ("cuda", "reference"):
        out = apt_kernels.attention(q, k, k, p, p, implementation=implementation)
        grads.append(torch.autograd.grad(out.sum(), q)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("hidden_by", HIDDEN_BY)
def test_hidden_tiles_are_not_read(hidden_by):
    check_hidden_tiles_are_not_read("cuda", hidden_by, half=64, heads=1, queries=1, device="cpu")


def test_query_offset_is_read_by_the_kernel():
    x = small("causal_offset_row").inputs()
    check_query_offset_is_read_by_the_kernel("cuda", x)
    hold(x)


def test_torch_compile():
    check_torch_compile("cuda", small("causal_gate_query").inputs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 264, "value_dim": 16}, "head sizes are 264 and 16; it takes up to 256"),
        ({"dtype": torch.float64}, "query has dtype torch.float64; it takes float32, float16 and bfloat16"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ImplementationError, match=message):
        choose.choose(replace(small("plain"), **change).inputs(), "cuda")


def test_the_host_build_is_never_chosen_by_itself(monkeypatch):
    x = CASES["plain"].inputs()
    assert choose.choose(x).name != "cuda"
    monkeypatch.setattr(library, "host", None)
    with pytest.raises(ImplementationError, match=r"implementation 'cuda' cannot serve this call: .*(library|device)"):
        choose.choose(x, "cuda")
