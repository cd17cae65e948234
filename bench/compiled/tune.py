"""Search for tiles of the Triton kernels: candidates are enumerated, compiled, checked by the reference and timed.

    python -m bench compiled tune --seconds 240                                   # on this machine's GPU
    python -m bench compiled tune --compile-only --architecture sm_90 --head 128  # no GPU: what does not spill

A tile that spills registers, exceeds the shared memory or is off the matrix path is dropped, one whose output or
gradients are off is reported. Results go to ``$APT_OUT/tune.json`` (default ``bench/results/latest``) as they come; the
table ends with the best tile of every part beside the one in `apt_kernels.impl.triton.tiles`, which stays untouched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apt_kernels import Mask
from apt_kernels.impl import reference
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from apt_kernels.impl.triton import tiles
from apt_kernels.ops.validation import make_inputs
from bench.compiled import aot_compile

from .aot_compile import VARIANTS, Job
from .report import Result, results_of


@dataclass(frozen=True)
class Part:
    """A part of the kernels that has tiles of its own: the kernel it runs in, and what to ask for to run it alone."""

    kernel: str
    variant: str
    needs: tuple[str, ...] = ()
    host: str = ""  # the part whose launch it shares, and so whose warps and stages


PARTS = {
    "forward": Part("attention_forward", "causal_gate_query"),
    "query": Part("query_gradient", "causal_gate_query", ("query",)),
    "key_value": Part("column_gradients", "causal", ("key", "value")),
    "prefix": Part("column_gradients", "causal_gate_query", ("prefix_key", "prefix_value"), host="key_value"),
    "gate": Part("column_gradients", "causal_gate_query", ("gate",), host="key_value"),
    "split": Part("split_attention", "decode"),
    "split_prefix": Part("split_attention", "decode", host="split"),
}
_ROWS = {"split": (16,), "split_prefix": (16, 32, 64)}
# Rough sizes that no tile passes, so that hopeless ones are not compiled: 32-bit sums a thread, bytes of shared memory.
_MOST_SUMS, _MOST_SHARED = 200, 228 << 10


def candidates(part: str, architecture: str, width: int, head: int) -> list[tiles.Tile]:
    """Tiles worth compiling, the largest first."""
    found, host, registers = [], PARTS[part].host, tiles.tile(part, architecture, width, head).registers
    cuts = [(8, stages) for stages in (3, 2, 1)] + [(4, stages) for stages in (3, 2, 1)]
    if host:
        own = tiles.tile(host, architecture, width, head)
        cuts = [(own.warps, own.stages)]
    for rows in _ROWS.get(part, (128, 64, 32, 16)):
        for columns in (128, 64, 32, 16):
            for warps, stages in cuts:
                kept, passing = (columns, rows) if part in ("key_value", "prefix") else (rows, columns)
                accumulators = {"key_value": 2, "prefix": 2, "gate": 0}.get(part, 1)
                sums = (accumulators * kept * head + 2 * rows * columns) // (warps * 32)
                shared = 2 * head * width * (kept + passing * stages)
                if sums <= _MOST_SUMS * 4 // max(width, 4) and shared <= _MOST_SHARED and rows * columns >= 256:
                    found.append(tiles.Tile(rows, columns, warps, stages, registers))
    return sorted(found, key=lambda tile: (-tile.rows * tile.columns, -tile.warps, -tile.stages))


@contextlib.contextmanager
def replaced(part: str, architecture: str, width: int, head: int, tile: tiles.Tile) -> Iterator[None]:
    """The dispatch table with another tile for one part."""
    heads = tiles.entries(architecture, width)
    own = heads[head]
    heads[head] = {**own, part: tile}
    try:
        yield
    finally:
        heads[head] = own


def compiled(part: str, architecture: str, width: int, head: int, tile: tiles.Tile) -> list[Result]:
    """What the part's kernel compiles to with a tile, for every chip of the architecture."""
    own, results = PARTS[part], []
    with replaced(part, architecture, width, head, tile):
        for unit in aot_compile.units(
            aot_compile.jobs([architecture], [width], [head], [own.variant]), own.needs or None
        ):
            if unit.kernel == own.kernel:
                results += results_of(unit, aot_compile.compile_unit(unit, own.needs or None))
    return results


