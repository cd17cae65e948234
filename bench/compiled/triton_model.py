"""The issue model of the Triton kernels, and of flash-attn-4 with our kernels on the prefix. Predictions, not measured.

See `bench.compiled.issue_model`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

from apt_kernels.impl.triton import tiles
from bench.speed import counts
from bench.speed.shapes import Shape

from . import flash4, schedule
from .issue_model import (
    BYTES,
    Chip,
    NotCountedError,
    Work,
    bytes_of_tensors,
    counted,
    exponentials_of_prefix,
    key_elements,
    query_elements,
    work_of,
)

TRITON = "3.9"  # whose counts
_VARIANTS = {"none": "causal_gate_none", "row": "causal", "query": "causal_gate_query"}


def gate_product(shape: Shape, which: str) -> list[Work]:
    """PyTorch's product of hidden states and the gate's weight, or its gradients."""
    flops = counts.gate_flops(shape, which)
    rows = shape.batch * (shape.tokens if shape.gate == "query" else 1)
    launches = {"forward": 1, "backward": 2}[which]
    moved = launches * rows * shape.heads * shape.dim * BYTES
    return [Work(multiply_adds=flops / 2, moved=moved, launches=launches)] if flops else []


@dataclass(frozen=True)
class Triton:
    """The kernels of a call by the tiles of an architecture."""

    shape: Shape
    chip: Chip
    architecture: str

    @classmethod
    def on(cls, shape: Shape, chip: Chip) -> Triton:
        """Those of a chip; `NotCountedError` where Triton does not run."""
        if chip.triton is None:
            raise NotCountedError(f"Triton does not run on {chip.capability}")
        return cls(shape, chip, chip.triton)

    def _count(self, kernel: str, loop: str) -> float:
        variant = _VARIANTS[self.shape.gate]
        return counted(f"{self.architecture} D{self.shape.dim} {variant} {kernel} {loop}", TRITON)

    def _stretch(self, kernel: str) -> float:
        places = self.chip.processors * schedule.blocks(self.architecture, kernel, self.shape.dim)
        return _stretch(replace(self.shape, gate="none"), kernel, self.architecture, places)

    def _prefix(self, kernel: str, name: str) -> list[tuple[float, float, int]]:
        """The prefix's part of a kernel over queries: whole tiles, and one for the rest."""
        shape = self.shape
        tile = tiles.tile(kernel, self.architecture, BYTES, shape.dim)
        width = tiles.prefix_columns(kernel, self.architecture, BYTES, shape.dim, shape.gate_per_query, shape.length)
        queries = shape.batch * shape.heads * math.ceil(shape.tokens / tile.rows) * tile.rows
        whole = shape.length // width * width
        parts = [(queries * whole, "prefix")] if whole else []
        parts += [(queries * width, "prefix, checked")] if whole < shape.length else []
        return [(elements, self._count(name, loop), exponentials_of_prefix(shape)) for elements, loop in parts]

    def _over_queries(self, kernel: str, name: str, products: int, tokens: bool, moved: float) -> Work:
        if not tokens:
            return work_of(self.shape, products, self._prefix(kernel, name), moved)
        tile = tiles.tile(kernel, self.architecture, BYTES, self.shape.dim)
        whole, masked = query_elements(self.shape, tile.rows, tile.columns)
        parts = [(whole, self._count(name, "tokens"), 1), *self._prefix(kernel, name)]
        parts += [(masked, self._count(name, "tokens, checked"), 1)] if masked else []
        return work_of(self.shape, products, parts, moved, self._stretch(kernel))

    def forward(self, tokens: bool = True) -> list[Work]:
        """Of the whole call; without ``tokens``, of the prefix merged into the tokens' output."""
        query, key, prefix = bytes_of_tensors(self.shape)
        moved = prefix + (2 * (query + key) if tokens else 3 * query)
        return [
            self._over_queries("forward", "attention_forward", 2, tokens, moved),
            *gate_product(self.shape, "forward"),
        ]

    def backward(self, tokens: bool = True) -> list[Work]:
        """dq, dk and dv, the prefix's and the gate's gradients; without ``tokens``, of the prefix alone."""
        shape = self.shape
        query, key, prefix = bytes_of_tensors(shape)
        # q, out and its gradient, and dq; without tokens the tokens' dq is read too.
        moved = prefix + (4 * query + 2 * key if tokens else 5 * query)
        found = [self._over_queries("query", "query_gradient", 3, tokens, moved)]
        if tokens:
            tile = tiles.tile("key_value", self.architecture, BYTES, shape.dim)
            whole, masked = key_elements(shape, tile.rows, tile.columns)
            parts = [(whole, self._count("column_gradients", "tokens"), 1)]
            parts += [(masked, self._count("column_gradients", "tokens, checked"), 1)] if masked else []
            found.append(work_of(shape, 4, parts, 2 * query + 4 * key, self._stretch("key_value")))
        return [*found, *self._columns_of_prefix(), *gate_product(shape, "backward")]

    def _columns_of_prefix(self) -> list[Work]:
        """The gradients of the prefix and of a gate for each query, and the sum of the programs' partial sums."""
        shape = self.shape
        part = "prefix_by_query" if shape.gate == "query" else "prefix"
        tile = tiles.tile(part, self.architecture, BYTES, shape.dim)
        kernel = "prefix_column_gradients" if tile.warps else "column_gradients"
        elements = shape.batch * shape.heads * shape.tokens * math.ceil(shape.length / tile.columns) * tile.columns
        query, _, prefix = bytes_of_tensors(shape)
        sums = tiles.programs(self.architecture) * 2 * shape.length * shape.dim * 4
        works = [
            work_of(
                shape,
                4,
                [(elements, self._count(kernel, "prefix"), exponentials_of_prefix(shape))],
                2 * query + prefix + sums,
            )
        ]
        if shape.gate == "query":
            works.append(
                work_of(shape, 2, [(elements, self._count(kernel, "gate"), exponentials_of_prefix(shape))], 2 * query)
            )
        # A launch of its own where a tile of its own says so; a gate's programs share one with the prefix's.
        first = replace(works[0], launches=int(bool(tile.warps)))
        return [first, *(replace(work, launches=0) for work in works[1:]), Work(moved=sums)]


