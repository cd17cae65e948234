"""The demo's task: docstrings, a local folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from bench.demo import docstrings
from bench.quality.sources import DataError, Splits, read
from bench.quality.tasks import Task, build, subset


def load(source: str, train: int, test: int, seed: int = 0) -> Task:
    """A classification task with at most ``train`` and ``test`` texts. Its development set is the test set.

    Args:
        source: ``"docstrings"``, a folder with train and test files (.jsonl or .csv), or a hub name.
        train: number of training texts, drawn by the seed with alternating labels.
        test: number of test texts, drawn in the same way.
        seed: seed of the draws.

    Raises:
        DataError: a split is missing, or the rows are not texts (or pairs of texts) with labels.
    """
    if source == "docstrings":
        rows = {
            part: [{"text": text, "label": label} for text, label in found]
            for part, found in docstrings.load(train, test).items()
        }
    else:
        rows = read(source)
    tested = rows.get("test") or rows.get("dev")
    if not rows.get("train") or not tested:
        raise DataError(
            f"{source} has {sorted(rows) or 'no split'}; it needs a train split, and test or dev with labels"
        )
    name = Path(source).name
    task = build(name, Splits(name, rows["train"], tested, []))
    if task.kind != "classification":
        raise DataError(
            f"{source} holds rows of the kind {task.kind!r}; it needs texts, or pairs of texts, with a label"
        )
    few = Splits(name, *(subset(task, task.splits.train, train, seed), subset(task, tested, test, seed)), [])
    return Task(name, few, task.format, task.labels)
