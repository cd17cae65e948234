"""The op on the CPU against naive prefix tuning: the prefix gated, copied for every row, concatenated, dense masks.

    python bench/cpu_op.py [--seconds 2] [--strategy merge] [--only causal] [--threads 1 --clock cpu]

Forward and backward alternate between the two in one process; the table gives medians in milliseconds and their
ratio (above 1: the op is faster). Both results are compared first. With one thread the CPU clock tells the work done
on a machine that is busy with other things.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import apt_kernels
from apt_kernels.impl import cpu


class Shape(NamedTuple):
    """``padded``: keys beyond each row's length, drawn from T/2..T, are hidden."""

    kind: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    length: int
    causal: bool = False
    padded: bool = False
    gate: str = "row"
    dropout: float = 0.0


ENCODER_SIZES = [(32, 64, 12), (32, 128, 12), (16, 128, 16), (8, 256, 16), (8, 512, 12)]
CAUSAL_SIZES = [
    (2, 1024, 8, 8, 64),
    (1, 1024, 32, 8, 128),
    (2, 1024, 32, 8, 64),
    (1, 2048, 16, 4, 64),
    (1, 2048, 8, 8, 128),
]
SHAPES = [
    *[Shape("encoder", b, t, h, h, 64, m) for b, t, h in ENCODER_SIZES for m in (16, 128)],
    *[Shape("padded", b, t, h, h, 64, m, padded=True) for b, t, h in ENCODER_SIZES for m in (16, 128)],
    *[Shape("causal", *size, m, causal=True) for size in CAUSAL_SIZES for m in (16, 128)],
    Shape("causal", 2, 1024, 8, 8, 64, 16, causal=True, padded=True),
    Shape("per query", 8, 128, 12, 12, 64, 16, causal=True, gate="query"),
    Shape("per query", 2, 1024, 8, 8, 64, 16, causal=True, gate="query"),
    Shape("per query", 1, 2048, 16, 4, 64, 128, causal=True, gate="query"),
    *[Shape("dropout", b, t, 12, 12, 64, 16, padded=True, dropout=0.1) for b, t in ((32, 64), (16, 128), (8, 256))],
]


def naive(operands: list[Tensor], mask: Tensor | None, dropout_p: float) -> Tensor:
    """What prefix tuning by ``past_key_values`` computes, with the gate of APT applied to the prefix."""
    query, key, value, prefix_key, prefix_value, gate, layer_scale = operands
    weights = layer_scale * torch.sigmoid(gate)
    if gate.ndim == 3:
        return _naive_per_query(operands, weights, mask)
    column = weights[:, None, :, None]
    key = torch.cat([column * prefix_key, key], dim=2)
    value = torch.cat([column * prefix_value, value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, enable_gqa=True)


def _naive_per_query(operands: list[Tensor], weights: Tensor, mask: Tensor | None) -> Tensor:
    """A gate per query scales logits, which no stock kernel does: the usual eager attention."""
    query, key, value, prefix_key, prefix_value, _, _ = operands
    batch, heads, _, dim = query.shape
    group, length = heads // key.shape[1], prefix_key.shape[1]
    key, value = (
        torch.cat([prefix.expand(batch, -1, -1, -1), tokens], dim=2).repeat_interleave(group, dim=1)
        for prefix, tokens in ((prefix_key, key), (prefix_value, value))
    )
    weights = F.pad(weights[:, None], (0, key.shape[2] - length), value=1.0)
    logits = query @ key.mT * dim**-0.5 * weights
    if mask is not None:
        logits = logits + mask
    return (logits.softmax(-1) * weights) @ value


class Problem:
    """Data of one shape, and a step (forward and backward) of each side."""

    def __init__(self, shape: Shape):
        self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator)

        _, batch, tokens, heads, kv_heads, dim, length = shape[:7]
        gate = draw(batch, tokens, length) if shape.gate == "query" else draw(batch, length)
        operands = [draw(batch, tokens, count, dim).transpose(1, 2) for count in (heads, kv_heads, kv_heads)]
        operands += [draw(kv_heads, length, dim), draw(kv_heads, length, dim), gate, torch.tensor([1.5])]
        self.operands = [tensor.requires_grad_() for tensor in operands]
        self.grad = draw(batch, tokens, heads, dim).transpose(1, 2)
        real = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator)
        padding = torch.arange(tokens) < real if shape.padded else None
        self.mask = apt_kernels.Mask(causal=shape.causal, key_padding=padding)
        self.dense = self._dense(padding)

    def _dense(self, padding: Tensor | None) -> Tensor | None:
        shape = self.shape
        if not shape.causal and padding is None:
            return None
        seen = torch.ones(shape.batch, 1, shape.tokens, shape.tokens, dtype=torch.bool)
        seen = seen.tril() if shape.causal else seen
        seen = seen if padding is None else seen & padding[:, None, None]
        mask = torch.zeros(shape.batch, 1, shape.tokens, shape.length + shape.tokens)
        mask[..., shape.length :].masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return mask

    def naive(self) -> list[Tensor]:
        out = naive(self.operands, self.dense, self.shape.dropout)
        return self._backward(out)

    def ours(self) -> list[Tensor]:
        out = apt_kernels.attention(
            *self.operands, mask=self.mask, dropout_p=self.shape.dropout, seed=0, implementation="cpu"
        )
        return self._backward(out)

    def _backward(self, out: Tensor) -> list[Tensor]:
        for operand in self.operands:
            operand.grad = None
        out.backward(self.grad)
        return [out, *[operand.grad for operand in self.operands]]

    def strategy(self) -> str:
        return cpu.strategy(apt_kernels.op.make_inputs(*self.operands, mask=self.mask, dropout_p=self.shape.dropout))

    def check(self) -> None:
        """Both sides agree (dropout draws differ, so that is compared without)."""
        with mock.patch.object(self, "shape", self.shape._replace(dropout=0.0)):
            for ours, expected in zip(self.ours(), self.naive()):
                torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * float(expected.detach().abs().max()))


def measure(problem: Problem, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """Median milliseconds of naive and ours, alternating."""
    times: dict = {problem.naive: [], problem.ours: []}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[problem.ours]) < 5:
        for step, kept in times.items():
            start = clock()
            step()
            kept.append(clock() - start)
    return tuple(statistics.median(kept) * 1e3 for kept in times.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="at least this long for each shape")
    parser.add_argument("--strategy", help="force a strategy of the CPU implementation")
    parser.add_argument("--only", default="", help="kinds of shapes that start with this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    if options.strategy:
        cpu.strategy = lambda x: options.strategy
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.clock} clock, float32, forward + backward, ms"
    )
    print("kind        B    T  H/Hkv   D   M pad gate    naive    ours  ratio  way")
    for shape in SHAPES:
        if not shape.kind.startswith(options.only):
            continue
        problem = Problem(shape)
        problem.check()
        before, after = measure(problem, options.seconds, clock)
        heads = f"{shape.heads}/{shape.kv_heads}"
        print(
            f"{shape.kind:10}{shape.batch:3}{shape.tokens:5}{heads:>7}{shape.dim:4}{shape.length:4} "
            f"{'yes' if shape.padded else 'no':4}{shape.gate:6}{before:8.1f}{after:8.1f}{before / after:7.2f}  "
            f"{problem.strategy()}",
            flush=True,
        )


if __name__ == "__main__":
    main()
