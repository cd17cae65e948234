"""Compile every entry of the Triton dispatch table for its architectures, with no GPU, and check what comes out.

Prints registers, stack, shared memory, occupancy and the kind of matrix instruction of every kernel of every variant;
exits with 1 where one does not compile, spills in a default configuration, exceeds its architecture's shared memory,
or has no matrix instruction where it should. Usage: python -m bench.compile_report [--architecture sm_90] [--help]

What was compiled is kept under ``$APT_COMPILE_CACHE`` (default ``~/.cache/apt_kernels``), by the kernels' sources, the
tiles and the variant; the whole matrix takes hours on one core, a rerun seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from apt_kernels import Mask
from apt_kernels.impl.triton import table
from apt_kernels.op import make_inputs


@dataclass(frozen=True)
class Limits:
    """What a chip of an architecture has: bytes of shared memory for a block and for a multiprocessor, warps, lanes."""

    target: str | int
    block_shared: int
    chip_shared: int
    warps: int
    lanes: int = 32


_TARGETS = {
    "sm_80": [Limits(80, 166912, 167936, 64)],
    "sm_86": [Limits(86, 101376, 102400, 48), Limits(89, 101376, 102400, 48)],
    "sm_90": [Limits(90, 232448, 233472, 64)],
    "sm_100": [Limits(100, 232448, 233472, 64)],
    "sm_120": [Limits(120, 101376, 102400, 48)],
    "gfx90a": [Limits("gfx90a", 65536, 65536, 32, 64)],
    "gfx942": [Limits("gfx942", 65536, 65536, 32, 64)],
}
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# Kernels whose half-precision tensors are all loaded by rows, in vectors.
_HALVES = ("attention_forward", "query_gradient", "column_gradients", "split_attention")
_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Variant:
    """A way to call the op. ``default``: common enough that no kernel of it may spill."""

    gate: str = "row"
    queries: int = 256
    prefix: int = 32
    mask: str = "causal"
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    odd_head: bool = False
    tf32: bool = False
    default: bool = False


VARIANTS = {
    "causal": Variant(default=True),
    "full": Variant(mask="none", default=True),
    "causal_gate_none": Variant(gate="none", default=True),
    "causal_gate_query": Variant(gate="query", default=True),
    "causal_indexed": Variant(gate="indexed"),
    "causal_indexed_query": Variant(gate="indexed_query"),
    "window": Variant(mask="window", default=True),
    "padding": Variant(mask="padding", default=True),
    "long_prefix": Variant(prefix=table.LONG_PREFIX, default=True),
    "decode": Variant(gate="query", queries=1, default=True),
    "decode_padding": Variant(queries=1, mask="padding", default=True),
    "segments": Variant(mask="segments"),
    "dense": Variant(mask="dense"),
    "bias": Variant(mask="bias"),
    "softcap": Variant(softcap=True),
    "sinks": Variant(sinks=True),
    "dropout": Variant(dropout=True),
    "odd_head": Variant(odd_head=True),
    "tf32": Variant(tf32=True),
}


@dataclass(frozen=True)
class Job:
    """One entry of the table, for one chip and one variant."""

    architecture: str
    limits: Limits
    width: int
    head: int
    variant: str


@dataclass(frozen=True)
class Result:
    """What one kernel compiled to, and what is wrong with it."""

    job: Job
    kernel: str
    tile: str
    registers: int
    stack: int
    shared: int
    occupancy: int
    instruction: str
    faults: tuple[str, ...]

    def __str__(self) -> str:
        job = self.job
        return (
            f"{job.limits.target!s:>7} {job.width * 8:>2}-bit D{job.head:<3} {job.variant:<20} {self.kernel:<20} "
            f"{self.tile:<14} {self.registers:>3} registers {self.stack:>5} stack {self.shared / 1024:>6.1f} KiB "
            f"{self.occupancy:>2} blocks  {self.instruction:<15} {'; '.join(self.faults)}"
        )


def jobs(architectures, widths, heads, variants) -> list[Job]:
    """The entries of the table, times chips and variants."""
    found = []
    for architecture, width, head, name in itertools.product(architectures, widths, heads, variants):
        if VARIANTS[name].tf32 and width != 4:
            continue
        found += [Job(architecture, limits, width, head, name) for limits in _TARGETS[architecture]]
    return found


def make_job_inputs(job: Job, batch: int = 2, queries: int | None = None, keys: int = 256, prefix: int | None = None):
    """The op's inputs for a job, on the CPU: only shapes, dtypes and strides matter."""
    variant, dtype, heads, kv_heads = VARIANTS[job.variant], DTYPES[job.width], 4, 2
    queries, prefix = queries or variant.queries, prefix or variant.prefix
    dim = job.head * 3 // 4 if variant.odd_head else job.head

    def zeros(*shape, of=dtype):
        return torch.zeros(shape, dtype=of)

    gates = {"none": None, "row": (batch, prefix), "query": (batch, queries, prefix)}
    gate_shape = gates.get(variant.gate, (3, prefix))
    index_shape = {"indexed": (batch,), "indexed_query": (batch, queries)}.get(variant.gate)
    side = dtype if job.width == 8 else torch.float32
    segments = variant.mask == "segments"
    mask = Mask(
        causal=variant.mask != "none",
        window=(64, None) if variant.mask == "window" else None,
        key_padding=zeros(batch, keys, of=torch.bool) if variant.mask == "padding" else None,
        query_segments=zeros(batch, queries, of=torch.int32) if segments else None,
        key_segments=zeros(batch, keys, of=torch.int32) if segments else None,
        dense=zeros(batch, 1, queries, keys, of=torch.bool) if variant.mask == "dense" else None,
        bias=zeros(1, heads, queries, keys, of=side) if variant.mask == "bias" else None,
    )
    return make_inputs(
        zeros(batch, queries, heads, dim).transpose(1, 2),
        *(zeros(batch, keys, kv_heads, dim).transpose(1, 2) for _ in range(2)),
        *(zeros(kv_heads, prefix, dim, of=side) for _ in range(2)),
        None if gate_shape is None else zeros(*gate_shape, of=side),
        zeros(1, of=side),
        mask=mask,
        gate_index=None if index_shape is None else zeros(*index_shape, of=torch.int64),
        softcap=30.0 if variant.softcap else None,
        sinks=zeros(heads, of=side) if variant.sinks else None,
        dropout_p=0.1 if variant.dropout else 0.0,
        seed=zeros(1, of=torch.int64) if variant.dropout else None,
    )


