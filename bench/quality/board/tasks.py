"""The board's tasks as language modelling: prompts with right answers, and how they are scored.

RTE, COPA, WSC and other labelled data (`bench.quality.tasks` recognises their columns) are scored by the most probable
answer; tagged data is written out as text, and generated; documents and questions about a document are built in.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.demo import document
from bench.quality import packaged, sources, tasks
from bench.quality.sources import DataError, Row

BUILT_IN = ("documents", "questions")
_WORDS = {"entailment": "yes", "not_entailment": "no", "True": "yes", "False": "no", "1": "yes", "0": "no"}


@dataclass(frozen=True)
class Size:
    """How much of a task is used, and how long a training is."""

    train: int
    test: int
    steps: int
    batch_size: int
    max_length: int  # tokens of a row; a longer one loses the beginning of its prompt
    dev: int = 16  # training rows that choose between settings; they are not trained on


# One night on two cores, and about 70 minutes on one core of a server (predicted from the time of one step).
SIZES = {
    "full": {
        "documents": Size(train=128, test=32, steps=48, batch_size=4, max_length=128),
        "questions": Size(train=64, test=32, steps=48, batch_size=8, max_length=128, dev=6),
        "copa": Size(train=320, test=100, steps=60, batch_size=8, max_length=48, dev=48),
        "rte": Size(train=512, test=200, steps=48, batch_size=8, max_length=128, dev=48),
        "wsc": Size(train=480, test=104, steps=48, batch_size=8, max_length=80, dev=48),
        "wnut17": Size(train=512, test=160, steps=48, batch_size=8, max_length=80, dev=32),
    },
    "small": {
        "documents": Size(train=64, test=16, steps=16, batch_size=4, max_length=64, dev=8),
        "copa": Size(train=256, test=100, steps=24, batch_size=8, max_length=40),
    },
}
_OTHER = Size(train=512, test=200, steps=48, batch_size=8, max_length=128)


def size_of(name: str, scale: str) -> Size:
    """The size of a task; a small one for a task that has none is the full one with 16 steps and 64 test rows."""
    full = SIZES["full"].get(name, _OTHER)
    if scale == "full":
        return full
    return SIZES["small"].get(name, Size(full.train, min(full.test, 64), 16, full.batch_size, full.max_length, 6))


@dataclass(frozen=True)
class Item:
    """Token ids of a prompt and of its possible answers; ``answers[right]`` is the right one."""

    prompt: list[int]
    answers: list[list[int]]
    right: int = 0
    expected: object = None  # what `Task.found` compares a generated text with


@dataclass(frozen=True)
class Task:
    """Items to train on, to choose settings by, and to report on.

    ``kind``: "choice" (the most probable answer counts), "text" (generated, and scored by ``found``), or "loss".
    """

    name: str
    kind: str
    metric: str
    train: list[Item]
    dev: list[Item]
    test: list[Item]
    start: list[int]  # tokens of the text from which prefixes start
    found: Callable[[list[str], list[Item]], float] | None = None

    @property
    def lower_is_better(self) -> bool:
        return self.kind == "loss"


def build(name: str, source: str | None, tokenizer, size: Size) -> Task:
    """The task of this name: one of `BUILT_IN`, or labelled data read from ``source``.

    Raises:
        DataError: the data cannot be read, or has too few rows.
    """
    if name == "documents":
        return _documents(tokenizer, size)
    if name == "questions":
        return _questions(tokenizer, size)
    if source is None:
        raise DataError(f"the task {name!r} needs --data; without it there are {', '.join(BUILT_IN)}")
    given = tasks.build(name, sources.load(source))
    train = random.Random(0).sample(given.splits.train, len(given.splits.train))
    test = (given.splits.test or given.splits.dev)[: size.test]
    if len(train) <= size.dev:
        raise DataError(f"{name} has {len(train)} training rows; it needs more than {size.dev}")
    parts = [[_item(given, row, tokenizer, size.max_length) for row in rows] for rows in (train, test)]
    dev, train = parts[0][: size.dev], parts[0][size.dev :][: size.train]
    start = [token for item in train for token in item.prompt + item.answers[item.right]]
    if given.kind == "tags":
        return Task(name, "text", "span F1", train, dev, parts[1], start, entities_f1)
    return Task(name, "choice", "accuracy", train, dev, parts[1], start)


def _item(task: tasks.Task, row: Row, tokenizer, max_length: int) -> Item:
    prompt, answers, right, expected = as_text(task, row)
    end = [tokenizer.eos_token_id] if task.kind == "tags" else []
    read = [tokenizer(f" {answer}", add_special_tokens=False).input_ids + end for answer in answers]
    room = max_length - max(map(len, read))
    if room < 1:
        raise DataError(f"{task.name} has an answer of {max_length - room} tokens; it needs less than {max_length}")
    return Item(tokenizer(prompt, add_special_tokens=False).input_ids[-room:], read, right, expected)


def as_text(task: tasks.Task, row: Row) -> tuple[str, list[str], int, object]:
    """A row as a prompt, its possible answers, the index of the right one, and what generated text is compared with."""
    if task.kind == "tags":
        spans = entities(row["tokens"], row["tags"])
        written = "; ".join(f"{kind}: {text}" for kind, text in spans) or "none"
        return f"Text: {' '.join(row['tokens'])}\nEntities:", [written], 0, spans
    texts = task.format.texts(row)
    if task.kind == "choice":
        premise, _, link = texts[0][0].rpartition(" ")
        choices = [choice[:1].lower() + choice[1:] for _, choice in texts]
        return f"{premise.rstrip('.')} {link}", choices, tasks.right_choice(row), None
    words = [_WORDS.get(label, label) for label in task.labels]
    return _prompt(task.format.name, texts[0], row), words, task.labels.index(str(row["label"])), None


def _prompt(form: str, texts: tuple[str, ...], row: Row) -> str:
    if form == "spans":
        span, text = texts[0].split(": ", 1)
        return f'{text}\nQuestion: does "{span}" refer to "{texts[1]}"?\nAnswer:'
    if form == "word in context":
        word = row["word"]
        return f'{row["sentence1"]}\n{row["sentence2"]}\nQuestion: has "{word}" the same meaning in both?\nAnswer:'
    if len(texts) == 2:
        return f"{texts[0]}\nQuestion: is this true? {texts[1]}\nAnswer:"
    return f"{texts[0]}\nLabel:"


def entities(tokens: Sequence[str], tags: Sequence[str]) -> list[tuple[str, str]]:
    """The entities of BIO tags as ``(kind, text)``."""
    found: list[tuple[str, list[str]]] = []
    inside = ""
    for token, tag in zip(tokens, tags):
        kind = tag[2:]
        if kind and (tag[0] in "BS" or kind != inside):
            found.append((kind, [token]))
        elif kind:
            found[-1][1].append(token)
        inside = kind
    return [(kind, " ".join(words)) for kind, words in found]


def entities_f1(texts: list[str], items: list[Item]) -> float:
    """The micro-F1 of entities ``kind: text``, separated by ``;``."""
    right = given = wanted = 0
    for text, item in zip(texts, items):
        parts = (part.split(":", 1) for part in text.split(";"))
        found = Counter((part[0].strip(), part[1].strip()) for part in parts if len(part) == 2)
        expected = Counter(item.expected)
        right += (found & expected).total()
        given += found.total()
        wanted += expected.total()
    return 2 * right / (given + wanted) if given + wanted else 0.0


def _documents(tokenizer, size: Size) -> Task:
    """Docstrings of Python's standard library: the next-token loss on modules that are not trained on."""
    train = packaged.windows(tokenizer, packaged.TRAINED, size.train + size.dev, size.max_length).tolist()
    test = packaged.windows(tokenizer, packaged.HELD_OUT, size.test, size.max_length).tolist()
    parts = [[Item(ids[:1], [ids[1:]]) for ids in rows] for rows in (train[size.dev :], train[: size.dev], test)]
    start = [token for ids in train[size.dev :] for token in ids]
    return Task("documents", "loss", "next-token loss", *parts, start)


def _questions(tokenizer, size: Size) -> Task:
    """Questions about the demo's document, which is not in the prompt: prefixes start from it, and all methods train on
    answers to other phrasings."""
    given = document.built_in()

    def item(row: document.Question) -> Item:
        answer = [*tokenizer(f" {row.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompt = tokenizer(f"Question: {row.question}\nAnswer:", add_special_tokens=False).input_ids
        return Item(prompt, [answer], 0, row.expected)

    train, test = [item(row) for row in given.train], [item(row) for row in given.asked][: size.test]
    start = tokenizer(given.text, add_special_tokens=False).input_ids
    return Task("questions", "text", "answers found", train[size.dev :], train[: size.dev], test, start, answers_found)


def answers_found(texts: list[str], items: list[Item]) -> float:
    """How many of the texts contain the expected words; upper case does not matter."""
    right = [re.search(rf"\b{re.escape(str(i.expected))}\b", t, re.IGNORECASE) for t, i in zip(texts, items)]
    return sum(found is not None for found in right) / len(right)
