"""Export of an adapter: PEFT checkpoints, and key/value caches for an unpatched base model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from ..errors import ArgumentError, PatchError
from . import calls, compat, events, offload
from .adapter_file import PEFT_CONFIG, make_folder, replacing, write_tensors, writing
from .capture import SAME, Captured, at_positions, capture, refuse_lengths, refuse_no_decoder, rotated, window_of
from .checkpoint import check_path, trained_beside
from .discovery import dummy_inputs
from .discovery.recording import evaluating
from .folding import folded, refuse_gates
from .probing import probe
from .state import State, module_at, refuse_several, state_of

if TYPE_CHECKING:
    from transformers import DynamicCache

_INSTEAD = ". Use as_past_key_values(model, first_position=0) and pass position_ids that start at 0"
_FORMATS = {"peft": "PREFIX_TUNING", "cartridge": "CARTRIDGE"}


@dataclass(frozen=True)
class Difference:
    """Absolute differences of logits at real tokens over the batches of an approximate `export`.

    Attributes:
        largest, mean: between the exported prefix and the patched model.
        influence: the mean difference between the patched model and the model without its prefix.
        examples: the number of examples (rows) in the batches.
    """

    largest: float
    mean: float
    influence: float
    examples: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.mean:.3g} on average and {self.largest:.3g} at most; the prefix moves them by "
            f"{self.influence:.3g} on average ({self.examples} examples)"
        )


@dataclass(frozen=True)
class Exported:
    """What `export` wrote; ``str()`` gives a summary of one line. ``difference`` is None if the export is exact."""

    folder: Path
    format: str
    length: int
    layers: int
    difference: Difference | None = None

    def __str__(self) -> str:
        how = "exact" if self.difference is None else f"approximate: {self.difference}"
        return f"{self.format}, {self.length} tokens in {self.layers} layers, written to {self.folder}: {how}"


class _Layer(NamedTuple):
    """One layer of the cache: its number, its module's name, key ``[Hkv, M, D]`` and value ``[Hkv, M, Dv]``."""

    number: int
    name: str
    key: Tensor
    value: Tensor


def export(
    model: nn.Module,
    folder: str | os.PathLike,
    format: Literal["peft", "cartridge"] = "peft",
    *,
    max_length: int | None = None,
    approximate: Literal["mean"] | None = None,
    batches: Iterable[dict[str, Tensor]] | None = None,
) -> Exported:
    """Write the active adapter as a PEFT checkpoint, prefix tuning or CARTRIDGE, for use with the unpatched base.

    PEFT puts the prefix into the key/value cache, so keys are rotated by M where the base has rotary embeddings. The
    logits are compared with the model's before anything is written. `patch_from_peft` is the inverse.

    Args:
        model: a patched causal language model whose layers all have a prefix of one length.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``; it is created if needed.
        format: ``"peft"`` (prefix tuning) or ``"cartridge"``.
        max_length: the largest number of tokens, prompt and generated together, with which the checkpoint will be used.
            Needed if layers have a sliding window, because a cached prefix has to stay inside it.
        approximate: ``"mean"``: gates that depend on the input become their mean over ``batches``. None: they are
            refused.
        batches: dicts of keyword arguments of the model's forward, as a data loader yields them; read twice.

    Returns:
        What was written; for an approximation, by how much the logits differ.

    Raises:
        PatchError: the checkpoint could not be exact; the message names why, and nothing is written.
        ArgumentError: an argument is out of range, or ``batches`` and ``approximate`` do not go together.
        ConfigError: ``folder`` is no path.
        AdapterError: the folder cannot be written.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = apt_kernels.patch(model, prefix_length=8, gate="static")
        >>> print(apt_kernels.export(model, "checkpoint"))
        peft, 8 tokens in 2 layers, written to checkpoint: exact
        >>> from peft import PeftModel
        >>> base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> base = PeftModel.from_pretrained(base, "checkpoint")
    """
    check_path(folder)
    kind = _FORMATS.get(format) if isinstance(format, str) else None
    if kind is None:
        raise ArgumentError(f"format is {format!r}; it needs one of {', '.join(map(repr, _FORMATS))}")
    state = state_of(model)
    refuse_several(state, "to export")
    weights, given = _mean_weights(state, approximate, batches)
    _refuse_more(model, state)
    layers = _layers(model, None, max_length, weights)
    flat, settings = _flat(layers), _settings(state, layers, kind)
    difference = None if weights is None or given is None else _difference(state, layers, given)
    folder = Path(folder)
    make_folder(folder)
    with writing(folder):
        write_tensors(folder / "adapter_model.safetensors", {"prompt_embeddings": flat})
        with replacing(folder / PEFT_CONFIG) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    return Exported(folder, format, layers[0].key.shape[1], len(layers), difference)


