"""Modules that compute attention inline: their forward runs under `Deferring`, each attention is one call of the op."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import PatchError
from ...mask import Mask
from ...ops.attention import attention
from .. import calls
from . import function, rows
from .lazy_scores import HIDDEN, Deferred, Deferring, Probabilities, Scores


class Laid(NamedTuple):
    """One attention in the op's layout: ``[B, Hq, T, D]``, ``[B, Hkv, S, D]``, ``[B, Hkv, S, Dv]`` and its mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    biases: list[Tensor]
    hidden: list[Tensor]
    causal: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (*self.query.shape[:3], self.key.shape[2])

    def counts_from_end(self) -> bool:
        """Whether a bias is a function of the distance to the last key, as in MPT: zero there, not elsewhere.

        It differs from the distance to the query by a constant per query, to which a softmax over tokens alone is
        invariant. Beside a prefix, a token's output would depend on the number of tokens after it.
        """
        return any(
            part.shape[2] == 1 < part.shape[3] and not part[..., -1].any() and bool((part[..., :-1] != 0).all())
            for part in self.biases
        )

    def mask(self, from_end: bool = False) -> Mask | None:
        """The op's mask; ``from_end``: biases without a query dimension become relative to the query's own position."""
        bias = dense = None
        for part in self.biases:
            if from_end and part.shape[2] == 1:
                part = part - part[..., -self.query.shape[2] :].mT
            bias = part if bias is None else bias + part
        for part in self.hidden:
            seen = ~part.to(torch.bool)
            dense = seen if dense is None else dense & seen
        if bias is None and dense is None and not self.causal:
            return None
        return Mask(causal=self.causal, query_offset=0 if self.causal else None, bias=bias, dense=dense)

    def seen(self) -> Tensor:
        """``[B, Hq, T, S]`` bool: the keys that each query sees; a bias of minus infinity hides one."""
        seen = torch.ones(self.shape, dtype=torch.bool, device=self.query.device)
        for part in self.biases:
            seen = seen & (part.detach() > HIDDEN)
        for part in self.hidden:
            seen = seen & ~part.to(torch.bool)
        return seen.tril() if self.causal else seen


