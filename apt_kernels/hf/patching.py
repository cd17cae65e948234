"""`patch` and `unpatch`: add a prefix to every attention module and freeze the rest, and undo both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..config import AptConfig, Settings
from ..errors import ArgumentError, ConfigError, PatchError, its_type, similar
from ..ops import choose
from ..prefix import gates
from ..prefix.adaptive import AdaptivePrefix
from . import compat, events, offload, precision, unsaved
from .attention import attach as attaching
from .attention import replaced
from .attention.function import Prefixed
from .attention.implementations import (
    forget,
    implementations,
    own_configs,
    remember,
    restore_implementations,
    set_implementation,
)
from .discovery.meshes import shared_generator, with_meshes
from .discovery.recording import record
from .discovery.selection import lengths_of
from .optimizer import log_rates
from .site import Site
from .state import Model, State, inner, is_patched, module_at, remember_start, require_model, state_of
from .trainable import refuse_quantised, trainable_names, warn_of_a_frozen_head
from .transaction import atomic
from .vocabulary import vocabulary_tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing's own from Python 3.11 on

logger = logging.getLogger(__name__)


def patch(
    model: Model,
    config: AptConfig | None = None,
    *,
    example_inputs: dict | None = None,
    **settings: Unpack[Settings],
) -> Model:
    """Add an `AdaptivePrefix` to every attention module of a transformers model, in place, and freeze the rest.

    The model then computes attention by `apt_kernels.attention`; position ids, masks and caches are those of the
    unpatched model. New task heads (parameters outside the base model of a classification, token, question or
    multiple-choice model) stay trainable. Patching again with equal settings changes nothing.

    Args:
        model: a ``transformers.PreTrainedModel`` whose attention goes through transformers' attention interface.
        config: an `AptConfig`; or give its fields as keywords (``prefix_length=16, gate="auto", ...``).
        example_inputs: a dict, the arguments of one small forward, for models whose inputs cannot be guessed. Only
            modules that this forward runs get a prefix. None: text, vision and audio parts are all run.

    Returns:
        The same model.

    Raises:
        ConfigError: a setting is out of range, or a gate would let a token see later ones.
        ArgumentError: ``example_inputs`` is not a dict by the arguments' names.
        PatchError: the model has no attention that can be patched, or is patched with other settings.
        ImplementationError: there is no implementation of that name.

    Examples:
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
        >>> apt_kernels.patch(model, prefix_length=16)
        >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    """
    config = make_config(config, settings)
    return patch_checked(model, config, example_inputs, lambda *_: warn_of_a_frozen_head(inner(model), config))


@atomic
def patch_checked(
    model: Model,
    config: AptConfig,
    example_inputs: dict | None,
    check: Callable[[list[int], list[Site]], None] | None = None,
    *,
    initialise: bool = True,
) -> Model:
    """`patch`; ``check`` gets the length at each site before anything is allocated for it, and may raise.

    Without ``initialise`` the caller overwrites the prefixes, and no vocabulary is read for them.
    """
    base = inner(model)
    require_model(base, "patch")
    if is_patched(base):
        if state_of(base).config == config:
            return model
        raise PatchError(
            "the model is already patched with other settings; call apt_kernels.unpatch(model) first, or "
            "apt_kernels.add_adapter(model, name, ...) to keep both"
        )
    _refuse_second(base)
    _check_example(example_inputs)
    if config.implementation != "auto":
        choose.load(config.implementation)
    events.check("patch", model)
    before = implementations(base)
    own_configs(base)  # before anything is set on the configs
    sites, needed = _sites(base, example_inputs)
    sites = with_meshes(base, sites)
    if check is not None:
        check(lengths_of(config, sites), sites)
    state = State(base, config, before, sites=sites)
    _commit(state, build(base, config, sites, initialise=initialise), needed)
    if initialise:
        log_rates()
    return model


def _refuse_second(model) -> None:
    """Raise `PatchError` where a part of the model, or one of which it is a part, is patched."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "_apt_state", None), State):
            raise PatchError(f"{name} inside the model is patched; call apt_kernels.unpatch on it first")
        if isinstance(module, AdaptivePrefix) or "apt_before" in module.__dict__:
            raise PatchError("the model is part of one that is patched; call apt_kernels.unpatch on that first")


