"""`patch`, `unpatch` and `prefixes`: hang a prefix on every attention module, freeze the rest, and take it back."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import AptConfig
from ..errors import ConfigError, PatchError
from ..ops import choose
from ..prefix.adaptive import AdaptivePrefix
from .attention import function, inline, packing
from .discovery.recording import Site, record
from .discovery.selection import lengths_of
from .integrations import continuous_batching, distributed, trainer
from .state import inner, join_peft, own_name, peft_parameters

_NAMED_FOR_A_TASK = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")


@dataclass
class State:
    """What a patched model remembers: its settings, and what `unpatch` has to restore."""

    config: AptConfig
    implementations: list[str]  # of `configs(model)`, in order
    requires_grad: dict[str, bool] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    # Named adapters (hf/adapters.py): the active one's name, the others, and the start of all that any of them trains.
    adapter: str = "default"
    parked: dict = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)
    enabled: bool = True


def patch(model, config: AptConfig | None = None, *, example_inputs: dict | None = None, **settings):
    """Hang an `AdaptivePrefix` on every attention module of a transformers model, in place, and freeze the rest.

    The model attends through `apt_kernels.attention` from then on; position ids, masks and caches stay those of the
    unpatched model. New task heads (parameters outside the base model of a classification, token, question or
    multiple-choice model) stay trainable. Patching again with equal settings changes nothing.

    Args:
        model: a ``transformers.PreTrainedModel`` whose attention goes through transformers' attention interface.
        config: an `AptConfig`; or give its fields as keywords (``prefix_length=16, gate="auto", ...``).
        example_inputs: keyword arguments of one small forward, for models whose inputs cannot be guessed. Only what
            that forward reaches gets a prefix; without them, parts that see or hear do as well as those that read.

    Returns:
        The same model.

    Raises:
        ConfigError: a setting is out of range, or a gate would let a token see later ones.
        PatchError: the model has no attention that can be patched, or is patched with other settings.
        ImplementationError: there is no implementation of that name.
    """
    config = make_config(config, settings)
    wrapped, model = model, inner(model)
    if not isinstance(model, PreTrainedModel):
        raise PatchError(f"the model is a {type(model).__name__}; patch needs a transformers.PreTrainedModel")
    if is_patched(model):
        if state_of(model).config == config:
            return wrapped
        raise PatchError("the model is already patched with other settings; call apt_kernels.unpatch(model) first")
    if config.implementation != "auto":
        choose.load(config.implementation)
    distributed.refuse_wrapped(wrapped)
    sites, implementations = _sites(model, example_inputs)
    sites = distributed.with_meshes(model, sites)
    _commit(model, config, sites, build(config, sites), implementations)
    return wrapped


def make_config(config: AptConfig | None, settings: dict) -> AptConfig:
    unknown = sorted(set(settings) - set(AptConfig.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}; AptConfig has {', '.join(AptConfig.__dataclass_fields__)}")
    return AptConfig(**settings) if config is None else replace(config, **settings)


def _sites(model, example_inputs: dict | None) -> tuple[list[Site], dict[str, str]]:
    before = [config._attn_implementation for config in configs(model)]
    try:
        return record(model, set_implementation, example_inputs)
    finally:
        restore_implementations(model, before)


def set_implementation(model, name: str) -> None:
    for config in configs(model):
        config._attn_implementation_internal = name


def restore_implementations(model, names: list[str]) -> None:
    """Set what each of `configs` says of attention, past transformers' own checks of the name."""
    for config, name in zip(configs(model), names):
        config._attn_implementation_internal = name


