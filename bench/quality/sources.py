"""Read labelled data as splits of rows: a folder of JSONL, CSV or column files, or a data set of the hub.

A row of a JSONL file is its JSON object, a row of a CSV file has the names of the header, and a row of a column file is
``{"tokens": [...], "tags": [...]}``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

Row = dict
# The last of these words in a file's name determines its split: wnut17train.conll, emerging.dev.conll, eng.testb.
_SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "testa": "dev"}
_SPLITS |= {"test": "test", "testb": "test"}
_SPLIT_NAME = re.compile("|".join(sorted(_SPLITS, key=len, reverse=True)))


class DataError(ValueError):
    """The data cannot be read; the message names the file or column, what it has and what is needed."""


@dataclass(frozen=True)
class Splits:
    """Rows to train on, to choose the epoch by (``dev``), and to report on (``test``, may be empty)."""

    name: str
    train: list[Row]
    dev: list[Row]
    test: list[Row]


def load(source: str) -> Splits:
    """A folder with train and dev (and test) files, or a hub name, ``owner/name`` or ``owner/name:configuration``.

    Raises:
        DataError: a split is missing, or a file cannot be read.
    """
    found = read(source)
    for part in ("train", "dev"):
        if not found.get(part):
            raise DataError(f"{source} has {sorted(found) or 'no split'}; it needs rows to train on and a dev split")
    return Splits(Path(source).name, found["train"], found["dev"], found.get("test", []))


def read(source: str) -> dict[str, list[Row]]:
    """The rows of every split that a folder or a hub data set has: ``train``, ``dev``, ``test``."""
    folder = Path(source).expanduser()
    return _from_folder(folder) if folder.is_dir() else _from_hub(source)


def _from_folder(folder: Path) -> dict[str, list[Row]]:
    found: dict[str, tuple[Path, list[Row]]] = {}
    for path in sorted(folder.iterdir()):
        names = _SPLIT_NAME.findall(path.name.lower())
        if not path.is_file() or path.name.startswith(".") or not names:
            continue
        part = _SPLITS[names[-1]]
        if part in found:
            raise DataError(f"{folder} has two files for {part}: {found[part][0].name} and {path.name}")
        found[part] = path, _READERS.get(path.suffix, _columns)(path)
    rows = {part: rows for part, (_, rows) in found.items()}
    test = rows.get("test")
    if test and not {"label", "tags"} & set(test[0]):
        del rows["test"]  # SuperGLUE hides its test labels
    return rows


def _jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path.name}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, line {number}, is a {type(row).__name__}; it needs a JSON object")
        rows.append(row)
    return rows


def _columns(path: Path) -> list[Row]:
    """CoNLL format: one token a line with its tag in the last column, an empty line between sentences."""
    rows, tokens, tags = [], [], []
    for number, line in enumerate([*path.read_text(encoding="utf-8").splitlines(), ""], 1):
        cells = line.split("\t") if "\t" in line else line.split()
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            if tokens:
                rows.append({"tokens": tokens, "tags": tags})
            tokens, tags = [], []
        elif cells[0] == "-DOCSTART-" or (cells[0] == "#" and len(cells) > 2 and cells[1] == "id"):
            continue
        elif len(cells) < 2 or not re.fullmatch(r"O|[BIES]-.+", cells[-1]):
            raise DataError(
                f"{path.name}, line {number}, is {line!r}; it needs a token and a BIO tag in its last column"
            )
        else:
            tokens.append(cells[0])
            tags.append(cells[-1])
    return rows


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


_READERS = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv}


def _from_hub(name: str) -> dict[str, list[Row]]:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name!r} is not a folder; to read it from the hub, install the package `datasets` first")
    import datasets

    path, _, configuration = name.partition(":")
    loaded = datasets.load_dataset(path, configuration or None)
    return {_SPLITS[part]: from_dataset(loaded[part]) for part in loaded if part in _SPLITS}


def from_dataset(split) -> list[Row]:
    """Rows of a ``datasets.Dataset``: names in the place of class numbers, ``tags`` whatever the column is called."""
    names = {}
    for column, feature in split.features.items():
        inner = getattr(feature, "feature", feature)
        if hasattr(inner, "int2str"):
            names[column] = inner
    tagged = next((c for c in ("ner_tags", "tags", "ner") if c in split.column_names), None)
    rows = []
    for row in split:
        row = {c: _named(value, names.get(c)) for c, value in row.items()}
        if tagged and "tokens" in row:
            row = {"tokens": row["tokens"], "tags": row[tagged]}
        rows.append(row)
    hidden = rows and "label" in rows[0] and all(row["label"] in (None, -1) for row in rows)
    return [] if hidden else rows


def _named(value, feature):
    if feature is None:
        return value
    if isinstance(value, list):
        return [_named(entry, feature) for entry in value]
    return value if value is None or value < 0 else feature.int2str(value)
