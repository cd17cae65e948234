"""Check results by the tests' error rule before they are timed, block by block, so that long sequences fit in memory.

The truth is the reference in float64; the reference in the inputs' dtype gives the scale of rounding errors. Both are
computed for some batch rows, one key head and some queries at a time: rows of a softmax do not depend on one another,
and what several blocks contribute to is summed in float64 and rounded once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apt_kernels.impl import reference
from apt_kernels.impl.inputs import Inputs
from apt_kernels.ops.validation import make_inputs
from bench.common.machine import ROOT

from .shapes import Shape

sys.path.append(str(ROOT / "tests"))  # the error rule is in tests/helpers/accuracy.py only
from helpers.accuracy import absolute_terms, allowance, evaluate, upcast

# Scores of one block; about thirty float64 tensors of that many elements exist at once.
_BLOCK = {"cpu": 1 << 21, "cuda": 1 << 27}
_PREFIX = ("prefix_key", "prefix_value", "gate", "layer_scale")


class Wrong(AssertionError):
    """A result that breaks the error rule; the message names it and by how much."""


@dataclass(frozen=True)
class Expected:
    """The truth for one shape and one set of inputs, and the allowed errors."""

    truth: dict[str, Tensor]
    allowed: dict[str, Tensor]

    def check(self, found: dict[str, Tensor]) -> float:
        """The largest error divided by the allowed one; raises `Wrong` above 1, or if a result is missing."""
        if set(found) != set(self.truth):
            raise Wrong(f"results are {sorted(found)}; expected {sorted(self.truth)}")
        worst = 0.0
        for name, truth in self.truth.items():
            error = (found[name].double().reshape(truth.shape) - truth).abs()
            # A NaN is an error beyond every allowance.
            part = torch.where(error == 0, 0.0, error / self.allowed[name]).nan_to_num(torch.inf).max().item()
            if part > 1:
                raise Wrong(f"{name} is off by {error.max():.3g}, {part:.3g} of what is allowed")
            worst = max(worst, part)
        return worst


def expected(
    shape: Shape, given: dict[str, Tensor | None], grad_out: Tensor, has_prefix: bool, gradients: bool
) -> Expected:
    """For operands as `shapes.operands` gives them; ``has_prefix`` False: the same attention without any prefix."""
    x = _detached(make_inputs(**given, mask=shape.mask(grad_out.device)))
    if not has_prefix:
        nothing = x.prefix_key[:, :0]
        x = replace(x, prefix_key=nothing, prefix_value=nothing, gate=None, layer_scale=None)
    wanted = [name for name in ("query", "key", "value", *_PREFIX) if getattr(x, name) is not None]
    wanted = [name for name in wanted if has_prefix or name not in _PREFIX] if gradients else []
    sums = {kind: _zeros(x, grad_out, wanted) for kind in ("truth", "eager", "terms")}
    for block in _blocks(x):
        own, grad = block.of(x), block.part("out", grad_out)
        exact = upcast(own)
        truth = evaluate(reference.attend, exact, wanted, grad.double(), None)
        eager = evaluate(reference.attend, own, wanted, grad, None)
        with torch.no_grad():
            terms = absolute_terms(exact, truth["out"], truth["logsumexp"], grad.double(), None)
        for kind, results in (("truth", truth), ("eager", eager), ("terms", terms)):
            for name, whole in sums[kind].items():
                view = block.part(name, whole)
                view.add_(results[name].reshape(view.shape).double())
    allowed = {}
    for name, truth in sums["truth"].items():
        dtype = grad_out.dtype if name == "out" else getattr(x, name).dtype
        allowed[name] = allowance(x, truth, sums["eager"][name].to(dtype), sums["terms"][name])
    return Expected(sums["truth"], allowed)


def results(
    out: Tensor,
    given: dict[str, Tensor | None],
    grad_out: Tensor,
    has_prefix: bool,
    gradients: bool,
    backward: Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, ...]],
) -> dict[str, Tensor]:
    """A peer's results under the names that `Expected.check` takes; ``given`` are the operands it was called with."""
    found = {"out": out.detach()}
    names = [n for n, t in given.items() if t is not None and (has_prefix or n not in _PREFIX)] if gradients else []
    if names:
        found.update(zip(names, backward(out, [given[name] for name in names], grad_out)))
    return found


@dataclass(frozen=True)
class _Block:
    """Some batch rows, one key head with its query heads, some queries."""

    rows: slice
    head: slice
    heads: slice
    queries: slice

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The block's part of a tensor, as a view; the whole tensor if every block uses all of it."""
        if name in ("query", "out"):
            return tensor[self.rows, self.heads, self.queries]
        if name in ("key", "value"):
            return tensor[self.rows, self.head]
        if name in ("prefix_key", "prefix_value"):
            return tensor[self.head]
        if name == "gate":
            tensor = tensor if tensor.shape[0] == 1 else tensor[self.rows]
            return tensor if tensor.shape[1] == 1 else tensor[:, self.queries]
        return tensor

    def of(self, x: Inputs) -> Inputs:
        names = ("query", "key", "value", "prefix_key", "prefix_value", "gate")
        parts = {name: self.part(name, getattr(x, name)) for name in names if getattr(x, name) is not None}
        padding = None if x.key_padding is None else x.key_padding[self.rows]
        return replace(x, **parts, key_padding=padding, offset=x.offset + self.queries.start)


def _blocks(x: Inputs) -> Iterator[_Block]:
    batch, heads, kv_heads, queries, keys, length, _, _ = x.sizes
    group, most = heads // kv_heads, _BLOCK.get(x.query.device.type, 1 << 21)
    row = group * (length + keys)
    some_queries = max(1, min(queries, most // row))
    some_rows = max(1, min(batch, most // (row * some_queries)))
    for h in range(kv_heads):
        for b in range(0, batch, some_rows):
            for t in range(0, queries, some_queries):
                yield _Block(
                    slice(b, min(b + some_rows, batch)),
                    slice(h, h + 1),
                    slice(h * group, (h + 1) * group),
                    slice(t, min(t + some_queries, queries)),
                )


def _detached(x: Inputs) -> Inputs:
    return replace(x, **{name: t.detach() for name, t in x.__dict__.items() if isinstance(t, Tensor)})


def _zeros(x: Inputs, grad_out: Tensor, wanted: list[str]) -> dict[str, Tensor]:
    like = {"out": grad_out, **{name: getattr(x, name) for name in wanted}}
    return {name: torch.zeros_like(t, dtype=torch.float64) for name, t in like.items()}
