"""Labelled texts: the docstring task, a local folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.demo import docstrings

Rows = list[tuple[str, str]]


class DataError(ValueError):
    """The data cannot be read as labelled texts; the message says what is needed."""


@dataclass(frozen=True)
class Task:
    """Texts with labels, split."""

    name: str
    train: Rows
    test: Rows

    @property
    def labels(self) -> list[str]:
        return sorted({label for _, label in self.train})


def load(source: str, train: int, test: int) -> Task:
    """``"docstrings"``, a folder with train/test as .jsonl or .csv, or a hub name; at most so many texts."""
    if source == "docstrings":
        rows = docstrings.load(train, test)
    elif Path(source).is_dir():
        rows = {part: _from_folder(Path(source), part) for part in ("train", "test")}
    else:
        rows = _from_hub(source)
    task = Task(Path(source).name, rows["train"][:train], rows["test"][:test])
    unknown = {label for _, label in task.test} - set(task.labels)
    if unknown or len(task.labels) < 2 or not task.test:
        raise DataError(
            f"{source}: it needs two labels or more in train, and in test no others (has {sorted(unknown)})"
        )
    return task


def _from_folder(folder: Path, part: str) -> Rows:
    lines, table = folder / f"{part}.jsonl", folder / f"{part}.csv"
    if lines.exists():
        records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif table.exists():
        with table.open(encoding="utf-8", newline="") as file:
            records = list(csv.DictReader(file))
    else:
        raise DataError(f"{folder} has no {part}.jsonl or {part}.csv")
    return _rows(records, f"{folder}/{part}")


def _from_hub(name: str) -> Rows:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{name!r} is no folder; to read it from the hub, `pip install datasets` first")
    import datasets

    loaded = datasets.load_dataset(name)
    test = next((part for part in ("test", "validation") if part in loaded), None)
    if "train" not in loaded or test is None:
        raise DataError(f"{name} has the splits {sorted(loaded)}; it needs train, and test or validation")
    shuffled = loaded["train"].shuffle(seed=0)  # hub data sets are often sorted by label
    return {"train": _rows(shuffled, f"{name}/train"), "test": _rows(loaded[test].shuffle(seed=0), f"{name}/{test}")}


def _rows(records, where: str) -> Rows:
    missing = next((column for column in ("text", "label") for r in records if column not in r), None)
    if missing:
        raise DataError(f"{where} has a record without {missing!r}; it needs the columns text and label")
    return [(str(r["text"]), str(r["label"])) for r in records]


class Batches:
    """Tokenised texts, handed out in batches that are padded to their longest."""

    def __init__(self, rows: Rows, labels: list[str], tokenizer, max_length: int, device: torch.device):
        self.encoded = tokenizer([text for text, _ in rows], truncation=True, max_length=max_length)["input_ids"]
        self.targets = torch.tensor([labels.index(label) for _, label in rows])
        self.tokenizer, self.device = tokenizer, device

    def __len__(self) -> int:
        return len(self.encoded)

    def take(self, rows: list[int]) -> dict[str, Tensor]:
        """Model inputs of these rows, with labels, on the device."""
        batch = self.tokenizer.pad({"input_ids": [self.encoded[i] for i in rows]}, return_tensors="pt")
        batch["labels"] = self.targets[rows]
        return {name: part.to(self.device) for name, part in batch.items()}

    def in_order(self, size: int) -> list[list[int]]:
        return [list(range(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def shuffled(self, size: int, seed: int) -> list[list[int]]:
        """Whole batches in an order that depends on the seed alone."""
        if len(self) < size:
            raise DataError(f"{len(self)} training texts are fewer than one batch of {size}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return [order[i : i + size] for i in range(0, len(self) - size + 1, size)]
