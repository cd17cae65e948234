"""A prefix with one gate a row by the stock kernel: gated and scaled in memory (it is short), then merged or joined.

``merge``: one call on the tokens, one on the prefix, joined through their log-sum-exps. ``concat``: one call on the
prefix in front of the keys. Either goes through the batch a few rows at a time, so that what lies between two calls
stays in the cache, fresh pages are touched for results only, and padding beyond the chunk's longest row costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_stock
from .cpu_ranges import Chunk, by_batch, row_ends
from .cpu_scratch import Scratch
from .gate import gate_gradients
from .inputs import DIFFERENTIABLE, Inputs, heads_last_empty

# Elements of the keys of a chunk of batch rows, and the least heads a thread in it: see bench/NOTES.md.
CHUNK_ELEMENTS = 1 << 18
CHUNK_HEADS = 4


def _chunks(x: Inputs) -> list[Chunk]:
    batch, heads, kv_heads, _, keys, length, dim, _ = x.sizes
    row = kv_heads * (length + keys) * dim
    size = max(CHUNK_ELEMENTS // row, -(-CHUNK_HEADS * torch.get_num_threads() // heads), 1)
    return by_batch(x, min(size, batch))


class _Prefix:
    """The gated prefix in the query's dtype, rounded once, ``[B, Hkv, M, dim]``, and the calls that use it."""

    def __init__(self, x: Inputs, way: str):
        self.x, self.way, self.length, self.weights = x, way, x.prefix_key.shape[1], x.weights()
        self.scratch = Scratch(x.query, x.query.dtype)
        self.gated = [self._gated(prefix) for prefix in (x.prefix_key, x.prefix_value)]
        self.ends, self.hidden = row_ends(x)
        self.mask = None
        if way == "concat" and x.dense is None and x.bias is None:
            self.mask = cpu_stock.additive_mask(x, 0, x.key.shape[2], self.length)

    def _gated(self, prefix: Tensor) -> Tensor:
        batch, dtype = self.x.query.shape[0], self.x.query.dtype
        if self.weights is None:
            return prefix.to(dtype).expand(batch, -1, -1, -1)
        return (prefix.to(self.x.compute_dtype) * self.weights.mT[:, None]).to(dtype).expand(batch, -1, -1, -1)

    def call(self, chunk: Chunk, x: Inputs) -> tuple[cpu_stock.Call, slice]:
        """The call on the prefix of a chunk, whose inputs are ``x``, and the keys that are in it."""
        key, value = (gated[chunk.batch] for gated in self.gated)
        if self.way == "merge":
            return cpu_stock.Call(x.query, key, value, None, x.scale), slice(0, 0)
        end = max(self.ends[chunk.batch])
        key, value = self._join("key", key, x.key[:, :, :end]), self._join("value", value, x.value[:, :, :end])
        return cpu_stock.Call(x.query, key, value, self._mask(chunk, x, end), x.scale), slice(0, end)

    def _mask(self, chunk: Chunk, x: Inputs, end: int) -> Tensor | None:
        if x.dense is not None or x.bias is not None:
            return cpu_stock.additive_mask(x, 0, end, self.length)
        if self.mask is None or (not any(self.hidden[chunk.batch]) and min(self.ends[chunk.batch]) == end):
            return None
        return chunk.narrow(self.mask, chunk.batch)[..., : self.length + end]

    def _join(self, name: str, prefix: Tensor, tokens: Tensor) -> Tensor:
        batch, kv_heads, length, dim = prefix.shape
        # Heads first: the stock kernel is a tenth to a fifth slower on keys whose rows lie far apart.
        both = self.scratch.take(name, batch, kv_heads, length + tokens.shape[2], dim)
        return torch.cat([prefix, tokens], 2, out=both)


