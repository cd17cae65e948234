"""An adapter on disk: ``adapter.safetensors``, the complete adapter, and ``apt_config.json``, a copy of its settings.

docs/adapter-format.md describes both. A save is one rename: a reader gets the old adapter or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import hmac
import json
import math
import os
import re
import struct
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import patterns
from ..config import AptConfig
from ..errors import AdapterError, ConfigError, its_type
from .untrusted import JSON_LIMIT, opened, parse_json, read_exactly, read_json_file, shortened, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WEIGHTS = "adapter.safetensors"
CONFIG = "apt_config.json"
PEFT_CONFIG = "adapter_config.json"  # that of PEFT's checkpoints
# Keys of the safetensors file's metadata.
_SETTINGS, _CHECKSUM = "apt_kernels", "apt_kernels.checksum"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TEMPORARY = ".tmp"
# Temporary files of a save or of `save_pretrained`; those without the suffix are older than format 2.
_OURS = re.compile(
    r"\.((adapter|model)\.safetensors|(apt_)?config\.json)\.\w+\.tmp|\.(adapter\.safetensors|apt_config\.json)\.\w{8}"
)
# The age in seconds at which a temporary file without a lock is deleted (a file system without locks, or a file of an
# older release).
_ABANDONED = 3600
_NAMED = 5  # the most adapter folders that a message names
_CHUNK = 2**24
_BIG_ENDIAN = sys.byteorder == "big"


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its dtype, its shape and the position of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class AdapterFile:
    """An open adapter. ``settings`` and ``entries`` are read and checked; the tensors are not read yet.

    Attributes:
        settings: the JSON object of the settings.
        entries: the tensors by name.
        config: the `AptConfig` in ``settings``.
    """

    def __init__(self, path: Path, file, entries: dict[str, Entry], settings: dict, text: str, checksum: str | None):
        self.path, self._file, self.entries, self.settings = path, file, entries, settings
        self._text, self._checksum, self._data = text, checksum, file.tell()
        self.config = read_config(settings, path if checksum else path.with_name(CONFIG))

    @property
    def has_checksum(self) -> bool:
        """False for files of format 1."""
        return self._checksum is not None

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name. Raises `AdapterError` if the checksum is not that of the contents."""
        by_position = sorted(self.entries.items(), key=lambda item: item[1].start)
        found = {name: _tensor(self._file, self._data, entry, self.path) for name, entry in by_position}
        if self._checksum is not None and not hmac.compare_digest(_digest(self._text, found), self._checksum):
            raise AdapterError(f"{self.path} is damaged: its contents do not match its checksum")
        return found


def read_tensor(path: Path, name: str) -> Tensor | None:
    """One tensor of a safetensors file of another library, or None; FileNotFoundError, or `AdapterError` if damaged."""
    with opened(path) as file:
        entries, _ = _header(path, file)
        return _tensor(file, file.tell(), entries[name], path) if name in entries else None


def _tensor(file, data: int, entry: Entry, path: Path) -> Tensor:
    """The tensor of ``entry``, whose file has its data from byte ``data`` on."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    file.seek(data + entry.start)
    read_exactly(file, entry.end - entry.start, path, _bytes(tensor))
    return _swapped(tensor)


@contextmanager
def open_adapter(folder: Path) -> Iterator[AdapterFile]:
    """The adapter in ``folder``, read through one open file, so that a concurrent save cannot mix two adapters.

    Raises `AdapterError` naming the file and what is wrong with it.
    """
    path = folder / WEIGHTS
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path))
        except FileNotFoundError:
            if not folder.exists():
                raise AdapterError(f"{folder} does not exist; it needs a folder that apt_kernels.save wrote") from None
            missing = WEIGHTS if (folder / CONFIG).exists() else f"{CONFIG} and no {WEIGHTS}"
            peft = ", but a PEFT checkpoint: patch_from_peft reads PEFT's prefix tuning"
            kind = peft if (folder / PEFT_CONFIG).exists() else _inside(folder)
            raise AdapterError(f"{folder} has no {missing}; it is not an adapter folder{kind}") from None
        yield _read(folder, path, file)


def _inside(folder: Path) -> str:
    """The end of a message: the adapter folders in ``folder``, such as Trainer's checkpoints; empty without any."""
    names = sorted((path.parent.name for path in folder.glob(f"*/{WEIGHTS}")), key=lambda name: (len(name), name))
    return f". It contains some: {', '.join(names[-_NAMED:])}" if names else ""


