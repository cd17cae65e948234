"""Tile sizes, warps and pipeline stages: the only place where they stand.

One entry for a kernel, an architecture, the bytes of an element and the padded head size. ``rows`` counts queries,
``columns`` keys or prefix columns; the kernel's own tile stays in registers, the other is what it loops over.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

KERNELS = ("delta", "forward", "query", "key_value", "prefix", "gate", "bias", "index")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
WIDTHS = (2, 4, 8)
HEADS = (64, 128, 256)


# How many programs the prefix's gradient is spread over, at least; each leaves a partial sum.
PROGRAMS = 512


class Tile(NamedTuple):
    """How a kernel is cut: queries, keys, warps, stages."""

    rows: int
    columns: int
    warps: int
    stages: int


def padded(dim: int) -> int:
    """Head size as the kernels hold it: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def architecture(device: torch.device) -> str:
    """The table's name for a device."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in ARCHITECTURES else "gfx90a"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def tile(kernel: str, architecture: str, width: int, dim: int) -> Tile:
    """The entry that serves a head size."""
    if architecture == "interpreter":
        return _INTERPRETER[kernel]
    return Tile(32, 32, 4, 1)


# Small, so that small inputs have whole, partial and skipped tiles.
_INTERPRETER = {
    "delta": Tile(32, 1, 4, 1),
    "forward": Tile(16, 16, 4, 1),
    "query": Tile(16, 16, 4, 1),
    "key_value": Tile(16, 16, 4, 1),
    "prefix": Tile(16, 16, 4, 1),
    "gate": Tile(16, 16, 4, 1),
    "bias": Tile(16, 16, 4, 1),
    "index": Tile(32, 32, 4, 1),
}
