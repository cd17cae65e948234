"""Launches, multiplications and bytes of a layer's kernels, counted while Triton's interpreter runs them.

    TRITON_INTERPRET=1 python -m bench compiled launches [--architecture sm_90]
    TRITON_INTERPRET=1 python -m bench compiled launches --update  # writes bench/results/launches.json

The tiles are those of the architecture. Products and loads are counted where the kernels make them, so masked and
padded parts of tiles count too. PyTorch's own kernels (casts, sums of partial results) are listed with the bytes of
their operands. The lower bound is `bench.speed.counts`: the arithmetic of the op, and every tensor moved once. No time
is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apt_kernels.impl.inputs import DIFFERENTIABLE
from apt_kernels.ops.validation import make_inputs
from bench.common import machine
from bench.common.markdown import markdown, number
from bench.speed import counts
from bench.speed.shapes import Shape, causal, decode, encoder, operands

RECORD = machine.RESULTS / "launches.json"
# Small enough to interpret, large enough that full tiles outnumber the cut ones.
SHAPES = (
    causal(1, 2, 1, 512, 64, 16),
    causal(1, 2, 1, 512, 128, 64, "static"),
    causal(1, 2, 1, 256, 64, 32, "query"),
    encoder(2, 2, 256, 64),
    causal(1, 1, 1, 128, 64, 1024, "none"),
    decode(1, 2, 1, 1024, 64, 16),
)


@dataclass
class Launch:
    """One launch: floating-point operations of its matrix products, bytes that its programs ask memory for."""

    kernel: str
    programs: int
    flops: int = 0
    read: int = 0
    written: int = 0

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of this package; PyTorch's own have a dot in their names."""
        return "." not in self.kernel


class _Aten(TorchDispatchMode):
    """PyTorch's kernels as launches: what neither only looks at a tensor nor only allocates one."""

    def __init__(self, found: list[Launch]):
        super().__init__()
        self.found, self.inside, self.allocated = found, False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.inside:
            return result
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if not function.is_view:
            self.allocated += sum(t.nbytes for t in made)
        name = str(function.overloadpacket).removeprefix("aten.")
        if not function.is_view and "empty" not in name and name not in ("detach", "_unsafe_view", "_reshape_alias"):
            used = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            moved = sum(t.nbytes for t in used), sum(t.nbytes for t in made)
            self.found.append(Launch(f"aten.{name}", 0, 0, *moved))
        return result


@contextmanager
def counted(architecture: str | None = None) -> Iterator[tuple[list[Launch], _Aten]]:
    """The launches made within, in order. ``architecture``: whose tiles to take; default: the interpreter's own."""
    from triton.runtime import interpreter

    from apt_kernels.impl.triton import arguments, tiles

    found: list[Launch] = []
    builder, execute, aten = interpreter.InterpreterBuilder, arguments.execute, _Aten(found)

    def launched(kernel, programs, *given, **named):
        found.append(Launch(kernel.__name__, programs))
        aten.inside = True  # the interpreter's own copies
        execute(kernel, programs, *given, **named)
        aten.inside = False

    def dot(self, a, b, d, *rest):
        found[-1].flops += 2 * math.prod(a.data.shape) * b.data.shape[-1]
        return create_dot(self, a, b, d, *rest)

    def load(self, ptrs, mask, *rest, **named):
        loaded = create_load(self, ptrs, mask, *rest, **named)
        found[-1].read += int(mask.data.sum()) * loaded.data.dtype.itemsize
        return loaded

    def store(self, ptrs, value, mask, *rest, **named):
        found[-1].written += int(mask.data.sum()) * value.data.dtype.itemsize
        return create_store(self, ptrs, value, mask, *rest, **named)

    create_dot, create_load, create_store = builder.create_dot, builder.create_masked_load, builder.create_masked_store
    tiles_of = (lambda device: architecture) if architecture else tiles.architecture
    with (
        mock.patch.object(arguments, "execute", launched),
        mock.patch.object(builder, "create_dot", dot),
        mock.patch.object(builder, "create_masked_load", load),
        mock.patch.object(builder, "create_masked_store", store),
        mock.patch.object(tiles, "architecture", tiles_of),
        aten,
    ):
        yield found, aten


