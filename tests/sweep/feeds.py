"""The inputs of each kind of model."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_kernels.hf.discovery import dummy_inputs

LENGTH, DECODER_LENGTH, BATCH = 12, 9, 2


@dataclass(frozen=True)
class Kind:
    """A group of architectures: the auto class that builds them and the mapping that lists them."""

    auto: str
    mapping: str
    title: str


KINDS = {
    "causal": Kind("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "Causal language models"),
    "masked": Kind("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "Masked language models"),
    "seq2seq": Kind("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "Sequence to sequence"),
    "image": Kind("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "Images"),
    "contrastive": Kind(
        "AutoModelForZeroShotImageClassification",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "Images and texts, contrasted",
    ),
    "audio": Kind("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "Audio"),
    "ctc": Kind("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", "Speech recognition by CTC"),
    "speech": Kind("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "Speech to text"),
    "vision-language": Kind(
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "Vision and language",
    ),
}
TEXT = ("causal", "masked", "seq2seq")


def classes(kind: str) -> dict[str, str | tuple[str, ...]]:
    """Every model type of the kind with the name of its class, or the names of several, in the mapping's order."""
    from transformers.models.auto import modeling_auto

    return dict(getattr(modeling_auto, KINDS[kind].mapping))


def architectures(kind: str) -> list[str]:
    """Every model type of the kind, in the mapping's order."""
    return list(classes(kind))


def style(model, kind: str) -> str:
    """``kind``, but "causal" for models that are listed as sequence to sequence and have a decoder only."""
    return "causal" if kind == "seq2seq" and not model.config.is_encoder_decoder else kind


def feeds(model, kind: str) -> list[dict]:
    """Keyword arguments of the forwards to compare: without padding and, where the model knows padding, with it."""
    accepted = inspect.signature(model.forward).parameters
    if kind == "vision-language":
        return _vision_language(model)
    if kind not in TEXT:
        return [_first_that_runs(model, dummy_inputs.candidates(model), 5)]
    plain = _text(model, kind, accepted, padded=False)
    if "attention_mask" not in accepted:
        return [plain]
    return [plain, _text(model, kind, accepted, padded=True)]


def _vision_language(model) -> list[dict]:
    """Text alone if the model accepts it, and text with images if their placeholder tokens are known."""
    found, failure = [], None
    for tries, seed in ((dummy_inputs.candidates(model), 5), (dummy_inputs.multimodal(model), 6)):
        try:
            found.append(_first_that_runs(model, tries, seed))
        except Exception as error:  # raised below if no other inputs work
            failure = failure or error
    if not found:
        raise failure
    return found


def _text(model, kind: str, accepted, padded: bool) -> dict:
    generator = torch.Generator().manual_seed(3 + padded)
    ids = torch.randint(5, 80, (BATCH, LENGTH), generator=generator)
    feed = {"input_ids": ids}
    if padded:
        hidden = slice(0, 4) if kind == "causal" else slice(LENGTH - 4, LENGTH)
        mask = torch.ones_like(ids)
        mask[1, hidden] = 0
        pad = getattr(model.config.get_text_config(), "pad_token_id", None)
        ids[1, hidden] = pad if isinstance(pad, int) and pad >= 0 else 0
        feed["attention_mask"] = mask
    elif kind != "causal" and "attention_mask" in accepted:
        feed["attention_mask"] = torch.ones_like(ids)
    if kind == "seq2seq":
        feed["decoder_input_ids"] = torch.randint(5, 80, (BATCH, DECODER_LENGTH), generator=generator)
    if "use_cache" in accepted:
        feed["use_cache"] = False
    return feed


def part(model) -> dict:
    """The inputs of a part of a model that runs by itself."""
    return _first_that_runs(model, dummy_inputs.candidates(model), 7)


def is_text_alone(model, feed: dict) -> bool:
    """Whether a vision-language model gets text alone."""
    floating = any(isinstance(value, Tensor) and value.is_floating_point() for value in feed.values())
    return "input_ids" in feed and not floating and not model.config.is_encoder_decoder


def _first_that_runs(model, tries, seed: int) -> dict:
    """Random images, audio and tokens, in the first form that the model accepts."""
    generator, failure = torch.Generator().manual_seed(seed), None
    special = _special(model.config)
    for feed in tries:
        feed = {name: _random(name, value, generator, special) for name, value in feed.items()}
        try:
            with torch.no_grad():
                model(**feed)
            return feed
        except Exception as error:  # not accepted by this model: raised below if nothing is
            failure = error
    raise failure or ValueError("no inputs are known for this signature")


def _random(name: str, value, generator, special: set[int]):
    if not isinstance(value, Tensor):
        return value
    if name == "flattened_patches":
        return torch.cat([value[..., :2], torch.randn(value[..., 2:].shape, generator=generator)], dim=-1)
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if name not in ("input_ids", "decoder_input_ids"):
        return value
    keep = torch.isin(value, torch.tensor(sorted(special), dtype=value.dtype))
    return torch.where(keep, value, torch.randint(5, 80, value.shape, generator=generator))


def _special(config) -> set[int]:
    """Ids of the placeholder tokens for images and audio."""
    names = [name for what in ("image", "video", "audio") for name in dummy_inputs._names_of_token(what)]
    return {vars(config)[name] for name in names if isinstance(vars(config).get(name), int)}


def rows(feed: dict, kind: str):
    """The output rows to compare: those of real tokens."""
    mask = feed.get("attention_mask")
    return slice(None) if mask is None or kind not in ("causal", "masked") else mask.bool()


def tell_padding(oracle, feed: dict, kind: str) -> None:
    """The oracle's bidirectional gates read the first real token."""
    mask: Tensor | None = feed.get("attention_mask")
    for module in oracle.modules():
        if hasattr(module, "oracle_params") or hasattr(module, "oracle_prefixes"):
            module.oracle_real = None if mask is None else mask.bool()
