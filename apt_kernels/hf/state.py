"""The state of a patched model, and the transformers model inside its wrappers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import AptConfig
from ..errors import PatchError, its_type
from ..prefix.adaptive import AdaptivePrefix
from . import calls, compat, events, offload
from .site import Site

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Parked:
    """An adapter that is not active, stored outside of the model: its prefixes, and its values of other parameters."""

    config: AptConfig
    prefixes: dict[str, AdaptivePrefix]
    values: dict[str, Tensor]


class Original(NamedTuple):
    """A half-precision parameter of the base model in whose place a float32 copy trains (`precision.widen`)."""

    module: nn.Module
    key: str
    parameter: nn.Parameter
    keep: bool = False  # whether `unpatch` keeps what the copy learned: PEFT's own copies of heads


@dataclass
class State:
    """The state of a patched model: its settings, its adapters, and what `unpatch` restores."""

    model: PreTrainedModel
    config: AptConfig
    implementations: list[str]  # of `implementations.configs(model)`, in order
    requires_grad: dict[str, bool] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    # Named adapters (hf/adapters.py): the active one's name, the others, and the start of all that any of them trains.
    adapter: str = "default"
    others: tuple[str, ...] = ()  # adapters that train beside the active one; they are in `parked`, too
    parked: dict[str, Parked] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    token: calls.Token = field(default_factory=calls.Token)
    # Weights of the base model into which PEFT merged an adapter since the patch: saved with the prefixes.
    merged: set[str] = field(default_factory=set)
    samples: dict[str, Tensor] = field(default_factory=dict)  # of what the patch froze: `unsaved.samples`
    originals: list[Original] = field(default_factory=list)
    loaded: list[offload.Loaded] = field(default_factory=list)  # what trains, taken out of accelerate's offloading

    @property
    def prefixes(self) -> dict[str, AdaptivePrefix]:
        """The active adapter's prefixes by the name of their attention module, in model order."""
        found = {name: module._modules.get("apt") for name, module in named_modules(self.model).items()}
        return {name: prefix for name, prefix in found.items() if isinstance(prefix, AdaptivePrefix)}

    @property
    def training_prefixes(self) -> list[AdaptivePrefix]:
        """The prefixes of all active adapters: those whose parameters are parameters of the model."""
        return [module for module in self.model.modules() if isinstance(module, AdaptivePrefix)]

    @property
    def disabled(self) -> bool:
        """Whether the model is within `apt_kernels.disabled` in this thread and task."""
        return calls.disabling_of(self.token) is not None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by their names without wrappers."""
        return named_parameters(self.model)


def inner(model):
    """The transformers model inside PEFT's, `torch.compile`'s or data-parallel wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            compat.require("compiled models")
        compiled = getattr(model, "_orig_mod", None)
        found = compiled if isinstance(compiled, nn.Module) else events.inside(model)
        if found is None:
            return model
        model = found


def require_model(model, call: str) -> None:
    """Raise `PatchError` if there is no transformers model in ``model``'s wrappers, for the function ``call``."""
    model = inner(model)
    if isinstance(model, PreTrainedModel):
        return
    parts = model.named_modules() if isinstance(model, nn.Module) else [("model", getattr(model, "model", None))]
    path = next((name for name, part in parts if isinstance(part, PreTrainedModel)), None)
    held = ""
    if path is not None:
        held = "; it holds one: model." + (f"get_submodule({path!r})" if isinstance(model, nn.Module) else path)
    raise PatchError(f"the model is {its_type(model)}; {call} needs a transformers.PreTrainedModel{held}")


# Where wrappers of modules inside the model hold these, by the feature of `compat` that needs the name.
_WRAPPED = {
    "_fsdp_wrapped_module": "fsdp",
    "_checkpoint_wrapped_module": "checkpointed modules",
    "_orig_mod": "compiled models",
}


