"""The peers of the op: attention without a prefix, common implementations of a prefix, and ours, with one interface.

`Peer.obstacle` returns the reason why a peer cannot run a shape, or None. `Peer.setup` returns ``(forward, backward)``,
where ``forward(operands)`` is the output and ``backward(out, wanted, grad_out)`` the gradients of the tensors wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import apt_kernels
from apt_kernels.impl.triton import stock
from apt_kernels.ops import choose
from apt_kernels.ops.validation import make_inputs
from bench.common import naive

from .shapes import Shape, operands

Operands = dict[str, Tensor | None]
PER_QUERY = "does not apply: every query would need keys of its own"
CUDA_ONLY = "a CUDA kernel"
# Strategies that an implementation can be forced to use; its own choice is measured under its plain name.
STRATEGIES = {"cpu": ("merge", "concat", "blockwise"), "triton": (*stock.KERNELS, "fused")}
# The specification materialises every score, so it is measured up to this many only.
REFERENCE_SCORES = 1 << 23


@dataclass(frozen=True)
class Problem:
    """A shape on a device."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def grouped(self) -> bool:
        return self.shape.heads != self.shape.kv_heads

    def leaves(self, seed: int) -> dict[str, Tensor]:
        return self.shape.leaves(self.device, self.dtype, seed)

    def grad_out(self, seed: int) -> Tensor:
        return self.shape.grad_out(self.device, self.dtype, seed)


def backward(out: Tensor, wanted: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients by autograd, accumulated nowhere."""
    return torch.autograd.grad(out, wanted, grad_out)


@dataclass(frozen=True)
class Peer:
    """``attend(problem)`` returns the forward; ``note(problem)`` is kept with the figures (the strategy taken).

    ``dtype``: of its inputs; None: the problem's.
    """

    name: str
    attend: Callable[[Problem], Callable[[Operands], Tensor]]
    obstacle: Callable[[Problem], str | None] = lambda problem: None
    has_prefix: bool = True
    note: Callable[[Problem], str] = lambda problem: ""
    around: Callable[[], AbstractContextManager] = nullcontext
    dtype: torch.dtype | None = None

    def problem(self, problem: Problem) -> Problem:
        """The problem with the inputs of this peer."""
        return replace(problem, dtype=self.dtype or problem.dtype)

    def automatic(self, problem: Problem) -> bool:
        """Whether the op chooses this implementation by itself here."""
        return self.name == f"ours:{choose.choose(_inputs(problem)).name}"

    def setup(self, problem: Problem) -> tuple[Callable, Callable]:
        """``(forward, backward)`` for a problem; masks are built here, once, as a model builds them for all layers."""
        forward = self.attend(problem)
        if self.around is nullcontext:
            return forward, backward

        def within(function, *arguments):
            with self.around():
                return function(*arguments)

        return partial(within, forward), partial(within, backward)


# --- without a prefix


def _stock(backend: SDPBackend | None, problem: Problem) -> Callable[[Operands], Tensor]:
    shape, mask = problem.shape, problem.shape.mask(problem.device)
    plain = not shape.padded and (shape.tokens == shape.keys or not shape.causal)
    dense = None if plain else mask.visible(shape.batch, shape.tokens, shape.keys, problem.device)
    options = {"attn_mask": dense, "is_causal": shape.causal and plain, "enable_gqa": problem.grouped}

    def forward(given: Operands) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return F.scaled_dot_product_attention(given["query"], given["key"], given["value"], **options)

    return forward


def _cuda_only(problem: Problem) -> str | None:
    return None if problem.cuda else CUDA_ONLY


# --- common implementations


def _naive(problem: Problem) -> Callable[[Operands], Tensor]:
    mask = problem.shape.mask(problem.device)
    return lambda given: naive.attention(**given, mask=mask)


def joined(given: Operands) -> tuple[Tensor, Tensor]:
    """``[P'_k ; k], [P'_v ; v]`` for every row of the batch, gate and scale applied."""
    batch = given["query"].shape[0]
    weights = given["layer_scale"] * (1.0 if given["gate"] is None else torch.sigmoid(given["gate"]))
    weights = weights[:, 0] if weights.ndim == 3 else weights  # one query a row
    weights = weights[..., None] if weights.ndim == 1 else weights[:, None, :, None]
    parts = []
    for prefix, tokens in (("prefix_key", "key"), ("prefix_value", "value")):
        scaled = (given[prefix] * weights).to(given[tokens].dtype)
        parts.append(torch.cat([scaled.expand(batch, -1, -1, -1), given[tokens]], dim=2))
    return tuple(parts)


def _concat_flash(problem: Problem) -> Callable[[Operands], Tensor]:
    """Concatenation with the flash kernel's own bottom-right causality: the prefix is seen by every query."""
    from torch.nn.attention.bias import causal_lower_right

    shape = problem.shape
    bias = causal_lower_right(shape.tokens, shape.keys + shape.length) if shape.causal else None

    def forward(given: Operands) -> Tensor:
        key, value = joined(given)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                given["query"], key, value, attn_mask=bias, enable_gqa=problem.grouped
            )

    return forward


