"""Models and tokenisers of a task, and their predictions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from bench.quality import methods, pretrained

from .methods import Settings
from .tasks import IGNORED, Collator, Task

_BATCH = 32


def quiet(model: str) -> None:
    """Switch off hub requests for a local model, and messages between the progress bars. For a whole process."""
    if Path(pretrained.source(model)).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages
    # transformers imports torchao where it is installed; it warns about what it cannot use.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_tokenizer(model: str, task: Task):
    """The model's tokeniser; byte-level ones need ``add_prefix_space`` to read single words."""
    options = {"add_prefix_space": True} if task.kind == "tags" else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained.source(model), **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fresh_model(task: Task, settings: Settings, tokenizer, seed: int) -> nn.Module:
    """The pretrained model with a head drawn from the seed."""
    kind = "TokenClassification" if task.kind == "tags" else "SequenceClassification"
    source = pretrained.source(settings.model)
    config = transformers.AutoConfig.from_pretrained(source, num_labels=task.outputs)
    methods.set_dropout(config, settings.dropout, settings.attention_dropout)
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(seed)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(source, config=config, dtype=torch.float32)


def logits_of(model: nn.Module, inputs: dict[str, Tensor], task: Task) -> Tensor:
    """``[B, labels]``, ``[B, choices]`` or ``[B, T, tags]``."""
    if task.kind != "choice":
        return model(**inputs).logits
    batch, choices = inputs["input_ids"].shape[:2]
    return model(**{name: part.flatten(0, 1) for name, part in inputs.items()}).logits.view(batch, choices)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in float32, ignored positions left out."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def batches(features: list[dict], collator: Collator, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Features in their order as batches with labels, on the device."""
    for i in range(0, len(features), _BATCH):
        yield {name: part.to(device) for name, part in collator(features[i : i + _BATCH]).items()}


def inputs(features: list[dict], collator: Collator, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The same batches as arguments of the model's forward: no labels, each choice a row."""
    for batch in batches(features, collator, device):
        batch.pop("labels")
        # Choices have three dimensions, [B, C, T].
        yield {name: part.flatten(0, 1) if part.ndim == 3 else part for name, part in batch.items()}


@torch.no_grad()
def predict(model: nn.Module, task: Task, features: list[dict], collator: Collator) -> tuple[Tensor, Tensor]:
    """Logits and labels of all features, on the CPU; those of tags are padded to one length."""
    model.eval()
    parts, targets = [], []
    for batch in batches(features, collator, next(model.parameters()).device):
        targets.append(batch.pop("labels").cpu())
        parts.append(logits_of(model, batch, task).float().cpu())
    if task.kind == "tags":
        width = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts]
        targets = [F.pad(part, (0, width - part.shape[1]), value=IGNORED) for part in targets]
    return torch.cat(parts), torch.cat(targets)
