"""The CPU implementation: which of three ways computes a call, by what the stock kernel can do and by shape."""

from __future__ import annotations

from torch import Tensor

from . import cpu_blocks, cpu_blocks_backward, cpu_prefix, cpu_stock
from .cpu_scratch import Scratch
from .inputs import DIFFERENTIABLE, Inputs, heads_last_empty


def available() -> str | None:
    """Why this implementation cannot run on this machine; None: it can."""
    return None


def unsupported(x: Inputs) -> str | None:
    """Why it cannot serve these inputs; None: it can."""
    kind = x.query.device.type
    return None if kind == "cpu" else f"query is on {kind}"


def strategy(x: Inputs) -> str:
    """``"merge"``: the stock kernel on the tokens, and the prefix folded in through the log-sum-exp; ``"concat"``:
    the stock kernel on the prefix put before the keys; ``"blockwise"``: our own blocks."""
    if cpu_stock.obstacle(x):
        return "blockwise"
    _, heads, kv_heads, queries, *_ = x.sizes
    if x.causal or x.gate_per_query or queries == 1 or queries * heads < cpu_stock.COPY_ROWS * kv_heads:
        return "merge"
    return "concat"


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    way = strategy(x)
    if way == "blockwise":
        return cpu_blocks.forward(x)
    return cpu_blocks.forward(x, cpu_stock.forward(x)) if x.gate_per_query else cpu_prefix.forward(x, way)


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed."""
    way, need = strategy(x), dict(zip(DIFFERENTIABLE, needs))
    # The stock backward has no place for a gradient of the log-sum-exp, nor one for a bias.
    if way == "blockwise" or grad_logsumexp is not None or need["bias"]:
        return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
    if not x.gate_per_query:
        return cpu_prefix.backward(x, way, out, logsumexp, grad_out, needs)
    of_tokens = None
    if any(needs[:3]):
        tokens = {"query": x.query, "key": x.key, "value": x.value}
        of_tokens = {name: heads_last_empty(t, *t.shape, x.compute_dtype).zero_() for name, t in tokens.items()}
        cpu_stock.backward_(x, Scratch(x.query, x.query.dtype), out, logsumexp, grad_out, of_tokens)
    return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, of_tokens)
