"""The issue model: how long counted kernels take on a chip. A prediction, not a measurement.

A kernel executes counted thread-instructions, exponentials, multiply-adds of matrix products, and moves bytes. Each of
the four alone takes a time on a chip, its *bounds*: what is executed over what all multiprocessors execute a second.

- ``least``: the largest bound. All of a kernel's work overlaps.
- ``most``: products, and the larger one of issue and exponentials, one after the other; or bytes, if these take longer.
- Both are multiplied by the simulated end of the programs over an even division (`bench.compiled.schedule`), where that
  is simulated. The kernels of a pass run one after another, and each launch adds `LAUNCH`.

Sources. Instructions per element: `budgets.json`, counted in compiled code; tests count those of `rates.SUBSET` again,
`python -m bench compiled rates` and ``cuda-rates`` the others. Tiles: the tables of the kernels; a tile that is masked
in part is executed whole, at the count of its own loop. Issue: four schedulers a multiprocessor with one instruction of
32 threads a cycle (NVIDIA's tuning guides, 7.5 to 12.0). Exponentials: 16 a cycle and multiprocessor (CUDA C++
programming guide, arithmetic throughput). Chips: `CHIPS`.

Assumptions. Bidirectional calls issue the count of the causal call's whole tiles. Outside of the loops of products a
program issues nothing; every tensor is moved once by each kernel that needs it; clocks stay at the boost clock; no
instruction waits for memory, a barrier or another pipe. On 7.5 and 8.0 half as many units execute float32 as issue:
not considered. So times are too short, even ``most``, and comparisons are better than times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from bench.speed.shapes import Shape

from . import rates

ISSUED, EXPONENTIALS = 128, 16  # thread-instructions and exponentials a cycle and multiprocessor
# Seconds between the kernels of a stream: assumed, as in bench/NOTES.md; no data sheet has it.
LAUNCH = 3e-6
BYTES = 2  # of an element


class NotCountedError(LookupError):
    """`budgets.json` has no count of a loop; the message is the loop's key."""


@dataclass(frozen=True)
class Chip:
    """A GPU: compute capability, multiprocessors, clock in Hz, multiply-adds of half-precision products with float32
    sums a cycle and multiprocessor, dense; bytes a second; where the figures are from.

    ``triton``: the architecture of Triton's kernels, which write the same PTX for 8.6 and 8.9; None: they do not run.
    ``library``: whose code of the CUDA library it runs.
    """

    capability: str
    processors: int
    clock: float
    multiply_adds: int
    bandwidth: float
    triton: str | None
    library: str
    source: str

    @property
    def peak(self) -> float:
        """Floating-point operations a second of dense half-precision products."""
        return 2 * self.multiply_adds * self.cycles

    @property
    def cycles(self) -> float:
        """Cycles a second of all multiprocessors together."""
        return self.processors * self.clock


_GARDEN = "glennklockwood.com/garden/processors"
# The peaks that follow are those of the sources, within 1%: 65, 125, 165, 312, 989, 989, 2,250 TFLOP/s; see RTX 5090's.
CHIPS = {
    "T4": Chip("7.5", 40, 1.590e9, 512, 320e9, None, "sm_75", "sysrqmts.com/en/gpus/nvidia/tesla/t4"),
    "A10": Chip(
        "8.6", 72, 1.695e9, 512, 600e9, "sm_86", "sm_86",
        "sysrqmts.com, A10 PCIe; 512 from the 149.7 and 37.4 TFLOP/s of A40, the same chip (ecer.com, A40)",
    ),
    "RTX 4090": Chip("8.9", 128, 2.52e9, 256, 1008e9, "sm_86", "sm_86", "hmc-tech.com, GeForce RTX 4090"),
    "A100": Chip("8.0", 108, 1.41e9, 1024, 2039e9, "sm_80", "sm_80", f"{_GARDEN}/A100, SXM4 of 80 GB"),
    "H100": Chip("9.0", 132, 1.83e9, 2048, 3350e9, "sm_90", "sm_90", f"{_GARDEN}/h100, SXM5"),
    "H200": Chip(
        "9.0", 132, 1.83e9, 2048, 4800e9, "sm_90", "sm_90",
        f"{_GARDEN}/h100: the chip of H100; bandwidth: openmetal.io, H200",
    ),
    "B200": Chip("10.0", 148, 1.86e9, 4096, 8000e9, "sm_100", "sm_100", f"{_GARDEN}/B200, HGX; hmc-tech.com, B200"),
    "RTX 5090": Chip(
        "12.0", 170, 2.407e9, 256, 1792e9, "sm_120", "sm_120",
        "spheron.network/blog/nvidia-rtx-5090-specs; a quarter of its 838 TFLOP/s, which are sparse with float16 sums",
    ),
}  # fmt: skip


def chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
        ValueError: it is not in `CHIPS`.
    """
    if name not in CHIPS:
        raise ValueError(f"the chip is {name!r}; it needs one of {', '.join(CHIPS)}")
    return CHIPS[name]


@dataclass(frozen=True)
class Work:
    """What a kernel executes in one call: thread-instructions, exponentials, multiply-adds of products, bytes.

    ``stretch``: when its last program ends, over an even division of its work.
    """

    instructions: float = 0
    exponentials: float = 0
    multiply_adds: float = 0
    moved: float = 0
    stretch: float = 1
    launches: int = 1

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each kind of work takes alone."""
        return {
            "issue": self.stretch * self.instructions / (ISSUED * chip.cycles),
            "exponentials": self.stretch * self.exponentials / (EXPONENTIALS * chip.cycles),
            "tensor": self.stretch * self.multiply_adds / (chip.multiply_adds * chip.cycles),
            "bytes": self.moved / chip.bandwidth,
        }


@dataclass(frozen=True)
class Predicted:
    """Seconds of a pass: at least, and without overlap of products and the rest; the name of the largest bound."""

    least: float
    most: float
    bound: str

    def share(self, flops: float, chip: Chip) -> tuple[float, float]:
        """The rate of ``flops`` over the chip's peak: without overlap, and at most."""
        return flops / self.most / chip.peak, flops / self.least / chip.peak

    def __add__(self, other: Predicted) -> Predicted:
        longer = self if self.least >= other.least else other
        return Predicted(self.least + other.least, self.most + other.most, longer.bound)


def predict(works: Iterable[Work], chip: Chip) -> Predicted:
    """The time of kernels that run one after another."""
    least = most = 0.0
    together = dict.fromkeys(("issue", "exponentials", "tensor", "bytes"), 0.0)
    for work in works:
        found = work.bounds(chip)
        together = {name: seconds + found[name] for name, seconds in together.items()}
        least += max(found.values()) + work.launches * LAUNCH
        serial = max(found["issue"], found["exponentials"]) + found["tensor"]
        most += max(serial, found["bytes"]) + work.launches * LAUNCH
    return Predicted(least, most, max(together, key=together.__getitem__))


@cache
def _budgets() -> dict[str, dict[str, float]]:
    return rates.budgets()


def counted(key: str, version: str) -> float:
    """Instructions per element of a loop, by its key in `budgets.json`.

    Raises:
        NotCountedError: there is no such count.
    """
    found = _budgets().get(key, {}).get(version)
    if found is None:
        raise NotCountedError(key)
    return found


# --- the elements of the tiles that a call executes


def query_elements(shape: Shape, rows: int, columns: int) -> tuple[int, int]:
    """Elements of the tiles of kernels over queries, of all heads: in tiles that are seen whole, and in the others."""
    whole = every = 0
    for first in range(0, shape.tokens, rows):
        end = min(shape.keys, first + rows) if shape.causal else shape.keys
        seen = first + 1 if shape.causal else shape.keys
        whole += seen // columns
        every += -(-end // columns)
    size = shape.batch * shape.heads * rows * columns
    return whole * size, (every - whole) * size


def key_elements(shape: Shape, rows: int, columns: int) -> tuple[int, int]:
    """The same for kernels over keys: ``rows`` queries by ``columns`` keys, for every query head."""
    whole = every = 0
    full = shape.tokens // rows
    for first in range(0, shape.keys, columns):
        every += -(-shape.tokens // rows) - (first // rows if shape.causal else 0)
        whole += full - min(full, -(-(first + columns - 1) // rows) if shape.causal else 0)
    size = shape.batch * shape.heads * rows * columns
    return whole * size, (every - whole) * size


def bytes_of_tensors(shape: Shape) -> tuple[int, int, int]:
    """Bytes of a tensor of queries, of one of keys, and of the prefix's key and value."""
    query = shape.batch * shape.heads * shape.tokens * shape.dim * BYTES
    key = shape.batch * shape.kv_heads * shape.keys * shape.dim * BYTES
    return query, key, 2 * shape.kv_heads * shape.length * shape.dim * 4


def work_of(
    shape: Shape, products: int, parts: Sequence[tuple[float, float, int]], moved: float, stretch: float = 1
) -> Work:
    """A kernel of parts: elements, instructions and exponentials for each element; ``products`` for each element."""
    return Work(
        sum(elements * each for elements, each, _ in parts),
        sum(elements * each for elements, _, each in parts),
        sum(elements for elements, _, _ in parts) * products * shape.dim,
        moved,
        stretch,
    )


def exponentials_of_prefix(shape: Shape) -> int:
    """Exponentials for an element of the prefix: a gate for each query takes one and a reciprocal more."""
    return 3 if shape.gate == "query" else 1
