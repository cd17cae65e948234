"""The prompt's gate, stored on the key/value cache for the decoding steps (gate ``first``)."""

from __future__ import annotations

from functools import cache as memoise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import PatchError
from ...prefix import gates


class Kept(NamedTuple):
    """The gate of one module, and the rows that had a real token so far; the others have no gate yet."""

    gate: Tensor  # [B, M]
    begun: Tensor  # [B] bool
    waits: bool  # whether a row may have had no real token yet

    def map(self, change) -> Kept:
        return Kept(change(self.gate), change(self.begun), self.waits)


class _KeepsGates:
    """Added to a cache's class: the gates change with the cache's rows and length."""

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._select(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(lambda rows: rows[indices.to(rows.device)])

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        if not int(self.get_seq_length()):
            self.apt_gates = {}

    def reset(self):
        super().reset()
        self.apt_gates = {}

    def _select(self, change):
        self.apt_gates = {name: kept.map(change) for name, kept in self.apt_gates.items()}

    def __reduce_ex__(self, protocol):
        # The class is created dynamically: pickle its base and create it again.
        return _restore, (type(self).__mro__[2], self.__dict__)


@memoise
def keeping(base):
    """The class of caches that keep gates, of a cache's class."""
    return type(base.__name__, (_KeepsGates, base), {"__module__": __name__})


def _restore(base: type, state: dict):
    kept = keeping(base)
    cache = kept.__new__(kept)
    cache.__dict__.update(state)
    return cache


def keep(cache, owner: tuple[str, str], gate: Tensor, begun: Tensor | None, add: bool) -> Tensor:
    """Store ``gate [B, M]`` of ``owner`` (attention module, adapter) on ``cache``; returns the gate to use.

    ``begun [B]``: which rows had a real token (a chunk of a left-padded prompt may be all padding); None: every row.
    With ``add``, rows that had one in an earlier chunk keep their gate.
    """
    if not isinstance(cache, _KeepsGates):
        kind: Any = type(cache)
        cache.__class__ = keeping(kind)
        cache.apt_gates = {}
    if add:
        earlier = cache.apt_gates[owner]
        gate = torch.where(earlier.begun[:, None], earlier.gate, gate)
        begun = None if begun is None else earlier.begun | begun
    # Checked only if that needs no synchronisation with a device.
    waits = begun is not None and not (_is_here(begun) and bool(begun.all()))
    begun = gate.new_ones(gate.shape[0], dtype=torch.bool) if begun is None else begun
    cache.apt_gates[owner] = Kept(gate, begun, waits)
    return gate


def _is_here(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"


def waits(cache, owner: tuple[str, str]) -> bool:
    """Whether some row of ``cache`` may have had no real token yet."""
    return _kept(cache, owner).waits


def has(cache, owner: tuple[str, str]) -> bool:
    """Whether ``cache`` holds a gate of ``owner``."""
    return owner in getattr(cache, "apt_gates", {})


def recall(cache, owner: tuple[str, str]) -> Tensor:
    """The prompt's gate on ``cache``."""
    return _kept(cache, owner).gate


def _kept(cache, owner: tuple[str, str]) -> Kept:
    kept = getattr(cache, "apt_gates", {})
    if owner not in kept:
        raise PatchError(
            f"{owner[0]}: the cache already holds tokens but not the prompt's gate; it was filled without this "
            "patched model, or with another adapter. Run the prompt through the model again, or use "
            f"gate={gates.choice(lambda gate: not gate.kept_in_cache)}"
        )
    return kept[owner]
