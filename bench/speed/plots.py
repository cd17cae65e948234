"""Results as pictures: time and memory against length, the share of the floor's rate, ours against each peer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .tables import ORDER, Results, Row, main_rows

_NAMES = ("ours", "naive", "concat_flash", "flex", "no prefix")
_COLOURS = dict(zip((*_NAMES, *ORDER), ("C0", "C1", "C2", "C4", "C7", "C1", "C2", "C4", "C3", "C5", "C6")))


def _times(row: Row) -> dict[str, float]:
    found = {"ours": row.ours.median, **({"no prefix": row.no_prefix.median} if row.no_prefix else {})}
    return found | {name: row.peers[name].median for name in _NAMES if name in row.peers}


def _memory(row: Row) -> dict[str, float]:
    peers = {
        "ours": row.ours,
        "no prefix": row.no_prefix,
        **{n: row.peers[n] for n in _NAMES if n in row.peers and n != "ours"},
    }
    return {name: entry.info["peak_bytes"] for name, entry in peers.items() if entry and entry.info.get("peak_bytes")}


def series(results: Results) -> dict:
    """All that is drawn, as plain numbers: what a picture's fingerprint is of."""
    rows = main_rows(results)
    lengths: dict[str, dict[str, list]] = {"time": {}, "memory": {}}
    for row in rows:
        if row.stage not in ("encoder", "causal"):
            continue
        tokens = row.shape["tokens"] * row.shape["batch"] * row.shape["heads"]
        for kind, values in (("time", _times(row)), ("memory", _memory(row))):
            for name, value in values.items():
                points = lengths[kind].setdefault(f"{row.stage}: {name}", [])
                points.append((row.shape["tokens"], value / tokens))
    ratios = {peer: [(row.case, r) for row in rows if (r := row.against(peer)) is not None] for peer in ORDER}
    floor = [(row.case, row.relative_rate) for row in rows if row.relative_rate is not None]
    return {
        **{kind: {name: sorted(points) for name, points in found.items()} for kind, found in lengths.items()},
        "floor": floor,
        "ratios": {peer: found for peer, found in ratios.items() if found},
    }


def model_ratios(results: Results) -> list[tuple[str, float, float | None]]:
    """For each whole-model case: its name in words, and naive's time and peak memory as multiples of ours."""
    found = []
    for row in main_rows(results):
        if row.stage not in ("training", "compiled", "generation") or row.against("naive") is None:
            continue
        memory = row.memory_against("naive") if row.stage != "generation" else None
        found.append((in_words(row.case, row.which), row.against("naive"), memory and 1 / memory))
    return found


def in_words(case: str, which: str) -> str:
    """``llama-4-layers-b1-t1024-m64-apt`` as a reader would say it."""
    model, layers, _, batch, tokens, prefix, method, *rest = case.split("-")
    name = {"bert": "BERT", "llama": "Llama"}.get(model, model)
    work = "decode" if which == "token" else "train"
    gates = {"apt": "gates", "prefix": "no gates"}[method] + "".join(f", {word}" for word in rest)
    length = f"{tokens[1:]}-token cache" if tokens[0] == "s" else f"{tokens[1:]} tokens"
    return f"{work} {name} ({layers} layers): {batch[1:]} x {length}, prefix {prefix[1:]}, {gates}"


def draw_models(results: Results, path: Path) -> None:
    """Bars: what the usual implementation takes for whole models, as multiples of ours."""
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
    axes.set_title("Cost of the usual implementation relative to apt-kernels (1: equal)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None, "Description": fingerprint({"models": drawn})})


def fingerprint(drawn: dict) -> str:
    """Of the numbers, to four digits; it stands in the picture's metadata."""
    rounded = json.loads(json.dumps(drawn), parse_float=lambda text: f"{float(text):.4g}")
    return hashlib.sha256(json.dumps(rounded, sort_keys=True).encode()).hexdigest()


def fingerprint_of(path: Path) -> str:
    """What `draw` wrote into a picture."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.text["Description"]


def draw(results: Results, path: Path, title: str) -> None:
    """The four panels as one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = series(results)
    cases = [case for case, _ in drawn["floor"]] + [c for found in drawn["ratios"].values() for c, _ in found]
    cases = list(dict.fromkeys(cases))
    figure = Figure(figsize=(13, 5 + 0.17 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, height_ratios=[4, 1 + 0.17 * len(cases)])
    _against_length(figure.add_subplot(grid[0, 0]), drawn["time"], 1e9, "ns per token and head, forward + backward")
    _against_length(figure.add_subplot(grid[0, 1]), drawn["memory"], 1, "peak bytes per token and head")
    _dots(figure.add_subplot(grid[1, 0]), cases, drawn["ratios"], "time of a peer / ours (right of 1: ours is faster)")
    floor = {"of the floor's rate": drawn["floor"]}
    _dots(
        figure.add_subplot(grid[1, 1]), cases, floor, "arithmetic per second / that of attention without prefix", False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, "Description": fingerprint(drawn)}
    figure.savefig(path, dpi=80, metadata=metadata)


def _against_length(axes, found: dict[str, list], scale: float, label: str) -> None:
    for name, points in found.items():
        kind, _, peer = name.partition(": ")
        style = {"marker": "o" if kind == "encoder" else "^", "linestyle": "none", "alpha": 0.7}
        colour = _COLOURS.get(peer, "C9")
        axes.plot([t for t, _ in points], [v * scale for _, v in points], label=name, color=colour, **style)
    if found:
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.legend(fontsize=7, ncols=2)


def _dots(axes, cases: list[str], found: dict[str, list], label: str, names: bool = True) -> None:
    places = {case: i for i, case in enumerate(reversed(cases))}
    for name, points in found.items():
        colour = _COLOURS.get(name, "C0")
        axes.plot([v for _, v in points], [places[c] for c, _ in points], "o", label=name, color=colour, markersize=4)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(yticks=list(places.values()), xlabel=label, ylim=(-1, len(cases)))
    axes.set_yticklabels(list(places) if names else [], fontsize=6)
    axes.grid(axis="y", linewidth=0.3)
    if names and found:
        axes.legend(fontsize=7)
