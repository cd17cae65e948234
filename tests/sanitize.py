"""The kernels of csrc/ on the host under sanitizers: nothing is reported, and every bit is that of the plain build.

``python tests/sanitize.py [address] [thread]``. A process of its own for each build runs the same cases and writes
what it found; sanitizers end it at their first report.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cuda_host
import torch
from accuracy import differentiable, evaluate, poisoned_memory
from cases import CASES, Case

_ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_THREAD = ("-O1", "-g", "-fsanitize=thread")
# Build options, whether a block's threads are threads of the system, the run-time library, and its options.
SANITIZERS = {
    "address": (_ADDRESS, False, "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}),
    "thread": (_THREAD, True, "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"}),
}
_NAMES = ("everything", "gate_indexed_query", "bias_keys_gradient", "segments", "dropout_padding_sinks", "odd_sizes")


def cases(sanitizer: str) -> dict[str, Case]:
    """What to run: every kernel in every type and width; fewer features under the slow thread sanitizer."""
    one = {"batch": 1, "kv_heads": 1}
    found = {name: replace(CASES[name], **one) for name in (_NAMES if sanitizer == "address" else _NAMES[:3])}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for width in (64, 128, 256) if sanitizer == "address" else (64, 128):
            sizes = {"head_dim": width, "value_dim": width - 7, "dtype": dtype, "queries": 33, "keys": 35}
            found[f"{dtype} {width}"] = replace(CASES["causal_gate_query"], group=1, **one, **sizes)
    return found


def run(library: str, sanitizer: str, out: str) -> None:
    """Run the cases with a build of the library; write the results."""
    from apt_kernels.impl.cuda import library as loaded

    loaded.use_host(Path(library))
    found = {}
    for name, case in cases(sanitizer).items():
        x, generator = case.inputs(), torch.Generator().manual_seed(1)
        grad_out = torch.randn(x.query.shape[:3] + x.value.shape[3:], generator=generator).to(x.query)
        grad_logsumexp = torch.randn(x.query.shape[:3], generator=generator)

        def op(leaves):
            return torch.ops.apt_kernels.attention(*leaves.flat(), "cuda")[:2]

        with poisoned_memory():
            found[name] = evaluate(op, x, differentiable(x), grad_out, grad_logsumexp)
    torch.save(found, out)


def _in_a_process(sanitizer: str, library: Path, out: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, __file__, "--library", str(library), "--out", str(out), sanitizer]
    # The thread sanitizer knows only the address layouts of old kernels.
    prefix = ["setarch", "--addr-no-randomize"] if sanitizer == "thread" else []
    subprocess.run([*prefix, *command], env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, check=True)


def _library(name: str) -> str:
    command = [cuda_host.build._cxx(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def check(sanitizer: str) -> int:
    """Run the cases plain and sanitised; the number of results that differ."""
    options, threads, runtime, environment = SANITIZERS[sanitizer]
    # The C++ library beside the sanitizer's: it looks for the functions it wraps before torch brings them.
    preload = " ".join(_library(name) for name in (runtime, "libstdc++.so.6"))
    started = time.monotonic()
    plain, sanitised = cuda_host.library(), cuda_host.library(options, threads)
    built = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outs = Path(folder, "plain"), Path(folder, "sanitised")
        _in_a_process(sanitizer, plain, outs[0], {})
        _in_a_process(sanitizer, sanitised, outs[1], environment | {"LD_PRELOAD": preload})
        first, second = (torch.load(out) for out in outs)
    results = [(case, name) for case in first for name in first[case]]
    different = [pair for pair in results if not torch.equal(first[pair[0]][pair[1]], second[pair[0]][pair[1]])]
    for case, name in different:
        print(f"{sanitizer}: {name} of {case} differs from the plain build", file=sys.stderr)
    seconds = f"build {built - started:.0f} s, run {time.monotonic() - built:.0f} s"
    print(f"{sanitizer}: {len(first)} cases, {len(results)} results, {len(different)} differ ({seconds})", flush=True)
    return len(different)


def main() -> int:
    """Run the sanitizers asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sanitizers", nargs="*", choices=[*SANITIZERS, []])
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.library:
        run(options.library, options.sanitizers[0], options.out)
        return 0
    return 1 if sum(check(sanitizer) for sanitizer in options.sanitizers or SANITIZERS) else 0


if __name__ == "__main__":
    sys.exit(main())
