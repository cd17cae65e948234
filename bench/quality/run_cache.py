"""Run many trainings with a progress bar; completed runs are cached."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from bench.common.machine import described
from bench.quality import running

from .methods import Settings
from .store import Store, key_of
from .tasks import Task


@dataclass(frozen=True)
class Job:
    """One training."""

    task: Task
    method: str
    seed: int
    settings: Settings
    row: str = ""  # the row of the table in which it is shown

    @property
    def key(self) -> dict:
        return key_of(self.task.name, self.method, self.seed, self.settings)


@dataclass
class RunCache:
    """A folder with the records of completed trainings and the checkpoint of an unfinished one."""

    output: Path
    resume: bool = True  # keep a checkpoint from which an interrupted training continues
    store: Store = field(init=False)

    def __post_init__(self):
        self.store = Store(self.output / "runs.jsonl")

    def records(self, jobs: list[Job]) -> list[dict]:
        """The record of each job; jobs without one are trained."""
        pending = [job for job in jobs if self.store.find(job.key) is None]
        with self._bar(pending) as bar:
            for job in pending:
                self.train(job, bar)
        return [self.store.find(job.key) for job in jobs]

    def _bar(self, pending: list[Job]):
        interval = 0.5 if sys.stderr.isatty() else 30  # fewer lines in a log file
        return tqdm(total=sum(job.settings.epochs for job in pending), unit="epoch", mininterval=interval)

    def train(self, job: Job, bar=None) -> running.Trained:
        """Train and record; returns the model. An interrupted training continues from its last epoch."""
        title = f"{job.task.name}, {job.row or job.method}, seed {job.seed}"
        done = 0

        def notify(epoch: int, score: float) -> None:
            nonlocal done
            if bar is not None:
                bar.update(max(0, epoch - done))
                bar.set_description(f"{title}: {job.task.metric} {score:.3f}", refresh=False)
            done = max(done, epoch)

        folder = self.output / "checkpoint"
        if self.resume and not _belongs(folder, job):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            (folder / "job.txt").write_text(repr(job.key))
        trained = running.run(job.task, job.method, job.settings, job.seed, folder if self.resume else None, notify)
        shutil.rmtree(folder, ignore_errors=True)
        if self.store.find(job.key) is None:
            machine = described(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            self.store.add({**job.key, "machine": machine, **trained.record})
        return trained

    def grid(self, jobs: list[Job]) -> dict[tuple[str, str], list[dict]]:
        """Records by row and task."""
        found: dict[tuple[str, str], list[dict]] = {}
        for job, record in zip(jobs, self.records(jobs)):
            found.setdefault((job.row or job.method, job.task.name), []).append(record)
        return found


def _belongs(folder: Path, job: Job) -> bool:
    note = folder / "job.txt"
    return note.exists() and note.read_text() == repr(job.key)
