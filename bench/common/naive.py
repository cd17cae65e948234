"""Naive prefix tuning with the signature of `apt_kernels.attention`: expand, scale, concatenate, dense mask.

P-tuning v2 and PEFT compute this through ``past_key_values``; the gate and the layer scale of APT are added. It is the
baseline of all comparisons: plain PyTorch, differentiable by autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from apt_kernels.impl.inputs import Inputs
from apt_kernels.mask import Mask
from apt_kernels.ops.validation import make_inputs

# transformers builds the 4-D mask once for all layers of a forward pass, as it does `Mask`.
_dense_masks: WeakKeyDictionary[Mask, Tensor] = WeakKeyDictionary()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor | None = None,
    layer_scale: Tensor | float | None = None,
    *,
    mask: Mask | None = None,
    return_logsumexp: bool = False,
    implementation: str = "auto",
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`apt_kernels.attention`, computed naively; ``implementation`` and ``seed`` are ignored."""
    x = make_inputs(query, key, value, prefix_key, prefix_value, gate, layer_scale, mask=mask, **options)
    weights = x.weights()
    per_query = weights is not None and weights.shape[1] != 1
    if per_query or x.softcap or x.sinks is not None or return_logsumexp:
        out, logsumexp = _eager(x, _prefix_is_visible(x, mask))
        return (out, logsumexp) if return_logsumexp else out
    prefix_key, prefix_value = _materialise(x, weights)
    return F.scaled_dot_product_attention(
        x.query,
        torch.cat([prefix_key, x.key], dim=2),
        torch.cat([prefix_value, x.value], dim=2),
        attn_mask=_sdpa_mask(x, _prefix_is_visible(x, mask)),
        dropout_p=x.dropout_p,
        scale=x.scale,
        enable_gqa=x.query.shape[1] != x.key.shape[1],
    )


def _materialise(x: Inputs, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The prefix of every batch row, ``[B, Hkv, M, D]``, scaled unless ``weights`` is None."""
    column = None if weights is None else weights[:, 0, None, :, None]

    def expand(prefix: Tensor) -> Tensor:
        rows = prefix[None].expand(x.query.shape[0], -1, -1, -1)
        return (rows if column is None else rows * column).to(x.query.dtype)

    return expand(x.prefix_key), expand(x.prefix_value)


def _prefix_is_visible(x: Inputs, mask: Mask | None) -> Tensor | None:
    """bool ``[B, H|1, T, M+S]`` with the prefix columns open, built once for each `Mask`; None: all is visible."""
    dense = None if mask is None else _dense_masks.get(mask)
    if dense is not None:
        return dense
    visible = x.visible()
    if visible is None:
        return None
    batch, _, _, queries, keys, length, _, _ = x.sizes
    dense = F.pad(visible.expand(batch, -1, queries, keys), (length, 0), value=True)
    _dense_masks[mask] = dense
    return dense


def _sdpa_mask(x: Inputs, visible: Tensor | None) -> Tensor | None:
    if x.bias is None:
        return visible
    length, queries, keys = x.prefix_key.shape[1], x.query.shape[2], x.key.shape[2]
    bias = F.pad(x.bias.to(x.query.dtype).expand(-1, -1, queries, keys), (length, 0))
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)


def _eager(x: Inputs, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two blocks of columns, then one softmax: features for which SDPA has no argument."""
    group, wide = x.query.shape[1] // x.key.shape[1], x.compute_dtype
    length, keys, weights = x.prefix_key.shape[1], x.key.shape[2], x.weights()
    prefix_key, prefix_value, key, value = (
        part.repeat_interleave(group, dim=1) for part in (*_materialise(x, None), x.key, x.value)
    )
    # A gate per query cannot scale the prefix; it scales the prefix columns of the logits and of the probabilities.
    columns = 1.0 if weights is None else weights[:, None]
    prefix_logits = (x.query @ prefix_key.mT).to(wide) * columns
    logits = torch.cat([prefix_logits, (x.query @ key.mT).to(wide)], dim=-1) * x.scale
    if x.softcap:
        logits = x.softcap * torch.tanh(logits / x.softcap)
    if x.bias is not None:
        logits = logits + F.pad(x.bias.to(wide).expand(-1, -1, *logits.shape[2:3], keys), (length, 0))
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    if x.sinks is not None:
        sinks = x.sinks.to(wide).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    probabilities = F.dropout(torch.softmax(logits, dim=-1), x.dropout_p)
    on_prefix = (probabilities[..., :length] * columns).to(value.dtype)
    out = on_prefix @ prefix_value + probabilities[..., length : length + keys].to(value.dtype) @ value
    return out, torch.logsumexp(logits, dim=-1)


@contextmanager
def naive() -> Iterator[None]:
    """Within this context, patched models compute attention naively; nothing else changes."""
    from apt_kernels.hf.attention import function

    ours, function.attention = function.attention, attention
    try:
        yield
    finally:
        function.attention = ours