def _read(folder: Path, path: Path, file) -> AdapterFile:
    entries, metadata = _header(path, file)
    if unknown := sorted(set(metadata) - {"format", _SETTINGS, _CHECKSUM}):
        raise AdapterError(f"{path} is damaged: its metadata has the unknown key {shown(unknown[0])}")
    text, checksum = metadata.get(_SETTINGS), metadata.get(_CHECKSUM)
    if text is None and checksum is None:
        settings = _old_settings(folder / CONFIG)
        return AdapterFile(path, file, entries, settings, "", None)
    if not text or not checksum:
        raise AdapterError(f"{path} is damaged: its metadata needs {_SETTINGS} and {_CHECKSUM}, or neither")
    settings = parse_json(text, f"{path}: its settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("save_id"), str):
        raise AdapterError(f"{path}: its settings are not a JSON object with a save_id")
    _check_copy(folder / CONFIG, settings)
    return AdapterFile(path, file, entries, settings, text, checksum)


def _old_settings(path: Path) -> dict:
    """The settings beside weights of format 1, which contain none."""
    try:
        settings = read_json_file(path)
    except FileNotFoundError:
        raise AdapterError(f"{path.parent} has no {path.name}; it is not an adapter folder") from None
    if not isinstance(settings, dict):
        raise AdapterError(f"{path}: the config is {its_type(settings)}; it needs a JSON object")
    if "save_id" in settings:
        raise AdapterError(
            f"{path} was saved with other weights than {path.with_name(WEIGHTS).name} in the same folder"
        )
    return settings


def _check_copy(path: Path, settings: dict) -> None:
    """Check the copy, which may be missing or of an earlier save; one of this save must have the same contents."""
    try:
        copy = read_json_file(path)
    except FileNotFoundError:
        return
    if not isinstance(copy, dict):
        raise AdapterError(f"{path}: the config is {its_type(copy)}; it needs a JSON object")
    read_config(copy, path)
    if copy.get("save_id") == settings["save_id"] and copy != settings:
        different = next(
            key for key in sorted({*copy, *settings}) if key not in copy or copy[key] != settings.get(key, copy)
        )
        raise AdapterError(
            f"{path} differs from the settings in {WEIGHTS} ({shown(different)}), of which it is a copy; delete it, "
            "or save the adapter again"
        )


def read_config(settings: dict, path: Path) -> AptConfig:
    """The `AptConfig` in the settings of the file ``path``; `AdapterError` where a value is out of range."""
    settings = {name: value for name, value in settings.items() if name != "implementation"}
    try:
        if settings.get("reparameterisation") is not None:
            raise ConfigError("reparameterisation is set; a saved adapter has none")
        # Checked before `AptConfig` compiles them, which may take long.
        for name in ("layers", "trainable"):
            patterns.check_all(name, settings.get(name))
        return AptConfig.from_json(settings)
    except ConfigError as error:
        raise AdapterError(f"{path}: {shortened(str(error))}") from error


def _header(path: Path, file) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata; afterwards the file is positioned at its first tensor."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise AdapterError(f"{path} is damaged: it has {size} bytes")
    (length,) = struct.unpack("<Q", read_exactly(file, 8, path))
    if length > min(size - 8, JSON_LIMIT):
        raise AdapterError(f"{path} is damaged: its header has {length} bytes, the file {size}")
    header = parse_json(bytes(read_exactly(file, length, path)), f"{path} is damaged: its header")
    if not isinstance(header, dict):
        raise AdapterError(f"{path} is damaged: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise AdapterError(f"{path} is damaged: its metadata is not a JSON object of strings")
    if metadata.get("format", "pt") != "pt":
        raise AdapterError(f"{path} is damaged: its metadata has the format {shown(metadata['format'])}, not 'pt'")
    entries = {name: _entry(path, name, given) for name, given in header.items()}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise AdapterError(f"{path} is damaged: {shown(name)} begins at byte {entry.start} of the data, not {at}")
        at = entry.end
    if at != size - 8 - length:
        raise AdapterError(f"{path} is damaged: its tensors have {at} bytes, the file has {size - 8 - length} for them")
    return entries, metadata


def _entry(path: Path, name: str, given) -> Entry:
    fields = given if isinstance(given, dict) else {}
    dtype, shape, span = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if set(fields) != {"dtype", "shape", "data_offsets"} or not _counts(shape) or not _counts(span) or len(span) != 2:
        raise AdapterError(f"{path} is damaged: {shown(name)} needs a dtype, a shape and two data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise AdapterError(f"{path}: {shown(name)} has the dtype {shown(dtype)}; an adapter has {', '.join(_DTYPES)}")
    if len(shape) > 8 or math.prod(shape) * _DTYPES[dtype].itemsize != span[1] - span[0]:
        raise AdapterError(
            f"{path} is damaged: {shown(name)} has the shape {shown(shape)} and {span[1] - span[0]} bytes"
        )
    return Entry(_DTYPES[dtype], tuple(shape), *span)


def _counts(value) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], settings: dict) -> str:
    """Write an adapter to ``folder``, replacing one that is there; returns its save id.

    ``adapter.safetensors`` is written to a temporary file and renamed, which commits the save. The copy of the settings
    follows. Temporary files of killed saves are deleted. `AdapterError` where the folder cannot be written; before the
    rename, the old adapter is unchanged.
    """
    settings = {**settings, "save_id": uuid.uuid4().hex}
    text = json.dumps(settings)
    if len(text) > JSON_LIMIT // 2:
        raise AdapterError(f"the settings have {len(text)} characters; no more than {JSON_LIMIT // 2} are read back")
    metadata = {"format": "pt", _SETTINGS: text, _CHECKSUM: _digest(text, tensors)}
    make_folder(folder)
    with writing(folder):
        clean(folder)
        for name in (WEIGHTS, CONFIG):
            if (folder / name).is_dir():
                raise AdapterError(f"{folder / name} cannot be written: it is a folder")
        with replacing(folder / WEIGHTS) as file:
            _serialise(file, tensors, metadata)
        with replacing(folder / CONFIG) as file:
            file.write((json.dumps(settings, indent=2) + "\n").encode())
    return settings["save_id"]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within this context, an error of the file system is an `AdapterError` that names ``folder`` and the reason."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"{folder} cannot be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it does not exist."""
    refuse_file(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def refuse_file(folder: Path) -> None:
    """Raise `AdapterError` where ``folder`` or one of its parents is a file, or its path is none of a file system."""
    if "\0" in str(folder):
        raise AdapterError(f"{str(folder)!r} cannot be written: the path has a null character")
    with writing(folder):
        file = next((each for each in (folder, *folder.parents) if os.path.lexists(each) and not each.is_dir()), None)
    if file is not None:
        raise AdapterError(f"{folder} cannot be written: {file} is not a folder")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain safetensors file, in one rename."""
    with replacing(path) as file:
        _serialise(file, tensors, {"format": "pt"})


def _serialise(file, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    header: dict[str, dict] = {"__metadata__": metadata}
    at = 0
    # Wide elements first, as safetensors does: each tensor is then aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise AdapterError(f"{name} is {tensor.dtype}; an adapter holds {', '.join(map(str, _NAMES))}")
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > JSON_LIMIT:
        raise AdapterError(f"the header has {len(text)} bytes; no more than {JSON_LIMIT} are read back")
    file.write(struct.pack("<Q", len(text)) + text)
    for _, tensor in ordered:
        held = _swapped(tensor)
        file.write(_bytes(held))


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU; the tensor has to outlive the view."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return memoryview(b"")
    return memoryview((ctypes.c_char * count).from_address(tensor.data_ptr())).cast("B")


def _swapped(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous, with the bytes of each element as the file has them (little endian), and the reverse."""
    tensor = tensor.contiguous()
    if not _BIG_ENDIAN:
        return tensor
    return tensor.reshape(-1, 1).view(torch.uint8).flip(-1).contiguous().view(tensor.dtype).view(tensor.shape)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The checksum of the settings and of every tensor's name, dtype, shape and bytes, independent of their order."""
    found = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{json.dumps(name)}{_NAMES.get(tensor.dtype)}{list(tensor.shape)}".encode())
        held = _swapped(tensor)
        data = _bytes(held)
        for at in range(0, len(data), _CHUNK):
            found.update(data[at : at + _CHUNK])
    return f"blake2b:{found.hexdigest()}"


@contextmanager
def replacing(path: Path) -> Iterator:
    """A temporary binary file; after the block it replaces ``path`` in one rename, or is deleted on an error.

    It is locked while it is open, so that `clean` does not delete it.
    """
    descriptor, temporary = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            if fcntl is not None:
                os.replace(temporary, path)
        if fcntl is None:  # Windows does not rename an open file
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _temporary(path: Path) -> tuple[int, str]:
    while True:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
        # `clean` of another save may have deleted it before it was locked.
        if not _locked(descriptor, wait=True) or os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)


def _locked(descriptor: int, wait: bool = False) -> bool | None:
    """Lock an open file: True, or False where another process has. None: this file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def clean(folder: Path) -> None:
    """Delete the temporary files of saves whose process has ended."""
    for path in folder.glob(".*"):
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):
                _delete_if_abandoned(path)


def _delete_if_abandoned(path: Path) -> None:
    status = os.lstat(path)
    if not os.path.isfile(path) or os.path.islink(path):
        return
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        free = _locked(descriptor) if path.name.endswith(_TEMPORARY) else None
        if free or (free is None and time.time() - status.st_mtime > _ABANDONED):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Flush the rename to the disk, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
