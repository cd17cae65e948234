"""Compile report of the CUDA C++ kernels: registers, spills and shared memory on every architecture, without a GPU.

``python -m bench compiled library`` builds the library with nvcc for ``TORCH_CUDA_ARCH_LIST`` (or the default
list), prints a line for each kernel, and fails where one spills, or needs more shared memory than a chip has. Then it
counts the instructions of the straight loops (`cuda_rates`).
"""

from __future__ import annotations

import argparse
import itertools
import re
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cuda_rates
from .csrc import build

# KiB of shared memory that a block may have, by compute capability.
SHARED = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
_TYPES = {"f": ("float32", 6), "half_t": ("float16", 5), "bfloat_t": ("bfloat16", 15)}
_KERNELS = {
    "attention_forward": "forward",
    "plain_forward": "forward",
    "query_gradient": "query",
    "plain_query_gradient": "query",
    "key_gradient": "key_value",
}
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<chip>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# The template's arguments in a mangled name: the type, and, where there are any, the padded head size, whether the
# kernel is the prefix's or the gate's, and how many tiles are in shared memory at once.
_NAME = re.compile(
    r"\d+(?P<kernel>attention_forward|plain_forward|query_gradient|plain_query_gradient|key_gradient|plain_key_gradient"
    r"|summed_gradient|row_deltas|indexed_sum)I(?:NS_\d+)?(?P<type>f|half_t|bfloat_t)E?(?:Li(?P<width>\d+))?E?"
    r"(?:Lb(?P<flag>[01])E?)?(?:Li(?P<stages>[12]))?"
)


@dataclass(frozen=True)
class Result:
    """One kernel on one architecture; ``shared`` in bytes."""

    chip: int
    kernel: str
    dtype: str
    width: int
    registers: int
    stack: int
    shared: int

    @property
    def faults(self) -> list[str]:
        """Its faults; empty: none."""
        found = []
        if self.stack:
            found.append("spills")
        if self.shared > SHARED[self.chip] * 1024:
            found.append(f"shared memory is over the limit of {SHARED[self.chip]} KiB")
        return found

    def __str__(self) -> str:
        size = self.width or ""
        line = f"sm_{self.chip:<4} {self.dtype:<9} {size:>4}  {self.kernel:<26} {self.registers:>4} registers"
        return "; ".join([f"{line} {self.shared / 1024:6.1f} KiB shared", *self.faults])


def parse(said: str, shared) -> list[Result]:
    """The kernels in what ``ptxas -v`` said; ``shared(kernel, type, width)`` is the library's `tile`."""
    found = set()
    for entry in _ENTRY.finditer(said):
        name = _NAME.search(entry["name"])
        if name is None:
            raise ValueError(f"a kernel of no known name: {entry['name']}")
        (dtype, number), width = _TYPES[name["type"]], int(name["width"] or 0)
        chip = int(entry["chip"])
        if dtype == "bfloat16" and chip < 80:
            continue  # compiled empty, refused before a launch
        plain = name["kernel"].startswith("plain_")
        if (name["stages"] and int(name["stages"]) != 1 + (chip >= 80)) or (plain and width > 128):
            continue  # compiled empty, never launched
        if name["kernel"] == "plain_key_gradient" and (chip < 80 or (name["flag"] == "1" and width > 64)):
            continue  # the same
        kernel = name["kernel"] + {"1": " (prefix)", "0": " (tokens)", None: ""}[name["flag"]]
        used = 0
        if width:
            launched = "prefix" if kernel.endswith("(prefix)") else _KERNELS.get(name["kernel"], "key_value")
            _, _, general, *straight = shared(launched, number, width)
            used = straight[chip >= 80] if plain else general
        numbers = (int(entry[field]) for field in ("registers", "stack"))
        found.add(Result(chip, kernel, dtype, width, *numbers, used))
    return sorted(found, key=lambda r: (r.chip, r.dtype, r.width, r.kernel))


def compile_library(out: Path) -> list[Result]:
    """Build the library and report on it."""
    said = build.build_device(out, options=("-Xptxas", "-v"))
    torch.ops.load_library(out)
    operators = torch.ops.apt_kernels_cuda
    kernels = operators.fields().split(";")[3].split()
    return parse(said, lambda kernel, number, width: operators.tile(kernels.index(kernel), number, width))


def report() -> int:
    """Build the library and print a line for each kernel; the number of kernels at fault, one where there are none."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = compile_library(Path(folder) / build.LIBRARY.name)
    except build.BuildError as error:
        print(f"the CUDA kernels were NOT compiled: {error}", file=sys.stderr)
        return 1
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    for result in results:
        print(result)
    for chip, of_chip in itertools.groupby(results, key=lambda result: result.chip):
        most = max(result.shared for result in of_chip) / 1024
        print(f"sm_{chip}: at most {most:.1f} KiB of shared memory, of {SHARED[chip]}")
    faults = sum(bool(result.faults) for result in results)
    seconds = f"compiled in {time.monotonic() - started:.0f} s, {processor:.0f} s of processors"
    print(f"{len(results)} kernels, {faults} at fault; {seconds}")
    return faults if results else 1


def main(given: list[str] | None = None) -> int:
    """Print the report; the exit code says whether anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled library", description=__doc__.split("\n\n")[0])
    parser.add_argument("--if-there-is-a-compiler", action="store_true", help="no fault where nvcc is missing")
    options = parser.parse_args(given)
    try:
        build.find_nvcc()
    except build.BuildError as error:
        print(f"the CUDA kernels were NOT compiled: {error}", file=sys.stderr)
        return 0 if options.if_there_is_a_compiler else 1
    faults = report()
    return 1 if cuda_rates.main([]) or faults else 0
