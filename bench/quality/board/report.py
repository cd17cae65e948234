"""The board's page: tables of scores, differences with intervals, what was not run, and one figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common.markdown import markdown
from bench.quality import figures
from bench.quality.tables import interval

from .methods import BASELINES, METHODS

NOT_RUN = "not run"
# Of a two-sided test at 5% that finds a difference with a probability of 80%.
_POWER = 1.96 + 0.84


@dataclass(frozen=True)
class Column:
    """A task as a column: whether a lower score is better, and whether it is a fraction (shown in percent)."""

    task: str
    metric: str
    loss: bool
    tokens: bool = False  # the loss of the right answer, for a task with a score of its own

    @property
    def field(self) -> str:
        return "loss" if self.tokens or self.loss else "score"

    @property
    def scale(self) -> float:
        return 1.0 if self.field == "loss" else 100.0

    @property
    def digits(self) -> int:
        return 3 if self.field == "loss" else 1

    @property
    def title(self) -> str:
        return f"{self.task}: {'loss of the answer' if self.tokens else self.metric}"


Records = dict[tuple[str, str], list[dict]]  # (method, task) -> records, one for each seed


def columns(tasks: Sequence[dict]) -> list[Column]:
    """One for each task, and another for the loss of the right answer."""
    found = []
    for task in tasks:
        loss = task["kind"] == "loss"
        found.append(Column(task["name"], task["metric"], loss))
        found += [] if loss else [Column(task["name"], task["metric"], loss, tokens=True)]
    return found


def values(records: Sequence[dict], column: Column) -> dict[int, float]:
    """The shown number of each seed."""
    return {record["seed"]: column.scale * record[column.field] for record in records}


def scores(found: Records, shown: list[Column], seeds: int, obstacles: dict[str, str]) -> str:
    """A row for each method: mean ± standard deviation; how many seeds where not all ran; "not run" where none did."""
    rows = []
    for name, method in METHODS.items():
        counts = {r["parameters"] for task in {c.task for c in shown} for r in found.get((name, task), [])}
        parameters = " / ".join(f"{count:,}" for count in sorted(counts)) or "-"
        rows.append([method.title, parameters, *(_cell(found.get((name, c.task), []), c, seeds) for c in shown)])
        if name in obstacles:
            rows[-1][0] += f" ({obstacles[name]})"
    return markdown(["method", "trained parameters", *(c.title for c in shown)], rows, aligned=False)


def _cell(records: list[dict], column: Column, seeds: int) -> str:
    numbers = list(values(records, column).values())
    if not numbers:
        return NOT_RUN
    text = f"{statistics.mean(numbers):.{column.digits}f}"
    if len(numbers) > 1 and len(set(numbers)) > 1:
        text += f" ± {statistics.stdev(numbers):.{column.digits}f}"
    expected = 1 if records[0]["method"] == "none" else seeds
    return text if len(numbers) >= expected else f"{text} ({len(numbers)} of {expected} seeds)"


def against(found: Records, shown: list[Column], baseline: str) -> str:
    """Paired differences to a method with 95% intervals, in words where zero is outside."""
    rows = []
    for name, method in METHODS.items():
        if name in (baseline, "none"):
            continue
        rows.append([method.title, *(_difference(found, name, c, baseline) for c in shown)])
    return markdown([f"difference to {METHODS[baseline].title}", *(c.title for c in shown)], rows, aligned=False)


def apart(found: Records, name: str, column: Column, baseline: str) -> list[float]:
    """The differences to a method, for each seed that both have."""
    ours, theirs = (values(found.get((each, column.task), []), column) for each in (name, baseline))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _difference(found: Records, name: str, column: Column, baseline: str) -> str:
    numbers = apart(found, name, column, baseline)
    if not numbers:
        return NOT_RUN
    if len(numbers) < 2:
        return f"{numbers[0]:+.{column.digits}f} (one seed)"
    mean, reach = interval(numbers)
    text = f"{mean:+.{column.digits}f} ± {reach:.{column.digits}f}"
    if abs(mean) <= reach:
        return f"{text}, within noise"
    lower = column.field == "loss"
    return f"**{text}, {'better' if (mean < 0) == lower else 'worse'}**"


def notes(found: Records, tasks: Sequence[dict], shown: list[Column]) -> str:
    """What the numbers mean, and how many seeds and rows a difference of 2 points would need."""
    lines = ["- Mean ± standard deviation over seeds; accuracy, F1 and answers in percent, losses in nats per token."]
    lines.append(
        "- Differences are paired by seed, with the 95% interval of their mean (Student's t). Bold: zero is outside. "
        "The interval covers seeds (initial values and the order of rows), not the choice of the test rows."
    )
    for task in tasks:
        records = [r for (_, name), every in found.items() if name == task["name"] for r in every]
        if not records:
            lines.append(f"- {task['name']}: {NOT_RUN}.")
            continue
        rows, size = records[0]["rows"], records[0]["settings"]["size"]
        line = f"- {task['name']}: {rows['train']} training rows, {size['steps']} steps of {size['batch_size']} rows of"
        line += f" at most {size['max_length']} tokens; {rows['evaluated']} test rows."
        if task["kind"] != "loss":
            p = statistics.mean(r["score"] for r in records)
            line += f" The choice of the rows alone has a standard error of {_error(p, rows['evaluated']):.1f} points;"
            line += (
                f" two scores on separate rows would differ by 2 points beyond noise with {_rows_for(p):,} rows each."
            )
        line += _seeds_line(found, next(c for c in shown if c.task == task["name"]))
        lines.append(line)
    return "\n".join(lines)


def _error(p: float, rows: int) -> float:
    return 100 * math.sqrt(p * (1 - p) / rows)


def _rows_for(p: float, points: float = 2.0) -> int:
    return math.ceil(2 * p * (1 - p) * (_POWER * 100 / points) ** 2)


def _seeds_line(found: Records, column: Column) -> str:
    """The seeds that a difference of 2 points (of the loss: 0.02) would need, from the spread of the differences."""
    spreads = [apart(found, name, column, BASELINES[0]) for name in METHODS if name not in (BASELINES[0], "none")]
    deviations = [statistics.stdev(numbers) for numbers in spreads if len(numbers) > 1]
    if not deviations:
        return ""
    middle = statistics.median(deviations)
    worth = 0.02 if column.field == "loss" else 2.0
    seeds = math.ceil((_POWER * middle / worth) ** 2) + 2  # 2: for Student's t
    unit = "0.02 of the loss" if column.field == "loss" else "2 points"
    return (
        f" With the median standard deviation of the paired differences ({middle:.{column.digits}f}),"
        f" a difference of {unit} between two methods needs about {seeds} seeds (80% power)."
    )


def picture(found: Records, shown: list[Column], costs: list[dict], path: Path) -> None:
    """Quality against trained parameters for each column with results, and time against memory of a step."""
    used = [c for c in shown if any((name, c.task) in found for name in METHODS)]
    count = len(used) + bool(costs)
    figure = figures.new_figure(4.2 * count, 4.2)
    panels = figure.subplots(1, count, squeeze=False)[0]
    for axes, column in zip(panels, used):
        for name, method in METHODS.items():
            records = found.get((name, column.task), [])
            numbers = list(values(records, column).values())
            if not numbers:
                continue
            if name == "none":
                axes.axhline(numbers[0], color="grey", linewidth=0.8, linestyle=":", label=method.title)
                continue
            spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
            place = [records[0]["parameters"]], [statistics.mean(numbers)]
            axes.errorbar(*place, yerr=[spread], marker="o", capsize=3, linestyle="none", label=method.title)
        axes.set(xscale="log", xlabel="trained parameters", ylabel=column.title)
    for row in costs:
        place = row["bytes"] / 2**20, row["seconds"]
        panels[-1].plot(*place, "o", label=METHODS[row["method"]].title)
    if costs:
        panels[-1].set(xlabel="peak memory of a step, MiB", ylabel="seconds of a step")
    handles: dict[str, object] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)


def costs_table(costs: list[dict]) -> str:
    """Seconds and peak memory of a step."""
    rows = [[METHODS[r["method"]].title, f"{r['seconds']:.2f}", f"{r['bytes'] / 2**20:.0f}"] for r in costs]
    return markdown(["method", "seconds of a step", "peak memory, MiB"], rows, aligned=False)
