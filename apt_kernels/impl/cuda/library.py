"""The built library: its path, whether it loads, and the chips that it was built for."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

PATH = Path(__file__).parent / "libapt_kernels_cuda.so"

# The operators of the host build, if `use_host` loaded one: tests run the same kernels on the CPU.
host = None


@functools.cache
def _load() -> tuple[object | None, str | None]:
    """The operators, or why they are not available."""
    if not PATH.exists():
        return None, "its library, for NVIDIA GPUs, is not built: install with APT_KERNELS_CUDA=1 and nvcc"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return None, f"its library does not load: {error}"
    return torch.ops.apt_kernels_cuda, None


def device():
    """The operators for CUDA devices; None: `obstacle` says why."""
    return _load()[0]


def obstacle() -> str | None:
    """Why the library is not available; None: it is."""
    return _load()[1]


def use_host(path: Path) -> None:
    """Load a host build of the same kernels, which then compute calls on CPU tensors that request ``"cuda"``."""
    global host
    torch.ops.load_library(path)
    host = torch.ops.apt_kernels_cuda_host


def architectures() -> list[str]:
    """The chips that the library was built for: ``"7.5"``; ``"9.0+PTX"``: newer ones too, compiled by the driver."""
    operators = device() or host
    return operators.architectures().split()


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether a device can run it: code for its own major version and no later minor one, or PTX for an older chip."""
    for built in architectures():
        major, minor = map(int, built.removesuffix("+PTX").split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if built.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False
