"""Ahead-of-time compilation of the Triton kernels for every chip and variant, without a GPU, and its results.

A `Unit` is a piece of distinct code: a kernel with its tile and its compile-time arguments. Many variants share one
(the gradients of keys do not depend on sinks), so units are found first, by running the launchers without launching,
and each is compiled once. The results are cached under ``$APT_COMPILE_CACHE`` (default ``~/.cache/apt_kernels``),
keyed by the source of the kernel and of all functions that it calls.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as memoise
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from apt_kernels import Mask
from apt_kernels.impl.triton import tiles
from apt_kernels.ops.validation import make_inputs


@dataclass(frozen=True)
class Chip:
    """The limits of a chip: bytes of shared memory for a block and for a multiprocessor, warps, lanes of a warp.

    ``like``: the chip for which Triton writes the same PTX, which is then only assembled for this one.
    """

    target: int | str
    block_shared: int
    chip_shared: int
    warps: int
    lanes: int = 32
    like: int | str | None = None

    @property
    def lowered(self) -> int | str:
        """The chip that Triton compiles for."""
        return self.like or self.target


CHIPS = {
    "sm_80": [Chip(80, 166912, 167936, 64)],
    "sm_86": [Chip(86, 101376, 102400, 48), Chip(89, 101376, 102400, 48, like=86)],
    "sm_90": [Chip(90, 232448, 233472, 64)],
    "sm_100": [Chip(100, 232448, 233472, 64)],
    "sm_120": [Chip(120, 101376, 102400, 48)],
    "gfx90a": [Chip("gfx90a", 65536, 65536, 32, 64)],
    "gfx942": [Chip("gfx942", 65536, 65536, 32, 64)],
}
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# Increased when `Facts`, or the way they are determined, change.
_FORM_OF_CACHE = 1
INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Variant:
    """A variant of a call of the op. ``default``: common enough that no kernel of it may spill (see `Job.default`).

    ``merge``: the tokens go to a stock kernel, which takes half precision and heads of up to 128 columns (256 on 9.0),
    and is ahead of Triton's on the chips of data centres since Hopper.
    ``adapters``: their number, with a prefix for each row.
    ``odd_head``: not a power of two. ``unaligned``: not a multiple of 8 either, so that rows load element by element.
    """

    gate: str = "row"
    queries: int = 256
    prefix: int = 32
    mask: str = "causal"
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    odd_head: bool = False
    unaligned: bool = False
    tf32: bool = False
    merge: bool = False
    adapters: int = 0
    default: bool = False


VARIANTS = {
    "causal": Variant(default=True),
    "window": Variant(mask="window", default=True),
    "causal_gate_query": Variant(gate="query", default=True),
    "full": Variant(mask="none", default=True),
    "padding": Variant(mask="padding", default=True),
    "long_prefix": Variant(prefix=tiles.LONG_PREFIX, default=True),
    "causal_gate_none": Variant(gate="none", default=True),
    "decode": Variant(gate="query", queries=1, default=True),
    "decode_padding": Variant(queries=1, mask="padding", default=True),
    "merge": Variant(merge=True, default=True),
    "merge_gate_query": Variant(gate="query", merge=True, default=True),
    "mixed": Variant(adapters=3, default=True),
    "mixed_gate_query": Variant(gate="query", adapters=3, default=True),
    "mixed_decode": Variant(gate="query", queries=1, adapters=3, default=True),
    "mixed_merge": Variant(merge=True, adapters=3, default=True),
    "bias": Variant(mask="bias"),
    "dropout": Variant(dropout=True),
    "segments": Variant(mask="segments"),
    "softcap": Variant(softcap=True),
    "odd_head": Variant(odd_head=True),
    "unaligned": Variant(unaligned=True),
    "dense": Variant(mask="dense"),
    "causal_indexed_query": Variant(gate="indexed_query"),
    "causal_indexed": Variant(gate="indexed"),
    "sinks": Variant(sinks=True),
    "tf32": Variant(tf32=True),
}


@dataclass(frozen=True)
class Job:
    """One entry of the table and one variant."""

    architecture: str
    width: int
    head: int
    variant: str

    @property
    def chips(self) -> list[Chip]:
        """The chips that the entry serves."""
        return CHIPS[self.architecture]

    @property
    def default(self) -> bool:
        """Whether it is so common that no kernel of it may spill; float64 only checks derivatives."""
        return VARIANTS[self.variant].default and self.width < 8


@dataclass
class Unit:
    """Distinct code: a kernel, what it is compiled with, and the jobs that meet it (the first one compiles it)."""

    kernel: str
    key: str
    tile: str
    jobs: list[Job] = field(default_factory=list)

    @property
    def chips(self) -> list[Chip]:
        """The chips of all its jobs."""
        return list(dict.fromkeys(chip for job in self.jobs for chip in job.chips))


@dataclass(frozen=True)
class Facts:
    """What a kernel compiled to on one chip. ``narrow``: it loads half-precision elements one by one."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 1
    instruction: str = "-"
    narrow: bool = False
    error: str = ""

    def blocks(self, chip: Chip) -> int:
        """Thread blocks that a multiprocessor holds at a time."""
        if isinstance(chip.target, str):
            by_registers = 4 * (512 // (-(-max(self.registers, 1) // 8) * 8)) // self.warps
        else:
            by_registers = 65536 // (self.warps * chip.lanes * -(-max(self.registers, 1) // 8) * 8)
        return min(by_registers, chip.warps // self.warps, chip.chip_shared // max(self.shared + 1024, 1))


def jobs(architectures, widths, heads, variants) -> list[Job]:
    """The entries of the table, times variants."""
    found = [Job(*parts) for parts in itertools.product(architectures, widths, heads, variants)]
    return [job for job in found if _exists(job)]


def _exists(job: Job) -> bool:
    variant = VARIANTS[job.variant]
    if variant.merge:
        return job.width == 2 and (job.architecture == "sm_90" or (job.architecture == "sm_100" and job.head <= 128))
    return job.width == 4 or not variant.tf32


def make_job_inputs(job: Job, batch: int = 2, queries: int | None = None, keys: int = 256, prefix: int | None = None):
    """The op's inputs for a job, on the CPU: only shapes, dtypes and strides matter."""
    variant, dtype, heads, kv_heads = VARIANTS[job.variant], DTYPES[job.width], 4, 2
    queries, prefix = queries or variant.queries, prefix or variant.prefix
    dim = job.head * 3 // 4 if variant.odd_head else job.head - 3 * variant.unaligned

    def zeros(*shape, of=dtype):
        return torch.zeros(shape, dtype=of)

    gates = {"none": None, "row": (batch, prefix), "query": (batch, queries, prefix)}
    gate_shape = gates.get(variant.gate, (3, prefix))
    index_shape = {"indexed": (batch,), "indexed_query": (batch, queries)}.get(variant.gate)
    side = dtype if job.width == 8 else torch.float32
    segments, lead = variant.mask == "segments", (variant.adapters,) if variant.adapters else ()
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
        *(zeros(*lead, kv_heads, prefix, dim, of=side) for _ in range(2)),
        None if gate_shape is None else zeros(*gate_shape, of=side),
        zeros(variant.adapters or 1, of=side),
        mask=mask,
        prefix_index=zeros(batch, of=torch.int64) if lead else None,
        gate_index=None if index_shape is None else zeros(*index_shape, of=torch.int64),
        softcap=30.0 if variant.softcap else None,
        sinks=zeros(heads, of=side) if variant.sinks else None,
        dropout_p=0.1 if variant.dropout else 0.0,
        seed=zeros(1, of=torch.int64) if variant.dropout else None,
    )


class _Driver:
    """The methods of a driver that Triton needs to compile."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@contextmanager
def driver_of(driver) -> Iterator[None]:
    """Within this context, Triton's active driver is ``driver``; it is restored afterwards."""
    from triton.runtime import driver as config

    before = dict(vars(config))
    config.set_active(driver)
    try:
        yield
    finally:
        vars(config).update(before)


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Within this context, PyTorch's precision of float32 products is ``name``; it is restored afterwards."""
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, name
    try:
        yield
    finally:
        settings.fp32_precision = before


def _gpu_target(target: int | str, lanes: int):
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip" if isinstance(target, str) else "cuda", target, lanes)


@memoise
def _hash_in_order() -> None:
    """Under Triton 3.6 a kernel's hash depends on which kernels that share its functions were hashed before it."""
    from apt_kernels.impl.triton import attend, bias, columns, finish, gradients, split

    kernels = (attend.attention_forward, gradients.query_gradient, columns.column_gradients, finish.finish_gradients)
    for kernel in (
        *kernels,
        columns.prefix_column_gradients,
        split.split_attention,
        split.merge_shares,
        bias.token_bias_gradient,
    ):
        getattr(kernel, "cache_key", None)  # interpreted ones have none


def run_launchers(job: Job, execute: Callable, wanted: Collection[str] | None = None, **sizes: int) -> None:
    """Run the op's launchers, forward and backward, as on the job's chips, with ``execute`` in place of the launch.

    ``wanted``: the inputs whose gradients are asked for; None: all.
    """
    from apt_kernels.impl.inputs import DIFFERENTIABLE
    from apt_kernels.impl.triton import BACKEND, arguments, attend, gradients

    def architecture(device) -> str:
        return job.architecture

    chip, precision = job.chips[0], "tf32" if VARIANTS[job.variant].tf32 else "ieee"
    with (
        driver_of(_Driver(_gpu_target(chip.lowered, chip.lanes))),
        _matmul_precision(precision),
        mock.patch.object(tiles, "architecture", architecture),
        mock.patch.object(arguments, "execute", execute),
    ):
        _hash_in_order()
        x = make_job_inputs(job, **sizes)
        strategy = "merge" if VARIANTS[job.variant].merge else BACKEND.strategy(x)
        out, logsumexp = attend.forward(x, strategy)
        needs = [getattr(x, name) is not None and (wanted is None or name in wanted) for name in DIFFERENTIABLE]
        gradients.backward(x, out, logsumexp, torch.empty_like(out), None, needs, strategy)


def _form(argument) -> str:
    """The part of a run-time argument on which compiled code depends."""
    if isinstance(argument, Tensor):
        return str(argument.dtype)
    if isinstance(argument, tuple):
        return f"({','.join(map(_form, argument))})"
    return "-" if argument is None else type(argument).__name__


def _key(kernel, lowered: int | str, args: tuple, named: dict) -> str:
    """Everything on which the compiled code depends, except Triton's version."""
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    options = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
    settings = {name: str(it) if name in constants | options else _form(it) for name, it in sorted(named.items())}
    return repr((kernel.cache_key, lowered, [_form(argument) for argument in args], settings))


def _tile(named: dict) -> str:
    return f"{named.get('ROWS', 0)}x{named.get('COLUMNS', 0)} w{named['num_warps']} s{named['num_stages']}"


def units(todo: Iterable[Job], wanted: Collection[str] | None = None) -> list[Unit]:
    """The distinct code of the jobs."""
    found: dict[str, Unit] = {}
    for job in todo:

        def record(kernel, programs, *args, job=job, **named):
            key = _key(kernel, job.chips[0].lowered, args, named)
            unit = found.setdefault(key, Unit(kernel.__name__, key, _tile(named)))
            if job not in unit.jobs:
                unit.jobs.append(job)

        run_launchers(job, record, wanted)
    return list(found.values())


def _cache_file(unit: Unit) -> Path:
    import triton

    name = hashlib.sha256(repr((_FORM_OF_CACHE, triton.__version__, unit.key)).encode()).hexdigest()
    return Path(os.environ.get("APT_COMPILE_CACHE") or Path.home() / ".cache" / "apt_kernels") / "units" / name


def cached(unit: Unit) -> dict[int | str, Facts] | None:
    """The cached results of a unit, by chip; None: it was not compiled for all its chips."""
    file = _cache_file(unit)
    known = pickle.loads(file.read_bytes()) if file.exists() else {}
    return known if all(chip.target in known for chip in unit.chips) else None


def compile_cached(unit: Unit) -> dict[int | str, Facts]:
    """`compile_unit` with a cache."""
    known = cached(unit)
    if known is None:
        known, file = compile_unit(unit), _cache_file(unit)
        if any(facts.error for facts in known.values()):
            return known
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_suffix(f".{os.getpid()}")
        written.write_bytes(pickle.dumps(known))
        written.replace(file)
    return known


def compile_unit(unit: Unit, wanted: Collection[str] | None = None) -> dict[int | str, Facts]:
    """Compile a unit for its chips; ``wanted`` as it was when it was found."""
    job, found = unit.jobs[0], {}

    def compile_only(kernel, programs, *args, **named):
        if found or kernel.__name__ != unit.kernel or _key(kernel, job.chips[0].lowered, args, named) != unit.key:
            return
        kernel.device_caches.clear()  # its key does not hold the chip
        try:
            compiled = kernel.warmup(*args, grid=(programs,), **named)
        except Exception as error:  # any failure of the compiler is a line of the report
            while error.__cause__:
                error = error.__cause__
            fault = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
            found.update({chip.target: Facts(error=fault) for chip in unit.chips})
        else:
            found.update({chip.target: _inspect(compiled, chip) for chip in unit.chips})

    run_launchers(job, compile_only, wanted)
    if not found:
        raise RuntimeError(f"{unit.kernel} of {job} is launched otherwise than when it was found")
    return found


def _inspect(compiled, chip: Chip) -> Facts:
    if "cubin" in compiled.asm:
        text = compiled.asm["ptx"]
        cubin = compiled.asm["cubin"] if chip.target == chip.lowered else _assembled(compiled, chip)
        registers, stack = _cubin_usage(cubin)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    instruction = next((name for name in INSTRUCTIONS if name in text), "-")
    metadata = compiled.metadata
    return Facts(registers, stack, metadata.shared, metadata.num_warps, instruction, "ld.global.b16" in text)


def _assembled(compiled, chip: Chip) -> bytes:
    """The cubin for a chip whose PTX is that of another."""
    from triton.compiler.compiler import make_backend

    backend = make_backend(_gpu_target(chip.target, chip.lanes))
    options = backend.parse_options({"enable_fp_fusion": compiled.metadata.enable_fp_fusion})
    text = re.sub(r"\.target sm_\d+", f".target sm_{chip.target}", compiled.asm["ptx"])
    return backend.make_cubin(text, {}, options, chip.target)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of the one kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"{name}:(\d+)", text.stdout)[1]) for name in ("REG", "STACK"))