def as_past_key_values(
    model: nn.Module, batch_size: int = 1, *, first_position: int | None = None, max_length: int | None = None
) -> DynamicCache:
    """The active adapter as a transformers cache of M tokens, for use with any unpatched copy of the base model.

    ``base(input_ids, past_key_values=cache)`` then gives the logits of ``model(input_ids)``; an ``attention_mask`` has
    M ones in front. A forward adds its tokens to the cache, so make one for each sequence.

    Args:
        model: a patched causal language model whose layers all have a prefix of one length.
        batch_size: rows of the cache; with beam search, the number of prompts times ``num_beams``.
        first_position: the position of the first token. None: M, transformers' default, for which rotary keys are
            rotated. 0: the caller passes ``position_ids`` that start at 0; exact for learned absolute positions, too.
        max_length: as for `export`.

    Returns:
        A ``transformers.DynamicCache`` in the dtypes and on the devices of the model's layers.

    Raises:
        PatchError: the cache could not be exact; the message names why.
        ArgumentError: an argument is out of range.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = apt_kernels.patch(model, prefix_length=8, gate="static")
        >>> cache = apt_kernels.as_past_key_values(model, batch_size=2)
        >>> input_ids = torch.tensor([[7, 8, 9], [9, 8, 7]])
        >>> logits = base(input_ids, past_key_values=cache).logits
        >>> torch.allclose(logits, model(input_ids).logits, atol=1e-4)
        True
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ArgumentError(f"batch_size is {batch_size!r}; it needs an int >= 1")
    if first_position is not None and (type(first_position) is not int or first_position):
        raise ArgumentError(f"first_position is {first_position!r}; it needs None (the prefix's length) or 0")
    return _cache(state_of(model), _layers(model, first_position, max_length), batch_size)


def _layers(
    model, first: int | None, max_length: int | None, weights: Mapping[str, list[float]] | None = None
) -> list[_Layer]:
    """The prefix as layers of a cache, in the order of the cache; `PatchError` if it would not be exact."""
    compat.require("export")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ArgumentError(f"max_length is {max_length!r}; it needs an int >= 1, or None")
    state = state_of(model)
    base: Any = state.model
    refuse_several(state, "to export")
    if state.disabled:
        raise PatchError("the prefix is disabled; export it outside of apt_kernels.disabled")
    length = _common_length(state, weights is None)
    refuse_no_decoder(base)
    ids = _probe_ids(base)
    if first is None:
        refuse_lengths(base, _INSTEAD)
        here, there = at_positions(base, ids, length, _INSTEAD)
    else:
        here = there = capture(base, ids.reshape(-1, 1), torch.zeros_like(ids.reshape(-1, 1)))
    layers = []
    for number, (name, (key, value)) in enumerate(folded(model, _widest(base), weights).items()):
        module, own = module_at(base, name), here[name]
        _check_window(name, own, length, max_length)
        key, value = (part.to(own.key.device, own.key.dtype) for part in (key, value))
        if first is None:
            key = rotated(module, name, key, own, there[name])
        layers.append(_Layer(getattr(module, "layer_idx", number), name, key, value))
    layers.sort(key=lambda layer: layer.number)
    if [layer.number for layer in layers] != list(range(len(layers))):
        raise PatchError(f"{type(base).__name__} has attention modules that share a layer of the key/value cache")
    if weights is None:
        _check_copy(state, layers, ids, length if first is None else first)
    return layers


def _common_length(state: State, exact: bool) -> int:
    """The common length of all prefixes. `PatchError` if a cache cannot hold them; only checks that need no forward."""
    prefixes = state.prefixes
    for site in state.sites:
        if site.name in prefixes and not (site.causal and not site.cross):
            raise PatchError(f"{site.name} is {site.kind}; a key/value cache holds causal self-attention alone")
    if _has_alibi(state.model):
        raise PatchError(
            f"{type(state.model).__name__} adds a bias by position (ALiBi) to scores of cached tokens; the prefix was "
            "trained without one"
        )
    if exact:
        refuse_gates(prefixes)
    lengths = {site.name: prefixes[site.name].length if site.name in prefixes else 0 for site in state.sites}
    longest = max(lengths, key=lambda name: lengths[name])
    other = next((name for name in lengths if lengths[name] != lengths[longest]), None)
    if other is not None:
        raise PatchError(
            f"{longest} has {lengths[longest]} prefix tokens and {other} has {lengths[other]}; a key/value cache has "
            "one length for all layers"
        )
    return lengths[longest]


def _has_alibi(base) -> bool:
    known = any("alibi" in name for name in vars(sys.modules[type(base).__module__]))
    return known and getattr(base.config, "alibi", True)


def _widest(base) -> torch.dtype:
    wide = any(parameter.dtype == torch.float64 for parameter in base.parameters())
    return torch.float64 if wide else torch.float32


def _probe_ids(base) -> Tensor:
    weight = base.get_input_embeddings().weight
    return torch.arange(5, 9, device=dummy_inputs.device(base))[None] % weight.shape[0]


def _check_window(name: str, own: Captured, length: int, max_length: int | None) -> None:
    window = window_of(name, own.mask)
    if window is None or (max_length is not None and length + max_length <= window):
        return
    room = window - length
    ask = f"pass max_length, at most {room}, to serve no more tokens" if room > 0 else "no token is left beside it"
    raise PatchError(
        f"{name} has a window of {window} tokens, which would not contain a cached prefix of {length} tokens once the "
        f"sequence is longer: {ask}"
    )


def _cache(state: State, layers: list[_Layer], batch_size: int) -> DynamicCache:
    cache = transformers.DynamicCache(config=state.model.config.get_text_config())
    for layer in layers:
        key, value = (part[None].expand(batch_size, -1, -1, -1) for part in (layer.key, layer.value))
        cache.update(key, value, layer.number)
    return cache


def _check_copy(state: State, layers: list[_Layer], ids: Tensor, first: int) -> None:
    """Raise `PatchError` unless the base with the cache gives the logits of the patched model."""
    base: Any = state.model
    with evaluating(base), torch.no_grad():
        expected = base(input_ids=ids, use_cache=False).logits
        with calls.disabling(state.token):
            bare = base(input_ids=ids, use_cache=False).logits
            positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
            found = base(input_ids=ids, position_ids=positions, past_key_values=_cache(state, layers, 1)).logits
    apart, influence = (found - expected).abs().max(), (expected - bare).abs().max()
    if not apart <= SAME * influence:
        raise PatchError(
            f"with the prefix in the cache, the logits of {type(base).__name__} differ by {apart:.2g}; the prefix "
            f"changes them by {influence:.2g}. Its attention depends on positions in a way that a cache cannot copy"
        )


def _refuse_more(model, state: State) -> None:
    """Raise `PatchError` if the checkpoint would leave out trained parameters."""
    beside = trained_beside(model)
    if beside:
        raise PatchError(f"{beside[0]} was trained beside the prefix; a prefix-tuning checkpoint cannot hold it")
    if events.added_parameters(state.model):
        raise PatchError(
            "the model has parameters of PEFT beside the prefix, which a prefix-tuning checkpoint cannot hold; merge "
            "them into the base model first"
        )


def _flat(layers: list[_Layer]) -> Tensor:
    """``[M, L * 2 * Hkv * D]``, the layout of PEFT's checkpoints."""
    first = layers[0]
    for layer in layers:
        if layer.key.shape != first.key.shape or layer.value.shape != first.key.shape:
            raise PatchError(
                f"{layer.name} has keys of {list(layer.key.shape)} and values of {list(layer.value.shape)}, "
                f"{first.name} keys of {list(first.key.shape)}; PEFT has one shape for all"
            )
    parts = [part.float().cpu().transpose(0, 1) for layer in layers for part in (layer.key, layer.value)]
    return torch.stack(parts, dim=1).flatten(1).contiguous()