def own_name(name: str) -> str:
    """A module's or parameter's name without the wrappers inside the model."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def own_module(module: nn.Module) -> nn.Module:
    """The module inside its wrappers."""
    while inside := [(name, part) for name in _WRAPPED if (part := module._modules.get(name)) is not None]:
        name, module = inside[0]
        compat.require(_WRAPPED[name])
    return module


def named_modules(model) -> dict[str, nn.Module]:
    """The modules of the transformers model inside ``model`` by their names without wrappers, in order."""
    return {own_name(name): own_module(module) for name, module in inner(model).named_modules()}


def named_parameters(model) -> dict[str, nn.Parameter]:
    """The parameters of the transformers model inside ``model`` by their names without wrappers."""
    return {own_name(name): parameter for name, parameter in inner(model).named_parameters()}


def is_patched(model) -> bool:
    """Whether `patch` has been applied to the model."""
    return isinstance(getattr(inner(model), "_apt_state", None), State)


def state_of(model) -> State:
    """The patched model's state; `PatchError` if there is none."""
    model = inner(model)
    if not is_patched(model):
        fix = "call apt_kernels.patch(model) first" if isinstance(model, nn.Module) else "pass a patched model instead"
        raise PatchError(f"the {type(model).__name__} is not patched; {fix}")
    return model._apt_state


def moved(site: str, how: str) -> PatchError:
    """The error for an attention module that is not where `patch` found it; ``how``: what happened to it."""
    return PatchError(
        f"{site} {how} since the patch. Put the old module back, or call apt_kernels.unpatch(model), change the model, "
        "and patch it then"
    )


def module_at(model: nn.Module, site: str) -> nn.Module:
    """The attention module at ``site``; `PatchError` if it was removed since the patch, or is one of another site."""
    try:
        module = own_module(model.get_submodule(site))  # wrappers on the way pass attributes on
    except AttributeError:
        raise moved(site, "is no longer there: it was removed") from None
    prefix = module._modules.get("apt")
    if isinstance(prefix, AdaptivePrefix) and prefix.name != site:
        raise moved(site, f"has the prefix of {prefix.name}: it was moved")
    return module


def same_values(now: Tensor, stored: Tensor) -> bool:
    """Whether writing ``stored`` into the parameter ``now``, whose dtype may be another, would leave it as it is."""
    return torch.equal(now.detach(), stored.to(now.device, now.dtype))


def refuse_several(state: State, purpose: str) -> None:
    """Raise `PatchError` if several adapters are active; ``purpose``: what needs one, such as "to prune"."""
    if state.others:
        names = ", ".join(map(repr, (state.adapter, *state.others)))
        raise PatchError(f"the adapters {names} are active together; set the one {purpose}: set_adapter(model, name)")


def prefixes(model: nn.Module) -> dict[str, AdaptivePrefix]:
    """The attention modules' names and their `AdaptivePrefix`, in model order. `PatchError` if not patched.

    Examples:
        >>> for name, prefix in apt_kernels.prefixes(model).items():
        ...     print(name, prefix.layer_scale.item())
    """
    return state_of(model).prefixes


def remember_start(prefix: AdaptivePrefix) -> None:
    """Store a few elements of each parameter of a new prefix, so that `is_as_made` detects a change."""
    prefix.start, prefix.saved = _samples(prefix), {}


def remember_saved(prefixes: Iterable[AdaptivePrefix]) -> None:
    """Store the same for prefixes that are on disk as they are now."""
    for prefix in prefixes:
        prefix.saved = _samples(prefix)


def is_saved(prefix: AdaptivePrefix) -> bool:
    """Whether the prefix is on disk, or has the values that it was made with."""
    now, saved = _samples(prefix), prefix.saved
    return is_as_made(prefix) or (saved.keys() == now.keys() and all(_same(saved[name], now[name]) for name in now))


def is_as_made(prefix: AdaptivePrefix) -> bool:
    """Whether the prefix has the values that it was made with: neither trained nor loaded since."""
    now = _samples(prefix)
    return prefix.start.keys() == now.keys() and all(_same(prefix.start[name], now[name]) for name in now)


def _samples(prefix: AdaptivePrefix) -> dict[str, Tensor]:
    found = {}
    for name, parameter in prefix.named_parameters():
        held = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if held.device.type != "meta":
            found[name] = held.detach().reshape(-1)[:8].cpu().clone()
    return found


def _same(before: Tensor, now: Tensor) -> bool:
    if not len(before) or not len(now):
        return True  # held in pieces by other processes
    if before.dtype != now.dtype:  # cast since
        return before.shape == now.shape and torch.allclose(before.float(), now.float(), rtol=1e-2, atol=1e-6)
    return torch.equal(before, now)
