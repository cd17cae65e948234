"""Small inputs for the recording pass, from the signature of a model's forward and from its config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .. import offload

# The two sides differ in length, so that cross-attention differs from self-attention; neither equals the batch.
QUERIES, ENCODER_TOKENS, BATCH = 7, 8, 2
_SAMPLES, _FRAMES = 4000, 64


def candidates(model, more: int = 0) -> Iterator[dict]:
    """Keyword arguments of ``model.forward`` to try in turn, with ``more`` additional tokens where there are tokens."""
    main = getattr(model, "main_input_name", "input_ids")
    accepted = inspect.signature(model.forward).parameters
    others = list(non_text(model, accepted))
    # Some models pass on ``*args, **kwargs`` and do not name what they accept.
    named = main if main in accepted else "input_ids" if "input_ids" in accepted else ""
    if named == "input_ids" or (not named and "kwargs" in accepted and not others):
        yield _tokens(model, accepted, more)
    for other in others:
        yield _finished(model, accepted, other, more)
        if "input_ids" in accepted:
            yield from _joined(model, accepted, other, more)


def multimodal(model) -> Iterator[dict]:
    """Keyword arguments of ``model.forward`` that combine text with images or audio, to try in turn."""
    accepted = inspect.signature(model.forward).parameters
    if "input_ids" in accepted:
        for other in non_text(model, accepted):
            yield from _joined(model, accepted, other, 0)


def _joined(model, accepted, other: dict, more: int) -> Iterator[dict]:
    placeholders = with_placeholders(model, accepted, other, more)
    if placeholders is not None:
        yield placeholders
    given = {**_tokens(model, accepted, more), **_placed(model, other)}
    if "cross_attention_mask" in accepted and "aspect_ratio_mask" in other:
        every = torch.ones(BATCH, given["input_ids"].shape[1], *other["aspect_ratio_mask"].shape[1:])
        given.update(_placed(model, {"cross_attention_mask": every.long()}))
    if "image_attention_mask" in accepted:  # which tokens see which images
        given["image_attention_mask"] = torch.ones_like(given["input_ids"])[..., None]
    yield given


_FEATURES = {"get_image_features": "image", "get_video_features": "video", "get_audio_features": "audio"}


def with_placeholders(model, accepted, other: dict, more: int = 0) -> dict | None:
    """Images or audio with a text that holds their placeholder tokens, one for each feature that the model computes;
    None where the model has no such placeholders."""
    for getter, what in _FEATURES.items():
        token = next((i for i in map(vars(model.config).get, _names_of_token(what)) if isinstance(i, int)), None)
        get = getattr(model, getter, None)
        if token is None or get is None:
            continue
        try:
            with torch.no_grad():
                count = _count_features(get(**_placed(model, other)))
        except Exception:  # the model does not accept this input
            continue
        given = _tokens(model, accepted, more)
        ids = given["input_ids"]
        ids = torch.cat([ids[:, :2], *_enclosed(model, ids, token, count // BATCH, what), ids[:, 2:]], dim=1)
        given["input_ids"] = ids
        if "attention_mask" in given:
            given["attention_mask"] = torch.ones_like(ids)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in accepted:
                given[name] = (ids == token).long()
        return {**given, **_placed(model, other)}
    return None


def _enclosed(model, ids: Tensor, token: int, count: int, what: str) -> list[Tensor]:
    """``count`` tokens of one image, between its start and end tokens where the model has them."""
    kinds = ("audio",) if what == "audio" else (what, "vision")
    around = [
        next((i for k in kinds if isinstance(i := vars(model.config).get(f"{k}_{end}_token_id"), int)), None)
        for end in ("start", "end")
    ]
    run = [(around[0], 1), (token, count), (around[1], 1)]
    return [ids.new_full((BATCH, length), token) for token, length in run if token is not None]


def _names_of_token(what: str) -> tuple[str, ...]:
    return (f"{what}_token_id", f"{what}_token_index", f"{what}_patch_id")


def _count_features(out) -> int:
    """How many rows of features ``get_*_features`` returned for all images together."""
    features = getattr(out, "pooler_output", None)
    features = getattr(out, "last_hidden_state", out) if features is None else features
    if isinstance(features, Tensor):
        return math.prod(features.shape[:-1])
    return sum(math.prod(each.shape[:-1]) for each in features)


def non_text(model, accepted) -> Iterator[dict]:
    """Images and audio for a forward with the arguments ``accepted``, the most likely first.

    Filled with ones, since some models treat images of zeros as padding.
    """
    question = {"qformer_input_ids": _ids(model, 3)} if "qformer_input_ids" in accepted else {}
    for other in (*_images(model, accepted), *_audio(model, accepted)):
        yield {**other, **question}
    for name in ("context", "patch_embeds"):  # hidden states that another part of the model computes
        if name in accepted and isinstance(width := _setting(model.config, "hidden_size", default=None), int):
            states = {name: torch.ones(BATCH, ENCODER_TOKENS, width)}
            mask = torch.ones(BATCH, ENCODER_TOKENS, dtype=torch.long)
            yield {**states, "attention_mask": mask} if "attention_mask" in accepted else states


def _images(model, accepted) -> Iterator[dict]:
    config = model.config
    if "grid_thw" in accepted or "image_grid_thw" in accepted:
        yield from _patches(config, accepted)
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    if "flattened_patches" in accepted:  # each with its row and column before its values
        width = channels * _first(_setting(config, "patch_size", default=16)) ** 2
        values = torch.ones(BATCH, 16, _setting(config, "patch_embed_hidden_size", default=width))
        places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 5)).expand(BATCH, -1, -1)
        yield {"flattened_patches": torch.cat([places, values], 2), "attention_mask": torch.ones(BATCH, 16)}
    if "spatial_shapes" in accepted:
        width = channels * _first(_setting(config, "patch_size", default=16)) ** 2
        shapes = torch.tensor([[4, 4]] * BATCH)
        patches = {"pixel_values": torch.ones(BATCH, 16, width), "spatial_shapes": shapes}
        yield {**patches, "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long)}
    for name in ("pixel_values", "pixel_values_videos"):
        if name not in accepted:
            continue
        for size in _image_sizes(config, name):
            if "aspect_ratio_ids" in accepted:  # tiles of one image
                tiles = _setting(config, "max_num_tiles", default=1)
                mask = torch.ones(BATCH, 1, tiles, dtype=torch.long)
                pixels = torch.ones(BATCH, 1, tiles, channels, *size)
                ids = torch.ones(BATCH, 1, dtype=torch.long)
                yield {name: pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
                continue
            *frames, height, width = size
            images = {name: torch.ones(BATCH, *frames, channels, height, width)}
            yield images
            if "image_sizes" in accepted:
                yield {**images, "image_sizes": torch.tensor([[height, width]] * BATCH)}


def _tokens(model, accepted, more: int) -> dict:
    inputs = {"input_ids": _ids(model, ENCODER_TOKENS + more)}
    if "attention_mask" in accepted:
        # With a padding mask, transformers does not look for packed documents, which would fail on meta tensors.
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
    """The device of the model's inputs."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        weight = None
    if isinstance(weight, Tensor):
        return offload.device(model.get_input_embeddings(), weight.device)
    return offload.device(model)


