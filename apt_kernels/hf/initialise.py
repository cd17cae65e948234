"""Prefixes initialised from a text's keys and values or from a PEFT checkpoint: exact copies, or an error.

In the source, the prefix has positions 0 to M - 1 and the tokens start at M; here the tokens start at 0. So a text is
run at positions -M to -1, and a checkpoint's keys are rotated by -M (hf/capture.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from ..config import AptConfig, Settings
from ..errors import AdapterError, ArgumentError, ConfigError, PatchError
from . import compat, patching
from .adapter_file import read_tensor
from .capture import SAME, Captured, at_positions, capture, refuse_lengths, refuse_no_decoder, rotated, window_of
from .discovery import dummy_inputs
from .discovery.recording import evaluating
from .state import Model, is_patched, prefixes
from .untrusted import read_json_file, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on


def patch_from_text(
    model: Model,
    input_ids: Tensor | Sequence[int],
    config: AptConfig | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """`patch`, with the keys and values of a text of M tokens as the prefix: the start of CARTRIDGE.

    The patched model begins as an exact copy of the model that reads the text first: its outputs for any tokens are
    those for the text followed by these tokens, except that no sliding window hides the prefix.

    Args:
        model: an unpatched causal model with rotary positions, or none.
        input_ids: the text, ``[M]`` or ``[1, M]``.
        config: an `AptConfig`, or its fields as keywords; ``prefix_length`` is the text's.

    Returns:
        The same model, patched.

    Raises:
        PatchError: the copy could not be exact; the message names why, and the model is as it was.
        ConfigError: a setting does not start at a weight of 1, or is out of range.
        ArgumentError: ``input_ids`` are not the token ids of one text, or the model has no such token.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> text = tokenizer("Answer briefly and name your source.", return_tensors="pt").input_ids
        >>> apt_kernels.patch_from_text(model, text)
    """
    ids = _token_ids(model, input_ids)
    length = ids.shape[1]
    config = _starting_config(model, config, settings, length, min(1, length - 1))
    refuse_no_decoder(model)
    refuse_lengths(model)
    base: Any = model
    ids = ids.to(dummy_inputs.device(model))
    at_positions(model, ids, -length)
    captured = capture(model, ids, torch.arange(-length, 0, device=ids.device)[None])
    tokens = {}
    for name, own in captured.items():
        _check_mask(name, own.mask, length)
        tokens[name] = own.key[0], own.value[0]
    # Other tokens than the text's first: a text of one token has no influence on itself.
    follow = (ids[:, :1] + torch.arange(1, 5, device=ids.device)) % base.get_input_embeddings().weight.shape[0]
    with evaluating(model), torch.no_grad():
        expected = base(input_ids=torch.cat([ids, follow], dim=1), use_cache=False).logits[:, length:]
    return _patch_with(model, config, tokens, follow, expected)


def patch_from_peft(
    model: Model,
    folder: str | os.PathLike,
    config: AptConfig | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """`patch`, with the prefix of a PEFT prefix-tuning or CARTRIDGE checkpoint, with or without its MLP.

    The patched model begins as an exact copy of the PEFT model. The tokens that a cartridge froze stay frozen.

    Args:
        model: the unpatched base model; causal, with rotary positions, or none.
        folder: ``adapter_config.json`` and ``adapter_model.safetensors``, as ``PeftModel.save_pretrained`` writes them.
        config: an `AptConfig`, or its fields as keywords; ``prefix_length`` is the checkpoint's.

    Returns:
        The same model, patched.

    Raises:
        AdapterError: the folder holds no such checkpoint, or one for a model of another shape.
        ArgumentError: ``folder`` is no path.
        PatchError: the copy could not be exact; the message names why, and the model is as it was.
        ConfigError: a setting does not start at a weight of 1, or is out of range.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> apt_kernels.patch_from_peft(model, "peft-checkpoint")
    """
    compat.require("patch_from_peft")
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(
            f"folder is a {type(folder).__name__}; it needs the path of a saved checkpoint: call the PeftModel's "
            "save_pretrained(folder) first"
        )
    flat, layers, frozen = _read_peft(Path(folder))
    length = flat.shape[0]
    config = _starting_config(model, config, settings, length, frozen)
    refuse_no_decoder(model)
    refuse_lengths(model)
    base: Any = model
    device = dummy_inputs.device(model)
    probe = torch.arange(4, device=device)[:, None] + 5
    here, there = at_positions(model, probe.T, -length)
    tokens, source = {}, transformers.DynamicCache(config=base.config.get_text_config())
    dtype = next(model.parameters()).dtype
    for index, (name, own) in enumerate(here.items()):
        layer = getattr(model.get_submodule(name), "layer_idx", index)
        key, value = _layer_of(flat, layers, layer, own, name, Path(folder))
        key, value = key.to(device, dtype), value.to(device, dtype)
        source.update(key[None], value[None], layer)
        _check_mask(name, own.mask, length)
        tokens[name] = rotated(model.get_submodule(name), name, key, own, there[name]), value
    with evaluating(model), torch.no_grad():
        positions = torch.arange(length, length + 4, device=device)[None]
        expected = base(input_ids=probe.T, position_ids=positions, past_key_values=source).logits
    return _patch_with(model, config, tokens, probe.T, expected)


def _token_ids(model, given) -> Tensor:
    """``given`` as ``[1, M]``."""
    needs = "it needs the token ids of one text, [M] or [1, M]"
    if isinstance(given, (str, bytes)):
        raise ArgumentError(f"input_ids is a {type(given).__name__}; {needs}: tokenizer(text).input_ids")
    if isinstance(given, Mapping):
        raise ArgumentError(f"input_ids is a {type(given).__name__}; {needs}: its ['input_ids']")
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"input_ids is a {type(given).__name__}; {needs} ({error})") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ArgumentError(f"input_ids is {ids.dtype}; {needs}")
    if not (ids.ndim == 1 or (ids.ndim == 2 and ids.shape[0] == 1)) or not ids.numel():
        raise ArgumentError(f"input_ids has the shape {list(ids.shape)}; {needs}")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    count = getattr(getattr(embeddings, "weight", None), "shape", [None])[0]
    if count is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ArgumentError(f"input_ids has {wrong}; the model has tokens from 0 to {count - 1}")
    return ids.reshape(1, -1)


def _starting_config(
    model, config: AptConfig | None, settings: Mapping[str, Any], length: int, frozen: int
) -> AptConfig:
    """The settings for a source of ``length`` tokens, of which ``frozen`` stay frozen unless the settings say more."""
    if "prefix_length" in settings:
        raise ConfigError("prefix_length is given; the source determines it")
    if "init" in settings:
        raise ConfigError("init is given; the source determines the initial values")
    if is_patched(model):
        raise PatchError("the model is already patched; call apt_kernels.unpatch(model) first")
    config = patching.make_config(config, {**settings, "prefix_length": length})
    if config.gate != "none" and not config.layer_scale:
        raise ConfigError("layer_scale is False; with a gate, which starts at 1/2, it needs True to start at 1")
    if config.reparameterisation is not None:
        raise ConfigError("reparameterisation is set; no MLP gives the source's keys and values, it needs None")
    return replace(config, num_frozen_tokens=frozen) if config.num_frozen_tokens is None else config


def _check_mask(name: str, mask, length: int) -> None:
    window = window_of(name, mask)
    if window is not None and window <= length:
        raise PatchError(
            f"{name} has a window of {window} tokens, too short for a prefix of {length} tokens and a token of the text"
        )


def _read_peft(folder: Path) -> tuple[Tensor, int, int]:
    """The checkpoint's ``[M, L * 2 * Hkv * D]``, its number of layers L, and of frozen tokens."""
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        given, flat = read_json_file(settings), read_tensor(weights, "prompt_embeddings")
    except FileNotFoundError:
        name = next(path.name for path in (settings, weights) if not path.exists())
        raise AdapterError(f"{folder} has no {name}; pickled checkpoints are not read") from None
    kind = given.get("peft_type") if isinstance(given, dict) else None
    if kind not in ("PREFIX_TUNING", "CARTRIDGE"):
        raise AdapterError(f"{folder} has the peft_type {shown(kind)}; it needs 'PREFIX_TUNING' or 'CARTRIDGE'")
    layers = given.get("num_layers")
    if (
        flat is None
        or flat.ndim != 2
        or not len(flat)
        or type(layers) is not int
        or layers < 1
        or flat.shape[1] % (2 * layers)
    ):
        shape = None if flat is None else list(flat.shape)
        raise AdapterError(
            f"{folder} has prompt_embeddings of {shape} for {shown(layers)} layers; it needs [M, layers * 2 * d]"
        )
    if not torch.isfinite(flat).all():
        raise AdapterError(f"{folder} has prompt_embeddings with values that are not finite")
    # A cartridge's configuration without the number means PEFT's default of 1.
    frozen = given.get("num_frozen_tokens", 1) if kind == "CARTRIDGE" else 0
    if type(frozen) is not int or not 0 <= frozen <= len(flat):
        raise AdapterError(f"{folder} has {shown(frozen)} as num_frozen_tokens; it needs an int from 0 to {len(flat)}")
    return flat, layers, frozen


