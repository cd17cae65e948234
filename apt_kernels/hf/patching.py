"""`patch`, `unpatch` and `prefixes`: hang a prefix on every attention module, freeze the rest, and take it back."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import dispatch
from ..config import AptConfig
from ..errors import ConfigError, PatchError
from ..prefix import AdaptivePrefix
from . import inline, route
from .record import Site, record


@dataclass
class State:
    """What a patched model remembers: its settings, and what `unpatch` has to restore."""

    config: AptConfig
    implementations: list[str]  # of `configs(model)`, in order
    requires_grad: dict[str, bool] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)


def patch(model, config: AptConfig | None = None, *, example_inputs: dict | None = None, **settings):
    """Hang an `AdaptivePrefix` on every attention module of a transformers model, in place, and freeze the rest.

    The model attends through `apt_kernels.attention` from then on; position ids, masks and caches stay those of the
    unpatched model. New task heads (parameters outside the base model of a classification, token, question or
    multiple-choice model) stay trainable. Patching again with equal settings changes nothing.

    Args:
        model: a ``transformers.PreTrainedModel`` whose attention goes through transformers' attention interface.
        config: an `AptConfig`; or give its fields as keywords (``prefix_length=16, gate="auto", ...``).
        example_inputs: keyword arguments of one small forward, for models that do not take token ids alone.

    Returns:
        The same model.

    Raises:
        ConfigError: a setting is out of range, or a gate would let a token see later ones.
        PatchError: the model has no attention that can be patched, or is patched with other settings.
        ImplementationError: there is no implementation of that name.
    """
    config = make_config(config, settings)
    if not isinstance(model, PreTrainedModel):
        raise PatchError(f"the model is a {type(model).__name__}; patch needs a transformers.PreTrainedModel")
    if is_patched(model):
        if state_of(model).config == config:
            return model
        raise PatchError("the model is already patched with other settings; call apt_kernels.unpatch(model) first")
    if config.implementation != "auto":
        dispatch.load(config.implementation)
    sites, described = _sites(model, example_inputs)
    lengths = [config.length_of(i, len(sites)) for i in range(len(sites))]
    built = _build(config, sites, lengths)
    _commit(model, config, built, route.NAME if described else "eager")
    return model


def make_config(config: AptConfig | None, settings: dict) -> AptConfig:
    unknown = sorted(set(settings) - set(AptConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; AptConfig has {', '.join(AptConfig.__dataclass_fields__)}")
    return AptConfig(**settings) if config is None else replace(config, **settings)


def _sites(model, example_inputs: dict | None) -> tuple[list[Site], bool]:
    before = [config._attn_implementation for config in configs(model)]
    try:
        return record(model, lambda name: set_implementation(model, name), example_inputs)
    finally:
        for config, name in zip(configs(model), before):
            config._attn_implementation_internal = name


def set_implementation(model, name: str) -> None:
    for config in configs(model):
        config._attn_implementation_internal = name


def configs(model) -> list:
    """Every config object that a module of the model reads, once each, in module order."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def _build(config: AptConfig, sites: list[Site], lengths: list[int]) -> list[tuple[Site, AdaptivePrefix | None]]:
    generator = None if config.init_seed is None else torch.Generator().manual_seed(config.init_seed)
    built = []
    for site, length in zip(sites, lengths):
        prefix = None
        if length:
            gate = _gate(config.gate, site)
            prefix = AdaptivePrefix(
                length,
                site.kv_heads,
                site.head_dim,
                site.value_head_dim,
                site.hidden_size or 0,
                gate,
                config.layer_scale,
                config.init_std,
                generator,
                site.device,
                config.reparameterisation,
                config.prefix_dropout,
            )
            prefix.name, prefix.cross, prefix.implementation = site.name, site.cross, config.implementation
        built.append((site, prefix))
    return built


def _gate(gate: str, site: Site) -> str:
    if gate == "auto" and site.hidden_size is None:
        return "static"
    if gate in ("first", "mean", "token") and site.hidden_size is None:
        raise ConfigError(
            f"gate is {gate!r}, but {site.name} is not handed one hidden state for every query; use 'static' or 'none'"
        )
    if gate == "auto":
        return "token" if site.causal or site.cross else "first"
    if gate == "mean" and (site.causal or site.cross):
        raise ConfigError(
            f"gate is 'mean', but {site.name} is {site.kind}: the mean over all tokens would let a token see later "
            "ones; use 'token', 'first', 'static' or 'none'"
        )
    return gate


