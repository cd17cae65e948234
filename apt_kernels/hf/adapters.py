"""Several named adapters on one model, one of them active."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..config import AptConfig, Settings
from ..errors import ConfigError, PatchError
from . import events, offload, precision
from .attention.rows import BASE
from .discovery.selection import lengths_of
from .patching import attach, build, detach, make_config
from .state import Model, Parked, State, own_name, state_of
from .trainable import refuse_quantised, trainable_names
from .transaction import atomic

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on


def adapters(model: nn.Module) -> dict[str, AptConfig]:
    """The settings of every adapter by its name, the active one first. `PatchError` if the model is not patched.

    Examples:
        >>> list(apt_kernels.adapters(model))
        ['default']
    """
    state = state_of(model)
    return {state.adapter: state.config, **{name: parked.config for name, parked in state.parked.items()}}


@atomic
def add_adapter(model: Model, name: str, config: AptConfig | None = None, **settings: Unpack[Settings]) -> Model:
    """Add a new adapter to a patched model and make it the active one; the others keep what they learned.

    `patch` made the adapter ``"default"``. Each adapter has its own prefixes (lengths, gates, layers may differ) and
    its own task heads, which start with their values before the first patch. Only the active adapter's parameters are
    parameters of the model: create the optimizer after switching.

    Args:
        model: a patched model.
        name: the new adapter's name.
        config: an `AptConfig`, or give its fields as keywords.

    Returns:
        The same model.

    Raises:
        ConfigError: the name is taken, or a setting is out of range.
        PatchError: the model is not patched, or the prefix is disabled.

    Examples:
        >>> apt_kernels.add_adapter(model, "b", prefix_length=8)
        >>> list(apt_kernels.adapters(model))
        ['b', 'default']
    """
    return add_checked(model, name, make_config(config, settings))


def add_checked(model: Model, name: str, config: AptConfig, *, initialise: bool = True) -> Model:
    """`add_adapter`; without ``initialise`` the caller overwrites the prefixes, and no vocabulary is read for them."""
    state = state_of(model)
    events.check("add", model)
    _refuse_disabled(state)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"name is {name!r}; it needs a string that is not empty")
    if name == BASE:
        raise ConfigError(f"name is {name!r}, which means no adapter in adapter_names; use another")
    if name in adapters(model):
        raise ConfigError(f"name is {name!r}; the model already has an adapter of that name")
    trained = trainable_names(state.model, config)
    refuse_quantised(state.model, trained)
    _refuse_exchanged(state)
    new = trained - state.start.keys()  # no adapter trained it so far
    state.loaded += offload.load(state.model, new)
    state.start.update(_values(state, new))
    state.originals += precision.widen(state.model, new)
    values = {each: state.start[each].clone() for each in trained}
    built = build(state.model, config, state.sites, name, initialise=initialise)
    state.parked[name] = Parked(config, built, values)
    _switch(state, name)
    events.changed("add", state)
    return model


@atomic
def set_adapter(model: Model, name: str) -> Model:
    """Make the adapter ``name`` the active one. Returns the same model.

    Raises `ConfigError` if there is none of that name, `PatchError` within `apt_kernels.disabled`.

    Examples:
        >>> apt_kernels.add_adapter(model, "b", prefix_length=8)
        >>> apt_kernels.set_adapter(model, "default")
        >>> list(apt_kernels.adapters(model))
        ['default', 'b']
    """
    state = state_of(model)
    events.check("set", model)
    _refuse_disabled(state)
    if name != state.adapter:
        _known(state, name)
        _refuse_exchanged(state)
        _switch(state, name)
        events.changed("set", state)
    return model


@atomic
def delete_adapter(model: Model, name: str) -> Model:
    """Delete an adapter that is not active. Returns the same model; `ConfigError` if it is active or unknown.

    Examples:
        >>> apt_kernels.add_adapter(model, "b", prefix_length=8)
        >>> apt_kernels.delete_adapter(model, "default")
        >>> list(apt_kernels.adapters(model))
        ['b']
    """
    state = state_of(model)
    events.check("delete", model)
    if name == state.adapter:
        raise ConfigError(f"name is {name!r}, the active adapter; switch to another first, or call unpatch(model)")
    _known(state, name)
    del state.parked[name]
    events.changed("delete", state)
    return model


def rename(state: State, name: str) -> None:
    """Rename the active adapter; no adapter may have that name yet."""
    state.adapter = name
    for prefix in state.prefixes.values():
        prefix.adapter = name


def _refuse_disabled(state: State) -> None:
    if state.disabled:
        raise PatchError("the adapter cannot be switched while the prefix is disabled")


def refuse_detached(state: State) -> None:
    """Raise `PatchError` if an attention module was replaced or removed since the patch, its prefix with it."""
    found, modules = state.prefixes, {own_name(name) for name, _ in state.model.named_modules()}
    for site, length in zip(state.sites, lengths_of(state.config, state.sites)):
        if site.name not in modules or (length and site.name not in found):
            what = "has no prefix any more: it was replaced" if site.name in modules else "is no longer there: removed"
            raise PatchError(
                f"{site.name} {what} since the patch. Put the old module back, or call apt_kernels.unpatch(model), "
                "change the model, and patch it then"
            )


def _refuse_exchanged(state: State) -> None:
    """Raise `PatchError` if a module that the adapters train was replaced by another since the patch."""
    refuse_detached(state)
    parameters = state.parameters
    for name, start in state.start.items():
        now = parameters.get(name)
        if now is None or now.shape != start.shape:
            found = "is no longer there" if now is None else f"has the shape {list(now.shape)}"
            raise PatchError(
                f"{name} {found}; it had {list(start.shape)} when the adapters were made, which hold values of that "
                "shape. Put the old module back, or call apt_kernels.unpatch(model) and patch the model as it is now"
            )


def _known(state: State, name: str) -> None:
    if not isinstance(name, str) or name not in state.parked:
        names = ", ".join(map(repr, [state.adapter, *state.parked]))
        raise ConfigError(f"name is {name!r}; the model has the adapters {names}")


def _switch(state: State, name: str) -> None:
    """Store the active adapter away and make the stored ``name`` the active one."""
    state.parked[state.adapter] = _park(state)
    _restore(state)
    incoming = state.parked.pop(name)
    for site, prefix in incoming.prefixes.items():
        _place(prefix, state.model.get_submodule(site))
    attach(state, incoming.prefixes)
    _write(state, incoming.values)
    parameters = state.parameters
    for each in incoming.values:
        parameters[each].requires_grad_(True)
    state.adapter, state.config = name, incoming.config


def _park(state: State) -> Parked:
    return Parked(state.config, state.prefixes, _values(state, trainable_names(state.model, state.config)))


def _values(state: State, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of these parameters; offloaded ones are read through their hooks."""
    parameters = state.parameters
    found = {name: parameters[name] for name in names}
    if any(parameter.device.type == "meta" for parameter in found.values()) and _has_no_values(state.model):
        return {name: parameter.detach().clone() for name, parameter in found.items()}
    return {name: offload.read(state.model, name, p).detach().clone() for name, p in found.items()}


def _restore(state: State) -> None:
    """Remove the active adapter from the model: its prefixes, and what it trained beside them."""
    trained = trainable_names(state.model, state.config)
    detach(state)
    _write(state, {name: state.start[name] for name in trained})
    parameters = state.parameters
    for name in trained:
        parameters[name].requires_grad_(False)


def _write(state: State, values: dict[str, Tensor]) -> None:
    parameters = state.parameters
    for name, value in values.items():
        if value.device.type != "meta":
            offload.write(state.model, name, parameters[name], value)


def _has_no_values(model: nn.Module) -> bool:
    """Whether the whole model is on the meta device, to be initialised later."""
    return all(p.device.type == "meta" for p in model.parameters()) and offload.device(model).type == "meta"


def _place(prefix: nn.Module, module: nn.Module) -> None:
    """Move a stored prefix to the device of its attention module, unless a hook holds its values."""
    device = offload.device(module)
    if device.type != "meta" and all(p.device.type != "meta" for p in prefix.parameters()):
        prefix.to(device)
