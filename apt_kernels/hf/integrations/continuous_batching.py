"""Continuous batching (``generate_batch``): its paged cache, and what of a prefix it can serve."""

from __future__ import annotations

import copy

from ...errors import PatchError
from ...prefix import gates
from ...prefix.adaptive import AdaptivePrefix
from .. import calls, compat, events

# The attention that transformers hands masks as tensors, and never exchanges for a flash kernel.
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
            forget_manager(state.model)  # its blocks hold keys and values that other prefixes led to


class InitContinuousBatching:
    """Takes the place of ``model.init_continuous_batching`` while the model is patched."""

    def __init__(self, model):
        self.model = model

    def __call__(self, *args, **kwargs):
        model, state = self.model, self.model._apt_state
        now = (state.adapter, state.disabled)
        manager = getattr(model, _MANAGER, None)
        if manager is not None and getattr(manager, "apt_served", None) != now:
            forget_manager(model)  # it shares blocks of keys that were computed otherwise
        if not state.disabled:
            _refuse(model)
        manager = type(model).init_continuous_batching(_Served(model, state), *args, **kwargs)
        manager.apt_served = now
        return manager


def _refuse_batching(*args, **kwargs):
    """Takes the same place where transformers lacks something that it needs."""
    compat.require("continuous batching")


class _Served:
    """The model as continuous batching sees it: attention of a name that it knows, all else the model's own.

    A manager's thread calls it; it runs with the prefix or without as `init_continuous_batching` did.
    """

    def __init__(self, model, state):
        entries = (calls.Disabling(state.token.number, in_task=False),) if state.disabled else ()
        name, config = model.config._attn_implementation, copy.deepcopy(model.config)
        self.__dict__.update(_model=model, config=config, _held=calls.Held(entries, None, None))
        self._name(name if entries else _SERVED_AS)

    def _name(self, implementation: str) -> None:
        config = self.config
        parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
        for part in parts:
            if part is not None:
                part._attn_implementation_internal = implementation

    def set_attn_implementation(self, implementation: str) -> None:
        """As the manager asks for it: for this manager's calls alone."""
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


def _refuse(model) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdaptivePrefix) and module.gate_entry.kept_in_cache:
            allowed = gates.choice(lambda gate: not gate.kept_in_cache)
            raise PatchError(
                f"{name.removesuffix('.apt')} has gate={module.gate!r}: continuous batching computes a prompt once and "
                "shares its cache with requests that begin alike, so the hidden state of a request's first token is "
                f"not available when the gate is needed. Use gate={allowed}, or model.generate"
            )
    inline = next((site.name for site in model._apt_state.sites if site.inline is not None), None)
    if inline is not None:
        raise PatchError(f"{inline} writes its attention out and cannot read a paged cache; use model.generate")


def _install(model) -> None:
    """Let the patched ``model`` batch continuously, where transformers can at all."""
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
    """Drop a manager that was kept for the next session: it serves the model as it was."""
    manager = model.__dict__.pop(_MANAGER, None)  # first: a manager that is half destroyed must not be used again
    if manager is not None:
        manager.destroy()
