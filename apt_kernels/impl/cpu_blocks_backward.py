"""The backward of `cpu_blocks`: the closed form, block by block, and only the gradients that are needed.

With ``p`` from the log-sum-exp, ``g`` the gate's weights (1 on tokens), ``s`` the scaled product of query and ungated
key, ``dO`` divided by ``1 - dropout_p`` and ``keep`` the dropout mask:
``dz = p (g keep (dO . v) - delta)``, ``ds = g dz`` (times the soft-cap's slope), ``dv = sum g p keep dO``,
``dg = sum dz s + p keep (dO . v)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu_blocks import Streams, chunks
from .cpu_ranges import Chunk, Rows
from .cpu_scratch import Scratch
from .gate import gate_gradients
from .inputs import DIFFERENTIABLE, Inputs, heads_last_empty, part_of


def backward(
    x: Inputs,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    of_tokens: tuple[Tensor, Tensor, Tensor] | None = None,
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed.

    ``of_tokens``: the tokens' share of those of query, key and value, where it is known; the query's is added to.
    """
    grads = Gradients(x, needs, of_tokens)
    scratch = Scratch(x.query, x.compute_dtype)
    for chunk in chunks(x, grads.of_tokens):
        Block(x, chunk, scratch, grads, logsumexp).run(out, grad_out, grad_logsumexp)
    return grads.finish()


class Gradients:
    """The whole call's gradients while they are summed; None where not needed."""

    def __init__(self, x: Inputs, needs: list[bool], of_tokens: tuple[Tensor, Tensor, Tensor] | None):
        self.x, self.needs = x, needs
        need = dict(zip(DIFFERENTIABLE, needs))
        wide = x.compute_dtype
        self.adds_to_query = of_tokens is not None
        for i, name in enumerate(("query", "key", "value")):
            like = getattr(x, name) if of_tokens is None else of_tokens[i]
            part = heads_last_empty(like, *like.shape) if of_tokens is None else like
            setattr(self, name, part if need[name] else None)
        for name in ("prefix_key", "prefix_value", "sinks", "bias"):
            like = getattr(x, name)
            setattr(self, name, torch.zeros(like.shape, dtype=wide) if need[name] else None)
        self.weights = None
        if need["gate"] or need["layer_scale"]:
            weights = x.weights()
            self.weights = torch.zeros(*weights.shape[:2], x.prefix_key.shape[1], dtype=wide)

    @property
    def of_tokens(self) -> bool:
        """Whether any gradient needs the token columns at all."""
        parts = (self.query, self.key, self.value, self.bias)
        return not self.adds_to_query and any(part is not None for part in parts)

    @property
    def of_prefix(self) -> bool:
        """Whether any gradient needs the prefix columns."""
        return any(part is not None for part in (self.query, self.prefix_key, self.prefix_value, self.weights))

    def finish(self) -> list[Tensor | None]:
        """All gradients in the order of `DIFFERENTIABLE`."""
        if self.weights is not None:
            gate, layer_scale = gate_gradients(self.x, self.weights)
            found = {"gate": gate, "layer_scale": layer_scale}
        else:
            found = {}
        return [found.get(name, getattr(self, name, None)) if need else None for name, need in self._named()]

    def _named(self):
        return zip(DIFFERENTIABLE, self.needs)


