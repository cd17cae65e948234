"""The kernels of csrc/ built for the host, so that they run without a CUDA device."""

from __future__ import annotations

import fcntl
import hashlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import build  # noqa: E402 - csrc/ is not a package: its folder has to be on the path first

PLAIN = ("-O1",)


def library(options: tuple[str, ...] = PLAIN, threads: bool = False) -> Path:
    """The host build with these options, built if its sources changed; concurrent tests wait for one another."""
    digest = hashlib.sha256(repr((options, threads, str(build.find_torch()))).encode())
    for source in sorted(path for path in build.CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py")):
        digest.update(source.read_bytes())
    folder = ROOT / "build" / "host"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"libapt_kernels_cuda_host_{digest.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            build.build_host(out, options, threads)
    return out


def use() -> None:
    """Use the host build for CPU tensors in this process; skips the test if there is no C++ compiler."""
    from apt_kernels.impl.cuda import library as loaded

    if loaded.host is None:
        try:
            build.find_cxx()
        except build.BuildError as error:
            pytest.skip(str(error))
        loaded.use_host(library())
