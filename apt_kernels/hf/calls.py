"""The state of running forwards, per thread: no state of a call is stored on a module, on a config or in a global.

Everything here is set in a ``try`` and reset in its ``finally``, so that an exception or an interrupt at any point
leaves no state. It is a ``threading.local`` and not a ``ContextVar``, since Dynamo traces and guards the former. If an
asyncio task called `disabling`, a ``ContextVar`` distinguishes the tasks of a thread.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchError

_numbers = itertools.count()


class Token:
    """Identifies a patched model; its modules and configs share one. A copy of the model gets its own."""

    def __init__(self):
        # A string, since Dynamo guards the value of a string but not the identity of an object.
        self.number = f"model {next(_numbers)}"
        self.warned = False  # whether the warning about missing attention weights was given

    def __deepcopy__(self, memo):
        made = memo[id(self)] = Token()
        return made

    def __reduce__(self):
        return Token, ()


class Call:
    """A running forward of an attention module with a prefix."""

    __slots__ = ("cache", "filled", "hidden_states", "mixture", "module", "outer", "served")

    def __init__(self, module, hidden_states: Tensor | None, cache, filled: bool, outer: Call | None, mixture=None):
        self.module, self.hidden_states, self.cache, self.filled = module, hidden_states, cache, filled
        self.outer = outer  # the call in which this one runs
        self.mixture = mixture  # the prefixes of its rows; None: all rows use the module's
        self.served = False  # whether its attention went through the op


class Disabling:
    """One entry into `disabling`."""

    def __init__(self, number: str, in_task: bool, implementation: str | None = None):
        self.number, self.in_task, self.open = number, in_task, True
        # The attention implementation to use while disabled; None: the one from before the patch.
        self.implementation = implementation


class _State(threading.local):
    def __init__(self):
        self.call: Call | None = None
        self.documents = None  # the innermost `packing.Running` model
        self.rows: Any = None  # the `attention.rows.Rows` of a running batch whose rows use different adapters
        self.disabled: tuple[Disabling, ...] = ()
        self.narrowing = False  # within the forward of a `precision.Widened` module
        self.observe: Callable | None = None  # called with (prefix, gate logits, real tokens) of every attention


local = _State()
# Entries into `disabling` by asyncio tasks, as the running task sees them.
_of_task: ContextVar[tuple[Disabling, ...]] = ContextVar("apt_kernels_disabled", default=())


def call_of(module) -> Call:
    """The innermost running call of ``module``."""
    call = local.call
    while call is not None and call.module is not module:
        call = call.outer
    if call is None:
        raise PatchError(
            f"{module.apt.name} attends outside the forward of its module, so the gate's hidden states are unknown"
        )
    return call


def disabling_of(token: Token | None) -> Disabling | None:
    """The entry that disables the model of ``token`` here: in this thread and, inside asyncio, in this task."""
    disabled = local.disabled
    if not disabled or token is None:
        return None
    for entry in disabled:
        if entry.number == token.number and entry.open and (not entry.in_task or _in_this_task(entry)):
            return entry
    return None


@torch.compiler.disable(
    reason="an asyncio task entered apt_kernels.disabled; a compiled graph cannot check which task runs"
)
def _in_this_task(entry: Disabling) -> bool:
    return entry in _of_task.get()


@contextmanager
def disabling(token: Token, implementation: str | None = None) -> Iterator[None]:
    """Disable the model of ``token`` in this thread; if an asyncio task enters, in it and the tasks that it creates.

    ``implementation``: as for `Disabling`.
    """
    entry = Disabling(token.number, _in_a_task(), implementation)
    try:
        local.disabled = (*local.disabled, entry)
        if entry.in_task:
            _of_task.set((*_of_task.get(), entry))
        yield
    finally:
        entry.open = False  # also if another thread exits
        local.disabled = tuple(each for each in local.disabled if each.open)
        if entry.in_task:
            _of_task.set(tuple(each for each in _of_task.get() if each.open))


def _in_a_task() -> bool:
    try:
        return asyncio.current_task() is not None
    except RuntimeError:  # there is no event loop in this thread
        return False


class Held:
    """The state of a thread, captured to be applied in another one, such as that of a replica or of a backward."""

    __slots__ = ("disabled", "documents", "observe", "rows")

    def __init__(self, disabled: tuple[Disabling, ...], documents, observe: Callable | None, rows=None):
        self.disabled, self.documents, self.observe, self.rows = disabled, documents, observe, rows


def hold() -> Held:
    """The current state of this thread."""
    disabled = local.disabled
    if disabled:
        disabled = tuple(
            Disabling(entry.number, False, entry.implementation)
            for entry in disabled
            if entry.open and (not entry.in_task or _in_this_task(entry))
        )
    return Held(disabled, local.documents, local.observe, local.rows)


def applied(held: Held, function: Callable, *args, **kwargs):
    """``function(*args, **kwargs)`` with the captured state."""
    before = local.disabled, local.documents, local.observe, local.rows
    try:
        local.disabled, local.documents, local.observe = held.disabled, held.documents, held.observe
        local.rows = held.rows
        return function(*args, **kwargs)
    finally:
        local.disabled, local.documents, local.observe, local.rows = before


@contextmanager
def observing(observe: Callable) -> Iterator[None]:
    """``observe(prefix, gate, real_tokens)`` is called for every attention with a prefix in this thread."""
    before = local.observe
    try:
        local.observe = observe
        yield
    finally:
        local.observe = before
