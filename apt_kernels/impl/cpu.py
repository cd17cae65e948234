"""The CPU implementation: which of three ways computes a call, by what the stock kernel can do and by shape.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

from torch import Tensor

from . import cpu_blocks, cpu_blocks_backward, cpu_prefix, cpu_stock
from .cpu_scratch import Scratch
from .inputs import DIFFERENTIABLE, Inputs, heads_last_empty

# Query rows a key head from which one call on a copy of the keys beats two calls: below, decoding.
CONCAT_ROWS = 16


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
    if x.gate_per_query or (x.causal and x.query.shape[2] > 1):
        return "merge"
    rows = x.query.shape[2] * x.query.shape[1] // x.key.shape[1]
    return "concat" if rows >= CONCAT_ROWS else "merge"


def forward(x: Inputs) -> tuple[Tensor, ...]:
    """The op's forward; with ``"concat"``, also what `empty_kept` describes."""
    way = strategy(x)
    if way == "blockwise":
        return cpu_blocks.forward(x)
    return cpu_blocks.forward(x, cpu_stock.forward(x)) if x.gate_per_query else cpu_prefix.forward(x, way)


def empty_kept(x: Inputs) -> tuple[Tensor, Tensor] | None:
    """Uninitialised ``[prefix ; key], [prefix ; value]``, ``[B, Hkv, M + S, dim]``, where the backward takes them."""
    if strategy(x) != "concat":
        return None
    batch, _, kv_heads, _, keys, length, head_dim, value_dim = x.sizes
    return tuple(x.query.new_empty(batch, kv_heads, length + keys, dim) for dim in (head_dim, value_dim))


def backward(
    x: Inputs,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    kept: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor | None]:
    """Gradients of the inputs named in `DIFFERENTIABLE`, None where not needed."""
    way = _backward_way(x, grad_logsumexp is not None, needs)
    if way == "blockwise":
        return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
    if not x.gate_per_query:
        return cpu_prefix.backward(x, way, out, logsumexp, grad_out, needs, kept)
    of_tokens = None
    if any(needs[:3]):
        tokens = {"query": x.query, "key": x.key, "value": x.value}
        of_tokens = {name: heads_last_empty(t, *t.shape).zero_() for name, t in tokens.items()}
        cpu_stock.backward_(x, Scratch(x.query, x.query.dtype), out, logsumexp, grad_out, of_tokens)
    return cpu_blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, of_tokens)


def _backward_way(x: Inputs, of_logsumexp: bool, needs: list[bool]) -> str:
    """`strategy` of the backward: the stock one has no place for a gradient of the log-sum-exp, nor one for a bias."""
    return "blockwise" if of_logsumexp or needs[DIFFERENTIABLE.index("bias")] else strategy(x)


def empty_gradient(x: Inputs, name: str, of_logsumexp: bool, needs: list[bool]) -> Tensor:
    """An uninitialised gradient of ``key`` or ``value`` in the layout that `backward` returns it in."""
    like, length = getattr(x, name), x.prefix_key.shape[1]
    batch, kv_heads, keys, dim = like.shape
    if _backward_way(x, of_logsumexp, needs) != "concat":
        return heads_last_empty(like, batch, kv_heads, keys, dim)
    # What the stock kernel returns for the concatenation, less the prefix: uncopied.
    return heads_last_empty(like, batch, kv_heads, length + keys, dim)[:, :, length:]
