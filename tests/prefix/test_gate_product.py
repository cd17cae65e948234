"""The gate's product with hidden states: its accuracy, and what it saves for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt_kernels.prefix import gate_product as module
from apt_kernels.prefix.gate_product import gate_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def draw(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[B, T, d]``, weight ``[M, d]`` in float32 at least, and the gradient of the logits."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    sizes = ((2, 40, 64), dtype), ((5, 64), wide), ((2, 40, 5), wide)
    hidden, weight, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(d) for s, d in sizes)
    # The truth is computed from the rounded operands.
    weight = weight.to(dtype).to(wide)
    return tuple(part.to(DEVICE) for part in (hidden, weight, grad))


def run(hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Logits, and the gradients of hidden states and weight."""
    leaves = [part.detach().requires_grad_() for part in (hidden, weight)]
    logits = gate_product(*leaves)
    return [logits.detach(), *torch.autograd.grad(logits, leaves, grad)]


def hold(dtype: torch.dtype) -> None:
    """Results are in float32; only the gradient of half-precision hidden states is rounded to their dtype."""
    given = draw(dtype)
    found, truth = run(*given), run(*(part.double() for part in given))
    wide = torch.promote_types(dtype, torch.float32)
    assert [part.dtype for part in found] == [wide, dtype, wide]
    exact = 64 * torch.finfo(wide).eps
    # Two parts of bfloat16 hold 16 bits of a wide gradient.
    in_parts = dtype == torch.bfloat16 and module._on_tensor_cores(given[0])
    for part, true, relative in zip(found, truth, (exact, torch.finfo(dtype).eps, 2**-14 if in_parts else exact)):
        assert (part.double() - true).abs().max() <= relative * true.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_wide(dtype):
    hold(dtype)


@pytest.fixture
def matrix_units(monkeypatch):
    """The code path of CUDA devices, with an emulated product with float32 results."""
    taken, mm = [], torch.mm

    def product(a, b, out_dtype):
        assert a.dtype == b.dtype
        assert a.dtype in (torch.bfloat16, torch.float16)
        assert out_dtype == torch.float32
        taken.append(a.dtype)
        return mm(a.float(), b.float())

    monkeypatch.setattr(module, "_on_tensor_cores", lambda t: t.dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(torch, "mm", product)
    return taken


@pytest.mark.skipif(DEVICE == "cuda", reason="a device has the real ones")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_tensor_cores(dtype, matrix_units):
    """A wide gradient goes there in two parts of bfloat16; float16 would lose small ones and is left wide."""
    hold(dtype)
    assert len(matrix_units) == {torch.bfloat16: 5, torch.float16: 1}.get(dtype, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_are_kept_as_they_are(dtype):
    """Not as a copy in float32, which would be twice the size of the model's own activations in every layer."""
    hidden, weight, _ = draw(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate_product(hidden.requires_grad_(), weight.requires_grad_())
    assert {t.data_ptr() for t in kept if t.numel() == hidden.numel()} == {hidden.data_ptr()}
    assert sum(t.nbytes for t in kept) <= hidden.nbytes + weight.nbytes


def test_only_what_is_needed():
    hidden, weight, grad = draw(torch.bfloat16)
    assert gate_product(hidden, weight).requires_grad is False
    logits = gate_product(hidden, weight.requires_grad_())
    logits.backward(grad)
    assert weight.grad is not None
    assert hidden.grad is None


@pytest.mark.parametrize("gate_shape", [(3, 64), (2, 7, 64)])
def test_any_number_of_rows(gate_shape):
    hidden, weight = torch.randn(gate_shape), torch.randn(5, 64)
    torch.testing.assert_close(gate_product(hidden, weight), hidden @ weight.mT)


def test_autocast_does_not_narrow_it():
    hidden, weight, grad = draw(torch.float32)
    plain = run(hidden, weight, grad)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        for part, expected in zip(run(hidden, weight, grad), plain):
            assert torch.equal(part, expected)


def test_gradcheck():
    hidden, weight, _ = (part[:1, :3] if part.ndim == 3 else part for part in draw(torch.float64))
    leaves = [part.requires_grad_() for part in (hidden, weight)]
    assert torch.autograd.gradcheck(gate_product, leaves)
    assert torch.autograd.gradgradcheck(gate_product, leaves)


def test_torch_compile():
    given = draw(torch.bfloat16)
    compiled = torch.compile(gate_product, fullgraph=True, backend="aot_eager")
    leaves = [part.detach().requires_grad_() for part in given[:2]]
    logits = compiled(*leaves)
    found = [logits.detach(), *torch.autograd.grad(logits, leaves, given[2])]
    for part, expected in zip(found, run(*given)):
        assert torch.equal(part, expected)
