"""Time the op against its peers: forward, and forward with backward.

    python -m bench.op --shapes gpu --out results.json [--only causal] [--seconds 240]

Every peer's output and gradients are compared with the reference before it is timed. Peers alternate, round by
round, in one process; the table gives medians. CUDA: events around each call, inputs rotated past the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl import reference
from apt_kernels.op import make_inputs

from .peers import Peer, operands, peers
from .shapes import REGISTRIES, Shape

# Relative error in norm: products rounded to bfloat16 lie near 5e-3, float32 ones far below 1e-4; a wrong mask or gate
# is off by more than 5e-2.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float32: 1e-4}
_L2_BYTES = 256 << 20


def leaves(shape: Shape, device, dtype, seed: int, has_prefix: bool) -> dict[str, Tensor | None]:
    """A shape's tensors, those requiring gradients that a training step inside a model needs."""
    tensors = shape.tensors(device, dtype, seed)
    for name, tensor in tensors.items():
        wanted = has_prefix or name in ("query", "key", "value")
        if tensor is not None and name != "grad_out" and wanted:
            tensor.requires_grad_()
    return tensors


def gradients(out: Tensor, tensors: dict) -> dict[str, Tensor]:
    """Gradients of every leaf, not accumulated anywhere."""
    wanted = {name: t for name, t in tensors.items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), tensors["grad_out"])))


def expected(shape: Shape, device, dtype) -> dict[str, Tensor]:
    """Output and gradients by the reference in float32, one batch row and key head at a time to bound the memory."""
    tensors, mask = shape.tensors(device, dtype, seed=0), shape.mask(device)
    whole = {name: torch.zeros_like(t, dtype=torch.float32) for name, t in tensors.items() if t is not None}
    whole["out"] = whole.pop("grad_out")
    for b in range(shape.batch):
        own = mask
        if mask is not None and mask.key_padding is not None:
            own = Mask(causal=mask.causal, key_padding=mask.key_padding[b : b + 1])
        for h in range(shape.kv_heads):
            part = {n: t if t is None else _part(n, t, shape, b, h).detach().float() for n, t in tensors.items()}
            for name, tensor in part.items():
                if tensor is not None and name != "grad_out":
                    tensor.requires_grad_()
            out, _ = reference.attend(make_inputs(**operands(part), mask=own))
            for name, result in {"out": out.detach(), **gradients(out, part)}.items():
                _part(name, whole[name], shape, b, h).add_(result)
    return whole


def _part(name: str, tensor: Tensor, shape: Shape, b: int, h: int) -> Tensor:
    """What belongs to one batch row and one key head, as a view; shared gates and scales whole."""
    group = shape.heads // shape.kv_heads
    if name in ("query", "out", "grad_out"):
        return tensor[b : b + 1, h * group : (h + 1) * group]
    if name in ("key", "value"):
        return tensor[b : b + 1, h : h + 1]
    if name in ("prefix_key", "prefix_value"):
        return tensor[h : h + 1]
    return tensor[b : b + 1] if name == "gate" and tensor.ndim > 1 else tensor


def check(peer: Peer, shape: Shape, truth: dict[str, Tensor], device, dtype) -> float:
    """The worst relative error, in norm, of a peer's output and gradients; raises where it is too large."""
    tensors = leaves(shape, device, dtype, 0, peer.has_prefix)
    out = peer.run(tensors, shape.mask(device), shape)
    found = {"out": out.detach(), **gradients(out, tensors)}
    if not peer.has_prefix:
        return 0.0  # a stock kernel on the tokens alone: there is nothing of ours to hold it to
    worst = 0.0
    for name, tensor in found.items():
        error = ((tensor.float() - truth[name]).norm() / truth[name].norm().clamp_min(1e-20)).item()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{peer.name}: {name} is off by {error:.2e} relative")
        worst = max(worst, error)
    return worst


