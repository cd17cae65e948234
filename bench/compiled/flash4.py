"""flash-attn-4's kernels as the strategy ``merge_flash4`` calls them, compiled for Hopper and Blackwell without a GPU.

The calls are those of the strategy, so a release of the library whose functions changed fails here. For Hopper it also
prints the instructions that each loop of products issues for an element of the score tile, as `rates` does for our own.
"""

from __future__ import annotations

import argparse
import os
import re
import site
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock
from zlib import crc32

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from apt_kernels.impl.triton import tiles

from ..common import packages
from . import rates
from .aot_compile import Job, make_job_inputs

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements-flash4.txt"
ARCHITECTURES = ("sm_90", "sm_100")
HEADS = (64, 128)
# Matrix products of the kernels of a pass, each with as many multiply-adds for an element as the head has columns.
_PRODUCTS = {"flash_fwd": 2, "flash_bwd": 5}
_WARPGROUP = 128


class Counted(NamedTuple):
    """Instructions for an element: the forward's whole and masked tiles, the whole deterministic backward."""

    whole: float
    masked: float
    backward: float


# What this command printed, by architecture and head size; the versions are in bench/NOTES.md.
COUNTED = {("sm_90", 64): Counted(6.81, 8.39, 11.17), ("sm_90", 128): Counted(7.45, 8.92, 13.84)}


def compile_here(architecture: str, head: int) -> list[str]:
    """Compile forward and backward in this process, which has the library and its environment; what was compiled."""
    from apt_kernels.impl.triton.stock import flash4

    said, major = [], int(architecture.removeprefix("sm_")) // 10
    drawn = make_job_inputs(Job(architecture, 2, head, "causal"))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(flash4, "_major", return_value=major),
        # The deterministic backward makes its counters on the current device; torch may be a build without CUDA.
        mock.patch.object(torch, "zeros", torch.empty),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
    ):
        parts = {name: torch.empty_like(getattr(drawn, name), device="cuda") for name in ("query", "key", "value")}
        x = replace(drawn, **parts)
        obstacle = flash4.obstacle(x)
        if obstacle:
            raise SystemExit(obstacle)
        begin = time.perf_counter()
        out, logsumexp = flash4.forward(x)
        said.append(f"{architecture} D{head} forward: compiled in {time.perf_counter() - begin:.0f} s")
        begin = time.perf_counter()
        grads = flash4.backward(x, out, logsumexp, torch.empty_like(out), torch.empty_like(logsumexp))
        said.append(f"{architecture} D{head} backward: compiled in {time.perf_counter() - begin:.0f} s")
    shapes = [tuple(t.shape) for t in (out, logsumexp, *grads)]
    of_keys = tuple(x.key.shape)
    wanted = [tuple(x.query.shape), tuple(x.query.shape[:3]), tuple(x.query.shape), of_keys, of_keys]
    if shapes != wanted:
        raise SystemExit(f"flash-attn-4 returns the shapes {shapes}; {wanted} were expected")
    return said


def counts(folder: Path, head: int) -> list[str]:
    """Instructions for each element of the loops of products in the compiled files of a folder (Hopper alone)."""
    said = []
    for file in sorted(folder.glob("*sm_90a.cubin")):
        kernel = next((name for name in _PRODUCTS if f"{name}_sm90" in file.name), None)
        for body in rates.product_loops(file.read_bytes()) if kernel else ():
            shapes = [re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name) for name in body]
            multiplied = sum(int(m[1]) * int(m[2]) * int(m[3]) for m in shapes if m)
            elements = multiplied / (_PRODUCTS[kernel] * head)
            said.append(f"sm_90 D{head} {kernel}: {len(body) * _WARPGROUP / elements:.2f} instructions an element")
    return said


def compile_apart(architecture: str, head: int, library: Path) -> int:
    """Compile in a process of its own: the library reads the architecture from the environment."""
    with tempfile.TemporaryDirectory() as folder:
        number = architecture.removeprefix("sm_")
        environment = {
            "FLASH_ATTENTION_ARCH": architecture,
            "FLASH_ATTENTION_NUM_SMS": str(tiles.processors(architecture)),
            "CUTE_DSL_ARCH": f"sm_{number}a",
            "CUTE_DSL_KEEP": "cubin",
            "CUTE_DSL_DUMP_DIR": folder,
            "PYTHONWARNINGS": "ignore",
        }
        own = ["-m", "bench", "compiled", "flash4", "--architecture", architecture, "--head", str(head)]
        command = [sys.executable, *own, "--library", str(library)]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{architecture} D{head}: {done.stdout}{done.stderr}", file=sys.stderr)
            return 1
        print(done.stdout, end="")
        for line in counts(Path(folder), head):
            print(line)
    return 0


def main(given: list[str] | None = None) -> int:
    """Compile what is asked for and print it; the exit status is 1 if the library refuses or cannot be compiled."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled flash4", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--head", nargs="+", type=int, choices=HEADS, default=list(HEADS))
    parser.add_argument("--library", type=Path, help="the folder with flash-attn-4: compile in this process")
    options = parser.parse_args(given)
    if options.library:
        site.addsitedir(str(options.library))
        print("\n".join(compile_here(options.architecture[0], options.head[0])))
        return 0
    library = packages.installed(f"flash4-{crc32(REQUIREMENTS.read_bytes())}", "-r", str(REQUIREMENTS))
    jobs = [(architecture, head) for architecture in options.architecture for head in options.head]
    return max(compile_apart(*job, library) for job in jobs)


if __name__ == "__main__":
    sys.exit(main())
