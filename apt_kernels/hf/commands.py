"""The commands for adapters: describe one, compare it with a base model, convert it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import AdapterError, ArgumentError, ConfigError, PatchError, its_type
from . import base_record
from .adapter_file import AdapterFile, open_adapter
from .checkpoint import load, save
from .export import export
from .initialise import patch_from_peft


def inspect(folder: Path) -> str:
    """The contents of an adapter folder as text. `AdapterError` if it is damaged or not an adapter."""
    with open_adapter(folder) as file:
        tensors = file.tensors()
        lines = [*_described(file), f"base       {_base(file.settings.get('base'))}"]
        beside = [name for name in tensors if ".apt." not in name]
        lines += [f"beside     {name} {list(tensors[name].shape)}" for name in beside]
        broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        lines += [f"not finite {name}" for name in broken]
        count, size = (sum(map(each, tensors.values())) for each in (torch.Tensor.numel, lambda x: x.nbytes))
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
        lines.append(f"weights    {len(tensors)} tensors, {count:,} numbers, {size:,} bytes, {dtypes}")
        lines.append(f"checksum   {'matches' if file.has_checksum else 'none (format 1)'}")
    return "\n".join(lines)


def check(base: str, folder: Path, *, model_class: str | None = None, revision: str | None = None) -> list[str]:
    """What differs between ``base`` and the model that the adapter was trained on, as far as it is recorded.

    The base model and the adapter are loaded. Raises `AdapterError` or `PatchError` if the adapter does not fit.
    """
    with open_adapter(folder) as file:
        config = _pretrained(transformers.AutoConfig, base, revision)
        base_record.refuse_other(_OnlyConfig(config), file.settings.get("base"), file.path)
        recorded = file.settings.get("model")
    model = _model(base, model_class or recorded, revision)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load(model, folder)
    found = [str(each.message) for each in said if str(folder) in str(each.message)]
    if recorded is not None and type(model).__name__ != recorded:
        found.append(f"it was saved from a {recorded}; this is {its_type(model)}")
    return found


def convert(
    to: str,
    folder: Path,
    out: Path,
    *,
    base: str | None = None,
    model_class: str | None = None,
    revision: str | None = None,
    max_length: int | None = None,
    texts: Path | None = None,
) -> str:
    """Convert an adapter to a PEFT checkpoint (``to`` is "peft" or "cartridge"), or such a checkpoint to an adapter.

    ``texts``: a file with one text a line, over which gates that depend on the input are averaged.
    """
    if to == "apt":
        if base is None:
            raise ArgumentError(
                "--base is missing; a PEFT checkpoint is converted with its base model, a name or folder"
            )
        model: Any = _model(base, model_class or "AutoModelForCausalLM", revision)
        save(patch_from_peft(model, folder, gate="none", layer_scale=False), out)
        return f"apt, written to {out}: exact"
    with open_adapter(folder) as file:
        record, recorded = file.settings.get("base") or {}, file.settings.get("model")
    base = base or record.get("name_or_path")
    if base is None:
        raise ArgumentError(f"--base is missing, and {folder} does not record the name of its base model")
    model = _model(base, model_class or recorded, revision)
    load(model, folder)
    batches = None if texts is None else _batches(base, revision, texts)
    how: Any = to, None if texts is None else "mean"
    try:
        return str(export(model, out, how[0], max_length=max_length, approximate=how[1], batches=batches))
    except (ConfigError, PatchError) as error:
        if texts is None and "approximate=" in str(error):
            raise type(error)(f"{error}. On the command line: --texts FILE, with one text in each line") from error
        raise


class _OnlyConfig:
    """Takes the place of a model where only its config is read."""

    def __init__(self, config):
        self.config = config


def _described(file: AdapterFile) -> list[str]:
    settings, config = file.settings, file.config
    lengths: Mapping[str, int] = settings.get("lengths") or {}
    lines = [f"adapter    {settings.get('adapter', 'default')!r}, format {settings['format']}"]
    lines.append(f"gate       {config.gate}{', with a layer scale' if config.layer_scale else ''}")
    if len(set(lengths.values())) == 1:
        lines.append(f"prefix     {len(lengths)} attention modules, {next(iter(lengths.values()))} tokens each")
    else:
        lines.append(f"prefix     {len(lengths)} attention modules, {sum(lengths.values())} tokens in all")
        lines += [f"           {name} {length}" for name, length in lengths.items()]
    return lines


def _base(record) -> str:
    if not isinstance(record, dict):
        return "not recorded"
    name = record.get("name_or_path") or "name not recorded"
    revision = f" at revision {record['revision']}" if record.get("revision") else ""
    sizes = ", ".join(f"{key} {value}" for key, value in (record.get("sizes") or {}).items())
    return f"{record.get('model_type') or 'unknown type'}, {name}{revision} ({sizes})"


def _model(base: str, name: str | None, revision: str | None):
    """The base model, of the transformers class ``name``."""
    kind = getattr(transformers, name or "", None)
    if not hasattr(kind, "from_pretrained"):
        raise AdapterError(f"transformers has no model class {name!r}; name one (--model-class)")
    return _pretrained(kind, base, revision, dtype="auto").eval()


def _pretrained(kind, base: str, revision: str | None, **options):
    """``kind.from_pretrained``; `ArgumentError` where ``base`` is none of transformers' models."""
    try:
        return kind.from_pretrained(base, revision=revision, **options)
    except ValueError as error:
        raise ArgumentError(f"{base} cannot be read by transformers' {kind.__name__}: {error}") from error


def _batches(base: str, revision: str | None, texts: Path) -> Iterable[dict]:
    tokenizer = _pretrained(transformers.AutoTokenizer, base, revision)
    lines = [line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [dict(tokenizer(line, return_tensors="pt")) for line in lines]
