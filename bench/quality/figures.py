"""Figures of the experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def centre(weights: Sequence[float]) -> float:
    """The weighted mean of the layer index, counted from 0."""
    return sum(i * w for i, w in enumerate(weights)) / sum(weights)


def new_figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def profiles(found: dict[str, list[list[float]]], path: Path) -> None:
    """Each task's mean weight by layer, with the standard deviation over seeds."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, runs in found.items():
        values = np.array(runs)
        spread = values.std(axis=0, ddof=1) if len(runs) > 1 else None
        axes.errorbar(range(values.shape[1]), values.mean(axis=0), yerr=spread, marker="o", capsize=3, label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="layer", ylabel="mean of |λα|", title="Weight of the prefix by layer (mean ± std over seeds)")
    axes.legend()
    figure.savefig(path, dpi=130)


def curves(found: dict[str, list[float]], path: Path, title: str) -> None:
    """Losses by step; the second is dashed over the first."""
    figure = new_figure(7, 3.5)
    axes = figure.subplots()
    for (name, losses), style in zip(found.items(), ("-", "--")):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend()
    figure.savefig(path, dpi=130)
