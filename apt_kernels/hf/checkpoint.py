"""Save and load what was trained: ``adapter.safetensors`` and ``apt_config.json``, nothing else, nothing pickled."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import patterns
from ..config import AptConfig
from ..errors import AdapterError, ArgumentError, ConfigError, PatchError, its_type
from ..ops.values import check_flag
from ..prefix.adaptive import AdaptivePrefix
from . import base_record, events, hub, offload, unsaved, weights
from .adapter_file import CONFIG, WEIGHTS, AdapterFile, open_adapter, write_adapter, write_tensors, writing
from .adapters import adapters, add_checked, refuse_detached, rename, set_adapter
from .discovery.selection import lengths_of
from .model_card import card
from .patching import patch_checked
from .state import (
    Model,
    State,
    inner,
    is_as_made,
    is_patched,
    named_parameters,
    remember_saved,
    require_model,
    state_of,
)
from .trainable import trainable_names
from .transaction import atomic, undisturbed
from .untrusted import shown


def save(
    model: nn.Module,
    folder: str | os.PathLike | None = None,
    *,
    adapter: str | None = None,
    repo_id: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    subfolder: str | None = None,
    metrics: Mapping[str, float] | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter of a patched model: its prefixes, what `patch` made trainable beside them (frozen since or not),
    every other trainable parameter, and weights into which PEFT merged an adapter since the patch.

    PEFT's own weights are left to PEFT: `save` warns if the model holds any, and PEFT's ``save_pretrained`` writes
    both. It also warns if something else changed since the patch that is frozen now, such as running statistics.

    A reparameterised prefix is written as the key and value that it gives; the model keeps its MLP.

    ``adapter.safetensors`` holds the weights, the settings and for which base model they are; it is replaced in one
    rename, so that every reader has the old adapter or the new one. ``apt_config.json`` is a copy of the settings.

    Where processes share the weights, each of them has to call this, with a folder of its own or the same one.

    Args:
        model: a patched model.
        folder: where to write; it is made if need be. May be left out where ``repo_id`` is given.
        adapter: which adapter, active or not; None: the active one.
        repo_id: a repository of the Hugging Face hub, ``owner/name``, to upload the two files to; it is made if need
            be, ``private`` or not, and gets one commit. Of several processes the first uploads.
            A model card, ``README.md``, is written beside the adapter and uploaded, unless there is one already.
        private, commit_message: of the repository, and of the commit.
        subfolder: a folder of the repository to upload to; None: its root.
        metrics: numbers for the model card, by name.
        state_dict: the weights to take in place of the model's own, by the model's names: those gathered from shards.

    Raises:
        PatchError: the model is not patched.
        ConfigError: it has no adapter of that name, or ``folder`` is no path.
        ArgumentError: another argument has a wrong type.
        AdapterError: the folder cannot be written, ``state_dict`` lacks a trained weight, the hub refuses the upload,
            or other processes that hold parts of the weights have not called this within ten minutes.

    Examples:
        >>> apt_kernels.save(model, "adapter")
        >>> sorted(os.listdir("adapter"))
        ['adapter.safetensors', 'apt_config.json']
    """
    if folder is None and repo_id is None:
        raise AdapterError("folder and repo_id are None; save needs one of them")
    unsaved.warn_of_others(model, state_of(model))
    upload = Upload(repo_id, private, commit_message, subfolder)
    save_adapter(model, folder, adapter, state_dict, upload, metrics)


class Upload(NamedTuple):
    """Where `save` uploads an adapter to; see its arguments."""

    repo_id: str | None = None
    private: bool | None = None
    commit_message: str | None = None
    subfolder: str | None = None


