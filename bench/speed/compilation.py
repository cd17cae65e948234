"""Time to the first call, and number of compilations over many lengths: each contender in a new process, empty caches.

Run by itself (``python -m bench.speed.compilation PEER JSON``) it prints JSON: seconds of the call at every length, how
many kernels Triton compiled and how many graphs torch.compile. Results are checked by the error rule afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import torch

from bench.common.machine import ROOT

from .op import Measured
from .shapes import Shape, operands


@dataclass(frozen=True)
class Lengths:
    """Causal attention, forward and backward, of one row at one length after the other."""

    heads: int
    kv_heads: int
    dim: int
    length: int
    tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"lengths-h{self.heads}.{self.kv_heads}-d{self.dim}-m{self.length}-{len(self.tokens)}-lengths"

    def shapes(self) -> list[Shape]:
        return [Shape("causal", 1, self.heads, self.kv_heads, t, t, self.dim, self.length) for t in self.tokens]


# Peer of the op, and whether `torch.compile` wraps the whole call.
COMPILATION_PEERS = {
    "ours": ("ours", False),
    "naive": ("naive", False),
    "ours_compiled": ("ours", True),
    "flex": ("flex", False),
}
_TIMEOUT = 150


def measure(case: Lengths, device: torch.device, dtype: torch.dtype, seconds: float, only: tuple[str, ...] = ()):
    """`Measured`: ``first`` is the first call, ``later`` those at each further length."""
    found, deadline = Measured(), time.perf_counter() + seconds
    for peer in (name for name in COMPILATION_PEERS if not only or name in only):
        if peer == "flex" and device.type != "cuda":
            found.skipped[peer] = "compiled FlexAttention has no backward on the CPU"
            continue
        if found.samples and time.perf_counter() > deadline:
            found.skipped[peer] = "no time was left"
            continue
        done = _in_fresh_process(peer, case, device, dtype)
        if "seconds" not in done:
            found.skipped[peer] = done["reason"]
            if done.get("wrong"):
                found.wrong[peer] = done["reason"]
            continue
        found.samples[peer] = {"first": done["seconds"][:1], "later": done["seconds"][1:]}
        counted = f"{done['kernels']} Triton kernels, {done['graphs']} graphs compiled"
        found.figures[peer] = {"error": done["error"], "note": counted} | {n: done[n] for n in ("kernels", "graphs")}
    return found


def _in_fresh_process(peer: str, case: Lengths, device: torch.device, dtype: torch.dtype) -> dict:
    described = json.dumps({**vars(case), "dtype": str(dtype).removeprefix("torch."), "device": device.type})
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor"}
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **caches, "PYTHONPATH": paths}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "bench.speed.compilation", peer, described],
                **{"capture_output": True, "text": True, "env": environment, "timeout": _TIMEOUT},
            )
        except subprocess.TimeoutExpired:
            return {"reason": f"not done after {_TIMEOUT} s"}
    if done.returncode:
        raised = re.findall(r"^[\w.]+(?:Error|Exception|Unsupported)\b.*", done.stderr, re.MULTILINE)
        return {"reason": (raised or [f"exit status {done.returncode}"])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def _count_kernels() -> list:
    """A list that grows by one for each kernel that Triton compiles from now on."""
    compiled: list = []
    try:
        from triton import knobs
    except ImportError:
        return compiled
    knobs.runtime.jit_post_compile_hook = lambda **given: compiled.append(given["fn"].name) or False
    return compiled


def _run(peer: str, given: dict) -> dict:
    from .checking import Wrong, expected, results
    from .peers import Problem, peers

    device, dtype = torch.device(given.pop("device")), getattr(torch, given.pop("dtype"))
    case = Lengths(**{**given, "tokens": tuple(given["tokens"])})
    name, compiled = COMPILATION_PEERS[peer]
    known = {entry.name: entry for entry in peers()}
    kernels, seconds, made = _count_kernels(), [], []
    for shape in case.shapes():
        problem = Problem(shape, device, dtype)
        entry = known.get(name) or next(
            p for p in known.values() if p.name.startswith("ours:") and p.automatic(problem)
        )
        leaves, grad_out = operands(problem.leaves(0)), problem.grad_out(0)
        forward, backward = entry.setup(problem)
        call = torch.compile(forward) if compiled else forward
        begin = time.perf_counter()
        found = results(call(leaves), leaves, grad_out, True, True, backward)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        made.append((shape, leaves, grad_out, found))
    from torch._dynamo.utils import counters

    graphs = counters["stats"].get("unique_graphs", 0)
    try:
        error = max(expected(s, leaves, grad, True, True).check(found) for s, leaves, grad, found in made)
    except Wrong as wrong:
        return {"reason": f"wrong: {wrong}", "wrong": True}
    return {"seconds": seconds, "kernels": len(kernels), "graphs": graphs, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=COMPILATION_PEERS)
    parser.add_argument("case", help="JSON: the fields of `Lengths`, dtype and device")
    options = parser.parse_args()
    print(json.dumps(_run(options.peer, json.loads(options.case))))


if __name__ == "__main__":
    main()