def _check_example(given) -> None:
    needs = "it needs the arguments of one small forward by name, {'input_ids': ...}"
    if given is None or (isinstance(given, Mapping) and given and all(isinstance(name, str) for name in given)):
        return
    found = f"is {its_type(given)}" if not isinstance(given, Mapping) else f"has the names {list(given)}"
    raise ArgumentError(f"example_inputs {found}; {needs}")


def make_config(config: AptConfig | None, settings: Mapping[str, Any]) -> AptConfig:
    unknown = sorted(set(settings) - set(AptConfig.__dataclass_fields__))
    if unknown:
        named = repr(unknown[0]) + similar(unknown[0], AptConfig.__dataclass_fields__)
        raise ConfigError(f"unknown setting {named}; AptConfig has {', '.join(AptConfig.__dataclass_fields__)}")
    if config is not None and not isinstance(config, AptConfig):
        raise ConfigError(f"config is {its_type(config)}; it needs an AptConfig, or settings as keywords")
    return AptConfig(**settings) if config is None else replace(config, **settings)


def _sites(model, example_inputs: dict | None) -> tuple[list[Site], dict[str, str]]:
    before = implementations(model)
    try:
        return record(model, set_implementation, example_inputs)
    finally:
        restore_implementations(model, before)


def build(
    model, config: AptConfig, sites: list[Site], adapter: str = "default", *, initialise: bool = True
) -> dict[str, AdaptivePrefix]:
    """New prefixes by the name of their attention module, for those that get one. Nothing is changed yet.

    ``model`` attends without prefixes. Without ``initialise``, they are drawn as with ``init="normal"``.
    """
    generator, lengths = shared_generator(config.init_seed, sites), lengths_of(config, sites)
    built = {
        site.name: _build(config, site, length, generator, adapter) for site, length in zip(sites, lengths) if length
    }
    if initialise:
        _initialise(model, config, sites, lengths, generator, built)
    for site in sites:
        if site.sharded and site.name in built:
            from ..prefix.sharding import shard_heads

            shard_heads(built[site.name], site.mesh)
    for prefix in built.values():
        remember_start(prefix)
    return built


def _build(config: AptConfig, site: Site, length: int, generator, adapter: str) -> AdaptivePrefix:
    prefix = AdaptivePrefix(
        length,
        site.kv_heads,
        site.head_dim,
        site.value_head_dim,
        site.hidden_size or 0,
        _gate(config.gate, site),
        config.layer_scale,
        config.init_std,
        generator,
        site.device,
        config.reparameterisation,
        config.prefix_dropout,
        config.num_frozen_tokens or 0,
    )
    prefix.name, prefix.cross, prefix.implementation = site.name, site.cross, config.implementation
    prefix.adapter = adapter
    return prefix


@torch.no_grad()
def _initialise(
    model, config: AptConfig, sites: list[Site], lengths: list[int], generator, built: dict[str, AdaptivePrefix]
) -> None:
    """Overwrite the normal start of ``built`` where ``config.init`` says so."""
    if config.init == "zero":
        for prefix in built.values():
            for part in (prefix.frozen_value, prefix.value):
                if part is not None:
                    part.zero_()
    if not config.may_read_vocabulary:
        return
    tokens, reasons = vocabulary_tokens(model, config, sites, lengths, generator)
    if config.init == "vocabulary" and reasons:
        name, reason = next(iter(reasons.items()))
        raise PatchError(f"init is 'vocabulary', but {name} cannot start so: {reason}; use 'auto' or 'normal'")
    reading = [site.name for site in sites if site.name in reasons and "text" in site.senses]
    if reading:
        logger.warning(
            "%d of %d prefixes start from random values (init_std=%g), which may raise the model's loss at first; the "
            "first is %s: %s",
            len(reading),
            len(built),
            config.init_std,
            reading[0],
            reasons[reading[0]],
        )
    for name, (key, value) in tokens.items():
        built[name].copy_(key, value)


