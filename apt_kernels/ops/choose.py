"""The choice of the implementation that computes a call."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from .. import transforms
from ..errors import ImplementationError, its_type
from ..impl.backend import Backend, Plan
from ..impl.inputs import Inputs

VARIABLE = "APT_KERNELS_IMPLEMENTATION"

# Modules of ``impl/``, in the order of the automatic choice, which takes the first that can compute a call. Each
# defines ``BACKEND``, whose name is the module's, and importing it needs torch alone.
_PREFERENCE = ("cpu", "triton", "cuda", "reference")

_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add an implementation as the last in the order of the automatic choice.

    Raises:
        ImplementationError: it is not a `Backend`, or its name is taken.
    """
    if not isinstance(backend, Backend):
        raise ImplementationError(f"the implementation is {its_type(backend)}; it needs a Backend")
    if backend.name in _BACKENDS or not backend.name.isidentifier() or backend.name == "auto":
        raise ImplementationError(
            f"the implementation's name is {backend.name!r}; it needs an identifier that is not taken"
        )
    _BACKENDS[backend.name] = backend


def unregister(name: str) -> None:
    """Remove an implementation that `register` added."""
    del _BACKENDS[name]


for _name in _PREFERENCE:
    register(importlib.import_module(f"..impl.{_name}", __package__).BACKEND)


def names() -> list[str]:
    """Every implementation, in the order of the automatic choice."""
    return list(_BACKENDS)


def load(name: str) -> Backend:
    """The implementation of a name; `ImplementationError` if there is none."""
    backend = _BACKENDS.get(name) if isinstance(name, str) else None
    if backend is None:
        raise ImplementationError(f"implementation is {name!r}; it needs 'auto' or one of {sorted(_BACKENDS)}")
    return backend


def _obstacle(backend: Backend, x: Inputs) -> str | None:
    if not backend.composite and transforms.active():
        return "torch.func and forward-mode differentiation need implementation='reference'"
    return backend.obstacle() or backend.obstacle_for(x)


def choose(x: Inputs, implementation: str = "auto") -> Plan:
    """The plan of a call. An implementation requested by name is used or raises; only ``"auto"`` chooses."""
    asked = implementation
    if asked == "auto" and VARIABLE in os.environ:  # twice as fast as `get`, which raises and catches
        asked = os.environ[VARIABLE] or "auto"
    if asked != "auto":
        backend = load(asked)
        obstacle = _obstacle(backend, x)
        if obstacle:
            raise ImplementationError(f"implementation {asked!r} cannot serve this call: {obstacle}")
        return backend.plan(x, "asked for by name")
    if torch.compiler.is_exporting():
        # No question about sizes: the answer would be a guard on lengths, and a program serves all of them.
        return load("reference").plan(x, "torch.export records standard operators")
    passed: list[str] = []
    for name, backend in _BACKENDS.items():
        obstacle = _obstacle(backend, x) or backend.reserved(x)
        if obstacle is None:
            return backend.plan(x, "; ".join(passed) or "first choice")
        passed.append(f"{name}: {obstacle}")
    raise ImplementationError("no implementation can serve this call: " + "; ".join(passed))


def planned(text: str, x: Inputs) -> tuple[Backend, Plan]:
    """Implementation and plan from the operator's last argument: a plan's text, or an implementation's name."""
    plan = Plan.parse(text)
    backend = load(plan.name)
    return backend, plan if plan.strategy else backend.plan(x)


def _usability(backend: Backend) -> str:
    obstacle = backend.obstacle()
    if obstacle:
        return obstacle
    details = backend.details()
    return f"usable ({details})" if details else "usable"


def info() -> dict:
    """Versions, devices, and for each implementation ``"usable"`` or why it is not. Initialises no device.

    Examples:
        >>> apt_kernels.info()["implementations"]["reference"]
        'usable'
    """
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return Info(
        versions=versions,
        threads=torch.get_num_threads(),
        asked=os.environ.get(VARIABLE) or "auto",
        implementations={name: _usability(backend) for name, backend in _BACKENDS.items()},
    )


class Info(dict):
    """The result of `info`: a dict that prints as a few lines."""

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in self["versions"].items())
        width = max(map(len, self["implementations"]))
        rows = [f"  {name:<{width}}  {state}" for name, state in self["implementations"].items()]
        threads = f"{self['threads']} thread{'s' * (self['threads'] != 1)}"
        asked = f"implementations (asked for: {self['asked']}, {threads}):"
        return "\n".join([versions, asked, *rows])
