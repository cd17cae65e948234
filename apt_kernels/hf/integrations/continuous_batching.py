"""Continuous batching (``generate_batch``): its paged cache, and which gates are supported."""

from __future__ import annotations

import copy

from ...errors import PatchError
from ...prefix import gates
from ...prefix.adaptive import AdaptivePrefix
from .. import calls, compat, events

# The implementation for which transformers passes masks as tensors, and which it never replaces by a flash kernel.
_SERVED_AS = "paged|eager"
_MANAGER = "_cached_continuous_batching_manager"


class ContinuousBatching(events.Integration):
    """Replaces ``model.init_continuous_batching`` while the model is patched."""

    caches = frozenset((_MANAGER,))

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            _install(state.model)
        elif action == "unpatch":
            _remove(state.model)
        else:
            forget_manager(state.model)  # its cached keys and values were computed with other prefixes


class InitContinuousBatching:
    """Replaces ``model.init_continuous_batching`` while the model is patched: the method."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        model, state = self.model, self.model._apt_state
        rows = calls.local.rows
        now = (state.adapter, state.disabled, None if rows is None else rows.names)
        manager = getattr(model, _MANAGER, None)
        if manager is not None and getattr(manager, "apt_served", None) != now:
            forget_manager(model)  # its cached blocks were computed under another state
        if not state.disabled:
            _refuse(model, rows)
        manager = type(model).init_continuous_batching(_Served(model, state), *args, **kwargs)
        manager.apt_served = now
        return manager


def _refuse_batching(*args, **kwargs):
    """Replaces the same method if transformers lacks a name that the integration needs."""
    compat.require("continuous batching")


class _Served:
    """A view of the model for continuous batching, with the name of an attention implementation that it supports.

    A manager's thread calls it, with the prefix of the thread that called `init_continuous_batching`, or without.
    """

    def __init__(self, model, state):
        entries = (calls.Disabling(state.token.number, in_task=False),) if state.disabled else ()
        name, config = model.config._attn_implementation, copy.deepcopy(model.config)
        self.__dict__.update(_model=model, config=config, _held=calls.Held(entries, None, None, calls.local.rows))
        self._name(name if entries else _SERVED_AS)

    def _name(self, implementation: str) -> None:
        config = self.config
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
        for part in parts:
            if part is not None:
                part._attn_implementation_internal = implementation

    def set_attn_implementation(self, implementation: str) -> None:
        """Set the implementation for this manager's calls alone."""
        self._name(implementation)
        for entry in self._held.disabled:
            entry.implementation = implementation

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_model"], name)

    def __setattr__(self, name: str, value):
        setattr(self.__dict__["_model"], name, value)

    def __delattr__(self, name: str):
        delattr(self.__dict__["_model"], name)

    def __call__(self, *args, **kwargs):
        return calls.applied(self._held, self._model, *args, **kwargs)

    def eval(self):
        self._model.eval()
        return self


def _refuse(model, rows) -> None:
    """Raise `PatchError` if a prefix in use, that of the active adapter or of ``rows``, cannot read a paged cache."""
    prefixes = [module for module in model.modules() if isinstance(module, AdaptivePrefix)]
    if rows is not None:
        prefixes = [prefix for mixture in rows.places.values() for prefix in mixture.prefixes]
    for prefix in prefixes:
        if prefix.gate_entry.kept_in_cache:
            allowed = gates.choice(lambda gate: not gate.kept_in_cache)
            raise PatchError(
                f"{prefix.name} has gate={prefix.gate!r}: continuous batching computes a prompt once and "
                "shares its cache with requests that begin alike, so the hidden state of a request's first token is "
                f"not available when the gate is needed. Use gate={allowed}, or model.generate"
            )
    inline = next((site.name for site in model._apt_state.sites if site.inline is not None), None)
    if inline is not None:
        raise PatchError(f"{inline} computes attention inline and cannot read a paged cache; use model.generate")


def _install(model) -> None:
    """Enable continuous batching of the patched ``model``, if transformers supports it."""
    if hasattr(type(model), "init_continuous_batching"):
        forget_manager(model)
        lacking = compat.missing("continuous batching")
        model.init_continuous_batching = _refuse_batching if lacking else InitContinuousBatching(model)


def _remove(model) -> None:
    """Undo `_install`."""
    installed = model.__dict__.get("init_continuous_batching")
    if installed is _refuse_batching or isinstance(installed, InitContinuousBatching):
        forget_manager(model)
        del model.init_continuous_batching


def forget_manager(model) -> None:
    """Delete a manager that was kept for the next session: its cache belongs to the earlier prefixes."""
    manager = model.__dict__.pop(_MANAGER, None)  # removed first: a partly destroyed manager must not be used again
    if manager is not None:
        manager.destroy()
