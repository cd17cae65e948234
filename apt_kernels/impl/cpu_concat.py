"""The prefix, gated and scaled, in front of the keys, and one call of the stock kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_stock import _flash, _flash_backward, additive_mask
from .gate import gate_gradients
from .inputs import DIFFERENTIABLE, Inputs, heads_last


def _joined(x: Inputs, weights: Tensor | None, prefix: Tensor, tokens: Tensor) -> Tensor:
    """``[g * prefix ; tokens]``, ``[B, Hkv, M + S, dim]``, written once."""
    batch, kv_heads, keys, dim = tokens.shape
    length = prefix.shape[1]
    whole = tokens.new_empty(batch, kv_heads, length + keys, dim)
    whole[:, :, length:].copy_(tokens)
    front = whole[:, :, :length]
    if weights is None or weights.shape[0] == 1:
        front.copy_(prefix if weights is None else prefix.to(x.compute_dtype) * weights.mT)
    else:
        torch.mul(prefix.to(x.compute_dtype), weights.mT[:, None], out=front)
    return whole


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the op."""
    weights = x.weights()
    key, value = _joined(x, weights, x.prefix_key, x.key), _joined(x, weights, x.prefix_value, x.value)
    mask = additive_mask(x, x.prefix_key.shape[1])
    out, logsumexp = _flash(x.query, key, value, 0.0, False, attn_mask=mask, scale=x.scale)
    if x.sinks is None:
        return heads_last(out), logsumexp.contiguous()
    whole = torch.logaddexp(logsumexp, x.sinks.to(logsumexp.dtype).view(1, -1, 1)).contiguous()
    return heads_last(out.mul_(torch.exp(logsumexp - whole)[..., None])), whole


def backward(x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed; none for a bias."""
    need = dict(zip(DIFFERENTIABLE, needs))
    weights, length = x.weights(), x.prefix_key.shape[1]
    key, value = _joined(x, weights, x.prefix_key, x.key), _joined(x, weights, x.prefix_value, x.value)
    mask = additive_mask(x, length)
    d_query, d_key, d_value = _flash_backward(
        grad_out, x.query, key, value, out, logsumexp, 0.0, False, attn_mask=mask, scale=x.scale
    )
    found = {"query": d_query, "key": d_key[:, :, length:], "value": d_value[:, :, length:]}
    found.update(_prefix_gradients(x, weights, d_key[:, :, :length], d_value[:, :, :length], need))
    if need["sinks"]:
        wide = x.compute_dtype
        delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
        sink = torch.exp(x.sinks.to(wide).view(1, -1, 1) - logsumexp)
        found["sinks"] = -(sink * delta).sum((0, 2))
    return [found.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _prefix_gradients(x: Inputs, weights: Tensor | None, d_key: Tensor, d_value: Tensor, need: dict) -> dict:
    """From the gradients ``[B, Hkv, M, dim]`` of the gated prefix: the prefix's, the gate's and the scale's."""
    wide, found = x.compute_dtype, {}
    d_weights = None if weights is None else x.query.new_zeros(*weights.shape[:2], x.prefix_key.shape[1], dtype=wide)
    for name, grad in (("prefix_key", d_key), ("prefix_value", d_value)):
        prefix = getattr(x, name).to(wide)
        if weights is None or weights.shape[0] == 1:
            grad = grad.sum(0, dtype=wide)
            if weights is not None:
                d_weights[0, 0] += (grad * prefix).sum((0, 2))
                grad = grad * weights.view(1, -1, 1)
        else:
            total = torch.zeros_like(prefix)
            for row, weight, d_weight in zip(grad.to(wide), weights, d_weights):
                total.addcmul_(row, weight.view(1, -1, 1))
                d_weight[0] += (row * prefix).sum((0, 2))
            grad = total
        found[name] = grad
    if need["gate"] or need["layer_scale"]:
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights)
    return found
