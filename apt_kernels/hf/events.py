"""The event "the prefixes of a model changed", and the integrations that subscribe to it.

`patching`, `adapters`, `pruning` and `checkpoint` announce the event; the integrations (hf/integrations) handle it.
None of these modules imports an integration: hf/integrations/__init__.py has the list.
"""

from __future__ import annotations

from typing import Literal

Action = Literal["patch", "unpatch", "add", "set", "delete", "prune", "load"]


class Integration:
    """The methods of an integration. Each has a default that does nothing."""

    # Attributes of a model that can be rebuilt, so that a call which fails may have deleted them.
    caches: frozenset[str] = frozenset()

    def inside(self, model):
        """The module inside a wrapper of this library; None: ``model`` is no such wrapper."""

    def parameters(self, model) -> set[int]:
        """The ids of the parameters that this library added to ``model``: it trains, freezes and saves them."""
        return set()

    def copies(self, model) -> set[str]:
        """The names of those among them that it trains in the place of the model's own, of which they are copies."""
        return set()

    def check(self, action: Action, model) -> None:
        """Raise `PatchError` if ``action`` cannot be done on ``model``, as the caller gave it. Change nothing."""

    def changed(self, action: Action, state) -> None:
        """The prefixes of ``state.model`` are now those of ``state`` (after "unpatch": it has none)."""


_subscribed: list[Integration] = []


def subscribe(*integrations: Integration) -> None:
    """Call these integrations, in this order, after those that subscribed before."""
    _subscribed.extend(integrations)


def inside(model):
    """The module inside the outermost wrapper of ``model``; None: it is not a wrapper of any integration."""
    return next((found for each in _subscribed if (found := each.inside(model)) is not None), None)


def added_parameters(model) -> set[int]:
    """The ids of the parameters that other libraries added to ``model``."""
    return set().union(*(each.parameters(model) for each in _subscribed))


def copied_parameters(model) -> set[str]:
    """The names of the parameters that other libraries copied, to train the copies."""
    return set().union(*(each.copies(model) for each in _subscribed))


def caches() -> set[str]:
    """The attributes of a model that a call which fails may have deleted."""
    return set().union(*(each.caches for each in _subscribed))


def check(action: Action, model) -> None:
    """Ask every integration whether ``action`` can be done on ``model``; the first that refuses raises."""
    for each in _subscribed:
        each.check(action, model)


def changed(action: Action, state) -> None:
    """Announce to every integration that the prefixes of ``state.model`` changed."""
    for each in _subscribed:
        each.changed(action, state)