def _settings(state: State, layers: list[_Layer], kind: str) -> dict:
    """``adapter_config.json``."""
    heads, length, head_dim = layers[0].key.shape
    settings = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(state.model.config, "name_or_path", None) or None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(layers),
        "num_attention_heads": heads,
        "token_dim": heads * head_dim,
        "num_transformer_submodules": 1,
    }
    frozen = min(state.config.num_frozen_tokens or 0, length)
    own = {"num_frozen_tokens": frozen} if kind == "CARTRIDGE" else {"prefix_projection": False}
    return {**settings, **own}


def _mean_weights(state: State, approximate, batches) -> tuple[dict[str, list[float]] | None, Iterable | None]:
    """The mean factor of every prefix token over the batches, and the batches to read again; None: export is exact."""
    if approximate is None:
        if batches is not None:
            raise ArgumentError("batches is given without approximate; it needs approximate='mean'")
        return None, None
    if approximate != "mean":
        raise ArgumentError(f"approximate is {approximate!r}; it needs 'mean' or None")
    if batches is None:
        raise ArgumentError("approximate is 'mean' and batches is None; it needs batches to average over")
    if iter(batches) is batches:
        batches = list(batches)
    return {layer.name: layer.effective for layer in probe(state.model, batches).layers}, batches


def _difference(state: State, layers: list[_Layer], batches: Iterable[dict]) -> Difference:
    base: Any = state.model
    device, length = offload.device(base), layers[0].key.shape[1]
    largest = apart = moved = 0.0
    numbers = examples = 0
    with evaluating(base), torch.no_grad():
        for batch in batches:
            given = {name: part.to(device) for name, part in batch.items() if isinstance(part, Tensor)}
            given.pop("labels", None)
            rows, mask = len(next(iter(given.values()))), given.get("attention_mask")
            expected = base(**given).logits
            with calls.disabling(state.token):
                bare = base(**given).logits
                if mask is not None:
                    given["attention_mask"] = nn.functional.pad(mask, (length, 0), value=1)
                if "position_ids" in given:
                    given["position_ids"] = given["position_ids"] + length
                found = base(**given, past_key_values=_cache(state, layers, rows)).logits
            real = torch.ones_like(expected[..., 0], dtype=torch.bool) if mask is None else mask.bool()
            error = (found - expected)[real].abs().double()
            largest, apart = max(largest, float(error.max())), apart + float(error.sum())
            moved += float((expected - bare)[real].abs().double().sum())
            numbers, examples = numbers + error.numel(), examples + rows
    return Difference(largest, apart / numbers, moved / numbers, examples)
