"""Attention in blocks that stay in the cache: matrix products by the BLAS, everything between them in place.

A stream is a batch row and a key/value head. A block is some streams, some of their query rows, and the keys that
these can see. The prefix columns of a block are a second, narrow matrix beside the token columns, so that the gate
scales columns of logits and never a tensor of keys. The backward recomputes probabilities from the log-sum-exp.

Matrices are ``[n, group * rows, columns]``, ``n`` streams; seen as ``[B, Hq, rows, columns]`` where heads matter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu_ranges import Chunk, Rows, key_limits, visible_rows
from .cpu_scratch import Scratch
from .dropout import keep_bits, row_keys
from .inputs import Inputs, heads_last_empty, part_of

# Elements of one block's logits for each thread, and its most query rows: see bench/NOTES.md.
BLOCK_ELEMENTS = 1 << 18
BLOCK_ROWS = 128


def forward(x: Inputs, of_tokens: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the op. ``of_tokens``: those over the tokens alone, to fold prefix and sinks into.

    The folding is done in the memory of the given output.
    """
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    out = heads_last_empty(x.query, batch, heads, queries, value_dim) if of_tokens is None else of_tokens[0]
    logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    scratch = Scratch(x.query, x.compute_dtype)
    for chunk in chunks(x, tokens=of_tokens is None):
        streams = Streams(x, chunk, scratch, tokens=of_tokens is None)
        for rows in streams.blocks():
            streams.attend(rows, out, logsumexp, None if of_tokens is None else of_tokens[1])
    return out, logsumexp


