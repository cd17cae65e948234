"""The shapes that the op is measured on: one registry for every peer and machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apt_kernels import Mask

GATES = ("none", "static", "row", "query")


@dataclass(frozen=True)
class Shape:
    """One problem. ``tokens`` queries see ``keys`` keys (causality from the bottom right), ``length`` prefix columns.

    ``padded``: every row hides its last keys, from none to half. ``gate``: one of `GATES`.
    """

    kind: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    dim: int
    length: int
    gate: str = "row"
    causal: bool = False
    padded: bool = False

    @property
    def name(self) -> str:
        size = f"b{self.batch}-h{self.heads}.{self.kv_heads}-t{self.tokens}-s{self.keys}-d{self.dim}-m{self.length}"
        return f"{self.kind}-{size}-{self.gate}"

    def flops(self, columns: int, backward: bool) -> int:
        """Floating-point operations of attention over ``columns`` visible columns a query, on average."""
        forward = 4 * self.batch * self.heads * self.tokens * columns * self.dim
        return forward * 7 // 2 if backward else forward

    @property
    def visible(self) -> int:
        """Token columns that a query sees, on average (padding not counted)."""
        return self.keys - (self.tokens - 1) // 2 if self.causal else self.keys

    @property
    def share(self) -> float:
        """The prefix's part of the arithmetic, relative to attention without it."""
        return self.length / self.visible

    def mask(self, device) -> Mask | None:
        """What the queries see."""
        padding = None
        if self.padded:
            lengths = torch.linspace(self.keys, self.keys // 2, self.batch, device=device).long()
            padding = torch.arange(self.keys, device=device)[None] < lengths[:, None]
        if not self.causal and padding is None:
            return None
        return Mask(causal=self.causal, key_padding=padding)

    def tensors(self, device, dtype, seed: int) -> dict[str, Tensor | None]:
        """Random inputs as transformers hands them over (transposed views), and the output's gradient."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, kind=dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=kind)

        def activation(count: int, length: int) -> Tensor:
            return draw(self.batch, length, count, self.dim).transpose(1, 2)

        gates = {"none": None, "static": (1,), "row": (self.batch,), "query": (self.batch, self.tokens)}[self.gate]
        if gates is not None:
            gates = draw(*(gates if self.gate != "static" else ()), self.length, kind=torch.float32)
        return {
            "query": activation(self.heads, self.tokens),
            "key": activation(self.kv_heads, self.keys),
            "value": activation(self.kv_heads, self.keys),
            "prefix_key": draw(self.kv_heads, self.length, self.dim, kind=torch.float32),
            "prefix_value": draw(self.kv_heads, self.length, self.dim, kind=torch.float32),
            "gate": gates,
            "layer_scale": torch.tensor([1.5], device=device),
            "grad_out": activation(self.heads, self.tokens),
        }


def _causal(batch, heads, kv_heads, tokens, dim, length, gate="row") -> Shape:
    return Shape("causal", batch, heads, kv_heads, tokens, tokens, dim, length, gate, causal=True)


def _encoder(batch, heads, tokens, length, gate="row") -> Shape:
    return Shape("encoder", batch, heads, heads, tokens, tokens, 64, length, gate, padded=True)


def _decode(batch, heads, kv_heads, keys, dim, length, gate="query") -> Shape:
    return Shape("decode", batch, heads, kv_heads, 1, keys, dim, length, gate)


GPU = [
    *[_causal(max(1, 8192 // t), 32, 8, t, 128, m) for t in (512, 2048, 8192, 16384) for m in (16, 128)],
    *[_causal(max(1, 8192 // t), 32, 32, t, 128, 64) for t in (512, 2048, 8192)],
    *[_causal(4, 32, 8, 2048, 128, 64, gate) for gate in ("none", "static", "query")],
    *[_causal(1, 32, 8, 8192, 128, 64, "query"), _causal(4, 32, 8, 2048, 64, 64), _causal(2, 16, 8, 2048, 256, 64)],
    *[_encoder(b, 16, t, m) for b, t in ((64, 64), (32, 128), (16, 512)) for m in (16, 128)],
    *[_causal(32, 32, 8, t, 128, 4096, gate) for t in (512, 2048) for gate in ("none", "row")],
    *[_decode(b, 32, 8, s, 128, 64) for b in (1, 16, 64) for s in (1024, 32768 if b < 64 else 8192)],
]
CPU = [
    *[_encoder(b, 12, t, m) for b, t in ((16, 64), (8, 128)) for m in (16, 128)],
    *[_causal(1, 8, 4, t, 64, 64, gate) for t in (512, 1024) for gate in ("row", "query")],
    _decode(1, 8, 4, 1024, 64, 64),
]
TINY = [
    _causal(1, 4, 2, 32, 16, 4, "query"),
    Shape("encoder", 2, 2, 2, 16, 16, 16, 4, padded=True),
    _decode(2, 4, 2, 24, 16, 4),
]
REGISTRIES = {"gpu": GPU, "cpu": CPU, "tiny": TINY}
