"""A text classification task from installed packages: the group of modules from which a docstring comes.

The sources are parsed, not imported. For one set of installed versions the texts and their split are always the same.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

GROUPS = {
    "text": (
        "argparse codecs configparser csv difflib doctest email gettext html json locale optparse pickle "
        "pickletools plistlib pprint pydoc reprlib shlex string stringprep textwrap tokenize xml"
    ).split(),
    "system": (
        "asyncio concurrent ctypes fileinput ftplib getpass glob http imaplib ipaddress logging mailbox "
        "multiprocessing os pathlib platform poplib posixpath queue sched selectors shutil signal smtplib socket "
        "socketserver ssl subprocess tempfile threading urllib venv wsgiref xmlrpc"
    ).split(),
    "numpy": ["numpy"],
    "torch": "torch.autograd torch.cuda torch.distributions torch.linalg torch.nn torch.optim torch.sparse".split(),
}
_STANDARD_LIBRARY = ("text", "system")
_NOT_LIBRARY = {"test", "tests", "testing", "_testing"}
_MIN_WORDS = 20
_SAME_START = 12  # texts whose first words agree, up to this number and without digits, count as one text
_MASK = "module"
_NAMES = {name.split(".")[0] for modules in GROUPS.values() for name in modules} | {"np", "pytorch", "python"}
_NAMED = re.compile(rf"\b(?:{'|'.join(sorted(_NAMES))})\b", re.IGNORECASE)


def load(train: int = 800, test: int = 400) -> dict[str, list[tuple[str, str]]]:
    """``{"train": [(text, label)], "test": ...}``, every group in equal number, no text in both."""
    found = {group: _texts(group) for group in GROUPS}
    groups_of = Counter(key for texts in found.values() for key in texts)
    per_train, per_test = train // len(GROUPS), test // len(GROUPS)
    split = {"train": [], "test": []}
    for group, texts in found.items():
        ordered = sorted((text for key, text in texts.items() if groups_of[key] == 1), key=_digest)
        if len(ordered) < per_train + per_test:
            raise RuntimeError(f"group {group!r} has {len(ordered)} docstrings; it needs {per_train + per_test}")
        split["train"] += [(text, group) for text in ordered[:per_train]]
        split["test"] += [(text, group) for text in ordered[per_train : per_train + per_test]]
    return {part: sorted(rows, key=lambda row: _digest(row[0])) for part, rows in split.items()}


def _texts(group: str) -> dict[str, str]:
    """The group's distinct texts by their first words."""
    texts: dict[str, str] = {}
    for path in _sources(group):
        for docstring in _docstrings(path):
            words = _NAMED.sub(_MASK, docstring).split()
            if len(words) >= _MIN_WORDS:
                text = " ".join(words)
                texts.setdefault(_start(text), text)
    return texts


def _start(text: str) -> str:
    return " ".join(re.findall("[a-z]+", text.lower())[:_SAME_START])


def _sources(group: str) -> Iterator[Path]:
    for module in GROUPS[group]:
        if group in _STANDARD_LIBRARY:
            base = Path(sysconfig.get_path("stdlib"))
        else:
            base = Path(find_spec(module.split(".")[0]).origin).parents[1]
        path = base.joinpath(*module.split("."))
        if not path.is_dir():
            yield path.with_suffix(".py")
            continue
        for source in sorted(path.rglob("*.py")):
            if not _NOT_LIBRARY & set(source.relative_to(base).parts):
                yield source


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
