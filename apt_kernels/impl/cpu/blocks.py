"""Attention in blocks that fit the cache: matrix products by the BLAS, everything between them in place.

A stream is a batch row and a key/value head. A block is some streams, some of their query rows, and the columns that
these can see: the ungated prefix, then keys. The gate scales the prefix columns of a block's matrices, not the prefix.
The backward recomputes probabilities from the log-sum-exp.

Matrices are ``[n, group * rows, columns]``, ``n`` streams; seen as ``[B, Hq, rows, columns]`` where heads matter.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..dropout import keep_bits, row_keys
from ..inputs import Inputs, heads_last_empty, part_of
from .ranges import Chunk, Rows, key_limits, of_queries, visible_rows
from .scratch import Scratch

# Elements of one block's logits per thread, and the most query rows of a block: see bench/NOTES.md.
BLOCK_ELEMENTS = 1 << 18
BLOCK_ROWS = 128


def forward(x: Inputs, of_tokens: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the op. ``of_tokens``: those over the tokens alone, if they are computed already."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    if of_tokens is not None and of_tokens[0].dtype == x.query.dtype:
        out = of_tokens[0]
    else:
        out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    call = Blocks(x, tokens=of_tokens is None)
    for streams in call.streams():
        for rows in streams.blocks():
            streams.attend(rows, out, logsumexp, of_tokens)
    return out, logsumexp


class Blocks:
    """A call split into streams; ``tokens`` False: the prefix columns alone."""

    def __init__(self, x: Inputs, tokens: bool):
        self.x, self.tokens = x, tokens
        self.scratch = Scratch(x.query, x.compute_dtype)
        self.row_keys = None
        if x.dropout_p:
            self.row_keys = row_keys(x.seed, x.query.shape[0], x.query.shape[1], 0, x.query.shape[2])

    def streams(self) -> Iterator[Streams]:
        """Split the streams and the query rows so that one block's logits fit the cache."""
        batch, heads, kv_heads, queries, _, length, dim, _ = self.x.sizes
        group = heads // kv_heads
        budget = BLOCK_ELEMENTS * torch.get_num_threads()
        rows = min(queries, BLOCK_ROWS)
        columns = group * (length + (self._span(rows) if self.tokens else dim))
        rows = max(min(rows, budget // columns), min(rows, 16))
        count = max(1, budget // (columns * rows))
        many_heads = min(kv_heads, count)
        many_batch = min(batch, max(1, count // kv_heads))
        for b in range(0, batch, many_batch):
            for h in range(0, kv_heads, many_heads):
                last = min(h + many_heads, kv_heads)
                chunk = Chunk(
                    slice(b, min(b + many_batch, batch)), slice(h * group, last * group), slice(h, last), rows
                )
                yield Streams(self, chunk)

    def _span(self, rows: int) -> int:
        """The largest number of keys that a block of rows sees."""
        x, keys = self.x, self.x.key.shape[2]
        right = 0 if x.causal else x.window_right
        return min(keys, rows + x.window_left + right) if x.window_left >= 0 and right >= 0 else keys


class Streams:
    """One chunk's operands in the dtype of the sums, ``[n, ., .]``, and its blocks."""

    def __init__(self, call: Blocks, chunk: Chunk):
        self.call, self.chunk, self.x, self.scratch = call, chunk, chunk.of(call.x), call.scratch
        self.batch, self.heads, kv_heads, self.queries, keys, self.length, self.dim, self.value_dim = self.x.sizes
        self.group, self.count = self.heads // kv_heads, self.batch * kv_heads
        self.keys = keys if call.tokens else 0
        self.query = self.stacked("query", self.x.query).mul_(self.x.scale)
        self.key = self.joined("key", self.x.prefix_key, self.x.key)
        self.value = self.joined("value", self.x.prefix_value, self.x.value)
        self.weights = None if self.x.gate_per_query else self.x.weights()
        self.weights_of: int | None = None
        self.seen = None if self.x.prefix_index is None else self.x.prefix_seen()[:, None, None]
        self.limits = key_limits(self.x) if call.tokens else None
        self.row_keys = None if call.row_keys is None else call.row_keys[chunk.batch, chunk.heads]

    def stacked(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy ``[n, group * length, dim]`` in the dtype of the sums."""
        copy = self.scratch.take(name, *tensor.shape).copy_(tensor)
        return copy.view(self.count, -1, tensor.shape[-1])

    def joined(self, name: str, prefix: Tensor, tokens: Tensor) -> Tensor:
        """The ungated prefix in front of the chunk's keys, ``[n, M + S, dim]``."""
        batch, kv_heads, _, dim = tokens.shape
        both = self.scratch.take(name, batch, kv_heads, self.length + self.keys, dim)
        both[:, :, : self.length].copy_(prefix if self.x.prefix_index is None else self.x.prefix_rows(prefix))
        if self.keys:
            both[:, :, self.length :].copy_(tokens)
        return both.view(self.count, -1, dim)

    def blocks(self) -> Iterator[Rows]:
        """The chunk's query rows, block by block, with the keys that they can see."""
        for first in range(0, self.queries, self.chunk.rows):
            count = min(self.chunk.rows, self.queries - first)
            yield visible_rows(self.x, self.limits, first, count) if self.keys else Rows(first, count, 0, 0, [])

    def of_rows(self, name: str, tensor: Tensor, rows: Rows) -> Tensor:
        """The block's rows ``[n, group * rows, dim]`` of a stacked tensor."""
        if rows.count == self.queries:
            return tensor
        cut = tensor.view(self.count, self.group, self.queries, -1)[:, :, rows.here]
        if self.group == 1:
            return cut[:, 0]
        return self.scratch.take(name, *cut.shape).copy_(cut).view(self.count, -1, cut.shape[-1])

    def of_columns(self, name: str, joined: Tensor, rows: Rows) -> Tensor:
        """The block's columns ``[n, M + high - low, dim]`` of a joined tensor."""
        if rows.low == 0 or rows.high == rows.low:
            return joined[:, : self.length + rows.high - rows.low]
        cut = self.scratch.take(name, self.count, self.length + rows.high - rows.low, joined.shape[2])
        cut[:, : self.length].copy_(joined[:, : self.length])
        cut[:, self.length :].copy_(joined[:, self.length + rows.low : self.length + rows.high])
        return cut

    def by_head(self, matrix: Tensor) -> Tensor:
        """``[n, group * rows, columns]`` as ``[B, Hq, rows, columns]``."""
        return matrix.view(self.batch, self.heads, -1, matrix.shape[-1])

    def place(self, tensor: Tensor, rows: Rows) -> Tensor:
        """The block's part of a tensor ``[B, Hq, T, ...]`` of the whole call."""
        return tensor[self.chunk.batch, self.chunk.heads, rows.here]

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` in a buffer."""
        out = self.scratch.take(name, self.count, left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=out)

    def weigh_(self, matrix: Tensor, rows: Rows) -> None:
        """Multiply the prefix columns of a block's matrix by the gate's weights."""
        if self.x.gate_per_query and self.weights_of != rows.first:
            self.weights, self.weights_of = of_queries(self.x, rows.here).weights(), rows.first
        if self.weights is not None:
            self.by_head(matrix)[..., : self.length].mul_(self.weights[:, None])

    def logits(self, query: Tensor, key: Tensor, rows: Rows, raw: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A block's logits, -inf where hidden, and the tanh of a soft-cap; ``raw`` receives the ungated prefix's."""
        logits = self.product("logits", query, key.mT)
        if raw is not None:
            raw.copy_(logits[..., : self.length])
        self.weigh_(logits, rows)
        tanh = None
        if self.x.softcap:
            tanh = torch.div(logits, self.x.softcap, out=self.scratch.take("tanh", *logits.shape)).tanh_()
            torch.mul(tanh, self.x.softcap, out=logits)
        if self.seen is not None:
            self.by_head(logits)[..., : self.length].masked_fill_(~self.seen, -torch.inf)
        tokens = self.by_head(logits)[..., self.length :]
        if self.x.bias is not None and rows.high > rows.low:
            tokens.add_(part_of(self.x.bias, rows.here, rows.there).to(logits.dtype))
        for keys in rows.masked:
            visible = self.x.visible(rows.first, rows.count, keys.start, keys.stop - keys.start)
            if visible is not None:
                # Overwritten, not added to: a hidden logit may be infinite or NaN.
                tokens[..., keys.start - rows.low : keys.stop - rows.low].masked_fill_(~visible, -torch.inf)
        return logits, tanh

    def keep(self, rows: Rows, like: Tensor) -> Tensor | None:
        """Integers of the size of ``like``'s elements, all bits set where dropout keeps a column, else 0."""
        if self.row_keys is None:
            return None
        bits, scratch = (self.scratch.take(name, *like.shape, dtype=torch.int32) for name in ("keep", "keep_scratch"))
        column = torch.arange(like.shape[2], dtype=torch.int32, device="cpu")
        column[self.length :] += rows.low
        keep_bits(self.row_keys[:, :, rows.here].reshape(like.shape[:2]), column, self.x.dropout_p, bits, scratch)
        return bits if like.dtype == torch.float32 else bits.to(torch.int64)

    def attend(self, rows: Rows, out: Tensor, logsumexp: Tensor, of_tokens: tuple[Tensor, Tensor] | None) -> None:
        """Compute a block of the output and of the log-sum-exp.

        ``of_tokens``, an output and its log-sum-exp, is one more column with that value; it may lie in ``out``.
        """
        query = self.of_rows("query_rows", self.query, rows)
        columns, _ = self.logits(query, self.of_columns("key_columns", self.key, rows), rows)
        extra = []
        if self.x.sinks is not None:
            extra.append(self.x.sinks.to(columns.dtype).view(1, -1, 1, 1))
        if of_tokens is not None:
            extra.append(self.place(of_tokens[1], rows)[..., None])
        top = self.by_head(columns.amax(-1, keepdim=True))
        for logit in extra:
            torch.maximum(top, logit, out=top)
        if self.seen is not None:
            top.clamp_(min=torch.finfo(top.dtype).min)  # a row without a prefix may see nothing
        total = self.by_head(columns).sub_(top).exp_().sum(-1, keepdim=True)
        extra = [torch.exp(logit - top) for logit in extra]
        for column in extra:
            total.add_(column)
        self.place(logsumexp, rows).copy_(total.log().add_(top)[..., 0])
        if self.seen is not None:
            total.masked_fill_(total == 0, 1)
        bits = self.keep(rows, columns)
        if bits is not None:
            columns.view(bits.dtype).bitwise_and_(bits)
        self.weigh_(columns, rows)
        sums = self.by_head(self.product("sums", columns, self.of_columns("value_columns", self.value, rows)))
        if of_tokens is not None:
            sums.addcmul_(self.place(of_tokens[0], rows), extra[-1])
        torch.mul(sums, total.mul_(1 - self.x.dropout_p).reciprocal_(), out=self.place(out, rows))
