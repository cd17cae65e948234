"""What a trained model's gates say: the mean of ``lambda * alpha`` for every layer and prefix token, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class GateMeans:
    """Sums of ``lambda * alpha`` by layer, in the order in which the layers attend."""

    def __init__(self, layers: int):
        self.sums: list[Tensor | float] = [0.0] * layers
        self.counts = [0.0] * layers
        self.calls = 0

    def add(self, prefix_key: Tensor, gate: Tensor | None, layer_scale: Tensor | None, padding: Tensor | None) -> None:
        layer, self.calls = self.calls % len(self.sums), self.calls + 1
        alpha = prefix_key.new_ones(1, prefix_key.shape[1]) if gate is None else torch.sigmoid(gate.float())
        weight = alpha if layer_scale is None else alpha * layer_scale.float()
        if weight.ndim == 3 and padding is not None and padding.shape == weight.shape[:2]:
            weight = weight[padding]
        weight = weight.reshape(-1, weight.shape[-1]).cpu()
        self.sums[layer] += weight.sum(dim=0)
        self.counts[layer] += weight.shape[0]

    def means(self) -> list[list[float]]:
        return [(total / count).tolist() for total, count in zip(self.sums, self.counts)]


@contextmanager
def recorded(layers: int) -> Iterator[GateMeans]:
    """Within it, the forward passes of one patched model with so many prefixes are recorded."""
    from apt_kernels.hf.attention import function

    found, attention = GateMeans(layers), function.attention

    def recording(query, key, value, prefix_key, prefix_value, gate=None, layer_scale=None, *, mask=None, **options):
        found.add(prefix_key, gate, layer_scale, None if mask is None else mask.key_padding)
        return attention(query, key, value, prefix_key, prefix_value, gate, layer_scale, mask=mask, **options)

    function.attention = recording
    try:
        yield found
    finally:
        function.attention = attention


def picture(means: list[list[float]], path: Path, title: str) -> None:
    """A map of layers by prefix tokens, and the profile over the layers beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width = max(len(row) for row in means)
    table = np.full((len(means), width), np.nan)
    for i, row in enumerate(means):
        table[i, : len(row)] = row
    reach = max(0.05, np.nanmax(np.abs(table - 1)))
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(means)), layout="constrained")
    FigureCanvasAgg(figure)
    heat, profile = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    image = heat.imshow(table, aspect="auto", cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
    heat.set(xlabel="prefix token", ylabel="layer", title=title)
    for axis in (heat.xaxis, heat.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    figure.colorbar(image, ax=heat, label="mean of λ·α  (1: as at the start)")
    profile.barh(range(len(means)), np.nanmean(table, axis=1), color="#4c72b0")
    profile.axvline(1, color="black", linewidth=0.8)
    profile.set(xlabel="mean over tokens", title="by layer")
    figure.savefig(path, dpi=130)