def _gate(name: str, site: Site) -> str:
    gate = gates.resolve(name, site)
    if gate.kept_in_cache and (site.causal or site.cross):
        compat.require("gate cache")
    return gate.name


def _commit(state: State, built: dict[str, AdaptivePrefix], needed: dict[str, str]) -> None:
    """Patch the model; ``needed``: the attention implementation of each part of the model, by its name."""
    model: Any = state.model
    state.requires_grad = {name: parameter.requires_grad for name, parameter in state.parameters.items()}
    trainable = trainable_names(model, state.config)
    refuse_quantised(model, trainable)
    state.loaded = offload.load(model, trainable)
    parameters = state.parameters
    state.start = {name: parameters[name].detach().clone() for name in sorted(trainable)}
    state.originals = precision.widen(model, trainable)
    state.originals += precision.widen(model, events.copied_parameters(model), keep=True)
    parameters, added = state.parameters, events.added_parameters(model)
    remember(model, state.token)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable or (id(parameter) in added and parameter.requires_grad))
    for site in state.sites:
        module: Any = module_at(model, site.name)
        module.apt_before = getattr(getattr(module, "config", model.config), "_attn_implementation", None) or "sdpa"
    attach(state, built)
    for part, implementation in needed.items():
        set_implementation(model.get_submodule(part), implementation)
    state.samples = unsaved.samples(state)
    model._apt_state = state
    events.changed("patch", state)


def attach(state: State, built: dict[str, AdaptivePrefix]) -> None:
    """Add the prefixes to their attention modules."""
    sites = [site for site in state.sites if site.name in built]
    replaced.check(sites, partial(module_at, state.model))
    for site in sites:
        module = module_at(state.model, site.name)
        attaching.attach(module, built[site.name].train(module.training), state.token, site.inline)
    for site in state.sites:
        if site.name not in built and any(site.name in parked.prefixes for parked in state.parked.values()):
            attaching.attach(module_at(state.model, site.name), None, state.token, site.inline)


def detach(state: State) -> None:
    """Remove the prefixes; the attention modules then compute as before the patch, or with their next prefix."""
    for module in state.model.modules():
        if isinstance(module._modules.get("apt"), AdaptivePrefix) or isinstance(module, Prefixed):
            attaching.detach(module)


@atomic
def unpatch(model: Model) -> Model:
    """Remove every prefix: outputs and ``requires_grad`` are bit for bit those from before `patch`.

    Returns the same model. Raises `PatchError` if the model is not patched, or is wrapped for distributed training
    (except by FSDP2, which continues with the base model).

    Examples:
        >>> apt_kernels.unpatch(model)
        >>> any("apt" in name.split(".") for name, _ in model.named_parameters())
        False
    """
    state = state_of(model)
    events.check("unpatch", model)
    detach(state)
    for module in state.model.modules():
        module.__dict__.pop("apt_before", None)
    precision.put_back(state.model, state.originals)
    _restore_values(state)
    offload.put_back(state.loaded)
    parameters = state.parameters
    if parameters.keys() == state.requires_grad.keys():
        for name, parameter in parameters.items():
            parameter.requires_grad_(state.requires_grad[name])
    # Otherwise PEFT was added, removed or merged since, and decides what is frozen.
    forget(state.model, state.implementations)
    del state.model._apt_state
    events.changed("unpatch", state)
    return model


def _restore_values(state: State) -> None:
    """Reset what trained beside the prefixes to its values before the first patch."""
    parameters = state.parameters
    for name, start in state.start.items():
        # A module that was replaced since is not changed.
        if name in parameters and parameters[name].shape == start.shape and start.device.type != "meta":
            offload.write(state.model, name, parameters[name], start)


def remove_prefix(state: State, name: str) -> None:
    """Remove the prefix from one attention module, which then computes as before the patch."""
    attaching.detach(module_at(state.model, name))
