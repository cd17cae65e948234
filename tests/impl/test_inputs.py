"""Inputs in any form, on every implementation: strides, scales, hidden keys of any size, mixed dtypes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl import reference
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from helpers import accuracy
from helpers.backends import place, serves, small

GENERATOR = torch.Generator


def every_second(tensor: Tensor) -> Tensor:
    """The same numbers, each beside a large number that would change any result."""
    wide = (
        tensor.new_full((*tensor.shape, 2), 1e4)
        if tensor.dtype.is_floating_point
        else tensor[..., None].repeat_interleave(2, -1)
    )
    wide[..., 0] = tensor
    return wide[..., 0]


def last_dimension_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1)


def at_the_end(tensor: Tensor) -> Tensor:
    """A view that ends with its buffer, at an odd offset."""
    buffer = tensor.new_empty(tensor.numel() + 3)
    if tensor.dtype.is_floating_point:
        buffer[:3] = torch.nan
    return buffer[3:].view(tensor.shape).copy_(tensor)


def one_value(tensor: Tensor) -> Tensor:
    """The first number of each row, expanded along the last dimension."""
    return tensor[..., :1].contiguous().expand_as(tensor)


def one_row(tensor: Tensor) -> Tensor:
    """The first batch row (or head), expanded."""
    return tensor[:1].contiguous().expand_as(tensor)


def backwards_rows(tensor: Tensor) -> Tensor:
    """Every dimension in the opposite order in memory."""
    return tensor.permute(*range(tensor.ndim - 1, -1, -1)).contiguous().permute(*range(tensor.ndim - 1, -1, -1))


FORMS = (every_second, last_dimension_first, at_the_end, one_value, one_row, backwards_rows)
NAMES = (
    "plain",
    "causal",
    "causal_decode",
    "causal_decode_padding",
    "causal_gate_query",
    "gate_indexed_query",
    "everything",
)


def formed(x: Inputs, form) -> Inputs:
    """The inputs with every tensor of more than one element in another form."""
    parts = {}
    for name, part in x.__dict__.items():
        # A row's own offset and a seed are read one by one.
        if isinstance(part, Tensor) and part.ndim > 1 and not (form in (one_value, one_row) and name == "gate_index"):
            parts[name] = form(part.detach()).requires_grad_(part.requires_grad)
    return replace(x, **parts)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_any_strides(backend, name, form):
    x = serves(backend, formed(small(name).inputs(place(backend)), form))
    accuracy.check(x, backend.name, logsumexp_gradient=name == "everything", generator=GENERATOR().manual_seed(0))


@pytest.mark.parametrize("name", ["plain", "causal_gate_query", "causal_decode"])
def test_a_gradient_that_is_one_number_expanded(backend, name):
    x = serves(backend, small(name).inputs(place(backend)))
    grad = torch.ones((), device=x.query.device).expand(*x.query.shape[:3], x.value.shape[3])
    wanted = accuracy.differentiable(x)

    def op(leaves: Inputs):
        return torch.ops.apt_kernels.attention(*leaves.flat(), backend.name)[:2]

    accuracy.compare(accuracy.evaluate(op, x, wanted, grad, None), x, wanted, grad, None)


@pytest.mark.parametrize("scale", [0.0, -0.5, -1e-3, 3.0])
@pytest.mark.parametrize("name", ["plain", "causal", "causal_decode", "causal_gate_query", "right_padding", "softcap"])
def test_any_finite_scale(backend, name, scale):
    x = serves(backend, replace(small(name), scale=scale).inputs(place(backend)))
    accuracy.check(x, backend.name, logsumexp_gradient=False, generator=GENERATOR().manual_seed(0))


def planted(x: Inputs, value: float) -> Inputs:
    """The inputs with ``value`` in the keys that no query sees."""
    seen = x.visible().expand(x.query.shape[0], x.query.shape[1], x.query.shape[2], x.key.shape[2])
    hidden = ~seen.any(2).view(x.query.shape[0], x.key.shape[1], -1, x.key.shape[2]).any(2)
    assert hidden.any()
    return replace(x, key=x.key.masked_fill(hidden[..., None], value))


HIDING = ("right_padding", "left_padding", "causal_left_padding", "causal_right_padding", "causal_decode_padding",
          "causal_offset_zero", "causal_gate_query_offset", "dense_keys", "window_decode", "window", "segments",
          "all_padding")  # fmt: skip
LARGE = (1e4, 1e30, -1e30, 3e38, torch.inf, -torch.inf, torch.nan)


def hiding(name: str):
    if name == "causal_gate_query_offset":
        return replace(small("causal_gate_query"), keys=9, offset=0)
    if name == "window":
        return replace(small(name), queries=3, keys=12, offset=1)
    if name == "segments":
        return replace(small(name), queries=3, keys=9, batch=1, seed=4)
    return small(name)


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize("name", HIDING)
def test_hidden_keys_of_any_size_are_hidden(backend, name, value):
    """Outputs, and the gradients of what is not multiplied with hidden keys, are those of ordinary hidden keys."""
    plain = serves(backend, hiding(name).inputs(place(backend)))
    x = planted(plain, value)
    out, logsumexp = torch.ops.apt_kernels.attention(*x.flat(), backend.name)[:2]
    truth = reference.attend(accuracy.upcast(plain))
    for have, expected in zip((out, logsumexp), truth):
        torch.testing.assert_close(have, expected.to(have.dtype), rtol=1e-4, atol=1e-5)
    # The gradients of query, key and value may hold products of 0 and infinity, the specification's as well.
    meets = ("query",) if abs(value) < torch.inf else ("query", "key", "value")
    wanted = [part for part in accuracy.differentiable(x) if part not in meets]
    grads = torch.randn(out.shape, generator=GENERATOR().manual_seed(0)).to(out), None

    def op(leaves: Inputs):
        return torch.ops.apt_kernels.attention(*leaves.flat(), backend.name)[:2]

    ours = accuracy.evaluate(op, x, wanted, *grads)
    exact = accuracy.evaluate(reference.attend, plain, wanted, *grads)
    for part in wanted:
        torch.testing.assert_close(ours[part], exact[part], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("broadcast", [(0, 3), (0, 1, 3), (0, 1, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("name", ["dense_keys", "causal_gate_query"])
def test_a_dense_mask_that_broadcasts(backend, name, broadcast):
    x = small(name).inputs(place(backend))
    size = [1 if i in broadcast else n for i, n in enumerate((x.sizes[0], x.sizes[1], x.sizes[3], x.sizes[4]))]
    dense = torch.rand(size, generator=GENERATOR().manual_seed(1)).to(x.query.device) > 0.4
    accuracy.check(serves(backend, replace(x, dense=dense)), backend.name, generator=GENERATOR().manual_seed(0))


@pytest.mark.parametrize("value", [1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["causal", "causal_gate_query", "causal_more_keys"])
def test_a_large_key_is_hidden_from_the_queries_before_it(backend, name, value):
    x = serves(backend, replace(small(name), queries=6, keys=6).inputs(place(backend)))
    key = x.key.clone()
    key[:, :, 4] = value
    out = torch.ops.apt_kernels.attention(*replace(x, key=key).flat(), backend.name)[0]
    expected = torch.ops.apt_kernels.attention(*x.flat(), "reference")[0]
    torch.testing.assert_close(out[:, :, :4], expected[:, :, :4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [("value",), ("prefix_value",), ("value", "prefix_value"), ("gate",)])
@pytest.mark.parametrize("name", ["plain", "causal_gate_query"])
def test_few_gradients_and_one_of_the_log_sum_exp(backend, name, wanted):
    x = serves(backend, small(name).inputs(place(backend)))
    accuracy.check(x, backend.name, wanted=wanted, generator=GENERATOR().manual_seed(0))


def test_every_differentiable_input_is_covered():
    x = small("everything").inputs()
    assert accuracy.differentiable(x) == list(DIFFERENTIABLE)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_any_mixture(autocast, dtype, prefix_dtype):
    torch.manual_seed(0)
    tokens = [torch.randn(2, 2, 5, 16).to(dtype) for _ in range(3)]
    prefix = [torch.randn(2, 3, 16).to(prefix_dtype).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=autocast):
        out = apt_kernels.attention(*tokens, *prefix, mask=Mask(causal=True))
    assert out.dtype == autocast
    wide = [part.to(autocast).float() for part in tokens], [part.detach().float() for part in prefix]
    expected = apt_kernels.attention(*wide[0], *wide[1], mask=Mask(causal=True))
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)  # one rounding to bfloat16 is 0.004
    out.sum().backward()
    assert all(part.grad.dtype == prefix_dtype for part in prefix)


def test_tensors_are_all_fields_that_hold_one():
    """They are listed by hand, since this runs in each layer of a decoding step."""
    names = [field.name for field in fields(Inputs)]
    given = {field.name: torch.zeros(1) if "Tensor" in str(field.type) else 0 for field in fields(Inputs)}
    found = Inputs(**given).tensors()
    wanted = [given[name] for name in names if isinstance(given[name], Tensor)]
    assert [id(part) for part in sorted(found, key=id)] == [id(part) for part in sorted(wanted, key=id)]
    assert len(found) == names.index("offset")
