"""What each kind of model is fed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from apt_kernels.hf import inputs

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
        "Vision and language: the text part",
    ),
}
TEXT = ("causal", "masked", "seq2seq")


def architectures(kind: str) -> list[str]:
    """Every model type of the kind, in the mapping's order."""
    from transformers.models.auto import modeling_auto

    return list(getattr(modeling_auto, KINDS[kind].mapping))


def style(model, kind: str) -> str:
    """``kind``, but "causal" for models that are listed as sequence to sequence and have a decoder only."""
    return "causal" if kind == "seq2seq" and not model.config.is_encoder_decoder else kind


def feeds(model, kind: str) -> list[dict]:
    """Keyword arguments of the forwards to compare: without padding and, where the model knows padding, with it."""
    if kind not in TEXT:
        return [_senses(model)]
    accepted = inspect.signature(model.forward).parameters
    plain = _text(model, kind, accepted, padded=False)
    if "attention_mask" not in accepted:
        return [plain]
    return [plain, _text(model, kind, accepted, padded=True)]


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


def _senses(model) -> dict:
    """Random pixels, sounds and tokens, in the first form that the model takes."""
    generator, failure = torch.Generator().manual_seed(5), None
    for feed in inputs.candidates(model):
        feed = {
            name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if isinstance(value, Tensor) and value.is_floating_point()
            else torch.randint(5, 80, value.shape, generator=generator)
            if name in ("input_ids", "decoder_input_ids")
            else value
            for name, value in feed.items()
        }
        try:
            with torch.no_grad():
                model(**feed)
            return feed
        except Exception as error:
            failure = failure or error
    raise failure or ValueError("no inputs are known for this signature")


def rows(feed: dict, kind: str):
    """Which output rows are compared: those of real tokens."""
    mask = feed.get("attention_mask")
    return slice(None) if mask is None or kind not in ("causal", "masked") else mask.bool()


def tell_padding(oracle, feed: dict, kind: str) -> None:
    """The oracle's bidirectional gates read the first real token."""
    mask: Tensor | None = feed.get("attention_mask")
    for module in oracle.modules():
        if hasattr(module, "oracle_params"):
            module.oracle_real = None if mask is None else mask.bool()


def patch_options(model, kind: str) -> dict:
    """Further keyword arguments of `patch`."""
    return {}
