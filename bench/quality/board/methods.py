"""What the board compares: each method with its candidate settings, and how it prepares a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import apt_kernels
from bench.quality import methods


@dataclass(frozen=True)
class Start:
    """What a prefix starts from."""

    length: int
    text: list[int]  # of at least as many tokens as the longest prefix
    seed: int


@dataclass(frozen=True)
class Method:
    """A row of the board.

    ``candidates``: settings, of which the best on held-out training rows is used; the first, if none are compared.
    ``small``: how many of them the small board compares.
    """

    title: str
    candidates: tuple[dict[str, Any], ...]
    prepare: Callable[[nn.Module, Start, dict[str, Any]], nn.Module]
    small: int = 1


def _apt(model: nn.Module, start: Start, settings: dict, **options) -> nn.Module:
    return apt_kernels.patch_from_text(model, torch.tensor(start.text[: start.length]), **options)


def _adaptive(model, start, settings):
    return _apt(model, start, settings, gate="token")


def _static(model, start, settings):
    return _apt(model, start, settings, gate="static")


def _fixed_scale(model, start, settings):
    # Without its scale of 2, a gate that starts at 1/2 would halve the text: the scale stays, and does not train.
    model = _apt(model, start, settings, gate="token")
    for prefix in apt_kernels.prefixes(model).values():
        prefix.layer_scale.requires_grad_(False)
    return model


def _plain(model, start, settings):
    return _apt(model, start, settings, gate="none", layer_scale=False)


def _plain_same_budget(model, start, settings):
    given = methods.Settings(model="", prefix_length=start.length)
    lengths = methods.same_budget(model, given)
    if len(set(lengths)) != 1 or len(start.text) < lengths[0]:
        raise ValueError(f"a prefix of {lengths[0]} tokens needs layers of one shape and a text of as many tokens")
    return _plain(model, Start(lengths[0], start.text, start.seed), settings)


def _vocabulary(model, start, settings):
    return apt_kernels.patch(model, prefix_length=start.length, gate="token", init="vocabulary", init_seed=start.seed)


def _peft_prefix(model, start, settings):
    import peft

    torch.manual_seed(start.seed)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=start.length, init_weights=settings["init_weights"]
    )
    return peft.get_peft_model(model, config)


def _lora(model, start, settings):
    import peft

    torch.manual_seed(start.seed)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16))


def _full(model, start, settings):
    return model.requires_grad_(True)


def _none(model, start, settings):
    return model.requires_grad_(False)


_RATE = ({"lr": 1e-2},)  # of every parameter; the default of `apt_kernels.parameter_groups` is "apt-slow-gate"
METHODS = {
    "none": Method("not trained", ({"lr": 0.0},), _none),
    "apt": Method("APT (token gate, λ, start from a text)", _RATE, _adaptive),
    "apt-slow-gate": Method("APT, gate's rate 1e-3", ({"lr": 1e-2, "gate_lr": 1e-3},), _adaptive),
    "apt-static": Method("APT, static gate", _RATE, _static),
    "apt-fixed-scale": Method("APT, λ not trained", _RATE, _fixed_scale),
    "apt-vocabulary": Method("APT, start from the vocabulary", _RATE, _vocabulary),
    "prefix": Method("plain prefix, same length", _RATE, _plain),
    "prefix-same-budget": Method("plain prefix, same parameters", _RATE, _plain_same_budget),
    "peft-prefix": Method(
        "PEFT prefix tuning",
        tuple({"init_weights": init, "lr": lr} for lr in (1e-2, 3e-3) for init in ("zero", None)),
        _peft_prefix,
        small=2,
    ),
    "lora": Method("LoRA r 16", tuple({"lr": lr} for lr in (1e-2, 2e-3)), _lora),
    "full": Method("full fine-tuning", tuple({"lr": lr} for lr in (5e-5, 2e-4)), _full),
}
# The page has the differences to each; the seeds that a difference needs are computed from those to the first.
BASELINES = ("apt", "apt-slow-gate")


def obstacle(name: str, base: nn.Module, memory: int | None) -> str | None:
    """Why the method does not fit this machine; None: it does. ``memory``: bytes that are free, None: not known."""
    if name != "full" or memory is None:
        return None
    needed = sum(p.numel() for p in base.parameters()) * 5 * 4  # both copies, gradients and AdamW's moments in float32
    if needed <= memory:
        return None
    return f"it needs {needed / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are free"
