"""A prefix with one gate per row, by the stock kernel: it is gated in memory, then concatenated or merged.

``concat``: one call on ``[prefix ; keys]``, which is kept for the backward in place of the keys; results are what the
kernel returns, not copies. A causal mask is given as a matrix, ``[1, 1, T, M + S]``, or one for each row with padding.
``merge``: one call on the tokens, one on the prefix, merged through their log-sum-exps, a few batch rows at a time, so
that intermediate results stay in the cache and padding beyond the chunk's longest row costs nothing.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Result
from ..gate import gate_gradients
from ..inputs import DIFFERENTIABLE, Inputs, heads_last, heads_last_empty
from . import stock
from .ranges import Chunk, by_batch
from .scratch import Scratch

# Elements of the keys of a chunk of batch rows, and its least number of heads per thread: see bench/NOTES.md.
CHUNK_ELEMENTS = 1 << 18
CHUNK_HEADS = 4
_TOKENS = ("query", "key", "value")
# Elements of the gradient of the gated prefix that are copied at a time, so that the copy is small.
GRADIENT_ELEMENTS = 1 << 17


def _chunks(x: Inputs) -> list[Chunk]:
    """The chunks of batch rows of ``"merge"``."""
    batch, heads, kv_heads, queries, keys, length, dim, _ = x.sizes
    if queries == 1:  # a single query reads every key once: caching them gains nothing
        return by_batch(x, batch)
    row = kv_heads * (length + keys) * dim
    size = max(CHUNK_ELEMENTS // row, -(-CHUNK_HEADS * torch.get_num_threads() // heads), 1)
    return by_batch(x, min(size, batch))


class _Prefix:
    """The gated prefix in the query's dtype, rounded once, ``[B, Hkv, M, dim]``, and the calls that use it.

    Where there is a prefix for each row, the rows of a chunk are gathered when it is computed.
    """

    def __init__(self, x: Inputs, strategy: str, kept: tuple[Tensor, Tensor] | None = None):
        self.x, self.strategy, self.length, self.weights = x, strategy, x.prefix_key.shape[-2], x.weights()
        self.scratch, self.kept, self.gated = Scratch(x.query, x.query.dtype), kept, None
        if strategy == "concat":
            self.kept = kept or (self._joined(x.prefix_key, x.key), self._joined(x.prefix_value, x.value))
        elif x.prefix_index is None:
            self.gated = [self._gated(part) for part in (x.prefix_key, x.prefix_value)]

    def _gated(self, prefix: Tensor, out: Tensor | None = None) -> Tensor:
        batch, dtype, wide = self.x.query.shape[0], self.x.query.dtype, self.x.compute_dtype
        if self.weights is None:
            prefix = prefix.to(dtype).expand(batch, -1, -1, -1)
            return prefix if out is None else out.copy_(prefix)
        prefix, weights = prefix.to(wide), self.weights.mT[:, None]
        if out is not None and dtype == wide:
            return torch.mul(prefix.expand(batch, -1, -1, -1), weights, out=out)
        gated = (prefix * weights).to(dtype).expand(batch, -1, -1, -1)
        return gated if out is None else out.copy_(gated)

    def _joined(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """``[gated prefix ; tokens]``."""
        batch, kv_heads, keys, dim = tokens.shape
        both = tokens.new_empty(batch, kv_heads, self.length + keys, dim)
        self._gated(prefix, both[:, :, : self.length])
        both[:, :, self.length :].copy_(tokens)
        return both

    def call(self, chunk: Chunk, x: Inputs) -> stock.Call:
        """The call on the prefix of a chunk, whose inputs are ``x``; with ``"concat"``, of the tokens as well."""
        if self.kept is not None:
            mask = stock.additive_mask(x, 0, x.key.shape[2], self.length)
            return stock.Call(x.query, *self.kept, mask, x.scale)
        if x.prefix_index is not None:
            weights, wide = x.weights(), x.compute_dtype
            rows = (x.prefix_rows(part) for part in (x.prefix_key, x.prefix_value))
            key, value = ((r if weights is None else r.to(wide) * weights.mT[:, None]).to(x.query.dtype) for r in rows)
            return stock.Call(x.query, key, value, stock.prefix_mask(x), x.scale)
        key, value = (gated[chunk.batch] for gated in self.gated)
        return stock.Call(x.query, key, value, None, x.scale)


def forward(x: Inputs, strategy: str) -> Result:
    """The op's forward. ``strategy``: ``"merge"`` or ``"concat"``, which keeps the two concatenations."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    prefix, chunks = _Prefix(x, strategy), by_batch(x, x.query.shape[0]) if strategy == "concat" else _chunks(x)
    if len(chunks) > 1:
        whole_out = heads_last_empty(x.query, batch, heads, queries, value_dim)
        whole_logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    for chunk in chunks:
        part = x if len(chunks) == 1 else chunk.of(x)
        out, logsumexp = prefix.call(chunk, part).forward()
        if x.sinks is not None:
            alone, sinks = logsumexp, x.sinks.to(logsumexp.dtype).view(1, -1, 1)
            logsumexp = torch.logaddexp(alone, sinks)
            out.mul_(torch.exp(alone - logsumexp)[..., None])
        if strategy == "merge":
            for tokens in stock.parts(part, prefix.scratch):
                tokens.merge_(out, logsumexp)
        if len(chunks) == 1:
            return Result(heads_last(out), logsumexp.contiguous(), prefix.kept)
        whole_out[chunk.batch].copy_(out)
        whole_logsumexp[chunk.batch].copy_(logsumexp)
    return Result(whole_out, whole_logsumexp)


