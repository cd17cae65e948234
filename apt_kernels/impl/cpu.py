"""The CPU implementation: which of three ways computes a call, by what the stock kernel can do and by shape."""

from __future__ import annotations

from torch import Tensor

from . import cpu_blocks, cpu_blocks_backward, cpu_concat, cpu_stock
from .inputs import DIFFERENTIABLE, Inputs


def available() -> str | None:
    """Why this implementation cannot run on this machine; None: it can."""
    return None


def unsupported(x: Inputs) -> str | None:
    """Why it cannot serve these inputs; None: it can."""
    kind = x.query.device.type
    return None if kind == "cpu" else f"query is on {kind}"


def strategy(x: Inputs) -> str:
    """``"merge"``: stock kernel on the tokens, prefix and sinks folded in through the log-sum-exp; ``"concat"``:
    stock kernel on the prefix put before the keys; ``"blockwise"``: our own blocks."""
    if cpu_stock.obstacle(x):
        return "blockwise"
    gate_per_query = x.query.shape[2] > 1 and _gate_rows(x) > 1
    return "merge" if x.causal or gate_per_query else "concat"


def _gate_rows(x: Inputs) -> int:
    if x.gate is None:
        return 1
    return x.gate.shape[1] if x.gate_index is None else x.gate_index.shape[1]


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    way = strategy(x)
    if way == "concat":
        return cpu_concat.forward(x)
    return cpu_blocks.forward(x, cpu_stock.forward(x) if way == "merge" else None)


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed."""
    need = dict(zip(DIFFERENTIABLE, needs))
    way = strategy(x)
    of_tokens = need["query"] or need["key"] or need["value"]
    # The stock backward has no place for a gradient of the log-sum-exp, nor one for a bias.
    if way == "blockwise" or grad_logsumexp is not None or need["bias"] or not of_tokens:
        return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
    if way == "concat":
        return cpu_concat.backward(x, out, logsumexp, grad_out, needs)
    found = cpu_stock.backward(x, out, logsumexp, grad_out)
    return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, found)