@dataclass
class Counted:
    """What one pass of a layer launched, and the bytes that PyTorch's allocator was asked for meanwhile."""

    launches: list[Launch]
    allocated: int

    def total(self, field: str) -> int:
        return sum(getattr(launch, field) for launch in self.launches)

    @property
    def ours(self) -> list[str]:
        """This package's kernels by name, in order."""
        return [launch.kernel for launch in self.launches if launch.ours]


def of(shape: Shape, architecture: str | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counted]:
    """A layer's forward, and its backward where the shape has one, with every gradient wanted."""
    from apt_kernels.impl.triton import BACKEND

    given = {name: t if t is None else t.detach() for name, t in operands(shape.leaves("cpu", dtype, 0)).items()}
    x, grad_out = make_inputs(**given, mask=shape.mask("cpu")), shape.grad_out("cpu", dtype, 0)
    with counted(architecture) as (launches, aten):
        result = BACKEND.forward(x, BACKEND.plan(x))
    found = {"forward": Counted(launches, aten.allocated)}
    if "both" in shape.passes:
        needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
        with counted(architecture) as (launches, aten):
            BACKEND.backward(x, BACKEND.plan(x), result, grad_out, None, needs)
        found["backward"] = Counted(launches, aten.allocated)
    return found


def passes(architecture: str | None = None, shapes=SHAPES) -> Iterator[tuple[Shape, str, Counted]]:
    """Every pass of every shape."""
    for shape in shapes:
        for which, found in of(shape, architecture).items():
            yield shape, which, found


def table(counted_passes: Iterable[tuple[Shape, str, Counted]]) -> str:
    """Every launch of every shape, and each pass relative to its lower bound."""
    header = ["case", "pass", "launch", "programs", "MFLOP", "/ floor", "MiB read", "MiB written", "bytes / floor"]
    lines = []
    for shape, which, found in counted_passes:
        for launch in found.launches:
            lines.append([shape.name, which, launch.kernel, str(launch.programs or ""), *_cells(launch)])
        total = Launch("all", 0, *(found.total(field) for field in ("flops", "read", "written")))
        said = f"{len(found.ours)} of ours, {len(found.launches) - len(found.ours)} of PyTorch"
        lines.append([shape.name, which, said, "", *_cells(total, *_floor(shape, which))])
    return markdown(header, lines)


def _floor(shape: Shape, which: str) -> tuple[float, int]:
    flops = counts.flops(shape, which) - counts.gate_flops(shape, which)
    return flops, counts.fewest_bytes(shape, torch.bfloat16, which)


def record(architecture: str, counted_passes: Iterable[tuple[Shape, str, Counted]]) -> dict:
    """The contents of `RECORD`: launches, arithmetic and bytes of every pass, the last two relative to lower bounds."""
    rows = []
    for shape, which, found in counted_passes:
        flops, least = _floor(shape, which)
        rows.append(
            {
                "case": shape.name,
                "kind": "decoding" if shape.kind == "decode" else ("long" if shape.length >= 512 else "training"),
                "pass": which,
                "ours": len(found.ours),
                "all": len(found.launches),
                "flops_by_floor": found.total("flops") / flops,
                "bytes_by_floor": (found.total("read") + found.total("written")) / least,
            }
        )
    return {"tiles": architecture, "dtype": "bfloat16", "versions": machine.versions(), "passes": rows}


def _cells(launch: Launch, flops: float | None = None, least: int | None = None) -> list[str]:
    moved = launch.read + launch.written
    return [
        f"{launch.flops / 1e6:.1f}",
        number(flops and launch.flops / flops),
        f"{launch.read / 2**20:.2f}",
        f"{launch.written / 2**20:.2f}",
        number(least and moved / least),
    ]


def main(given: list[str] | None = None) -> int:
    from apt_kernels.impl import triton

    parser = argparse.ArgumentParser(
        prog="python -m bench compiled launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--update", action="store_true", help=f"write {RECORD.relative_to(machine.ROOT)}")
    options = parser.parse_args(given)
    if not triton._interpreted():
        print("TRITON_INTERPRET=1 is not set: there is nothing to count", file=sys.stderr)
        return 2
    found = list(passes(options.architecture))
    print(table(found))
    if options.update:
        RECORD.write_text(json.dumps(record(options.architecture, found), indent=1) + "\n", encoding="utf-8")
    return 0
