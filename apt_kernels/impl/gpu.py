"""What the implementations for GPUs share."""

from __future__ import annotations

import contextlib

import torch

from .inputs import BY_QUERY, Inputs

# The widest head whose tiles fit the registers and the shared memory.
MAX_HEAD_DIM = 256


def obstacle(x: Inputs) -> str | None:
    """Why the kernels cannot compute prefixes or heads of these sizes; None: they can."""
    if x.prefix_by_query:
        return BY_QUERY
    *_, head_dim, value_dim = x.sizes
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        return f"head sizes are {head_dim} and {value_dim}; it takes up to {MAX_HEAD_DIM}"
    return None


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make the tensors' ``device`` the current one, on which kernels are launched; nothing for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
