"""`summary`: the trainable parameters of a patched model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from .state import state_of
from .weights import refuse_pieces


@dataclass(frozen=True)
class Layer:
    """One attention module of a `Summary`."""

    name: str
    kind: str
    length: int
    gate: str
    parameters: int
    adapter: str = ""  # whose prefix it is; "" without a prefix
    frozen: int = 0  # how many of the tokens do not train (`num_frozen_tokens`)


@dataclass(frozen=True)
class Summary:
    """The trainable parameters of a patched model; ``str()`` of it is a table."""

    adapter: str  # the active one; the first, where several are
    trainable: int
    total: int
    layers: tuple[Layer, ...]
    beside: tuple[tuple[str, int], ...]  # trainable parameters that belong to no prefix: name, size

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        names = list(dict.fromkeys([self.adapter, *(x.adapter for x in self.layers if x.adapter)]))
        which = f"adapter{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
        lines = [f"{which}: {self.trainable:,} of {self.total:,} parameters are trainable ({share:.3g} %)"]
        rows = [("attention module", "kind", "length", "gate", "parameters")]
        shown = {x: f"{x.name} ({x.adapter})" if len(names) > 1 and x.adapter else x.name for x in self.layers}
        rows += [(shown[x], x.kind, _length(x), x.gate, f"{x.parameters:,}") for x in self.layers]
        rows += [(name, "other parameter", "", "", f"{size:,}") for name, size in _grouped(self.beside)]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for name, kind, length, gate, size in rows:
            cells = [name.ljust(widths[0]), kind.ljust(widths[1]), length.rjust(widths[2]), gate.ljust(widths[3])]
            lines.append("  ".join([*cells, size.rjust(widths[4])]).rstrip())
        return "\n".join(lines)


def summary(model: nn.Module) -> Summary:
    """The numbers of trainable parameters by module: ``print(apt_kernels.summary(model))``.

    Raises `PatchError` if the model is not patched, or if FullyShardedDataParallel holds it in pieces.

    Examples:
        >>> print(apt_kernels.summary(model))
    """
    state = state_of(model)
    refuse_pieces(model)
    model, found = state.model, state.prefixes
    owned = {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
    layers = []
    for site in state.sites:
        others = (state.parked[name].prefixes.get(site.name) for name in state.others)
        here = [prefix for prefix in (found.get(site.name), *others) if prefix is not None]
        for prefix in here:
            size = sum(_size(p) for p in prefix.parameters() if p.requires_grad)
            layers.append(Layer(site.name, site.kind, prefix.length, prefix.gate, size, prefix.adapter, prefix.frozen))
        if not here:
            layers.append(Layer(site.name, site.kind, 0, "", 0))
    beside = [(n, _size(p)) for n, p in model.named_parameters() if p.requires_grad and id(p) not in owned]
    return Summary(
        state.adapter,
        sum(_size(p) for p in model.parameters() if p.requires_grad),
        sum(map(_size, model.parameters())),
        tuple(layers),
        tuple(beside),
    )


def _grouped(beside: tuple[tuple[str, int], ...]) -> list[tuple[str, int]]:
    """Names that differ in the number of a layer alone as one, with how many they are, and their size in all."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for name, size in beside:
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append((name, size))
    return [
        found[0] if len(found) == 1 else (f"{pattern} (x {len(found)})", sum(size for _, size in found))
        for pattern, found in groups.items()
    ]


def _length(layer: Layer) -> str:
    return f"{layer.length} ({layer.frozen} frozen)" if layer.frozen else str(layer.length)


def _size(parameter: nn.Parameter) -> int:
    """The number of elements, also of a parameter that ZeRO-3 partitions or bitsandbytes packs two to a byte."""
    packed = getattr(parameter, "quant_state", None)
    size = parameter.numel() if packed is None else packed.shape.numel()
    return getattr(parameter, "ds_numel", size)
