"""Train copies of one model step by step in turn: one with this package's attention, one with the naive attention."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.common.naive import naive
from bench.speed.timing import peak_bytes

from .models import logits_of, loss_of
from .sources import DataError
from .tasks import Collator, Task

ATTENTION: dict[str, Callable[[], AbstractContextManager]] = {"ours": nullcontext, "naive": naive}
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
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Batches:
    """Training features of a task, in whole batches whose order depends on the seed alone."""

    task: Task
    features: list[dict]
    collator: Collator
    size: int
    device: torch.device

    def order(self, seed: int) -> list[list[int]]:
        """The rows of each batch of one epoch."""
        if len(self.features) < self.size:
            raise DataError(f"{len(self.features)} training texts are fewer than one batch of {self.size}")
        rows = torch.randperm(len(self.features), generator=torch.Generator().manual_seed(seed)).tolist()
        return [rows[i : i + self.size] for i in range(0, len(rows) - self.size + 1, self.size)]

    def take(self, rows: list[int]) -> dict[str, Tensor]:
        """These rows as one batch with labels, on the device."""
        return {name: part.to(self.device) for name, part in self.collator([self.features[i] for i in rows]).items()}


def train(runs: dict[str, Run], data: Batches, epochs: int, seed: int, title: str, decay: bool = True) -> None:
    """Train all runs on the same batches, step by step in turn, so that a busy machine slows all of them alike.

    ``decay``: the learning rate falls linearly to zero.
    """
    order = [rows for epoch in range(epochs) for rows in data.order(seed + epoch)]
    schedules = [_schedule(run.optimizer, len(order)) for run in runs.values()] if decay else []
    for run in runs.values():
        run.model.train()
    interval = 0.5 if sys.stderr.isatty() else 20  # fewer lines in a log file
    with tqdm(total=len(order), desc=title, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        for i, rows in enumerate(order):
            batch = data.take(rows)
            for name in list(runs) if i % 2 else list(runs)[::-1]:
                torch.manual_seed(seed + i)
                with ATTENTION[name]():
                    _timed_step(runs[name], batch, data.task)
            for schedule in schedules:
                schedule.step()
            bar.set_postfix({name: f"{run.losses[-1]:.3f}" for name, run in runs.items()}, refresh=False)
            bar.update()
    for name, run in runs.items():
        with ATTENTION[name]():
            run.peak_bytes = peak_of_step(run, data.take(order[0]), data.task)


def first_steps(runs: dict[str, Run], data: Batches, steps: int, seed: int) -> None:
    """The first steps without dropout, in which the losses differ by rounding alone."""
    for run in runs.values():
        run.model.eval()
    for rows in data.order(seed)[:steps]:
        for name, run in runs.items():
            with ATTENTION[name]():
                run.losses.append(_step(run, data.take(rows), data.task).item())


def epochs_apart(runs: dict[str, Run], epochs: int) -> tuple[float, float]:
    """The largest difference between the mean losses of an epoch, and the noise of that difference (4 sigma)."""
    ours, naive_ = (torch.tensor(run.losses).view(epochs, -1) for run in runs.values())
    apart = (ours - naive_).mean(dim=1).abs()
    noise = 4 * (ours - naive_).std(dim=1, correction=0) / ours.shape[1] ** 0.5
    worst = int((apart - noise).argmax())
    return float(apart[worst]), float(noise[worst])


def peak_of_step(run: Run, batch: dict[str, Tensor], task: Task) -> int:
    """Most bytes of tensors alive at once in a forward and backward, above those alive before it."""
    return peak_bytes(batch["labels"].device, lambda: _loss(run.model, batch, task).backward())


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def _timed_step(run: Run, batch: dict[str, Tensor], task: Task) -> None:
    _wait(batch)
    began = time.perf_counter()
    loss = _step(run, batch, task)
    _wait(batch)
    run.seconds.append(time.perf_counter() - began)
    run.losses.append(loss.item())


def _step(run: Run, batch: dict[str, Tensor], task: Task) -> Tensor:
    run.optimizer.zero_grad()
    loss = _loss(run.model, batch, task)
    loss.backward()
    run.optimizer.step()
    return loss.detach()


def _loss(model: nn.Module, batch: dict[str, Tensor], task: Task) -> Tensor:
    given = {name: part for name, part in batch.items() if name != "labels"}
    return loss_of(logits_of(model, given, task), batch["labels"])


def _wait(batch: dict[str, Tensor]) -> None:
    if batch["labels"].is_cuda:
        torch.cuda.synchronize()