def save_adapter(
    model,
    folder,
    adapter: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
    upload: Upload | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """`save`, where the caller saves PEFT's weights."""
    repo_id, private, commit_message, subfolder = upload or Upload()
    if folder is not None:
        check_path(folder)
    _check_upload(private, commit_message, metrics)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        hub.inside(subfolder)
        settings = _write(model, Path(place), adapter, state_dict)
        if repo_id is not None and _is_first_process():
            readme = Path(place, hub.README)
            if not readme.exists():
                with writing(Path(place)):
                    readme.write_text(card(settings, repo_id, subfolder, metrics), encoding="utf-8")
            files = [WEIGHTS, CONFIG, hub.README]
            hub.publish(Path(place), files, repo_id, subfolder, private, commit_message)


def check_path(folder) -> None:
    if not isinstance(folder, (str, os.PathLike)):
        raise ConfigError(f"folder is {its_type(folder)}; it needs a path")
    if not os.fspath(folder):
        raise ConfigError("folder is ''; it needs a path ('.' for the current folder)")


def _check_upload(private, commit_message, metrics) -> None:
    """Raise `ArgumentError` where an argument for the hub has another type; nothing has been written yet."""
    if private is not None:
        check_flag("private", private)
    if not isinstance(commit_message, (str, type(None))):
        raise ArgumentError(f"commit_message is {commit_message!r}; it needs a string or None")
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise ArgumentError(f"metrics is {its_type(metrics)}; it needs numbers by name, {{'accuracy': 0.9}}")
    for name, value in metrics.items():
        if not isinstance(name, str) or isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ArgumentError(f"metrics has {name!r}: {value!r}; it needs numbers by name, {{'accuracy': 0.9}}")


def _is_first_process() -> bool:
    return (
        not torch.distributed.is_available()
        or not torch.distributed.is_initialized()
        or not torch.distributed.get_rank()
    )


@dataclass(frozen=True)
class _Adapter:
    """One adapter of a model, active or not: its parameters by the names that they have in the model."""

    config: AptConfig
    prefixes: dict[str, AdaptivePrefix]
    own: Mapping[str, Tensor]  # of the prefixes
    beside: Mapping[str, Tensor]  # what its settings name beside them
    others: Mapping[str, Tensor]  # what else trains, or was merged into the base model

    @property
    def all(self) -> dict[str, Tensor]:
        return {**self.own, **self.beside, **self.others}


def _adapter(state: State, name: str | None = None) -> _Adapter:
    weights.reshard(state.model)
    if name is None and state.others:
        names = ", ".join(map(repr, (state.adapter, *state.others)))
        raise PatchError(f"the adapters {names} are active together; name one: save(..., adapter=...) for each")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"adapter is {name!r}; it needs one adapter's name. To save several, call save for each")
    if name is not None and name not in adapters(state.model):
        names = ", ".join(map(repr, adapters(state.model)))
        raise ConfigError(f"adapter is {name!r}; the model has the adapters {names}")
    held = None if name is None else state.parked.get(name)
    if held is None:
        refuse_detached(state)
    prefixes = state.prefixes if held is None else held.prefixes
    own = {f"{site}.apt.{n}": p for site, prefix in prefixes.items() for n, p in prefix.named_parameters()}
    if held is not None:
        return _Adapter(held.config, held.prefixes, own, held.values, {})
    parameters, added = state.parameters, events.added_parameters(state.model)
    ours = {id(parameter) for parameter in own.values()}
    added |= {id(p) for prefix in state.training_prefixes for p in prefix.parameters() if id(p) not in ours}
    own = {name: p for name, p in parameters.items() if id(p) in ours}
    named = trainable_names(state.model, state.config)
    beside = {name: p for name, p in parameters.items() if name in named}
    others = {
        name: p
        for name, p in parameters.items()
        if (p.requires_grad or name in state.merged) and id(p) not in added and name not in own and name not in beside
    }
    return _Adapter(state.config, state.prefixes, own, beside, others)


def _write(model, folder: Path, name: str | None, state_dict: dict[str, Tensor] | None) -> dict:
    """Write the adapter; returns its settings."""
    tensors, settings, prefixes = _collected(model, name, state_dict)
    unsaved.warn_of_changes(state_of(model))
    broken = next((n for n, tensor in tensors.items() if not _is_finite(tensor)), None)
    if broken is not None:
        warnings.warn(f"{broken} has values that are not finite; load refuses them by default", stacklevel=4)
    write_adapter(folder, tensors, settings)
    remember_saved(prefixes)
    return settings


@undisturbed
def _collected(model, name: str | None, state_dict: dict[str, Tensor] | None) -> tuple[dict, dict, list]:
    """The weights and the settings to write, and the adapter's prefixes."""
    state = state_of(model)
    saved = _adapter(state, name)
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise AdapterError(f"state_dict is {its_type(state_dict)}; it needs weights by the model's names")
    if state_dict is not None and name not in (None, state.adapter):
        raise AdapterError(f"state_dict holds the weights of {state.adapter!r}, the active adapter, not of {name!r}")
    found = _gathered(model, saved) if state_dict is None else _given(saved, state_dict)
    settings = _settings(state, saved, name or state.adapter)
    return _folded(saved.prefixes, found), settings, list(saved.prefixes.values())


