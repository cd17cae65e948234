"""The fused Triton kernels. Importing this needs torch alone; the kernels are imported when they first run."""

from __future__ import annotations

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from ..inputs import Inputs

MAX_HEAD_DIM = 256


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> str | None:
    """Why this implementation cannot run on this machine; None: it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _interpreted():
        return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def unsupported(x: Inputs) -> str | None:
    """Why it cannot serve these inputs; None: it can."""
    device = x.query.device
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"the tensors are on {device}; it needs a CUDA device, or the CPU under TRITON_INTERPRET=1"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "the device is older than compute capability 8.0"
    *_, head_dim, value_dim = x.sizes
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"head sizes are {head_dim} and {value_dim}; it takes up to {MAX_HEAD_DIM}"
    return None


def only_by_name(x: Inputs) -> str | None:
    """Why the automatic choice passes over it although it can serve these inputs; None: it does not."""
    return "the interpreter runs only when asked for by name" if x.query.device.type == "cpu" else None


def strategy(x: Inputs) -> str:
    """``"split"``: few queries, the keys dealt out to programs; ``"merge"``: a stock kernel on the tokens, the prefix
    folded in through the log-sum-exp; ``"fused"``: prefix and tokens in one kernel."""
    from . import stock, tiles

    architecture = tiles.architecture(x.query.device)
    if tiles.is_split(x, architecture):
        return "split"
    return "merge" if tiles.is_merged(x, architecture) and stock.obstacle(x) is None else "fused"


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    from . import attend

    with _on(x.query.device):
        return attend.forward(x, strategy(x))


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of the inputs named in `inputs.DIFFERENTIABLE`, None where not needed."""
    from . import gradients

    with _on(x.query.device):
        return gradients.backward(x, out, logsumexp, grad_out, grad_logsumexp, needs, strategy(x))