def backward(
    x: Inputs,
    strategy: str,
    result: Result,
    grad_out: Tensor,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed; none for a bias."""
    out, logsumexp, kept = result
    need, prefix = dict(zip(DIFFERENTIABLE, needs)), _Prefix(x, strategy, kept)
    if strategy == "concat":
        (chunk,) = by_batch(x, x.query.shape[0])
        found = dict(zip(_TOKENS, prefix.call(chunk, x).backward(out, logsumexp, grad_out)))
        columns = [found[name] for name in ("key", "value")]
        of_prefix = [part[:, :, : prefix.length] for part in columns]
        found["key"], found["value"] = (part[:, :, prefix.length :] for part in columns)
    else:
        found, of_prefix = _merge_backward(prefix, result, grad_out, need)
    if need["sinks"]:
        delta = (grad_out.to(x.compute_dtype) * out).sum(-1)
        found["sinks"] = -(torch.exp(x.sinks.to(delta.dtype).view(1, -1, 1) - logsumexp) * delta).sum((0, 2))
    found.update(_prefix_gradients(x, prefix.weights, of_prefix, need))
    return [found.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _merge_backward(
    prefix: _Prefix, result: Result, grad_out: Tensor, need: dict[str, bool]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The gradients of query, key and value that are needed, and of the gated prefix's key and value."""
    x, chunks, of_prefix = prefix.x, _chunks(prefix.x), []
    tokens = {name: getattr(x, name) for name in _TOKENS if need[name]}
    whole = {name: heads_last_empty(tensor, *tensor.shape) for name, tensor in tokens.items()}
    for chunk in chunks:
        part, rows = x if len(chunks) == 1 else chunk.of(x), chunk.batch
        given = result.out[rows], result.logsumexp[rows], grad_out[rows]
        d_query, *found = prefix.call(chunk, part).backward(*given)
        if len(chunks) == 1:
            of_prefix = found
        else:
            of_prefix = of_prefix or [part.new_empty(x.query.shape[0], *part.shape[1:]) for part in found]
            for total, columns in zip(of_prefix, found):
                total[rows].copy_(columns)
        del found
        into = {name: total[rows] for name, total in whole.items()}
        for name, total in into.items():
            total.copy_(d_query) if name == "query" else total.zero_()
        del d_query
        if into:
            stock.backward_(part, prefix.scratch, *given, into)
    return whole, of_prefix


def _prefix_gradients(x: Inputs, weights: Tensor | None, of_prefix: list[Tensor], need: dict[str, bool]) -> dict:
    """The gradients of prefix, gate and scale from those of the gated prefix's key and value, ``[B, Hkv, M, .]``."""
    if x.prefix_index is not None:
        return _by_adapter(x, weights, torch.cat([p.permute(2, 0, 1, 3).flatten(2) for p in of_prefix], 2), need)
    found, names, d_weights = {}, ("prefix_key", "prefix_value"), None
    shared = weights is None or weights.shape[0] == 1
    of_gate = need["gate"] or need["layer_scale"]
    for name, part in zip(names, of_prefix):
        found[name], more = (_shared if shared else _by_row)(getattr(x, name), weights, part, of_gate)
        d_weights = more if d_weights is None else d_weights + more
    if of_gate:
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights)
    return found