def _layer_of(flat: Tensor, layers: int, layer: int, own: Captured, name: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Key and value ``[Hkv, M, D]`` of one layer."""
    heads, head_dim = own.key.shape[1], own.key.shape[3]
    width = flat.shape[1] // (2 * layers)
    if layer >= layers or own.value.shape[3] != head_dim or heads * head_dim != width:
        shape = f"{heads} heads of {head_dim} (value {own.value.shape[3]})"
        raise AdapterError(f"{folder} has {layers} layers of width {width}; {name} is layer {layer} with {shape}")
    both = flat.view(flat.shape[0], layers, 2, heads, head_dim)[:, layer]
    return both[:, 0].transpose(0, 1), both[:, 1].transpose(0, 1)


def _patch_with(model, config: AptConfig, tokens: dict, ids: Tensor, expected: Tensor):
    """Patch, set the prefixes, compare the outputs for ``ids`` with the source's; if they differ, undo and raise."""
    with evaluating(model), torch.no_grad():
        bare = model(input_ids=ids, use_cache=False).logits
    patching.patch_checked(model, config, None, initialise=False)
    try:
        found = prefixes(model)
        missing = next((name for name in found if name not in tokens), None)
        if missing:
            raise PatchError(f"{missing} did not run in the forward of the text")
        with torch.no_grad():
            for name, prefix in found.items():
                prefix.copy_(*tokens[name])
        with evaluating(model), torch.no_grad():
            apart = (model(input_ids=ids, use_cache=False).logits - expected).abs().max()
        influence = (expected - bare).abs().max()
        if not apart <= SAME * influence:
            raise PatchError(
                f"with the prefix, the logits of {type(model).__name__} differ from those of the source by "
                f"{apart:.2g}; the source changes them by {influence:.2g}. Its attention depends on positions in a way "
                "that a prefix cannot copy"
            )
    except BaseException:
        patching.unpatch(model)
        raise
    return model
