"""The record of the base model that an adapter was trained on: written by `save`, compared by `load`."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
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


def _fingerprint(state: State) -> dict[str, dict[str, str]] | None:
    """The hash in each dtype of each sampled weight, by name; None if this process holds no complete weight."""
    ours = {id(p) for prefix in state.prefixes.values() for p in prefix.parameters()}
    ours |= events.added_parameters(state.model)
    trained = {_plain(name) for name in state.start}
    weights = {
        _plain(name): p
        for name, p in state.model.named_parameters()
        if id(p) not in ours and _plain(name) not in trained and _is_whole(p)
    }
    wide = [name for name, p in weights.items() if p.ndim > 1]
    narrow = [name for name, p in weights.items() if p.ndim == 1]
    chosen = [*_spread(wide), *_spread(narrow)]
    return {name: _hashes(weights[name]) for name in chosen} or None


def _plain(name: str) -> str:
    """A parameter's name without the parts that PEFT and FullyShardedDataParallel add."""
    return own_name(name).replace(".base_layer.", ".")


def _is_whole(parameter: nn.Parameter) -> bool:
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
def _hashes(weight: Tensor) -> dict[str, str]:
    first, last = weight.detach(), weight.detach()
    while first.ndim > 1:
        first, last = first[0], last[-1]
    sample = torch.cat([first[:_ELEMENTS], last[-_ELEMENTS:]]).cpu()
    dtypes = [d for d in _PRECISIONS if d == sample.dtype or sample.dtype in (torch.float32, torch.float64)]
    return {str(d).removeprefix("torch."): _hash(sample.to(d)) for d in dtypes}


def _hash(sample: Tensor) -> str:
    data = bytes(sample.contiguous().view(torch.uint8).tolist())
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


def warn_if_changed(state: State, record, path: Path) -> None:
    """Warn if sampled weights of the base model differ from those that the adapter was trained on."""
    record = _checked(record, path)
    recorded, names = record["fingerprint"] or {}, {}
    for name, parameter in state.model.named_parameters():
        names[_plain(name)] = parameter
    differ = []
    for name, hashes in recorded.items():
        parameter = names.get(name)
        if parameter is None or not _is_whole(parameter) or name in state.start:
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
    others = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
    warnings.warn(
        f"{path} was trained on other weights than this model's: {shown(differ[0])}{others} differ, of "
        f"{len(recorded)} compared. It was trained on {there}; this model is {here}",
        stacklevel=5,
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
        "fingerprint": None,
    }
    if record is None:
        return empty
    if not isinstance(record, dict):
        raise AdapterError(f"{path}: its base is a {type(record).__name__}; it needs a JSON object")
    found = {**empty, **record}
    texts = all(isinstance(found[name], (str, type(None))) for name in ("model_type", "name_or_path", "revision"))
    marks = found["fingerprint"] or {}
    hashes = isinstance(marks, dict) and all(isinstance(each, dict) for each in marks.values())
    if not texts or not isinstance(found["sizes"], dict) or not hashes:
        raise AdapterError(f"{path}: its base has a value of another type than apt_kernels.save writes")
    return found
