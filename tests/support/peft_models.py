"""PEFT's prefix tuning on the tiny models, and the comparisons of the probes."""

from __future__ import annotations

import peft
import torch

from helpers import models

LENGTH, NEW = 4, 6
_TASKS = {
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModel": "FEATURE_EXTRACTION",
}


class Wrong(Exception):
    """Another result than recomputation gives, and no error."""


class AsUnpatched(Exception):
    """The model gives another result than recomputation without any prefix, too."""


def build(family: str, head: str | None = None, **options):
    """A tiny model with a prefix that has an effect. For encoders without a head, PEFT has no masked language model."""
    base = models.build(family, head, **options).double()
    task = _TASKS.get(head)
    if head is None:
        task = "SEQ_2_SEQ_LM" if family in models.SEQ2SEQ else "CAUSAL_LM" if family in models.DECODERS else None
    model = peft.get_peft_model(base, peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH)).double()
    strengthen(model)
    return model.eval()


def strengthen(model, adapter: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"prompt_encoder.{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7)


def prompt(family: str, padding: str | None = None, **options) -> dict:
    given = models.inputs(family, padding, **options)
    given.pop("decoder_input_ids", None)
    return given


def check(condition, what: str) -> None:
    if not condition:
        raise Wrong(what)


def same(found, expected, what: str = "another result than recomputation", rtol=1e-6, atol=1e-8) -> None:
    check(found.shape == expected.shape and torch.allclose(found, expected, rtol=rtol, atol=atol), what)


def prefix_of(model):
    return [p for n, p in model.named_parameters() if "prompt_encoder" in n]


def head_for(family: str) -> str | None:
    return "AutoModelForSequenceClassification" if family in models.ENCODERS else None
