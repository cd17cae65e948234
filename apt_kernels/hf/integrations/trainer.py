"""A patched model's own `save_pretrained`: so that transformers' Trainer writes and reads adapters, no base weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from ...prefix.adaptive import AdaptivePrefix
from .. import compat, events
from ..checkpoint import WEIGHTS, save, save_unfolded, weights_to_write
from ..trainable import trainable_names

# What Trainer looks for when it resumes, and when it loads the best model.
TRAINER_WEIGHTS = "model.safetensors"
# In the place of a model's config: the folder holds no model, and a model class would else make a random one.
NO_MODEL = {
    "model_type": "apt_kernels adapter (apt_kernels.load loads it into a model)",
    "transformers_weights": "an apt_kernels adapter holds no model, apt_kernels.load loads it into one.safetensors",
}
# What `_install` sets on the model, and `_remove` gives back.
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
    """Takes the place of ``model.save_pretrained`` while the model is patched; `unpatch` removes it.

    It writes what `apt_kernels.save` writes, and the same weights once more (a hard link where the file system has
    them) under the name that Trainer reads. Its ``config.json`` is that of no model: ``from_pretrained`` refuses the
    folder, and says why.
    """

    def __init__(self, model):
        self.model = model
        self.before = {name: model.__dict__[name] for name in _ATTRIBUTES if name in model.__dict__}

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        state_dict = weights_to_write(self.model, is_main_process, state_dict)
        if state_dict is None:
            return
        folder = Path(save_directory)
        hub = {"repo_id": kwargs.get("repo_id") or folder.name} if push_to_hub else {}
        hub |= {name: kwargs.get(name) for name in ("private", "commit_message")}
        save(self.model, folder, state_dict=state_dict, **hub)
        (folder / "config.json").write_text(json.dumps(NO_MODEL, indent=2) + "\n")
        link = folder / TRAINER_WEIGHTS
        if any(isinstance(m, AdaptivePrefix) and m.mlp is not None for m in self.model.modules()):
            save_unfolded(self.model, link, state_dict)
            return
        link.unlink(missing_ok=True)
        try:
            os.link(folder / WEIGHTS, link)
        except OSError:
            shutil.copyfile(folder / WEIGHTS, link)


def _install(model) -> None:
    model.save_pretrained = SavePretrained(model)
    if getattr(model, "is_quantized", False) and compat.available("trainer, quantised"):
        # Trainer trains a quantised model only where an adapter was loaded.
        model._hf_peft_config_loaded = True


def _expect_missing(state) -> None:
    """Set which weights Trainer does not expect in a checkpoint: all but the prefixes and what trains beside them."""
    if not compat.available("trainer"):
        return
    model, held = state.model, trainable_names(state.model, state.config)
    for name, prefix in state.prefixes.items():
        held |= {f"{name}.apt.{each}" for each, _ in prefix.named_parameters()}
    # Asked as Trainer does. A quantised model's `state_dict` has more entries, and making it may repack the weights.
    missing = model.load_state_dict({}, strict=False).missing_keys
    model._keys_to_ignore_on_save = sorted(set(missing) - held)


def _remove(model) -> None:
    """Undo `_install`."""
    before = model.save_pretrained.before
    for name in _ATTRIBUTES:
        model.__dict__.pop(name, None)
    model.__dict__.update(before)
