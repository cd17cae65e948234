"""Compile every tile of the Triton kernels for its chips, with no GPU, and check the result.

    python -m bench compiled                                      every tile; hours on one core, seconds when cached
    python -m bench compiled --architecture sm_90 --head 128      one chip and one head size
    python -m bench compiled --write                              also write the table to bench/results/compile/
    python -m bench compiled library                              the CUDA library's kernels, with nvcc
    python -m bench compiled launches                             launches, arithmetic and bytes of a layer
    python -m bench compiled overhead                             host time of a launch
    python -m bench compiled predict                              times that a model predicts from counted instructions
    python -m bench compiled tune                                 search for better tiles

Prints registers, stack, shared memory, occupancy and the kind of matrix instruction of every kernel in every variant.
The exit status is 1 if a kernel does not compile, spills in a default configuration, exceeds its chip's shared memory,
or lacks a matrix instruction. Results are cached (see `bench.compiled.aot_compile`), and the code most likely to fail
is compiled first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_kernels.impl.triton import tiles
from bench.common.machine import RESULTS, commit

from .aot_compile import VARIANTS, Chip, Facts, Job, Unit, cached, compile_cached, jobs, units

# Kernels whose half-precision tensors are all loaded by rows, in vectors.
_HALVES = ("attention_forward", "query_gradient", "column_gradients", "split_attention")
_MULTIPLYING = ("attention_forward", "query_gradient", "column_gradients")
_KINDS = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx90a": "v_mfma", "gfx942": "v_mfma"}


# Bytes of stack that default configurations may have, by architecture, bytes of an element, head size and kernel: at
# the limit of 255 registers, around the loops of products. What those loops touch themselves is held by budgets.json.
_STACK = {
    ("sm_90", 2, 128, "column_gradients"): 64,
    ("sm_90", 2, 128, "prefix_column_gradients"): 1024,
    ("sm_90", 2, 64, "prefix_column_gradients"): 64,
    ("sm_80", 2, 128, "column_gradients"): 64,
    ("sm_100", 2, 128, "column_gradients"): 64,
}


@dataclass(frozen=True)
class Result:
    """A unit on one chip, for one head size of the table, and its faults."""

    unit: Unit
    chip: Chip
    job: Job
    facts: Facts
    faults: tuple[str, ...]

    def __str__(self) -> str:
        job, facts = self.job, self.facts
        return (
            f"{self.chip.target!s:>7} {job.width * 8:>2}-bit D{job.head:<3} {job.variant:<20} {self.unit.kernel:<20} "
            f"{self.unit.tile:<14} {facts.registers:>3} registers {facts.stack:>5} stack {facts.shared / 1024:>6.1f} "
            f"KiB {facts.blocks(self.chip):>2} blocks  {facts.instruction:<15} {'; '.join(self.faults)}"
        )


def _faults(job: Job, kernel: str, chip: Chip, facts: Facts) -> list[str]:
    if facts.error:
        return [facts.error]
    found, default = [], job.default
    if facts.shared > chip.block_shared:
        found.append(f"shared memory is over the limit of {chip.block_shared // 1024} KiB")
    if facts.stack > _STACK.get((job.architecture, job.width, job.head, kernel), 0) and default:
        found.append("spills in a default configuration")
    wanted = _KINDS.get(job.architecture, "mma.sync")
    # Of the gradients of columns, `merge` runs the prefix's alone, the tiles of which are too small for the others.
    multiplying = kernel in _MULTIPLYING and not (VARIANTS[job.variant].merge and kernel == "column_gradients")
    if job.width == 2 and multiplying and facts.instruction != wanted:
        found.append(f"needs {wanted}")
    if job.width == 2 and kernel in _HALVES and default and facts.narrow:
        found.append("loads rows element by element")
    return found


def results_of(unit: Unit, facts: dict[int | str, Facts]) -> list[Result]:
    """What a unit is on every chip, for every head size: one result for all variants that agree in their faults."""
    found = {}
    for job in unit.jobs:
        for chip in job.chips:
            faults = tuple(_faults(job, unit.kernel, chip, facts[chip.target]))
            place = (chip.target, job.width, job.head)
            if place not in found or len(faults) > len(found[place].faults):
                found[place] = Result(unit, chip, job, facts[chip.target], faults)
    return list(found.values())


def _risk(unit: Unit) -> tuple:
    """Most at risk first: default configurations, half precision, variants as they are listed, wide heads."""
    job = unit.jobs[0]
    default = any(job.default for job in unit.jobs)
    return not default, job.width, list(VARIANTS).index(job.variant), -job.head


def summary(found: list[Unit], facts: dict[str, dict]) -> str:
    """A line for every chip, element, head size and kernel: the worst over its variants, and how many were compiled."""
    from bench.common.markdown import markdown

    rows, all_of = {}, {}
    for unit in found:
        for job in unit.jobs:
            for chip in job.chips:
                place = (str(chip.target), job.width * 8, job.head, unit.kernel)
                all_of.setdefault(place, set()).add(unit.key)
        for result in results_of(unit, facts[unit.key]) if unit.key in facts else ():
            place = (str(result.chip.target), result.job.width * 8, result.job.head, unit.kernel)
            rows.setdefault(place, []).append(result)
    heading = ("chip", "bits", "head", "kernel", "tile", "registers", "stack", "shared KiB", "blocks", "instruction",
               "compiled", "notes")  # fmt: skip
    lines = []
    for place in sorted(rows, key=lambda place: (not place[0].isdigit(), len(place[0]), place)):
        results = rows[place]
        spilling = [result.facts.stack for result in results if not result.job.default]
        notes = dict.fromkeys(fault for result in results for fault in result.faults)
        if any(spilling):
            where = "float64" if place[1] == "64" else "rare variants"
            notes[f"up to {max(spilling)} bytes in {where}"] = None
        lines.append((
            *map(str, place),
            ", ".join(dict.fromkeys(result.unit.tile for result in results)),
            *(str(max(getattr(result.facts, name) for result in results)) for name in ("registers", "stack")),
            f"{max(result.facts.shared for result in results) / 1024:.1f}",
            str(min(result.facts.blocks(result.chip) for result in results)),
            ", ".join(sorted({result.facts.instruction for result in results})),
            f"{len(results)} of {len(all_of[place])}",
            "; ".join(notes),
        ))  # fmt: skip
    return markdown(heading, lines)


def write(found: list[Unit], facts: dict[str, dict], folder: Path) -> Path:
    """Leave the summary as a file, under the version of Triton."""
    import triton

    taken = commit()
    faults = sum(bool(r.faults) for unit in found if unit.key in facts for r in results_of(unit, facts[unit.key]))
    compiled = sum(unit.key in facts for unit in found)
    text = f"""# The Triton kernels, compiled ahead of time

