"""The CUDA C++ kernels of ``csrc/``, for where Triton cannot go. Importing this loads no library."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..backend import Backend, Plan, Result
from ..inputs import Inputs
from . import library

MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Cuda(Backend):
    """The kernels of the built library, on a CUDA device, or on the host where a build for it was loaded."""

    name = "cuda"

    def obstacle(self) -> str | None:
        if library.host is not None:
            return None
        obstacle = library.obstacle()
        if obstacle is None and not torch.cuda.is_available():
            obstacle = f"there is no CUDA device ({self.details()})"
        return obstacle

    def obstacle_for(self, x: Inputs) -> str | None:
        device, dtype = x.query.device, x.query.dtype
        if device.type != "cuda" and not (device.type == "cpu" and library.host is not None):
            return f"the tensors are on {device}; it needs a CUDA device"
        if dtype not in _DTYPES:
            return f"query has dtype {dtype}; it takes float32, float16 and bfloat16"
        if device.type == "cuda":
            obstacle = self._device_obstacle(device, dtype)
            if obstacle:
                return obstacle
        *_, head_dim, value_dim = x.sizes
        if max(head_dim, value_dim) > MAX_HEAD_DIM:
            return f"head sizes are {head_dim} and {value_dim}; it takes up to {MAX_HEAD_DIM}"
        return None

    def _device_obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if torch.version.hip:
            return "the device is not NVIDIA's"
        if library.device() is None:
            return library.obstacle()
        capability = torch.cuda.get_device_capability(device)
        if not library.runs_on(capability):
            return f"the device has compute capability {capability[0]}.{capability[1]}; the library is {self.details()}"
        if dtype == torch.bfloat16 and capability < (8, 0):
            return "query has dtype torch.bfloat16; that needs compute capability 8.0"
        return None

    def reserved(self, x: Inputs) -> str | None:
        return "its host build runs only when asked for by name" if x.query.device.type == "cpu" else None

    def details(self) -> str:
        return "built for " + " ".join(library.architectures())

    def strategy(self, x: Inputs) -> str:
        return "fused"

    def forward(self, x: Inputs, plan: Plan) -> Result:
        from . import attend

        with _on(x.query.device):
            return Result(*attend.forward(x))

    def backward(
        self,
        x: Inputs,
        plan: Plan,
        result: Result,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor | None]:
        from . import attend

        with _on(x.query.device):
            return attend.backward(x, result.out, result.logsumexp, grad_out, grad_logsumexp, needs)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels are launched on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


BACKEND = Cuda()
