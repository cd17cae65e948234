"""The paper's comparisons: each a function from tasks, settings and seeds to a page of Markdown, with its figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import apt_kernels
from bench.quality import examine, figures, tables

from .methods import ABLATION, METHODS, Settings
from .run_cache import Job, RunCache
from .tasks import Task

SHOTS = (16, 32)


@dataclass(frozen=True)
class Plan:
    """The arguments of an experiment."""

    cache: RunCache
    tasks: list[Task]
    settings: dict[str, Settings]  # by the task's name
    seeds: list[int]
    methods: Sequence[str] = ()

    def jobs(self, methods: Sequence[str]) -> list[Job]:
        """Seed by seed, so that after an interruption all methods have the same number."""
        return [Job(t, m, seed, self.settings[t.name]) for seed in self.seeds for t in self.tasks for m in methods]


def train(plan: Plan) -> str:
    """The methods that were named, on the tasks that were named."""
    return _page("Scores", plan.cache.grid(plan.jobs(plan.methods or ["apt"])), plan.tasks, None)


def main(plan: Plan) -> str:
    """Every method on every task."""
    return _page("Main comparison", plan.cache.grid(plan.jobs(plan.methods or list(METHODS))), plan.tasks, "apt")


def ablation(plan: Plan) -> str:
    """APT, without each of its parts, and without all of them."""
    return _page("Ablation", plan.cache.grid(plan.jobs(ABLATION)), plan.tasks, "apt")


def low_resource(plan: Plan) -> str:
    """Full fine-tuning, prefix tuning and APT on 16 and 32 training examples."""
    parts = []
    for shots in SHOTS:
        settings = {name: replace(s, train_examples=shots, batch_size=8) for name, s in plan.settings.items()}
        few = replace(plan, settings=settings)
        grid = few.cache.grid(few.jobs(plan.methods or ["full", "prefix", "apt"]))
        parts.append(_page(f"{shots} training examples", grid, plan.tasks, "apt"))
    return "\n\n".join(parts)


def _page(title: str, grid: tables.Grid, tasks: Sequence[Task], baseline: str | None, names=None) -> str:
    names = tables.NAMES | (names or {})
    parts = [f"## {title}", tables.scores(grid, tasks, names)]
    if baseline and len({row for row, _ in grid}) > 1:
        parts.append(tables.against(grid, tasks, baseline, names))
    return "\n\n".join([*parts, tables.notes(grid, tasks)])


def weights(plan: Plan) -> str:
    """Train APT, probe it on the development set, and draw the weights: best with a tagging and a reasoning task."""
    profiles, parts = {}, ["## Weights of the prefix, by layer"]
    for task in plan.tasks:
        probes = [_probe(plan, task, seed) for seed in plan.seeds]
        profiles[task.name] = [[layer.weight for layer in probe.layers] for probe in probes]
        picture = plan.cache.output / f"weights-{task.name}.png"
        probes[0].picture(picture, f"{task.name}, seed {plan.seeds[0]}: mean of λα")
        parts += [f"### {task.name}", f"Seed {plan.seeds[0]}:", probes[0].table(), f"![{task.name}]({picture.name})"]
    profile = plan.cache.output / "weights-profile.png"
    figures.profiles(profiles, profile)
    header = ["layer", *profiles]
    count = max(len(runs[0]) for runs in profiles.values())
    rows = [[str(i), *(_cell(runs, i) for runs in profiles.values())] for i in range(count)]
    centres = {name: [figures.centre(run) for run in runs] for name, runs in profiles.items()}
    rows.append(["centre of weight", *(_spread(values, 2) for values in centres.values())])
    parts += [
        "### By layer",
        tables.markdown(header, rows, aligned=False),
        f"![Profiles over the layers]({profile.name})",
    ]
    parts.append(
        f"Mean of |λα| over a layer's prefix tokens and the development set, ± std over {len(plan.seeds)} seeds."
    )
    return "\n\n".join(parts)


def _cell(runs: list[list[float]], layer: int) -> str:
    return _spread([run[layer] for run in runs], 3) if layer < len(runs[0]) else ""


def _spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _probe(plan: Plan, task: Task, seed: int) -> apt_kernels.Probe:
    """The probe of APT trained on the task with this seed, from its file where there is one."""
    settings = plan.settings[task.name]
    name = "-".join(("probe", task.name, str(settings.prefix_length), str(seed)))
    path = plan.cache.output / f"{name}.json"
    job = Job(task, "apt", seed, settings)
    if path.exists():
        found = json.loads(path.read_text())
        if found["key"] == job.key:
            return apt_kernels.Probe.from_json(found["probe"])
    probe = examine.probe(plan.cache.train(job))
    path.write_text(json.dumps({"key": job.key, "probe": probe.to_json()}) + "\n", encoding="utf-8")
    return probe


def lengths(plan: Plan) -> str:
    """Fixed lengths, lengths in proportion to APT's weights, and those in reverse order, all of the same total."""
    grid: tables.Grid = {}
    lines = []
    for task in plan.tasks:
        settings = plan.settings[task.name]
        # The weights come from another seed, so that no compared training chose its own lengths.
        probe = _probe(plan, task, max(plan.seeds) + 1)
        if not isinstance(settings.prefix_length, int):
            raise ValueError("prefix_length has one length for each layer; the fixed length needs an int")
        total = settings.prefix_length * len(probe.layers)
        chosen = tuple(probe.lengths(budget=total, grow=True))
        lines.append(f"- {task.name}: {total} tokens; by the weights {list(chosen)}")
        kinds = {"fixed": settings.prefix_length}
        if len(set(chosen)) > 1:
            kinds |= {"variable": chosen, "reversed": chosen[::-1]}
        else:
            lines[-1] += ": the weights are so even that both are the same"
        jobs = [
            Job(task, "apt", seed, replace(settings, prefix_length=length), row)
            for seed in plan.seeds
            for row, length in kinds.items()
        ]
        grid |= plan.cache.grid(jobs)
    names = {"fixed": "fixed", "variable": "follows the weights", "reversed": "the same in reverse order"}
    page = _page("Variable against fixed lengths of the same total", grid, plan.tasks, "fixed", names)
    return "\n".join([page, *lines])


