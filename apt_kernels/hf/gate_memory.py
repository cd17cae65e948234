"""The prompt's gate, kept on the key/value cache for the decoding steps (gate ``first``)."""

from __future__ import annotations

from functools import cache as memoise

from torch import Tensor

from ..errors import PatchError


class _KeepsGates:
    """Added to a cache's class: the gates follow what happens to the cache's rows and length."""

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(lambda gate: gate.index_select(0, beam_idx.to(gate.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._select(lambda gate: gate.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(lambda gate: gate[indices.to(gate.device)])

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        if not int(self.get_seq_length()):
            self.apt_gates = {}

    def reset(self):
        super().reset()
        self.apt_gates = {}

    def _select(self, change):
        self.apt_gates = {name: change(gate) for name, gate in self.apt_gates.items()}

    def __reduce_ex__(self, protocol):
        # The class is made on the fly: pickle its base and make it again.
        return _restore, (type(self).__mro__[2], self.__dict__)


@memoise
def _keeping(base: type) -> type:
    return type(base.__name__, (_KeepsGates, base), {})


def _restore(base: type, state: dict):
    kept = _keeping(base)
    cache = kept.__new__(kept)
    cache.__dict__.update(state)
    return cache


def keep(cache, name: str, gate: Tensor) -> None:
    """Remember ``gate [B, M]`` of the attention module ``name`` on ``cache``."""
    if not isinstance(cache, _KeepsGates):
        cache.__class__ = _keeping(type(cache))
        cache.apt_gates = {}
    cache.apt_gates[name] = gate


def recall(cache, name: str) -> Tensor:
    """The gate that the prompt left on ``cache``."""
    gates = getattr(cache, "apt_gates", {})
    if name not in gates:
        raise PatchError(
            f"{name}: the cache already holds tokens but no gate of theirs (gate='first'); it was filled without this "
            "patched model. Run the prompt through the model again, or use gate='token' or 'static'"
        )
    return gates[name]