def _concat_flash_obstacle(problem: Problem) -> str | None:
    if problem.shape.gate_per_query:
        return PER_QUERY
    if problem.shape.padded:
        return "the flash kernel takes no padding mask"
    if problem.cuda or not problem.shape.causal:
        return None
    return "the CPU's flash kernel has no bottom-right causality"


def _concat_on(backend: SDPBackend, problem: Problem) -> Callable[[Operands], Tensor]:
    """Concatenation on one of PyTorch's kernels, with a copy of keys and values for each query head.

    The memory-efficient kernel, which takes no grouped heads, is what GPUs before compute capability 8.0 have.
    """
    group, mask = problem.shape.heads // problem.shape.kv_heads, problem.shape.mask(problem.device)
    heads = {"key": 1, "value": 1, "prefix_key": 0, "prefix_value": 0}

    def forward(given: Operands) -> Tensor:
        copies = {name: given[name].repeat_interleave(group, dim=dim) for name, dim in heads.items() if group > 1}
        with sdpa_kernel(backend):
            return naive.attention(**{**given, **copies}, mask=mask)

    return forward


def _concat_efficient_obstacle(problem: Problem) -> str | None:
    return PER_QUERY if problem.shape.gate_per_query else _cuda_only(problem)


def _in_cache(problem: Problem) -> Callable[[Operands], Tensor]:
    """Decoding after a prompt that put the prefix into the cache, a copy a row: only the stock kernel is left."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(given: Operands) -> Tensor:
        if id(given["key"]) not in made:
            made[id(given["key"])] = joined(given)
        return F.scaled_dot_product_attention(given["query"], *made[id(given["key"])], enable_gqa=problem.grouped)

    return forward


def _in_cache_obstacle(problem: Problem) -> str | None:
    if problem.shape.kind != "decode":
        return "decoding only"
    return "does not apply: the gate changes with every token" if problem.shape.gate == "query" else None


def _flex(problem: Problem) -> Callable[[Operands], Tensor]:
    """Compiled FlexAttention on the concatenation, its block mask built once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape, padding = problem.shape, problem.shape.key_padding(problem.device)
    shift = shape.keys - shape.tokens

    def visible(b, h, q, k):
        column = k - shape.length
        seen = column < shape.keys
        if shape.causal:
            seen = seen & (column <= q + shift)
        if padding is not None:
            seen = seen & padding[b, column.clamp(min=0)]
        return seen | (column < 0)

    batch = shape.batch if shape.padded else None
    block_mask = create_block_mask(
        visible, batch, None, shape.tokens, shape.keys + shape.length, device=problem.device.type
    )
    compiled = torch.compile(flex_attention)

    def forward(given: Operands) -> Tensor:
        key, value = joined(given)
        return compiled(given["query"], key, value, block_mask=block_mask, enable_gqa=problem.grouped)

    return forward


