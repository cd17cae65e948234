"""Gradient checkpointing: re-entrant checkpoints of frozen layers, and recomputation without the prefix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import modeling_layers

from ...errors import PatchError
from .. import compat, events


class GradientCheckpointing(events.Integration):
    """A forward pre-hook of the model while it is patched."""

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            _install(state.model)
        elif action == "unpatch":
            _remove(state.model)


def _install(model) -> None:
    if compat.missing("gradient checkpointing"):
        model.register_forward_pre_hook(_RefuseCheckpoints())
        return
    kind = modeling_layers.GradientCheckpointingLayer
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, kind)]
    if layers:
        model.register_forward_pre_hook(_InputsRequireGrad(layers), with_kwargs=True)


def _remove(model) -> None:
    ours = (_InputsRequireGrad, _RefuseCheckpoints)
    for key in [k for k, hook in model._forward_pre_hooks.items() if isinstance(hook, ours)]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


class _RefuseCheckpoints:
    """Forward pre-hook, where transformers lacks what tells how a layer is checkpointed."""

    def __call__(self, module, args):
        if torch.is_grad_enabled() and module.training:
            on = (getattr(each, "gradient_checkpointing", False) is True for each in module.modules())
            if any(on):
                compat.require("gradient checkpointing")


class _InputsRequireGrad:
    """Forward pre-hook: lets gradients through re-entrant checkpoints of a model that is handed ``inputs_embeds``.

    transformers sees to it where the model embeds token ids itself.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, module, args, kwargs):
        _refuse_to_recompute_elsewhere(module, self.layers)
        if not torch.is_grad_enabled() or not any(_reentrant(layer) for layer in self.layers):
            return None
        changed = dict(kwargs)
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) and not given.requires_grad:
                changed[name] = given.detach().requires_grad_()
        return args, changed


def _refuse_to_recompute_elsewhere(model, layers: list[nn.Module]) -> None:
    state = getattr(model, "_apt_state", None)
    if state is None or state.enabled or not torch.is_grad_enabled():
        return
    if any(layer.gradient_checkpointing and layer.training for layer in layers):
        raise PatchError(
            "the prefix is disabled, and gradient checkpointing would recompute the layers with it in the backward; "
            "use torch.no_grad() or model.eval() within apt_kernels.disabled, or model.gradient_checkpointing_disable()"
        )


def _reentrant(layer: nn.Module) -> bool:
    if not (layer.gradient_checkpointing and layer.training):
        return False
    return getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", True)
