"""Calls that change a model are transactions: on any exception the model is as it was before the call."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import calls, events, offload
from .state import State, inner
from .weights import fsdp1, reshard

Function = TypeVar("Function", bound=Callable)
# torch publishes no types for all of it.
_C: Any = torch._C


# One lock for all models, since they may share modules and configs.
_one_at_a_time = threading.RLock()


def atomic(function: Function) -> Function:
    """Decorator of a function whose first argument is a model: all of its changes to the model are made, or none.

    If an error or a KeyboardInterrupt ends the call, the model is restored bit for bit: modules, hooks, attributes,
    configs, `requires_grad`, and the values of trainable parameters.
    """

    @functools.wraps(function)
    def call(model, *args, **kwargs):
        outermost, before = not _one_at_a_time._is_owned(), None
        try:
            with _one_at_a_time:
                reshard(model)
                before = _Snapshot(model)
                with torch.device("cpu"):  # whatever torch.set_default_device says
                    return function(model, *args, **kwargs)
        except BaseException:
            with _one_at_a_time:
                if before is not None:
                    before.restore()
            _release(_one_at_a_time, outermost)
            raise

    return cast(Function, call)


def exclusive(lock: Any) -> Callable[[Function], Function]:
    """Decorator of a function of which one call runs at a time, under ``lock``, a `threading.RLock`."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args, **kwargs):
            outermost = not lock._is_owned()
            try:
                with lock:
                    return function(*args, **kwargs)
            except BaseException:
                _release(lock, outermost)
                raise

        return cast(Function, call)

    return decorate


# Of a function that reads a model: meanwhile no other thread's `atomic` call changes it.
undisturbed = exclusive(_one_at_a_time)


def _release(lock: Any, outermost: bool) -> None:
    """Give the lock back where an interrupt as `with` ended skipped its `__exit__`."""
    while outermost and lock._is_owned():
        lock.release()


class _Snapshot:
    """A snapshot of ``model``. Only the values of trainable parameters are copied; the rest are references."""

    def __init__(self, model):
        is_module = isinstance(model, nn.Module)
        self.model, self.state = (inner(model), _state(model)) if is_module else (None, None)
        modules = list(model.modules()) if is_module else []
        parked = [] if self.state is None else list(self.state.parked.values())
        for adapter in parked:
            modules += [module for prefix in adapter.prefixes.values() for module in prefix.modules()]
        configs = _configs(modules)
        self.classes = [(owner, type(owner)) for owner in (*modules, *configs)]
        hooks = [hook for module in modules for hook in offload.hooks(module)]
        plain = [*modules, *configs, *hooks, *([] if self.state is None else [self.state]), *parked]
        self.attributes = [(owner, dict(owner.__dict__)) for owner in plain]
        self.containers = [
            (container, copy.copy(container))
            for _, attributes in self.attributes
            for container in attributes.values()
            if isinstance(container, (dict, list, set))
        ]
        offloaded = {id(held): held for hook in hooks if (held := offload.in_memory(hook)) is not None}
        self.containers += [(held, copy.copy(held)) for held in offloaded.values()]
        parameters = dict.fromkeys(p for module in modules for p in module._parameters.values() if p is not None)
        self.parameters = [(p, p.requires_grad, p.grad) for p in parameters]
        self.modes = _modes()
        self.values = [] if self.state is None else [_Value(*each) for each in _written(model, self.state)]

    def restore(self) -> None:
        """Undo what changed since. A second KeyboardInterrupt does not end it."""
        while True:
            try:
                _restore_modes(self.modes)
                with torch.no_grad():
                    self._restore()
                return
            except KeyboardInterrupt:
                continue

    def _restore(self) -> None:
        now = None if self.model is None else _state(self.model)
        if self.state is None and now is not None:
            # Patched by this call, which may have written only to what it made trainable.
            named = now.parameters
            for name, value in now.start.items():
                _write(named[name], value)
        for owner, kind in self.classes:
            if type(owner) is not kind:
                owner.__class__ = kind
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


def _modes() -> tuple:
    """The modes of torch and of the calls in this thread: an interrupt as a `with` statement ends skips its end."""
    torch_modes = torch.is_grad_enabled(), torch._C._len_torch_function_stack(), _C._get_torch_function_state()
    return torch_modes, dict(calls.local.__dict__)


def _restore_modes(modes: tuple) -> None:
    (grad_enabled, depth, function_state), local = modes
    torch.set_grad_enabled(grad_enabled)
    _C._set_torch_function_state(function_state)
    while torch._C._len_torch_function_stack() > depth:
        torch._C._pop_torch_function_stack()
    calls.local.__dict__.update(local)


class _Value:
    """The value of one parameter and where it is stored."""

    def __init__(self, root: nn.Module, name: str, parameter: nn.Parameter):
        self.parameter, self.place = parameter, parameter.data
        self.held = [(tensor, tensor.clone()) for tensor in _held(root, name, parameter)]

    def restore(self) -> None:
        here = self.parameter.data
        if here.device != self.place.device or here.dtype != self.place.dtype or here.shape != self.place.shape:
            self.parameter.data = self.place
        for tensor, content in self.held:
            _write(tensor, content)


def _held(root: nn.Module, name: str, parameter: nn.Parameter) -> list[Tensor]:
    """The tensors of this process that hold the value of ``parameter``, which has this name in ``root``."""
    if hasattr(parameter, "ds_tensor"):
        return [parameter.ds_tensor]
    if parameter.device.type != "meta":
        return [parameter.data]
    holder = offload.holder(root, name)
    place, key = ({}, "") if holder is None else holder.place()
    return [place[key]] if key in place else []


def _write(tensor: Tensor, content: Tensor) -> None:
    if tensor.device.type != "meta" and tensor.shape == content.shape:
        tensor.detach().copy_(content)


def _written(model, state: State) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters whose values a call may change: the prefixes of all adapters, and what trains beside them."""
    for adapter in state.parked.values():
        for prefix in adapter.prefixes.values():
            yield from ((prefix, name, parameter) for name, parameter in prefix.named_parameters())
    ours = {id(parameter) for prefix in state.prefixes.values() for parameter in prefix.parameters()}
    for name, parameter in state.parameters.items():
        if name in state.start or id(parameter) in ours:
            yield state.model, name, parameter
    if isinstance(model, fsdp1()):
        yield from ((model, name, each) for name, each in model.named_parameters() if each.requires_grad)


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
