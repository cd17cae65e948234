"""One query for each row of the batch, as in decoding: few operators, since each costs more than its arithmetic.

Where keys and prefix are few: one call of the stock kernel on ``[gated prefix ; keys]``. Otherwise: one call on the
keys, then one softmax, whose columns are the prefix's and one more, the output over the keys, whose logit is their
log-sum-exp. There the gate scales the prefix's logits and probabilities, not the prefix itself, and the rows of the
batch and the heads of a group are rows of one matrix product for each key head, so that the prefix is read once.

Keys that position hides from every query are not read.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Result
from ..inputs import Inputs
from . import stock

# Most elements of the keys and the prefix of all rows for which a copy of them is faster than further operators.
JOINED_ELEMENTS = 1 << 16
# The same with a prefix for each row, where the operators are more.
JOINED_ELEMENTS_BY_ROW = 1 << 18


def forward(x: Inputs, with_logsumexp: bool) -> Result | None:
    """The op's forward; None where a hidden logit was infinite or NaN, to which the stock kernel adds the mask, and for
    a prefix for each row where keys are many.

    ``with_logsumexp`` False: what is in the place of the log-sum-exp is not to be used.
    """
    batch, _, kv_heads, _, keys, length, dim, _ = x.sizes
    by_row = x.prefix_index is not None
    low, high, by_position = _range(x)
    key, value = x.key, x.value
    if low > 0 or high < keys:
        key, value = key[:, :, low:high], value[:, :, low:high]
    masked = by_position or any([part is not None for part in (x.key_padding, x.dense, x.bias, x.query_segments)])
    most = JOINED_ELEMENTS_BY_ROW if by_row else JOINED_ELEMENTS
    if x.sinks is None and batch * kv_heads * (high - low + length) * dim <= most:
        mask = stock.additive_mask(x, low, high, length, by_position) if masked else None
        return _joined(x, key, value, mask)
    if by_row:
        return None
    masked = masked and high > low
    mask = stock.additive_mask(x, low, high, by_position=by_position) if masked else None
    return _apart(x, key, value, mask, with_logsumexp)


def _range(x: Inputs) -> tuple[int, int, bool]:
    """The range of the keys that the queries may see by their position, and whether position hides keys in it, too."""
    low, high, at = 0, x.key.shape[2], x.offset
    if x.query_offset is not None:
        if x.query_offset.numel() > 1:
            return low, high, True
        at = int(x.query_offset)
    right = 0 if x.causal else x.window_right
    if right >= 0:
        high = max(min(high, at + right + 1), 0)
    if x.window_left >= 0:
        low = min(max(low, at - x.window_left), high)
    return low, high, False


def _joined(x: Inputs, key: Tensor, value: Tensor, mask: Tensor | None) -> Result | None:
    dtype, batch, weights = x.query.dtype, key.shape[0], x.weights()
    prefix_key, prefix_value = x.prefix_key, x.prefix_value
    hidden = None
    if x.prefix_index is not None:
        prefix_key, prefix_value = x.prefix_rows(prefix_key), x.prefix_rows(prefix_value)
        hidden = stock.prefix_mask(x)
    if hidden is not None:
        keys = x.query.new_zeros(batch, 1, 1, key.shape[2], dtype=x.compute_dtype)
        after = keys if mask is None else mask[..., x.prefix_key.shape[-2] :].expand(batch, -1, -1, -1)
        mask = torch.cat((hidden.expand(-1, after.shape[1], -1, -1), after), -1)
    if weights is not None:
        weights = weights.mT.unsqueeze(1)
        prefix_key, prefix_value = prefix_key * weights, prefix_value * weights
    if prefix_key.dtype != dtype or prefix_value.dtype != dtype:
        prefix_key, prefix_value = prefix_key.to(dtype), prefix_value.to(dtype)
    if batch == 1 and prefix_key.ndim == 3:
        prefix_key, prefix_value = prefix_key.unsqueeze(0), prefix_value.unsqueeze(0)
    elif prefix_key.ndim == 3 or prefix_key.shape[0] < batch:
        prefix_key, prefix_value = (part.expand(batch, -1, -1, -1) for part in (prefix_key, prefix_value))
    key, value = torch.cat((prefix_key, key), 2), torch.cat((prefix_value, value), 2)
    call = stock.Call(x.query, key, value, mask, x.scale)
    out, logsumexp = call.results(folds=False) if hidden is None else call.forward()
    if mask is not None and bool(logsumexp.isnan().any()):
        return None
    return Result(out, logsumexp.contiguous())


def _apart(x: Inputs, key: Tensor, value: Tensor, mask: Tensor | None, with_logsumexp: bool) -> Result | None:
    rows, length, wide, weights = _Rows(x), x.prefix_key.shape[1], x.compute_dtype, x.weights()
    if key.shape[2]:
        query = x.query
        if mask is None or mask.shape[1] == 1:
            query = query.reshape(rows.batch, rows.kv_heads, rows.group, -1)  # a group reads its keys once
        tokens, of_tokens = stock.Call(query, key, value, mask, x.scale).forward()
        if mask is not None and bool(of_tokens.isnan().any()):
            return None
    else:
        tokens = x.query.new_zeros(x.query.shape)
        of_tokens = x.query.new_full(x.query.shape[:3], stock.NOTHING, dtype=wide)
    joined = torch.bmm(rows.stacked(x.query).to(wide), x.prefix_key.to(wide).mT)
    if weights is None:
        joined.mul_(x.scale)
    else:
        rows.weigh_(joined, weights * x.scale)
    columns = [joined, rows.stacked(of_tokens)]
    if x.sinks is not None:
        columns.append(rows.stacked(x.sinks.to(wide).expand(x.query.shape[0], -1)))
    joined = torch.cat(columns, -1)
    probabilities = torch.softmax(joined, -1)
    of_prefix = probabilities[..., :length]
    if weights is not None:
        rows.weigh_(of_prefix, weights)
    out = torch.bmm(of_prefix, x.prefix_value.to(wide))
    out.addcmul_(rows.stacked(tokens).to(wide), probabilities[..., length : length + 1])
    logsumexp = x.query.new_empty(0)
    if with_logsumexp:
        logsumexp = rows.unstacked(torch.logsumexp(joined, -1, keepdim=True))[..., 0]
    return Result(rows.unstacked(out).to(x.query.dtype), logsumexp)


class _Rows:
    """The matrices ``[Hkv, B * group, n]``: ``group`` query heads use a key head."""

    def __init__(self, x: Inputs):
        self.batch, self.heads, self.kv_heads, *_ = x.sizes
        self.group = self.heads // self.kv_heads

    def stacked(self, tensor: Tensor) -> Tensor:
        """``[B, Hq, ...]`` as such a matrix."""
        if self.batch == 1:
            return tensor.reshape(self.kv_heads, self.group, -1)
        by_row = tensor.reshape(self.batch, self.kv_heads, self.group, -1)
        return by_row.transpose(0, 1).reshape(self.kv_heads, self.batch * self.group, -1)

    def unstacked(self, matrix: Tensor) -> Tensor:
        """Such a matrix as ``[B, Hq, 1, n]``."""
        if self.batch > 1:
            matrix = matrix.view(self.kv_heads, self.batch, self.group, -1).transpose(0, 1).contiguous()
        return matrix.view(self.batch, self.heads, 1, -1)

    def weigh_(self, matrix: Tensor, weights: Tensor) -> None:
        """Multiply a matrix by ``weights [B|1, 1, n]``."""
        if weights.shape[0] > 1:
            matrix = matrix.unflatten(1, (self.batch, self.group))
        matrix.mul_(weights)
