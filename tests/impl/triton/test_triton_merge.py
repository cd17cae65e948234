"""The strategy "merge": the tokens by a library's kernel. Interpreted without a CUDA device, compiled with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl.inputs import DIFFERENTIABLE
from apt_kernels.ops import choose
from helpers import merged as merged_calls
from helpers.accuracy import check, differentiable, poisoned_memory
from helpers.cases import Case, cases, examples
from helpers.kernels import DEVICE
from helpers.merged import MASK_TENSORS, use

pytest.importorskip("triton", reason="the package triton is not installed")

# The dtype for cuDNN; where kernels are interpreted, torch's own kernel for the CPU computes the tokens.
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float32, torch.bfloat16)
PLAIN = Case(batch=2, kv_heads=1, group=2, dtype=DTYPES[0], prefix_dtype=torch.float32)


@pytest.fixture(autouse=True)
def merged(monkeypatch):
    use(monkeypatch, "merge")


def hold(x, fused_backward: bool = False, wanted=None) -> None:
    alone = fused_backward or (wanted is not None and not set(wanted) & {"query", "key", "value"})
    merged_calls.hold(x, "merge", forward_alone=alone, wanted=wanted, logsumexp_gradient=fused_backward)


@pytest.mark.parametrize("gate", ["none", "static", "row", "query", "indexed", "indexed_query"])
@pytest.mark.parametrize("causal", [False, True])
def test_gates(gate, causal):
    hold(replace(PLAIN, gate=gate, causal=causal).inputs(DEVICE))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_scale": None},
        {"layer_scale": -0.7},
        {"kv_heads": 3, "group": 1},
        {"keys": 40},
        {"queries": 40, "keys": 9},
        {"heads_last": False},
        {"scale": 0.5},
        {"scale": -0.3},
        {"spread": 6.0, "causal": True},
        {"length": 40, "head_dim": 40, "value_dim": 40, "queries": 35, "keys": 35, "causal": True},
        {"head_dim": 128, "value_dim": 128},
    ],
    ids=str,
)
def test_shapes(change):
    hold(replace(PLAIN, **change).inputs(DEVICE))


def test_strides_and_an_expanded_output_gradient():
    """Rows that are not contiguous, and the expanded gradient of ``out.sum()``, give the results of contiguous ones."""
    x = replace(PLAIN, causal=True).inputs(DEVICE)
    strided = {name: getattr(x, name).mT.contiguous().mT for name in ("query", "key", "value")}
    results = []
    for its in (x, replace(x, **strided)):
        leaves = [getattr(its, name).requires_grad_() for name in differentiable(its)]
        out = torch.ops.apt_kernels.attention(*its.flat(), "triton")[0]
        of = torch.ones_like(out) if its is x else torch.ones((), dtype=out.dtype, device=DEVICE).expand_as(out)
        results.append([out, *torch.autograd.grad(out, leaves, of)])
    for dense, other in zip(*results):
        torch.testing.assert_close(other, dense)


@examples(60)
@given(
    cases(
        batch=(1, 1, 2),
        kv_heads=(1, 1, 2),
        group=(1, 1, 2),
        queries=(17, 20, 33),
        keys=(1, 17, 20, 33) if DEVICE == "cpu" else (2, 17, 20, 33),
        length=(1, 7, 18),
        head_dim=(16, 24, 40),
        value_dim=(16, 24, 40),
        dtype=DTYPES,
        softcap=(0.0,),
        sinks=(False,),
        dropout=(0.0,),
        offset=(None,),
        padding=("",),
        segments=(False,),
        dense=("",),
        bias=("",),
        window=(None,),
    )
)
def test_any_inputs(case):
    assume(not case.causal or case.queries == case.keys)
    hold(replace(case, value_dim=case.head_dim).inputs(DEVICE))


@pytest.mark.parametrize("causal", [False, True])
def test_a_gradient_of_the_logsumexp_is_left_to_our_own_backward(causal):
    """The fused backward uses the merged output like its own."""
    hold(replace(PLAIN, gate="query", causal=causal).inputs(DEVICE), fused_backward=True)


@pytest.mark.parametrize(
    "wanted", [("prefix_key", "prefix_value"), ("gate",), ("query",), ("key", "layer_scale")], ids="-".join
)
def test_only_what_is_needed(wanted):
    """The first layer of a frozen model needs no gradient of query, key and value: no stock backward runs."""
    from apt_kernels.impl.triton.arguments import LAUNCHES

    x = replace(PLAIN, causal=True).inputs(DEVICE)
    check(x, "triton", wanted=wanted, logsumexp_gradient=False)
    LAUNCHES.clear()
    if not {*wanted} & {"query", "key", "value"}:
        hold(x, wanted=wanted)


@pytest.mark.skipif(
    DEVICE == "cuda", reason="cuDNN's gradients are not deterministic; where that is asked, it is refused"
)
def test_same_bits_twice():
    x = replace(PLAIN, gate="query", causal=True).inputs(DEVICE)
    leaves = [getattr(x, name).requires_grad_() for name in differentiable(x)]

    def run():
        with poisoned_memory():
            out = torch.ops.apt_kernels.attention(*x.flat(), "triton")[0]
            return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


def test_torch_compile():
    x = replace(PLAIN, causal=True, gate="query").inputs(DEVICE)
    tensors = [getattr(x, name).detach().requires_grad_() for name in DIFFERENTIABLE[:7]]

    def call(*tensors):
        return apt_kernels.attention(*tensors, mask=Mask(causal=True), implementation="triton")

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for eager, compiled in zip(*results):
        if DEVICE == "cpu":
            assert torch.equal(eager, compiled)
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((change, f"takes no {name}") for name, change in MASK_TENSORS.items()),
        ({"sinks": True}, "takes no sinks"),
        ({"dropout": 0.1}, "without dropout"),
        ({"softcap": 2.0}, "soft-cap"),
        ({"window": (3, None)}, "windows"),
        ({"value_dim": 16}, "head sizes are 24 and 16"),
        ({"causal": True, "keys": 40}, "a square"),
        ({"causal": True, "keys": 40, "offset": 0}, "a square"),
        ({"causal": True, "offset": 3}, "a square"),
    ],
    ids=str,
)
def test_what_no_stock_kernel_takes_is_fused(change, reason):
    from apt_kernels.impl.triton.stock import cudnn

    x = replace(PLAIN, **change).inputs(DEVICE)
    assert reason in cudnn.obstacle(x)
    assert choose.choose(x, "triton").strategy == "fused"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"head_dim": 136, "value_dim": 136}, "head size is 136"),
        ({"head_dim": 20, "value_dim": 20}, "head size is 20"),
        ({"keys": 1}, "two keys or more"),
        ({"keys": 2}, None),
    ],
    ids=str,
)
def test_what_cudnn_takes(change, reason, monkeypatch):
    from apt_kernels.impl.triton.stock import cudnn

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found = cudnn._cudnn_obstacle(replace(PLAIN, **{"dtype": torch.bfloat16, **change}).inputs())
    assert found is None if reason is None else reason in found


def test_cudnn_takes_rows_at_multiples_of_16_bytes(monkeypatch):
    from apt_kernels.impl.triton.stock import cudnn

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    x = replace(PLAIN, dtype=torch.bfloat16).inputs()
    for columns, taken in ((slice(8, 32), True), (slice(4, 28), False)):
        wide = torch.cat([x.key, x.key], dim=-1)
        assert (cudnn._cudnn_obstacle(replace(x, key=wide[..., columns])) is None) == taken
    odd = torch.cat([x.key, x.key[..., :1]], dim=-1)[..., :-1]
    assert "multiples of 16 bytes" in cudnn._cudnn_obstacle(replace(x, key=odd))


def test_wide_heads_go_to_cudnn_on_hopper(monkeypatch):
    from apt_kernels.impl.triton.stock import cudnn

    for capability, version, most in (((9, 0), 91000, 256), ((9, 0), 90900, 128), ((10, 0), 91000, 128)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda found=version: found)
        assert cudnn._most_columns(torch.device("cuda")) == most


def test_cudnn_is_not_asked_for_deterministic_gradients(monkeypatch):
    from apt_kernels.impl.triton.stock import cudnn

    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    x = replace(PLAIN, dtype=torch.bfloat16).inputs()
    torch.use_deterministic_algorithms(True)
    try:
        assert "not deterministic" in cudnn._cudnn_obstacle(x)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert cudnn._cudnn_obstacle(x) == "cuDNN is not available"


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_called_as_torch_declares_it(causal):
    """Without a device: the results of the operators' shape functions have the layout that the kernels expect."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from apt_kernels.impl.triton.stock import cudnn

    case = replace(PLAIN, dtype=torch.bfloat16, head_dim=64, value_dim=64, causal=causal)
    with FakeTensorMode(allow_non_fake_inputs=True):
        drawn = case.inputs()
        parts = {name: torch.empty_like(getattr(drawn, name), device="cuda") for name in ("query", "key", "value")}
        x = replace(drawn, **parts)
        out, logsumexp = cudnn.forward(x)
        assert out.shape == x.query.shape
        assert (logsumexp.shape, logsumexp.dtype) == (x.query.shape[:3], torch.float32)
        grads = cudnn.backward(x, out, logsumexp.contiguous(), torch.empty_like(out))
        assert [grad.shape for grad in grads] == [part.shape for part in (x.query, x.key, x.value)]


def test_nothing_is_merged_before_it_was_measured(monkeypatch):
    """The table has no entry without a source."""
    from apt_kernels.impl.triton import tiles

    monkeypatch.undo()
    assert not tiles._MERGED
    assert choose.choose(PLAIN.inputs(DEVICE), "triton").strategy == "fused"
