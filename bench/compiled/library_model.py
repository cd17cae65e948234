"""The issue model of the CUDA library, and lower bounds of what its users have without it. Predictions, not measured.

The peer is ``concat_efficient`` of `bench.speed.peers`: the prefix is expanded over the batch and concatenated to keys
and values, and PyTorch's memory-efficient attention takes them. Nothing here counts that kernel's instructions, and no
published rate of these chips is at hand, so that only its least time is known: the products at the peak of the tensor
cores, every tensor moved once, and the launches. With the prefix in front, causality is a dense mask, which hides no
product.
"""

from __future__ import annotations

from bench.speed.shapes import Shape

from . import cuda_rates
from .issue_model import (
    Chip,
    Work,
    bytes_of_tensors,
    counted,
    exponentials_of_prefix,
    key_elements,
    query_elements,
    work_of,
)

COMPILER = "nvcc"
# Launches of the backward without a loop of products: delta, and PyTorch's sums of the prefix's three partial sums.
_OTHER_LAUNCHES = 4
_LOOPS = {"none": "prefix, gate per row", "row": "prefix, gate per row", "query": "prefix, gate per query"}


def _count(chip: Chip, shape: Shape, kernel: str, loop: str) -> float:
    return counted(f"{chip.library} D{shape.dim} plain {kernel} {loop}", COMPILER)


def _tokens(chip: Chip, shape: Shape, kernel: str, whole: int, masked: int) -> list[tuple[float, float, int]]:
    parts = [(whole, "tokens"), (masked, "tokens, edge")]
    return [(elements, _count(chip, shape, kernel, loop), 1) for elements, loop in parts if elements]


def _prefix(chip: Chip, shape: Shape, kernel: str, columns: int) -> tuple[float, float, int]:
    """The prefix's part; its last tile is computed whole."""
    elements = shape.batch * shape.heads * shape.tokens * -(-shape.length // columns) * columns
    return elements, _count(chip, shape, kernel, _LOOPS[shape.gate]), exponentials_of_prefix(shape)


def library(shape: Shape, chip: Chip, which: str) -> list[Work]:
    """The straight loops' work in a pass. The order of the blocks is not simulated.

    Raises:
        NotCountedError: one of its loops was not counted, as where the general loops compute it.
    """
    query, key, prefix = bytes_of_tensors(shape)

    def over_queries(kernel: str, products: int, moved: float) -> Work:
        columns = cuda_rates.columns(kernel, shape.dim)
        elements = query_elements(shape, cuda_rates.ROWS, columns)
        parts = [*_tokens(chip, shape, kernel, *elements), _prefix(chip, shape, kernel, columns)]
        return work_of(shape, products, parts, moved)

    if which == "forward":
        return [over_queries("plain_forward", 2, 2 * (query + key) + prefix)]
    # A block owns keys, or columns of the prefix, and takes tiles of queries.
    kernel = "plain_key_gradient"
    elements = key_elements(shape, cuda_rates.columns(kernel, shape.dim), cuda_rates.ROWS)
    of_prefix = _prefix(chip, shape, f"{kernel} (prefix)", cuda_rates.ROWS)
    return [
        over_queries("plain_query_gradient", 3, 3 * query + 2 * key + prefix),
        work_of(shape, 4, _tokens(chip, shape, kernel, *elements), 2 * query + 4 * key),
        work_of(shape, 4, [of_prefix], 2 * query + prefix),
        Work(moved=2 * query, launches=_OTHER_LAUNCHES),
    ]


def concatenated(shape: Shape, chip: Chip, which: str) -> list[Work]:
    """The least work of concatenation and memory-efficient attention in a pass."""
    query, key, prefix = bytes_of_tensors(shape)
    joined = key * (shape.keys + shape.length) // shape.keys
    pairs = shape.batch * shape.heads * shape.tokens * (shape.keys + shape.length)
    if which == "forward":
        copies = Work(moved=prefix + 2 * (key + joined), launches=2)
        return [copies, Work(multiply_adds=2 * shape.dim * pairs, moved=2 * (query + joined))]
    # The gradients of keys and values are views of the concatenation's; the prefix's are summed over the batch.
    sums = Work(moved=2 * (joined - key) + prefix, launches=2)
    return [Work(multiply_adds=5 * shape.dim * pairs, moved=4 * (query + joined)), sums]
