"""Instructions that the Triton kernels issue for each element of a score tile, counted in their compiled code.

    python -m bench compiled rates [--architecture sm_90] [--head 128] [--variant causal] [--triton 3.6.0] [--update]

An element is one (query, key) pair of the tile that a loop of matrix products takes at a time. Every instruction of the
loop counts once for each thread. The budgets are in `budgets.json`: a loop that issues more, or touches the stack
more often, is at fault; ``--update`` writes what was counted as the new budgets.
``--triton`` counts with another release, which pip installs once into the user's cache, outside the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..common import packages
from .aot_compile import CHIPS, VARIANTS, Job, run_launchers

BUDGETS = Path(__file__).with_name("budgets.json")
# What is counted by default, and what `make test` holds: architecture, head size and variant.
SUBSET = (
    ("sm_90", 64, "causal"),
    ("sm_90", 128, "causal"),
    ("sm_90", 64, "causal_gate_query"),
    ("sm_90", 128, "causal_gate_query"),
    ("sm_80", 128, "causal"),
    ("sm_100", 128, "causal"),
    ("sm_90", 128, "mixed"),
)
# Sizes that leave whole tiles, edges and several tiles of the prefix to every kernel.
_SIZES = {"queries": 4096, "keys": 4096, "prefix": 64}
# A count may exceed its budget by this much: another build of the assembler moves a few instructions.
_SLACK = 1.02
_PRODUCTS = re.compile(r"^(HGMMA|HMMA|UTCHMMA|UTCQMMA|DMMA|v_mfma|v_wmma)")
_STACK = re.compile(r"^(LDL|STL|scratch_load|scratch_store)")
_LOADS = re.compile(r"^(LDG\.|LD\.|global_load|flat_load|buffer_load)")
_EXPONENTIALS = re.compile(r"^(MUFU\.EX2|v_exp_f32)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")


@dataclass(frozen=True)
class Loop:
    """One loop of matrix products: its place in a kernel, and what one iteration issues for each element.

    ``exponentials``: about 1 wherever the tile is the one that the loop takes, 2 with a gate for each query.
    """

    architecture: str
    head: int
    variant: str
    kernel: str
    loop: str
    instructions: float
    exponentials: float
    stack: int
    loads: int

    @property
    def key(self) -> str:
        """How `budgets.json` names it."""
        return f"{self.architecture} D{self.head} {self.variant} {self.kernel} {self.loop}"


def _nvidia(cubin: bytes) -> tuple[list[tuple[str, str]], dict[str, int]]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return _parsed(text.splitlines(), r"^(\.L_[\w.]+):", _INSTRUCTION)


def _amd(text: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    body = text.partition(".text")[2].partition(".section")[0].splitlines()
    return _parsed(body, r"^(\.LBB[\w]+):", re.compile(r"^\s+([a-z][a-z0-9_]+)\s*([^;]*)"))


def _parsed(lines: Iterable[str], label: str, instruction: re.Pattern) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Instructions with their operands, in order, and the index of the first one after every label."""
    found, labels = [], {}
    for line in lines:
        if named := re.match(label, line):
            labels[named[1]] = len(found)
        elif match := instruction.search(line):
            found.append((match[1], match[2]))
    return found, labels


