"""The record of the base model that an adapter was trained on: written by `save`, compared by `load`."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, first_of, its_type
from . import compat, events
from .state import State, inner, own_name
from .untrusted import shown

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
# Values of a config that do not change what a trained model computes: names and files, what is returned, the task head,
# the vocabulary (which may have been extended), and what only matters in training or at the start.
_NO_RESULT = re.compile(
    r"^_|drop|initializer|init_std|_loss|jitter|_token_(id|index)$|dtype|^mask_(time|feature)_|^(tokenizer_class|auto_map|"
    r"transformers_version|model_type|architectures|name_or_path|num_labels|id2label|label2id|problem_type|vocab_size|"
    r"finetuning_task|task_specific_params|quantization_config|tie_word_embeddings|apply_spec_augment|torchscript|"
    r"return_dict|use_cache|output_attentions|output_hidden_states|output_router_logits|gradient_checkpointing|"
    r"chunk_size_feed_forward|pretraining_tp)$"
)
# How many weights are sampled of those with at least two dimensions, and of those with one; how many elements at either
# end of each.
_SAMPLED, _ELEMENTS = 6, 16
# A float32 model and its cast to a narrower dtype have the same hash in that dtype.
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)


def of(state: State) -> dict:
    """The record of the base model: its type, sizes, name, revision and a fingerprint of its weights. For JSON."""
    config = state.model.config
    return {
        "model_type": getattr(config, "model_type", None) or None,
        "sizes": _sizes(config),
        "name_or_path": getattr(config, "name_or_path", None) or None,
        "revision": _revision(config),
        "config": _computation(config),
        "fingerprint": _fingerprint(state),
    }


def _revision(config) -> str | None:
    return getattr(config, "_commit_hash", None) if compat.available("base record") else None


def _sizes(config) -> dict[str, int]:
    found = {}
    for prefix in ("", *getattr(config, "sub_configs", ())):
        part = getattr(config, prefix, None) if prefix else config
        for name in _SIZES:
            value = getattr(part, name, None)
            if type(value) is int:
                found[f"{prefix}.{name}".lstrip(".")] = value
    return found


def _computation(config) -> dict[str, Any]:
    """The values of ``config`` that change what the same weights compute, by name. For JSON."""
    found: dict[str, Any] = {}

    def add(part: dict, start: str) -> None:
        for name, value in part.items():
            if not isinstance(name, str) or _NO_RESULT.search(name):
                continue
            if name == "max_position_embeddings" and "'dynamic'" not in str(part):  # otherwise a limit alone
                continue
            if isinstance(value, dict):
                add(value, f"{start}{name}.")
            elif f"{start}{name}" not in sizes and _is_json(value):
                found[f"{start}{name}"] = list(value) if isinstance(value, tuple) else value

    sizes = _sizes(config)
    add(config.to_dict(), "")
    return found


def _is_json(value) -> bool:
    """Whether a file may hold ``value``: text, a flag, a number of 18 digits at most, or a list of such values."""
    if isinstance(value, (list, tuple)):
        return all(_is_json(each) for each in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, bool)) or (isinstance(value, int) and abs(value) < 10**18)


def _fingerprint(state: State) -> dict[str, dict[str, str]] | None:
    """The hash in each dtype of each sampled weight, by name; None if this process holds no complete weight."""
    ours = {id(p) for prefix in state.training_prefixes for p in prefix.parameters()}
    ours |= events.added_parameters(state.model)
    trained = {plain(name) for name in state.start} | merged_weights(state.model)
    weights = {
        plain(name): p
        for name, p in state.model.named_parameters()
        if id(p) not in ours and plain(name) not in trained and is_whole(p) and not _replaced(name)
    }
    wide = [name for name, p in weights.items() if p.ndim > 1]
    narrow = [name for name, p in weights.items() if p.ndim == 1]
    chosen = [*_spread(wide), *_spread(narrow)]
    return {name: _hashes(weights[name]) for name in chosen} or None


def plain(name: str) -> str:
    """A parameter's name without the parts that PEFT and wrappers add."""
    return own_name(name).replace(".base_layer.", ".")


def _replaced(name: str) -> bool:
    """Whether it is the original of a module that PEFT's `modules_to_save` has copied: the copy is what is used."""
    return ".original_module." in name


def is_whole(parameter: nn.Parameter) -> bool:
    """Whether this process holds the unquantised values: not on the meta device, not a shard."""
    plain = type(parameter) is nn.Parameter and not hasattr(parameter, "ds_id")
    flat = getattr(parameter, "_fsdp_flattened", False)
    values = parameter.device.type != "meta" and parameter.is_floating_point() and parameter.numel() > 0
    return plain and not flat and values


