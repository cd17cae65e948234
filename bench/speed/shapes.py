"""The shapes on which the op is measured, by kind of machine and stage. A new shape is one line in a list below."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from apt_kernels import Mask
from apt_kernels.prefix.gate_product import gate_product

GATES = ("none", "static", "row", "query")


@dataclass(frozen=True)
class Shape:
    """One problem. ``tokens`` queries see ``keys`` keys (causality from the bottom right), ``length`` prefix columns.

    ``kind``: ``"causal"``, ``"encoder"`` (bidirectional) or ``"decode"`` (one query a row, forward only).
    ``gate``: one of `GATES`; ``"row"`` and ``"query"`` come from hidden states of width ``heads * dim``, and their
    product with the gate's weight is timed too. ``padded``: the last keys of a row are padding, none to half.
    ``dtype``: of the activations; None: the run's.
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
    padded: bool = False
    dtype: str | None = None

    @property
    def causal(self) -> bool:
        return self.kind == "causal"

    @property
    def gate_per_query(self) -> bool:
        """Whether the queries of one row have gates of their own."""
        return self.gate == "query" and self.tokens > 1

    @property
    def passes(self) -> tuple[str, ...]:
        """The timed passes: decoding has no backward."""
        return ("forward",) if self.kind == "decode" else ("forward", "backward", "both")

    @property
    def name(self) -> str:
        size = f"b{self.batch}-h{self.heads}.{self.kv_heads}-t{self.tokens}-s{self.keys}-d{self.dim}-m{self.length}"
        options = [*(["padded"] if self.padded else []), *([self.dtype] if self.dtype else [])]
        return "-".join([self.kind, size, self.gate, *options])

    def dtype_in(self, default: torch.dtype) -> torch.dtype:
        """The dtype of the activations in a run of ``default``."""
        return getattr(torch, self.dtype) if self.dtype else default

    def key_padding(self, device) -> Tensor | None:
        """bool ``[B, S]``, True where a key may be seen; None: everywhere."""
        if not self.padded:
            return None
        lengths = torch.linspace(self.keys, self.keys // 2, self.batch, device=device).long()
        return torch.arange(self.keys, device=device)[None] < lengths[:, None]

    def mask(self, device) -> Mask | None:
        """What the queries see."""
        padding = self.key_padding(device)
        return Mask(causal=self.causal, key_padding=padding) if self.causal or padding is not None else None

    def leaves(self, device, dtype, seed: int) -> dict[str, Tensor]:
        """Random inputs that require gradients; activations are transposed views, as transformers passes them.

        ``hidden`` and ``gate_weight`` are there for gates that are computed from hidden states, ``gate`` for static
        ones. ``layer_scale`` always; every gate but ``"none"`` has logits near N(0, 1).
        """
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int, kind=dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=kind)

        def activation(count: int, length: int) -> Tensor:
            return draw(self.batch, length, count, self.dim).transpose(1, 2)

        width, found = self.heads * self.dim, {}
        found["query"] = activation(self.heads, self.tokens)
        found["key"], found["value"] = (activation(self.kv_heads, self.keys) for _ in range(2))
        for name in ("prefix_key", "prefix_value"):
            found[name] = draw(self.kv_heads, self.length, self.dim, kind=torch.float32)
        found["layer_scale"] = torch.full((1,), 1.5, device=device)
        if self.gate == "static":
            found["gate"] = draw(self.length, kind=torch.float32)
        elif self.gate != "none":
            rows = (self.batch, self.tokens) if self.gate == "query" else (self.batch,)
            found["hidden"] = draw(*rows, width)
            found["gate_weight"] = draw(self.length, width, kind=torch.float32) * width**-0.5
        return {name: tensor.requires_grad_() for name, tensor in found.items()}

    def grad_out(self, device, dtype, seed: int) -> Tensor:
        """A random gradient of the output, ``[B, Hq, T, D]`` stored as ``[B, T, Hq, D]``."""
        generator = torch.Generator(device).manual_seed(seed + 1_000_003)
        size = (self.batch, self.tokens, self.heads, self.dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype).transpose(1, 2)


