"""Parameters that accelerate offloads: on the meta device between forwards, with a hook that has their values.

`accelerate.cpu_offload`, `disk_offload`, `dispatch_model` and ``from_pretrained(device_map=...)`` add such hooks to
modules. A value is read and written through its hook. Trained parameters are removed from the hooks, since a parameter
that exists only during a forward has no gradient afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PatchError
from . import compat
from .weights import placed_like


class Holder(NamedTuple):
    """The storage of an offloaded parameter's value."""

    hook: Any  # accelerate's AlignDevicesHook
    key: str  # of the value in the hook's weights_map

    def read(self) -> Tensor:
        return self.hook.weights_map[self.key]

    def write(self, value: Tensor) -> None:
        """Write in memory: a file on disk, which may be a checkpoint of the base model, is not changed."""
        place, key = self.place()
        held = place.get(key)
        if held is None or held.device.type == "meta":
            like = self.read()
            place[key] = value.detach().to(like.device, like.dtype, copy=True)
        else:
            held.copy_(value)

    def place(self) -> tuple[dict, str]:
        """The dict in memory in which accelerate looks for the value first, and the key there."""
        mapping, key = self.hook.weights_map, self.key
        while hasattr(mapping, "dataset"):  # PrefixedDataset
            mapping, key = mapping.dataset, f"{mapping.prefix}{key}"
        return getattr(mapping, "state_dict", mapping), key  # OffloadedWeightsLoader


def hooks(module: nn.Module) -> Iterator:
    """The hooks of accelerate on ``module`` that place its weights."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return
    compat.require("offloading")
    open_ = [hook]
    while open_:
        hook = open_.pop()
        open_ += getattr(hook, "hooks", ())  # SequentialHook
        if hasattr(hook, "weights_map"):
            yield hook


def in_memory(hook) -> dict | None:
    """The dict in which ``hook`` holds values in memory."""
    return None if hook.weights_map is None else Holder(hook, "").place()[0]


def holder(model: nn.Module, name: str) -> Holder | None:
    """The storage of the value of the parameter ``name`` of ``model``; None: no hook has it."""
    owner, _, key = name.rpartition(".")
    while True:
        for hook in hooks(model.get_submodule(owner)):
            if hook.offload and hook.weights_map is not None and (hook.place_submodules or "." not in key):
                return Holder(hook, key)
        if not owner:
            return None
        owner, _, last = owner.rpartition(".")
        key = f"{last}.{key}"


def read(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The value of the parameter ``name`` of ``model``, offloaded or not.

    Raises `PatchError` if it is on the meta device and no hook has its value.
    """
    if parameter.device.type != "meta":
        return parameter
    found = holder(model, name)
    if found is None:
        raise PatchError(
            f"{name} is on the meta device and has no value; give it one before (model.to_empty(device=...) and its "
            "weights)"
        )
    return found.read()


@torch.no_grad()
def write(model: nn.Module, name: str, parameter: Tensor, value: Tensor) -> None:
    """Set the parameter ``name`` of ``model`` to ``value``, offloaded or not. Raises as `read` does."""
    if parameter.device.type != "meta":
        parameter.copy_(placed_like(parameter, value))
        return
    found = holder(model, name)
    if found is None:
        read(model, name, parameter)  # raises
    found.write(value)


def device(module: nn.Module, default: torch.device | None = None) -> torch.device:
    """The device on which ``module`` computes: that of its parameters, or the one where its hooks place them."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for inside in module.modules():
        for hook in hooks(inside):
            if hook.offload and hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return default or next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


class Loaded(NamedTuple):
    """A module whose parameters were removed from its hook, and what `put_back` needs."""

    module: nn.Module
    hook: Any
    parameters: dict[str, Any]  # on the meta device
    buffers: dict[str, Tensor]


def load(model: nn.Module, names: Iterable[str]) -> list[Loaded]:
    """Remove the modules of these parameters from their hooks, so that the parameters can train.

    Raises `PatchError` where a hook places more than one module's parameters, or a parameter is tied to another.
    """
    done: dict[nn.Module, Loaded] = {}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in sorted(names):
        owner = model.get_submodule(name.rpartition(".")[0])
        found = holder(model, name) if model.get_parameter(name).device.type == "meta" else None
        if found is None or owner in done:
            continue
        if found.hook.place_submodules or name in tied or name in tied.values():
            why = "is tied to another parameter" if not found.hook.place_submodules else "is loaded with other modules"
            raise PatchError(
                f"{name} would train with the prefix, but accelerate offloads it, and it {why}: its gradient would be "
                "lost. Leave its module on a device (device_map), or say with trainable= what trains"
            )
        parameters, buffers = _on_meta(owner._parameters), _on_meta(owner._buffers)
        done[owner] = Loaded(owner, found.hook, parameters, buffers)
        for key, parameter in parameters.items():
            value = found.hook.weights_map[key].detach().to(found.hook.execution_device, copy=True)
            owner._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        for key in buffers:
            owner._buffers[key] = found.hook.weights_map[key].to(found.hook.execution_device, copy=True)
        found.hook.offload = False
    return list(done.values())


def put_back(loaded: Iterable[Loaded]) -> None:
    """Undo `load`: the hooks have the values from before it."""
    for module, hook, parameters, buffers in loaded:
        module._parameters.update(parameters)
        module._buffers.update(buffers)
        hook.offload = True


def _on_meta(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if tensor is not None and tensor.device.type == "meta"}
