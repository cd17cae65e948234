"""`save_pretrained` of a patched model: transformers' Trainer then writes and reads adapters, no base weights."""

from __future__ import annotations

import json
import os
import shutil
import uuid
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ...errors import AdapterError, PatchError
from .. import compat, events, offload, weights
from ..adapter_file import CONFIG, refuse_file, replacing, write_tensors, writing
from ..adapters import adapters, set_adapter
from ..checkpoint import WEIGHTS, Upload, check_path, save_adapter, save_unfolded, weights_to_write, whole
from ..state import State, is_saved, named_parameters, state_of
from ..trainable import trainable_names
from . import sentence_transformers
from .sentence_transformers import NO_MODEL, is_ours

# The files that Trainer needs when it resumes, and when it loads the best model.
TRAINER_WEIGHTS = "model.safetensors"
_MODEL_WEIGHTS = (TRAINER_WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What an adapter's subfolder cannot be named: the folder above, and the files beside it.
_NOT_FOR_A_FOLDER = ("..", WEIGHTS, CONFIG, TRAINER_WEIGHTS, "config.json")
# Beside an adapter of another name than "default", an empty tensor of this name and the adapter's.
_ADAPTER = "apt_kernels.adapter."
# The attributes that `_install` sets on the model and `_remove` restores.
_ATTRIBUTES = ("save_pretrained", "_keys_to_ignore_on_save", "_hf_peft_config_loaded")


class Trainer(events.Integration):
    """Replaces ``model.save_pretrained`` while the model is patched."""

    def changed(self, action: events.Action, state) -> None:
        if action == "unpatch":
            _remove(state.model)
            return
        if action == "patch":
            _install(state.model)
        _expect_missing(state)


class SavePretrained:
    """Replaces ``model.save_pretrained`` while the model is patched: the method.

    It writes what `apt_kernels.save` writes, and the same weights once more (a hard link where the file system has
    them) under the name that Trainer reads. Its ``config.json`` is that of no model: ``from_pretrained`` refuses the
    folder, and says why.
    """

    def __init__(self, model):
        self.model = model
        self.hook = model.register_load_state_dict_pre_hook(_into_its_adapter)
        self.before = {name: model.__dict__[name] for name in _ATTRIBUTES if name in model.__dict__}

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        check_path(save_directory)
        folder = Path(save_directory)
        refuse_file(folder)
        with writing(folder):
            _refuse_base_model(folder)
        sentence_transformers.refuse(self.model, folder)
        theirs, state = _added_weights(self.model, state_dict), state_of(self.model)
        if state.others:
            _save_several(state, folder, is_main_process, push_to_hub or bool(theirs))
            return
        state_dict = weights_to_write(self.model, is_main_process, state_dict)
        if theirs:
            # For a model with PEFT's adapter, transformers writes that adapter alone.
            type(self.model).save_pretrained(self.model, folder, is_main_process=is_main_process)
        if state_dict is None:
            return
        to = (kwargs.get("repo_id") or folder.name) if push_to_hub else None
        upload = Upload(to, kwargs.get("private"), kwargs.get("commit_message"))
        save_adapter(self.model, folder, state_dict=state_dict, upload=upload)
        _warn_of_other_adapters(state_of(self.model))
        with writing(folder):
            self._write_beside(folder, state_dict, theirs)

    def _write_beside(self, folder: Path, state_dict: dict, theirs: dict[str, Tensor]) -> None:
        """What Trainer and transformers read in a folder that holds an adapter."""
        _write_no_model(folder)
        link, state = folder / TRAINER_WEIGHTS, state_of(self.model)
        if state.adapter != "default":
            theirs[f"{_ADAPTER}{state.adapter}"] = torch.empty(0, device="cpu")
        if theirs or any(prefix.mlp is not None or prefix.frozen for prefix in state.prefixes.values()):
            save_unfolded(self.model, link, state_dict, theirs)
            return
        _link(folder / WEIGHTS, link)


def _write_no_model(folder: Path) -> None:
    """The ``config.json`` that no model can be loaded with."""
    with replacing(folder / "config.json") as file:
        file.write((json.dumps(NO_MODEL, indent=2) + "\n").encode())


def _save_several(state, folder: Path, is_main_process: bool, more: bool) -> None:
    """Save adapters that are active together: the first in the folder, each other one in a subfolder of its name.

    Trainer's file has the weights of all of them.
    """
    if more:
        raise PatchError(
            "several adapters are active: they cannot be pushed to the hub together, nor saved with PEFT's weights. "
            "Call apt_kernels.save(model, folder, adapter=...) for each"
        )
    for name in state.others:
        if Path(name).name != name or name in _NOT_FOR_A_FOLDER:
            raise PatchError(
                f"the adapter {name!r} would be saved in a subfolder of its name, which no folder there can have; "
                "call apt_kernels.save(model, folder, adapter=...) for each adapter"
            )
    if not is_main_process:
        return
    for name in (state.adapter, *state.others):
        save_adapter(state.model, folder if name == state.adapter else folder / name, adapter=name)
    ours = {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
    held = {name: whole(p) for name, p in state.parameters.items() if p.requires_grad or id(p) in ours}
    for i, name in enumerate((state.adapter, *state.others)):
        held[f"{_ADAPTER}{name}"] = torch.full((1,), float(i), device="cpu")
    with writing(folder):
        _write_no_model(folder)
        write_tensors(folder / TRAINER_WEIGHTS, held)


def _warn_of_other_adapters(state: State) -> None:
    """Warn if an adapter that is not active changed since it was last saved or loaded."""
    names = [name for name, each in state.parked.items() if not all(map(is_saved, each.prefixes.values()))]
    if names:
        warnings.warn(
            f"save_pretrained writes the active adapter, {state.adapter!r}, alone; {', '.join(map(repr, names))} "
            f"changed since the last save: call apt_kernels.save(model, folder, adapter={names[0]!r})",
            stacklevel=3,
        )


def _into_its_adapter(model, state_dict: dict, prefix: str, *_) -> None:
    """Before a checkpoint is loaded: activate the adapters from which it was saved."""
    keys = [key for key in state_dict if key.startswith(f"{prefix}{_ADAPTER}")]
    if not keys:
        return
    places, known = {key: state_dict.pop(key) for key in keys}, adapters(model)
    # The marks of several adapters hold their places.
    names = [key.removeprefix(f"{prefix}{_ADAPTER}") for key in sorted(keys, key=lambda key: places[key].tolist())]
    for name in names:
        if name not in known:
            raise AdapterError(
                f"the checkpoint was saved from the adapter {name!r}; the model has {', '.join(map(repr, known))}. "
                "Add it first (apt_kernels.add_adapter), or load the checkpoint with apt_kernels.load"
            )
    set_adapter(model, names)


def _link(source: Path, link: Path) -> None:
    """Make ``link`` the same file as ``source`` in one rename, or a copy where the file system has no hard links."""
    temporary = link.with_name(f".{link.name}.{uuid.uuid4().hex}.tmp")
    try:
        os.link(source, temporary)
        os.replace(temporary, link)
    except OSError:
        with open(source, "rb") as file, replacing(link) as copy:
            shutil.copyfileobj(file, copy)
    finally:
        temporary.unlink(missing_ok=True)  # a rename onto the same file does nothing


def _refuse_base_model(folder: Path) -> None:
    """Raise `AdapterError` where a model's own weights would be overwritten."""
    try:
        ours = is_ours(json.loads((folder / "config.json").read_text()))
    except FileNotFoundError:
        ours = not any((folder / name).exists() for name in _MODEL_WEIGHTS)
    except ValueError:
        ours = False
    if not ours:
        raise AdapterError(
            f"{folder} holds a model, which save_pretrained of a patched model would overwrite; save to another "
            "folder, or call apt_kernels.save, which writes beside it"
        )


def _added_weights(model, state_dict: dict | None) -> dict[str, Tensor]:
    """The weights that PEFT added to ``model``, by name: out of ``state_dict`` where it is given."""
    added = events.added_parameters(model)
    found = {name: parameter for name, parameter in named_parameters(model).items() if id(parameter) in added}
    if not found:
        return {}
    if not getattr(model, "_hf_peft_config_loaded", False):
        raise PatchError(
            f"the model holds weights of PEFT ({next(iter(found))}), which its save_pretrained would leave out; call "
            "save_pretrained of the PeftModel around it, which saves the prefixes too"
        )
    if state_dict is not None:
        return {name: state_dict[name] for name in found if name in state_dict}
    with weights.gathered(model, found.values()):
        return {name: whole(offload.read(model, name, parameter)) for name, parameter in found.items()}


def _install(model) -> None:
    model.save_pretrained = SavePretrained(model)
    if getattr(model, "is_quantized", False) and compat.available("trainer, quantised"):
        # Trainer trains a quantised model only where an adapter was loaded.
        model._hf_peft_config_loaded = True


def _expect_missing(state) -> None:
    """Set the weights that Trainer does not expect in a checkpoint: all but prefixes and other trainable parameters."""
    if not compat.available("trainer"):
        return
    model, held = state.model, trainable_names(state.model, state.config)
    added = events.added_parameters(model)
    added |= {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
    held |= {name for name, parameter in state.parameters.items() if id(parameter) in added}
    # As in Trainer. A quantised model's `state_dict` has more entries, and creating it may repack the weights.
    missing = model.load_state_dict({}, strict=False).missing_keys
    model._keys_to_ignore_on_save = sorted(set(missing) - held)


def _remove(model) -> None:
    """Undo `_install`."""
    before = model.save_pretrained.before
    model.save_pretrained.hook.remove()
    for name in _ATTRIBUTES:
        model.__dict__.pop(name, None)
    model.__dict__.update(before)
