"""A call that changes a model changes it as a whole: on any exception the model is as it was before the call."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..prefix.adaptive import AdaptivePrefix
from . import events
from .state import State, inner
from .weights import fsdp1

Function = TypeVar("Function", bound=Callable)


def atomic(function: Function) -> Function:
    """Decorator of a function whose first argument is a model: all of its changes to the model are done, or none.

    Whatever ends the call early (an error, KeyboardInterrupt), the model is then bit for bit what it was: modules,
    hooks, attributes, configs, `requires_grad`, and the values of what trains.
    """

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        before = _Snapshot(model)
        try:
            return function(model, *args, **kwargs)
        except BaseException:
            before.restore()
            raise

    return call


class _Snapshot:
    """What may change about ``model``. Only the values of what trains are copied; the rest are references."""

    def __init__(self, model):
        is_module = isinstance(model, nn.Module)
        self.model, self.state = (inner(model), _state(model)) if is_module else (None, None)
        modules = list(model.modules()) if is_module else []
        parked = [] if self.state is None else list(self.state.parked.values())
        for adapter in parked:
            modules += [module for prefix in adapter.prefixes.values() for module in prefix.modules()]
        self.classes = [(module, type(module)) for module in modules]
        plain = [*modules, *_configs(modules), *([] if self.state is None else [self.state]), *parked]
        self.attributes = [(owner, dict(owner.__dict__)) for owner in plain]
        self.containers = [
            (container, copy.copy(container))
            for _, attributes in self.attributes
            for container in attributes.values()
            if isinstance(container, (dict, list, set))
        ]
        parameters = dict.fromkeys(p for module in modules for p in module._parameters.values() if p is not None)
        self.parameters = [(p, p.requires_grad, p.grad) for p in parameters]
        # An interrupt as a `with` statement ends skips its `__exit__`.
        self.grad_enabled, self.modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack()
        self.values = [] if self.state is None else [_Value(p) for p in _written(model, self.state, modules)]

    def restore(self) -> None:
        """Undo what changed since. A second KeyboardInterrupt does not end it."""
        while True:
            try:
                while torch._C._len_torch_function_stack() > self.modes:
                    torch._C._pop_torch_function_stack()
                with torch.no_grad():
                    self._restore()
                torch.set_grad_enabled(self.grad_enabled)
                return
            except KeyboardInterrupt:
                continue

    def _restore(self) -> None:
        now = None if self.model is None else _state(self.model)
        if self.state is None and now is not None:
            # Patched by this call: what it may have written to is what it made trainable.
            named = now.parameters
            for name, value in now.start.items():
                _write(named[name], value)
        for module, kind in self.classes:
            if type(module) is not kind:
                module.__class__ = kind
        for owner, attributes in self.attributes:
            _restore_attributes(owner, attributes)
        for container, content in self.containers:
            _restore_container(container, content)
        for parameter, requires_grad, grad in self.parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        for value in self.values:
            value.restore()


class _Value:
    """The value of one parameter: where it is, and what is there."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.place = parameter, parameter.data
        self.held = [(tensor, tensor.clone()) for tensor in _held(parameter)]

    def restore(self) -> None:
        here = self.parameter.data
        if here.device != self.place.device or here.dtype != self.place.dtype or here.shape != self.place.shape:
            self.parameter.data = self.place
        for tensor, content in self.held:
            _write(tensor, content)


def _held(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors of this process that hold the value of ``parameter``."""
    held = [parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else [parameter.data]
    return [tensor for tensor in held if tensor.device.type != "meta"]


def _write(tensor: Tensor, content: Tensor) -> None:
    if tensor.device.type != "meta" and tensor.shape == content.shape:
        tensor.detach().copy_(content)


def _written(model, state: State, modules: list[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters whose values a call may change: the prefixes of all adapters, and what trains beside them."""
    prefixes = [module for module in modules if isinstance(module, AdaptivePrefix)]
    found = {parameter: None for prefix in prefixes for parameter in prefix.parameters()}
    named = state.parameters
    found.update((named[name], None) for name in state.start if name in named)
    if isinstance(model, fsdp1()):
        found.update((parameter, None) for parameter in model.parameters() if parameter.requires_grad)
    return iter(found)


def _state(model) -> State | None:
    found = inner(model).__dict__.get("_apt_state")
    return found if isinstance(found, State) else None


def _configs(modules: list[nn.Module]) -> list:
    """The config objects of ``modules`` and those inside them."""
    found, open_ = {}, [module.__dict__.get("config") for module in modules]
    while open_:
        config = open_.pop()
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            open_ += vars(config).values()
    return list(found.values())


def _restore_attributes(owner, attributes: dict) -> None:
    now, caches = owner.__dict__, events.caches()
    kept = {name: value for name, value in attributes.items() if name in now or name not in caches}
    _restore_container(now, kept)


def _restore_container(container, content) -> None:
    """In place: handles of hooks refer to the container itself. One that did not change is not touched."""
    if isinstance(container, dict):
        unchanged = list(container) == list(content) and all(container[key] is content[key] for key in content)
    elif isinstance(container, list):
        unchanged = len(container) == len(content) and all(a is b for a, b in zip(container, content))
    else:
        unchanged = container == content
    if not unchanged:
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)
