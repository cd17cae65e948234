"""The errors this package raises on purpose; each is also the built-in that callers would expect."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A setting is out of range or unknown; the message names it, its value and what it may be."""


class ArgumentError(ValueError):
    """An argument of the op has the wrong shape, dtype or device; the message names it."""


class PatchError(RuntimeError):
    """A model cannot be patched, or a patched model was changed so that its prefix would not be used."""


class AdapterError(ValueError):
    """An adapter folder is missing, damaged, from a newer format, or made for a model of another shape."""


class ImplementationError(RuntimeError):
    """An implementation requested by name cannot compute this call; the message says why."""


def similar(name: str, known: Iterable[str]) -> str:
    """The part of a message that suggests the name among ``known`` that is most like ``name``; empty if none is."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def its_type(value) -> str:
    """The type of ``value`` with its article, as messages word it: "an int", "a str", "None"."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def first_of(names: Sequence[str]) -> str:
    """The first of the names and how many follow, as messages word it: "a", "a and 2 more"."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def counted(number: int, noun: str) -> str:
    """The number with its noun, as messages word it: "1 name", "2 names"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
