"""Untrusted files, opened and parsed with bounded time and memory."""

from __future__ import annotations

import json
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from ..errors import AdapterError

# The longest JSON text that is read: 8 MiB take about half a second to parse at worst.
JSON_LIMIT = 8 * 2**20
# The largest number of digits in an integer; no count, size or offset of an adapter has more.
_DIGITS = 18
_SHOWN = 120


def shown(value) -> str:
    """``value`` in a message: escaped, and cut where it is long."""
    text = repr(value[: 4 * _SHOWN] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@contextmanager
def opened(path: Path):
    """The regular file ``path``, open for reading without a buffer.

    Raises FileNotFoundError, and `AdapterError` where ``path`` is a pipe, a device, a folder, or cannot be read.
    """
    try:
        # Checked before opening: opening a pipe waits for its writer, opening a device may start it.
        _refuse_special(path, os.stat(path).st_mode)
        # O_NONBLOCK: the path may have become a pipe since.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        _refuse_special(path, os.fstat(file.fileno()).st_mode)
        yield file


def _refuse_special(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise AdapterError(f"{path} is {kind}; an adapter's files are regular files")


def read_exactly(file, count: int, path: Path, into: memoryview | None = None) -> memoryview:
    """The next ``count`` bytes of ``file``."""
    buffer, done = memoryview(bytearray(count)) if into is None else into, 0
    while done < count:
        try:
            got = file.readinto(buffer[done:])
        except OSError as error:
            raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error
        if not got:
            raise AdapterError(f"{path} is damaged: it ends {count - done} bytes too early")
        done += got
    return buffer


def read_json_file(path: Path):
    """The JSON value in the file ``path``; raises FileNotFoundError and `AdapterError`."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_LIMIT:
            raise AdapterError(f"{path} has {size} bytes; settings of more than {JSON_LIMIT} are not read")
        return parse_json(bytes(read_exactly(file, size, path)), str(path))


def parse_json(text: bytes | str, where: str):
    """The JSON value of ``text``. No key is repeated; every number is finite and of 18 digits at most."""
    if len(text) > JSON_LIMIT:
        raise AdapterError(f"{where} has {len(text)} characters of JSON; more than {JSON_LIMIT} are not read")
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(
            text, parse_int=_integer, parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_object
        )
        # An unpaired surrogate cannot be printed and is refused.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not valid JSON: {shortened(str(error))}") from error
    return value


def shortened(text: str) -> str:
    """A message that quotes a file, of bounded length."""
    return text if len(text) <= 3 * _SHOWN else f"{text[: 3 * _SHOWN]}..."


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {shown(digits)}, which is not finite")
    return number


def _no_constant(name: str):
    raise ValueError(f"it has the number {name}, which is not finite")


def _object(pairs: list) -> dict:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in set(names[:i])) if len(names) < 1000 else ""
        raise ValueError(f"it names {shown(twice)} twice" if twice else "it names a key twice")
    return made
