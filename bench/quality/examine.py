"""Experiments on a trained model: probing, pruning compared with gates of 0, and ours compared with naive attention."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import apt_kernels
from bench.quality import methods, models, running, side_by_side, tables
from bench.speed.timing import peak_bytes

from .methods import Settings
from .tasks import IGNORED, Collator, Task, encode, score, subset

# Float32 rounding grows with the steps of AdamW; a wrong gradient shows within the first steps.
_APART = 2e-2
_CLOSED = -1e4
_REPEATS = 15

NOTES = (
    "Half of all prefix tokens, in proportion to the layers' weights (`probe.lengths`). Moved: mean |change of logits| "
    "as a share of their standard deviation. Closed: the removed tokens stay, with their gates at 0: their keys are "
    "zeros, whose logits of 0 still take part in the softmax. Time: forward and backward of one batch, medians of "
    f"{_REPEATS} that alternate; memory: most bytes alive at once. No pruned model was trained further."
)
PARITY_NOTES = (
    "One seed, float32, no attention dropout (the two draw different masks); all other dropout uses the same seeds."
)


def batches(trained: running.Trained) -> Iterator[dict[str, Tensor]]:
    """The development set as the model's inputs, without labels."""
    return models.inputs(trained.dev.features, trained.collator, next(trained.model.parameters()).device)


def probe(trained: running.Trained) -> apt_kernels.Probe:
    return apt_kernels.probe(trained.model, batches(trained))


def predictions(trained: running.Trained, model: nn.Module) -> tuple[float, Tensor]:
    """The score on the development set, and all logits in one row."""
    task, dev = trained.task, trained.dev
    logits, labels = models.predict(model, task, dev.features, trained.collator)
    found = score(task, logits.numpy(), labels.numpy(), dev.rows, dev.features)
    return found, logits[labels != IGNORED] if task.kind == "tags" else logits


def pruned(trained: running.Trained) -> dict:
    """Score, moved logits, time and memory: whole, pruned by half, and with the same tokens' gates closed."""
    model = trained.model
    found = probe(trained)
    lengths = found.lengths(budget=max(1, sum(layer.length for layer in found.layers) // 2))
    short, closed = copy.deepcopy(model), copy.deepcopy(model)
    apt_kernels.prune(short, lengths)
    whole, logits = predictions(trained, model)
    rows = {"whole": {"score": whole, "moved": 0.0}}
    close_gates(closed, lengths.keep)
    found_logits = {}
    for name, other in (("pruned", short), ("closed", closed)):
        value, found_logits[name] = predictions(trained, other)
        rows[name] = {"score": value, "moved": _moved(found_logits[name], logits)}
    rows["between"] = _moved(found_logits["closed"], found_logits["pruned"])
    costs = cost({"whole": model, "pruned": short}, next(batches(trained)))
    for name, (seconds, peak) in costs.items():
        rows[name] |= {"seconds": seconds, "peak": peak}
    rows["lengths"] = list(lengths)
    return rows


def _moved(logits: Tensor, before: Tensor) -> float:
    return float((logits - before).abs().mean() / before.std())


@torch.no_grad()
def close_gates(model: nn.Module, keep: dict[str, tuple[int, ...]]) -> None:
    """Set the prefix tokens that are not kept to zero: what a gate of 0 makes of their key and value."""
    for name, prefix in apt_kernels.prefixes(model).items():
        gone = [i for i in range(prefix.length) if i not in keep[name]]
        prefix.key[:, gone] = 0
        prefix.value[:, gone] = 0


def cost(compared: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, tuple[float, int]]:
    """Median seconds and peak bytes of a forward and backward of each model, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for i in range(_REPEATS + 2):
        for name in list(compared) if i % 2 else list(compared)[::-1]:
            began = time.perf_counter()
            compared[name](**batch).logits.float().square().mean().backward()
            if i > 1:
                seconds[name].append(time.perf_counter() - began)
            compared[name].zero_grad(set_to_none=True)
    return {name: (statistics.median(seconds[name]), _peak(model, batch)) for name, model in compared.items()}


def _peak(model: nn.Module, batch: dict[str, Tensor]) -> int:
    device = next(iter(batch.values())).device
    return peak_bytes(device, lambda: model(**batch).logits.float().square().mean().backward())


def table(rows: list[dict]) -> str:
    """One row for each state of the prefix, over the seeds."""
    cells = []
    for name in ("whole", "pruned", "closed"):
        parts = [row[name] for row in rows]
        line = [name, tables.mean_and_spread([p["score"] for p in parts])]
        line.append(f"{100 * statistics.mean(p['moved'] for p in parts):.2f} %")
        if "seconds" in parts[0]:
            line.append(f"{1e3 * statistics.mean(p['seconds'] for p in parts):.1f} ms")
            line.append(f"{statistics.mean(p['peak'] for p in parts) / 2**20:.1f} MiB")
        cells.append([*line, *[""] * (5 - len(line))])
    text = tables.markdown(
        ["prefix", "development score", "logits moved", "time of a step", "peak memory"], cells, False
    )
    between = 100 * statistics.mean(row["between"] for row in rows)
    text += f"\n\nClosing the gates gives logits that differ from those of pruning by {between:.2f} %."
    return f"{text}\n\nLengths, by seed: {', '.join(str(row['lengths']) for row in rows)}."


def compare_attention(task: Task, method: str, settings: Settings, seed: int) -> dict[str, list[float]]:
    """Training losses by step of two copies of one model, with this package's attention and with naive attention."""
    tokenizer = models.load_tokenizer(settings.model, task)
    rows = subset(task, task.splits.train, settings.train_examples, seed)
    features, runs = encode(task, rows, tokenizer, settings.max_length), {}
    for name in side_by_side.ATTENTION:
        model = methods.prepare(models.fresh_model(task, settings, tokenizer, seed), method, settings, seed)
        runs[name] = side_by_side.Run(model, methods.optimizer(model, method, settings))
    data = side_by_side.Batches(task, features, Collator(tokenizer), settings.batch_size, torch.device("cpu"))
    side_by_side.train(runs, data, settings.epochs, seed, f"{task.name}, {method}", decay=False)
    return {name: run.losses for name, run in runs.items()}


def check_apart(apart: float, task: Task, method: str) -> None:
    """Raise SystemExit where the curves differ by more than rounding."""
    if not apart <= _APART:
        raise SystemExit(f"{task.name}, {method}: the curves differ by {apart:.2g} (at most {_APART})")
