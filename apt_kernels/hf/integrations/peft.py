"""PEFT: its wrapper, its parameters inside a model, and its methods that freeze, save and load."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings

from ...prefix.adaptive import AdaptivePrefix
from .. import compat, events, hub
from ..checkpoint import CONFIG, WEIGHTS, load, save, weights_to_write


class Peft(events.Integration):
    """PEFT's adapters beside prefixes, in either order."""

    def inside(self, model):
        wraps = hasattr(model, "get_base_model") and hasattr(model, "peft_config")
        return model.get_base_model() if wraps else None

    def parameters(self, model) -> set[int]:
        return peft_parameters(model)

    def check(self, action: events.Action, model) -> None:
        if "peft" in sys.modules and action not in ("delete", "unpatch") and _has_peft(model):
            compat.require("peft")

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            join_peft()


def _peft_layers() -> tuple[type, ...]:
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
    """Whether any module of ``model`` is PEFT's, asked without PEFT's classes."""
    return any(type(module).__module__.split(".")[0] == "peft" for module in model.modules())


def join_peft() -> None:
    """From here on PEFT works beside prefixes; a model without one is treated as before. Once a process.

    PEFT freezes every parameter that is not its own when it adds an adapter, and saves and loads its own alone. Its
    one method for each of these, common to all its tuners, is wrapped: what trained with a prefix stays trainable,
    and the prefix is saved to the same folder and loaded from there. Where PEFT is not imported yet, that waits until
    it is.
    """
    if "peft" not in sys.modules:
        if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
            sys.meta_path.insert(0, _WhenImported())
        return
    tuners, models = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.peft_model")
    if tuners is None or models is None:
        return
    if compat.available("peft"):
        _wrap(tuners.BaseTuner, "inject_adapter", _inject_adapter)
        _wrap(models.PeftModel, "_setup_prompt_encoder", _setup_prompt_encoder)
        for module in (sys.modules["peft.utils.other"], sys.modules["peft.utils"], sys.modules["peft"]):
            _wrap(module, "prepare_model_for_kbit_training", _keeping_trainable)
    if compat.available("peft, saving"):
        _wrap(models.PeftModel, "save_pretrained", _save_pretrained)
        _wrap(models.PeftModel, "load_adapter", _load_adapter)


class _WhenImported:
    """Finds the package peft as Python does, and calls `join_peft` when it has been imported."""

    def find_spec(self, name: str, path=None, target=None):
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            sys.meta_path.insert(0, self)
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                join_peft()
            except Exception as error:  # an import of PEFT must not fail for us
                warnings.warn(f"apt_kernels cannot work beside this PEFT: {error}", stacklevel=2)

        spec.loader.exec_module = exec_module
        return spec


def _wrap(owner, name: str, around) -> None:
    original = getattr(owner, name)
    if hasattr(original, "apt_kernels_wraps"):
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    wrapped.apt_kernels_wraps = original
    setattr(owner, name, wrapped)


def _keeping_trainable(call, model, *args, **kwargs):
    """``call(model, ...)``; afterwards what trained with a prefix is trainable as it was."""
    ours = [parameter for parameter in model.parameters() if parameter.requires_grad] if _has_prefix(model) else []
    result = call(model, *args, **kwargs)
    for parameter in ours:
        parameter.requires_grad_(True)
    return result


def _inject_adapter(original, self, model, *args, **kwargs):
    return _keeping_trainable(lambda *given, **options: original(self, *given, **options), model, *args, **kwargs)


def _setup_prompt_encoder(original, self, *args, **kwargs):
    return _keeping_trainable(lambda _: original(self, *args, **kwargs), self.base_model)


def _save_pretrained(original, self, save_directory, *args, **kwargs):
    result = original(self, save_directory, *args, **kwargs)
    if _has_prefix(self):
        given = kwargs.get("state_dict")
        # Those gathered from shards have PEFT's names.
        given = given and {name.removeprefix("base_model.model."): tensor for name, tensor in given.items()}
        given = weights_to_write(self, kwargs.get("is_main_process", True), given)
        if given is not None:
            save(self, save_directory, state_dict=given)
    return result


def _load_adapter(original, self, model_id, *args, **kwargs):
    result = original(self, model_id, *args, **kwargs)
    folder = model_id
    if hub.is_repository(model_id):
        folder = hub.fetch(model_id, [WEIGHTS, CONFIG], kwargs.get("revision"))
    if os.path.isfile(os.path.join(folder, CONFIG)):
        load(self, folder)
    return result


def _has_prefix(model) -> bool:
    return any(isinstance(module, AdaptivePrefix) for module in model.modules())