def _commit(model, config: AptConfig, built: list[tuple[Site, AdaptivePrefix | None]], implementation: str) -> None:
    modules = dict(model.named_modules())
    state = State(config, [own._attn_implementation for own in configs(model)])
    state.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainable = _trainable(model, config)
    _own_configs(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    for site, prefix in built:
        module = modules[site.name]
        if prefix is None:
            module.apt_before = getattr(getattr(module, "config", model.config), "_attn_implementation", "sdpa")
            continue
        module.apt = prefix.train(module.training)
        module.register_forward_pre_hook(route.before, with_kwargs=True)
        module.register_forward_hook(route.after)
        if site.inline is not None:
            inline.defer(module, site.inline)
        state.sites.append(site.name)
    set_implementation(model, implementation)
    _let_reentrant_checkpoints_train(model)
    model._apt_state = state


def _own_configs(model) -> None:
    """Give the model its own config objects: another model built from the same ones must not be switched along."""
    shared = {}
    owned = {id(config): copy.deepcopy(config, shared) for config in configs(model)}
    for module in model.modules():
        if id(getattr(module, "config", None)) in owned:
            module.config = owned[id(module.config)]


def _trainable(model, config: AptConfig) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    if config.trainable is not None:
        unused = [pattern for pattern in config.trainable if not any(re.search(pattern, name) for name in names)]
        if unused:
            raise ConfigError(f"trainable has {unused[0]!r}; no parameter's name matches it")
        return {name for name in names if any(re.search(pattern, name) for pattern in config.trainable)}
    base = model.base_model
    if base is model or model.get_output_embeddings() is not None:
        return set()  # a bare encoder or a language model: its head, where it has one, was pretrained
    inside = {id(parameter) for parameter in base.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in inside}


class _InputsRequireGrad:
    """Forward pre-hook: lets gradients through re-entrant checkpoints of a model that is handed ``inputs_embeds``.

    transformers sees to it where the model embeds token ids itself.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, module, args, kwargs):
        if not torch.is_grad_enabled() or not any(_reentrant(layer) for layer in self.layers):
            return None
        changed = dict(kwargs)
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) and not given.requires_grad:
                changed[name] = given.detach().requires_grad_()
        return args, changed


def _reentrant(layer: nn.Module) -> bool:
    if not (layer.gradient_checkpointing and layer.training):
        return False
    return getattr(getattr(layer, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", True)


def _let_reentrant_checkpoints_train(model) -> None:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if layers:
        model.register_forward_pre_hook(_InputsRequireGrad(layers), with_kwargs=True)


def unpatch(model):
    """Take every prefix off again: outputs and ``requires_grad`` are bit for bit those from before `patch`.

    Returns the same model. Raises `PatchError` if the model is not patched.
    """
    state = state_of(model)
    for module in model.modules():
        _remove_hooks(module)
        if isinstance(module._modules.get("apt"), AdaptivePrefix):
            del module.apt
        module.__dict__.pop("apt_before", None)
        inline.restore(module)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.requires_grad.get(name, parameter.requires_grad))
    for config, name in zip(configs(model), state.implementations):
        config._attn_implementation_internal = name
    del model._apt_state
    return model


def remove_prefix(model, name: str) -> None:
    """Take the prefix off one attention module of a patched model; it attends as before the patch."""
    module, state = model.get_submodule(name), state_of(model)
    _remove_hooks(module)
    inline.restore(module)
    del module.apt
    own = getattr(module, "config", model.config)
    before = {id(config): name for config, name in zip(configs(model), state.implementations)}
    module.apt_before = before.get(id(own), "sdpa")
    state.sites.remove(name)


def _remove_hooks(module: nn.Module) -> None:
    def ours(hook) -> bool:
        return hook in (route.before, route.after) or isinstance(hook, _InputsRequireGrad)

    for hooks, extra in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]
            extra.pop(key, None)


def is_patched(model) -> bool:
    """Whether `patch` has been applied to the model."""
    return isinstance(getattr(model, "_apt_state", None), State)


def state_of(model) -> State:
    """The patched model's state; `PatchError` if there is none."""
    if not is_patched(model):
        raise PatchError(f"the {type(model).__name__} is not patched; call apt_kernels.patch(model) first")
    return model._apt_state


def prefixes(model) -> dict[str, AdaptivePrefix]:
    """The attention modules' names and their `AdaptivePrefix`, in model order. `PatchError` if not patched."""
    state_of(model)
    found = {name: module._modules.get("apt") for name, module in model.named_modules()}
    return {name: prefix for name, prefix in found.items() if isinstance(prefix, AdaptivePrefix)}