@cache
def _stretch(shape: Shape, kernel: str, architecture: str, places: int) -> float:
    """The end of the last program over an even division of the tokens' work, which no gate changes."""
    taken = schedule.lengths(shape, kernel, architecture)
    return schedule.makespan(taken, places) / (sum(taken) / places)


def triton(shape: Shape, chip: Chip, which: str) -> list[Work]:
    """The fused kernels' work in a pass, ``"forward"`` or ``"backward"``.

    Raises:
        NotCountedError: one of its loops was not counted, or Triton does not run there.
    """
    kernels = Triton.on(shape, chip)
    return kernels.forward() if which == "forward" else kernels.backward()


def merge_flash4(shape: Shape, chip: Chip, which: str) -> list[Work]:
    """flash-attn-4 on the tokens, our kernels on the prefix. Its tiles are taken to be those of our forward.

    Raises:
        NotCountedError: its kernels or the prefix's were not counted.
    """
    kernels = Triton.on(shape, chip)
    found = flash4.COUNTED.get((kernels.architecture, shape.dim))
    if found is None:
        raise NotCountedError(f"flash-attn-4 on {chip.capability}")
    tile = tiles.tile("forward", kernels.architecture, BYTES, shape.dim)
    whole, masked = query_elements(shape, tile.rows, tile.columns)
    query, key, _ = bytes_of_tensors(shape)
    if which == "forward":
        parts = [(whole, found.whole, 1), (masked, found.masked, 1)]
        return [work_of(shape, 2, parts, 2 * (query + key)), *kernels.forward(tokens=False)]
    parts = [(whole + masked, found.backward, 1)]
    return [work_of(shape, 5, parts, 4 * (query + key)), *kernels.backward(tokens=False)]
