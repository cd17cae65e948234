"""The demo's results as a table and as JSON, and as a section of docs/demo.md."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch

from bench.common.machine import described
from bench.common.markdown import markdown
from bench.quality.side_by_side import Run

_COLUMNS = (
    *("Method", "Attention", "Accuracy", "Macro-F1"),
    *("Trained parameters", "Time per step", "Peak memory of a step"),
)


def table(results: dict[str, dict[str, Run]]) -> str:
    """Markdown: one row for each training, and below each pair the cost of naive attention divided by ours."""
    rows = []
    for method, runs in results.items():
        for attention, run in runs.items():
            rows.append(
                (
                    method,
                    attention,
                    f"{run.metrics['accuracy']:.3f}",
                    f"{run.metrics['macro_f1']:.3f}",
                    f"{run.trained:,}",
                    f"{run.step_seconds * 1e3:.0f} ms",
                    f"{run.peak_bytes / 2**20:.0f} MiB",
                )
            )
        time, memory = ratios(runs)
        rows.append((method, "naive / ours", "", "", "", f"{time:.2f}", f"{memory:.2f}"))
    return markdown(_COLUMNS, rows)


def ratios(runs: dict[str, Run]) -> tuple[float, float]:
    """Time and memory of the naive attention, each divided by ours."""
    ours, naive = runs["ours"], runs["naive"]
    return naive.step_seconds / ours.step_seconds, naive.peak_bytes / ours.peak_bytes


def notes(settings: dict, device: torch.device) -> str:
    """What the figures are and where they were measured."""
    memory = "the CUDA allocator's peak" if device.type == "cuda" else "all CPU tensors, from torch's allocator events"
    return " ".join(
        (
            f"Model {settings['model']}, data {settings['data']}: {settings['train']} training and {settings['test']}",
            f"test texts of at most {settings['max_length']} tokens, {settings['epochs']} epochs, batch",
            f"{settings['batch_size']}, prefix {settings['prefix_length']}. Both copies train in turn on the",
            "same batches. Time: median over the steps. Memory: peak bytes of tensors in a forward and backward, above",
            f"those allocated before ({memory}). Machine: {described(device)}.",
        )
    )


def as_json(settings: dict, device: torch.device, results: dict[str, dict[str, Run]], more: dict) -> str:
    found = {
        "machine": described(device),
        "settings": settings,
        "trainings": {
            method: {attention: _run(run) for attention, run in runs.items()} for method, runs in results.items()
        },
        "naive_by_ours": {method: dict(zip(("time", "memory"), ratios(runs))) for method, runs in results.items()},
        **more,
    }
    return json.dumps(found, indent=1) + "\n"


def _run(run: Run) -> dict:
    return {
        **run.metrics,
        "trained_parameters": run.trained,
        "step_seconds": run.step_seconds,
        "peak_bytes": run.peak_bytes,
        "losses": run.losses,
    }


def markers(task: str) -> tuple[str, str]:
    """The comments with which the section of a task's results begins and ends in docs/demo.md."""
    return f"<!-- {task}: begin -->", f"<!-- {task}: end -->"


def update_page(page: Path, output: Path, task: str) -> None:
    """Put the table and the plot in ``output`` between the page's markers of the task."""
    text, (first, last) = page.read_text(encoding="utf-8"), markers(task)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise RuntimeError(f"{page.name} has no section between {first} and {last}")
    picture = page.with_name(f"demo-{task}.png")
    shutil.copyfile(output / "gates.png", picture)
    alternative = "Mean of lambda times alpha for every layer and prefix token"
    section = f"{(output / 'table.md').read_text(encoding='utf-8').strip()}\n\n![{alternative}]({picture.name})"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")
    os.replace(temporary, page)
