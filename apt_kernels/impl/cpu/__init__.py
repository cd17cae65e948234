"""The CPU implementation: which of three ways computes a call, by what the stock kernel can do and by shape.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backend import Backend, Plan, Result
from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from . import blocks, blocks_backward, prefix, stock
from .scratch import Scratch

# Query rows a key head from which one call on a copy of the keys beats two calls.
CONCAT_ROWS = 16
# Most keys that one call on a copy takes under a causal mask: it computes the whole square, two calls skip half of it.
CAUSAL_KEYS = 512


class Cpu(Backend):
    """``"merge"``: the stock kernel on the tokens, and the prefix folded in through the log-sum-exp; ``"concat"``: the
    stock kernel on the prefix put behind the keys; ``"blockwise"``: our own blocks."""

    name = "cpu"
    own_layouts = frozenset({"key", "value"})

    def obstacle_for(self, x: Inputs) -> str | None:
        kind = x.query.device.type
        return None if kind == "cpu" else f"query is on {kind}"

    def strategy(self, x: Inputs) -> str:
        if stock.obstacle(x):
            return "blockwise"
        if x.gate_per_query or x.query.shape[2] == 1 or (x.causal and not _short_square(x)):
            return "merge"
        rows = x.query.shape[2] * x.query.shape[1] // x.key.shape[1]
        return "concat" if rows >= CONCAT_ROWS else "merge"

    def forward(self, x: Inputs, plan: Plan) -> Result:
        if plan.strategy == "blockwise":
            return Result(*blocks.forward(x))
        per_query = x.gate_per_query
        result = Result(*blocks.forward(x, stock.forward(x))) if per_query else prefix.forward(x, plan.strategy)
        if _is_masked(x) and bool(result.logsumexp.isnan().any()):
            # A hidden logit was infinite or NaN: the stock kernel adds the mask, the blocks overwrite.
            return Result(*blocks.forward(x), result.kept)
        return result

    def backward(
        self,
        x: Inputs,
        plan: Plan,
        result: Result,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor | None]:
        way, (out, logsumexp, kept) = _backward_strategy(plan, grad_logsumexp is not None, needs), result
        if way != "blockwise" and _is_masked(x) and not _is_bounded(x):
            return self._unbounded_backward(x, plan, result, grad_out, needs)
        if kept is not None and way != "concat" and stock.reverses(x):
            # Key and value are views of what was kept.
            x = replace(x, key=x.key.flip(2), value=x.value.flip(2))
        if way == "blockwise":
            return blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
        if not x.gate_per_query:
            return prefix.backward(x, way, result, grad_out, needs)
        of_tokens = None
        if any(needs[:3]):
            tokens = {"query": x.query, "key": x.key, "value": x.value}
            of_tokens = {name: heads_last_empty(t, *t.shape).zero_() for name, t in tokens.items()}
            stock.backward_(x, Scratch(x.query, x.query.dtype), out, logsumexp, grad_out, of_tokens)
        return blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, of_tokens)

    def _unbounded_backward(
        self, x: Inputs, plan: Plan, result: Result, grad_out: Tensor, needs: list[bool]
    ) -> list[Tensor | None]:
        """In blocks, which overwrite hidden logits, and in the layout of the plan's strategy."""
        grads = self.backward(x, plan._replace(strategy="blockwise"), result, grad_out, None, needs)
        for i, name in enumerate(DIFFERENTIABLE):
            if name in self.own_layouts and grads[i] is not None:
                grads[i] = self.empty_gradient(x, plan, name, False, needs).copy_(grads[i])
        return grads

    def empty_kept(self, x: Inputs, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """``[key ; prefix]`` and ``[value ; prefix]``, which ``"concat"`` makes."""
        if plan.strategy != "concat":
            return None
        batch, _, kv_heads, _, keys, length, head_dim, value_dim = x.sizes
        shape = batch, kv_heads, length + keys
        return x.query.new_empty(*shape, head_dim), x.query.new_empty(*shape, value_dim)

    def empty_gradient(self, x: Inputs, plan: Plan, name: str, of_logsumexp: bool, needs: list[bool]) -> Tensor:
        concat = _backward_strategy(plan, of_logsumexp, needs) == "concat"
        if name not in self.own_layouts or not concat:
            return super().empty_gradient(x, plan, name, of_logsumexp, needs)
        like, length = getattr(x, name), x.prefix_key.shape[1]
        batch, kv_heads, keys, dim = like.shape
        # What the stock kernel returns for the concatenation, less the prefix: uncopied.
        whole = heads_last_empty(like, batch, kv_heads, keys + length, dim)[:, :, :keys]
        return torch.empty_like(whole) if stock.reverses(x) else whole


def _short_square(x: Inputs) -> bool:
    """Whether a causal mask is that and nothing more, over few keys; query 0 stands at -1 or later."""
    plain = all(part is None for part in (x.key_padding, x.dense, x.bias, x.query_offset))
    return plain and x.key.shape[2] <= CAUSAL_KEYS and x.offset >= -1


def _is_masked(x: Inputs) -> bool:
    """Whether the stock kernel may be given a mask to add."""
    return x.causal or x.key_padding is not None or x.dense is not None or x.bias is not None


def _is_bounded(x: Inputs) -> bool:
    """Whether no product of a query and a key can overflow. (NaN is not below the bound.)"""
    bound = x.scale * x.query.shape[3]
    for part in (x.query, x.key):
        low, high = part.detach().aminmax()
        bound = bound * max(-float(low), float(high))
    return bound < 1e38


def _backward_strategy(plan: Plan, of_logsumexp: bool, needs: list[bool]) -> str:
    """The stock backward has no place for a gradient of the log-sum-exp, nor one for a bias."""
    return "blockwise" if of_logsumexp or needs[DIFFERENTIABLE.index("bias")] else plan.strategy


BACKEND = Cpu()
