"""Prefixes initialised from a text's keys and values or from a PEFT checkpoint: exact copies, or an error.

In the source, the prefix has positions 0 to M - 1 and the tokens start at M; here the tokens start at 0. So a text is
run at positions -M to -1, and a checkpoint's keys are rotated by -M (hf/capture.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ..config import AptConfig, Settings
from ..errors import AdapterError, ArgumentError, ConfigError, PatchError, its_type
from . import compat, patching, text
from .adapter_file import PEFT_CONFIG, WEIGHTS, read_tensor
from .batches import check_batches, moved, next_token_loss
from .capture import (
    SAME,
    Captured,
    at_positions,
    capture_text,
    read_in_chunks,
    refuse_chunks,
    refuse_lengths,
    refuse_no_decoder,
    rotated,
    window_of,
)
from .discovery import dummy_inputs
from .discovery.recording import evaluating
from .state import Model, is_patched, prefixes, require_model
from .transaction import atomic
from .untrusted import read_json_file, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

logger = logging.getLogger(__name__)

# Tokens after the prefix whose logits are compared with the source's.
_COMPARED = 4
# What to do where a prefix cannot be a copy.
_INSTEAD = "; use patch(model, prefix_length=...), which starts from vocabulary tokens or random values"


class _Source(NamedTuple):
    """Keys and values of a prefix by the names of the attention modules, and what the model computes with them: the
    logits ``expected`` for the tokens ``follow`` after it."""

    tokens: dict[str, tuple[Tensor, Tensor]]
    follow: Tensor
    expected: Tensor


@atomic
def patch_from_text(
    model: Model,
    input_ids: Tensor | str | Sequence[Any],
    config: AptConfig | None = None,
    *,
    tokenizer: Any = None,
    chunk_size: int | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """`patch`, with the keys and values of a text of M tokens as the prefix: the start of CARTRIDGE.

    The patched model begins as an exact copy of the model that reads the text first: its outputs for any tokens are
    those for the text followed by these tokens, except that no sliding window hides the prefix. The first token is
    frozen (``num_frozen_tokens``).

    Args:
        model: an unpatched causal model with rotary positions, or none.
        input_ids: the text: token ids, ``[M]`` or ``[1, M]``; with ``tokenizer`` also a string, or the messages of a
            chat (dicts with ``"role"`` and ``"content"``). With ``batches``: a list of such texts.
        config: an `AptConfig`, or its fields as keywords; ``prefix_length`` is the text's.
        tokenizer: the model's tokenizer; its chat template makes a text of messages, without a generation prompt.
        chunk_size: how many tokens of the text the model reads at a time, the earlier ones from its cache. The memory
            for activations and logits then depends on this number, not on M; the prefix is the same up to rounding.
            None: the whole text at once.
        batches: dicts of the forward's arguments with ``labels``. Each text becomes the prefix in turn, and the one
            with the lowest mean loss over the predicted tokens is chosen. The losses are logged (level INFO).

    Returns:
        The same model, patched.

    Raises:
        PatchError: the copy could not be exact, or ``chunk_size`` is given and the model's cache does not allow it; the
            message names why, and the model is as it was.
        ConfigError: a setting does not start at a weight of 1, or is out of range.
        ArgumentError: ``input_ids`` are not one text (with ``batches``: a list of texts), the model has no such token,
            the tokenizer cannot read it, a batch has no labels or only -100, or ``chunk_size`` is no positive int.

    Examples:
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> text = tokenizer("Answer briefly and name your source.", return_tensors="pt").input_ids
        >>> apt_kernels.patch_from_text(model, text)

        The system message of a chat, read 256 tokens at a time:

        >>> apt_kernels.unpatch(model)
        >>> chat = [{"role": "system", "content": "Answer briefly and name your source."}]
        >>> apt_kernels.patch_from_text(model, chat, tokenizer=tokenizer, chunk_size=256)
    """
    names = ["input_ids"]
    if batches is not None:
        check_batches(batches)
        batches, input_ids = list(moved(batches, dummy_inputs.device(model))), text.candidates(input_ids)
        names = [f"input_ids[{i}]" for i in range(len(input_ids))]
    else:
        text.refuse_several(input_ids, tokenizer)
    given = [input_ids] if batches is None else input_ids
    read = [text.token_ids(model, each, tokenizer, name) for each, name in zip(given, names)]
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ArgumentError(f"chunk_size is {chunk_size!r}; it needs an int of at least 1 or None")
    lengths = [ids.shape[1] for ids in read]
    configs = [_starting_config(model, config, settings, length, min(1, length - 1)) for length in lengths]
    refuse_no_decoder(model, _INSTEAD)
    refuse_lengths(model, _INSTEAD)
    if batches is None:
        return _patch_with(model, configs[0], _read(model, read[0], chunk_size))
    return _patch_with_best(model, read, configs, chunk_size, batches)


def _patch_with_best(model, texts: list[Tensor], configs: list[AptConfig], chunk_size: int | None, batches: list):
    """`_patch_with` the text that has the lowest loss over ``batches``; of equal ones the first."""
    losses: list[float] = []
    best = None
    for number, (ids, config) in enumerate(zip(texts, configs)):
        try:
            source = _read(model, ids, chunk_size)
            _patch_with(model, config, source)
        except PatchError as error:
            raise PatchError(f"input_ids[{number}]: {error}") from error
        loss = next_token_loss(model, batches)
        patching.unpatch(model)
        if best is None or loss < min(losses):
            best = config, source
        losses.append(loss)
    assert best is not None
    logger.info("input_ids[%d] has the lowest of the losses %s", losses.index(min(losses)), losses)
    return _patch_with(model, *best)


def _read(model, ids: Tensor, chunk_size: int | None) -> _Source:
    """The text ``[1, M]`` as the source of a prefix."""
    base: Any = model
    ids, length = ids.to(dummy_inputs.device(model)), ids.shape[1]
    if chunk_size is not None and chunk_size >= length:
        chunk_size = None
    at_positions(model, ids, -length, _INSTEAD)
    if chunk_size is not None:
        refuse_chunks(model, ids)
    captured = capture_text(model, ids, -length, chunk_size)
    count = min(_after(name, own.mask, length) for name, own in captured.items())
    tokens = {name: (own.key[0], own.value[0]) for name, own in captured.items()}
    # Other tokens than the text's first: a text of one token has no influence on itself.
    follow = (ids[:, :1] + torch.arange(1, 1 + count, device=ids.device)) % base.get_input_embeddings().weight.shape[0]
    with evaluating(model), torch.no_grad():
        if chunk_size is None:
            expected = base(input_ids=torch.cat([ids, follow], dim=1), use_cache=False).logits[:, length:]
        else:
            cache = read_in_chunks(model, ids, 0, chunk_size)
            positions = torch.arange(length, length + follow.shape[1], device=ids.device)[None]
            expected = base(input_ids=follow, position_ids=positions, past_key_values=cache).logits
    return _Source(tokens, follow, expected)


@atomic
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
            f"folder is {its_type(folder)}; it needs the path of a saved checkpoint: call the PeftModel's "
            "save_pretrained(folder) first"
        )
    flat, layers, frozen = _read_peft(Path(folder))
    length = flat.shape[0]
    config = _starting_config(model, config, settings, length, frozen)
    refuse_no_decoder(model, _INSTEAD)
    refuse_lengths(model, _INSTEAD)
    base: Any = model
    device = dummy_inputs.device(model)
    follow = torch.arange(_COMPARED, device=device)[None] + 5
    here, there = at_positions(model, follow, -length, _INSTEAD)
    follow = follow[:, : min(_after(name, own.mask, length) for name, own in here.items())]
    tokens, source = {}, transformers.DynamicCache(config=base.config.get_text_config())
    dtype = next(model.parameters()).dtype
    for index, (name, own) in enumerate(here.items()):
        layer = getattr(model.get_submodule(name), "layer_idx", index)
        key, value = _layer_of(flat, layers, layer, own, name, Path(folder))
        key, value = key.to(device, dtype), value.to(device, dtype)
        source.update(key[None], value[None], layer)
        tokens[name] = rotated(model.get_submodule(name), name, key, own, there[name]), value
    with evaluating(model), torch.no_grad():
        positions = torch.arange(length, length + follow.shape[1], device=device)[None]
        expected = base(input_ids=follow, position_ids=positions, past_key_values=source).logits
    return _patch_with(model, config, _Source(tokens, follow, expected))


def _starting_config(
    model, config: AptConfig | None, settings: Mapping[str, Any], length: int, frozen: int
) -> AptConfig:
    """The settings for a source of ``length`` tokens, of which ``frozen`` stay frozen unless the settings say more."""
    if "prefix_length" in settings:
        raise ConfigError("prefix_length is given; the source determines it")
    if "init" in settings:
        raise ConfigError("init is given; the source determines the initial values")
    require_model(model, "patch")
    if is_patched(model):
        raise PatchError("the model is already patched; call apt_kernels.unpatch(model) first")
    config = patching.make_config(config, {**settings, "prefix_length": length})
    if config.gate != "none" and not config.layer_scale:
        raise ConfigError("layer_scale is False; with a gate, which starts at 1/2, it needs True to start at 1")
    if config.reparameterisation is not None:
        raise ConfigError("reparameterisation is set; no MLP gives the source's keys and values, it needs None")
    return replace(config, num_frozen_tokens=frozen) if config.num_frozen_tokens is None else config


def _after(name: str, mask, length: int) -> int:
    """How many of `_COMPARED` tokens after a prefix of ``length`` see all of it in the source, which may hide it by a
    sliding window; `PatchError` if none does, or if the module is not causal."""
    window = window_of(name, mask)
    if window is not None and window <= length:
        raise PatchError(
            f"{name} has a window of {window} tokens, too short for a prefix of {length} tokens and a token of the text"
        )
    return _COMPARED if window is None else min(_COMPARED, window - length)


def _read_peft(folder: Path) -> tuple[Tensor, int, int]:
    """The checkpoint's ``[M, L * 2 * Hkv * D]``, its number of layers L, and of frozen tokens."""
    settings, weights = folder / PEFT_CONFIG, folder / "adapter_model.safetensors"
    try:
        given, flat = read_json_file(settings), read_tensor(weights, "prompt_embeddings")
    except FileNotFoundError:
        if not folder.exists():
            raise AdapterError(
                f"{folder} does not exist; it needs a folder with {settings.name} and {weights.name}"
            ) from None
        if not settings.exists() and (folder / WEIGHTS).exists():
            raise AdapterError(f"{folder} is no PEFT checkpoint; apt_kernels.load(model, folder) reads it") from None
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


def _patch_with(model, config: AptConfig, source: _Source):
    """Patch and set the prefixes; raise `PatchError` if the outputs are not those of the source."""
    follow, expected = source.follow, source.expected
    with evaluating(model), torch.no_grad():
        bare = model(input_ids=follow, use_cache=False).logits
    patching.patch_checked(model, config, None, initialise=False)
    found = prefixes(model)
    missing = next((name for name in found if name not in source.tokens), None)
    if missing:
        raise PatchError(f"{missing} did not run in the forward of the text")
    for name, prefix in found.items():
        prefix.copy_(*source.tokens[name])
    with evaluating(model), torch.no_grad():
        apart = (model(input_ids=follow, use_cache=False).logits - expected).abs().max()
    influence = (expected - bare).abs().max()
    if not apart <= SAME * influence:
        raise PatchError(
            f"with the prefix, the logits of {type(model).__name__} differ from those of the source by {apart:.2g}; "
            f"the source changes them by {influence:.2g}. Its attention depends on positions in a way that a prefix "
            "cannot copy"
        )
    return model
