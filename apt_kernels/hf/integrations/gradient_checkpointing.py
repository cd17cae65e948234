"""Gradient checkpointing: re-entrant checkpoints of frozen layers, and recomputation without the prefix."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from transformers import modeling_layers

from .. import calls, compat, events


class GradientCheckpointing(events.Integration):
    """A forward pre-hook of the model while it is patched."""

    def changed(self, action: events.Action, state) -> None:
        if action == "patch":
            _install(state.model)
        elif action == "unpatch":
            _remove(state.model)


_FUNCTION = "_gradient_checkpointing_func"


def _install(model) -> None:
    if compat.missing("gradient checkpointing"):
        model.register_forward_pre_hook(_RefuseCheckpoints())
        return
    kind = modeling_layers.GradientCheckpointingLayer
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, kind)]
    if layers:
        for module in _called(model):
            module.register_forward_pre_hook(_BeforeCheckpoints(layers), with_kwargs=True)


def _called(model) -> list[nn.Module]:
    """The model, and its body, which may be called alone."""
    return list(dict.fromkeys((model, getattr(model, "base_model", model))))


def _remove(model) -> None:
    for module in _called(model):
        ours = [
            k for k, h in module._forward_pre_hooks.items() if isinstance(h, (_BeforeCheckpoints, _RefuseCheckpoints))
        ]
        for key in ours:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, _Recomputing):
            setattr(module, _FUNCTION, function.checkpoint)


class _RefuseCheckpoints:
    """Forward pre-hook for releases of transformers without the names that say how a layer is checkpointed."""

    def __call__(self, module, args):
        if torch.is_grad_enabled() and module.training:
            on = (getattr(each, "gradient_checkpointing", False) is True for each in module.modules())
            if any(on):
                compat.require("gradient checkpointing")


class _BeforeCheckpoints:
    """Forward pre-hook: makes ``inputs_embeds`` require a gradient, without which re-entrant checkpoints have none.

    transformers does this for token ids. The checkpoints recompute the layers in the state of the forward
    (`_Recomputing`).
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, module, args, kwargs):
        if not torch.is_grad_enabled():
            return None
        layers = [layer for layer in self.layers if layer.gradient_checkpointing and layer.training]
        if not torch.compiler.is_compiling():  # a compiled backward runs no Python of the model
            for layer in layers:
                _recompute_as_in_the_forward(layer)
        if not any(map(_reentrant, layers)):
            return None
        changed = dict(kwargs)
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) and not given.requires_grad:
                changed[name] = given.detach().requires_grad_()
        return args, changed


def _recompute_as_in_the_forward(layer: nn.Module) -> None:
    checkpoint = getattr(layer, _FUNCTION, None)
    if checkpoint is not None and not isinstance(checkpoint, _Recomputing):
        setattr(layer, _FUNCTION, _Recomputing(checkpoint))


class _Recomputing:
    """transformers' checkpoint function, with recomputation in the state of the thread of the forward."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    @property
    def keywords(self) -> dict:
        return getattr(self.checkpoint, "keywords", {})

    def __call__(self, function, *args, **kwargs):
        if not torch.compiler.is_compiling():
            function = functools.partial(calls.applied, calls.hold(), function)
        return self.checkpoint(function, *args, **kwargs)


def _reentrant(layer: nn.Module) -> bool:
    return getattr(getattr(layer, _FUNCTION, None), "keywords", {}).get("use_reentrant", True)
