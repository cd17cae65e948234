"""Adding a prefix to an attention module, and removing it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import calls
from ..site import Inline
from . import subclass
from .function import Prefixed
from .inline import PrefixedInline


def attach(module: Any, prefix: nn.Module | None, token: calls.Token, found: Inline | None) -> None:
    """Add ``prefix`` to an attention ``module``; ``found``: the properties of its inline attention, or None.

    None in the place of a prefix: an adapter that is not active has one there, for the rows of a batch that use it.
    """
    module.apt_token = token
    if prefix is not None:
        module.apt = prefix
    if found is not None:
        module.apt_inline = found
    subclass.add(module, Prefixed if found is None else PrefixedInline)


def attach_other(module: Any, prefix: nn.Module) -> None:
    """Add the prefix of a further active adapter to an attention module that `attach` has seen."""
    if "apt_others" not in module._modules:
        module.apt_others = nn.ModuleList()
    module.apt_others.append(prefix)


def detach_others(module: nn.Module) -> None:
    """Undo `attach_other`."""
    if "apt_others" in module._modules:
        del module.apt_others


def detach(module: nn.Module) -> None:
    """Undo `attach`, and `attach_other`."""
    detach_others(module)
    for mixin in (Prefixed, PrefixedInline):
        subclass.remove(module, mixin)
    for name in ("apt_token", "apt_inline"):
        module.__dict__.pop(name, None)
    if "apt" in module._modules:
        del module.apt
