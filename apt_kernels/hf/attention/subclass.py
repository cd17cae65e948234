"""Change the behaviour of one object through its class: a dynamic subclass with a mixin before the base.

Unlike a method that is set on the object, this also works for copies, pickles and `nn.DataParallel`'s replicas, which
share the object's ``__dict__``. Name, module and signature remain those of the base, for code that inspects them.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch

_made: dict[tuple[type, type], type] = {}


class Mixin:
    """Base of the mixins. A mixin that defines ``forward`` calls ``super().forward``."""

    outside_of_graphs: str | None = None  # why Dynamo must not trace its forward

    def __reduce_ex__(self, protocol):
        # The class is created dynamically: pickle its base and mixins, and create it again.
        base, mixins = parts(type(self))
        return _empty, (base, *mixins), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def _empty(base: type, *mixins: type):
    made: Any = build(base, mixins)
    return made.__new__(made)


def parts(cls: Any) -> tuple[type, tuple[type, ...]]:
    """The original class, and the mixins on it, the innermost first."""
    mixins = []
    while "apt_mixin" in vars(cls):
        mixins.append(cls.apt_mixin)
        cls = cls.__bases__[1]
    return cls, tuple(reversed(mixins))


def build(base: type, mixins) -> type:
    """The subclass of ``base`` with the mixins."""
    for mixin in mixins:
        made = _made.get((mixin, base))
        # No lock, which an interrupt could leave locked: if two threads create a class, both use the one stored first.
        base = _made.setdefault((mixin, base), _make(mixin, base)) if made is None else made
    return base


def _make(mixin: Any, base: Any) -> type:
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    names["apt_mixin"] = mixin
    if hasattr(mixin, "forward"):
        forward = _like(mixin.forward, base.forward)
        reason = mixin.outside_of_graphs
        names["forward"] = forward if reason is None else torch.compiler.disable(forward, reason=reason)
    return type(base.__name__, (mixin, base), names)


def _like(function, original):
    """A copy of ``function`` with the signature of ``original`` and its own code object, by which Dynamo counts."""
    code = function.__code__.replace()
    made = types.FunctionType(code, function.__globals__, original.__name__, None, function.__closure__)
    made.__doc__ = original.__doc__
    made.__qualname__, made.__module__ = original.__qualname__, original.__module__
    # Not `__wrapped__`, through which accelerate would call the original directly.
    made.__signature__ = inspect.signature(original)
    return made


class _OwnForward(Mixin):
    """For an object with its own ``forward`` attribute: the mixins' forwards wrap it."""

    def forward(self, *args, **kwargs):
        return self.apt_forward(*args, **kwargs)


def add(thing, mixin: type) -> None:
    """Add ``mixin`` to the class of ``thing``, unless it is there."""
    if isinstance(thing, mixin):  # FSDP2 may have derived a class from ours since
        return
    base, mixins = parts(type(thing))
    _change(thing, build(base, (*mixins, mixin)))
    # accelerate's hook moves the inputs and then calls `_old_forward`, which is ours now: the hook remains outermost.
    if "forward" in thing.__dict__ and not _is_ours(thing, "forward") and not _is_ours(thing, "_old_forward"):
        thing.__dict__["apt_forward"] = thing.__dict__.pop("forward")
        base, mixins = parts(type(thing))
        _change(thing, build(base, (_OwnForward, *mixins)))


def remove(thing, mixin: type) -> None:
    """Undo `add`. A class that was derived from ours since (by FSDP2) remains, and its mixin has no effect."""
    base, mixins = parts(type(thing))
    if mixin not in mixins:
        return
    rest = [each for each in mixins if each is not mixin]
    if rest == [_OwnForward]:
        rest = []
        thing.__dict__["forward"] = thing.__dict__.pop("apt_forward")
    _change(thing, build(base, rest))


def _is_ours(thing, name: str) -> bool:
    method = thing.__dict__.get(name)
    return isinstance(method, types.MethodType) and method.__func__ is getattr(type(thing), "forward", None)


def _change(thing, cls: Any) -> None:
    ours = [name for name in ("forward", "_old_forward") if _is_ours(thing, name)]
    thing.__class__ = cls
    for name in ours:  # libraries such as accelerate store the bound method
        thing.__dict__[name] = types.MethodType(cls.forward, thing)