def _loops(found: list[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """The innermost loops with matrix products, in the order of the code."""
    edges = []
    for i, (name, rest) in enumerate(found):
        if name.startswith(("BRA", "s_cbranch", "s_branch")):
            target = re.search(r"`?\(?(\.L[\w.]+)\)?", rest)
            if target and labels.get(target[1], i + 1) <= i:
                edges.append((labels[target[1]], i))
    inner = [e for e in edges if not any(o != e and o[0] >= e[0] and o[1] <= e[1] for o in edges)]
    bodies = [[name for name, _ in found[first : last + 1]] for first, last in sorted(inner)]
    return [body for body in bodies if any(_PRODUCTS.match(name) for name in body)]


def product_loops(cubin: bytes) -> list[list[str]]:
    """The names of the instructions of each innermost loop with matrix products, in NVIDIA's code."""
    return _loops(*_nvidia(cubin))


def places(kernel: str, named: dict) -> list[tuple[str, int]]:
    """The loops of products of a kernel in the order of its code, with the elements of the tile of each."""
    constants = named["C"]
    if kernel in ("attention_forward", "query_gradient"):
        tile, prefix = named["ROWS"] * named["COLUMNS"], named["ROWS"] * named["PREFIX"]
        window = [("window", tile)] if constants.LEFT else []
        return [("prefix", prefix), ("prefix, checked", prefix), *window, ("tokens", tile), ("tokens, checked", tile)]
    roles, gate_rows, found = named["ROLES"], named["GATES"], []
    if kernel == "column_gradients":
        tile = named["ROWS"] * named["COLUMNS"]
        passes = (roles.KEY + roles.VALUE) if roles.APART else min(1, roles.KEY + roles.VALUE)
        found += [("tokens, checked", tile), ("tokens", tile)] * passes
    if roles.PREFIXES:
        found.append(("prefix", named["PREFIX_ROWS"] * named["PREFIX"]))
    if roles.GATES:
        found.append(("gate", gate_rows[0] * gate_rows[1]))
    return found


def _counted(job: Job, kernel: str, compiled, named: dict) -> Iterator[Loop]:
    amd = "amdgcn" in compiled.asm
    bodies = _loops(*(_amd(compiled.asm["amdgcn"]) if amd else _nvidia(compiled.asm["cubin"])))
    expected = places(kernel, named)
    if len(bodies) != len(expected):
        raise RuntimeError(f"{kernel} of {job} has {len(bodies)} loops of products; {len(expected)} were expected")
    threads = compiled.metadata.num_warps * CHIPS[job.architecture][0].lanes
    for (place, elements), body in zip(expected, bodies):
        yield loop_of(job.architecture, job.head, job.variant, kernel, place, body, threads / elements)


def loop_of(
    architecture: str, head: int, variant: str, kernel: str, place: str, body: list[str], threads: float
) -> Loop:
    """A loop by the names of its instructions; ``threads``: those that execute it, for each element of a tile."""

    def count(pattern: re.Pattern) -> int:
        return sum(bool(pattern.match(name)) for name in body)

    return Loop(
        architecture, head, variant, kernel, place, len(body) * threads, count(_EXPONENTIALS) * threads,
        count(_STACK), count(_LOADS),
    )  # fmt: skip


def loops(architecture: str, head: int, variant: str) -> list[Loop]:
    """Every loop of products of the kernels that a call launches, forward and backward, in half precision."""
    job, found, seen = Job(architecture, 2, head, variant), [], set()

    def execute(kernel, programs, *arguments, **named):
        name = kernel.__name__
        if name in seen or "C" not in named or name not in _KERNELS:
            return
        seen.add(name)
        kernel.device_caches.clear()  # its key does not hold the chip
        found.extend(_counted(job, name, kernel.warmup(*arguments, grid=(programs,), **named), named))

    run_launchers(job, execute, **_SIZES)
    return found


_KERNELS = ("attention_forward", "query_gradient", "column_gradients", "prefix_column_gradients")


def version() -> str:
    """Triton's version as the budgets name it."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def budgets() -> dict[str, dict[str, float]]:
    """Instructions for each element, by `Loop.key` and Triton's version."""
    return json.loads(BUDGETS.read_text(encoding="utf-8"))


def update(changes: dict[str, dict[str, float]]) -> None:
    """Write new budgets beside those that stand."""
    allowed = budgets()
    for key, change in changes.items():
        allowed[key] = {**allowed.get(key, {}), **change}
    BUDGETS.write_text(json.dumps(dict(sorted(allowed.items())), indent=1) + "\n", encoding="utf-8")


def faults(loop: Loop, allowed: dict[str, dict[str, float]], triton: str) -> list[str]:
    """What is wrong with a loop; a version or a loop without a budget is held to nothing but the stack."""
    found, most = [], allowed.get(loop.key, {}).get(triton)
    if most is not None and loop.instructions > most * _SLACK:
        found.append(f"issues {loop.instructions:.2f} instructions an element; the budget is {most:.2f}")
    if most is not None and loop.stack > allowed[loop.key].get("stack", 0):
        found.append(f"touches the stack {loop.stack} times an iteration")
    return found


def with_triton(release: str, arguments: list[str]) -> int:
    """Count with another release of Triton, in a process of its own; it is installed into the user's cache."""
    folder = packages.installed(f"triton-{release}", f"triton=={release}")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench", "compiled", "rates", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def main(given: list[str] | None = None) -> int:
    """Print the counts; the exit code says whether any budget is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled rates", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=list(CHIPS), metavar="CHIP", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--head", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=["causal"], metavar="NAME")
    parser.add_argument("--update", action="store_true", help=f"write the counts to {BUDGETS.name}")
    parser.add_argument("--triton", metavar="RELEASE", help="count with this release, installed into the user's cache")
    given = sys.argv[1:] if given is None else given
    options = parser.parse_args(given)
    if options.triton:
        at = given.index("--triton")
        return with_triton(options.triton, [*given[:at], *given[at + 2 :]])
    wanted = SUBSET
    if options.architecture:
        wanted = [(a, h, v) for a in options.architecture for h in options.head for v in options.variant]
    allowed, triton, wrong, counted = budgets(), version(), 0, {}
    for one in wanted:
        for loop in loops(*one):
            found = [] if options.update else faults(loop, allowed, triton)
            wrong += bool(found)
            budget = allowed.get(loop.key, {}).get(triton)
            print(
                f"{loop.key:<62} {loop.instructions:6.2f} an element (budget {budget or '-'}), {loop.stack} stack, "
                f"{loop.loads} loads {'; '.join(found)}"
            )
            counted[loop.key] = {triton: round(loop.instructions, 2)}
            if loop.stack:
                counted[loop.key]["stack"] = max(loop.stack, allowed.get(loop.key, {}).get("stack", 0))
    if options.update:
        update(counted)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
