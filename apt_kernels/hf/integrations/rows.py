"""Batches whose rows use different adapters: the model takes ``adapter_names`` while it is patched."""

from __future__ import annotations

from .. import events
from ..attention import rows


class RowAdapters(events.Integration):
    """The forwards of `attention.rows` on the model while it is patched."""

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            rows.install(state)
        elif action == "unpatch":
            rows.remove(state.model)
