"""Methods of other libraries, wrapped once; a library that is not imported yet is wrapped at its import."""

from __future__ import annotations

import functools
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


def when_loaded(module: str, action: Callable[[], None]) -> None:
    """Call ``action`` after the module has been imported: now, if it is."""
    if module in sys.modules:
        action()
        return
    waiting = [(each.module, each.action) for each in sys.meta_path if isinstance(each, _WhenLoaded)]
    if (module, action) not in waiting:
        sys.meta_path.insert(0, _WhenLoaded(module, action))


class _WhenLoaded:
    """An import hook that calls ``action`` after ``module`` has been imported."""

    def __init__(self, module: str, action: Callable[[], None]):
        self.module, self.action = module, action

    def find_spec(self, name: str, path=None, target=None):
        if name != self.module:
            return None
        # Asked of the finders behind: the question may be importlib.util.find_spec's, after which nothing is imported.
        others = [each for each in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(each, "find_spec")]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            try:
                self.action()
            except Exception as error:  # an import of another library must not fail because of this package
                warnings.warn(f"apt_kernels cannot work beside this {name}: {error}", stacklevel=2)

        loader.exec_module = exec_module
        return spec
