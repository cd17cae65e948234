"""A prefix's key and value from a small embedding while training."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reparameterisation(nn.Module):
    """Key and value from a small embedding through an MLP: ``W_out tanh(W_in e + b_in) + b_out`` (Li & Liang 2021).

    Theirs is one MLP for all layers; here each layer has its own, so that lengths may differ. Plain parameters:
    ``embedding [M, W]``, ``weight_in [W, W]``, ``bias_in [W]``, ``weight_out [Hkv (D + Dv), W]``,
    ``bias_out [Hkv (D + Dv)]``. ``weight_out`` is scaled so that the initial prefix has the standard deviation ``std``.
    """

    def __init__(self, length: int, width: int, heads: int, head_dim: int, value_head_dim: int, std: float, generator):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        outputs = heads * (head_dim + value_head_dim)

        def draw(*shape: int, scale: float) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            return nn.Parameter(drawn * scale)

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device="cpu", dtype=torch.float32))

        self.embedding = draw(length, width, scale=1.0)
        self.weight_in, self.bias_in = draw(width, width, scale=width**-0.5), zeros(width)
        self.weight_out, self.bias_out = draw(outputs, width, scale=1.0), zeros(outputs)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            self.weight_out.mul_(std / torch.cat([part.flatten() for part in self()]).std().clamp(min=1e-12))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.computed(self.embedding, self.weight_in, self.bias_in, self.weight_out, self.bias_out)

    def computed(
        self, embedding: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Key and value from these parameters."""
        linear = torch.nn.functional.linear
        hidden = torch.tanh(linear(embedding, weight_in, bias_in))
        made = linear(hidden, weight_out, bias_out).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = made.split((self.head_dim, made.shape[2] - self.head_dim), dim=2)
        return key.contiguous(), value.contiguous()
