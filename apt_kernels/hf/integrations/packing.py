"""Packed documents: the hooks that read them follow the gates of the active adapter."""

from __future__ import annotations

from .. import events
from ..attention import packing


class Packing(events.Integration):
    """The hooks of `attention.packing` on the model while it is patched."""

    def changed(self, action: events.Action, state) -> None:
        if action == "unpatch":
            packing.remove(state.model)
        else:
            packing.install(state.model, state.token, state.sites, state.prefixes.values())
