"""The CPU implementation: one of three strategies, chosen by the limits of torch's own kernel and by shape.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, Plan, Result
from ..inputs import BY_QUERY, DIFFERENTIABLE, NOTHING, Inputs, heads_last_empty
from . import blocks, blocks_backward, decode, prefix, stock
from .scratch import Scratch

# Query rows per key head from which one call on concatenated keys is faster than two calls.
CONCAT_ROWS = 16
# Most keys to concatenate under a causal mask: one call then computes the whole square, two calls skip half of it. On
# one core, naive / ours of one call and of two: 4 x 256 tokens 0.93 and 0.80, 1 x 384 0.90 and 1.00, 2 x 512 0.95 and
# 1.10; padded, 8 x 128 0.97 and 0.74, 4 x 256 0.90 and 0.86, 2 x 512 0.95 and 1.24.
CAUSAL_KEYS = 320


class Cpu(Backend):
    """``"merge"``: the stock kernel on the tokens, merged with the prefix through the log-sum-exp; ``"concat"``: the
    stock kernel on ``[prefix ; keys]``; ``"blockwise"``: blocks.py."""

    name = "cpu"
    own_layouts = frozenset({"key", "value"})

    def obstacle_for(self, x: Inputs) -> str | None:
        if x.prefix_by_query:
            return BY_QUERY
        return None if x.query.is_cpu else f"query is on {x.query.device.type}"

    def strategy(self, x: Inputs) -> str:
        if stock.obstacle(x):
            return "blockwise"
        if x.gate_per_query or x.query.shape[2] == 1 or (x.causal and x.key.shape[2] > CAUSAL_KEYS):
            return "merge"
        if x.prefix_index is not None:
            return "merge"  # the columns that a row has not need a mask of the prefix alone
        rows = x.query.shape[2] * x.query.shape[1] // x.key.shape[1]
        return "concat" if rows >= CONCAT_ROWS else "merge"

    def forward(self, x: Inputs, plan: Plan) -> Result:
        result = self._forward(x, plan, True)
        if x.prefix_index is not None:
            nothing = result.logsumexp <= NOTHING
            result.logsumexp.masked_fill_(nothing, -torch.inf)
            result.out.masked_fill_(nothing[..., None], 0.0)
        return result

    def output(self, x: Inputs, plan: Plan) -> Tensor:
        return self._forward(x, plan, False).out if x.prefix_index is None else self.forward(x, plan).out

    def _forward(self, x: Inputs, plan: Plan, with_logsumexp: bool) -> Result:
        if plan.strategy == "blockwise":
            return Result(*blocks.forward(x))
        if x.query.shape[2] == 1:
            found = decode.forward(x, with_logsumexp)
            if found is not None or x.prefix_index is None:
                return Result(*blocks.forward(x)) if found is None else found
        per_query = x.gate_per_query
        result = Result(*blocks.forward(x, stock.forward(x))) if per_query else prefix.forward(x, plan.strategy)
        if _is_masked(x) and bool(result.logsumexp.isnan().any()):
            # A hidden logit was infinite or NaN: the stock kernel adds the mask, the blocks overwrite the logit.
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
        if x.prefix_index is not None:
            # Any number for a row that sees nothing, whose probabilities are then zero, not NaN.
            logsumexp = result.logsumexp.masked_fill(torch.isneginf(result.logsumexp), 0.0)
            result = result._replace(logsumexp=logsumexp)
        strategy, (out, logsumexp, _) = _backward_strategy(plan, grad_logsumexp is not None, needs), result
        if strategy == "blockwise":
            return blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
        try:
            return self._stock_backward(x, strategy, result, grad_out, needs)
        except stock.NotFinite:
            return self._overwriting_backward(x, plan, result, grad_out, needs)

    def _stock_backward(
        self, x: Inputs, strategy: str, result: Result, grad_out: Tensor, needs: list[bool]
    ) -> list[Tensor | None]:
        if not x.gate_per_query:
            return prefix.backward(x, strategy, result, grad_out, needs)
        out, logsumexp, _ = result
        of_tokens = None
        if any(needs[:3]):
            tokens = {"query": x.query, "key": x.key, "value": x.value}
            of_tokens = {name: heads_last_empty(t, *t.shape).zero_() for name, t in tokens.items()}
            stock.backward_(x, Scratch(x.query, x.query.dtype), out, logsumexp, grad_out, of_tokens)
        return blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, of_tokens)

    def _overwriting_backward(
        self, x: Inputs, plan: Plan, result: Result, grad_out: Tensor, needs: list[bool]
    ) -> list[Tensor | None]:
        """The blockwise backward, which overwrites hidden logits, with results in the layout of the plan's strategy."""
        grads = self.backward(x, plan._replace(strategy="blockwise"), result, grad_out, None, needs)
        for i, name in enumerate(DIFFERENTIABLE):
            if name in self.own_layouts and grads[i] is not None:
                grads[i] = self.empty_gradient(x, plan, name, False, needs).copy_(grads[i])
        return grads

    def empty_kept(self, x: Inputs, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """``[prefix ; key]`` and ``[prefix ; value]`` of ``"concat"``."""
        if plan.strategy != "concat":
            return None
        batch, _, kv_heads, _, keys, length, head_dim, value_dim = x.sizes
        shape = batch, kv_heads, length + keys
        return x.query.new_empty(*shape, head_dim), x.query.new_empty(*shape, value_dim)

    def empty_gradient(self, x: Inputs, plan: Plan, name: str, of_logsumexp: bool, needs: list[bool]) -> Tensor:
        concat = _backward_strategy(plan, of_logsumexp, needs) == "concat"
        if name not in self.own_layouts or not concat:
            return super().empty_gradient(x, plan, name, of_logsumexp, needs)
        like, length = getattr(x, name), x.prefix_key.shape[-2]
        batch, kv_heads, keys, dim = like.shape
        # A view without the prefix of what the stock kernel returns for the concatenation: not copied.
        return heads_last_empty(like, batch, kv_heads, length + keys, dim)[:, :, length:]


def _is_masked(x: Inputs) -> bool:
    """Whether the stock kernel may be given a mask to add."""
    return x.causal or x.key_padding is not None or x.dense is not None or x.bias is not None


def _backward_strategy(plan: Plan, of_logsumexp: bool, needs: list[bool]) -> str:
    """``"blockwise"`` where the stock backward cannot be used: with a gradient of the log-sum-exp or of the bias."""
    return "blockwise" if of_logsumexp or needs[DIFFERENTIABLE.index("bias")] else plan.strategy


BACKEND = Cpu()
