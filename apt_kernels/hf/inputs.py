"""Small inputs for the recording pass: what a model's forward may be given, from its signature and its config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Different lengths on the two sides tell cross-attention from self-attention, and from the batch.
QUERIES, ENCODER_TOKENS, BATCH = 7, 8, 2
_SAMPLES, _FRAMES = 4000, 64


def candidates(model, more: int = 0) -> Iterator[dict]:
    """Keyword arguments of ``model.forward`` to try in turn; ``more`` tokens than usual where there are any."""
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    # Some bodies hand everything on (``*args, **kwargs``) and do not say what they take.
    if main == "input_ids" or (main not in accepted and ("input_ids" in accepted or "kwargs" in accepted)):
        yield _tokens(model, accepted, more)
    if "pixel_values" in accepted:
        for size in _image_sizes(model.config):
            pixels = {"pixel_values": torch.zeros(BATCH, _vision(model.config, "num_channels", 3), *size)}
            yield _finished(model, accepted, pixels, more)
            if "input_ids" in accepted:
                yield {**_tokens(model, accepted, more), **_placed(model, pixels)}
    for name in ("input_values", "input_features"):
        if name in accepted:
            for shape in _sound_shapes(model.config, name):
                yield _finished(model, accepted, {name: torch.zeros(BATCH, *shape)}, more)


def _tokens(model, accepted, more: int) -> dict:
    inputs = {"input_ids": _ids(model, ENCODER_TOKENS + more)}
    if "attention_mask" in accepted:
        # With a padding mask, transformers does not look for packed documents: meta tensors could not say.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return _finished(model, accepted, inputs, more)


def _finished(model, accepted, inputs: dict, more: int) -> dict:
    inputs = _placed(model, inputs)
    config = model.config
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _ids(model, QUERIES + more)
    if "use_cache" in vars(config) or "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _ids(model, length: int) -> Tensor:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return torch.full((BATCH, length), 1 if pad == 0 else 0, device=device(model))


def _placed(model, inputs: dict) -> dict:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {
        name: value.to(device(model), dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def device(model) -> torch.device:
    """Where the model's inputs go."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        weight = None
    return weight.device if isinstance(weight, Tensor) else next(model.parameters()).device


def _vision(config, name: str, default):
    for part in (getattr(config, "vision_config", None), config, getattr(config, "backbone_config", None)):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


def _image_sizes(config) -> list[tuple[int, ...]]:
    size = _vision(config, "image_size", None)
    if isinstance(size, dict):
        size = tuple(size.values())
    if isinstance(size, int):
        size = (size, size)
    sizes = [tuple(size)] if isinstance(size, (list, tuple)) else [(64, 64), (224, 224)]
    frames = _vision(config, "num_frames", None)
    return [(frames, *s) for s in sizes] + sizes if isinstance(frames, int) else sizes


def _sound_shapes(config, name: str) -> list[tuple[int, ...]]:
    found = [(_SAMPLES,)] if name == "input_values" else []
    widths = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", "feature_size")
    positions = [getattr(config, part, None) for part in ("max_source_positions", "max_length")]
    for width in (getattr(config, part, None) for part in widths):
        if not isinstance(width, int):
            continue
        lengths = [math.prod((2, p)) for p in positions[:1] if isinstance(p, int)] + [_FRAMES]
        lengths += [p for p in positions[1:] if isinstance(p, int) and p > _FRAMES]
        found += [shape for length in lengths for shape in ((width, length), (length, width))]
    return found
