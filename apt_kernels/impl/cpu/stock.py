"""torch's own CPU flash kernel ("stock kernel") on the tokens, and its limits.

It takes float32, float64, bfloat16 and float16, contiguous rows with any strides between them, grouped heads, an
additive mask that broadcasts, and a causal mask aligned to the top left. Its backward uses the output and the
log-sum-exp that it is given, so those of the whole softmax give the exact gradients of a part of its columns. It
refuses dropout, and values whose head size differs.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Inputs, heads_last_empty, part_of
from .ranges import key_limits
from .scratch import Scratch

_flash = torch._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# The log-sum-exp of a row that sees no token: finite, so that it can be merged, and so low that its weight is zero.
NOTHING = torch.finfo(torch.float32).min

# The kernel skips hidden keys 512 at a time. A causal square is halved down to this many rows, so that few hidden keys
# are computed, at the price of a merge for each halving: see bench/NOTES.md.
CAUSAL_ROWS = 256

# Query rows per key from which a contiguous copy of the keys pays: see bench/NOTES.md.
COPY_ROWS = 64


def obstacle(x: Inputs) -> str | None:
    """Why the stock kernel cannot compute these inputs; None: it can."""
    if x.dropout_p > 0:
        return "dropout"
    if x.softcap > 0:
        return "softcap"
    if x.scale <= 0:
        return "scale"  # it scales logits that it has already hidden
    if x.value.shape[3] != x.query.shape[3]:
        return "value size"
    if x.query.shape[2] == 1:
        return None
    if x.window_left >= 0 or x.window_right >= 0:
        return "window"
    if x.query_segments is not None:
        return "segments"
    if x.causal and x.query_offset is not None and x.query_offset.numel() > 1:
        return "offset per row"
    return "mask larger than its parts" if _mask_grows(x) else None


def _mask_grows(x: Inputs) -> bool:
    parts = [part for part in (x.dense, x.bias) if part is not None]
    if x.key_padding is not None:
        parts.append(x.key_padding[:, None, None])
    if len(parts) < 2:
        return False
    return math.prod(torch.broadcast_shapes(*[part.shape for part in parts])) > max(part.numel() for part in parts)


class NotFinite(Exception):
    """The gradients of a masked call are not finite."""


class Call(NamedTuple):
    """One call of the kernel, on these ``rows`` and ``keys`` of the whole. ``mask`` is additive."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool = False
    rows: slice = slice(None)
    keys: slice = slice(None)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, in the layouts that the kernel returns."""
        return self._marked(*self.results())

    def results(self, folds: bool = True) -> tuple[Tensor, Tensor]:
        """`forward` where every row sees a key; ``folds`` False: few keys, which may be read once for each head."""
        key, value, mask = _rows(self.key), _rows(self.value), _mask_rows(self.mask)
        if not folds or not self._folds():
            return _flash(_rows(self.query), key, value, 0.0, self.causal, attn_mask=mask, scale=self.scale)
        # The heads of a group become rows of one head: their keys are read once, not once per head.
        size = self.query.shape
        folded = _rows(self.query.reshape(size[0], key.shape[1], -1, size[3]))
        out, logsumexp = _flash(folded, key, value, 0.0, False, attn_mask=mask, scale=self.scale)
        return out.reshape(*size[:3], -1), logsumexp.reshape(size[:3])

    def _marked(self, out: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
        """The results, where a row sees no key with output 0 and log-sum-exp `NOTHING` (the kernel returns 0)."""
        if self.mask is None or bool(logsumexp.all()):
            return out, logsumexp
        seen = self.mask > -torch.inf
        if self.causal:
            rows, columns = (torch.arange(size, device=seen.device) for size in (logsumexp.shape[2], seen.shape[3]))
            if seen.shape[2] > 1:
                seen = seen & (columns <= rows[:, None])
            else:
                first = torch.where(seen, columns, rows.numel()).amin(-1, keepdim=True)
                seen = first <= rows[:, None]
        hidden = ~seen.any(-1)
        return out.masked_fill(hidden[..., None], 0), logsumexp.masked_fill(hidden, NOTHING)

    def _folds(self) -> bool:
        single = self.query.shape[2] == 1 and self.query.shape[1] > self.key.shape[1]
        return single and not self.causal and (self.mask is None or self.mask.shape[1] == 1)

    def backward(self, out: Tensor, logsumexp: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; ``out, logsumexp`` may be those of a softmax over more columns.

        Raises `NotFinite` if a hidden logit may be the reason: the kernel adds the mask, and -inf to inf is NaN.
        """
        tensors = (grad_out[:, :, self.rows], self.query, self.key, self.value, out[:, :, self.rows])
        given = (*map(_rows, tensors), logsumexp[:, :, self.rows], 0.0, self.causal)
        found = _flash_backward(*given, attn_mask=_mask_rows(self.mask), scale=self.scale)
        wide = torch.promote_types(self.query.dtype, torch.float32)
        if self.mask is not None and not math.isfinite(found[0].sum(dtype=wide)):
            raise NotFinite
        return found

    def merge_(self, out: Tensor, logsumexp: Tensor) -> None:
        """Add these columns to an output and a log-sum-exp over others, in place."""
        more, more_logsumexp = self.forward()
        out, logsumexp = out[:, :, self.rows], logsumexp[:, :, self.rows]
        total = torch.logaddexp(logsumexp, more_logsumexp)
        # Two exponentials: "w and 1 - w" would lose the relative accuracy of the smaller weight.
        weight, more_weight = ((part - total).exp_()[..., None].to(out.dtype) for part in (logsumexp, more_logsumexp))
        out.mul_(weight).addcmul_(more, more_weight)
        logsumexp.copy_(total)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension, which the kernel assumes without a check."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _mask_rows(mask: Tensor | None) -> Tensor | None:
    """`_rows` of a mask, whose last stride may also be 0."""
    return mask if mask is None or mask.stride(-1) == 0 else _rows(mask)


