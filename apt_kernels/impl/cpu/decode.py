"""One query for each row of the batch, as in decoding: the stock kernel on the tokens, then one softmax.

Its columns are the prefix's and one more, the output over the tokens, whose logit is their log-sum-exp. The gate scales
the prefix's logits and probabilities, not the prefix itself. Rows of the batch and heads of a group are rows of one
matrix product for each key head, so that the prefix is read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Result
from ..inputs import Inputs
from . import stock


def forward(x: Inputs, with_logsumexp: bool) -> Result | None:
    """The op's forward; None where a hidden logit was infinite or NaN, to which the stock kernel adds the mask.

    ``with_logsumexp`` False: an empty tensor is in the place of the log-sum-exp.
    """
    tokens, of_tokens, masked = _tokens(x)
    if masked and bool(of_tokens.isnan().any()):
        return None
    rows, length, wide, weights = _Rows(x), x.prefix_key.shape[1], x.compute_dtype, x.weights()
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


def _tokens(x: Inputs) -> tuple[Tensor, Tensor, bool]:
    """Output ``[B, Hq, 1, Dv]`` and log-sum-exp ``[B, Hq, 1]`` over the tokens, and whether a mask was added."""
    low, high, by_position = _range(x)
    key, value = x.key, x.value
    if high <= low:
        shape = x.query.shape
        return x.query.new_zeros(shape), x.query.new_full(shape[:3], stock.NOTHING, dtype=x.compute_dtype), False
    mask = stock.additive_mask(x, low, high, by_position=by_position)
    if (low, high) != (0, key.shape[2]):
        key, value = key[:, :, low:high], value[:, :, low:high]
    return *stock.Call(x.query, key, value, mask, x.scale).forward(), mask is not None


def _range(x: Inputs) -> tuple[int, int, bool]:
    """The range of the keys that the queries may see by their position, and whether in it position hides more keys."""
    low, high, at = 0, x.key.shape[2], x.offset
    if x.query_offset is not None:
        if x.query_offset.numel() > 1:
            return low, high, True
        at = int(x.query_offset)
    right = 0 if x.causal else x.window_right
    if right >= 0:
        high = min(high, at + right + 1)
    if x.window_left >= 0:
        low = max(low, at - x.window_left)
    return low, high, False
