"""Several named adapters on one model, one of them active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..config import AptConfig, Settings
from ..errors import ConfigError, PatchError
from . import events, offload, precision, weights
from .attention import attach as attaching
from .attention.rows import BASE
from .discovery.selection import lengths_of
from .patching import attach, build, detach, make_config
from .state import Model, Parked, State, module_at, moved, state_of
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
    first = {name: state.parked[name].config for name in state.others}
    return {state.adapter: state.config, **first, **{name: each.config for name, each in state.parked.items()}}


@atomic
def add_adapter(model: Model, name: str, config: AptConfig | None = None, **settings: Unpack[Settings]) -> Model:
    """Add a new adapter to a patched model and make it the active one; the others keep what they learned.

    `patch` made the adapter ``"default"``. Each adapter has its own prefixes (lengths, gates, layers may differ) and
    its own task heads, which start with their values before the first patch. Only an active adapter's parameters are
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
        raise ConfigError(
            f"name is {name!r}; the model already has an adapter of that name; choose another, or call "
            "apt_kernels.delete_adapter first"
        )
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
def set_adapter(model: Model, name: str | Sequence[str]) -> Model:
    """Make the adapter ``name`` the active one, or several adapters, to train them together.

    The parameters of several active adapters are all parameters of the model: the first one's at ``module.apt``, the
    others' in ``module.apt_others``. Every call then needs ``adapter_names``, which names one of the model's adapters
    for each row, or ``"__base__"``. An adapter is trained by its own rows alone; one without rows in a batch gets no
    gradient (None), so that an optimizer does not change it.

    Args:
        model: a patched model.
        name: an adapter's name, or a list of different names.

    Returns:
        The same model.

    Raises:
        ConfigError: the model has no adapter of that name, or a name is there twice.
        PatchError: within `apt_kernels.disabled`; or, with several names, an adapter trains more than its prefixes,
            such as a task head, or processes share the model's weights.

    Examples:
        >>> apt_kernels.add_adapter(model, "b", prefix_length=8)
        >>> apt_kernels.set_adapter(model, "default")
        >>> list(apt_kernels.adapters(model))
        ['default', 'b']
    """
    state, names = state_of(model), [name] if isinstance(name, str) else name
    events.check("set", model)
    _refuse_disabled(state)
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(each, str) for each in names):
        raise ConfigError(f"name is {name!r}; it needs an adapter's name, or a list of names")
    for each in names:
        _known(state, each)
    if len(set(names)) < len(names):
        raise ConfigError(f"name is {name!r}; each adapter may be there once")
    if tuple(names) == (state.adapter, *state.others):
        return model
    _refuse_exchanged(state)
    if len(names) > 1:
        _refuse_together(state, names)
    _switch(state, names[0])
    _add_others(state, names[1:])
    events.changed("set", state)
    return model


def _refuse_together(state: State, names: Sequence[str]) -> None:
    """Raise `PatchError` unless these adapters can train together."""
    if weights.distributes(state.model):
        raise PatchError("several adapters cannot be active while processes share the model's weights; set one")
    known = adapters(state.model)
    for name in names:
        beside = sorted(trainable_names(state.model, known[name]))
        if beside:
            raise PatchError(
                f"the adapter {name!r} trains {beside[0]} beside its prefixes; a batch has one task head, so that "
                "adapters of a head cannot train together. Set one adapter after the other, or patch with trainable=[]"
            )


def _add_others(state: State, names: Sequence[str]) -> None:
    """Add the prefixes of further adapters to the model, as parameters that train."""
    for name in names:
        for site, prefix in state.parked[name].prefixes.items():
            module = module_at(state.model, site)
            _place(prefix, module)
            attaching.attach_other(module, prefix.train(module.training))
    state.others = tuple(names)


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
    if name in (state.adapter, *state.others):
        raise ConfigError(f"name is {name!r}, an active adapter; switch to another first, or call unpatch(model)")
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
        raise PatchError(
            "the adapter cannot be switched while the prefix is disabled; call set_adapter outside the disabled block"
        )


def refuse_detached(state: State) -> None:
    """Raise `PatchError` if an attention module was replaced, removed or moved since the patch, its prefix with it."""
    for site, length in zip(state.sites, lengths_of(state.config, state.sites)):
        if length and "apt" not in module_at(state.model, site.name)._modules:
            raise moved(site.name, "has no prefix any more: it was replaced")


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
    if not isinstance(name, str) or name not in {state.adapter, *state.parked}:
        names = ", ".join(map(repr, [state.adapter, *state.parked]))
        raise ConfigError(f"name is {name!r}; the model has the adapters {names}")


def _switch(state: State, name: str) -> None:
    """Store the active adapters away and make ``name`` the active one."""
    for module in state.model.modules():
        attaching.detach_others(module)
    state.others = ()
    if name == state.adapter:
        return
    state.parked[state.adapter] = _park(state)
    _restore(state)
    incoming = state.parked.pop(name)
    for site, prefix in incoming.prefixes.items():
        _place(prefix, module_at(state.model, site))
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
