"""The CPU implementation: which of three ways computes a call, by what the stock kernel can do and by shape.

Source of its sizes: measured on two cores, bench/NOTES.md.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from . import blocks, blocks_backward, prefix, stock
from .scratch import Scratch

# Query rows a key head from which one call on a copy of the keys beats two calls.
CONCAT_ROWS = 16
# Most keys that one call on a copy takes under a causal mask: it computes the whole square, two calls skip half of it.
CAUSAL_KEYS = 512


def available() -> str | None:
    """Why this implementation cannot run on this machine; None: it can."""
    return None


def unsupported(x: Inputs) -> str | None:
    """Why it cannot serve these inputs; None: it can."""
    kind = x.query.device.type
    return None if kind == "cpu" else f"query is on {kind}"


def strategy(x: Inputs) -> str:
    """``"merge"``: the stock kernel on the tokens, and the prefix folded in through the log-sum-exp; ``"concat"``:
    the stock kernel on the prefix put behind the keys; ``"blockwise"``: our own blocks."""
    if stock.obstacle(x):
        return "blockwise"
    if x.gate_per_query or x.query.shape[2] == 1 or (x.causal and not _short_square(x)):
        return "merge"
    rows = x.query.shape[2] * x.query.shape[1] // x.key.shape[1]
    return "concat" if rows >= CONCAT_ROWS else "merge"


def _short_square(x: Inputs) -> bool:
    """Whether a causal mask is that and nothing more, over few keys; query 0 stands at -1 or later."""
    plain = all(part is None for part in (x.key_padding, x.dense, x.bias, x.query_offset))
    return plain and x.key.shape[2] <= CAUSAL_KEYS and x.offset >= -1


def forward(x: Inputs) -> tuple[Tensor, ...]:
    """The op's forward; with ``"concat"``, also what `empty_kept` describes."""
    way = strategy(x)
    if way == "blockwise":
        return blocks.forward(x)
    return blocks.forward(x, stock.forward(x)) if x.gate_per_query else prefix.forward(x, way)


def empty_kept(x: Inputs) -> tuple[Tensor, Tensor] | None:
    """Uninitialised ``[key ; prefix], [value ; prefix]``, ``[B, Hkv, S + M, dim]``, where the backward takes them."""
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
    if kept is not None and way != "concat" and stock.reverses(x):
        # Key and value are views of what was kept.
        x = replace(x, key=x.key.flip(2), value=x.value.flip(2))
    if way == "blockwise":
        return blocks_backward.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
    if not x.gate_per_query:
        return prefix.backward(x, way, out, logsumexp, grad_out, needs, kept)
    of_tokens = None
    if any(needs[:3]):
        tokens = {"query": x.query, "key": x.key, "value": x.value}
        of_tokens = {name: heads_last_empty(t, *t.shape).zero_() for name, t in tokens.items()}
        stock.backward_(x, Scratch(x.query, x.query.dtype), out, logsumexp, grad_out, of_tokens)
    return blocks_backward.backward(x, out, logsumexp, grad_out, None, needs, of_tokens)


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
    whole = heads_last_empty(like, batch, kv_heads, keys + length, dim)[:, :, :keys]
    return torch.empty_like(whole) if stock.reverses(x) else whole