def lay_out(probabilities: Probabilities, value: Tensor, batch: int) -> Laid:
    """The attention with batch and head dimensions, from any leading sizes that the model uses."""
    scores = probabilities.scores
    count = math.prod(scores.lead)
    if count % batch:
        raise PatchError(f"its scores have leading sizes {list(scores.lead)}; they do not hold {batch} rows")

    def rows(tensor: Tensor) -> Tensor:
        lead = tensor.shape[:-2]
        if math.prod(lead) % batch or (lead[0] == 1 != batch and len(lead) > 1):
            tensor = tensor.expand(
                *(probabilities.lead if len(lead) == len(probabilities.lead) else scores.lead), -1, -1
            )
        return tensor.reshape(batch, -1, *tensor.shape[-2:])

    query, value = rows(scores.query.expand(*scores.raw_lead, -1, -1)), rows(value)
    keys = scores.keys
    key = query.new_zeros(batch, value.shape[1], keys, query.shape[-1]) if scores.key is None else rows(scores.key)
    key, value = key.to(query.dtype), value.to(query.dtype)
    if key.shape[1] != value.shape[1]:
        most = max(key.shape[1], value.shape[1])
        key, value = (kv.repeat_interleave(most // kv.shape[1], dim=1) for kv in (key, value))

    def four(part: tuple[Tensor, tuple[int, ...]]) -> Tensor:
        tensor, lead = part
        return _four(tensor, lead, batch, count // batch)

    biases, hidden = [four(p) for p in scores.biases], [four(p) for p in scores.hidden]
    if scores.sinks is None:
        return Laid(query, key, value, biases, hidden, scores.causal)
    # A key and a value of zeros whose bias is the sink, since the sink may differ between queries.
    key, value = (torch.nn.functional.pad(kv, (0, 0, 0, 1)) for kv in (key, value))
    biases = [torch.nn.functional.pad(b.expand(*b.shape[:3], keys), (0, 1)) for b in biases]
    hidden = [torch.nn.functional.pad(h.expand(*h.shape[:3], keys), (0, 1)) for h in hidden]
    column = torch.nn.functional.pad(four(scores.sinks), (keys, 0))
    return Laid(query, key, value, [*biases, column], hidden, scores.causal)


def zeroed(probabilities: Probabilities, batch: int) -> list[Tensor]:
    """The masks where the model set probabilities to zero, ``[B, H, T, S]``."""
    heads = math.prod(probabilities.lead) // batch
    return [_four(mask, lead, batch, heads) for mask, lead in probabilities.zeroed]


def _four(tensor: Tensor, lead: tuple[int, ...], batch: int, heads: int) -> Tensor:
    """A bias or mask that was broadcast to ``[*lead, T, S]``, broadcastable to ``[B, H, T, S]``."""
    if lead == (batch, heads) or math.prod(tensor.shape[:-2]) == 1:
        return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim <= 4 else tensor[0]
    tensor = tensor.reshape((1,) * (len(lead) + 2 - tensor.ndim) + tuple(tensor.shape))
    return tensor.expand(*lead, -1, -1).reshape(batch, heads, *tensor.shape[-2:])


def rows_of(scores: Scores, hidden_states: Tensor | None, time_major: bool) -> int:
    """The batch B among the leading sizes of ``scores``."""
    lead = scores.raw_lead
    if len(lead) == 1:  # [B * Hq, T, S]: the hidden states, [B, T, d] or time-major, know B
        return lead[0] if hidden_states is None else hidden_states.shape[1 if time_major else 0]
    if len(lead) > 2 and scores.key is not None and scores.key.shape[-3] == 1 != lead[-1]:
        return math.prod(lead[:-2])  # [B, Hkv, group, T, S]
    return math.prod(lead[:-1])


def _serve(module):
    def attend(probabilities: Probabilities, value: Tensor) -> Tensor:
        (prefix, mixture), found, call = rows.serving(module), module.apt_inline, calls.call_of(module)
        hidden_states, scores = call.hidden_states, probabilities.scores
        batch = rows_of(scores, hidden_states, found.time_major)
        laid = lay_out(probabilities, value, batch)
        call.served = True
        prefixes = mixture.prefixes if mixture else [prefix]
        seen = laid.seen() if not prefix.cross and any(each.gate_entry.per_sequence for each in prefixes) else None
        parts = function.parts_inline(prefix, call, seen, laid.query, found.time_major)
        if found.key_factor != 1:
            parts["prefix_key"] = parts["prefix_key"] * found.key_factor
        out = attention(
            laid.query,
            laid.key,
            laid.value,
            **parts,
            mask=laid.mask(found.from_end),
            scale=scores.scale,
            softcap=scores.softcap,
            dropout_p=probabilities.dropout_p,
            implementation=prefix.implementation if mixture is None else mixture.implementation,
        )
        out = out.reshape(*probabilities.lead, *out.shape[-2:])
        return out.clone() if found.changed else out

    return attend


class PrefixedInline(function.Prefixed):
    """`function.Prefixed` for a module with inline attention: its forward runs under `Deferring`."""

    # `Scores` are not tensors and cannot be traced: graphs end before such a module and begin after it.
    outside_of_graphs = "attention written inline runs outside of graphs"

    def apt_around(self, forward, args, kwargs):
        with Deferring(_serve(self)):
            output = forward(*args, **kwargs)
        return without_deferred(output)


def without_deferred(out):
    """A module's outputs: deferred products among them are computed, attention weights are None."""
    if isinstance(out, Deferred):
        return None if isinstance(out, Probabilities) else out.compute()
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*(without_deferred(part) for part in out))
    if isinstance(out, (list, tuple)):
        return type(out)(without_deferred(part) for part in out)
    return out


class Watch:
    """The recording pass: tracks tensors on their way to a product, and products that had to be computed.

    If a key was multiplied with a number before the product, so is the prefix's. A softmax over a product that had to
    be computed is attention that is not supported.
    """

    _MOVES = frozenset("transpose permute view reshape contiguous expand clone to type_as float unsqueeze".split())
    _MERGES = frozenset(
        "cat getitem add sub mul div truediv where masked_fill squeeze stack pad iadd isub imul".split()
    )

    def __init__(self, here):
        self.here, self.factors = here, {}
        self.products: dict[int, Tensor] = {}
        self.lost: list[tuple] = []  # the modules that were running at an unsupported softmax

    def note(self, name: str, args, out) -> None:
        """A function was called with ``args`` and returned ``out``."""
        name, parts = name.strip("_"), args[0] if args and isinstance(args[0], (list, tuple)) else args
        if name == "setitem" and id(args[2]) in self.products:
            self.computed(args[0])
        if not isinstance(out, Tensor) or not any(isinstance(part, Tensor) for part in parts):
            return
        if any(id(part) in self.products for part in parts if isinstance(part, Tensor)):
            if name in self._MOVES | self._MERGES:
                self.computed(out)
            elif name == "softmax":
                self.lost.append(self.here())
        before = self.factor(parts[0])
        if name in ("mul", "div", "truediv", "itruediv", "imul") and len(parts) > 1 and _is_number(parts[1]):
            before = before * float(parts[1]) if "mul" in name else before / float(parts[1])
        elif name not in self._MOVES:
            return
        if before != 1:
            self.factors[id(out)] = (out, before)

    def computed(self, product: Tensor) -> None:
        """A product had to be computed, or derives from one that had to."""
        self.products[id(product)] = product

    def factor(self, tensor) -> float:
        """The factor with which ``tensor`` was multiplied."""
        return self.factors.get(id(tensor), (None, 1.0))[1]

    def at_product(self, key: Tensor):
        """How a `Scores` was computed."""
        return self.factor(key), self.here()


def _is_number(operand) -> bool:
    if isinstance(operand, Tensor):
        return operand.ndim == 0 and operand.device.type != "meta"
    return isinstance(operand, (int, float))
