"""Training two copies of one model in step: with this package's attention, and the usual way."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from tqdm import tqdm

from bench.common.naive import naive
from bench.speed.timing import peak_bytes

from .data import Batches

WAYS: dict[str, Callable[[], AbstractContextManager]] = {"ours": nullcontext, "naive": naive}
_WARM_UP = 3  # steps that are not timed


@dataclass
class Run:
    """One training: its curve, its cost and its result."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None

    @property
    def step_seconds(self) -> float:
        """Median over the timed steps."""
        return statistics.median(self.seconds[_WARM_UP:] or self.seconds)

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def start(model: nn.Module, learning_rate: float, gate_learning_rate: float) -> Run:
    """AdamW over what is trained. A step moves a gate's logit by up to rate * width, so gates need a lower rate."""
    trained = [(name.endswith("gate_weight"), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for is_gate, p in trained if not is_gate], "lr": learning_rate},
        {"params": [p for is_gate, p in trained if is_gate], "lr": gate_learning_rate},
    ]
    return Run(model, torch.optim.AdamW(groups))


def train(runs: dict[str, Run], data: Batches, epochs: int, batch_size: int, seed: int, title: str) -> None:
    """Train all runs on the same batches, step by step in turn, so that a busy machine slows all of them alike."""
    order = [rows for epoch in range(epochs) for rows in data.shuffled(batch_size, seed + epoch)]
    schedules = [_decay(run.optimizer, len(order)) for run in runs.values()]
    for run in runs.values():
        run.model.train()
    interval = 0.5 if sys.stderr.isatty() else 20  # a log file is no terminal
    with tqdm(total=len(order), desc=title, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        for i, rows in enumerate(order):
            batch = data.take(rows)
            for way in list(runs) if i % 2 else list(runs)[::-1]:
                torch.manual_seed(seed + i)
                with WAYS[way]():
                    _timed_step(runs[way], batch)
            for schedule in schedules:
                schedule.step()
            bar.set_postfix({way: f"{run.losses[-1]:.3f}" for way, run in runs.items()}, refresh=False)
            bar.update()
    for way, run in runs.items():
        with WAYS[way]():
            run.peak_bytes = peak_of_step(run, data.take(order[0]))


def compare_curves(runs: dict[str, Run], data: Batches, steps: int, batch_size: int, seed: int) -> None:
    """The first steps without dropout, where the ways differ by rounding alone."""
    for run in runs.values():
        run.model.eval()
    for rows in data.shuffled(batch_size, seed)[:steps]:
        batch = data.take(rows)
        for way, run in runs.items():
            with WAYS[way]():
                run.losses.append(_step(run, batch).item())


def epochs_apart(runs: dict[str, Run], epochs: int) -> tuple[float, float]:
    """The farthest that the ways' mean losses of an epoch lie apart, and the noise of that difference (4 sigma)."""
    ours, naive = (torch.tensor(run.losses).view(epochs, -1) for run in runs.values())
    apart = (ours - naive).mean(dim=1).abs()
    noise = 4 * (ours - naive).std(dim=1, correction=0) / ours.shape[1] ** 0.5
    worst = int((apart - noise).argmax())
    return float(apart[worst]), float(noise[worst])


def _decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def _timed_step(run: Run, batch: dict[str, Tensor]) -> None:
    _wait(batch)
    began = time.perf_counter()
    loss = _step(run, batch)
    _wait(batch)
    run.seconds.append(time.perf_counter() - began)
    run.losses.append(loss.item())


def _step(run: Run, batch: dict[str, Tensor]) -> Tensor:
    run.optimizer.zero_grad()
    loss = run.model(**batch).loss
    loss.backward()
    run.optimizer.step()
    return loss.detach()


def _wait(batch: dict[str, Tensor]) -> None:
    if batch["labels"].is_cuda:
        torch.cuda.synchronize()


def peak_of_step(run: Run, batch: dict[str, Tensor]) -> int:
    """Most bytes of tensors alive at once in a forward and backward, above those alive before it."""
    return peak_bytes(batch["labels"].device, lambda: run.model(**batch).loss.backward())


@torch.no_grad()
def evaluate(run: Run, data: Batches, batch_size: int) -> None:
    """Fill in the run's test logits, accuracy and macro-F1."""
    run.logits = predict(run.model, data, batch_size)
    predicted, targets = run.logits.argmax(dim=-1).numpy(), data.targets.numpy()
    run.metrics = {
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(f1_score(targets, predicted, average="macro")),
    }


@torch.no_grad()
def predict(model: nn.Module, data: Batches, batch_size: int) -> Tensor:
    model.eval()
    return torch.cat([model(**data.take(rows)).logits.float().cpu() for rows in data.in_order(batch_size)])
