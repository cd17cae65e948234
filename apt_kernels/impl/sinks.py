"""The gradient of the sinks, the same in every fused implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs


def sinks_gradient(x: Inputs, logsumexp: Tensor, delta: Tensor) -> Tensor:
    """``-sum p_sink * delta`` per head; ``delta = sum(dO * O) - dL``, ``[B, Hq, T]`` as the log-sum-exp."""
    probability = torch.exp(x.sinks.to(logsumexp.dtype)[:, None] - logsumexp)
    return -(probability * delta).sum((0, 2))
