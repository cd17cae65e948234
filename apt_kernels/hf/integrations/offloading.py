"""Models that accelerate offloads: what is not supported raises an error."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import PatchError
from .. import events, offload
from ..state import is_patched, state_of


class Offloading(events.Integration):
    """A forward hook of the model while it is patched: offloaded weights have no gradient."""

    def check(self, action: events.Action, model) -> None:
        if action == "prune" and is_patched(model):
            _refuse_to_prune(state_of(model))

    def changed(self, action: events.Action, state) -> None:
        if action == "unpatch":
            for key in [key for key, hook in state.model._forward_hooks.items() if hook is refuse_lost_gradients]:
                del state.model._forward_hooks[key]
            return
        _refuse_hooks_around(state)
        if action == "patch":
            state.model.register_forward_hook(refuse_lost_gradients)


def _refuse_hooks_around(state) -> None:
    """Raise `PatchError` if a hook loads the weights of all modules inside its module, a prefix included."""
    for name, prefix in state.prefixes.items():
        if any(parameter.device.type == "meta" for parameter in prefix.parameters()):
            continue  # offloaded with the model, after the patch
        around = name.split(".")
        for end in range(len(around) + 1):
            module = state.model.get_submodule(".".join(around[:end]))
            if any(hook.offload and hook.place_submodules for hook in offload.hooks(module)):
                raise PatchError(
                    f"accelerate loads {'.'.join(around[:end]) or 'the model'} with all modules inside it "
                    "(preload_module_classes), and would look for the prefix among the offloaded weights; offload the "
                    "model without preload_module_classes"
                )


def _refuse_to_prune(state) -> None:
    for name, prefix in state.prefixes.items():
        for each, parameter in prefix.named_parameters():
            if parameter.device.type == "meta" and offload.holder(prefix, each) is not None:
                raise PatchError(
                    f"accelerate offloads the prefix of {name}; before apt_kernels.prune call "
                    "accelerate.hooks.remove_hook_from_submodules(model)"
                )


def refuse_lost_gradients(model, args, output) -> None:
    """Forward hook: the backward raises if a trainable parameter existed during the forward alone."""
    if "_hf_hook" not in model.__dict__ or not torch.is_grad_enabled():
        return
    lost = _without_gradient(model._apt_state)
    if lost is None:
        return

    def refuse(gradient: Tensor):
        raise PatchError(
            f"{lost} trains, but accelerate offloads it, and its gradient would be lost. Offload the model before "
            "apt_kernels.patch, which then keeps what trains on its device; without training, use torch.no_grad()"
        )

    for tensor in _tensors(output):
        if tensor.requires_grad:
            tensor.register_hook(refuse)


def _tensors(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _without_gradient(state) -> str | None:
    """The first parameter that trains and is offloaded."""
    ours = {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
    for name, parameter in state.parameters.items():
        trains = parameter.requires_grad and (name in state.start or id(parameter) in ours)
        if trains and parameter.device.type == "meta" and offload.holder(state.model, name) is not None:
            return name
    return None
