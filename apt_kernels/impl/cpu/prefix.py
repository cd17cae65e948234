"""A prefix with one gate per row, by the stock kernel: it is gated in memory, then merged or concatenated.

``concat``: one call on ``[keys ; prefix]``; results are what the kernel returns, not copies. Under a causal mask the
keys are in reverse order, so that whether query ``i`` sees column ``c`` depends on ``i + c`` alone: the mask is one
vector, viewed as a matrix with strides (1, 1), and never hides the prefix. ``merge``: one call on the tokens, one on
the prefix, merged through their log-sum-exps, a few batch rows at a time, so that intermediate results stay in the
cache and padding beyond the chunk's longest row costs nothing.

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


def _chunks(x: Inputs, strategy: str) -> list[Chunk]:
    batch, heads, kv_heads, queries, keys, length, dim, _ = x.sizes
    # A single query reads every key once: caching them gains nothing.
    if strategy == "concat" or queries == 1:
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
        self.scratch, self.kept = Scratch(x.query, x.query.dtype), kept
        later = kept or strategy == "concat" or x.prefix_index is not None
        self.gated = None if later else [self._gated(part) for part in (x.prefix_key, x.prefix_value)]

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
        """``[tokens ; gated prefix]``; under a causal mask the tokens in reverse order."""
        batch, kv_heads, keys, dim = tokens.shape
        both = tokens.new_empty(batch, kv_heads, keys + self.length, dim)
        if stock.reverses(self.x):
            backwards = torch.arange(keys - 1, -1, -1, device=tokens.device)
            torch.index_select(tokens, 2, backwards, out=both[:, :, :keys])
        else:
            both[:, :, :keys].copy_(tokens)
        self._gated(prefix, both[:, :, keys:])
        return both

    def call(self, chunk: Chunk, x: Inputs) -> stock.Call:
        """The call on the prefix of a chunk, whose inputs are ``x``; with ``"concat"``, of the tokens as well."""
        if self.strategy != "concat" and x.prefix_index is not None:
            weights, wide = x.weights(), x.compute_dtype
            rows = (x.prefix_rows(part) for part in (x.prefix_key, x.prefix_value))
            key, value = ((r if weights is None else r.to(wide) * weights.mT[:, None]).to(x.query.dtype) for r in rows)
            return stock.Call(x.query, key, value, stock.prefix_mask(x), x.scale)
        if self.strategy != "concat":
            key, value = (gated[chunk.batch] for gated in self.gated)
            return stock.Call(x.query, key, value, None, x.scale)
        if self.kept is None:
            self.kept = self._joined(x.prefix_key, x.key), self._joined(x.prefix_value, x.value)
        if stock.reverses(x):
            mask = stock.causal_mask_of_reversed(x, self.length)
        else:
            mask = stock.additive_mask(x, 0, x.key.shape[2], self.length)
        return stock.Call(x.query, *self.kept, mask, x.scale)


def forward(x: Inputs, strategy: str) -> Result:
    """The op's forward. ``strategy``: ``"merge"`` or ``"concat"``, which keeps the two concatenations."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    prefix, chunks = _Prefix(x, strategy), _chunks(x, strategy)
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
    need, prefix, chunks = dict(zip(DIFFERENTIABLE, needs)), _Prefix(x, strategy, kept), _chunks(x, strategy)
    batch, _, kv_heads, _, _, length, dim, value_dim = x.sizes
    # Prefix position first, so that both sums are batched products: see `_prefix_gradients`.
    d_gated = x.query.new_empty(length, batch, kv_heads * (dim + value_dim))
    parts = d_gated[..., : kv_heads * dim], d_gated[..., kv_heads * dim :]
    d_parts = [part.unflatten(2, (kv_heads, -1)) for part in parts]
    whole = {}
    if strategy == "merge":
        whole = {name: heads_last_empty(t, *t.shape) for name, t in _tokens(x).items() if need[name]}
    for chunk in chunks:
        part, rows = x if len(chunks) == 1 else chunk.of(x), chunk.batch
        given = out[rows], logsumexp[rows], grad_out[rows]
        found = dict(zip(_tokens(x), prefix.call(chunk, part).backward(*given)))
        for total, name in zip(d_parts, ("key", "value")):
            tokens, of_prefix = found[name].tensor_split([found[name].shape[2] - length], 2)
            total[:, rows].copy_(of_prefix.permute(2, 0, 1, 3))
            found[name] = tokens.flip(2) if strategy == "concat" and stock.reverses(x) and need[name] else tokens
        if strategy == "concat":
            whole = found
            break
        into = {name: total[rows] for name, total in whole.items()}
        for name, total in into.items():
            total.copy_(found[name]) if name == "query" else total.zero_()
        if into:
            stock.backward_(part, prefix.scratch, *given, into)
    if need["sinks"]:
        delta = (grad_out.to(x.compute_dtype) * out).sum(-1)
        whole["sinks"] = -(torch.exp(x.sinks.to(delta.dtype).view(1, -1, 1) - logsumexp) * delta).sum((0, 2))
    whole.update(_prefix_gradients(x, prefix.weights, d_gated, need))
    return [whole.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _tokens(x: Inputs) -> dict[str, Tensor]:
    return {"query": x.query, "key": x.key, "value": x.value}


def _prefix_gradients(x: Inputs, weights: Tensor | None, d_gated: Tensor, need: dict[str, bool]) -> dict:
    """The gradients of prefix, gate and scale from that of the gated prefix, ``[M, B, Hkv * (D + Dv)]``.

    Both sums, over the batch and over heads and dims, are matrix products, one for each prefix position.
    """
    if x.prefix_index is not None:
        return _by_adapter(x, weights, d_gated, need)
    _, _, kv_heads, _, _, length, dim, value_dim = x.sizes
    wide, found = x.compute_dtype, {}
    if weights is None or weights.shape[0] == 1:
        d_gated = d_gated.sum(1, keepdim=True, dtype=wide)
    d_gated = d_gated.to(wide)
    if need["gate"] or need["layer_scale"]:
        prefix = torch.cat([part.transpose(0, 1).flatten(1) for part in (x.prefix_key, x.prefix_value)], 1).to(wide)
        # As a row: the product with a column is twice as slow.
        d_weights = torch.bmm(prefix[:, None], d_gated.mT).permute(2, 1, 0)
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights)
    if weights is not None:
        d_gated = torch.bmm(weights.expand(-1, -1, length).permute(2, 1, 0).contiguous(), d_gated)
    parts = d_gated[:, 0].split([kv_heads * dim, kv_heads * value_dim], 1)
    for name, part in zip(("prefix_key", "prefix_value"), parts):
        found[name] = part.unflatten(1, (kv_heads, -1)).transpose(0, 1)
    return found


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
