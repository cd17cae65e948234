"""The kernels of csrc/ under sanitizers: there are no reports, and results equal those of the plain run bit for bit.

``PYTHONPATH=.:tests python -m helpers.sanitize [address] [thread] [memcheck] [racecheck]``: the first two (the default)
run on the host; the others are tools of compute-sanitizer and need a CUDA device and the built library. Each runs the
same cases in its own process and writes the results; host sanitizers end the process at their first report.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from helpers import cuda_host, kernels
from helpers.cases import CASES, Case

_ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
_THREAD = ("-O1", "-g", "-fsanitize=thread")
# Build options, whether a block's threads are system threads, the run-time library, and its options.
SANITIZERS = {
    "address": (_ADDRESS, False, "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}),
    "thread": (_THREAD, True, "libtsan.so", {"TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0"}),
}
# Tools of compute-sanitizer. torch's caching allocator would hide reads past a tensor's end.
DEVICE_TOOLS = ("memcheck", "racecheck")
_DEVICE_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_NAMES = ("everything", "gate_indexed_query", "bias_keys_gradient", "segments", "dropout_padding_sinks", "odd_sizes")


def cases(sanitizer: str) -> dict[str, Case]:
    """What to run: every kernel in every type and width; under the slow thread sanitizer fewer features, and not
    bfloat16, whose threads do what float16's do."""
    one, few = {"batch": 1, "kv_heads": 1}, sanitizer == "thread"
    found = {name: replace(CASES[name], **one) for name in (_NAMES[:3] if few else _NAMES)}
    for dtype in (torch.float32, torch.float16) if few else (torch.float32, torch.float16, torch.bfloat16):
        for width in (64, 128) if few else (64, 128, 256):
            sizes = {"head_dim": width, "value_dim": width - 7, "dtype": dtype, "queries": 33, "keys": 35}
            found[f"{dtype} {width}"] = replace(CASES["causal_gate_query"], group=1, **one, **sizes)
            for gate in ("row", "query") if width <= 128 else ():
                plain = sizes | {"value_dim": width, "queries": 70, "keys": 200, "length": 70}
                found[f"{dtype} {width} plain {gate}"] = Case(**one, group=1, causal=True, gate=gate, **plain)
    return found


def run(library: str, sanitizer: str, out: str) -> None:
    """Run the cases with a build of the library for the host, or ("") with that for CUDA; write the results."""
    from apt_kernels.impl.cuda import library as loaded

    if library:
        loaded.use_host(Path(library))
    device, found = "cpu" if library else "cuda", {}
    for name, case in cases(sanitizer).items():
        if case.dtype == torch.bfloat16 and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            continue
        found[name] = kernels.results("cuda", case.inputs(device))
    if library:
        os.environ["APT_HALF_STEP"] = "8"
        case = replace(CASES["causal_gate_query"], dtype=torch.float16, batch=1)
        found["float16 as on 7.5"] = kernels.results("cuda", case.inputs(device))
        for name, case in cases(sanitizer).items():
            if "plain row" in name:
                found[f"{name} as on 7.5"] = kernels.results("cuda", case.inputs(device))
    torch.save({name: {k: t.cpu() for k, t in results.items()} for name, results in found.items()}, out)


def _in_a_process(sanitizer: str, library: Path | None, out: Path, prefix: list[str], environment: dict) -> None:
    command = [sys.executable, "-m", "helpers.sanitize", "--library", str(library or ""), "--out", str(out), sanitizer]
    subprocess.run([*prefix, *command], env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, check=True)


def _library(name: str) -> str:
    command = [cuda_host.build.find_cxx(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _on_the_host(sanitizer: str) -> tuple[list, list]:
    """The arguments of `_in_a_process` for the plain build and for the sanitised one."""
    options, threads, runtime, environment = SANITIZERS[sanitizer]
    # The C++ library is loaded with the sanitizer's, which looks up the functions that it wraps before torch is loaded.
    preload = " ".join(_library(name) for name in (runtime, "libstdc++.so.6"))
    # The thread sanitizer supports only the address layouts of old kernels.
    prefix = ["setarch", "--addr-no-randomize"] if threads else []
    sanitised = cuda_host.library(options, threads)
    return [cuda_host.library(), prefix, {}], [sanitised, prefix, environment | {"LD_PRELOAD": preload}]


def _on_a_device(tool: str) -> tuple[list, list]:
    from apt_kernels.impl.cuda import BACKEND

    obstacle = BACKEND.obstacle() or (None if shutil.which("compute-sanitizer") else "there is no compute-sanitizer")
    if obstacle:
        raise SystemExit(f"{tool} was NOT run: {obstacle}")
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99"]
    return [None, [], {}], [None, prefix, _DEVICE_ENVIRONMENT]


def check(sanitizer: str) -> int:
    """Run the cases plain and sanitised; the number of results that differ."""
    started = time.monotonic()
    ways = _on_a_device(sanitizer) if sanitizer in DEVICE_TOOLS else _on_the_host(sanitizer)
    built, found = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for i, (library, prefix, environment) in enumerate(ways):
            out = Path(folder, str(i))
            _in_a_process(sanitizer, library, out, prefix, environment)
            found.append(torch.load(out))
    first, second = found
    results = [(case, name) for case in first for name in first[case]]
    different = [pair for pair in results if not torch.equal(first[pair[0]][pair[1]], second[pair[0]][pair[1]])]
    for case, name in different:
        print(f"{sanitizer}: {name} of {case} differs from the plain run", file=sys.stderr)
    seconds = f"build {built - started:.0f} s, run {time.monotonic() - built:.0f} s"
    print(f"{sanitizer}: {len(first)} cases, {len(results)} results, {len(different)} differ ({seconds})", flush=True)
    return len(different)


def main() -> int:
    """Run the sanitizers asked for, by default those of the host."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sanitizers", nargs="*", choices=[*SANITIZERS, *DEVICE_TOOLS, []])
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out:
        run(options.library, options.sanitizers[0], options.out)
        return 0
    return 1 if sum(check(sanitizer) for sanitizer in options.sanitizers or SANITIZERS) else 0


if __name__ == "__main__":
    sys.exit(main())
