"""PEFT: its wrapper, its parameters inside a model, and its methods that freeze, save and load."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from pathlib import Path

from torch import nn

from ...prefix.adaptive import AdaptivePrefix
from ...wrapping import when_loaded, wrap
from .. import compat, events, hub, precision
from ..adapters import adapters, delete_adapter, rename, set_adapter
from ..checkpoint import CONFIG, WEIGHTS, load, save_adapter, weights_to_write
from ..patching import unpatch
from ..state import inner, is_patched, state_of
from ..transaction import atomic


class Peft(events.Integration):
    """PEFT's adapters beside prefixes, in either order."""

    def inside(self, model):
        wraps = hasattr(model, "get_base_model") and hasattr(model, "peft_config")
        return model.get_base_model() if wraps else None

    def parameters(self, model) -> set[int]:
        return peft_parameters(model)

    def copies(self, model) -> set[str]:
        # `modules_to_save` trains copies of the modules that it names.
        added = peft_parameters(model)
        named = model.named_parameters() if added else ()
        return {name for name, parameter in named if id(parameter) in added and ".modules_to_save." in name}

    def check(self, action: events.Action, model) -> None:
        if "peft" in sys.modules and action not in ("delete", "unpatch") and _has_peft(model):
            compat.require("peft")

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            join_peft()


def _peft_layers() -> tuple[type[nn.Module], ...]:
    """PEFT's classes that hold its parameters; none where PEFT was never imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    other = sys.modules.get("peft.utils.other")
    if not tuners or not other or compat.missing("peft"):
        return ()
    return tuners.BaseTunerLayer, other.AuxiliaryTrainingWrapper


def peft_parameters(model) -> set[int]:
    """The ids of the parameters that PEFT added to ``model``."""
    layers = [module for module in model.modules() if isinstance(module, _peft_layers())]
    found = {id(parameter) for layer in layers for parameter in layer.parameters()}
    for layer in layers:
        for name in ("base_layer", "original_module"):
            base = layer._modules.get(name)
            if base is not None and not isinstance(base, _peft_layers()):
                found -= {id(parameter) for parameter in base.parameters()}
    return found


def _has_peft(model) -> bool:
    """Whether any module of ``model`` is PEFT's, determined without importing PEFT."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def join_peft() -> None:
    """Wrap PEFT's methods so that PEFT works beside prefixes; models without a prefix are unaffected. Once per process.

    PEFT freezes every parameter that is not its own when it adds an adapter, and saves and loads its own alone. For
    each of these, the one method common to all tuners is wrapped: what trained with a prefix stays trainable, and the
    prefix is saved to and loaded from the same folder. If PEFT is not imported yet, this happens at its import.
    """
    when_loaded("peft", _join)


def _join() -> None:
    tuners, models = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.peft_model")
    if tuners is None or models is None:
        return
    if compat.available("peft"):
        wrap(tuners.BaseTuner, "inject_adapter", _inject_adapter)
        wrap(models.PeftModel, "_setup_prompt_encoder", _setup_prompt_encoder)
        for module in (sys.modules["peft.utils.other"], sys.modules["peft.utils"], sys.modules["peft"]):
            wrap(module, "prepare_model_for_kbit_training", _keeping_trainable)
    if compat.available("peft, saving"):
        wrap(models.PeftModel, "save_pretrained", _save_pretrained)
        wrap(models.PeftModel, "load_adapter", _load_adapter)
    if compat.available("peft, merging"):
        wrap(tuners.BaseTuner, "merge_and_unload", _merge_and_unload)
        wrap(tuners.BaseTuner, "unload", _unload)
    if compat.available("peft, names"):
        wrap(models.PeftModel, "set_adapter", _set_adapter)
        wrap(models.PeftModel, "delete_adapter", _delete_adapter)


def _keeping_trainable(call, model, *args, **kwargs):
    """``call(model, ...)``; afterwards what trained with a prefix is trainable as it was."""
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad] if _has_prefix(model) else []
    result = call(model, *args, **kwargs)
    for parameter in ours:
        parameter.requires_grad_(True)
    return result


def _inject_adapter(original, self, model, *args, **kwargs):
    result = _keeping_trainable(lambda *given, **options: original(self, *given, **options), model, *args, **kwargs)
    if is_patched(model):
        base = inner(model)
        state_of(base).originals += precision.widen(base, events.copied_parameters(base), keep=True)
    return result


def _setup_prompt_encoder(original, self, *args, **kwargs):
    return _keeping_trainable(lambda _: original(self, *args, **kwargs), self.base_model)


def _merge_and_unload(original, self, *args, **kwargs):
    return _remembering(inner(self.model), lambda layer: True, original, self, *args, **kwargs)


def _unload(original, self):
    # What `merge_adapter` merged stays merged.
    return _remembering(inner(self.model), lambda layer: bool(getattr(layer, "merged_adapters", None)), original, self)


def _remembering(base, merges, original, *args, **kwargs):
    """``original(...)``, which replaces PEFT's layers; `save` then holds the weights of those that ``merges`` names."""
    layers = [name for name, module in base.named_modules() if isinstance(module, _peft_layers()) and merges(module)]
    result = original(*args, **kwargs)
    if is_patched(base):
        # By identity: the weight of a layer may be tied to that of another, by whose name it is saved.
        changed = {id(p) for name in layers for p in _parameters_at(base, name)}
        state = state_of(base)
        state.merged |= {name for name, parameter in state.parameters.items() if id(parameter) in changed}
    return result


