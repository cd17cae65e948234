"""The attention implementation in a model's configs: read, set and reset, and what it was before the patch."""

from __future__ import annotations

import copy
import dataclasses
from typing import cast

import torch
from transformers import PreTrainedConfig

from ...errors import PatchError
from .. import calls
from . import subclass

_FIELD = "_attn_implementation_internal"


class Before:
    """For a patched model's config: the model's token, and the implementation from before the patch."""

    def __init__(self, token: calls.Token, implementation: str | None):
        self.token, self.implementation = token, implementation

    def __deepcopy__(self, memo):
        return Before(copy.deepcopy(self.token, memo), self.implementation)


class Switched(subclass.Mixin):
    """Added to the class of a patched model's config: within `calls.disabling`, the implementation is the original one.

    A model without its prefix then uses its original functions, masks and branches, in one thread alone.
    """

    def __init_subclass__(cls, **kwargs):
        pass  # transformers converts every config class to a dataclass

    @property
    def _attn_implementation_internal(self):
        fields = self.__dict__
        if calls.local.disabled and "apt_before" in fields:
            entry = calls.disabling_of(fields["apt_before"].token)
            if entry is not None:
                return entry.implementation or fields["apt_before"].implementation
        try:
            return fields[_FIELD]
        except KeyError:  # while transformers makes another config of this class
            raise AttributeError(_FIELD) from None

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value):
        before = self.__dict__.get("apt_before")
        if before is not None and calls.disabling_of(before.token) is not None:
            raise PatchError(
                "the attention implementation cannot be set while the prefix is disabled; set it outside of "
                "apt_kernels.disabled, or call apt_kernels.unpatch(model) first"
            )
        self.__dict__[_FIELD] = value

    # The attribute that modules read; transformers' property would look up the other one.
    _attn_implementation = property(
        cast(property, _attn_implementation_internal).fget,
        lambda self, value: cast(property, PreTrainedConfig._attn_implementation).fset(self, value),
    )

    def __deepcopy__(self, memo):
        # Models copy configs in their forward, and Dynamo traces that: no `__reduce_ex__`.
        made = object.__new__(type(self))
        memo[id(self)] = made
        traced = torch.compiler.is_compiling()
        for name, value in self.__dict__.items():
            made.__dict__[name] = value if traced and name == "apt_before" else copy.deepcopy(value, memo)
        return made

    def to_dict(self):
        found = super().to_dict()
        found.pop("apt_before", None)
        return found

    def __eq__(self, other):
        if subclass.parts(type(self))[0] is not subclass.parts(type(other))[0]:
            return NotImplemented
        return all(getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self) if f.compare)

    __hash__ = None


def token_of(config) -> calls.Token | None:
    """The token of the patched model that ``config`` belongs to."""
    before = getattr(config, "apt_before", None)
    return None if before is None else before.token


def configs(model) -> list:
    """Every config object that a module of the model has, once each, in module order."""
    found: dict[int, object] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, _FIELD):
            found.setdefault(id(config), config)
    return list(found.values())


def implementations(model) -> list[str]:
    """The implementation in each of `configs`."""
    return [config._attn_implementation for config in configs(model)]


def set_implementation(model, name: str) -> None:
    for config in configs(model):
        config._attn_implementation_internal = name


def restore_implementations(model, names: list[str]) -> None:
    """Set the implementation in each of `configs`, without transformers' checks of the name."""
    for config, name in zip(configs(model), names):
        config._attn_implementation_internal = name


def own_configs(model) -> None:
    """Copy the model's config objects, since another model built from the same ones must keep its implementation."""
    shared: dict[int, object] = {}
    owned = {id(config): copy.deepcopy(config, shared) for config in configs(model)}
    for module in model.modules():
        if id(getattr(module, "config", None)) in owned:
            module.config = owned[id(module.config)]


def remember(model, token: calls.Token) -> None:
    """Store the current implementation for where the model of ``token`` is disabled."""
    for config in configs(model):
        config.__dict__["apt_before"] = Before(token, config._attn_implementation)
        subclass.add(config, Switched)


def forget(model, names: list[str]) -> None:
    """Undo `remember`, and set the implementations ``names``."""
    for config, name in zip(configs(model), names):
        config.__dict__.pop("apt_before", None)
        subclass.remove(config, Switched)
        config._attn_implementation_internal = name
