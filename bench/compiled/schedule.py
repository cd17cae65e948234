"""Load balance of the Triton kernels' programs on the multiprocessors of a chip: simulated list scheduling.

    python -m bench compiled schedule [--architecture sm_90]

Programs start in their order, each on the first place that is free, and take as long as they have tiles. A figure is
the time until the last one ends over that of an even division, for every registered decoder and encoder shape with
enough work to fill the chip. Predictions of a model, not times.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from apt_kernels.impl.triton import tiles
from bench.speed.shapes import REGISTRIES, Shape

# What a program does beside its tiles of tokens, in such tiles: it loads its own tile, takes the prefix, stores.
_OWN = 1.0
# Blocks that a multiprocessor holds at a time, where it is more than one (see the compile report).
_BLOCKS = {("sm_90", "forward", 64): 2, ("sm_90", "key_value", 64): 2, ("sm_90", "key_value", 128): 2}


@dataclass(frozen=True)
class Balance:
    """A kernel's last end over an even division, and how many programs it has for each place."""

    shape: str
    kernel: str
    over_even: float
    programs: float


def makespan(lengths: Iterable[float], places: int) -> float:
    """When the last of these ends, each started where a place is first free."""
    free = [0.0] * places
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def order(n_tiles: int, heads: int, band: int) -> Iterator[tuple[int, int]]:
    """Tile and head of every program: `primitives.longest_first`."""
    for first in range(0, heads, band):
        yield from itertools.product(range(n_tiles), range(first, min(first + band, heads)))


def lengths(shape: Shape, kernel: str, architecture: str) -> list[float]:
    """How long each program takes, in tiles of tokens, in the order in which they start."""
    tile = tiles.tile(kernel, architecture, 2, shape.dim)
    group, size = shape.heads // shape.kv_heads, 2 * shape.dim * 2
    rows, columns = -(-shape.tokens // tile.rows), -(-shape.keys // tile.columns)
    if kernel == "key_value":
        heads = shape.batch * shape.kv_heads
        shares = tiles.shares(architecture, heads, group, columns, rows, shape.causal)
        band = tiles.band(architecture, shape.tokens * size * group // shares, columns)

        def length(i: int) -> float:
            first = i * tile.columns // tile.rows if shape.causal else 0
            return (rows - first) * (group // shares) + _OWN

        return [length(i) for i, _ in order(columns, heads * shares, band)]
    band = tiles.band(architecture, shape.keys * size, rows * group) * group

    def length(i: int) -> float:
        last = min(shape.keys, (rows - i) * tile.rows) if shape.causal else shape.keys
        return -(-last // tile.columns) + _OWN

    return [length(i) for i, _ in order(rows, shape.batch * shape.heads, band)]


def blocks(architecture: str, kernel: str, dim: int) -> int:
    """Programs of a kernel that a multiprocessor holds at a time."""
    head = next(head for head in tiles.HEADS if dim <= head)
    return _BLOCKS.get((architecture, kernel, head), 1)


def balances(shape: Shape, architecture: str = "sm_90") -> list[Balance]:
    """The balance of the forward, of dq, and of dk and dv."""
    found = []
    for kernel in ("forward", "query", "key_value"):
        places = tiles.processors(architecture) * blocks(architecture, kernel, shape.dim)
        taken = lengths(shape, kernel, architecture)
        even = max(sum(taken) / places, max(taken) if len(taken) <= places else 0)
        found.append(Balance(shape.name, kernel, makespan(taken, places) / even, len(taken) / places))
    return found


def registered() -> list[Shape]:
    """The decoder and encoder shapes of the registry for GPUs."""
    return [shape for stage, shapes in REGISTRIES["gpu"].items() if stage != "decode" for shape in shapes]


def main(given: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled schedule", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", choices=tiles.ARCHITECTURES, default="sm_90")
    architecture = parser.parse_args(given).architecture
    for shape in registered():
        said = ", ".join(
            f"{b.kernel} {b.over_even:.2f} ({b.programs:.1f} a place)" for b in balances(shape, architecture)
        )
        print(f"{shape.name:<48} {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
