"""From rows to model inputs: which columns a task reads, how its inputs are written, and how it is scored.

The format is recognised by the columns, so a data set of another name runs as well. How the inputs are written follows
P-tuning v2 (THUDM/P-tuning-v2), so that scores can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .sources import DataError, Row, Splits

IGNORED = -100
_LINK = {"cause": "because", "effect": "so"}


@dataclass(frozen=True)
class Format:
    """How rows with certain columns become text.

    ``columns`` must be there, dots reach into nested objects; ``texts`` gives one text or pair for a row, or one for
    each choice.
    """

    name: str
    columns: tuple[str, ...]
    texts: Callable[[Row], list[tuple[str, ...]]] | None
    kind: str = "classification"  # or "choice", or "tags"


def _word_in_context(row: Row) -> list[tuple[str, ...]]:
    return [(f"{row['word']}: {row['sentence1']}", f"{row['word']}: {row['sentence2']}")]


def _spans(row: Row) -> list[tuple[str, ...]]:
    spans = row.get("target", row)
    return [(f"{spans['span2_text']}: {row['text']}", spans["span1_text"])]


def _choices(row: Row) -> list[tuple[str, ...]]:
    link = _LINK.get(row.get("question"))
    premise = f"{row['premise']} {link}" if link else " ".join(filter(None, (row["premise"], row.get("question"))))
    return [(premise, row[name]) for name in _choice_columns(row)]


def _choice_columns(row: Row) -> list[str]:
    return sorted(name for name in row if name.startswith("choice") and name[6:].isdigit())


def right_choice(row: Row) -> int:
    """The right choice's index; data sets give it, or the column's name."""
    columns, label = _choice_columns(row), row["label"]
    if label in columns:
        return columns.index(label)
    if not str(label).isdigit() or int(label) >= len(columns):
        raise DataError(f"a row has the label {label!r}; it needs the index of one of {', '.join(columns)}")
    return int(label)


def _pair(first: str, second: str) -> Format:
    return Format(f"{first} + {second}", (first, second, "label"), lambda row: [(row[first], row[second])])


def _single(name: str) -> Format:
    return Format(name, (name, "label"), lambda row: [(row[name],)])


# The first format whose columns are all present is used.
FORMATS = (
    Format("tokens", ("tokens", "tags"), None, "tags"),
    Format("choices", ("premise", "choice1", "choice2", "label"), _choices, "choice"),
    Format("spans", ("text", "target.span1_text", "target.span2_text", "label"), _spans),
    Format("spans", ("text", "span1_text", "span2_text", "label"), _spans),
    Format("word in context", ("word", "sentence1", "sentence2", "label"), _word_in_context),
    *(_pair(*names) for names in (("question", "passage"), ("premise", "hypothesis"), ("sentence1", "sentence2"))),
    *(_pair(*names) for names in (("text1", "text2"), ("question1", "question2"), ("question", "sentence"))),
    *(_single(name) for name in ("text", "sentence", "content")),
)


def format_of(row: Row, fields: tuple[str, ...] = ()) -> Format:
    """The format of a row, or the one that reads the columns named in ``fields`` (one, or two for a pair).

    Raises:
        DataError: no format fits.
    """
    if fields:
        if len(fields) > 2:
            raise DataError(f"fields has {len(fields)} names; it needs one or two")
        found = [_single(*fields) if len(fields) == 1 else _pair(*fields)]
    else:
        found = FORMATS
    for candidate in found:
        if all(_has(row, column) for column in candidate.columns):
            return candidate
    wanted = f"the columns {', '.join(found[0].columns)}" if fields else "one of: "
    wanted += "" if fields else "; ".join(", ".join(f.columns) for f in FORMATS)
    raise DataError(f"the rows have the columns {', '.join(row)}; they need {wanted}")


def _has(row: Row, column: str) -> bool:
    head, _, rest = column.partition(".")
    return head in row and (not rest or (isinstance(row[head], dict) and _has(row[head], rest)))


@dataclass(frozen=True)
class Task:
    """Splits with their format and labels."""

    name: str
    splits: Splits
    format: Format
    labels: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def metric(self) -> str:
        return "span F1" if self.kind == "tags" else "accuracy"

    @property
    def outputs(self) -> int:
        """Width of the head: one score for each choice, or one for each label."""
        return 1 if self.kind == "choice" else len(self.labels)


def build(name: str, splits: Splits, fields: tuple[str, ...] = ()) -> Task:
    """Recognise the format, collect the labels of the training rows, and check the other splits against them."""
    found = format_of(splits.train[0], fields)
    named = {"train": splits.train, "dev": splits.dev, "test": splits.test}
    for part, rows in named.items():
        for i, row in enumerate(rows):
            missing = [column for column in found.columns if not _has(row, column)]
            if missing:
                raise DataError(f"{splits.name}, {part}, row {i + 1}, has no {missing[0]!r}")
    labels = _tags(named) if found.kind == "tags" else sorted({str(row["label"]) for row in splits.train})
    task = Task(name, splits, found, labels)
    if found.kind == "choice":
        _check_choices(splits)
        return task
    unknown = {str(row["label"]) for rows in named.values() for row in rows if found.kind != "tags"} - set(labels)
    if unknown or len(labels) < 2:
        raise DataError(
            f"{splits.name} trains on the labels {labels}; it needs two or more, and all of dev's and test's "
            f"({sorted(unknown) or 'none'} unknown)"
        )
    return task


def _tags(named: dict[str, list[Row]]) -> list[str]:
    # Every split's tags: an unseen one cannot be predicted, but has to be counted as missed.
    return sorted({tag for rows in named.values() for row in rows for tag in row["tags"]} | {"O"})


def _check_choices(splits: Splits) -> None:
    columns = _choice_columns(splits.train[0])
    for row in (*splits.train, *splits.dev, *splits.test):
        right_choice(row)
        if _choice_columns(row) != columns:
            raise DataError(f"{splits.name} has rows with {', '.join(columns)}, and with {_choice_columns(row)}")


def subset(task: Task, rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """``count`` rows drawn by the seed, labels in turn where there are labels; None: all."""
    if count is None or count >= len(rows):
        return rows
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    if task.kind != "classification":
        return [rows[i] for i in order[:count]]
    groups = [[i for i in order if str(rows[i]["label"]) == label] for label in task.labels]
    turns = [group[turn] for turn in range(max(map(len, groups))) for group in groups if turn < len(group)]
    return [rows[i] for i in turns[:count]]


def encode(task: Task, rows: list[Row], tokenizer, max_length: int) -> list[dict]:
    """Features for the collator: ``input_ids`` (a list for each choice) and ``labels``."""
    if task.kind == "tags":
        return [_encode_tags(row, task.labels, tokenizer, max_length) for row in rows]
    options = {"truncation": True, "max_length": max_length}
    features = []
    for row in rows:
        encoded = [dict(tokenizer(*texts, **options)) for texts in task.format.texts(row)]
        if task.kind == "choice":
            features.append({"choices": encoded, "labels": right_choice(row)})
        else:
            features.append({**encoded[0], "labels": task.labels.index(str(row["label"]))})
    return features


def _encode_tags(row: Row, labels: list[str], tokenizer, max_length: int) -> dict:
    """The label of a word is at its first piece; all other positions are ignored."""
    encoded = tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
    targets, read, last = [], [], None
    for word in encoded.word_ids():
        first = word is not None and word != last
        targets.append(labels.index(row["tags"][word]) if first else IGNORED)
        read += [word] if first else []
        last = word
    return {**encoded, "labels": targets, "words": read}


class Collator:
    """Pads features to the longest of the batch; choices become ``[B, C, T]``, labels of tags ``[B, T]``."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, features: list[dict]) -> dict:
        import torch

        labels = [feature["labels"] for feature in features]
        choices = "choices" in features[0]
        flat = [c for f in features for c in f["choices"]] if choices else features
        flat = [{name: part for name, part in f.items() if name not in ("labels", "words")} for f in flat]
        batch = dict(self.tokenizer.pad(flat, return_tensors="pt"))
        if isinstance(labels[0], list):
            width, left = batch["input_ids"].shape[1], self.tokenizer.padding_side == "left"
            fill = [[IGNORED] * (width - len(row)) for row in labels]
            labels = [pad + row if left else row + pad for row, pad in zip(labels, fill)]
        if choices:
            batch = {name: part.view(len(features), -1, part.shape[1]) for name, part in batch.items()}
        batch["labels"] = torch.tensor(labels)
        return batch


def score(task: Task, logits: np.ndarray, targets: np.ndarray, rows: list[Row], features: list[dict]) -> float:
    """Accuracy, or the span micro-F1 over all words: one that was cut off counts as tagged ``O``."""
    predicted = logits.argmax(axis=-1)
    if task.kind != "tags":
        return float((predicted == targets).mean())
    from seqeval.metrics import f1_score

    gold, found = [], []
    for row, feature, line, target in zip(rows, features, predicted, targets):
        tags = [task.labels[p] for p, t in zip(line, target) if t != IGNORED]
        gold.append(row["tags"])
        found.append(_spread(tags, feature, row))
    return float(f1_score(gold, found, average="micro", zero_division=0))


def _spread(tags: list[str], feature: dict, row: Row) -> list[str]:
    """Predictions for the words that were read, in their places."""
    spread = ["O"] * len(row["tokens"])
    for word, tag in zip(feature["words"], tags):
        spread[word] = tag
    return spread
