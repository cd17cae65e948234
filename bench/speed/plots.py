"""Figures of results: time and memory against length, decoding, and whole models in one chart.

Lines connect cases that differ in length alone. A panel names the peers that were not measured, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path

from .tables import Entry, Results, Row, main_rows
from .words import PEERS, case_in_words, setting_in_words

FIGURES = {"time": "Time by length", "memory": "Peak memory by length", "decoding": "Time of a decoding step"}
_COLOURS = dict(zip(PEERS, ("C0", "C1", "C3", "C2", "C6", "C4", "C5", "C7", "0.5"), strict=True))
_TRAINING, _DECODING = (
    ("ours", "naive", "peft", "concat_flash", "flex", "no_prefix"),
    ("ours", "naive", "in_cache", "no_prefix"),
)
_MOST_PANELS = 4


def series(results: Results) -> dict:
    """The plotted numbers; `fingerprint` is computed from them."""
    reasons = {(entry["case"], entry["peer"]): entry["reason"] for entry in results.skipped}
    groups: dict[tuple, list[Row]] = {}
    for row in main_rows(results):
        if row.stage in ("encoder", "causal", "query", "training"):
            fixed = {name: value for name, value in row.shape.items() if name not in ("batch", "tokens", "keys")}
            groups.setdefault((row.stage, json.dumps(fixed, sort_keys=True)), []).append(row)
    lines = [rows for rows in groups.values() if len({row.shape["tokens"] for row in rows}) > 1]
    lines = sorted(lines, key=len, reverse=True)[:_MOST_PANELS]
    return {
        "time": [_panel(rows, reasons, _milliseconds) for rows in lines],
        "memory": [_panel(rows, reasons, _mebibytes) for rows in lines],
        "decoding": [_bars(row, reasons) for row in main_rows(results) if row.stage in ("decode", "generation")],
    }


def _entry(row: Row, peer: str) -> Entry | None:
    return {"ours": row.ours, "no_prefix": row.no_prefix}.get(peer) or row.peers.get(peer)


def _milliseconds(row: Row, entry: Entry) -> list[float]:
    scale = 1e3 / (row.shape["batch"] * row.shape["tokens"] / 1000)
    return [entry.median * scale, entry.q1 * scale, entry.q3 * scale]


def _mebibytes(row: Row, entry: Entry) -> list[float] | None:
    peak = entry.info.get("peak_bytes")
    return [peak / 2**20 / (row.shape["batch"] * row.shape["tokens"] / 1000)] * 3 if peak else None


def _panel(rows: list[Row], reasons: dict, value) -> dict:
    found: dict = {"title": ", ".join(setting_in_words(rows[0])), "lines": {}, "missing": {}}
    for peer in _TRAINING:
        points = [(row, _entry(row, peer)) for row in rows]
        points = [[row.shape["tokens"], *numbers] for row, entry in points if entry and (numbers := value(row, entry))]
        if points:
            found["lines"][peer] = sorted(points)
        else:
            found["missing"][peer] = next((reasons[row.case, peer] for row in rows if (row.case, peer) in reasons), "")
    return found


def _bars(row: Row, reasons: dict) -> dict:
    subject, prefix = setting_in_words(row)
    batch, keys = row.shape["batch"], row.shape.get("keys", row.shape["tokens"])
    found: dict = {
        "title": f"{batch} x {keys:,} cached, {prefix}\n{subject}",
        "batch": batch,
        "bars": {},
        "missing": {},
    }
    for peer in _DECODING:
        entry = _entry(row, peer)
        if entry:
            found["bars"][peer] = [seconds * 1e3 for seconds in (entry.median, entry.q1, entry.q3)]
        elif (row.case, peer) in reasons:
            found["missing"][peer] = reasons[row.case, peer]
    return found


def fingerprint(drawn: dict) -> str:
    """A hash of the numbers to four digits, stored in the figure's metadata."""
    rounded = json.loads(json.dumps(drawn), parse_float=lambda text: f"{float(text):.4g}")
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def fingerprint_of(path: Path) -> str:
    """The fingerprint that `draw` stored in a figure."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.text["Description"]


def draw(results: Results, path: Path, title: str, names: tuple[str, ...] = tuple(FIGURES)) -> None:
    """Draw the named figures below one another into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = series(results)
    heights = [1.2 + 0.75 * len(drawn[name]) if name == "decoding" else 4.6 for name in names]
    figure = Figure(figsize=(max(8, 4.6 * max(1, len(drawn["time"]))), sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(names), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, name in zip(parts, names):
        part.suptitle(f"{FIGURES[name]} ({title})", fontsize=11)
        _draw_bars(part, drawn[name]) if name == "decoding" else _draw_lines(part, drawn[name], name)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, "Description": fingerprint({name: drawn[name] for name in names})}
    figure.savefig(path, dpi=90, metadata=metadata)


def _draw_lines(part, panels: list[dict], name: str) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    if not panels:
        _nothing(part, "not measured at two lengths or more")
        return
    label = {"time": "ms per 1,000 tokens, forward and backward", "memory": "peak MiB per 1,000 tokens"}[name]
    for i, (axes, panel) in enumerate(zip(part.subplots(1, len(panels), squeeze=False)[0], panels)):
        for peer, points in panel["lines"].items():
            tokens, middle, low, high = zip(*points)
            axes.plot(tokens, middle, marker="o", color=_COLOURS[peer], label=PEERS[peer])
            axes.fill_between(tokens, low, high, color=_COLOURS[peer], alpha=0.2, linewidth=0)
        ticks = sorted({point[0] for points in panel["lines"].values() for point in points})
        axes.set(xscale="log", xlabel="tokens", ylim=(0, None), ylabel=label if i == 0 else None)
        axes.set_title(textwrap.fill(panel["title"], 42), fontsize=9)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.legend(fontsize=8)
        missing = [f"{PEERS[peer]}: {reason or 'not asked for'}" for peer, reason in panel["missing"].items()]
        text = "\n".join(textwrap.fill(line, 60, subsequent_indent="  ") for line in missing)
        axes.text(0, -0.2, text, transform=axes.transAxes, fontsize=7, va="top", color="0.3")


def _draw_bars(part, cases: list[dict]) -> None:
    if not cases:
        _nothing(part, "not measured")
        return
    axes, height = part.subplots(), 0.8 / len(_DECODING)
    cases = sorted(cases, key=lambda case: case["batch"])
    labelled: set[str] = set()
    most = max(bar[0] for case in cases for bar in case["bars"].values())
    for i, case in enumerate(cases):
        for j, peer in enumerate(_DECODING):
            y = -i - (j - (len(_DECODING) - 1) / 2) * height
            if peer in case["bars"]:
                middle, low, high = case["bars"][peer]
                label = None if peer in labelled else PEERS[peer]
                error = [[max(0, middle - low)], [max(0, high - middle)]]
                axes.barh(y, middle, height, xerr=error, color=_COLOURS[peer], label=label, error_kw={"linewidth": 0.8})
                labelled.add(peer)
            elif peer in case["missing"]:
                axes.text(
                    0.005 * most, y, f"{PEERS[peer]}: {case['missing'][peer]}", fontsize=7, va="center", color="0.3"
                )
    axes.set_yticks([-i for i in range(len(cases))], [case["title"] for case in cases], fontsize=8)
    axes.set(xlabel="ms per step; lines: quartiles")
    axes.legend(fontsize=8)


def model_ratios(results: Results) -> list[tuple[str, float, float | None]]:
    """For each whole-model case: its title, and naive's time and peak memory as multiples of ours."""
    found = []
    for row in main_rows(results):
        if row.stage not in ("training", "compiled", "generation") or row.against("naive") is None:
            continue
        memory = row.memory_against("naive") if row.stage != "generation" else None
        found.append((case_in_words(row), row.against("naive"), memory and 1 / memory))
    return found


def draw_models(results: Results, path: Path) -> None:
    """Bars: time and memory of the usual implementation for whole models, as multiples of ours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = model_ratios(results)
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(drawn), 0, -1)
    axes.barh([y + 0.18 for y in places], [time for _, time, _ in drawn], 0.34, label="time")
    memory = [(y - 0.18, value) for y, (_, _, value) in zip(places, drawn) if value]
    axes.barh([y for y, _ in memory], [value for _, value in memory], 0.34, label="peak memory")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=list(places), xlabel="concatenated prefix / apt-kernels")
    axes.set_yticklabels([name for name, _, _ in drawn])
    axes.legend()
    figure.suptitle("Cost of the usual implementation relative to apt-kernels (1: equal)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None, "Description": fingerprint({"models": drawn})})


def _nothing(part, reason: str) -> None:
    axes = part.subplots()
    axes.text(0.5, 0.5, reason, ha="center")
    axes.set_axis_off()