def parts(x: Inputs, scratch: Scratch) -> list[Call]:
    """The calls that together cover every token that any query sees."""
    _, heads, kv_heads, queries, keys, *_ = x.sizes
    limits = key_limits(x)
    copy = queries * heads >= COPY_ROWS * kv_heads
    key, value = (_heads_first(scratch, *pair, copy) for pair in (("key", x.key), ("value", x.value)))
    found = []
    for rows, columns, causal in _rectangles(x.causal and queries > 1, limits.most_offset, queries, keys):
        columns = slice(max(columns.start, 0 if causal else limits.low), min(columns.stop, limits.high))
        if columns.start < columns.stop:
            mask = additive_mask(x, columns.start, columns.stop)
            mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows]
            operands = (x.query[:, :, rows], key[:, :, columns], value[:, :, columns])
            found.append(Call(*operands, mask, x.scale, causal, rows, columns))
    return found


def _rectangles(causal: bool, offset: int, queries: int, keys: int) -> list[tuple[slice, slice, bool]]:
    """Rows, keys, and whether a causal mask holds among them; together they cover what a causal mask shows."""
    if not causal or offset >= keys - 1:
        return [(slice(0, queries), slice(0, keys), False)]
    # Query ``first`` is at key ``low``, where a causal square begins. All rows see the keys before the square; the rows
    # after it see the keys in it.
    first, low = max(-offset, 0), max(offset, 0)
    size = min(queries - first, keys - low)
    if size <= 0:
        return [(slice(0, queries), slice(0, low), False)] if low else []
    around = [
        (slice(0, queries), slice(0, low), False),
        (slice(first + size, queries), slice(low, low + size), False),
    ]
    return [part for part in around if part[0].start < part[0].stop and part[1].stop] + _halved(first, low, size)


def _halved(first: int, low: int, size: int) -> list[tuple[slice, slice, bool]]:
    if size <= CAUSAL_ROWS:
        return [(slice(first, first + size), slice(low, low + size), True)]
    half = size // 2
    return [
        *_halved(first, low, half),
        (slice(first + half, first + size), slice(low, low + half), False),
        *_halved(first + half, low + half, size - half),
    ]