def chunks(x: Inputs, tokens: bool) -> Iterator[Chunk]:
    """Cut the streams and the query rows so that one block's logits fit the cache."""
    batch, heads, kv_heads, queries, keys, length, dim, _ = x.sizes
    group = heads // kv_heads
    budget = BLOCK_ELEMENTS * torch.get_num_threads()
    rows = min(queries, BLOCK_ROWS)
    span = keys if tokens else dim
    if tokens and x.window_left >= 0 and (x.causal or x.window_right >= 0):
        span = min(keys, rows + x.window_left + (0 if x.causal else x.window_right))
    columns = group * (length + span)
    rows = max(min(rows, budget // columns), min(rows, 16))
    streams = max(1, budget // (columns * rows))
    many_heads = min(kv_heads, streams)
    many_batch = min(batch, max(1, streams // kv_heads))
    for b in range(0, batch, many_batch):
        for h in range(0, kv_heads, many_heads):
            last = min(h + many_heads, kv_heads)
            yield Chunk(slice(b, min(b + many_batch, batch)), slice(h * group, last * group), slice(h, last), rows)


class Streams:
    """One chunk's operands in the dtype of the sums, ``[n, ., .]``, and its blocks."""

    def __init__(self, x: Inputs, chunk: Chunk, scratch: Scratch, tokens: bool):
        self.chunk, self.x, self.scratch, self.tokens = chunk, chunk.of(x), scratch, tokens
        self.batch, self.heads, kv_heads, self.queries, self.keys, self.length, self.dim, self.value_dim = self.x.sizes
        self.group, self.count = self.heads // kv_heads, self.batch * kv_heads
        self.query = self.stacked("query", self.x.query).mul_(x.scale)
        if tokens:
            self.key, self.value = self.stacked("key", self.x.key), self.stacked("value", self.x.value)
            self.limits = key_limits(self.x)
        shape = (self.batch, *self.x.prefix_key.shape[:2], -1)
        self.prefix_key = self.stacked("prefix_key", self.x.prefix_key.expand(shape))
        self.prefix_value = self.stacked("prefix_value", self.x.prefix_value.expand(shape))
        self.weights = self.x.weights()
        self.row_keys = None
        if x.dropout_p:
            every = row_keys(x.seed, x.query.shape[0], x.query.shape[1], 0, self.queries)
            self.row_keys = every[chunk.batch, chunk.heads]

    def stacked(self, name: str, tensor: Tensor) -> Tensor:
        """A contiguous copy ``[n, group * length, dim]`` in the dtype of the sums."""
        copy = self.scratch.take(name, *tensor.shape).copy_(tensor)
        return copy.view(self.count, -1, tensor.shape[-1])

    def blocks(self) -> Iterator[Rows]:
        """The chunk's query rows, block by block, with the keys that they can see."""
        for first in range(0, self.queries, self.chunk.rows):
            count = min(self.chunk.rows, self.queries - first)
            yield visible_rows(self.x, self.limits, first, count) if self.tokens else Rows(first, count, 0, 0, [])

    def of_rows(self, name: str, tensor: Tensor, rows: Rows) -> Tensor:
        """The block's rows ``[n, group * rows, dim]`` of a stacked tensor."""
        if rows.count == self.queries:
            return tensor
        cut = tensor.view(self.count, self.group, self.queries, -1)[:, :, rows.here]
        if self.group == 1:
            return cut[:, 0]
        return self.scratch.take(name, *cut.shape).copy_(cut).view(self.count, -1, cut.shape[-1])

    def by_head(self, matrix: Tensor) -> Tensor:
        """``[n, group * rows, columns]`` as ``[B, Hq, rows, columns]``."""
        return matrix.view(self.batch, self.heads, -1, matrix.shape[-1])

    def place(self, tensor: Tensor, rows: Rows) -> Tensor:
        """The block's part of a tensor ``[B, Hq, T, ...]`` of the whole call."""
        return tensor[self.chunk.batch, self.chunk.heads, rows.here]

    def column(self, tensor: Tensor, rows: Rows) -> Tensor:
        """The block's part of a ``[B, Hq, T]`` of the whole call, as ``[n, group * rows, 1]``."""
        return self.place(tensor, rows).reshape(self.count, -1, 1)

    def product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` in a buffer."""
        out = self.scratch.take(name, self.count, left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=out)

    def prefix_logits(self, query: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor | None]:
        """Prefix logits, their product with the ungated key, and the tanh of a soft-cap."""
        raw = self.product("prefix_raw", query, self.prefix_key.mT)
        logits = self.weigh(raw, rows, self.scratch.take("prefix_logits", *raw.shape))
        tanh = self.soft_cap("prefix_tanh", logits)
        return logits, raw, tanh

    def token_logits(self, query: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Logits of the block's keys, -inf where hidden, and the tanh of a soft-cap."""
        logits = self.product("logits", query, self.key[:, rows.there].mT)
        tanh = self.soft_cap("tanh", logits)
        for keys in [rows.there] if self.x.bias is not None else rows.masked:
            added = self.added(rows, keys)
            if added is not None:
                self.by_head(logits)[..., keys.start - rows.low : keys.stop - rows.low].add_(added)
        return logits, tanh

    def soft_cap(self, name: str, logits: Tensor) -> Tensor | None:
        """Soft-cap logits in place; returns the tanh."""
        if not self.x.softcap:
            return None
        tanh = torch.div(logits, self.x.softcap, out=self.scratch.take(name, *logits.shape)).tanh_()
        torch.mul(tanh, self.x.softcap, out=logits)
        return tanh

    def added(self, rows: Rows, keys: slice) -> Tensor | None:
        """What is added to the logits of the block's rows and some keys: the bias, and -inf for hidden keys."""
        visible = self.x.visible(rows.first, rows.count, keys.start, keys.stop - keys.start)
        if self.x.bias is None:
            if visible is None:
                return None
            return self.query.new_zeros(visible.shape).masked_fill_(~visible, -torch.inf)
        bias = part_of(self.x.bias, rows.here, keys).to(self.query.dtype)
        return bias if visible is None else torch.where(visible, bias, -torch.inf)

    def weigh(self, matrix: Tensor, rows: Rows, out: Tensor) -> Tensor:
        """Prefix columns times the gate's weights."""
        if self.weights is None:
            return out if out is matrix else out.copy_(matrix)
        weights = self.weights if self.weights.shape[1] == 1 else self.weights[:, rows.here]
        torch.mul(self.by_head(matrix), weights[:, None], out=self.by_head(out))
        return out

    def drop(self, rows: Rows, first_column: int, *matrices: Tensor) -> None:
        """Zero the dropped columns of matrices ``[n, group * rows, columns]``, by an integer "and" on their bits."""
        if self.row_keys is None:
            return
        shape = matrices[0].shape
        bits, scratch = (self.scratch.take(name, *shape, dtype=torch.int32) for name in ("keep", "keep_scratch"))
        keys = self.row_keys[:, :, rows.here].reshape(shape[:2])
        keep_bits(keys, self.x.dropout_p, first_column, bits, scratch)
        if matrices[0].dtype == torch.float64:
            bits = bits.to(torch.int64)
        for matrix in matrices:
            matrix.view(bits.dtype).bitwise_and_(bits)

    def attend(self, rows: Rows, out: Tensor, logsumexp: Tensor, of_tokens: Tensor | None) -> None:
        """Compute a block of the output and of the log-sum-exp.

        ``of_tokens`` is a log-sum-exp whose output stands in ``out``: one more column, with that value.
        """
        query = self.of_rows("query_rows", self.query, rows)
        prefix, _, _ = self.prefix_logits(query, rows)
        parts = [prefix]
        if rows.high > rows.low:
            parts.append(self.token_logits(query, rows)[0])
        extra = []
        if self.x.sinks is not None:
            extra.append(self.x.sinks.to(prefix.dtype).view(1, -1, 1, 1))
        if of_tokens is not None:
            extra.append(self.place(of_tokens, rows)[..., None])
        top = self.by_head(prefix.amax(-1, keepdim=True))
        for logit in [*[self.by_head(part.amax(-1, keepdim=True)) for part in parts[1:]], *extra]:
            torch.maximum(top, logit, out=top)
        total = sum(self.by_head(part).sub_(top).exp_().sum(-1, keepdim=True) for part in parts)
        extra = [torch.exp(logit - top) for logit in extra]
        for column in extra:
            total.add_(column)
        self.place(logsumexp, rows).copy_(total.log().add_(top)[..., 0])
        self.drop(rows, 0, prefix)
        sums = self.product("sums", self.weigh(prefix, rows, prefix), self.prefix_value)
        for tokens in parts[1:]:
            self.drop(rows, self.length + rows.low, tokens)
            sums.baddbmm_(tokens, self.value[:, rows.there])
        sums, place = self.by_head(sums), self.place(out, rows)
        if of_tokens is not None:
            sums.addcmul_(place.to(sums.dtype), extra[-1])
        torch.mul(sums, total.mul_(1 - self.x.dropout_p).reciprocal_(), out=place)
