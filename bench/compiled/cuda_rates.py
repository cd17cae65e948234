"""Instructions that the CUDA library's straight loops issue for each (query, key) pair, in compiled code.

    python -m bench compiled cuda-rates [--architecture 7.5] [--head 64] [--kernel plain_forward]

Each loop takes one tile of columns in one iteration; every instruction counts once for each thread. The budgets are in
`budgets.json` under "nvcc". A loop is at fault that issues more, touches the stack, has a branch inside, or more than
two barriers of the block.
``make report`` runs this for 7.5, 8.0, 8.6 and 9.0.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import rates
from .csrc import build

ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0")
HEADS = (64, 128)
KERNELS = ("plain_forward", "plain_query_gradient")
_ROWS, _THREADS = 64, 128  # queries of a tile, and the threads of a block: `Cut` in ``csrc/tile.cuh``, float16
# The loops in the order of the code. Only the row prefix has branches of its own, where a thread computes a gate.
_LOOPS = ("prefix, gate per row", "prefix, gate per query", "tokens, edge", "tokens")
_BARRIERS = 2
_BRANCHES = ("BRA", "BRX", "BSSY", "CALL", "JMP")


@dataclass(frozen=True)
class Counted:
    """A loop, and the numbers of branches before its end and of barriers of the block."""

    loop: rates.Loop
    branches: int
    barriers: int

    def faults(self, allowed: dict[str, dict[str, float]]) -> list[str]:
        """What is wrong with it, by the budgets; empty: nothing."""
        found = rates.faults(self.loop, allowed, "nvcc")
        if self.branches and self.loop.loop != _LOOPS[0]:
            found.append(f"has {self.branches} branches inside; a straight loop has none")
        if self.barriers > _BARRIERS:
            found.append(f"has {self.barriers} barriers of the block; a tile needs at most {_BARRIERS}")
        return found


def _columns(kernel: str, head: int) -> int:
    """Columns of a tile: `Cut` in ``csrc/tile.cuh``."""
    return 32 if kernel != "plain_forward" and head == 128 else 64


def loops_of(kernel: str, architecture: str, head: int, folder: Path = build.CSRC) -> list[Counted]:
    """The loops of one of `KERNELS` for float16; ``folder``: its sources.

    Raises:
        build.BuildError: there is no nvcc, or it cannot compile them.
    """
    chip = architecture.replace(".", "")
    # The backward has a kernel for asynchronous copies, with two tiles in memory, and one for the others.
    stages = "" if kernel == "plain_forward" else ", 2" if int(chip) >= 80 else ", 1"
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "one.cu", Path(name) / "one.cubin"
        source.write_text(
            '#include "sums.cuh"\n#include "plain.cuh"\n#include "plain_gradients.cuh"\n'
            f"namespace apt {{ auto* one = {kernel}<half_t, {head}{stages}>; }}\n"
        )
        options = ["-std=c++20", f"-I{folder}", "-O3", "-gencode", f"arch=compute_{chip},code=sm_{chip}", "-cubin"]
        done = subprocess.run(
            [build.find_nvcc(), *options, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise build.BuildError(f"{kernel} cannot be compiled: {done.stdout}{done.stderr}")
        bodies = rates.product_loops(cubin.read_bytes())
    # `kTakesQueryGates` in ``csrc/plain_tiles.cuh``.
    names = [name for name in _LOOPS if name != _LOOPS[1] or head == 64 or int(chip) >= 80]
    if len(bodies) != len(names):
        raise RuntimeError(f"{kernel} has {len(bodies)} loops of products; {len(names)} were expected")
    threads = _THREADS / (_ROWS * _columns(kernel, head))
    return [
        Counted(
            rates.loop_of(f"sm_{chip}", head, "plain", kernel, name, body, threads),
            # The last two leave the loop and go back.
            sum(one.startswith(_BRANCHES) for one in body[:-2]),
            sum(one.startswith("BAR.SYNC") for one in body),
        )
        for name, body in zip(names, bodies)
    ]


def main(given: list[str] | None = None) -> int:
    """Print the counts; the exit code says whether any loop is at fault."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled cuda-rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--update", action="store_true", help=f"write the counts to {rates.BUDGETS.name}")
    options = parser.parse_args(given)
    found = [
        one
        for kernel in options.kernel
        for architecture in options.architecture
        for head in options.head
        for one in loops_of(kernel, architecture, head)
    ]
    if options.update:
        rates.update({one.loop.key: {"nvcc": round(one.loop.instructions, 2)} for one in found})
    allowed, wrong = rates.budgets(), 0
    for one in found:
        faults = one.faults(allowed)
        wrong += bool(faults)
        budget = allowed.get(one.loop.key, {}).get("nvcc", "-")
        line = f"{one.loop.key:<66} {one.loop.instructions:6.2f} a pair (budget {budget})"
        print("; ".join([line, *faults]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