def _flex_obstacle(problem: Problem) -> str | None:
    if problem.shape.gate_per_query:
        return PER_QUERY
    return None if problem.cuda else "compiled FlexAttention has no backward on the CPU"


# --- ours


def _ours(implementation: str, problem: Problem) -> Callable[[Operands], Tensor]:
    mask = problem.shape.mask(problem.device)
    return lambda given: apt_kernels.attention(**given, mask=mask, implementation=implementation)


def _inputs(problem: Problem):
    """The op's inputs, for questions about them."""
    given = {n: None if t is None else t.detach() for n, t in operands(problem.leaves(0)).items()}
    return make_inputs(**given, mask=problem.shape.mask(problem.device))


def _obstacle(implementation: str, problem: Problem) -> str | None:
    backend, shape = choose.load(implementation), problem.shape
    if implementation == "reference":
        scores = shape.batch * shape.heads * shape.tokens * (shape.keys + shape.length)
        if scores > REFERENCE_SCORES:
            return f"the specification materialises {scores:,} scores; it is measured up to {REFERENCE_SCORES:,}"
    return backend.obstacle() or backend.obstacle_for(_inputs(problem))


def _strategy(implementation: str, problem: Problem) -> str:
    return choose.load(implementation).strategy(_inputs(problem))


def _forced_obstacle(implementation: str, strategy: str, problem: Problem) -> str | None:
    obstacle = _obstacle(implementation, problem)
    if obstacle is None and _strategy(implementation, problem) == strategy:
        return f"what ours:{implementation} chooses here"
    if obstacle is None and implementation == "triton" and strategy in stock.KERNELS:
        return stock.KERNELS[strategy].obstacle(_inputs(problem))
    if obstacle is None and strategy == "concat":
        if problem.shape.gate_per_query:
            return PER_QUERY
        both = problem.shape.causal and problem.shape.padded
        return "its mask under causality has no place for padding" if both else None
    return obstacle


def _forced(implementation: str, strategy: str) -> AbstractContextManager:
    return mock.patch.object(choose.load(implementation), "strategy", return_value=strategy)


def _own_peers() -> list[Peer]:
    found = []
    for name in choose.names():
        found.append(
            Peer(f"ours:{name}", partial(_ours, name), partial(_obstacle, name), note=partial(_strategy, name))
        )
        for strategy in STRATEGIES.get(name, ()):
            found.append(
                Peer(
                    f"ours:{name}:{strategy}",
                    partial(_ours, name),
                    partial(_forced_obstacle, name, strategy),
                    around=partial(_forced, name, strategy),
                )
            )
    return found


def _float32_obstacle(problem: Problem) -> str | None:
    return None if problem.shape.dtype else "beside the cases of the stage half only"


def _whole_model(problem: Problem) -> str:
    return "whole models only: see the stages training and generation"


def peers() -> list[Peer]:
    """All peers, in the order of the table."""
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found = [Peer("no_prefix", partial(_stock, None), has_prefix=False)]
    found += [Peer(f"no_prefix:{n}", partial(_stock, b), _cuda_only, has_prefix=False) for n, b in backends.items()]
    found += [Peer("naive", _naive), Peer("concat_flash", _concat_flash, _concat_flash_obstacle)]
    efficient = partial(_concat_on, SDPBackend.EFFICIENT_ATTENTION)
    found += [Peer("concat_efficient", efficient, _concat_efficient_obstacle)]
    found += [Peer("in_cache", _in_cache, _in_cache_obstacle)]
    found += _own_peers()
    found.append(Peer("float32", partial(_ours, "auto"), _float32_obstacle, dtype=torch.float32))
    found.append(Peer("flex", _flex, _flex_obstacle))  # last: it compiles, and a stage's time may be over
    return [*found, Peer("peft", _naive, _whole_model)]