def _settings(state: State, saved: _Adapter, name: str) -> dict:
    """What the file says of the adapter beside its weights. JSON-ready."""
    settings = saved.config.to_json()
    settings["reparameterisation"] = None  # folded away
    del settings["implementation"]  # a choice of this machine, not of the adapter
    trained = sorted({*saved.beside, *saved.others})
    if saved.others:
        # Made trainable by the user, or merged, since the patch: named, so that a load trains and restores them too.
        settings["trainable"] = [f"^{re.escape(each)}$" for each in trained]
    for each in ("layers", "trainable"):
        patterns.check_all(each, settings[each])
    return {
        **settings,
        "model": type(state.model).__name__,
        "adapter": name,
        "lengths": {site: prefix.length for site, prefix in saved.prefixes.items()},
        "trained": trained,
        "base": base_record.of(state),
    }


@undisturbed
def trained_weights(model) -> dict[str, Tensor]:
    """Copies of the active adapter's weights on the CPU, by name, gathered: all that hold a part have to call this."""
    return _gathered(model, _adapter(state_of(model)))


def trained_beside(model) -> list[str]:
    """The names of what the active adapter trained beside its prefixes."""
    saved = _adapter(state_of(model))
    return sorted({*saved.beside, *saved.others})


def folded_weights(model) -> dict[str, Tensor]:
    """The same, with the key and value of reparameterised prefixes in the place of what makes them."""
    saved = _adapter(state_of(model))
    return _folded(saved.prefixes, _gathered(model, saved))


def adapter_weights(model, name: str) -> tuple[dict[str, AdaptivePrefix], dict[str, Tensor]]:
    """An adapter's prefixes by their modules, and its weights as `folded_weights` gives those of the active one."""
    saved = _adapter(state_of(model), name)
    return saved.prefixes, {
        each: tensor
        for each, tensor in _folded(saved.prefixes, _gathered(model, saved)).items()
        if each not in saved.others
    }


def fill(model, tensors: Mapping[str, Tensor]) -> None:
    """Write these weights to the active adapter, which has those names and shapes; in the widest of their dtypes."""
    state = state_of(model)
    for name, prefix in state.prefixes.items():
        dtype = tensors[f"{name}.apt.key"].dtype
        if dtype == torch.float64:
            prefix.to(dtype)
    _store(model, _adapter(state).all, _split(state.prefixes, dict(tensors)))


