"""Instructions that the CUDA library's straight loops issue for each (query, key) pair, in compiled code.

    python -m bench compiled cuda-rates [--architecture 7.5] [--head 64] [--kernel plain_forward]

Each loop takes one tile of columns in one iteration; every instruction counts once for each thread. The budgets are in
`budgets.json` under "nvcc". A loop is at fault that issues more, touches the stack, has a branch inside, or more than
two barriers of the block.
``make report`` runs this for 7.5, 8.0, 8.6 and 9.0.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import rates
from .csrc import build

ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0")
HEADS = (64, 128)
# Each kernel's instance. The one of dq has two tiles in memory where copies are asynchronous, else one.
KERNELS = {
    "plain_forward": "plain_forward<half_t, {head}>",
    "plain_query_gradient": "plain_query_gradient<half_t, {head}, {stages}>",
    "plain_key_gradient": "plain_key_gradient<half_t, {head}, false>",
    "plain_key_gradient (prefix)": "plain_key_gradient<half_t, {head}, true>",
}
ROWS, _THREADS = 64, 128  # rows of a tile, and the threads of a block: `Cut` in ``csrc/tile.cuh``, float16
_ROW_GATES, _QUERY_GATES, _EDGE, _TOKENS = "prefix, gate per row", "prefix, gate per query", "tokens, edge", "tokens"
_BARRIERS = 2
_BRANCHES = ("BRA", "BRX", "BSSY", "CALL", "JMP")


@dataclass(frozen=True)
class Counted:
    """A loop, and how many branches before its end, barriers of the block, and loads ahead of its products it has."""

    loop: rates.Loop
    branches: int
    barriers: int
    ahead: int

    def faults(self, allowed: dict[str, dict[str, float]]) -> list[str]:
        """What is wrong with it, by the budgets; empty: nothing."""
        found = rates.faults(self.loop, allowed, "nvcc")
        # In these loops some threads compute a gate, or find where a query's gates are.
        own = self.loop.loop == _ROW_GATES or (self.loop.loop == _QUERY_GATES and "key" in self.loop.kernel)
        if self.branches and not own:
            found.append(f"has {self.branches} branches inside; a straight loop has none")
        if self.barriers > _BARRIERS:
            found.append(f"has {self.barriers} barriers of the block; a tile needs at most {_BARRIERS}")
        return found


def columns(kernel: str, head: int) -> int:
    """Columns of a tile: `Cut` in ``csrc/tile.cuh``."""
    return 32 if kernel != "plain_forward" and head == 128 else 64


def _loops(kernel: str, chip: int, head: int) -> list[str]:
    """The loops in the order of the code; empty: the kernel is not launched there (`is_plain`, ``csrc/dispatch.h``)."""
    if kernel == "plain_key_gradient":
        return [_EDGE, _TOKENS] if chip >= 80 else []
    if kernel == "plain_key_gradient (prefix)":
        return [_ROW_GATES, _QUERY_GATES] if chip >= 80 and head == 64 else []
    return [_ROW_GATES, *([_QUERY_GATES] if head == 64 or chip >= 80 else []), _EDGE, _TOKENS]


def loops_of(kernel: str, architecture: str, head: int, folder: Path = build.CSRC) -> list[Counted]:
    """The loops of one of `KERNELS` for float16; ``folder``: its sources.

    Raises:
        build.BuildError: there is no nvcc, or it cannot compile them.
    """
    chip = int(architecture.replace(".", ""))
    names = _loops(kernel, chip, head)
    if not names:
        return []
    instance = KERNELS[kernel].format(head=head, stages=2 if chip >= 80 else 1)
    with tempfile.TemporaryDirectory() as name:
        source, cubin = Path(name) / "one.cu", Path(name) / "one.cubin"
        source.write_text(
            '#include "sums.cuh"\n#include "plain.cuh"\n#include "plain_key_gradients.cuh"\n'
            f"namespace apt {{ auto* one = {instance}; }}\n"
        )
        options = ["-std=c++20", f"-I{folder}", "-O3", "-gencode", f"arch=compute_{chip},code=sm_{chip}", "-cubin"]
        done = subprocess.run(
            [build.find_nvcc(), *options, "-o", str(cubin), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise build.BuildError(f"{kernel} cannot be compiled: {done.stdout}{done.stderr}")
        bodies = rates.product_loops(cubin.read_bytes())
    if len(bodies) != len(names):
        raise RuntimeError(f"{kernel} has {len(bodies)} loops of products; {len(names)} were expected")
    threads = _THREADS / (ROWS * columns(kernel, head))
    return [
        Counted(
            rates.loop_of(f"sm_{chip}", head, "plain", kernel, name, body, threads),
            # The last two leave the loop and go back.
            sum(one.startswith(_BRANCHES) for one in body[:-2]),
            sum(one.startswith("BAR.SYNC") for one in body),
            sum(one.startswith("LDG.E.128") for one in itertools.takewhile(lambda one: one[:4] != "HMMA", body)),
        )
        for name, body in zip(names, bodies)
    ]


def main(given: list[str] | None = None) -> int:
    """Print the counts; the exit code says whether any loop is at fault."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled cuda-rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument(
        "--kernel", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="NAME", help=f"of {', '.join(KERNELS)}"
    )
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
        line = f"{one.loop.key:<72} {one.loop.instructions:6.2f} a pair (budget {budget})"
        print("; ".join([line, *faults]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
