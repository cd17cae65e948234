"""Methods of fine-tuning a decoder, compared on small tasks: tables of means over seeds, and one figure.

    python -m bench board --data FOLDER            all tasks, one night on two cores
    python -m bench board --small --data FOLDER    documents and COPA
    python -m bench board --costs                  time and memory of a step of each method, at most 3 minutes
    python -m bench board --report                 the page again, from the finished trainings

FOLDER has a folder for each of rte, copa, wsc and wnut17. Documents are docstrings of Python's standard library;
the questions are about the demo's document. An interrupted command continues with the training that it was in.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm

from bench.common import machine, sharing
from bench.quality import models, packaged, pretrained
from bench.quality.sources import DataError
from bench.quality.store import Store
from bench.speed.timing import peak_bytes, steady

from . import report, tasks, training
from .methods import BASELINES, METHODS, Start, obstacle

_CHOOSING_SEED = 1000  # of the trainings that compare settings; no table uses it
_COST_ROUNDS = 2


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench board", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = list(tasks.SIZES["full"])
    parser.add_argument(
        "--model", default=pretrained.SMOLLM2, help="a folder or hub name (default: the packaged SmolLM2)"
    )
    parser.add_argument("--data", type=Path, help="a folder with a folder of labelled data for each task")
    parser.add_argument("--small", action="store_true", help="fewer rows, steps and settings; documents and COPA")
    parser.add_argument("--task", nargs="+", metavar="TASK", help=f"default: {', '.join(every)}")
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, metavar="METHOD", help=f"default: all of {', '.join(METHODS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, help="of every training (default: by task)")
    parser.add_argument("--prefix-length", type=int, default=32, help="tokens of a prefix (default: 32)")
    parser.add_argument("--costs", action="store_true", help="measure the time and memory of a step, train nothing")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--output", type=Path, default=Path("board-output"), help="records, page and figure")
    return parser.parse_args(argv)


@dataclass
class Board:
    """The model, the tasks, and the finished trainings."""

    given: argparse.Namespace
    base: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    store: Store
    tasks: dict[str, tasks.Task] = field(default_factory=dict)
    blocked: dict[str, str] = field(default_factory=dict)  # methods that do not fit, and why

    def task(self, name: str) -> tasks.Task:
        if name not in self.tasks:
            source = None if self.given.data is None else str(self.given.data / name)
            self.tasks[name] = tasks.build(name, source, self.tokenizer, size_of(self.given, name))
        return self.tasks[name]

    def key(self, task: str, method: str, seed: int, settings: dict) -> dict:
        used = {
            "model": pretrained.title(self.given.model),
            "prefix_length": self.given.prefix_length,
            "size": asdict(size_of(self.given, task)),
            **settings,
        }
        return {"task": task, "method": method, "seed": seed, "settings": used}

    def train(self, task: str, method: str, seed: int, settings: dict, bar=None) -> dict:
        """The record of a training, which is run if there is none."""
        key = self.key(task, method, seed, settings)
        record = self.store.find(key)
        if record is not None:
            return record
        choosing = seed == _CHOOSING_SEED

        def notify(step: int, loss: float) -> None:
            if bar is not None:
                bar.set_postfix_str(f"step {step} of {size_of(self.given, task).steps}, loss {loss:.3f}", refresh=False)
                bar.update(0)

        start = Start(self.given.prefix_length, self.task(task).start, seed)
        found = training.run(
            self.base,
            self.tokenizer,
            self.task(task),
            size_of(self.given, task),
            method,
            settings,
            start,
            notify,
            choosing,
        )
        noted = {"machine": machine.described(torch.device("cpu")), "commit": machine.commit(), "choosing": choosing}
        self.store.add({**key, **noted, **found})
        return self.store.records[-1]

    def settings(self, task: str, method: str, bar=None) -> dict:
        """The candidate with the lowest loss on held-out training rows; the only one, if there is one."""
        candidates = METHODS[method].candidates[: METHODS[method].small if self.given.small else None]
        if len(candidates) == 1:
            return candidates[0]
        losses = [self.train(task, method, _CHOOSING_SEED, each, bar)["loss"] for each in candidates]
        return candidates[losses.index(min(losses))]


def size_of(given: argparse.Namespace, name: str) -> tasks.Size:
    """The size of a task with the given options."""
    found = tasks.size_of(name, "small" if given.small else "full")
    return found if given.steps is None else replace(found, steps=given.steps)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    names = given.task or list(tasks.SIZES["small" if given.small else "full"])
    if given.seeds < 1 or (given.steps is not None and given.steps < 1) or given.prefix_length < 2:
        raise DataError("--seeds and --steps need at least 1, --prefix-length at least 2")
    given.output.mkdir(parents=True, exist_ok=True)
    store = Store(given.output / "runs.jsonl")
    blocked: dict[str, str] = {}
    if not given.report:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        models.quiet(given.model)
        board = Board(given, *_load(given.model), store)
        blocked = board.blocked = _obstacles(board.base)
        if given.costs:
            _measure(board)
        else:
            _train(board, names)
    page = write(given, names, store, blocked)
    print(f"\n{page}\n\nWritten to {given.output / 'board.md'}")
    return 0


def _load(model: str):
    if model == pretrained.SMOLLM2:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return packaged.smollm2()
    found = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return found.eval(), transformers.AutoTokenizer.from_pretrained(model)


def _train(board: Board, names: list[str]) -> None:
    chosen, seeds = board.given.method or list(METHODS), range(board.given.seeds)
    for name in names:
        board.task(name)  # unreadable data is named before the first training
    jobs = [
        (name, method, seed)
        for name in names
        for seed in seeds
        for method in chosen
        if method not in board.blocked and (method != "none" or seed == 0)
    ]
    interval = 0.5 if sys.stderr.isatty() else 20  # fewer lines in a log file
    with tqdm(total=len(jobs), unit="training", mininterval=interval, dynamic_ncols=True) as bar:
        for name, method, seed in jobs:
            bar.set_description(f"{name}, {method}, seed {seed}")
            board.train(name, method, seed, board.settings(name, method, bar), bar)
            bar.update()
            write(board.given, names, board.store, board.blocked, draw=False)


def _obstacles(base: nn.Module) -> dict[str, str]:
    found = {name: obstacle(name, base, _free_bytes()) for name in METHODS}
    return {name: why for name, why in found.items() if why}


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _measure(board: Board) -> None:
    """The time and memory of a forward and backward pass with 4 rows of 64 tokens, each method in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, board.base.config.vocab_size, (4, 64), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    used = {name: METHODS[name] for name in board.given.method or METHODS if name != "none"}
    used = {name: method for name, method in used.items() if name not in board.blocked}
    seconds: dict[str, list[float]] = {name: [] for name in used}
    size: dict[str, int] = {}
    text = (ids.flatten().tolist() * 4)[: 8 * board.given.prefix_length]
    for round_ in tqdm(range(_COST_ROUNDS), unit="round"):
        for name in used if round_ % 2 else reversed(used):
            start = Start(board.given.prefix_length, text, 0)
            model = used[name].prepare(copy.deepcopy(board.base), start, used[name].candidates[0]).train()

            def step(model=model) -> None:
                training.loss_of(model, given).backward()
                model.zero_grad(set_to_none=True)

            if round_ == 0:
                size[name] = peak_bytes(ids.device, step)
            else:
                step()
            with steady(ids.device):
                began = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - began)
    rows = [{"method": name, "seconds": statistics.median(seconds[name]), "bytes": size[name]} for name in used]
    busy = sharing.busy_cores()
    note = "" if busy is None or busy < sharing.BUSY else f"; not idle, other processes used {busy:.1f} cores"
    found = {
        "rows": rows,
        "conditions": f"{machine.described(torch.device('cpu'))}{note}",
        "commit": machine.commit(),
        "prefix_length": board.given.prefix_length,
    }
    (board.given.output / "costs.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write(given: argparse.Namespace, names: list[str], store: Store, blocked: dict[str, str], draw: bool = True) -> str:
    """Write and return the page: what the store has for these settings, and what was not run.

    ``draw``: write the figure as well.
    """
    listed = list(dict.fromkeys([*names, *tasks.SIZES["full"]]))
    model = pretrained.title(given.model)
    wanted = {name: {"model": model, "prefix_length": given.prefix_length} for name in listed}
    for name, settings in wanted.items():
        settings["size"] = asdict(size_of(given, name))
    every = [r for r in store.records if r["task"] in wanted and r["settings"].items() >= wanted[r["task"]].items()]
    records = [r for r in every if not r["choosing"] and r["seed"] < given.seeds]
    found: report.Records = {}
    for record in records:
        found.setdefault((record["method"], record["task"]), []).append(record)
    described = [{"name": name, **_KINDS.get(name, _KINDS["rte"])} for name in listed]
    shown = [c for c in report.columns(described) if any(task == c.task for _, task in found)]
    parts = [f"# {model}: methods of fine-tuning", "Generated: `python -m bench board`.", "## Scores"]
    parts += [report.scores(found, shown, given.seeds, blocked)]
    parts += [report.against(found, shown, baseline) for baseline in BASELINES if baseline in {m for m, _ in found}]
    parts += [report.notes(found, described, shown), _provenance(records, every)]
    path, costs = given.output / "costs.json", []
    if path.exists():
        measured = json.loads(path.read_text(encoding="utf-8"))
        costs = measured["rows"]
        code = measured["commit"]["id"][:12]
        parts += ["## Time and memory of a step", report.costs_table(costs)]
        parts += [
            f"Forward and backward pass of 4 rows of 64 tokens, prefixes of {measured['prefix_length']}; peak memory "
            f"above the model. {measured['conditions']}; commit {code}."
        ]
    else:
        parts += ["## Time and memory of a step", f"{report.NOT_RUN}: `python -m bench board --costs`"]
    if records:
        if draw:
            report.picture(found, shown, costs, given.output / "board.png")
        parts.append("![Quality against trained parameters; time and memory of a step](board.png)")
    page = "\n\n".join(parts)
    (given.output / "board.md").write_text(page + "\n", encoding="utf-8")
    return page


# What a task's column holds, for tasks that were not run and so were not read.
_KINDS = {
    "documents": {"kind": "loss", "metric": "next-token loss"},
    "questions": {"kind": "text", "metric": "answers found"},
    "wnut17": {"kind": "text", "metric": "span F1"},
    "rte": {"kind": "choice", "metric": "accuracy"},
}


def _provenance(records: list[dict], every: list[dict]) -> str:
    if not records:
        return f"- {report.NOT_RUN}: no training of these tasks is finished."
    minutes = sum(r["seconds"] for r in every) / 60
    lines = [
        f"- {len(every)} trainings, {len(every) - len(records)} of them to choose settings; {minutes:.0f} minutes."
    ]
    lines += [f"- {text}." for text in sorted({r["machine"] for r in records})]
    commits = {(r["commit"]["id"][:12], bool(r["commit"]["dirty"])) for r in records}
    listed = ", ".join(code + (" with changes" if dirty else "") for code, dirty in sorted(commits))
    return "\n".join([*lines, f"- Commit {listed}."])