def _spread(names: list[str]) -> list[str]:
    """A few of the names, evenly spaced; the first and the last among them."""
    if len(names) <= _SAMPLED:
        return names
    return [names[i * (len(names) - 1) // (_SAMPLED - 1)] for i in range(_SAMPLED)]


@torch.no_grad()
def sample(weight: Tensor) -> Tensor:
    """A few elements at either end, on the CPU."""
    first = last = weight.detach().reshape(1) if weight.ndim == 0 else weight.detach()
    while first.ndim > 1:
        first, last = first[0], last[-1]
    return torch.cat([first[:_ELEMENTS], last[-_ELEMENTS:]]).cpu()


def _hashes(weight: Tensor) -> dict[str, str]:
    elements = sample(weight)
    dtypes = [d for d in _PRECISIONS if d == elements.dtype or elements.dtype in (torch.float32, torch.float64)]
    return {str(d).removeprefix("torch."): _hash(elements.to(d)) for d in dtypes}


def merged_weights(model: nn.Module) -> set[str]:
    """The weights into which PEFT has merged an adapter that it can take out again, by name."""
    return {
        plain(f"{name}.base_layer.{each}")
        for name, module in model.named_modules()
        if getattr(module, "merged_adapters", None) and isinstance(getattr(module, "base_layer", None), nn.Module)
        for each, _ in module.base_layer.named_parameters()
    }


def _hash(elements: Tensor) -> str:
    data = bytes(elements.contiguous().view(torch.uint8).tolist())
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def refuse_other(model, record, path: Path) -> None:
    """Raise `AdapterError` if ``record`` is of another model type, or of other sizes, than ``model``."""
    refuse_other_config(inner(model).config, record, path)


def refuse_other_config(config, record, path: Path) -> None:
    """`refuse_other` for a transformers config in place of a model."""
    record = _checked(record, path)
    theirs, ours = record["model_type"], getattr(config, "model_type", None) or None
    if theirs is not None and ours is not None and theirs != ours:
        raise AdapterError(f"{path} was trained on a model of the type {shown(theirs)}; this one is {ours!r}")
    sizes = _sizes(config)
    for name, size in record["sizes"].items():
        if name in sizes and sizes[name] != size:
            raise AdapterError(f"{path} was trained on a model with {name} {shown(size)}; this one has {sizes[name]}")


def changed_values(config, record, path: Path) -> str | None:
    """What differs between ``config`` and that of the recorded model, of what changes results; None: nothing."""
    recorded, now = _checked(record, path)["config"], _computation(config)
    differ = [name for name, value in recorded.items() if name in now and now[name] != value]
    if not differ:
        return None
    first = differ[0]
    others = f" (and {len(differ) - 1} more values differ)" if len(differ) > 1 else ""
    return f"{shown(first)} was {shown(recorded[first])}, and this model has {shown(now[first])}{others}"


def warn_if_changed(state: State, record, path: Path) -> None:
    """Warn if values of the base's config or sampled weights differ from those that the adapter was trained on."""
    values = changed_values(state.model.config, record, path)
    if values is not None:
        warnings.warn(f"{path} was trained on a model that computes otherwise: {values}", stacklevel=4)
    record = _checked(record, path)
    recorded, names = record["fingerprint"] or {}, {}
    for name, parameter in state.model.named_parameters():
        names[plain(name)] = parameter
    differ = []
    for name, hashes in recorded.items():
        parameter = names.get(name)
        if parameter is None or not is_whole(parameter) or name in state.start or _replaced(name):
            continue
        now = _hashes(parameter)
        common = hashes.keys() & now.keys()
        if common and not any(hashes[each] == now[each] for each in common):
            differ.append(name)
    if not differ:
        return
    config = state.model.config
    there = _named(record["name_or_path"], record["revision"])
    here = _named(getattr(config, "name_or_path", None) or None, _revision(config))
    advice = f"Both are from {here}."
    if there != here:
        advice = f"It was trained on {there}; this model is {here}. Load the former."
    warnings.warn(
        f"{path} was trained on other weights than this model's: {len(differ)} of {len(recorded)} compared differ, "
        f"{first_of([shown(each) for each in differ])}. {advice} Weights that a checkpoint lacks (transformers lists "
        "them as MISSING) are random at every load: patch(..., trainable=...) lets them train, and save writes them",
        stacklevel=4,
    )


def _named(name: str | None, revision: str | None) -> str:
    text = "a model whose name is not recorded" if name is None else shown(name)
    return text if revision is None else f"{text} at revision {shown(revision)}"


def _checked(record, path: Path) -> dict:
    """``record`` with every field, after a check of their types; an empty one where the file has none."""
    empty: dict[str, Any] = {
        "model_type": None,
        "sizes": {},
        "name_or_path": None,
        "revision": None,
        "config": {},
        "fingerprint": None,
    }
    if record is None:
        return empty
    if not isinstance(record, dict):
        raise AdapterError(f"{path}: its base is {its_type(record)}; it needs a JSON object")
    found = {**empty, **record}
    texts = all(isinstance(found[name], (str, type(None))) for name in ("model_type", "name_or_path", "revision"))
    marks = found["fingerprint"] or {}
    hashes = isinstance(marks, dict) and all(isinstance(each, dict) for each in marks.values())
    if not texts or not isinstance(found["sizes"], dict) or not isinstance(found["config"], dict) or not hashes:
        raise AdapterError(f"{path}: its base has a value of another type than apt_kernels.save writes")
    return found
