"""The specification: APT attention in eager PyTorch, any dtype to float64.

    g_j = lambda * sigmoid(a_j)          P'_j = g_j * P_j (key and value)
    out = softmax(scale * q [P'_k ; k]^T) [P'_v ; v]

Source: Zhang et al., "Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model Fine-tuning", ACL 2023.
In half precision it rounds where eager PyTorch would: after each product, with the softmax in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import Backend, Plan, Result
from .dropout import keep_mask
from .inputs import DIFFERENTIABLE, NOTHING, Inputs, heads_last


def attend(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, Dv]`` and log-sum-exp ``[B, Hq, T]``, differentiable by autograd in every input."""
    batch, heads, kv_heads, queries, keys, length, _, _ = x.sizes
    group, wide, dtype = heads // kv_heads, x.compute_dtype, x.query.dtype

    def expand(kv: Tensor) -> Tensor:
        return kv.repeat_interleave(group, dim=-3)

    prefix_logits, prefix_value = _prefix(x, expand)
    logits = (x.query @ expand(x.key).transpose(-1, -2)) * x.scale
    if x.softcap:
        logits = x.softcap * torch.tanh(logits / x.softcap)
        prefix_logits = x.softcap * torch.tanh(prefix_logits / x.softcap)
    logits, prefix_logits = logits.to(wide), prefix_logits.to(wide)
    if x.prefix_index is not None:
        seen = x.prefix_seen()[:, None]
        prefix_logits = prefix_logits.masked_fill(~(seen if x.prefix_by_query else seen[:, None]), -torch.inf)
    if x.bias is not None:
        logits = logits + x.bias.to(wide)
    visible = x.visible()
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    columns = [prefix_logits, logits]
    if x.sinks is not None:
        columns.append(x.sinks.to(wide).view(1, heads, 1, 1).expand(batch, -1, queries, 1))
    joined = torch.cat(columns, dim=-1)
    empty = None
    if x.prefix_index is not None:
        # A row without a prefix may see nothing: output 0, log-sum-exp -inf, no gradients.
        empty = (joined <= NOTHING).all(-1)
        joined = joined.masked_fill(empty[..., None], 0.0)
    logsumexp = torch.logsumexp(joined, dim=-1)
    probabilities = torch.softmax(joined, dim=-1)[..., : length + keys]
    if empty is not None:
        logsumexp = logsumexp.masked_fill(empty, -torch.inf)
        probabilities = probabilities.masked_fill(empty[..., None], 0.0)
    if x.dropout_p:
        keep = keep_mask(x.seed, x.dropout_p, batch, heads, 0, queries, 0, length + keys)
        probabilities = probabilities * keep / (1 - x.dropout_p)
    probabilities = probabilities.to(dtype)
    out = _weigh_prefix(x, probabilities[..., :length], prefix_value) + probabilities[..., length:] @ expand(x.value)
    return out, logsumexp


def _prefix(x: Inputs, expand) -> tuple[Tensor, Tensor]:
    """Prefix logits ``[B, Hq, T, M]`` before the soft-cap, and the value ``[., Hq, M, Dv]`` that weighs them."""
    dtype, weights = x.query.dtype, x.weights()
    if x.prefix_by_query:
        return _prefix_by_query(x, weights, expand)
    prefix = x.prefix_key, x.prefix_value
    if x.prefix_index is not None:
        prefix = x.prefix_rows(x.prefix_key), x.prefix_rows(x.prefix_value)
    if weights is None or weights.shape[1] == 1:
        # One gate per row: the scaled prefix P' is materialised, as in the usual implementation.
        column = 1.0 if weights is None else weights.transpose(-1, -2)[:, None]
        prefix_key, prefix_value = (part if part.ndim == 4 else part[None] for part in prefix)
        key = (expand(prefix_key).to(x.compute_dtype) * column).to(dtype)
        value = (expand(prefix_value).to(x.compute_dtype) * column).to(dtype)
        return (x.query @ key.transpose(-1, -2)) * x.scale, value
    key, value = (expand(part).to(dtype) for part in prefix)
    return (x.query @ key.transpose(-1, -2)) * (x.scale * weights[:, None]).to(dtype), value


def _prefix_by_query(x: Inputs, weights: Tensor | None, expand) -> tuple[Tensor, Tensor]:
    """`_prefix` where each query has its own: the logits under its adapter, and all values ``[A, Hq, M, Dv]``."""
    columns = torch.arange(x.prefix_key.shape[2], device=x.query.device) < x.prefix_lengths[:, None]
    hidden = ~columns[:, None, :, None]
    key, value = (expand(part.masked_fill(hidden, 0.0).to(x.query.dtype)) for part in (x.prefix_key, x.prefix_value))
    logits = x.query.new_zeros(())
    for adapter, own in enumerate(_queries_of_adapters(x)):
        logits = torch.where(own, x.query @ key[adapter].transpose(-1, -2), logits)
    factor = x.scale if weights is None else (x.scale * weights[:, None]).to(x.query.dtype)
    return logits * factor, value


def _queries_of_adapters(x: Inputs) -> list[Tensor]:
    """For each adapter, bool ``[B, 1, T, 1]``: which queries use it."""
    return [(x.prefix_index == adapter)[:, None, :, None] for adapter in range(len(x.prefix_key))]


def _weigh_prefix(x: Inputs, probabilities: Tensor, value: Tensor) -> Tensor:
    weights = x.weights()
    if x.prefix_by_query:
        if weights is not None:
            probabilities = (probabilities * weights[:, None]).to(value.dtype)
        parts = [probabilities * own @ value[adapter] for adapter, own in enumerate(_queries_of_adapters(x))]
        return torch.stack(parts).sum(0)
    if weights is not None and weights.shape[1] != 1:
        probabilities = (probabilities * weights[:, None]).to(value.dtype)
    return probabilities @ value


class Reference(Backend):
    """The specification as an implementation of the op."""

    name = "reference"
    composite = True

    def strategy(self, x: Inputs) -> str:
        return "materialise"

    def forward(self, x: Inputs, plan: Plan) -> Result:
        with torch.no_grad():
            out, logsumexp = attend(x)
        return Result(heads_last(out), logsumexp)

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor]:
        out, logsumexp = attend(x)
        return heads_last(out), logsumexp

    def backward(
        self,
        x: Inputs,
        plan: Plan,
        result: Result,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor | None]:
        """By autograd over `attend`."""
        wanted = [name for name, need in zip(DIFFERENTIABLE, needs) if need]
        values = dict(x.__dict__)
        for name in DIFFERENTIABLE:
            if values[name] is not None:
                values[name] = values[name].detach().requires_grad_(name in wanted)
        with torch.enable_grad():
            out, logsumexp = attend(Inputs(**values))
            outputs, seeds = [out], [grad_out]
            # The log-sum-exp depends on neither value.
            if grad_logsumexp is not None and logsumexp.requires_grad:
                outputs.append(logsumexp)
                seeds.append(grad_logsumexp)
            grads = torch.autograd.grad(outputs, [values[name] for name in wanted], seeds)
        by_name = dict(zip(wanted, grads))
        return [by_name.get(name) for name in DIFFERENTIABLE]


BACKEND = Reference()
