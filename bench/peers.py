"""Who is measured: attention without any prefix, the usual ways of having one, and ours. One small interface.

A peer is a function of a shape's tensors and mask that returns the output; `obstacle` says where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import apt_kernels
from apt_kernels import Mask, dispatch

from . import naive
from .shapes import Shape


@dataclass(frozen=True)
class Peer:
    """``run(tensors, mask, shape)``: the output; ``obstacle(shape, device)``: why it does not apply, or None."""

    name: str
    run: Callable[[dict, Mask | None, Shape], Tensor]
    obstacle: Callable[[Shape, torch.device], str | None]
    has_prefix: bool = True


def _always(shape: Shape, device) -> None:
    return None


def _bool_mask(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor | None:
    """The dense mask of attention without a prefix, where the stock kernel's own causality does not serve."""
    if mask is None or (shape.causal and not shape.padded and shape.tokens == shape.keys):
        return None
    return mask.visible(shape.batch, shape.tokens, shape.keys, tensors["query"].device)


def _stock(backend: SDPBackend | None):
    def run(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor:
        query, key, value = (tensors[name] for name in ("query", "key", "value"))
        dense = _bool_mask(tensors, mask, shape)
        options = {"attn_mask": dense, "is_causal": shape.causal and dense is None}
        options["enable_gqa"] = shape.heads != shape.kv_heads
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, **options)

    return run


def _ours(implementation: str):
    def run(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor:
        return apt_kernels.attention(**operands(tensors), mask=mask, implementation=implementation)

    def obstacle(shape: Shape, device) -> str | None:
        module = dispatch.load(implementation)
        if module.available():
            return module.available()
        probe = Shape(**{**shape.__dict__, "batch": 1, "tokens": 1, "keys": 1, "length": 1, "padded": False})
        return module.unsupported(apt_kernels.op.make_inputs(**operands(probe.tensors(device, torch.float32, 0))))

    return run, obstacle


def operands(tensors: dict) -> dict:
    """The op's arguments among a shape's tensors."""
    return {name: tensor for name, tensor in tensors.items() if name != "grad_out"}


def _naive(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor:
    return naive.attention(**operands(tensors), mask=mask)


def _joined(tensors: dict, shape: Shape) -> tuple[Tensor, Tensor]:
    weights = tensors["layer_scale"] * (1.0 if tensors["gate"] is None else torch.sigmoid(tensors["gate"]))
    weights = weights[..., None] if weights.ndim == 1 else weights[:, None, :, None]
    parts = []
    for prefix, tokens in (("prefix_key", "key"), ("prefix_value", "value")):
        scaled = (tensors[prefix] * weights).to(tensors[tokens].dtype)
        parts.append(torch.cat([scaled.expand(shape.batch, -1, -1, -1), tensors[tokens]], dim=2))
    return tuple(parts)


def _concat_flash(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor:
    """Concatenation with the flash kernel's own bottom-right causality: the prefix is seen by every query."""
    from torch.nn.attention.bias import causal_lower_right

    key, value = _joined(tensors, shape)
    query = tensors["query"]
    bias = causal_lower_right(shape.tokens, shape.keys + shape.length) if shape.causal else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, enable_gqa=shape.heads != shape.kv_heads
        )


def _concat_flash_obstacle(shape: Shape, device) -> str | None:
    if shape.gate == "query":
        return "does not apply: keys would differ by query"
    if shape.padded:
        return "the flash kernel takes no padding mask"
    return None if device.type == "cuda" else "a CUDA kernel"


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _block_mask(shape: Shape, device):
    from torch.nn.attention.flex_attention import create_block_mask

    mask, shift = shape.mask(device), shape.keys - shape.tokens
    padding = None if mask is None else mask.key_padding

    def visible(b, h, q, k):
        column = k - shape.length
        seen = column < shape.keys
        if shape.causal:
            seen = seen & (column <= q + shift)
        if padding is not None:
            seen = seen & padding[b, column.clamp(min=0)]
        return seen | (column < 0)

    batch = shape.batch if shape.padded else None
    return create_block_mask(visible, batch, None, shape.tokens, shape.keys + shape.length, device=device)


def _flex(tensors: dict, mask: Mask | None, shape: Shape) -> Tensor:
    key, value = _joined(tensors, shape)
    block_mask = _block_mask(shape, tensors["query"].device)
    gqa = shape.heads != shape.kv_heads
    return _compiled_flex()(tensors["query"], key, value, block_mask=block_mask, enable_gqa=gqa)


def _flex_obstacle(shape: Shape, device) -> str | None:
    if shape.gate == "query":
        return "does not apply: keys would differ by query"
    return None if device.type == "cuda" else "compiled FlexAttention has no backward on the CPU"


def _cuda_only(shape: Shape, device) -> str | None:
    return None if device.type == "cuda" else "a CUDA kernel"


def peers(device: torch.device) -> list[Peer]:
    """Everyone, in the table's order; obstacles are asked shape by shape."""
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    found = [Peer("no_prefix", _stock(None), _always, has_prefix=False)]
    found += [Peer(f"no_prefix:{name}", _stock(b), _cuda_only, has_prefix=False) for name, b in backends.items()]
    found += [
        Peer("naive", _naive, _always),
        Peer("concat_flash", _concat_flash, _concat_flash_obstacle),
        Peer("flex", _flex, _flex_obstacle),
    ]
    for name in dispatch.names():
        if name != "reference":
            run, obstacle = _ours(name)
            found.append(Peer(f"ours:{name}", run, obstacle))
    return found
