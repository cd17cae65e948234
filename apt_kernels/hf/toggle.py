"""`disabled`: a patched model without its prefix for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from .attention import inline
from .attention.implementations import implementations, restore_implementations
from .site import Inline
from .state import Model, state_of


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within this context the model attends without its prefix: bit for bit as before the patch.

    Trained heads keep their values. With gradient checkpointing, a forward in here that records gradients raises: its
    backward would recompute the layers after the context, with the prefix.

    Yields the model. Raises `PatchError` if it is not patched.
    """
    state = state_of(model)
    if not state.enabled:
        yield model
        return
    base, found = state.model, state.prefixes
    alone = [site for site in state.sites if site.inline and site.name in found]
    now = implementations(base)
    try:
        state.enabled = False
        for prefix in found.values():
            prefix.enabled = False
        for site in alone:
            inline.restore(base.get_submodule(site.name))
        restore_implementations(base, state.implementations)
        yield model
    finally:
        restore_implementations(base, now)
        for site in alone:
            inline.defer(base.get_submodule(site.name), cast(Inline, site.inline))
        for prefix in found.values():
            prefix.enabled = True
        state.enabled = True
