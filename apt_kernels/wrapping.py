"""Methods of other libraries, wrapped once; a library that is not imported yet is wrapped at its import."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any


def wrap(owner, name: str, around: Callable) -> None:
    """Replace the method ``name`` of ``owner`` by ``around(original, *args, **kwargs)``, unless it is already."""
    original = getattr(owner, name)
    if hasattr(original, "apt_kernels_wraps"):
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    wrapped.__dict__["apt_kernels_wraps"] = original
    setattr(owner, name, wrapped)


def when_loaded(package: str, action: Callable[[], None]) -> None:
    """Call ``action`` after the package has been imported."""
    if not any(isinstance(finder, _WhenLoaded) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded(package, action))


class _WhenLoaded:
    """An import hook that calls ``action`` after ``package`` has been imported."""

    def __init__(self, package: str, action: Callable[[], None]):
        self.package, self.action = package, action

    def find_spec(self, name: str, path=None, target=None):
        if name != self.package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None:
            sys.meta_path.insert(0, self)
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            try:
                self.action()
            except Exception as error:  # an import of another library must not fail because of this package
                warnings.warn(f"apt_kernels cannot work beside this {name}: {error}", stacklevel=2)

        loader.exec_module = exec_module
        return spec
