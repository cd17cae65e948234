"""A prefix with one gate a row by the stock kernel: gated and scaled in memory (it is short), then merged or joined.

``merge``: one call on the tokens, one on the prefix, joined through their log-sum-exps. ``concat``: one call on the
prefix in front of the keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_stock
from .gate import gate_gradients
from .inputs import DIFFERENTIABLE, Inputs, heads_last


def _gated(x: Inputs, weights: Tensor | None, prefix: Tensor) -> Tensor:
    """``g * prefix``, ``[B, Hkv, M, dim]`` in the query's dtype, rounded once; of stride 0 where all rows share it."""
    batch, dtype = x.query.shape[0], x.query.dtype
    if weights is None:
        return prefix.to(dtype).expand(batch, -1, -1, -1)
    gated = (prefix.to(x.compute_dtype) * weights.mT[:, None]).to(dtype)
    return gated.expand(batch, -1, -1, -1)


def _operands(x: Inputs, way: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Key, value and additive mask of the call that has the prefix."""
    weights, length = x.weights(), x.prefix_key.shape[1]
    key, value = _gated(x, weights, x.prefix_key), _gated(x, weights, x.prefix_value)
    if way == "merge":
        return key, value, None
    return torch.cat([key, x.key], 2), torch.cat([value, x.value], 2), cpu_stock.additive_mask(x, length)


def forward(x: Inputs, way: str) -> tuple[Tensor, Tensor]:
    """The op's output and log-sum-exp. ``way``: ``"merge"`` or ``"concat"``."""
    out, logsumexp = cpu_stock.call(x.query, *_operands(x, way), x.scale)
    if x.sinks is not None:
        whole = torch.logaddexp(logsumexp, x.sinks.to(logsumexp.dtype).view(1, -1, 1))
        out.mul_(torch.exp(logsumexp - whole)[..., None])
        logsumexp = whole
    if way == "merge":
        for part in cpu_stock.parts(x):
            cpu_stock.merge_(out, logsumexp, part, x)
    return heads_last(out), logsumexp.contiguous()


def backward(
    x: Inputs, way: str, out: Tensor, logsumexp: Tensor, grad_out: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed; none for a bias."""
    need, length = dict(zip(DIFFERENTIABLE, needs)), x.prefix_key.shape[1]
    found = {}
    if any(needs[:7]):
        key, value, mask = _operands(x, way)
        d_query, d_key, d_value = cpu_stock.call_backward(grad_out, x.query, key, value, mask, out, logsumexp, x.scale)
        found = {"query": d_query, **_prefix_gradients(x, d_key[:, :, :length], d_value[:, :, :length], need)}
        if way == "concat":
            found |= {"key": d_key[:, :, length:], "value": d_value[:, :, length:]}
    if way == "merge" and any(needs[:3]):
        of_tokens = cpu_stock.backward(x, out, logsumexp, grad_out)
        found |= {"query": of_tokens[0].add_(d_query), "key": of_tokens[1], "value": of_tokens[2]}
    if need["sinks"]:
        wide = x.compute_dtype
        delta = (grad_out.to(wide) * out.to(wide)).sum(-1)
        found["sinks"] = -(torch.exp(x.sinks.to(wide).view(1, -1, 1) - logsumexp) * delta).sum((0, 2))
    return [found.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _prefix_gradients(x: Inputs, d_key: Tensor, d_value: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
    """From the gradients ``[B, Hkv, M, dim]`` of the gated prefix: the prefix's, the gate's and the scale's."""
    weights, wide, found = x.weights(), x.compute_dtype, {}
    if weights is not None:
        d_weights = x.query.new_zeros(*weights.shape[:2], x.prefix_key.shape[1], dtype=wide)
    for name, grad in (("prefix_key", d_key), ("prefix_value", d_value)):
        if weights is None:
            found[name] = grad.sum(0, dtype=wide)
            continue
        prefix = getattr(x, name).to(wide)
        found[name] = torch.zeros_like(prefix)
        rows = grad.sum(0, keepdim=True, dtype=wide) if weights.shape[0] == 1 else grad
        for row, weight, d_weight in zip(rows, weights, d_weights):
            found[name].addcmul_(row, weight.mT)
            d_weight += (row * prefix).sum((0, 2))
    if need["gate"] or need["layer_scale"]:
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights)
    return found