def _shared(prefix: Tensor, weights: Tensor | None, of_gated: Tensor, of_gate: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of a prefix and of its weights ``[1, 1, M]``, which all rows share."""
    wide = torch.promote_types(of_gated.dtype, torch.float32)
    total = of_gated.sum(0, dtype=wide)
    d_weights = (prefix.to(wide) * total).sum((0, 2))[None, None] if of_gate else None
    return total if weights is None else total.mul_(weights[0].mT), d_weights


def _by_row(prefix: Tensor, weights: Tensor, of_gated: Tensor, of_gate: bool) -> tuple[Tensor, Tensor | None]:
    """The same with weights ``[B, 1, M]``, a few heads at a time.

    Both sums, over the batch and over heads and dims, are matrix products, one for each prefix position.
    """
    batch, heads, length, dim = of_gated.shape
    wide, d_weights = weights.dtype, None
    columns = weights.expand(-1, -1, length).permute(2, 1, 0).contiguous()
    found = columns.new_empty(length, heads, dim)
    count = max(1, GRADIENT_ELEMENTS // (batch * length * dim))
    for first in range(0, heads, count):
        some = slice(first, first + count)
        rows = of_gated[:, some].permute(2, 0, 1, 3).to(wide, memory_format=torch.contiguous_format).flatten(2)
        found[:, some].copy_(torch.bmm(columns, rows)[:, 0].unflatten(1, (-1, dim)))
        if of_gate:
            # As a row: the product with a column is twice as slow.
            more = torch.bmm(prefix[some].transpose(0, 1).flatten(1).to(wide)[:, None], rows.mT).permute(2, 1, 0)
            d_weights = more if d_weights is None else d_weights.add_(more)
    return found.transpose(0, 1), d_weights


def _by_adapter(x: Inputs, weights: Tensor | None, d_gated: Tensor, need: dict[str, bool]) -> dict:
    """`_prefix_gradients` where there is a prefix for each row: each row's part is added to its adapter's, in order."""
    kv_heads, (dim, value_dim) = x.sizes[2], x.sizes[-2:]
    wide, found = x.compute_dtype, {}
    d_gated = d_gated.to(wide)
    if need["gate"] or need["layer_scale"]:
        parts = [x.prefix_rows(part).permute(2, 0, 1, 3).flatten(2) for part in (x.prefix_key, x.prefix_value)]
        d_weights = (torch.cat(parts, 2).to(wide) * d_gated).sum(-1).mT[:, None]
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights)
    if weights is not None:
        d_gated = d_gated * weights.permute(2, 0, 1)
    used = x.prefix_index >= 0
    whole = d_gated.new_zeros(d_gated.shape[0], x.prefix_key.shape[0], d_gated.shape[2])
    whole.index_add_(1, x.prefix_index[used], d_gated[:, used])
    parts = whole.split([kv_heads * dim, kv_heads * value_dim], 2)
    for name, part in zip(("prefix_key", "prefix_value"), parts):
        found[name] = part.unflatten(2, (kv_heads, -1)).permute(1, 2, 0, 3)
    return found