def problem(job: Job, device: torch.device) -> tuple[Inputs, torch.Tensor]:
    """Random inputs of the part's variant, and the output's gradient."""
    generator, dtype = torch.Generator(device).manual_seed(0), aot_compile.DTYPES[job.width]
    variant, head = VARIANTS[job.variant], job.head
    decoding = variant.queries == 1
    batch, heads, kv_heads, keys, prefix = (16, 16, 4, 4096, 64) if decoding else (2, 16, 4, 2048, 64)
    queries = 1 if decoding else keys

    def draw(*shape: int, of=dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(of)

    side = torch.float64 if dtype == torch.float64 else torch.float32
    gate = {"row": (batch, prefix), "query": (batch, queries, prefix)}[variant.gate]
    x = make_inputs(
        draw(batch, queries, heads, head).transpose(1, 2),
        *(draw(batch, keys, kv_heads, head).transpose(1, 2) for _ in range(2)),
        *(draw(kv_heads, prefix, head, of=side) for _ in range(2)),
        draw(*gate, of=side),
        torch.ones(1, device=device, dtype=side),
        mask=Mask(causal=True),
    )
    return x, draw(batch, queries, heads, head).transpose(1, 2)


class Trial:
    """One part on the device: its inputs, and the truth (the reference in float32, row by row) to hold tiles to."""

    def __init__(self, part: str, job: Job, device: torch.device):
        self.needs = PARTS[part].needs
        self.x, self.grad = problem(job, device)
        self.forward = not self.needs
        self.result = self._attend()
        self.truth = self._truth()

    def _attend(self):
        from apt_kernels.impl.triton import BACKEND

        return BACKEND.forward(self.x, BACKEND.plan(self.x))

    def run(self) -> list[torch.Tensor]:
        """The part's results: the output, or the gradients that it is asked for."""
        from apt_kernels.impl.triton import BACKEND

        if self.forward:
            return [self._attend().out]
        needs = [name in self.needs for name in DIFFERENTIABLE]
        grads = BACKEND.backward(self.x, BACKEND.plan(self.x), self.result, self.grad, None, needs)
        return [grad for grad in grads if grad is not None]

    def _truth(self) -> list[torch.Tensor]:
        wide = torch.float64 if self.x.query.dtype == torch.float64 else torch.float32
        whole = Inputs(
            **{
                name: part.to(wide) if isinstance(part, torch.Tensor) and part.is_floating_point() else part
                for name, part in self.x.__dict__.items()
            }
        )
        leaves = [getattr(whole, name).requires_grad_() for name in self.needs]
        out = reference.attend(whole)[0]
        return [out.detach()] if self.forward else list(torch.autograd.grad(out, leaves, self.grad.to(wide)))

    def error(self) -> float:
        """The worst relative error, in norm."""
        found = zip(self.run(), self.truth)
        return max(((a.to(b.dtype) - b).norm() / b.norm().clamp_min(1e-20)).item() for a, b in found)

    def milliseconds(self, repeats: int = 10) -> float:
        """Median of one call by CUDA events, after a warm-up."""
        times = []
        for _ in range(repeats + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            self.run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times[2:])


TOLERANCE = {2: 2e-2, 4: 1e-4, 8: 1e-9}


def tune(architectures, widths, heads, parts, seconds: float, device: torch.device | None, out: Path) -> list[dict]:
    """Go through the candidates, part by part, until the time is up; ``device`` None: compile only."""
    from tqdm import tqdm

    found, end = [], time.perf_counter() + seconds
    todo = [(a, w, h, p) for w in widths for h in heads for p in parts for a in architectures]
    for i, (architecture, width, head, part) in enumerate(tqdm(todo, unit="part")):
        until = time.perf_counter() + (end - time.perf_counter()) / (len(todo) - i)
        current = tiles.tile(part, architecture, width, head)
        host = PARTS[part].host
        if host:
            own = tiles.tile(host, architecture, width, head)
            current = current._replace(warps=own.warps, stages=own.stages)
        job = aot_compile.jobs([architecture], [width], [head], [PARTS[part].variant])[0]
        trial = Trial(part, job, device) if device is not None else None
        for tile in dict.fromkeys([current, *candidates(part, architecture, width, head)]):
            if time.perf_counter() > until:
                break
            entry = {"architecture": architecture, "bits": width * 8, "head": head, "part": part}
            entry |= {"tile": tile._asdict(), "current": tile == current}
            if trial is None:
                results = compiled(part, architecture, width, head, tile)
                entry["compiled"] = [{"chip": result.chip.target, **asdict(result.facts)} for result in results]
                entry["fault"] = "; ".join(fault for r in results for fault in r.faults) or None
            else:
                with replaced(part, architecture, width, head, tile):
                    entry.update(_measured(trial, width))
            found.append(entry)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1))
    return found