Generated: `python -m bench compiled --write`. Triton {triton.__version__}, commit {taken["id"]}\
{" and changes" if taken["dirty"] else ""}. {compiled} of {len(found)} distinct pieces of code compiled, {faults} \
results at fault. Registers, stack (bytes) and shared memory are the largest over the variants, blocks (a \
multiprocessor's) the fewest; code that is not listed has not been compiled yet. 8.9 is assembled from the PTX of \
8.6: Triton writes the same for both.

{summary(found, facts)}
"""
    file = folder / f"triton-{triton.__version__}.md"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def _compiled(found: Iterable[Unit], processes: int, only_cached: bool):
    from tqdm import tqdm

    found = sorted(found, key=_risk)
    if only_cached:
        yield from ((unit, facts) for unit in found if (facts := cached(unit)))
        return
    # Spawned: a forked child would wait for OpenMP threads that only its parent has. Compiling needs one.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, torch.set_num_threads, (1,)) as pool:
        yield from tqdm(zip(found, pool.map(compile_cached, found)), total=len(found), unit="kernel", file=sys.stderr)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices, said, kind in (
        ("architecture", tiles.ARCHITECTURES, "chips", str),
        ("width", tiles.WIDTHS, "bytes of an element", int),
        ("head", tiles.HEADS, "head sizes", int),
        ("variant", tuple(VARIANTS), "variants of a call", str),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", type=kind, choices=choices, default=choices, metavar=name.upper(),
            help=f"{said} (default: all): {', '.join(map(str, choices))}",
        )  # fmt: skip
    parser.add_argument("--library", action="store_true", help="the CUDA library's kernels too")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="compile in this many processes")
    parser.add_argument("--cached", action="store_true", help="report what is cached and compile nothing")
    parser.add_argument("--write", action="store_true", help="write the table to bench/results/compile/")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the report; the exit code says whether anything is wrong."""
    from tqdm import tqdm

    options = _arguments(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: nothing would be compiled", file=sys.stderr)
        return 2
    found = units(jobs(options.architecture, options.width, options.head, options.variant))
    facts, faults = {}, 0
    for unit, known in _compiled(found, options.processes, options.cached):
        facts[unit.key] = known
        for result in results_of(unit, known):
            faults += bool(result.faults)
            tqdm.write(str(result), file=sys.stdout)
    print(f"{len(facts)} of {len(found)} pieces of code compiled, {faults} results at fault")
    if options.write:
        print(write(found, facts, RESULTS / "compile"))
    if options.library:
        from bench.compiled import cuda_report

        faults += cuda_report.report()
    return 1 if faults or len(facts) < len(found) else 0
