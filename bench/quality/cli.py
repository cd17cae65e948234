"""The paper's comparisons on labelled data, each ending in tables (mean and spread over seeds) and figures.

python -m bench quality --task rte --data FOLDER --model PATH --method apt --seeds 5
python -m bench quality main --task rte copa wsc wnut17 --data FOLDER --recipe minilm --seeds 5
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path

import torch

import apt_kernels
from bench.quality import models, pretrained, summary

from .experiments import EXPERIMENTS, Plan, write
from .methods import METHODS, RECIPES, Settings, recipe
from .run_cache import RunCache
from .sources import DataError, load
from .tasks import Task, build

_SUPER_GLUE = ("boolq", "copa", "rte", "wic", "wsc")
_TYPES = {"batch_size": int, "epochs": int, "max_length": int, "schedule": str, "precision": str}
_TYPES |= dict.fromkeys(("train_examples", "dev_examples", "test_examples", "hold_out"), int)
_CHOICES = {"schedule": ("linear", "exponential"), "precision": ("fp32", "bf16")}
# Settings that --patch takes, and what to use for the others.
_ELSEWHERE = {"prefix_length": "--prefix-length", "layer_scale": "--method apt apt-no-scale, which differ in it"}
_PATCH = tuple(f.name for f in fields(apt_kernels.AptConfig) if f.name not in _ELSEWHERE)
_PATCH_HELP = "more settings of AptConfig; a gate is that of the methods whose gate is 'auto'"
_HELP = {
    "train_examples": "train on so many rows, drawn by the seed",
    "dev_examples": "the first so many development rows",
    "test_examples": "the first so many test rows",
    "hold_out": "choose the epoch on so many training rows, and report the development set as a test",
    "max_length": "tokens of an input",
    "gate_learning_rate": "of gates that read hidden states",
    "dropout": "of the model, everywhere (default: the model's own)",
    "attention_dropout": "of attention weights",
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiment",
        nargs="?",
        default="train",
        choices=EXPERIMENTS,
        metavar="EXPERIMENT",
        help=f"which comparison (default: train): {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument(
        "--task",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names of tasks; any name whose data has a known format",
    )
    parser.add_argument("--data", nargs="+", help="a folder or hub name for each task, or one folder of folders")
    parser.add_argument("--fields", nargs="+", default=(), help="columns of the text or of the pair (default: by name)")
    parser.add_argument("--model", default=pretrained.MINILM, help="a folder or hub name (default: packaged MiniLM)")
    parser.add_argument(
        "--method",
        nargs="+",
        default=(),
        choices=METHODS,
        metavar="METHOD",
        help=f"methods to train (default: those of the experiment): {', '.join(METHODS)}",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--recipe", choices=RECIPES, help="published settings for the task; options override them")
    parser.add_argument("--prefix-length", type=_lengths, help="one length, or one for each layer with commas between")
    parser.add_argument("--patch", nargs="+", default=(), metavar="NAME=VALUE", help=_PATCH_HELP)
    for name in (f.name for f in fields(Settings)):
        if name not in ("model", "prefix_length", "patch"):
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=_TYPES.get(name, float), choices=_CHOICES.get(name), help=_HELP.get(name))
    parser.add_argument("--no-resume", action="store_true", help="keep no optimizer state: a broken training is redone")
    parser.add_argument("--output", type=Path, default=Path("quality-output"), help="records, tables, pictures")
    return parser.parse_args(argv)


def _lengths(text: str) -> int | tuple[int, ...]:
    parts = [int(part) for part in text.split(",")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _patch(entries: list[str]) -> dict:
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals:
            raise SystemExit(f"--patch has {entry!r}; it needs NAME=VALUE")
        if name in _ELSEWHERE:
            raise SystemExit(f"--patch has {entry!r}; use {_ELSEWHERE[name]}")
        if name not in _PATCH:
            raise SystemExit(f"--patch has {entry!r}; it needs one of {', '.join(_PATCH)}")
        found[name] = int(value) if value.isdigit() else _number(value)
    return found


def _chooses_gate(method: str) -> bool:
    return (METHODS[method] or {}).get("gate") == "auto"


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    models.quiet(given.model)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if "gate" in _patch(given.patch) and given.method and not any(_chooses_gate(name) for name in given.method):
        raise SystemExit(
            f"--patch has a gate; none of the methods {', '.join(given.method)} takes one, it needs 'apt' beside them"
        )
    tasks = _tasks(given)
    plan = Plan(
        RunCache(given.output, not given.no_resume),
        tasks,
        {task.name: settings(given, task.name) for task in tasks},
        list(range(given.first_seed, given.first_seed + given.seeds)),
        given.method,
    )
    given.output.mkdir(parents=True, exist_ok=True)
    page = EXPERIMENTS[given.experiment](plan)
    path = write(given.experiment, page, given.output)
    summary.write(plan.cache.store.records, given.output / "summary.json")
    print(f"\n{page}\n\nWritten to {path}; all trainings in {plan.cache.store.path} and summary.json")
    return 0


def settings(given: argparse.Namespace, task: str) -> Settings:
    """The recipe's settings for the task, overridden by the options that were given."""
    chosen = recipe(given.recipe, task) if given.recipe else {}
    named = {f.name: getattr(given, f.name) for f in fields(Settings) if f.name != "patch"}
    options = {name: value for name, value in named.items() if value is not None}
    return Settings(**{**chosen, **options, "patch": _patch(given.patch)})


def _tasks(given: argparse.Namespace) -> list[Task]:
    return [build(name, load(source), tuple(given.fields)) for name, source in zip(given.task, _sources(given))]


def _sources(given: argparse.Namespace) -> list[str]:
    """Where each task's data is: named one by one, folders of the tasks' names, or SuperGLUE of the hub."""
    names, data = given.task, given.data or []
    if len(data) == 1 and Path(data[0]).is_dir() and all((Path(data[0]) / name).is_dir() for name in names):
        return [str(Path(data[0]) / name) for name in names]
    if len(data) == len(names):
        return data
    if not data and all(name in _SUPER_GLUE for name in names):
        return [f"aps/super_glue:{name}" for name in names]
    raise DataError(
        f"--data has {len(data)} entries for {len(names)} tasks; it needs one for each, or one folder that holds "
        f"{', '.join(names)}"
    )
