"""Which implementation serves a call, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import NamedTuple

import torch

from ..errors import ImplementationError
from ..impl import cpu, cuda, reference, triton
from ..impl.inputs import Inputs

VARIABLE = "APT_KERNELS_IMPLEMENTATION"

# Each module has ``available, unsupported, strategy, forward, backward``, and importing it needs torch alone.
# The automatic choice takes the first that serves.
_IMPLEMENTATIONS = {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": reference}


class Choice(NamedTuple):
    """An implementation, how it will compute the call, and why the preferred ones do not serve it."""

    name: str
    strategy: str
    reason: str


def names() -> list[str]:
    """Every implementation, in the order of the automatic choice."""
    return list(_IMPLEMENTATIONS)


def load(name: str):
    """The module of an implementation."""
    if name not in _IMPLEMENTATIONS:
        raise ImplementationError(f"implementation is {name!r}; it needs 'auto' or one of {sorted(_IMPLEMENTATIONS)}")
    return _IMPLEMENTATIONS[name]


def _obstacle(name: str, x: Inputs) -> str | None:
    return load(name).available() or load(name).unsupported(x)


def _reserved(name: str, x: Inputs) -> str | None:
    """Why an implementation that serves ``x`` is left to those who name it; None: it is not."""
    only_by_name = getattr(load(name), "only_by_name", None)
    return only_by_name(x) if only_by_name else None


def choose(x: Inputs, implementation: str = "auto") -> Choice:
    """The implementation that serves ``x``. A named one is obeyed or raises; only ``"auto"`` picks another."""
    asked = implementation if implementation != "auto" else os.environ.get(VARIABLE) or "auto"
    if asked != "auto":
        obstacle = _obstacle(asked, x)
        if obstacle:
            raise ImplementationError(f"implementation {asked!r} cannot serve this call: {obstacle}")
        return Choice(asked, load(asked).strategy(x), "asked for by name")
    passed = []
    for name in _IMPLEMENTATIONS:
        obstacle = _obstacle(name, x) or _reserved(name, x)
        if obstacle is None:
            return Choice(name, load(name).strategy(x), "; ".join(passed) or "first choice")
        passed.append(f"{name}: {obstacle}")
    raise ImplementationError("no implementation can serve this call: " + "; ".join(passed))


def _usable(name: str) -> str:
    details = getattr(load(name), "details", None)
    return f"usable ({details()})" if details else "usable"


def info() -> dict:
    """Versions, devices, and for each implementation ``"usable"`` or why it is not. Initialises no device."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "asked": os.environ.get(VARIABLE) or "auto",
        "implementations": {name: load(name).available() or _usable(name) for name in _IMPLEMENTATIONS},
    }
