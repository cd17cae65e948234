"""Adaptive Prefix Tuning on a pretrained model and real text, compared with plain prefix tuning and naive attention.

Run it by ``make demo ARGS='--task docstrings'``, or ``python -m bench demo --task docstrings --help``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn

import apt_kernels
from bench.demo import data, report
from bench.quality import methods, models, pretrained, side_by_side
from bench.quality.pretrained import MINILM
from bench.quality.side_by_side import ATTENTION, Batches, Run
from bench.quality.tasks import Collator, Task, encode

METHODS = {"APT": "apt", "prefix tuning": "prefix"}
_CHECK_STEPS, _WEIGHT_DECAY = 6, 0.01
# Without dropout both copies compute the same up to rounding. With dropout they draw different masks.
_CURVE_TOLERANCE, _EPOCH_TOLERANCE = 1e-3, 0.05


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench demo --task docstrings",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=MINILM, help="a local folder, a hub name, or the packaged MiniLM")
    parser.add_argument(
        "--data", default="docstrings", help="a folder with train and test files (.jsonl or .csv), or a hub name"
    )
    parser.add_argument("--prefix-length", type=int, default=16, help="prefix tokens of each layer")
    parser.add_argument("--train", type=int, default=800, help="number of training texts")
    parser.add_argument("--test", type=int, default=400, help="number of test texts")
    parser.add_argument("--epochs", type=int, default=2, help=" ")
    parser.add_argument("--batch-size", type=int, default=16, help=" ")
    parser.add_argument("--max-length", type=int, default=48, help="tokens of a text; longer ones are cut")
    parser.add_argument("--learning-rate", type=float, default=3e-2, help="of prefixes, layer scales and the head")
    parser.add_argument("--gate-learning-rate", type=float, default=1e-3, help="of gates that read hidden states")
    parser.add_argument("--seed", type=int, default=0, help=" ")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=" ")
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder of the adapter, table and figure"
    )
    parser.add_argument("--update-docs", action="store_true", help="put the table and the figure into docs/demo.md")
    return parser.parse_args(argv)


class Comparison:
    """The tokeniser, the tokenised texts, and models that start from the same weights."""

    def __init__(self, options: argparse.Namespace, task: Task):
        self.options, self.task, self.device = options, task, torch.device(options.device)
        named = ("model", "batch_size", "epochs", "max_length", "prefix_length", "learning_rate", "gate_learning_rate")
        self.settings = methods.Settings(**{name: getattr(options, name) for name in named})
        self.tokenizer = models.load_tokenizer(options.model, task)
        self.collator = Collator(self.tokenizer)
        self.train, self.test = (
            encode(task, rows, self.tokenizer, options.max_length) for rows in (task.splits.train, task.splits.dev)
        )

    @property
    def batches(self) -> Batches:
        """The training texts in batches."""
        return Batches(self.task, self.train, self.collator, self.options.batch_size, self.device)

    def fresh(self, seed: int) -> nn.Module:
        """The pretrained model with a new head drawn from the seed, unpatched."""
        return models.fresh_model(self.task, self.settings, self.tokenizer, seed).to(self.device)

    def runs(self, method: str) -> dict[str, Run]:
        """Two patched copies with bitwise equal weights, one for each attention."""
        found, seed = {}, self.options.seed
        for name in ATTENTION:
            model = methods.prepare(self.fresh(seed), METHODS[method], self.settings, seed)
            found[name] = Run(model, methods.optimizer(model, METHODS[method], self.settings, _WEIGHT_DECAY))
        return found

    def evaluate(self, run: Run) -> None:
        """Fill in the run's test logits, accuracy and macro-F1."""
        run.logits, targets = models.predict(run.model, self.task, self.test, self.collator)
        predicted = run.logits.argmax(dim=-1).numpy()
        run.metrics = {
            "accuracy": float(accuracy_score(targets.numpy(), predicted)),
            "macro_f1": float(f1_score(targets.numpy(), predicted, average="macro")),
        }


def main(argv: list[str] | None = None) -> int:
    """Train, compare, and write the results; 1 if a check failed."""
    began, options = time.perf_counter(), arguments(argv)
    models.quiet(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options, data.load(options.data, options.train, options.test, options.seed))
    failures: list[str] = []
    results = {method: _train(comparison, method, failures) for method in METHODS}
    probe = _probe(comparison, results["APT"]["ours"])
    failures += _reload(comparison, results["APT"]["ours"])
    _write(comparison, results, probe, failures, time.perf_counter() - began)
    if options.update_docs and not failures:
        report.update_page(Path("docs/demo.md"), options.output, "docstrings")
    return 1 if failures else 0


def _train(comparison: Comparison, method: str, failures: list[str]) -> dict[str, Run]:
    options = comparison.options
    checked = comparison.runs(method)
    side_by_side.first_steps(checked, comparison.batches, _CHECK_STEPS, options.seed)
    apart = max(abs(a - b) for a, b in zip(*(run.losses for run in checked.values())))
    if not apart <= _CURVE_TOLERANCE:
        failures.append(f"{method}: without dropout the curves differ by {apart:.2g} (at most {_CURVE_TOLERANCE})")
    runs = comparison.runs(method)
    side_by_side.train(runs, comparison.batches, options.epochs, options.seed, method)
    for name, run in runs.items():
        with ATTENTION[name]():
            comparison.evaluate(run)
    apart, noise = side_by_side.epochs_apart(runs, options.epochs)
    if not apart <= _EPOCH_TOLERANCE + noise:
        limit = f"{_EPOCH_TOLERANCE} + {noise:.2g} of noise"
        failures.append(f"{method}: mean losses of an epoch differ by {apart:.2g} (at most {limit})")
    return runs


def _probe(comparison: Comparison, run: Run) -> apt_kernels.Probe:
    """The weights of the prefix tokens on the test texts, and their figure."""
    probe = apt_kernels.probe(run.model, models.inputs(comparison.test, comparison.collator, comparison.device))
    probe.picture(comparison.options.output / "gates.png", f"What APT learned: {comparison.task.name}")
    return probe


def _reload(comparison: Comparison, run: Run) -> list[str]:
    """Save the adapter, load it into a model with another head, and compare the predictions bit for bit."""
    folder = comparison.options.output / "adapter"
    apt_kernels.save(run.model, folder)
    model = apt_kernels.load(comparison.fresh(comparison.options.seed + 1), folder)
    logits, _ = models.predict(model, comparison.task, comparison.test, comparison.collator)
    return [] if torch.equal(logits, run.logits) else ["the reloaded adapter predicts differently"]


def _write(comparison: Comparison, results, probe: apt_kernels.Probe, failures: list[str], seconds: float) -> None:
    options, device, output = comparison.options, comparison.device, comparison.options.output
    public = {name: value for name, value in vars(options).items() if name not in ("output", "update_docs")}
    public["model"] = pretrained.title(options.model)
    public.update(data=comparison.task.name, train=len(comparison.train), test=len(comparison.test))
    text = f"{report.table(results)}\n\n{report.notes(public, device)}\n"
    (output / "table.md").write_text(text, encoding="utf-8")
    weights = [layer.effective for layer in probe.layers]
    more = {"gates": weights, "reloaded_equal": not any("reloaded" in f for f in failures), "failures": failures}
    (output / "results.json").write_text(report.as_json(public, device, results, more), encoding="utf-8")
    print(f"\n{text}")
    if not failures:
        print("The adapter, loaded into a fresh model, predicts the same to the last bit.")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    print(f"{seconds:.0f} s. Adapter, figure, table and results: {output}/")
