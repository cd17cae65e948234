"""The CUDA C++ kernels of ``csrc/``, for where Triton cannot go. Importing this loads no library."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..inputs import Inputs
from . import library

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available() -> str | None:
    """Why this implementation cannot run on this machine; None: it can."""
    if library.host is not None:
        return None
    obstacle = library.obstacle()
    if obstacle is None and not torch.cuda.is_available():
        obstacle = f"there is no CUDA device ({details()})"
    return obstacle


def details() -> str:
    """The architectures that the library was built for."""
    return "built for " + " ".join(library.architectures())


def unsupported(x: Inputs) -> str | None:
    """Why it cannot serve these inputs; None: it can."""
    device, dtype = x.query.device, x.query.dtype
    if device.type != "cuda" and not (device.type == "cpu" and library.host is not None):
        return f"the tensors are on {device}; it needs a CUDA device"
    if dtype not in _DTYPES:
        return f"query has dtype {dtype}; it takes float32, float16 and bfloat16"
    if device.type == "cuda":
        obstacle = _device_obstacle(device, dtype)
        if obstacle:
            return obstacle
    *_, head_dim, value_dim = x.sizes
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"head sizes are {head_dim} and {value_dim}; it takes up to {MAX_HEAD_DIM}"
    return None


def _device_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.version.hip:
        return "the device is not NVIDIA's"
    if library.device() is None:
        return library.obstacle()
    capability = torch.cuda.get_device_capability(device)
    if not library.runs_on(capability):
        return f"the device has compute capability {capability[0]}.{capability[1]}; the library is {details()}"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "query has dtype torch.bfloat16; that needs compute capability 8.0"
    return None


def only_by_name(x: Inputs) -> str | None:
    """Why the automatic choice passes over it although it can serve these inputs; None: it does not."""
    return "its host build runs only when asked for by name" if x.query.device.type == "cpu" else None


def strategy(x: Inputs) -> str:
    """How it would compute these inputs."""
    return "fused"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    from . import attend

    with _on(x.query.device):
        return attend.forward(x)


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `inputs.DIFFERENTIABLE`, None where not needed."""
    from . import attend

    with _on(x.query.device):
        return attend.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs)