def _parameters_at(base, name: str) -> list[nn.Parameter]:
    """The parameters of the module ``name``; none where it was inside of one that is gone."""
    try:
        return list(base.get_submodule(name).parameters())
    except AttributeError:
        return []


def _save_pretrained(original, self, save_directory, *args, **kwargs):
    result = original(self, save_directory, *args, **kwargs)
    if not _has_prefix(self):
        return result
    given = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
    given = {**given.arguments, **given.arguments.get("kwargs", {})}
    names = {name: _prefix_beside(self, name) for name in self.peft_config}
    unsaved = sorted(set(adapters(self)) - set(names.values()))
    if unsaved:
        warnings.warn(
            f"PEFT has no adapter of the name {unsaved[0]!r}: its prefix is not saved. "
            f"apt_kernels.save(model, folder, adapter={unsaved[0]!r}) saves it",
            stacklevel=3,
        )
    for name in given.get("selected_adapters") or list(names):
        if names[name] is not None:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            _save_prefix(self, names[name], folder, given.get("state_dict"), given.get("is_main_process", True))
    return result


def _save_prefix(model, name: str, folder, state_dict: dict | None, is_main_process: bool) -> None:
    """Save the prefix adapter ``name``, active or not."""
    active = state_of(model).adapter
    if name != active:
        set_adapter(model, name)
        state_dict = None  # it holds the active adapter's
    # Weights gathered from shards have PEFT's names.
    state_dict = state_dict and {n.removeprefix("base_model.model."): tensor for n, tensor in state_dict.items()}
    try:
        state_dict = weights_to_write(model, is_main_process, state_dict)
        if state_dict is not None:
            save_adapter(model, folder, state_dict=state_dict)
    finally:
        set_adapter(model, active)


def _load_adapter(original, self, model_id, adapter_name, *args, **kwargs):
    result = original(self, model_id, adapter_name, *args, **kwargs)
    folder = model_id
    if hub.is_repository(model_id):
        folder = hub.fetch(model_id, [WEIGHTS, CONFIG], kwargs.get("revision"))
    if os.path.isfile(os.path.join(folder, WEIGHTS)):
        _load_prefix(self, Path(folder), adapter_name)
    return result


@atomic
def _load_prefix(model, folder: Path, name: str) -> None:
    """Load the prefix in ``folder`` for PEFT's adapter ``name``; PEFT's active adapter decides which one is active."""
    if not is_patched(model):
        load(model, folder, adapter=name)
        return
    state = state_of(model)
    active, beside = state.adapter, _prefix_beside(model, name)
    load(model, folder, adapter=beside or name)
    set_adapter(model, _prefix_beside(model, model.active_adapter) or active)


def _set_adapter(original, self, adapter_name, *args, **kwargs):
    if not _has_prefix(self):
        return original(self, adapter_name, *args, **kwargs)
    before = self.active_adapter
    held, state = _prefix_beside(self, before), state_of(self)
    result = original(self, adapter_name, *args, **kwargs)
    own = held == state.adapter != before and adapter_name != before
    try:
        if own:
            rename(state, before)  # it belongs to that adapter of PEFT, not to whichever is active
        _follow(self)
    except BaseException:
        if own:
            rename(state, held)
        original(self, before)
        raise
    return result


def _delete_adapter(original, self, adapter_name, *args, **kwargs):
    beside = _prefix_beside(self, adapter_name) if _has_prefix(self) else None
    if beside is None:
        return original(self, adapter_name, *args, **kwargs)
    state = state_of(self)
    result = original(self, adapter_name, *args, **kwargs)
    base = state.model  # without its last adapter, a PeftModel does not expose its model
    others = [name for name in adapters(base) if name != beside]
    if not others:
        unpatch(base)
        return result
    if beside == state.adapter:
        set_adapter(base, self.active_adapter if self.active_adapter in others else others[0])
    delete_adapter(base, beside)
    return result


def _follow(model) -> None:
    """Activate the prefix of PEFT's active adapter; warn if there is none."""
    state, name = state_of(model), model.active_adapter
    beside = _prefix_beside(model, name)
    if beside is not None:
        set_adapter(model, beside)
    else:
        warnings.warn(
            f"there is no prefix of the name {name!r}: that of {state.adapter!r} stays active. apt_kernels.add_adapter "
            "makes one, and apt_kernels.disabled is for running without",
            stacklevel=4,
        )


def _prefix_beside(model, name: str) -> str | None:
    """The prefix adapter that belongs to PEFT's adapter ``name``: that of the same name.

    Where no adapter of PEFT has the active prefix's name (`patch` calls it "default"), it belongs to PEFT's active one.
    """
    names = adapters(model)
    if name in names:
        return name
    active = next(iter(names))
    return active if active not in model.peft_config and name == model.active_adapter else None


def _has_prefix(model) -> bool:
    return any(isinstance(module, AdaptivePrefix) for module in model.modules())