def _store(model, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    with weights.gathered(model, parameters.values(), changed=True), torch.no_grad():
        for name, tensor in tensors.items():
            offload.write(inner(model), name, parameters[name], tensor)


def _gathered(model, saved: _Adapter) -> dict[str, Tensor]:
    weights.meet(model, saved.all.values())
    trained = weights.in_float32(saved.all)
    with weights.gathered(model, saved.all.values()):
        base = inner(model)
        return {name: whole(trained.get(name, offload.read(base, name, p))) for name, p in saved.all.items()}


def weights_to_write(model, is_main_process: bool, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """What `save` is to take on this process, as transformers' ``save_pretrained`` is called; None: nothing to write.

    Processes that do not write take part in the gathering where all are to call (FSDP2, tensor parallel).
    """
    if state_dict is None and (is_main_process or weights.distributes(inner(model))):
        state_dict = trained_weights(model)
    return state_dict if is_main_process else None


def _given(saved: _Adapter, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's weights out of ``state_dict``."""
    for name in saved.all:
        if name not in state_dict:
            raise AdapterError(f"state_dict lacks {name}, a weight of the adapter")
    return {name: whole(state_dict[name]) for name in saved.all}


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; a distributed tensor (FSDP2, tensor parallel) is gathered, and every process has to call."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().to("cpu", copy=True).contiguous()


def save_unfolded(model, path: Path, state_dict: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Write the trained weights and ``others``, reparameterisations as they are, for training to be resumed."""
    write_tensors(path, {**_given(_adapter(state_of(model)), state_dict), **others})


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@torch.no_grad()
def _folded(prefixes: Mapping[str, AdaptivePrefix], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors``, with the key and value of every prefix in the place of the MLP that makes them or of their parts,
    frozen and trained."""
    for name, prefix in prefixes.items():
        if prefix.frozen:
            tensors = dict(tensors)
            for frozen, part in _parts(name):
                tensors[part] = torch.cat([tensors.pop(frozen), tensors[part]], dim=1)
        if prefix.mlp is None:
            continue
        start = f"{name}.apt.mlp."
        made = {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}
        tensors = {n: tensor for n, tensor in tensors.items() if not n.startswith(start)}
        with torch.autocast("cpu", enabled=False):
            key, value = prefix.mlp.computed(**made)
        tensors |= {f"{name}.apt.key": key, f"{name}.apt.value": value}
    return tensors


def _parts(name: str) -> list[tuple[str, str]]:
    """The names of the frozen and of the trained part of a prefix's key and value. A file has the latter, with both."""
    return [(f"{name}.apt.frozen_{part}", f"{name}.apt.{part}") for part in ("key", "value")]


@atomic
def load(
    model: Model,
    folder: str | os.PathLike,
    *,
    adapter: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    example_inputs: dict | None = None,
    allow_non_finite: bool = False,
) -> Model:
    """Load what `save` wrote into ``model``, patching it first if it is not; the weights keep the model's dtypes.

    Everything is checked before anything changes: on an error the model is as it was. The loaded adapter becomes the
    active one. One of its name is replaced, with a warning unless it is as `patch` or `add_adapter` made it; else it
    is added to those there.

    Args:
        model: a transformers model, patched or not.
        folder: where `save` wrote, or a repository of the Hugging Face hub, ``owner/name`` or
            ``owner/name@revision``; a folder of that name goes first.
        adapter: the adapter's name on this model; None: ``"default"``.
        revision: a branch, tag or commit of the repository.
        subfolder: the folder inside the repository, or inside ``folder``, that holds the adapter.
        example_inputs: as for `patch`.
        allow_non_finite: load weights that are infinite or NaN, too.

    Returns:
        The same model.

    Raises:
        AdapterError: a file is missing, damaged, of a newer format, or for another base model; or its first
            mismatching weight is named.
        PatchError: the model cannot be patched, or has an adapter of that name with other settings.
        ConfigError: ``adapter`` is no name, or ``folder`` is no path.
        ArgumentError: another argument has a wrong type.

    Examples:
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
        >>> apt_kernels.load(model, "first")
        >>> apt_kernels.load(model, "second", adapter="b")  # beside "default", and active
    """
    name = "default" if adapter is None else adapter
    if not isinstance(name, str) or not name:
        raise ConfigError(f"adapter is {adapter!r}; it needs a string that is not empty, or None")
    check_path(folder)
    check_flag("allow_non_finite", allow_non_finite)
    if not isinstance(revision, (str, type(None))):
        raise ArgumentError(f"revision is {revision!r}; it needs a string or None")
    require_model(model, "load")
    if hub.is_repository(folder):
        folder = hub.fetch(str(folder), [WEIGHTS, CONFIG], revision, subfolder)
    else:
        folder = Path(folder, hub.inside(subfolder))
    with open_adapter(folder) as file:
        config = file.config
        base_record.refuse_other(model, file.settings.get("base"), file.path)
        _refuse_patterns(model, config, file.path)
        events.check("load", model)
        _make_room(model, name, config, file, example_inputs)
        state = state_of(model)
        target = _adapter(state)
        _fill(model, target, file, allow_non_finite)
        new = _new_heads(file, target)
    base_record.warn_if_changed(state, file.settings.get("base"), file.path)
    if new:
        warnings.warn(
            f"{file.path} was trained on a model without {', '.join(new)}: the values there stay the model's, and "
            "train with the adapter",
            stacklevel=3,
        )
    events.changed("load", state)
    return model


def _make_room(model, name: str, config: AptConfig, file: AdapterFile, example_inputs: dict | None) -> None:
    """Make the adapter ``name`` the active one; one of the file's settings that is made if there is none."""
    if not is_patched(model):
        try:
            check = partial(_check_lengths, file)
            patch_checked(model, config, example_inputs, check, initialise=False)
        except ConfigError as error:
            raise AdapterError(f"{file.path} does not fit the {type(inner(model)).__name__}: {error}") from error
        if name != state_of(model).adapter:
            rename(state_of(model), name)
        return
    state, known = state_of(model), adapters(model)
    if name not in known:
        config = replace(config, implementation=state.config.implementation)
        try:
            _check_lengths(file, lengths_of(config, state.sites), state.sites)
            add_checked(model, name, config, initialise=False)
        except ConfigError as error:
            raise AdapterError(f"{file.path} does not fit the {type(inner(model)).__name__}: {error}") from error
        return
    try:
        trained = trainable_names(state.model, config)
    except ConfigError as error:
        raise AdapterError(f"{file.path} does not fit the {type(inner(model)).__name__}: {error}") from error
    if _shape_of(known[name]) != _shape_of(config) or trained != trainable_names(state.model, known[name]):
        raise PatchError(
            f"the model's adapter {name!r} has other settings than {file.path.parent}; load it under another name "
            "(adapter=...), or call apt_kernels.unpatch(model) first"
        )
    if (name, ()) != (state.adapter, state.others):
        set_adapter(model, name)
    if not all(is_as_made(prefix) for prefix in state.prefixes.values()):
        warnings.warn(
            f"the adapter {name!r} is replaced by {file.path.parent}; load(..., adapter=...) keeps both", stacklevel=4
        )


def _check_lengths(file: AdapterFile, lengths: list[int], sites: list) -> None:
    """Raise `AdapterError` before prefixes are made that have other lengths than the file's weights."""
    for site, length in zip(sites, lengths):
        entry = file.entries.get(f"{site.name}.apt.key")
        found = entry.shape[1] if entry is not None and len(entry.shape) == 3 else 0
        if length != found:
            raise AdapterError(
                f"{file.path}: prefix_length gives {site.name} {length} tokens; its weights there have {found}"
            )


def _fill(model, target: _Adapter, file: AdapterFile, allow_non_finite: bool) -> None:
    """Check the file's weights, then write them to the adapter's parameters."""
    parameters = target.all
    with weights.gathered(model, parameters.values(), changed=True), torch.no_grad():
        _check(file, target, named_parameters(model))
        tensors = _split(target.prefixes, file.tensors())
        for name, tensor in tensors.items():
            # In the model's dtype: a large number of a wide dtype is infinite in a narrow one.
            if not allow_non_finite and not _is_finite(tensor.to(parameters[name].dtype)):
                raise AdapterError(
                    f"{file.path}: {name} has values that are not finite; load(..., allow_non_finite=True) loads them"
                )
        for name, tensor in tensors.items():
            offload.write(inner(model), name, parameters[name], tensor)
        remember_saved(target.prefixes.values())


def _split(prefixes: Mapping[str, AdaptivePrefix], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` of a file by the names of the model's parameters: the inverse of `_folded` for frozen tokens."""
    for name, prefix in prefixes.items():
        for frozen, part in _parts(name) if prefix.frozen else ():
            tensors[frozen], tensors[part] = tensors[part].tensor_split([prefix.frozen], dim=1)
    return tensors


def _shape_of(config: AptConfig) -> tuple:
    """The settings on which the set of weights and their meaning depend."""
    frozen = config.num_frozen_tokens or 0
    return config.prefix_length, config.gate, config.layer_scale, config.reparameterisation, config.layers, frozen


def _refuse_patterns(model, config: AptConfig, path: Path) -> None:
    """Raise `AdapterError` where the file's patterns take too much work on the names of this model."""
    base, budget = inner(model), patterns.Budget()
    modules = [name for name, _ in base.named_modules()] if isinstance(base, nn.Module) else []
    parameters = [name for name, _ in base.named_parameters()] if isinstance(base, nn.Module) else []
    try:
        for found, names in ((config.layers, modules), (config.trainable, parameters)):
            for pattern in {entry for entry in cast(Iterable, found or ()) if isinstance(entry, str)}:
                for name in names:
                    patterns.search(pattern, name, budget)
    except patterns.TooMuchWork as error:
        raise AdapterError(f"{path}: {error}") from error


def _check(file: AdapterFile, target: _Adapter, parameters: Mapping[str, Tensor]) -> None:
    """Raise `AdapterError` unless the file has the weights that the adapter needs, and no others."""
    wanted = {name: list(tensor.shape) for name, tensor in {**target.own, **target.beside}.items()}
    for name, prefix in target.prefixes.items():
        for frozen, part in _parts(name) if prefix.frozen else ():
            wanted[part][1] += wanted.pop(frozen)[1]
    for name, entry in file.entries.items():
        if name not in parameters:
            raise AdapterError(f"{file.path} holds {shown(name)}, which the model does not have")
        if name not in wanted:
            raise AdapterError(
                f"{file.path} holds {shown(name)}, which the adapter's settings do not train (trainable is "
                f"{shown(target.config.trainable)}): it would overwrite the base model's"
            )
        if list(entry.shape) != wanted[name]:
            raise AdapterError(f"{file.path}: {name} is {list(entry.shape)}; the model's is {wanted[name]}")
    new = _new_heads(file, target)
    missing = next((name for name in wanted if name not in file.entries and name not in new), None)
    if missing is not None:
        raise AdapterError(f"{file.path} lacks {missing}, which the model needs")


def _new_heads(file: AdapterFile, target: _Adapter) -> list[str]:
    """What the model trains beside the prefixes by default and the adapter's did not have: the head of another task."""
    trained = file.settings.get("trained")
    if target.config.trainable is not None or not isinstance(trained, list):
        return []
    return sorted(name for name in target.beside if name not in file.entries and name not in trained)
