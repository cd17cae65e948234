"""A prefix with one gate a row by the stock kernel: gated and scaled in memory (it is short), then merged or joined.

``concat``: one call on the prefix in front of the keys; results are what the kernel returns, uncopied. ``merge``: one
call on the tokens, one on the prefix, joined through their log-sum-exps, a few batch rows at a time, so that what lies
between two calls stays in the cache and padding beyond the chunk's longest row costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_stock
from .cpu_ranges import Chunk, by_batch
from .cpu_scratch import Scratch
from .gate import gate_gradients
from .inputs import DIFFERENTIABLE, Inputs, heads_last, heads_last_empty

# Elements of the keys of a chunk of batch rows, and the least heads a thread in it: see bench/NOTES.md.
CHUNK_ELEMENTS = 1 << 18
CHUNK_HEADS = 4


def _chunks(x: Inputs, way: str) -> list[Chunk]:
    batch, heads, kv_heads, _, keys, length, dim, _ = x.sizes
    if way == "concat":
        return by_batch(x, batch)
    row = kv_heads * (length + keys) * dim
    size = max(CHUNK_ELEMENTS // row, -(-CHUNK_HEADS * torch.get_num_threads() // heads), 1)
    return by_batch(x, min(size, batch))


class _Prefix:
    """The gated prefix in the query's dtype, rounded once, ``[B, Hkv, M, dim]``, and the calls that use it."""

    def __init__(self, x: Inputs, way: str, kept: tuple[Tensor, Tensor] | None = None):
        self.x, self.way, self.length, self.weights = x, way, x.prefix_key.shape[1], x.weights()
        self.scratch, self.kept = Scratch(x.query, x.query.dtype), kept
        self.gated = [] if kept else [self._gated(prefix) for prefix in (x.prefix_key, x.prefix_value)]

    def _gated(self, prefix: Tensor) -> Tensor:
        batch, dtype = self.x.query.shape[0], self.x.query.dtype
        if self.weights is None:
            return prefix.to(dtype).expand(batch, -1, -1, -1)
        return (prefix.to(self.x.compute_dtype) * self.weights.mT[:, None]).to(dtype).expand(batch, -1, -1, -1)

    def call(self, chunk: Chunk, x: Inputs) -> cpu_stock.Call:
        """The call on the prefix of a chunk, whose inputs are ``x``; with ``"concat"``, the tokens stand behind it."""
        if self.kept is None:
            key, value = (gated[chunk.batch] for gated in self.gated)
        mask = None
        if self.way == "concat":
            if self.kept is None:
                self.kept = torch.cat([key, x.key], 2), torch.cat([value, x.value], 2)
            key, value = self.kept
            mask = cpu_stock.additive_mask(x, 0, x.key.shape[2], self.length)
        return cpu_stock.Call(x.query, key, value, mask, x.scale)


def forward(x: Inputs, way: str) -> tuple[Tensor, ...]:
    """The op's output and log-sum-exp. ``way``: ``"merge"`` or ``"concat"``, which adds the two concatenations."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    prefix, chunks = _Prefix(x, way), _chunks(x, way)
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
        if way == "merge":
            for tokens in cpu_stock.parts(part, prefix.scratch):
                tokens.merge_(out, logsumexp)
        if len(chunks) == 1:
            return heads_last(out), logsumexp.contiguous(), *(prefix.kept or ())
        whole_out[chunk.batch].copy_(out)
        whole_logsumexp[chunk.batch].copy_(logsumexp)
    return whole_out, whole_logsumexp


def backward(
    x: Inputs,
    way: str,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    needs: list[bool],
    kept: tuple[Tensor, Tensor] | None,
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed; none for a bias."""
    need, prefix, chunks = dict(zip(DIFFERENTIABLE, needs)), _Prefix(x, way, kept), _chunks(x, way)
    d_gated = [t.new_empty(prefix.length, *t.shape[:2], t.shape[3]) for t in (x.key, x.value)]
    whole = {}
    if way == "merge":
        whole = {name: heads_last_empty(t, *t.shape) for name, t in _tokens(x).items() if need[name]}
    for chunk in chunks:
        part, rows = x if len(chunks) == 1 else chunk.of(x), chunk.batch
        given = out[rows], logsumexp[rows], grad_out[rows]
        found = dict(zip(_tokens(x), prefix.call(chunk, part).backward(*given)))
        for total, name in zip(d_gated, ("key", "value")):
            total[:, rows].copy_(found[name][:, :, : prefix.length].permute(2, 0, 1, 3))
            found[name] = found[name][:, :, prefix.length :]
        if way == "concat":
            whole = found
            break
        into = {name: total[rows] for name, total in whole.items()}
        for name, total in into.items():
            total.copy_(found[name]) if name == "query" else total.zero_()
        if into:
            cpu_stock.backward_(part, prefix.scratch, *given, into)
    if need["sinks"]:
        delta = (grad_out.to(x.compute_dtype) * out).sum(-1)
        whole["sinks"] = -(torch.exp(x.sinks.to(delta.dtype).view(1, -1, 1) - logsumexp) * delta).sum((0, 2))
    whole.update(_prefix_gradients(x, prefix.weights, d_gated, need))
    return [whole.get(name) if need[name] else None for name in DIFFERENTIABLE]


def _tokens(x: Inputs) -> dict[str, Tensor]:
    return {"query": x.query, "key": x.key, "value": x.value}


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
