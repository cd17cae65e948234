"""The CUDA C++ kernels of ``csrc/``, for GPUs and platforms without Triton. Importing this loads no library."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu
from ..backend import Backend, Plan, Result
from ..inputs import Inputs
from . import library

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Cuda(Backend):
    """The kernels of the built library, on a CUDA device, or on the host if a host build was loaded."""

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
        if x.prefix_index is not None:
            return "prefix_index is given; it takes one prefix for all rows. 'triton' and 'reference' take one for each"
        return gpu.obstacle(x)

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

        with gpu.current(x.query.device):
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

        with gpu.current(x.query.device):
            return attend.backward(x, result.out, result.logsumexp, grad_out, grad_logsumexp, needs)


BACKEND = Cuda()