class Block(Streams):
    """One chunk's backward."""

    def __init__(self, x: Inputs, chunk: Chunk, scratch: Scratch, grads: Gradients, logsumexp: Tensor):
        super().__init__(x, chunk, scratch, grads.of_tokens)
        self.grads, self.logsumexp = grads, logsumexp
        self.d_key = self.sums("d_key", self.key, grads.key) if self.tokens else None
        self.d_value = self.sums("d_value", self.value, grads.value) if self.tokens else None
        self.d_prefix_key = self.sums("d_prefix_key", self.prefix_key, grads.prefix_key)
        self.d_prefix_value = self.sums("d_prefix_value", self.prefix_value, grads.prefix_value)

    def sums(self, name: str, like: Tensor, wanted: Tensor | None) -> Tensor | None:
        return None if wanted is None else self.scratch.take(name, *like.shape).zero_()

    def run(self, out: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None) -> None:
        """Add this chunk's share to the gradients."""
        batch, heads, kv_heads, _ = self.chunk
        whole_grad = self.stacked("grad_out", grad_out[batch, heads])
        whole_delta = self.delta(whole_grad, out, grad_logsumexp)
        if self.x.dropout_p:
            whole_grad.div_(1 - self.x.dropout_p)
        for rows in self.blocks():
            query = self.of_rows("query_rows", self.query, rows)
            grad = self.of_rows("grad_rows", whole_grad, rows)
            top = self.column(self.logsumexp, rows)
            delta = whole_delta[:, :, rows.here].reshape(self.count, -1, 1)
            d_query = None
            if self.grads.query is not None:
                d_query = self.scratch.take("d_query", *query.shape).zero_()
            if self.grads.of_prefix:
                self.prefix_columns(rows, query, grad, top, delta, d_query)
            if rows.high > rows.low:
                self.token_columns(rows, query, grad, top, delta, d_query)
            if d_query is not None:
                d_query, place = self.by_head(d_query), self.place(self.grads.query, rows)
                if self.grads.adds_to_query:
                    place.add_(d_query, alpha=self.x.scale)
                else:
                    torch.mul(d_query, self.x.scale, out=place)
        for name, sums in (("key", self.d_key), ("value", self.d_value)):
            if sums is not None:
                whole = getattr(self.grads, name)[batch, kv_heads]
                whole.copy_(sums.view(whole.shape))
        for name, sums in (("prefix_key", self.d_prefix_key), ("prefix_value", self.d_prefix_value)):
            if sums is not None:
                whole = getattr(self.grads, name)[kv_heads]
                whole.add_(sums.view(self.batch, *whole.shape).sum(0))

    def delta(self, grad: Tensor, out: Tensor, grad_logsumexp: Tensor | None) -> Tensor:
        """``sum(dO * O) - dL``, ``[B, Hq, T]``, and from it the gradient of the sinks."""
        batch, heads, _, _ = self.chunk
        product = self.scratch.take("d_query", *grad.shape).copy_(out[batch, heads].reshape(grad.shape))
        delta = product.mul_(grad).sum(-1).view(self.batch, self.heads, self.queries)
        if grad_logsumexp is not None:
            delta.sub_(grad_logsumexp[batch, heads])
        if self.grads.sinks is not None:
            sink = self.x.sinks.to(delta.dtype).view(1, -1, 1) - self.logsumexp[batch, heads]
            self.grads.sinks[heads].sub_(sink.exp_().mul_(delta).sum((0, 2)))
        return delta

    def prefix_columns(self, rows: Rows, query, grad, top, delta, d_query) -> None:
        """Gradients through the prefix columns of a block."""
        p, s, tanh = self.prefix_logits(query, rows)
        p.sub_(top).exp_()
        r = self.product("d_prefix", grad, self.prefix_value.mT)
        dz = self.scratch.take("dz_prefix", *r.shape)
        self.drop(rows, 0, r)
        self.weigh(r, rows, dz).sub_(delta).mul_(p)
        slope_(dz, tanh)
        if self.grads.weights is not None:
            part = self.by_head(s.mul_(dz).addcmul_(p, r))
            whole = self.grads.weights
            whole = whole[self.chunk.batch] if whole.shape[0] > 1 else whole
            whole = whole[:, rows.here] if whole.shape[1] > 1 else whole
            whole.add_(part.sum(1).sum_to_size(whole.shape))
        if self.d_prefix_value is not None:
            self.drop(rows, 0, p)
            self.d_prefix_value.baddbmm_(self.weigh(p, rows, p).mT, grad)
        self.weigh(dz, rows, dz)
        if d_query is not None:
            d_query.baddbmm_(dz, self.prefix_key)
        if self.d_prefix_key is not None:
            self.d_prefix_key.baddbmm_(dz.mT, query)

    def token_columns(self, rows: Rows, query, grad, top, delta, d_query) -> None:
        """Gradients through the token columns of a block."""
        p, tanh = self.token_logits(query, rows)
        p.sub_(top).exp_()
        dz = self.product("dz", grad, self.value[:, rows.there].mT)
        if self.row_keys is not None:
            kept = self.scratch.take("kept", *p.shape).copy_(p)
            self.drop(rows, self.length + rows.low, dz, kept)
        else:
            kept = p
        if self.d_value is not None:
            self.d_value[:, rows.there].baddbmm_(kept.mT, grad)
        dz.sub_(delta).mul_(p)
        if self.grads.bias is not None:
            whole = part_of(
                self.chunk.narrow(self.grads.bias, self.chunk.batch, self.chunk.heads), rows.here, rows.there
            )
            whole.add_(self.by_head(dz).sum_to_size(whole.shape))
        slope_(dz, tanh)
        if d_query is not None:
            d_query.baddbmm_(dz, self.key[:, rows.there])
        if self.d_key is not None:
            self.d_key[:, rows.there].baddbmm_(dz.mT, query)


def slope_(dz: Tensor, tanh: Tensor | None) -> Tensor:
    """Times the derivative of a soft-cap, in place."""
    return dz if tanh is None else dz.mul_(tanh.square_().neg_().add_(1))