def _measured(trial: Trial, width: int) -> dict:
    try:
        error = trial.error()
        if not error <= TOLERANCE[width]:
            return {"fault": f"off by {error:.2e} relative"}
        return {"fault": None, "error": error, "milliseconds": trial.milliseconds()}
    except Exception as failure:  # any error of the compiler or the device is the result for this tile
        return {"fault": f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"}


def table_of(found: list[dict]) -> str:
    """A line for every part: the best tile (without a GPU, the first that compiles cleanly) and the current one."""
    lines, groups = [], {}
    for entry in found:
        groups.setdefault((entry["architecture"], entry["bits"], entry["head"], entry["part"]), []).append(entry)
    for (architecture, bits, head, part), entries in groups.items():
        good = [entry for entry in entries if not entry["fault"]]
        best = min(good, key=lambda entry: entry.get("milliseconds", 0.0), default=None)
        current = next(entry for entry in entries if entry["current"])
        lines.append(
            f"{architecture:>7} {bits:>2}-bit D{head:<3} {part:<12} {len(good):>3} of {len(entries):>3} good   "
            f"current {_text(current)}   best {_text(best) if best else '-'}"
        )
    return "\n".join(lines)


def _text(entry: dict) -> str:
    tile = "{rows}x{columns}/{warps}/{stages}".format(**entry["tile"])
    if entry["fault"]:
        return f"{tile} ({entry['fault'][:60]})"
    return f"{tile} {entry['milliseconds']:.3f} ms" if "milliseconds" in entry else tile


def main(arguments: list[str] | None = None) -> int:
    """Tune, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compiled tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="for the whole search (default: 240)")
    parser.add_argument("--compile-only", action="store_true", help="no GPU: only report which candidates compile")
    for name, kind, choices, default, said in (
        ("architecture", str, tiles.ARCHITECTURES, None, "with --compile-only: chips (default: all)"),
        ("width", int, tiles.WIDTHS, [2], "bytes of an element (default: 2)"),
        ("head", int, tiles.HEADS, [128, 64, 256], "head sizes (default: all)"),
        ("part", str, tuple(PARTS), list(PARTS), "parts of the kernels (default: all)"),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", type=kind, choices=choices, default=default, metavar=name.upper(),
            help=f"{said}: {', '.join(map(str, choices))}",
        )  # fmt: skip
    folder = os.environ.get("APT_OUT", "bench/results/latest")
    parser.add_argument("--out", type=Path, default=Path(folder, "tune.json"), help="where the results are written")
    options = parser.parse_args(arguments)
    device = None
    if not options.compile_only:
        if not torch.cuda.is_available():
            parser.error("there is no CUDA device; --compile-only needs none")
        device = torch.device("cuda")
    architectures = [tiles.architecture(device)] if device else options.architecture or tiles.ARCHITECTURES
    found = tune(architectures, options.width, options.head, options.part, options.seconds, device, options.out)
    print(table_of(found))
    return 0
