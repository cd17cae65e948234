"""The product of hidden states with a gate's weight: operands in half precision, sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms


def gate_product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """``h W^T`` with the operands in the hidden states' dtype, accumulated and returned in float32 (or float64).

    Saved for the backward are the hidden states in their own dtype, not a copy in float32.
    """
    kind = hidden_states.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _product(hidden_states, weight)
    return _product(hidden_states, weight)


def _product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    recorded = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    if not recorded and hidden_states.dtype == weight.dtype == torch.float32:
        return torch.nn.functional.linear(hidden_states, weight)
    rows = hidden_states.flatten(0, -2)
    # torch.func can transform, and torch.jit.save can write, torch's own operators only.
    if transforms.active() or torch.jit.is_tracing():
        logits = _composite(rows, weight)
    elif recorded:
        logits = _GateProduct.apply(rows, weight)
    else:
        logits = _wide_product(rows, weight.to(rows.dtype).mT)
    return logits.reshape(*hidden_states.shape[:-1], weight.shape[0])


def _composite(rows: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide) @ weight.to(rows.dtype).to(wide).mT


class _GateProduct(torch.autograd.Function):
    """``rows [N, d]`` times ``weight [M, d]``, transposed: ``[N, M]``."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype, weight = weight.dtype, weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        return _wide_product(rows, weight.mT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_rows = _product_of_wide(grad, weight).to(rows.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = _product_of_wide(grad.mT, rows).to(ctx.dtype)
        return of_rows, of_weight


def _on_tensor_cores(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None and tensor.dtype in (torch.bfloat16, torch.float16)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, summed and returned in float32 at least."""
    if _on_tensor_cores(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _product_of_wide(a: Tensor, b: Tensor) -> Tensor:
    """`_wide_product` of a float32 ``a``: tensor cores multiply it as the sum of two bfloat16 parts."""
    if b.dtype == torch.bfloat16 and _on_tensor_cores(b):
        high = a.to(b.dtype)
        return _wide_product(high, b) + _wide_product((a - high).to(b.dtype), b)
    return a @ b.to(a.dtype)
