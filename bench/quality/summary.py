"""Summaries of many trainings: medians, quartiles, means and settings, in place of a record for each training."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from .tables import interval, value

_SCORES = ("dev", "test", "last")


def summarise(records: list[dict]) -> list[dict]:
    """One entry for each task and each set of settings, with all its methods. Scores are fractions of 1.

    ``over_apt``: the mean difference to APT, paired by seed, with half its 95% interval (Student's t).
    """
    groups: dict[str, list[dict]] = {}
    for record in records:
        same = {name: record[name] for name in ("task", "settings", "examples", "machine")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    found = []
    for same, group in groups.items():
        methods: dict[str, list[dict]] = {}
        for record in group:
            methods.setdefault(record["method"], []).append(record)
        entries = {}
        for name, own in methods.items():
            entries[name] = _method(own)
            if name != "apt" and "apt" in methods:
                entries[name]["over_apt"] = _difference(own, methods["apt"])
        found.append({**json.loads(same), "methods": entries})
    return found


def _method(records: list[dict]) -> dict:
    entry = {"seeds": len({record["seed"] for record in records}), "parameters": records[0]["parameters"]}
    for name in _SCORES:
        scores = [record[name] for record in records if record[name] is not None]
        entry[name] = _spread(scores) if scores else None
    return {**entry, "seconds": _spread([record["seconds"] for record in records])}


def _spread(values: list[float]) -> dict[str, float]:
    low, middle, high = (values * 3)[:3] if len(values) < 2 else statistics.quantiles(values, n=4, method="inclusive")
    found = {"median": middle, "q1": low, "q3": high, "mean": statistics.mean(values)}
    found["standard_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return {name: float(f"{number:.6g}") for name, number in found.items()}


def _difference(ours: list[dict], theirs: list[dict]) -> dict | None:
    by_seed = {record["seed"]: value(record) for record in theirs}
    apart = [value(record) - by_seed[record["seed"]] for record in ours if record["seed"] in by_seed]
    if len(apart) < 2:
        return None
    mean, reach = interval(apart)
    return {"mean": float(f"{mean:.6g}"), "half_interval": float(f"{reach:.6g}"), "seeds": len(apart)}


def write(records: list[dict], path: Path) -> None:
    """The summary as JSON, one line for each task and set of settings."""
    lines = ",\n".join(f" {json.dumps(entry, ensure_ascii=False)}" for entry in summarise(records))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
