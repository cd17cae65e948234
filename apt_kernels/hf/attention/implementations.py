"""The attention implementation that a model's configs name: read, set, and set back."""

from __future__ import annotations

import copy


def configs(model) -> list:
    """Every config object that a module of the model reads, once each, in module order."""
    found: dict[int, object] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def implementations(model) -> list[str]:
    """What each of `configs` names."""
    return [config._attn_implementation for config in configs(model)]


def set_implementation(model, name: str) -> None:
    for config in configs(model):
        config._attn_implementation_internal = name


def restore_implementations(model, names: list[str]) -> None:
    """Set what each of `configs` names, without transformers' own checks of the name."""
    for config, name in zip(configs(model), names):
        config._attn_implementation_internal = name


def own_configs(model) -> None:
    """Give the model its own config objects: another model built from the same ones must keep its implementation."""
    shared: dict[int, object] = {}
    owned = {id(config): copy.deepcopy(config, shared) for config in configs(model)}
    for module in model.modules():
        if id(getattr(module, "config", None)) in owned:
            module.config = owned[id(module.config)]
