"""The backward of blocks.py: the closed form, block by block, and only the gradients that are needed.

With ``p`` from the log-sum-exp, ``g`` the gate's weights (1 on tokens), ``s`` the scaled product of query and ungated
key, ``dO`` divided by ``1 - dropout_p``, ``keep`` the dropout mask and ``r = keep (dO . v)``:
``dz = p (g r - delta)`` (times the soft-cap's slope), ``dq = sum g dz k``, ``dk = sum g dz q``,
``dv = sum g keep p dO``, ``dg = sum dz s + p r``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gate import gate_gradients
from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty, part_of
from .blocks import BLOCK_ROWS, Blocks, Streams
from .ranges import Rows, of_queries


def backward(
    x: Inputs,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    of_tokens: dict[str, Tensor] | None = None,
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed.

    ``of_tokens``: the tokens' part of those of query, key and value, if computed; the query's is added to in place.
    """
    grads = Gradients(x, needs, of_tokens)
    for streams in Blocks(x, grads.of_tokens).streams():
        Backward(streams, grads, logsumexp).run(out, grad_out, grad_logsumexp)
    return grads.finish()


class Gradients:
    """The gradients of the whole call, summed block by block; None where not needed."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None

    def __init__(self, x: Inputs, needs: list[bool], of_tokens: dict[str, Tensor] | None):
        self.x, self.needs = x, needs
        need = dict(zip(DIFFERENTIABLE, needs))
        wide = x.compute_dtype
        self.adds_to_query = of_tokens is not None
        for name in ("query", "key", "value"):
            like, part = getattr(x, name), None
            if need[name]:
                part = heads_last_empty(like, *like.shape) if of_tokens is None else of_tokens[name]
            setattr(self, name, part)
        for name in ("prefix_key", "prefix_value", "sinks", "bias"):
            like = getattr(x, name)
            setattr(self, name, torch.zeros(like.shape, dtype=wide, device="cpu") if need[name] else None)
        self.weights = None
        if need["gate"] or need["layer_scale"]:
            self.weights = torch.zeros(*_rows_of_weights(x), x.prefix_key.shape[-2], dtype=wide, device="cpu")

    @property
    def of_tokens(self) -> bool:
        """Whether any gradient through the token columns remains to be computed."""
        parts = (self.query, self.key, self.value, self.bias)
        return not self.adds_to_query and any(part is not None for part in parts)

    def finish(self) -> list[Tensor | None]:
        """All gradients in the order of `DIFFERENTIABLE`."""
        found = {}
        if self.weights is not None:
            found["gate"], found["layer_scale"] = self._of_gate(self.weights)
        named = zip(DIFFERENTIABLE, self.needs)
        return [found.get(name, getattr(self, name, None)) if need else None for name, need in named]

    def _of_gate(self, d_weights: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of gate and lambda; with a gate per query some rows at a time, in place where sizes agree."""
        x = self.x
        if not x.gate_per_query:
            return gate_gradients(x, d_weights)
        d_gate = d_weights if x.gate.shape == d_weights.shape else d_weights.new_zeros(x.gate.shape)
        d_scale = None
        for first in range(0, d_weights.shape[1], BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            more, of_scale = gate_gradients(of_queries(x, rows), d_weights[:, rows])
            if x.gate_index is None:
                d_gate[:, rows].copy_(more)
            else:
                d_gate.add_(more)
            d_scale = of_scale if d_scale is None else d_scale.add_(of_scale)
        return d_gate, d_scale


def _rows_of_weights(x: Inputs) -> tuple[int, int]:
    """The first two sizes of ``x.weights()``, which is not computed where each query has a gate."""
    if not x.gate_per_query:
        batch, queries, _ = x.weights().shape
    else:
        batch, queries = (x.gate if x.gate_index is None else x.gate_index).shape[:2]
        batch = batch if x.prefix_index is None else x.query.shape[0]
    return batch, queries


class Backward:
    """One chunk's backward."""

    def __init__(self, streams: Streams, grads: Gradients, logsumexp: Tensor):
        self.streams, self.grads, self.x = streams, grads, streams.x
        self.logsumexp = logsumexp
        self.d_key = self._sums("d_key", streams.key, grads.key, grads.prefix_key)
        self.d_value = self._sums("d_value", streams.value, grads.value, grads.prefix_value)

    def _sums(self, name: str, like: Tensor, of_tokens: Tensor | None, of_prefix: Tensor | None) -> Tensor | None:
        """Zeros for the joined columns, or the prefix's alone where the tokens' are not needed."""
        if of_prefix is None and (of_tokens is None or not self.streams.keys):
            return None
        columns = like.shape[1] if of_tokens is not None else self.streams.length
        return self.streams.scratch.take(name, like.shape[0], columns, like.shape[2]).zero_()

    def run(self, out: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None) -> None:
        """Add this chunk's part to the gradients."""
        streams, chunk = self.streams, self.streams.chunk
        grad = streams.stacked("grad_out", grad_out[chunk.batch, chunk.heads])
        delta = self.delta(grad, out, grad_logsumexp)
        if self.x.dropout_p:
            grad.div_(1 - self.x.dropout_p)
        for rows in streams.blocks():
            self.block(rows, grad, delta)
        for name, sums in (("key", self.d_key), ("value", self.d_value)):
            if sums is None:
                continue
            sums = sums.view(streams.batch, -1, *sums.shape[1:])
            of_tokens, of_prefix = getattr(self.grads, name), getattr(self.grads, f"prefix_{name}")
            if of_tokens is not None and streams.keys:
                of_tokens[chunk.batch, chunk.kv_heads].copy_(sums[:, :, streams.length :])
            if of_prefix is not None:
                self.add_prefix(of_prefix[..., chunk.kv_heads, :, :], sums[:, :, : streams.length])

    def add_prefix(self, whole: Tensor, rows: Tensor) -> None:
        """Add ``rows [B, Hkv, M, .]`` to the gradient of the prefix, or each to that of its row's prefix."""
        index = self.x.prefix_index
        if index is None:
            whole.add_(rows.sum(0))
        else:
            whole.index_add_(0, index[index >= 0], rows[index >= 0])

    def delta(self, grad: Tensor, out: Tensor, grad_logsumexp: Tensor | None) -> Tensor:
        """``sum(dO * O) - dL``, ``[B, Hq, T]``, and from it the gradient of the sinks."""
        streams, chunk = self.streams, self.streams.chunk
        here = (chunk.batch, chunk.heads)
        product = streams.stacked("d_query", out[here]).mul_(grad)
        delta = product.sum(-1).view(streams.batch, streams.heads, streams.queries)
        if grad_logsumexp is not None:
            delta.sub_(grad_logsumexp[here])
        if self.grads.sinks is not None:
            sink = self.x.sinks.to(delta.dtype).view(1, -1, 1) - self.logsumexp[here]
            self.grads.sinks[chunk.heads].sub_(sink.exp_().mul_(delta).sum((0, 2)))
        return delta

    def block(self, rows: Rows, grad: Tensor, delta: Tensor) -> None:
        """Gradients through the columns of a block."""
        streams, scratch, length = self.streams, self.streams.scratch, self.streams.length
        query, grad = streams.of_rows("query_rows", streams.query, rows), streams.of_rows("grad_rows", grad, rows)
        key = streams.of_columns("key_columns", streams.key, rows)
        shape, gated = (*query.shape[:2], length), self.grads.weights is not None
        s = scratch.take("prefix_logits", *shape) if gated else None
        p, tanh = streams.logits(query, key, rows, s)
        streams.by_head(p).sub_(streams.place(self.logsumexp, rows)[..., None]).exp_()
        dz = streams.product("dz", grad, streams.of_columns("value_columns", streams.value, rows).mT)
        kept, bits = p, streams.keep(rows, p)
        if bits is not None:
            kept = scratch.take("kept", *p.shape)
            torch.bitwise_and(p.view(bits.dtype), bits, out=kept.view(bits.dtype))
            dz.view(bits.dtype).bitwise_and_(bits)
        r = scratch.take("prefix_r", *shape).copy_(dz[..., :length]) if gated else None
        streams.weigh_(dz, rows)
        streams.by_head(dz).sub_(delta[:, :, rows.here, None])
        dz.mul_(p)
        if self.grads.bias is not None and rows.high > rows.low:
            self.bias(rows, dz)
        if tanh is not None:
            dz.mul_(tanh.square_().neg_().add_(1))
        if gated:
            self.weights(rows, s.mul_(dz[..., :length]).addcmul_(p[..., :length], r))
        streams.weigh_(dz, rows)
        if self.grads.query is not None:
            d_query = streams.by_head(streams.product("d_query", dz, key))
            place = streams.place(self.grads.query, rows)
            if self.grads.adds_to_query:
                place.add_(d_query, alpha=self.x.scale)
            else:
                torch.mul(d_query, self.x.scale, out=place)
        self.accumulate(self.d_key, rows, dz, query)
        if self.d_value is not None:
            streams.weigh_(kept, rows)
            self.accumulate(self.d_value, rows, kept, grad)

    def accumulate(self, sums: Tensor | None, rows: Rows, columns: Tensor, operand: Tensor) -> None:
        """Add ``columns^T @ operand`` to the sums over the block's columns."""
        if sums is None:
            return
        length = self.streams.length
        if sums.shape[1] == length:
            columns, target = columns[..., :length], sums
        else:
            target = sums[:, : length + rows.high - rows.low] if rows.low == 0 or rows.high == rows.low else None
        if target is not None and target.is_contiguous():
            target.baddbmm_(columns.mT, operand)
            return
        # The batched product needs a contiguous result; into others it would multiply one matrix at a time.
        part = self.streams.product("part", columns.mT, operand)
        if target is not None:
            target.add_(part)
        else:
            sums[:, :length].add_(part[:, :length])
            sums[:, length + rows.low : length + rows.high].add_(part[:, length:])

    def bias(self, rows: Rows, dz: Tensor) -> None:
        """Add the token columns of a block to the bias's gradient."""
        chunk = self.streams.chunk
        whole = chunk.narrow(self.grads.bias, chunk.batch, chunk.heads)
        whole = part_of(whole, rows.here, rows.there)
        whole.add_(self.streams.by_head(dz)[..., self.streams.length :].sum_to_size(whole.shape))

    def weights(self, rows: Rows, d_weights: Tensor) -> None:
        """Add a block's prefix columns to the gradient of the gate's weights."""
        whole = self.streams.chunk.narrow(self.grads.weights, self.streams.chunk.batch)
        whole = whole if whole.shape[1] == 1 else whole[:, rows.here]
        whole.add_(self.streams.by_head(d_weights).sum(1).sum_to_size(whole.shape))
