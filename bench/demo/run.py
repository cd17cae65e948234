"""Adaptive Prefix Tuning on a pretrained model and real text, beside plain prefix tuning and the usual way of both.

Run it by ``make demo``, or ``python -m bench demo --help``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

import apt_kernels
from bench.demo import data, gates, report, training
from bench.quality import pretrained
from bench.quality.pretrained import MINILM

from .data import Batches, Task
from .training import WAYS, Run

METHODS = {"APT": {"gate": "auto", "layer_scale": True}, "prefix tuning": {"gate": "none", "layer_scale": False}}
_CHECK_STEPS = 6
# Without dropout both ways compute the same up to rounding; with it they draw different masks.
_CURVE_TOLERANCE, _EPOCH_TOLERANCE = 1e-3, 0.05


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MINILM, help="a local folder or a hub name (default: the packaged MiniLM)")
    parser.add_argument("--data", default="docstrings", help="a folder with train/test .jsonl or .csv, or a hub name")
    parser.add_argument("--prefix-length", type=int, default=16)
    parser.add_argument("--train", type=int, default=800, help="most training texts")
    parser.add_argument("--test", type=int, default=400, help="most test texts")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a text")
    parser.add_argument("--learning-rate", type=float, default=3e-2)
    parser.add_argument("--gate-learning-rate", type=float, default=1e-3, help="of gates that read hidden states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--update-readme", action="store_true", help="put the table and the picture into README.md")
    return parser.parse_args(argv)


class Workshop:
    """Builds the tokeniser, the batches, and models that start from the same weights."""

    def __init__(self, settings: argparse.Namespace, task: Task):
        from transformers import AutoTokenizer

        self.settings, self.task = settings, task
        self.source, self.device = pretrained.source(settings.model), torch.device(settings.device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.train, self.test = (
            Batches(rows, task.labels, self.tokenizer, settings.max_length, self.device)
            for rows in (task.train, task.test)
        )

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model with a new task head drawn from the seed, unpatched."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.source, num_labels=len(self.task.labels), dtype=torch.float32
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(self.device)

    def runs(self, method: str) -> dict[str, Run]:
        """One run for each way, patched for the method, equal to the last bit."""
        settings, found = self.settings, {}
        for way in WAYS:
            model = self.fresh(settings.seed)
            apt_kernels.patch(model, prefix_length=settings.prefix_length, init_seed=settings.seed, **METHODS[method])
            found[way] = training.start(model, settings.learning_rate, settings.gate_learning_rate)
        return found


def main(argv: list[str] | None = None) -> int:
    began, settings = time.perf_counter(), arguments(argv)
    _quiet(settings.model)
    settings.output.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(settings, data.load(settings.data, settings.train, settings.test))
    complaints: list[str] = []
    results = {method: _train(workshop, method, complaints) for method in METHODS}
    means = _gates(workshop, results["APT"]["ours"])
    complaints += _reload(workshop, results["APT"]["ours"])
    _write(workshop, results, means, complaints, time.perf_counter() - began)
    if settings.update_readme and not complaints:
        report.update_readme(Path("README.md"), settings.output)
    return 1 if complaints else 0


def _quiet(model: str) -> None:
    """No look-ups for a model that is here, and no notices between the progress bars."""
    if model == MINILM or Path(model).is_dir():
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's
    # Where the tests' packages are installed, transformers loads torchao, which says what it finds no use for here.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _train(workshop: Workshop, method: str, complaints: list[str]) -> dict[str, Run]:
    settings = workshop.settings
    checked = workshop.runs(method)
    training.compare_curves(checked, workshop.train, _CHECK_STEPS, settings.batch_size, settings.seed)
    apart = max(abs(a - b) for a, b in zip(*(run.losses for run in checked.values())))
    if not apart <= _CURVE_TOLERANCE:
        complaints.append(f"{method}: without dropout the curves differ by {apart:.2g} (at most {_CURVE_TOLERANCE})")
    runs = workshop.runs(method)
    training.train(runs, workshop.train, settings.epochs, settings.batch_size, settings.seed, method)
    for way, run in runs.items():
        with WAYS[way]():
            training.evaluate(run, workshop.test, settings.batch_size)
    apart, noise = training.epochs_apart(runs, settings.epochs)
    if not apart <= _EPOCH_TOLERANCE + noise:
        limit = f"{_EPOCH_TOLERANCE} + {noise:.2g} of noise"
        complaints.append(f"{method}: mean losses of an epoch differ by {apart:.2g} (at most {limit})")
    return runs


def _gates(workshop: Workshop, run: Run) -> list[list[float]]:
    with gates.recorded(len(apt_kernels.prefixes(run.model))) as found:
        training.predict(run.model, workshop.test, workshop.settings.batch_size)
    means = found.means()
    title = f"What APT learned: {workshop.task.name}"
    gates.picture(means, workshop.settings.output / "gates.png", title)
    return means


def _reload(workshop: Workshop, run: Run) -> list[str]:
    """Save the adapter, load it into a model with another head, and compare the predictions bit for bit."""
    folder = workshop.settings.output / "adapter"
    apt_kernels.save(run.model, folder)
    model = apt_kernels.load(workshop.fresh(workshop.settings.seed + 1), folder)
    logits = training.predict(model, workshop.test, workshop.settings.batch_size)
    return [] if torch.equal(logits, run.logits) else ["the reloaded adapter predicts differently"]


def _write(workshop: Workshop, results, means: list[list[float]], complaints: list[str], seconds: float) -> None:
    settings, device, output = workshop.settings, workshop.device, workshop.settings.output
    public = {name: value for name, value in vars(settings).items() if name not in ("output", "update_readme")}
    public["model"] = pretrained.title(settings.model)
    public.update(data=workshop.task.name, train=len(workshop.train), test=len(workshop.test))
    table = report.table(results)
    text = f"{table}\n\n{report.notes(public, device)}\n"
    (output / "table.md").write_text(text, encoding="utf-8")
    more = {"gates": means, "reloaded_equal": not any("reloaded" in c for c in complaints), "complaints": complaints}
    (output / "results.json").write_text(report.as_json(public, device, results, more), encoding="utf-8")
    print(f"\n{text}")
    if not complaints:
        print("The adapter, loaded into a fresh model, predicts the same to the last bit.")
    for complaint in complaints:
        print(f"FAILED: {complaint}", file=sys.stderr)
    print(f"{seconds:.0f} s. Adapter, picture, table and figures: {output}/")
