"""Search for regular expressions in bounded time.

Python's `re` backtracks: some expressions take exponential time on short texts. `search` returns what `re.search`
finds, in time proportional to the sizes of pattern and text. `check` refuses a pattern from a file that cannot be
searched for in this way.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .errors import ConfigError

_parser: Any
_op: Any
try:
    _op, _parser = import_module("re._constants"), import_module("re._parser")
except ImportError:  # Python 3.10
    _op, _parser = import_module("sre_constants"), import_module("sre_parse")

# Limits of a pattern from a file: its characters, and the instructions to which its repetitions expand.
LONGEST, _PROGRAM = 1000, 4000
# Limit of the number of patterns in one setting of a file: checking one takes about a tenth of a millisecond.
MOST = 5000
# Limit for all patterns of a file and all names of a model together: steps of `_run`, about a microsecond each.
WORK = 1_000_000
_CATEGORY_TEXTS = {
    _op.CATEGORY_DIGIT: r"\d",
    _op.CATEGORY_NOT_DIGIT: r"\D",
    _op.CATEGORY_SPACE: r"\s",
    _op.CATEGORY_NOT_SPACE: r"\S",
    _op.CATEGORY_WORD: r"\w",
    _op.CATEGORY_NOT_WORD: r"\W",
}
_CATEGORIES = {category: re.compile(text).match for category, text in _CATEGORY_TEXTS.items()}
_PLACE_TEXTS = {
    _op.AT_BEGINNING: "^",
    _op.AT_BEGINNING_STRING: r"\A",
    _op.AT_BOUNDARY: r"\b",
    _op.AT_NON_BOUNDARY: r"\B",
    _op.AT_END: "$",
    _op.AT_END_STRING: r"\Z",
}
_PLACES = {place: re.compile(text).match for place, text in _PLACE_TEXTS.items()}


class TooMuchWork(ConfigError):
    """The patterns and names need more steps than the budget allows."""


@dataclass
class Budget:
    """The number of steps that remain for all searches together."""

    left: int = WORK


class _Refused(Exception):
    pass


@dataclass
class _Program:
    """Instructions ``(kind, argument, next)``; execution begins at 0 and the last instruction accepts."""

    code: list[tuple[str, Any]] = field(default_factory=list)

    def add(self, kind: str, argument=None) -> int:
        if len(self.code) >= _PROGRAM:
            raise _Refused("it has too many repetitions")
        self.code.append((kind, argument))
        return len(self.code) - 1


def check_all(name: str, entries) -> None:
    """`check` each string in the value of the setting ``name``, of which a file has `MOST` at most."""
    patterns = {entry for entry in (entries if isinstance(entries, (list, tuple)) else [entries]) if type(entry) is str}
    if len(patterns) > MOST:
        raise ConfigError(f"{name} has {len(patterns)} patterns; a file has {MOST} at most")
    for pattern in patterns:
        check(name, pattern)


def check(name: str, pattern: str) -> None:
    """Raise `ConfigError` if ``pattern``, of the setting ``name``, cannot be searched for with bounded work."""
    if len(pattern) > LONGEST:
        raise ConfigError(f"{name} has a pattern of {len(pattern)} characters; a file's has {LONGEST} at most")
    try:
        _compile(pattern)
    except _Refused as error:
        raise ConfigError(f"{name} has {pattern!r}, which a file cannot have: {error}") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name} has {pattern!r}; it needs a regular expression ({error})") from None


def search(pattern: str, text: str, budget: Budget | None = None) -> bool:
    """Whether `re.search` would find ``pattern`` in ``text``.

    A pattern that `check` refuses (back references) is searched by `re`.
    """
    try:
        program = _compile(pattern)
    except _Refused:
        return re.search(pattern, text) is not None
    tried: set[tuple] = set()
    limit = float("inf") if budget is None else budget.left
    matched = any(_run(program, text, start, None, tried, limit) for start in range(len(text) + 1))
    if budget is not None:
        budget.left -= len(tried) + len(text)
    return matched


@functools.lru_cache(256)
def _compile(pattern: str) -> _Program:
    parsed = _parser.parse(pattern)
    if parsed.state.flags & ~re.UNICODE:
        raise _Refused("it sets flags")
    program = _Program()
    _sequence(program, parsed)
    program.add("accept")
    return program


def _sequence(program: _Program, items) -> None:
    for kind, value in items:
        _item(program, kind, value)


def _item(program: _Program, kind, value) -> None:
    if kind in (_op.LITERAL, _op.NOT_LITERAL, _op.ANY, _op.IN):
        program.add("character", (kind, value))
    elif kind is _op.AT and value in _PLACES:
        program.add("place", _PLACES[value])
    elif kind is _op.SUBPATTERN:
        if value[1] or value[2]:
            raise _Refused("it sets flags")
        _sequence(program, value[3])
    elif kind is _op.BRANCH:
        _branch(program, value[1])
    elif kind in (_op.MAX_REPEAT, _op.MIN_REPEAT):
        _repeat(program, *value)
    elif kind in (_op.ASSERT, _op.ASSERT_NOT):
        _assertion(program, kind is _op.ASSERT, *value)
    else:
        raise _Refused(f"it uses {str(kind).lower()}")


def _branch(program: _Program, options) -> None:
    ends = []
    for option in options[:-1]:
        fork = program.add("fork")
        _sequence(program, option)
        ends.append(program.add("jump"))
        program.code[fork] = ("fork", len(program.code))
    _sequence(program, options[-1])
    for end in ends:
        program.code[end] = ("jump", len(program.code))


def _repeat(program: _Program, least, most, items) -> None:
    if least > _PROGRAM:
        raise _Refused("it has too many repetitions")
    for _ in range(least):
        _sequence(program, items)
        program.add("jump", len(program.code) + 1)  # so that repetitions of an empty item are counted
    if most is _op.MAXREPEAT:
        fork = program.add("fork")
        _sequence(program, items)
        program.add("jump", fork)
        program.code[fork] = ("fork", len(program.code))
        return
    if most - least > _PROGRAM:
        raise _Refused("it has too many repetitions")
    forks = []
    for _ in range(most - least):
        forks.append(program.add("fork"))
        _sequence(program, items)
    for fork in forks:
        program.code[fork] = ("fork", len(program.code))


def _assertion(program: _Program, wanted: bool, direction: int, items) -> None:
    inside = _Program()
    _sequence(inside, items)
    inside.add("accept")
    if any(kind == "assertion" for kind, _ in inside.code):
        raise _Refused("it has an assertion within an assertion")
    least, most = items.getwidth()
    if direction < 0 and least != most:
        raise _Refused("it looks behind by a variable width")
    program.add("assertion", (wanted, int(least) if direction < 0 else None, inside))
    for _ in inside.code:  # counted, so that the size of the whole is bounded
        program.add("jump", len(program.code) + 1)


def _run(program: _Program, text: str, start: int, end: int | None, tried: set[tuple], limit: float) -> bool:
    """Whether the program accepts from ``start`` (and at ``end``, if given). ``tried``: states that failed before."""
    waiting = [(0, start)]
    while waiting:
        state = waiting.pop()
        if state in tried:
            continue
        tried.add(state)
        if len(tried) > limit:
            raise TooMuchWork("its patterns take too much work on the names of this model")
        at, position = state
        kind, argument = program.code[at]
        if kind == "accept":
            if end is None or position == end:
                return True
        elif kind == "character":
            if position < len(text) and _matches(argument, text[position]):
                waiting.append((at + 1, position + 1))
        elif kind == "fork":
            waiting.append((argument, position))
            waiting.append((at + 1, position))
        elif kind == "jump":
            waiting.append((argument, position))
        elif kind == "place":
            if argument(text, position):
                waiting.append((at + 1, position))
        elif _holds(argument, text, position, tried, at, limit):
            waiting.append((at + 1, position))
    return False


def _holds(assertion: tuple, text: str, position: int, tried: set[tuple], at: int, limit: float) -> bool:
    wanted, behind, inside = assertion
    begin, end = (position, None) if behind is None else (position - behind, position)
    own: set[tuple] = set()
    accepted = begin >= 0 and _run(inside, text, begin, end, own, limit - len(tried))
    tried.update((at, place, step) for step, place in own)  # counted as work; these are not states of the program
    return accepted is wanted


def _matches(item: tuple[Any, Any], character: str) -> bool:
    kind, value = item
    if kind is _op.ANY:
        return character != "\n"
    if kind is _op.IN:
        negated = value[0][0] is _op.NEGATE
        return negated is not any(_matches(each, character) for each in value[negated:])
    code = ord(character)
    if kind is _op.RANGE:
        return value[0] <= code <= value[1]
    if kind is _op.CATEGORY:
        return _CATEGORIES[value](character) is not None
    return (code == value) is (kind is _op.LITERAL)