def _heads_first(scratch: Scratch, name: str, tensor: Tensor, copy: bool) -> Tensor:
    if not copy or tensor.is_contiguous():
        return tensor
    return scratch.take(name, *tensor.shape).copy_(tensor)


def additive_mask(x: Inputs, low: int, high: int, prefix: int = 0, by_position: bool = True) -> Tensor | None:
    """The additive mask of the keys ``low .. high - 1``, ``[B|1, Hq|1, T|1, prefix + keys]``; None: none is needed.

    Zero on prefix columns, which come first. It includes causality and a window for a single query, and causality for
    several with a prefix, if ``by_position``.
    """
    keys = slice(low, high)
    if x.query.shape[2] == 1:
        visible = x.visible(0, 1, low, high - low, by_position)
    else:
        padding = None if x.key_padding is None else x.key_padding[:, None, None, keys]
        seen = [] if padding is None or bool(padding.all()) else [padding]
        if x.dense is not None:
            seen.append(part_of(x.dense, slice(None), keys))
        causal = prefix > 0 and by_position and x.causal
        # With an offset below -1 the triangle would hide the prefix from the first queries.
        if causal and x.dense is None and x.bias is None and x.query_offset is None and x.offset >= low - 1:
            hidden = x.query.new_full((x.query.shape[2], prefix + high - low), -torch.inf, dtype=x.compute_dtype)
            hidden = hidden.triu_(prefix + x.offset - low + 1)[None, None]
            return hidden + _additive(x, seen[0], prefix, high - low) if seen else hidden
        if causal:
            columns = torch.arange(low, high, device=x.query.device)
            seen.append((columns <= x.positions()[..., None])[:, None])
        visible = None
        for part in seen:
            visible = part if visible is None else visible & part
    if visible is None and x.bias is None:
        return None
    if x.bias is None:
        return _additive(x, visible, prefix, high - low)
    tokens = part_of(x.bias, slice(None), keys).to(x.compute_dtype)
    tokens = tokens if visible is None else torch.where(visible, tokens, -torch.inf)
    tokens = tokens.expand(*tokens.shape[:3], high - low)
    return torch.nn.functional.pad(tokens, (prefix, 0)) if prefix else tokens


def _additive(x: Inputs, visible: Tensor, prefix: int, keys: int) -> Tensor:
    """Zero on prefix columns and where ``visible``, else -inf."""
    added = x.query.new_zeros((*visible.shape[:3], prefix + keys), dtype=x.compute_dtype)
    added[..., prefix:].masked_fill_(~visible, -torch.inf)
    return added


def prefix_mask(x: Inputs) -> Tensor | None:
    """The additive mask of a prefix for each row, ``[B, 1, 1, M]``, in the dtype of the sums; None: none is needed."""
    seen = x.prefix_seen()
    if bool(seen.all()):
        return None
    return torch.where(seen, 0.0, -torch.inf).to(x.compute_dtype)[:, None, None]


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output, stored heads last, and log-sum-exp over the tokens alone, both in the dtype of the sums.

    Where a row sees no token the output is finite, and the log-sum-exp so low that its weight is zero.
    """
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    out = heads_last_empty(x.query, batch, heads, queries, value_dim, x.compute_dtype).zero_()
    logsumexp = x.query.new_full((batch, heads, queries), NOTHING, dtype=x.compute_dtype)
    for call in parts(x, Scratch(x.query, x.query.dtype)):
        call.merge_(out, logsumexp)
    return out, logsumexp


def backward_(
    x: Inputs, scratch: Scratch, out: Tensor, logsumexp: Tensor, grad_out: Tensor, into: dict[str, Tensor]
) -> None:
    """Add the gradients through the tokens to those of query, key and value, which ``into`` holds by name.

    ``out, logsumexp`` are those of the whole softmax.
    """
    for call in parts(x, scratch):
        cuts = {"query": call.rows, "key": call.keys, "value": call.keys}
        for (name, cut), grad in zip(cuts.items(), call.backward(out, logsumexp, grad_out)):
            if name in into:
                into[name][:, :, cut].add_(grad)
