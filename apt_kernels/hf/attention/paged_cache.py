"""The paged cache of continuous batching in the attention function."""

from __future__ import annotations

import inspect

from torch import Tensor

from .. import compat


def update(module, cache, key: Tensor, value: Tensor, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Write this step's ``[1, Hkv, T, D]`` to the paged cache; what the step's queries may see, ``[1, Hkv, S, D]``."""
    if compat.missing("continuous batching"):
        compat.require("continuous batching")
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    older = "read_index" in inspect.signature(cache.update).parameters
    given = indices if older else {"kwargs": kwargs}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **given)
    if key.ndim == 3:
        key, value = (part.transpose(0, 1)[None] for part in (key, value))
    return key, value
