"""Tables of scores: mean and spread over seeds, differences with their intervals, and notes on each number."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from scipy import stats

from bench.common.markdown import markdown

from .methods import NAMES
from .tasks import Task


def value(record: dict) -> float:
    """The score that is reported: the test score of the best development epoch, or that epoch's own score."""
    return record["dev"] if record["test"] is None else record["test"]


def meaning(task: Task, record: dict) -> str:
    """Which number a task's column holds."""
    epochs, examples = len(record["curve"]), record["examples"]
    if record["test"] is None:
        return (
            f"{task.name}: development {task.metric} ({examples['dev']} rows) of the best of {epochs} epochs, "
            "chosen on the same rows, which makes the score too high"
        )
    return (
        f"{task.name}: test {task.metric} ({examples['test']} rows) of the epoch that is the best of {epochs} on "
        f"the development set ({examples['dev']} rows)"
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """``mean ± standard deviation``, in percent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval (Student's t), of two values or more."""
    reach = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), float(reach)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Mean paired difference with its 95% interval (Student's t), in points; bold: zero is outside."""
    apart = [100 * (a - b) for a, b in zip(ours, theirs)]
    if len(apart) < 2:
        return f"{statistics.mean(apart):+.1f}"
    mean, reach = interval(apart)
    text = f"{mean:+.1f} ± {reach:.1f}"
    return f"**{text}**" if abs(mean) > reach else text


def majority(task: Task) -> float | None:
    """Accuracy of always predicting the most frequent label of the training rows."""
    if task.kind == "tags":
        return None
    rows = task.splits.test or task.splits.dev
    commonest = Counter(str(row["label"]) for row in task.splits.train).most_common(1)[0][0]
    return sum(str(row["label"]) == commonest for row in rows) / len(rows)


Grid = dict[tuple[str, str], list[dict]]  # (row, task) -> records in the order of the seeds


def scores(grid: Grid, tasks: Sequence[Task], names: dict[str, str] = NAMES) -> str:
    """One row for each method, one column for each task."""
    rows = _rows(grid)
    table = []
    for row in rows:
        cells = [mean_and_spread([value(r) for r in grid[row, t.name]]) if (row, t.name) in grid else "" for t in tasks]
        prefix = {r["parameters"]["prefix"] for t in tasks for r in grid.get((row, t.name), [])}
        table.append([names.get(row, row), *cells, " / ".join(f"{n:,}" for n in sorted(prefix))])
    baseline = [majority(task) for task in tasks]
    if any(part is not None for part in baseline):
        table.append(["commonest label", *("" if part is None else f"{100 * part:.1f}" for part in baseline), ""])
    return markdown(["method", *(t.name for t in tasks), "prefix parameters"], table, aligned=False)


def against(grid: Grid, tasks: Sequence[Task], baseline: str, names: dict[str, str] = NAMES) -> str:
    """Differences to ``baseline``, paired by seed."""
    table = []
    for row in _rows(grid):
        if row == baseline:
            continue
        cells = []
        for task in tasks:
            ours, theirs = grid.get((row, task.name), []), grid.get((baseline, task.name), [])
            pairs = [(a, b) for a in ours for b in theirs if a["seed"] == b["seed"]]
            cells.append(difference([value(a) for a, _ in pairs], [value(b) for _, b in pairs]) if pairs else "")
        table.append([f"{names.get(row, row)} − {names.get(baseline, baseline)}", *cells])
    return markdown(["difference in points", *(t.name for t in tasks)], table, aligned=False)


def _rows(grid: Grid) -> list[str]:
    return list(dict.fromkeys(row for row, _ in grid))


def notes(grid: Grid, tasks: Sequence[Task]) -> str:
    """Notes under a table: the meaning of the scores, seeds, expected noise, machines."""
    lines = []
    for task in tasks:
        records = next(records for (_, name), records in grid.items() if name == task.name)
        seeds = sorted({len(found) for (_, name), found in grid.items() if name == task.name})
        rows = records[0]["examples"]["test"] or records[0]["examples"]["dev"]
        line = f"- {meaning(task, records[0])}; {records[0]['examples']['train']} training rows,"
        line += f" {' to '.join(map(str, seeds))} seeds."
        if task.kind != "tags":
            p = statistics.mean(value(r) for r in records)
            error = 100 * (p * (1 - p) / rows) ** 0.5
            line += f" The choice of these {rows} rows alone has a standard error of {error:.1f} points."
        lines.append(line)
    every = [r for records in grid.values() for r in records]
    minutes = sum(r["seconds"] for r in every) / 60
    machines = " and ".join(sorted({r["machine"] for r in every}))
    lines.append(
        f"- Mean ± standard deviation over seeds, in percent. {len(every)} trainings, {minutes:.0f} minutes, on "
        f"{machines}. Differences are paired by seed, with a 95% interval of their mean; bold: zero is outside."
    )
    return "\n".join(lines)
