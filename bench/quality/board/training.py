"""One training of the board, and its evaluation."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apt_kernels
from bench.quality.tasks import IGNORED

from .methods import METHODS, Start
from .tasks import Item, Size, Task

_CLIP, _WARM_UP = 1.0, 0.1  # norm of gradients; part of the steps
_ROWS = 16  # of an evaluation's batch
_NEW_TOKENS = 40


def run(
    base: nn.Module,
    tokenizer,
    task: Task,
    size: Size,
    method: str,
    settings: dict,
    start: Start,
    notify: Callable[[int, float], None],
    choosing: bool = False,
) -> dict:
    """Train a copy of the base model. Returns the record: score, loss, parameters, seconds.

    ``choosing``: evaluate on the held-out training rows in place of the test rows. ``notify`` gets the number of steps
    and the training loss.
    """
    began = time.perf_counter()
    model = METHODS[method].prepare(copy.deepcopy(base), start, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    last = _train(model, trained, tokenizer, task, size, settings, start.seed, notify) if trained else None
    seconds = time.perf_counter() - began
    items = task.dev if choosing else task.test
    loss, score = evaluate(model, tokenizer, task, items)
    return {
        "score": score,
        "loss": loss,
        "training_loss": last,
        "parameters": sum(p.numel() for p in trained),
        "rows": {"train": len(task.train), "evaluated": len(items)},
        "seconds": round(time.perf_counter() - began, 1),
        "training_seconds": round(seconds, 1),
    }


def _train(model, trained, tokenizer, task: Task, size: Size, settings: dict, seed: int, notify) -> float:
    rate, groups = settings["lr"], trained
    if "gate_lr" in settings:
        groups = apt_kernels.parameter_groups(model, lr=rate, gate_lr=settings["gate_lr"])
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)
    warm_up = max(1, round(_WARM_UP * size.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1 - step / size.steps)
    )
    torch.manual_seed(seed)
    drawn = _order(len(task.train), size.batch_size, seed)
    model.train()
    total, loss = 0.0, torch.zeros(())
    for step in range(size.steps):
        rows = [task.train[i] for i in next(drawn)]
        loss = loss_of(model, batch(tokenizer, [(item.prompt, item.answers[item.right]) for item in rows]))
        loss.backward()
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        notify(step + 1, loss.item())
    if not math.isfinite(total):
        raise FloatingPointError(f"the training loss of {task.name} is not finite; use a lower rate than {rate:g}")
    return loss.item()


def _order(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of row indices, epoch by epoch; the last rows of an epoch that fill no batch are left out."""
    draw, size = random.Random(seed), min(size, count)
    while True:
        order = draw.sample(range(count), count)
        for i in range(0, count - size + 1, size):
            yield order[i : i + size]


def batch(tokenizer, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Prompts with answers, padded on the right; labels are the answers' tokens."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    parts: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        rest = width - len(prompt) - len(answer)
        parts["input_ids"].append(prompt + answer + [pad] * rest)
        parts["attention_mask"].append([1] * (width - rest) + [0] * rest)
        parts["labels"].append([IGNORED] * len(prompt) + answer + [IGNORED] * rest)
    return {name: torch.tensor(part) for name, part in parts.items()}


def token_losses(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss at each position and whether it counts, ``[B, T - 1]``."""
    labels = given["labels"][:, 1:]
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape), labels != IGNORED


def loss_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The mean loss over the tokens of all answers."""
    losses, counted = token_losses(model, given)
    return losses.sum() / counted.sum()


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer, task: Task, items: list[Item]) -> tuple[float, float]:
    """The mean loss over the tokens of the right answers, and the task's score."""
    model.eval()
    flat = [(item.prompt, answer) for item in items for answer in item.answers]
    sums, counts = [], []
    for i in range(0, len(flat), _ROWS):
        losses, counted = token_losses(model, batch(tokenizer, flat[i : i + _ROWS]))
        sums += losses.sum(dim=1).tolist()
        counts += counted.sum(dim=1).tolist()
    choices = len(items[0].answers)
    right = [i * choices + item.right for i, item in enumerate(items)]
    loss = sum(sums[i] for i in right) / sum(counts[i] for i in right)
    if task.kind == "loss":
        return loss, loss
    if task.found is not None:
        return loss, task.found(generate(model, tokenizer, items), items)
    means = torch.tensor([a / n for a, n in zip(sums, counts)]).view(-1, choices)
    targets = torch.tensor([item.right for item in items])
    return loss, (means.argmin(dim=1) == targets).float().mean().item()


@torch.no_grad()
def generate(model: nn.Module, tokenizer, items: list[Item]) -> list[str]:
    """The most probable continuation of each prompt, up to the end of its line."""
    found: list[str] = []
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for i in range(0, len(items), _ROWS):
        prompts = [item.prompt for item in items[i : i + _ROWS]]
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = model.generate(
            input_ids=ids, attention_mask=real, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=pad
        )
        texts = tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        found += [text.strip().partition("\n")[0] for text in texts]
    return found