def forward(x: Inputs, way: str) -> tuple[Tensor, Tensor]:
    """The op's output and log-sum-exp. ``way``: ``"merge"`` or ``"concat"``."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    prefix = _Prefix(x, way)
    whole_out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    whole_logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    for chunk in _chunks(x):
        part = chunk.of(x)
        call, _ = prefix.call(chunk, part)
        out, logsumexp = call.forward()
        if x.sinks is not None:
            alone, sinks = logsumexp, x.sinks.to(logsumexp.dtype).view(1, -1, 1)
            logsumexp = torch.logaddexp(alone, sinks)
            out.mul_(torch.exp(alone - logsumexp)[..., None])
        if way == "merge":
            out = out.to(x.compute_dtype)  # so that halves are rounded once, not at every merge
            for tokens in cpu_stock.parts(part, prefix.scratch):
                tokens.merge_(out, logsumexp)
        whole_out[chunk.batch].copy_(out)
        whole_logsumexp[chunk.batch].copy_(logsumexp)
    return whole_out, whole_logsumexp


def backward(
    x: Inputs, way: str, out: Tensor, logsumexp: Tensor, grad_out: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed; none for a bias."""
    need, prefix = dict(zip(DIFFERENTIABLE, needs)), _Prefix(x, way)
    tokens = {"query": x.query, "key": x.key, "value": x.value}
    dtype = x.query.dtype if way == "concat" else x.compute_dtype
    total = {name: heads_last_empty(t, *t.shape, dtype) for name, t in tokens.items() if need[name]}
    d_gated = [gated.new_empty(prefix.length, len(gated), *gated.shape[1::2]) for gated in prefix.gated]
    for chunk in _chunks(x):
        part, rows = chunk.of(x), chunk.batch
        call, keys = prefix.call(chunk, part)
        given = out[rows], logsumexp[rows], grad_out[rows]
        found = dict(zip(tokens, call.backward(*given)))
        for whole, name in zip(d_gated, ("key", "value")):
            whole[:, rows].copy_(found[name][:, :, : prefix.length].permute(2, 0, 1, 3))
            found[name] = found[name][:, :, prefix.length :]
        into = {name: whole[rows] for name, whole in total.items()}
        for name, whole in into.items():
            _store(whole, found[name], slice(0, whole.shape[2]) if name == "query" else keys)
        if way == "merge" and into:
            cpu_stock.backward_(part, prefix.scratch, *given, into)
    if need["sinks"]:
        delta = (grad_out.to(x.compute_dtype) * out).sum(-1)
        total["sinks"] = -(torch.exp(x.sinks.to(delta.dtype).view(1, -1, 1) - logsumexp) * delta).sum((0, 2))
    total.update(_prefix_gradients(x, prefix.weights, d_gated, need))
    return [total.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _store(whole: Tensor, part: Tensor, keys: slice) -> None:
    """Copy a chunk's gradient to its keys, zero elsewhere."""
    whole[:, :, : keys.start].zero_()
    whole[:, :, keys.stop :].zero_()
    whole[:, :, keys].copy_(part)


def _prefix_gradients(x: Inputs, weights: Tensor | None, d_gated: list[Tensor], need: dict[str, bool]) -> dict:
    """From the gradients ``[M, B, Hkv, dim]`` of the gated prefix: the prefix's, the gate's and the scale's.

    Both sums, over the batch and over heads and dims, are matrix products, one for each prefix position.
    """
    wide, found, d_weights = x.compute_dtype, {}, 0
    if weights is not None:
        by_position = weights.expand(-1, -1, x.prefix_key.shape[1]).permute(2, 1, 0).contiguous()
    for name, grad in zip(("prefix_key", "prefix_value"), d_gated):
        if weights is None or weights.shape[0] == 1:
            grad = grad.sum(1, keepdim=True, dtype=wide)
        grad = grad.flatten(2).to(wide)
        prefix = getattr(x, name).to(wide).transpose(0, 1)
        if weights is not None:
            d_weights = d_weights + torch.bmm(grad, prefix.flatten(1)[..., None])
            grad = torch.bmm(by_position, grad)
        found[name] = grad.view(prefix.shape).transpose(0, 1)
    if need["gate"] or need["layer_scale"]:
        found["gate"], found["layer_scale"] = gate_gradients(x, d_weights.permute(1, 2, 0))
    return found