class _Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def run_launchers(job: Job, execute: Callable, wanted: Collection[str] | None = None, **sizes: int) -> None:
    """Run the op's launchers, forward and backward, as on the job's chip, with ``execute`` in place of the launch.

    ``wanted``: the inputs whose gradients are asked for; None: all.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from apt_kernels.impl.inputs import DIFFERENTIABLE
    from apt_kernels.impl.triton import arguments, attend, gradients

    target = job.limits.target
    triton.runtime.driver.set_active(
        _Driver(GPUTarget("hip" if isinstance(target, str) else "cuda", target, job.limits.lanes))
    )
    torch.backends.cuda.matmul.fp32_precision = "tf32" if VARIANTS[job.variant].tf32 else "ieee"
    table.architecture = lambda device: job.architecture
    arguments.execute = execute
    x = make_job_inputs(job, **sizes)
    out, logsumexp = attend.forward(x)
    needs = [getattr(x, name) is not None and (wanted is None or name in wanted) for name in DIFFERENTIABLE]
    gradients.backward(x, out, logsumexp, torch.empty_like(out), None, needs)


def _cache_file(job: Job) -> Path:
    """Where a job's results are kept: a name made of all that they depend on."""
    import triton

    sources = Path(table.__file__).parent.glob("*.py")
    texts = [path.read_text() for path in sorted(sources) if path.name != "table.py"] + [Path(__file__).read_text()]
    names = (*table.KERNELS, "finish", "merge")
    tiles = [table.tile(name, job.architecture, job.width, job.head) for name in names]
    key = hashlib.sha256(repr((texts, tiles, table.SCAN, triton.__version__, job)).encode()).hexdigest()
    folder = Path(os.environ.get("APT_COMPILE_CACHE") or Path.home() / ".cache" / "apt_kernels")
    return folder / "compiled" / key


