"""What the attention modules of an unpatched model compute for given tokens: queries, keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import PatchError
from ..attention import function
from ..attention.implementations import implementations, restore_implementations, set_implementation
from ..attention.masks import describe
from .recording import evaluating

_CAPTURE = "apt_kernels_capture"


class Captured(NamedTuple):
    """What an attention module was given: query ``[B, Hq, T, D]``, key ``[B, Hkv, S, D]``, value ``[B, Hkv, S, Dv]``,
    its mask and rotary embedding, and the number that the logits are multiplied with."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: object
    rotary: tuple[Tensor, Tensor] | None
    scaling: float


class _Capture:
    def __init__(self):
        self.found: dict[nn.Module, Captured] = {}
        self.rotary: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(self, module, args, kwargs):
        if isinstance(kwargs.get("position_embeddings"), tuple):
            self.rotary[module] = kwargs["position_embeddings"]


_active: list[_Capture] = []


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **given):
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    running = _active[-1]
    running.found[module] = Captured(query, key, value, attention_mask, running.rotary.get(module), factor)
    given = {"softcap": None, "s_aux": None, **given}
    return function.attend_without_prefix(module, query, key, value, attention_mask, dropout, scaling, given)


AttentionInterface.register(_CAPTURE, _attend)
AttentionMaskInterface.register(_CAPTURE, describe)


def capture(model, body: nn.Module | None = None, **inputs) -> dict[str, Captured]:
    """Run ``inputs`` through the unpatched ``model``, or through its part ``body``.

    Returns what each attention module was given, by its name, in model order. The model is left as it was.

    Raises:
        PatchError: learned positions that the inputs do not reach, or every module attends inline.
    """
    running = _Capture()
    handles = [m.register_forward_pre_hook(running.note, with_kwargs=True) for m in model.modules()]
    before = implementations(model)
    _active.append(running)
    try:
        set_implementation(model, _CAPTURE)
        with evaluating(model), torch.no_grad():
            (model if body is None else body)(**inputs)
    except IndexError as error:
        raise PatchError(
            f"{type(model).__name__} has learned absolute positions, which do not reach below 0 ({error})"
        ) from error
    finally:
        _active.pop()
        for handle in handles:
            handle.remove()
        restore_implementations(model, before)
    if not running.found:
        raise PatchError(f"{type(model).__name__} attends inline; its keys and values cannot be read")
    return {name: running.found[module] for name, module in model.named_modules() if module in running.found}


def sees_positions(here: dict[str, Captured], near: dict[str, Captured]) -> str | None:
    """The first attention module whose values differ for the same single tokens at two positions: its model has
    learned absolute positions. None: no value depends on the position."""
    return next((n for n in here if not torch.allclose(here[n].value, near[n].value, rtol=1e-3, atol=1e-4)), None)