class Clock:
    """Milliseconds of one call: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def time(self, call) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def measure(shape: Shape, device, dtype, seconds: float, backward: bool = True) -> dict:
    """Times of every peer that applies, by name, and why the others do not."""
    result = {"shape": shape.__dict__, "name": shape.name, "share": shape.share, "skipped": {}, "peers": {}}
    truth = expected(shape, device, dtype)
    runners = {}
    for peer in peers(device):
        reason = peer.obstacle(shape, device)
        if reason is None:
            try:
                error = check(peer, shape, truth, device, dtype)
            except (RuntimeError, AssertionError) as failure:
                reason = f"{type(failure).__name__}: {str(failure).splitlines()[0][:160]}"
        if reason is not None:
            result["skipped"][peer.name] = reason
            continue
        result["peers"][peer.name] = {"error": error}
        runners[peer.name] = _runner(peer, shape, device, dtype, backward)
    del truth
    for name, (times, memory) in _alternate(runners, Clock(device), seconds).items():
        result["peers"][name].update(times, peak_bytes=memory)
    return result


def _runner(peer: Peer, shape: Shape, device, dtype, backward: bool):
    """``(forward, both)``: calls on the next of several input sets, so that no run finds its inputs in the cache."""
    one = sum(t.numel() * t.element_size() for t in shape.tensors(device, dtype, 0).values() if t is not None)
    count = 1 if device.type == "cpu" else max(1, min(8, _L2_BYTES // one + 1))
    sets = [leaves(shape, device, dtype, seed, peer.has_prefix) for seed in range(count)]
    mask, turn = shape.mask(device), [0]

    def following() -> dict:
        turn[0] = (turn[0] + 1) % count
        return sets[turn[0]]

    def forward():
        with torch.no_grad():
            peer.run(following(), mask, shape)

    def both():
        tensors = following()
        gradients(peer.run(tensors, mask, shape), tensors)

    return forward, both if backward else None


def _alternate(runners: dict, clock: Clock, seconds: float) -> dict:
    times = {name: {"forward": [], "both": []} for name in runners}
    memory = dict.fromkeys(runners, 0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 200):
        for name, (forward, both) in runners.items():
            if clock.cuda:
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
            times[name]["forward"].append(clock.time(forward))
            if both is not None:
                times[name]["both"].append(clock.time(both))
            if clock.cuda:
                memory[name] = torch.cuda.max_memory_allocated() - base
        rounds += 1
    spreads = {n: {kind: _spread(found[1:]) for kind, found in t.items() if found} for n, t in times.items()}
    return {name: (spread, memory[name]) for name, spread in spreads.items()}


def _spread(found: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(found, n=10) if len(found) > 1 else found * 9
    return {"median": statistics.median(found), "low": cuts[0], "high": cuts[-1], "count": len(found)}


def machine(device: torch.device) -> dict:
    """What the figures were taken on."""
    found = {**apt_kernels.info()["versions"], "processor": platform.processor() or platform.machine()}
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"], found["cuda"] = torch.cuda.get_device_name(device), torch.version.cuda
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    found["commit"] = commit.stdout.strip() or "unknown"
    return found


def row(result: dict) -> str:
    """One line of the table: ours against the fastest attention without a prefix, and against each other peer."""
    times = {name: peer["both"]["median"] for name, peer in result["peers"].items() if "both" in peer}
    floor = min((t for name, t in times.items() if name.startswith("no_prefix")), default=None)
    ours = {name: t for name, t in times.items() if name.startswith("ours")}
    if not ours or floor is None:
        return f"{result['name']:52} {result['skipped']}"
    best = min(ours, key=ours.get)
    others = " ".join(f"{n}={t / ours[best]:.2f}x" for n, t in times.items() if n not in ours and ":" not in n)
    figures = f"{ours[best]:9.3f} ms = {ours[best] / floor:.2f} floor (1+share {1 + result['share']:.2f})"
    return f"{result['name']:52} {best:12} {figures} {others}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=REGISTRIES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--seconds", type=float, default=240, help="for all shapes together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after every shape")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [shape for shape in REGISTRIES[options.shapes] if options.only in shape.name]
    results = {"machine": machine(device), "dtype": str(dtype), "results": []}
    print(json.dumps(results["machine"]))
    for shape in shapes:
        result = measure(shape, device, dtype, options.seconds / len(shapes))
        results["results"].append(result)
        print(row(result), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
