"""The fused Triton kernels. Importing this needs torch alone; the kernels are imported when they first run."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from .. import gpu
from ..backend import Backend, Plan, Result
from ..inputs import Inputs


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(Backend):
    """``"split"``: few queries, the keys divided among programs; ``"merge"`` (cuDNN)
    and ``"merge_flash4"`` (flash-attn-4): a library's kernel on the tokens, merged with the prefix through the
    log-sum-exp; ``"fused"``: prefix and tokens in one kernel."""

    name = "triton"

    def obstacle(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
        return None

    def obstacle_for(self, x: Inputs) -> str | None:
        device = x.query.device
        if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
            return f"the tensors are on {device}; it needs a CUDA device, or the CPU under TRITON_INTERPRET=1"
        if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return "the device is older than compute capability 8.0"
        return gpu.obstacle(x)

    def reserved(self, x: Inputs) -> str | None:
        return "the interpreter runs only when asked for by name" if x.query.device.type == "cpu" else None

    def strategy(self, x: Inputs) -> str:
        from . import stock, tiles

        architecture = tiles.architecture(x.query.device)
        if tiles.is_split(x, architecture):
            return "split"
        merged = tiles.merged_by(x, architecture)
        return merged if merged and stock.KERNELS[merged].obstacle(x) is None else "fused"

    def forward(self, x: Inputs, plan: Plan) -> Result:
        from . import attend

        with gpu.current(x.query.device):
            return Result(*attend.forward(x, plan.strategy))

    def backward(
        self,
        x: Inputs,
        plan: Plan,
        result: Result,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor | None]:
        from . import gradients

        with gpu.current(x.query.device):
            given = (x, result.out, result.logsumexp, grad_out, grad_logsumexp, needs, plan.strategy)
            return gradients.backward(*given)


BACKEND = Triton()
