"""The plot of a `Probe`: a heat map of layers by prefix tokens, and a profile by layer. Needs matplotlib."""

from __future__ import annotations

import os


def draw(probe, path: str | os.PathLike, title: str) -> None:
    """Write the plot to ``path``; the file name's extension determines the format."""
    try:
        import numpy as np
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Probe.picture needs matplotlib: pip install matplotlib", name=error.name) from error

    layers = probe.layers
    table = np.full((len(layers), max(layer.length for layer in layers)), np.nan)
    for i, layer in enumerate(layers):
        table[i, : layer.length] = layer.effective
    reach = max(0.05, float(np.nanmax(np.abs(table - 1))))
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    heat, profile = figure.subplots(1, 2, width_ratios=(3, 1.4), sharey=True)
    image = heat.imshow(table, aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
    heat.set(xlabel="prefix token", ylabel="layer", title=title)
    heat.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    heat.set_yticks(range(len(layers)), [_short(layer.name, i) for i, layer in enumerate(layers)])
    figure.colorbar(image, ax=heat, label="mean of λα  (1: as at the start)")
    rows, weights = np.arange(len(layers)), [layer.weight for layer in layers]
    profile.barh(rows, weights, color="#4c72b0")
    spread = [abs(layer.layer_scale) * float(np.mean(layer.gate_std_examples)) for layer in layers]
    within = [abs(layer.layer_scale) * float(np.mean(layer.gate_std_tokens)) for layer in layers]
    profile.errorbar(weights, rows, xerr=np.hypot(spread, within), fmt="none", ecolor="black", capsize=2, linewidth=1)
    profile.axvline(1, color="grey", linewidth=0.8)
    profile.set(xlabel="mean size of λα", title="by layer, with std over\ntext tokens and examples")
    figure.savefig(path, dpi=130)


def _short(name: str, index: int) -> str:
    """A short label: the numbers in the module's name, with its encoder, decoder or cross-attention part."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdigit()]
    side = next((part[:3] for part in parts if part in ("encoder", "decoder")), "")
    cross = (
        " cross" if any("cross" in part.lower() or "encoder_attn" in part or "EncDec" in part for part in parts) else ""
    )
    return f"{side} {'.'.join(numbers) or index}{cross}".strip()
