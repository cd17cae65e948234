"""Instructions that the CUDA library's straight forward loops issue for each (query, key) pair, in compiled code.

    python -m bench compiled cuda-rates [--architecture 7.5] [--head 64]

Each loop takes one tile of columns in one iteration; every instruction counts once for each thread. The budgets are in
`budgets.json` under "nvcc". A loop that issues more, touches the stack, or has a branch inside is at fault.
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
# Queries and columns of a tile, and the threads of a block: `Cut` in ``csrc/tile.cuh``, float16, at both head sizes.
_PAIRS, _THREADS = 64 * 64, 128
# The loops in the order of the code. Only the row prefix has branches of its own, where a thread computes a gate.
_LOOPS = ("prefix, gate per row", "prefix, gate per query", "tokens, edge", "tokens")
_BRANCHES = ("BRA", "BRX", "BSSY", "CALL", "JMP")


@dataclass(frozen=True)
class Counted:
    """A loop, and the number of branches before its end."""

    loop: rates.Loop
    branches: int

    def faults(self, allowed: dict[str, dict[str, float]]) -> list[str]:
        """What is wrong with it, by the budgets; empty: nothing."""
        found = rates.faults(self.loop, allowed, "nvcc")
        if self.branches and self.loop.loop != _LOOPS[0]:
            found.append(f"has {self.branches} branches inside; a straight loop has none")
        return found


def loops_of(architecture: str, head: int, folder: Path = build.CSRC) -> list[Counted]:
    """The loops of `plain_forward` for float16; ``folder``: its sources.

    Raises:
        build.BuildError: there is no nvcc, or it cannot compile them.
    """
    chip = architecture.replace(".", "")
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "one.cu", Path(name) / "one.cubin"
        source.write_text(
            '#include "sums.cuh"\n#include "plain.cuh"\n'
            f"namespace apt {{ auto* one = plain_forward<half_t, {head}>; }}\n"
        )
        options = ["-std=c++20", f"-I{folder}", "-O3", "-gencode", f"arch=compute_{chip},code=sm_{chip}", "-cubin"]
        done = subprocess.run(
            [build.find_nvcc(), *options, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise build.BuildError(f"plain_forward cannot be compiled: {done.stdout}{done.stderr}")
        bodies = rates.product_loops(cubin.read_bytes())
    # `kTakesQueryGates` in ``csrc/plain.cuh``.
    names = [name for name in _LOOPS if name != _LOOPS[1] or head == 64 or int(chip) >= 80]
    if len(bodies) != len(names):
        raise RuntimeError(f"plain_forward has {len(bodies)} loops of products; {len(names)} were expected")
    return [
        Counted(
            rates.loop_of(f"sm_{chip}", head, "plain", "plain_forward", name, body, _THREADS / _PAIRS),
            # The last two leave the loop and go back.
            sum(one.startswith(_BRANCHES) for one in body[:-2]),
        )
        for name, body in zip(names, bodies)
    ]


def main(given: list[str] | None = None) -> int:
    """Print the counts; the exit code says whether any loop is at fault."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled cuda-rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--update", action="store_true", help=f"write the counts to {rates.BUDGETS.name}")
    options = parser.parse_args(given)
    found = [one for a in options.architecture for head in options.head for one in loops_of(a, head)]
    if options.update:
        rates.update({one.loop.key: {"nvcc": round(one.loop.instructions, 2)} for one in found})
    allowed, wrong = rates.budgets(), 0
    for one in found:
        faults = one.faults(allowed)
        wrong += bool(faults)
        budget = allowed.get(one.loop.key, {}).get("nvcc", "-")
        line = f"{one.loop.key:<58} {one.loop.instructions:6.2f} a pair (budget {budget})"
        print("; ".join([line, *faults]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
