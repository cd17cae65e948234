"""Adding a prefix to an attention module, and removing it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import calls
from ..site import Inline
from . import subclass
from .function import Prefixed
from .inline import PrefixedInline


def attach(module: Any, prefix: nn.Module, token: calls.Token, found: Inline | None) -> None:
    """Add ``prefix`` to an attention ``module``; ``found``: the properties of its inline attention, or None."""
    module.apt, module.apt_token = prefix, token
    if found is not None:
        module.apt_inline = found
    subclass.add(module, Prefixed if found is None else PrefixedInline)


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    for mixin in (Prefixed, PrefixedInline):
        subclass.remove(module, mixin)
    for name in ("apt_token", "apt_inline"):
        module.__dict__.pop(name, None)
    if "apt" in module._modules:
        del module.apt