def compile_cached(job: Job) -> list[Result]:
    """`compile_job`, or what it gave before."""
    file = _cache_file(job)
    if file.exists():
        return pickle.loads(file.read_bytes())
    results = compile_job(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")
    written.write_bytes(pickle.dumps(results))
    written.replace(file)
    return results


def compile_job(job: Job, only: str | None = None, wanted: Collection[str] | None = None) -> list[Result]:
    """Compile every kernel of a job, or the one named; for all gradients, or those ``wanted``."""
    results = []

    def compile_only(kernel, programs, *args, **named):
        if only not in (None, kernel.__name__):
            return
        kernel.device_caches.clear()  # its key does not hold the chip
        cut = f"{named.get('ROWS', 0)}x{named.get('COLUMNS', 0)} w{named['num_warps']} s{named['num_stages']}"
        try:
            compiled = kernel.warmup(*args, grid=(programs,), **named)
        except Exception as error:  # any failure of the compiler is a line of the report
            while error.__cause__:
                error = error.__cause__
            fault = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
            results.append(Result(job, kernel.__name__, cut, 0, 0, 0, 0, "", (fault,)))
        else:
            results.append(_inspect(job, kernel.__name__, cut, compiled))

    run_launchers(job, compile_only, wanted)
    return results


def _inspect(job: Job, kernel: str, cut: str, compiled) -> Result:
    warps, shared, limits = compiled.metadata.num_warps, compiled.metadata.shared, job.limits
    if "cubin" in compiled.asm:
        registers, stack = _cubin_usage(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
        by_registers = 65536 // (warps * limits.lanes * -(-max(registers, 1) // 8) * 8)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
        by_registers = 4 * (512 // (-(-max(registers, 1) // 8) * 8)) // warps
    occupancy = min(by_registers, limits.warps // warps, limits.chip_shared // max(shared + 1024, 1))
    instruction = next((name for name in _INSTRUCTIONS if name in text), "-")
    faults = []
    if shared > limits.block_shared:
        faults.append(f"shared memory is over the limit of {limits.block_shared // 1024} KiB")
    if stack and _is_default(job):
        faults.append("spills in a default configuration")
    wanted = _wanted_instruction(job, kernel)
    if wanted and instruction != wanted:
        faults.append(f"needs {wanted}")
    if job.width == 2 and kernel in _HALVES and _is_default(job) and "ld.global.b16" in text:
        faults.append("loads rows element by element")
    return Result(job, kernel, cut, registers, stack, shared, occupancy, instruction, tuple(faults))


def _is_default(job: Job) -> bool:
    """Whether no kernel of a job may spill. A gate tile by query beside a 256-wide head may."""
    variant = VARIANTS[job.variant]
    return variant.default and not (variant.gate == "query" and job.head == 256)


def _wanted_instruction(job: Job, kernel: str) -> str | None:
    """The matrix instruction that a kernel on half-precision tensors must use on its architecture."""
    chips = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx90a": "v_mfma", "gfx942": "v_mfma"}
    if job.width != 2 or kernel not in ("attention_forward", "query_gradient", "column_gradients"):
        return None
    if job.head == 256 and kernel != "attention_forward" and not job.architecture.startswith("gfx"):
        return None  # the gradients of so wide a head leave no registers for the tiles that those need
    return chips.get(job.architecture, "mma.sync")


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK"))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", nargs="+", choices=table.ARCHITECTURES, default=table.ARCHITECTURES)
    parser.add_argument("--width", nargs="+", type=int, choices=table.WIDTHS, default=table.WIDTHS)
    parser.add_argument("--head", nargs="+", type=int, choices=table.HEADS, default=table.HEADS)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=tuple(VARIANTS))
    parser.add_argument("--library", action="store_true", help="the CUDA library's kernels too (bench.cuda_report)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    """Print the report; the exit code says whether anything is wrong."""
    from tqdm import tqdm

    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: nothing would be compiled", file=sys.stderr)
        return 2
    options = _arguments()
    todo = jobs(options.architecture, options.width, options.head, options.variant)
    kernels = faults = 0
    with ProcessPoolExecutor(options.processes) as pool:
        for results in tqdm(pool.map(compile_cached, todo), total=len(todo), unit="entry", file=sys.stderr):
            for result in results:
                kernels += 1
                faults += bool(result.faults)
                tqdm.write(str(result), file=sys.stdout)
    print(f"{kernels} kernels, {faults} at fault")
    if options.library:
        from . import cuda_report

        faults += cuda_report.report()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