def _patches(config, accepted) -> Iterator[dict]:
    """The patches of all images in one sequence, ``[patches, values]``, and the grid of each image."""
    channels = _setting(config, "num_channels", "in_channels", "in_chans", default=3)
    side = _first(_setting(config, "patch_size", default=16))
    merge = _first(
        _setting(config, "spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_ratio", default=2)
    )
    merge = merge if isinstance(merge, int) and merge > 0 else 2
    times = _setting(config, "temporal_patch_size", "patch_temporal", default=1)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH)
    name = next(name for name in ("pixel_values", "hidden_states") if name in accepted)
    others = {"grid_thw" if "grid_thw" in accepted else "image_grid_thw": grid}
    if "merge_sizes" in accepted:
        others["merge_sizes"] = torch.ones(BATCH, dtype=torch.long)
    count = int(grid.prod(dim=1).sum())
    yield {name: torch.ones(count, channels * times * side**2), **others}
    yield {name: torch.ones(count, channels, side, side), **others}
    yield {name: torch.ones(1, count, channels, side, side), **others}
    yield {name: torch.ones(count, side * merge, side * merge, channels), **others}


def _image_sizes(config, name: str) -> list[tuple[int, ...]]:
    size = _setting(config, "image_size", default=None)
    if isinstance(size, dict):
        size = tuple(size.values())
    if isinstance(size, int):
        size = (size, size)
    sizes = [tuple(size)] if isinstance(size, (list, tuple)) else [(64, 64), (224, 224)]
    frames = _setting(config, "num_frames", "frames_per_clip", default=None)
    several = [(frames, *s) for s in sizes] if isinstance(frames, int) else []
    # An image and its tiles, as many as one of the model's grid shapes has.
    for shape in _setting(config, "image_grid_pinpoints", default=None) or ():
        several += [(1 + (shape[0] // s[0]) * (shape[1] // s[1]), *s) for s in sizes if s[0] and s[1]]
    # Some models take a number of images, or of tiles, as one more dimension.
    return several + (sizes if name == "pixel_values" else []) + [(1, *s) for s in sizes]


def _audio(model, accepted) -> Iterator[dict]:
    for name in ("input_values", "input_features", "audio_mel"):
        if name not in accepted:
            continue
        for shape in _audio_shapes(model.config, name):
            given = {name: torch.ones(BATCH, *shape)}
            if "input_features_mask" in accepted:
                frames = max(shape) if len(shape) == 2 else shape[0]
                yield {**given, "input_features_mask": torch.ones(BATCH, frames, dtype=torch.long)}
            yield given
            if name == "audio_mel":
                yield {**given, "audio_mel_mask": torch.zeros(BATCH, shape[0], dtype=torch.bool)}


def _audio_shapes(config, name: str) -> list[tuple[int, ...]]:
    found = [(_SAMPLES,), (1, _SAMPLES)] if name == "input_values" else []
    widths = (
        "num_mel_bins",
        "n_mels",
        "feature_projection_input_dim",
        "input_feat_per_channel",
        "input_feat_size",
        "input_dim",
        "feature_size",
    )
    for part in _parts(config):
        positions = [vars(part).get(name) for name in ("max_source_positions", "max_length")]
        for width in (vars(part).get(name) for name in widths):
            if not isinstance(width, int):
                continue
            lengths = [math.prod((2, p)) for p in positions[:1] if isinstance(p, int)] + [_FRAMES]
            lengths += [p for p in positions[1:] if isinstance(p, int) and p > _FRAMES]
            found += [shape for length in lengths for shape in ((width, length), (length, width))]
    return list(dict.fromkeys(found))


def _parts(config) -> list:
    """``config`` and the configs inside it, text and decoder configs last."""
    inside = {n: v for n, v in vars(config).items() if isinstance(v, PreTrainedConfig)}
    last = sorted(inside.items(), key=lambda item: "text" in item[0] or "decoder" in item[0])
    return [config, *(part for _, each in last for part in _parts(each))]


def _setting(config, *names: str, default):
    """The first of ``names`` that one of the configs sets; the vision config comes before all others."""
    parts = _parts(config)
    first = [part for part in (getattr(config, "vision_config", None),) if isinstance(part, PreTrainedConfig)]
    for part in first + parts:
        for name in names:
            if getattr(part, name, None) is not None:
                return getattr(part, name)
    return default


def _first(size) -> int:
    return size[0] if isinstance(size, (list, tuple)) else size