def prune(plan: Plan) -> str:
    """Prune trained prefixes by half, close the gates of the same tokens instead, and time both."""
    parts = ["## Pruning a trained prefix by half"]
    for task in plan.tasks:
        rows = [examine.pruned(plan.cache.train(Job(task, "apt", s, plan.settings[task.name]))) for s in plan.seeds]
        parts += [f"### {task.name}", examine.table(rows)]
    parts.append(examine.NOTES)
    return "\n\n".join(parts)


def parity(plan: Plan) -> str:
    """The same training with this package's attention and with the naive one."""
    parts = ["## The same learning curve as naive attention", examine.PARITY_NOTES]
    for task in plan.tasks:
        settings = replace(plan.settings[task.name], precision="fp32", attention_dropout=0.0)
        for method in plan.methods or ("apt", "prefix"):
            curves = examine.compare_attention(task, method, settings, plan.seeds[0])
            picture = plan.cache.output / f"parity-{task.name}-{method}.png"
            figures.curves(curves, picture, f"{task.name}, {tables.NAMES[method]}")
            apart = max(abs(a - b) for a, b in zip(curves["ours"], curves["naive"]))
            examine.check_apart(apart, task, method)
            line = f"{task.name}, {tables.NAMES[method]}: {len(curves['ours'])} steps, from {curves['ours'][0]:.4f} to"
            parts.append(f"{line} {curves['ours'][-1]:.4f}; the losses differ by {apart:.1e} at most.")
            parts.append(f"![{task.name}, {method}]({picture.name})")
    return "\n\n".join(parts)


EXPERIMENTS = {
    "train": train,
    "main": main,
    "low-resource": low_resource,
    "ablation": ablation,
    "weights": weights,
    "lengths": lengths,
    "prune": prune,
    "parity": parity,
}


def write(name: str, page: str, output: Path) -> Path:
    path = output / f"{name}.md"
    path.write_text(page + "\n", encoding="utf-8")
    return path
