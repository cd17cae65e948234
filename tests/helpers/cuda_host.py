"""The kernels of csrc/ built for the host, so that they run where there is no CUDA device."""

from __future__ import annotations

import fcntl
import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apt_kernels.impl.inputs import Inputs
from helpers.accuracy import differentiable, evaluate, poisoned_memory

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import build  # noqa: E402

PLAIN = ("-O1",)


def library(options: tuple[str, ...] = PLAIN, threads: bool = False) -> Path:
    """The host build with these options, built where its sources changed; tests side by side wait for one another."""
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
    """Let the host build serve CPU tensors in this process; skips the test where there is no C++ compiler."""
    from apt_kernels.impl.cuda import library as loaded

    if loaded.host is None:
        try:
            build.find_cxx()
        except build.BuildError as error:
            pytest.skip(str(error))
        loaded.use_host(library())


def results(x: Inputs) -> dict[str, Tensor]:
    """Outputs and every gradient of the kernels, for fixed gradients of the outputs."""
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(x.query.shape[:3] + x.value.shape[3:], generator=generator).to(x.query)
    grad_logsumexp = torch.randn(x.query.shape[:3], generator=generator).to(x.query.device)

    def op(leaves: Inputs) -> tuple[Tensor, Tensor]:
        return torch.ops.apt_kernels.attention(*leaves.flat(), "cuda")[:2]

    with poisoned_memory():
        return evaluate(op, x, differentiable(x), grad_out, grad_logsumexp)