def operands(leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The op's arguments from a shape's leaves: the gate's logits computed, as a patched model computes them."""
    found = {name: t for name, t in leaves.items() if name not in ("hidden", "gate_weight")}
    if "hidden" in leaves:
        found["gate"] = gate_product(leaves["hidden"], leaves["gate_weight"])
    return {"gate": None, **found}


def causal(batch, heads, kv_heads, tokens, dim, length, gate="row", padded=False) -> Shape:
    return Shape("causal", batch, heads, kv_heads, tokens, tokens, dim, length, gate, padded)


def encoder(batch, heads, tokens, length, gate="row", padded=True) -> Shape:
    return Shape("encoder", batch, heads, heads, tokens, tokens, 64, length, gate, padded)


def decode(batch, heads, kv_heads, keys, dim, length, gate="query") -> Shape:
    return Shape("decode", batch, heads, kv_heads, 1, keys, dim, length, gate)


def _in_bfloat16(*shapes: Shape) -> list[Shape]:
    return [replace(shape, dtype="bfloat16") for shape in shapes]


_GPU = {
    "encoder": [
        *[encoder(b, 16, t, m) for (b, t), m in product(((64, 64), (32, 128), (16, 256), (16, 512)), (16, 128))],
        encoder(32, 16, 128, 16, "none"),
        encoder(32, 16, 128, 16, "static"),
        encoder(32, 16, 128, 1, padded=False),
    ],
    "causal": [
        *[causal(max(1, 8192 // t), 32, 8, t, 128, m) for t, m in product((512, 2048, 8192, 16384), (16, 128))],
        *[causal(max(1, 8192 // t), 32, 32, t, 128, 64) for t in (512, 2048, 8192)],
        *[causal(4, 32, 8, 2048, 128, 64, gate) for gate in ("none", "static")],
        *[causal(4, 32, 8, 2048, 64, 64), causal(2, 16, 8, 2048, 256, 64), causal(1, 32, 8, 4096, 128, 1)],
    ],
    "query": [causal(b, 32, 8, t, 128, 64, "query") for b, t in ((16, 512), (4, 2048), (1, 8192))],
    "long": [
        *[causal(32, 32, 8, t, 128, 4096, gate) for t, gate in product((512, 2048), ("none", "static", "row"))],
        causal(4, 32, 8, 2048, 128, 1024),
    ],
    "decode": [
        *[decode(b, 32, 8, s, 128, 64) for b in (1, 16, 64) for s in (1024, 8192, 32768) if b * s <= 1 << 19],
        *[decode(16, 32, 8, 8192, 128, 64, "none"), decode(16, 32, 8, 8192, 128, 4096, "none")],
    ],
    "half": [],  # as all other stages
}
# For GPUs of less than `registry.LARGE` memory, such as a T4, an A10 or an RTX 4090.
_SMALL_GPU = {
    "encoder": [
        *[encoder(b, 12, t, m) for (b, t), m in product(((32, 64), (32, 128), (8, 512)), (16, 128))],
        encoder(32, 12, 128, 16, "none", padded=False),
    ],
    "causal": [
        *[causal(4096 // t, 32, 8, t, 64, 64) for t in (512, 1024, 2048, 4096)],
        *[causal(4, 32, 8, 1024, 64, 64, gate) for gate in ("none", "static")],
        *[causal(2, 32, 8, 2048, 128, 64), causal(4, 12, 12, 1024, 64, 16)],
    ],
    "query": [causal(4, 32, 8, 1024, 64, 64, "query"), causal(2, 32, 8, 2048, 128, 64, "query")],
    "long": [causal(4, 32, 8, 512, 64, 4096, "none"), causal(4, 32, 8, 512, 64, 1024)],
    "decode": [decode(b, 32, 8, s, 64, 64) for b in (1, 16) for s in (1024, 8192)],
    "half": [],
}
_CPU = {
    "encoder": [
        *[encoder(b, 12, t, m) for (b, t), m in product(((32, 64), (16, 128), (4, 512)), (16, 128))],
        encoder(16, 12, 128, 16, "none", padded=False),
        *[encoder(1, 12, 32, 8), encoder(8, 12, 77, 20)],
    ],
    "causal": [
        *[causal(1, 12, 12, 32, 64, 8), causal(8, 12, 12, 128, 64, 16, padded=True)],
        *[causal(8, 8, 4, 200, 64, 100, padded=True), causal(1, 16, 4, 384, 64, 20), causal(1, 8, 4, 1500, 64, 20)],
        *[causal(2, 8, 8, 512, 64, 16), causal(2, 8, 8, 1024, 64, 16), causal(1, 16, 4, 1024, 64, 128)],
        *[causal(1, 8, 8, 1024, 128, 16, "static"), causal(1, 8, 2, 2048, 64, 128)],
    ],
    "query": [causal(8, 12, 12, 128, 64, 16, "query"), causal(1, 8, 4, 1024, 64, 64, "query")],
    "long": [causal(8, 8, 4, 128, 64, 1024), causal(2, 8, 4, 256, 64, 4096, "none")],
    "decode": [decode(1, 8, 4, 1024, 64, 16), decode(16, 8, 4, 1024, 64, 64), decode(4, 8, 4, 8192, 64, 64, "static")],
    "half": _in_bfloat16(encoder(16, 12, 128, 16), causal(2, 8, 8, 512, 64, 16), causal(1, 16, 4, 1024, 64, 128)),
}
_TINY = {
    "encoder": [Shape("encoder", 2, 2, 2, 16, 16, 16, 4, padded=True)],
    "causal": [causal(1, 4, 2, 32, 16, 4, "static")],
    "query": [causal(1, 4, 2, 24, 16, 4, "query")],
    "long": [causal(2, 4, 2, 8, 16, 40, "none")],
    "decode": [decode(2, 4, 2, 24, 16, 4)],
    "half": _in_bfloat16(causal(1, 4, 2, 32, 16, 4, "static")),
}


def _grid(tokens: int, heads: int, kv_heads: int, gates: tuple[str, ...]) -> dict[str, list[Shape]]:
    """Batches of ``tokens`` tokens by head size, gate and length, causal and bidirectional, with a prefix of 64."""
    return {
        kind: [
            Shape(kind, tokens // length, heads, kv_heads, length, length, dim, 64, gate)
            for dim, gate, length in product((64, 128), gates, (512, 2048, 8192))
        ]
        for kind in ("causal", "encoder")
    }


# The cases of `bench.compiled.predict`: of the Triton kernels' table, and of the CUDA library's, where a gate for each
# row runs the loops of none.
PREDICTED = {"triton": _grid(8192, 32, 8, ("none", "row", "query")), "cuda": _grid(16384, 16, 16, ("none", "query"))}
_PREDICTED = {kind: [*PREDICTED["triton"][kind], *PREDICTED["cuda"][kind]] for kind in ("encoder", "causal")}
REGISTRIES = {
    "gpu": _GPU,
    "small_gpu": _SMALL_GPU,
    "cpu": _CPU,
    "tiny": _TINY,
    "predicted": {stage: _PREDICTED.get(stage, []) for stage in _GPU},
}