def configs(model) -> list:
    """Every config object that a module of the model reads, once each, in module order."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def build(config: AptConfig, sites: list[Site], adapter: str = "default") -> dict[str, AdaptivePrefix]:
    """New prefixes by the name of their attention module, for those that get one. Nothing is changed yet."""
    generator = distributed.shared_generator(config.init_seed, sites)
    built = {}
    for site, length in zip(sites, lengths_of(config, sites)):
        if not length:
            continue
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
        )
        prefix.name, prefix.cross, prefix.implementation = site.name, site.cross, config.implementation
        prefix.adapter = adapter
        if site.sharded:
            from ..prefix.sharding import shard_heads

            shard_heads(prefix, site.mesh)
        built[site.name] = prefix
    return built


def _gate(gate: str, site: Site) -> str:
    if gate == "auto" and site.hidden_size is None:
        return "static"
    if gate in ("first", "mean", "token") and site.hidden_size is None:
        raise ConfigError(
            f"gate is {gate!r}, but {site.name} is not handed one hidden state for every query; use 'static' or 'none'"
        )
    if gate == "first" and site.causal and site.repeated:
        raise ConfigError(
            f"gate is 'first', but {site.name} attends more than once in a forward, each time with another gate, of "
            "which a cache keeps one; use 'token', 'static' or 'none'"
        )
    if gate == "auto":
        return "token" if site.causal or site.cross else "first"
    if gate == "mean" and (site.causal or site.cross):
        raise ConfigError(
            f"gate is 'mean', but {site.name} is {site.kind}: the mean over all tokens would let a token see later "
            "ones; use 'token', 'first', 'static' or 'none'"
        )
    return gate


def _commit(
    model, config, sites: list[Site], built: dict[str, AdaptivePrefix], implementations: dict[str, str]
) -> None:
    state = State(config, [own._attn_implementation for own in configs(model)], sites=sites)
    state.requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    trainable = trainable_names(model, config)
    refuse_quantised(model, trainable)
    parameters = dict(model.named_parameters())
    state.start = {name: parameters[name].detach().clone() for name in trainable}
    theirs = peft_parameters(model)
    _own_configs(model)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable or (id(parameter) in theirs and parameter.requires_grad))
    for module in (model.get_submodule(site.name) for site in sites):
        module.apt_before = getattr(getattr(module, "config", model.config), "_attn_implementation", "sdpa")
    attach(model, built, sites)
    for part, implementation in implementations.items():
        set_implementation(model.get_submodule(part), implementation)
    _let_reentrant_checkpoints_train(model)
    model._apt_state = state
    trainer.install(model, trainable)
    continuous_batching.install(model)
    packing.install(model, sites, built.values())
    join_peft()


def attach(model, built: dict[str, AdaptivePrefix], sites: list[Site]) -> None:
    """Hang the prefixes on their attention modules."""
    for site in sites:
        if site.name not in built:
            continue
        module = model.get_submodule(site.name)
        module.apt = built[site.name].train(module.training)
        module.register_forward_pre_hook(function.before, with_kwargs=True)
        module.register_forward_hook(function.after)
        if site.inline is not None:
            inline.defer(module, site.inline)


def detach(model) -> None:
    """Take the prefixes off; the attention modules then attend as before the patch, or by their next prefix."""
    for module in model.modules():
        _remove_hooks(module, _is_route)
        if isinstance(module._modules.get("apt"), AdaptivePrefix):
            del module.apt
        inline.restore(module)


def _own_configs(model) -> None:
    """Give the model its own config objects: another model built from the same ones must not be switched along."""
    shared = {}
    owned = {id(config): copy.deepcopy(config, shared) for config in configs(model)}
    for module in model.modules():
        if id(getattr(module, "config", None)) in owned:
            module.config = owned[id(module.config)]


def trainable_names(model, config: AptConfig) -> set[str]:
    """Which parameters train beside the prefixes, by name."""
    owned = {id(p) for prefix in model.modules() if isinstance(prefix, AdaptivePrefix) for p in prefix.parameters()}
    owned |= peft_parameters(model)
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in owned]
    if config.trainable is not None:
        unused = [pattern for pattern in config.trainable if not any(re.search(pattern, name) for name in names)]
        if unused:
            raise ConfigError(f"trainable has {unused[0]!r}; no parameter's name matches it")
        return {name for name in names if any(re.search(pattern, name) for pattern in config.trainable)}
    inside = {id(parameter) for part in _pretrained_parts(model) for parameter in part.parameters()}
    # PEFT's `modules_to_save` trains copies of the modules that it names.
    outside = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}
    return {name for name in outside if name in names and ".original_module." not in name}


def refuse_quantised(model, trainable: set[str]) -> None:
    """Raise `PatchError` if a parameter among those to train is quantised. Nothing is changed."""
    for name in sorted(trainable):
        parameter = model.get_parameter(name)
        # torchao's tensors are parameters by a mark alone; they say float32, and get no gradient.
        stands_in = nn.Parameter not in type(parameter).__mro__ and not hasattr(parameter, "device_mesh")
        if stands_in or not parameter.is_floating_point():
            found = type(parameter).__name__ if stands_in else parameter.dtype
            raise PatchError(
                f"{name} would train with the prefix, but it is quantised ({found}). Quantise the model without its "
                "new head (transformers: "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{name.split('.')[0]!r}])), or say with trainable= "
                "what trains"
            )


def _pretrained_parts(model) -> list[nn.Module]:
    """The modules of ``model`` whose weights a checkpoint of the bare model holds: all but a new task head."""
    if model.get_output_embeddings() is not None:
        return [model]  # a language model: its head was pretrained
    if model.base_model is not model:
        return [model.base_model]
    if not _NAMED_FOR_A_TASK.search(type(model).__name__):
        return [model]  # a bare encoder
    # T5ForQuestionAnswering, SiglipForImageClassification and the like hold the bare model's parts side by side.
    return [part for part in model.children() if isinstance(part, PreTrainedModel)] or [model]


class _InputsRequireGrad:
    """Forward pre-hook: lets gradients through re-entrant checkpoints of a model that is handed ``inputs_embeds``.

    transformers sees to it where the model embeds token ids itself.
    """

    def __init__(self, layers: list[nn.Module]):
        self.layers = layers

    def __call__(self, module, args, kwargs):
        _refuse_to_recompute_elsewhere(module, self.layers)
        if not torch.is_grad_enabled() or not any(_reentrant(layer) for layer in self.layers):
            return None
        changed = dict(kwargs)
        for name in ("inputs_embeds", "decoder_inputs_embeds"):
            given = kwargs.get(name)
            if isinstance(given, Tensor) and not given.requires_grad:
                changed[name] = given.detach().requires_grad_()
        return args, changed


def _refuse_to_recompute_elsewhere(model, layers: list[nn.Module]) -> None:
    state = getattr(model, "_apt_state", None)
    if state is None or state.enabled or not torch.is_grad_enabled():
        return
    if any(layer.gradient_checkpointing and layer.training for layer in layers):
        raise PatchError(
            "the prefix is disabled, and gradient checkpointing would recompute the layers with it in the backward; "
            "use torch.no_grad() or model.eval() within apt_kernels.disabled, or model.gradient_checkpointing_disable()"
        )


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

    Returns the same model. Raises `PatchError` if the model is not patched, or is wrapped for several processes (by
    other than FSDP2, which goes on with the base model).
    """
    state = state_of(model)
    distributed.refuse_to_undo(model)
    wrapped, model = model, inner(model)
    detach(model)
    for module in model.modules():
        _remove_hooks(module, lambda hook: isinstance(hook, _InputsRequireGrad))
        module.__dict__.pop("apt_before", None)
    if {name for name, _ in model.named_parameters()} == set(state.requires_grad):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(state.requires_grad[name])
    # Otherwise PEFT came, went or merged since; what is frozen is its to say.
    restore_implementations(model, state.implementations)
    trainer.remove(model)
    continuous_batching.remove(model)
    packing.remove(model)
    del model._apt_state
    return wrapped


def remove_prefix(model, name: str) -> None:
    """Take the prefix off one attention module of a patched model; it attends as before the patch."""
    module = inner(model).get_submodule(name)
    _remove_hooks(module, _is_route)
    inline.restore(module)
    del module.apt


def _is_route(hook) -> bool:
    return hook in (function.before, function.after)


def _remove_hooks(module: nn.Module, ours) -> None:
    for hooks, extra in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]
            extra.pop(key, None)


def is_patched(model) -> bool:
    """Whether `patch` has been applied to the model."""
    return isinstance(getattr(inner(model), "_apt_state", None), State)


def state_of(model) -> State:
    """The patched model's state; `PatchError` if there is none."""
    model = inner(model)
    if not is_patched(model):
        raise PatchError(f"the {type(model).__name__} is not patched; call apt_kernels.patch(model) first")
    return model._apt_state


def prefixes(model) -> dict[str, AdaptivePrefix]:
    """The attention modules' names and their `AdaptivePrefix`, in model order. `PatchError` if not patched."""
    state_of(model)
    model = inner(model)
    found = {own_name(name): module._modules.get("apt") for name, module in model.named_modules()}
    return {name: prefix for name, prefix in found.items() if isinstance(prefix, AdaptivePrefix)}
