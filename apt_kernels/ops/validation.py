"""Validation of the op's arguments, and their conversion to `Inputs`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, its_type
from ..impl.inputs import Inputs
from ..mask import Mask, check_place
from . import rows
from .values import check_integers, check_range

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# Keywords of `torch.nn.functional.scaled_dot_product_attention`, and what to use instead.
_OF_SDPA = {
    "attn_mask": "mask=Mask(dense=...) for a bool mask, mask=Mask(bias=...) for one that is added",
    "is_causal": "mask=Mask(causal=True), with query_offset=0 where there are more keys than queries",
    "enable_gqa": "nothing: grouped heads follow from the shapes",
}


def refuse(others: dict) -> None:
    """Raise `ArgumentError` for keywords that `attention` does not have."""
    name = next(iter(others))
    instead = f"; use {_OF_SDPA[name]}" if name in _OF_SDPA else "; see help(apt_kernels.attention)"
    raise ArgumentError(f"attention has no argument {name!r}{instead}")


def make_inputs(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    gate=None,
    layer_scale=None,
    *,
    mask=None,
    gate_index=None,
    prefix_index=None,
    prefix_lengths=None,
    scale=None,
    softcap=None,
    sinks=None,
    dropout_p=0.0,
    seed=None,
    **others,
) -> Inputs:
    """Validate `attention`'s arguments and convert them to `Inputs`."""
    if others:
        refuse(others)
    if gate_index is prefix_index is prefix_lengths is sinks is softcap is seed is None and dropout_p == 0:
        x = _ordinary(query, key, value, prefix_key, prefix_value, gate, layer_scale, mask, scale, dropout_p)
        if x is not None:
            return x
    named = ("query", query), ("key", key), ("value", value), ("prefix_key", prefix_key), ("prefix_value", prefix_value)
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name} is {its_type(tensor)}; it needs a torch.Tensor")
        check_place(name, tensor, query.device)
    query, key, value, prefix_key, prefix_value = _cast(query, key, value, prefix_key, prefix_value)
    _check_core(query, key, value, prefix_key, prefix_value, prefix_index is not None)
    batch, heads, queries, head_dim = query.shape
    keys, length, device = key.shape[2], prefix_key.shape[-2], query.device
    if mask is None:
        mask = Mask()
    elif isinstance(mask, Mask):
        mask.check(batch, heads, queries, keys, device)
    else:
        raise ArgumentError(f"mask is {its_type(mask)}; it needs an apt_kernels.Mask or None")
    prefix_index, prefix_lengths = rows.check(prefix_index, prefix_lengths, prefix_key, batch, queries, device)
    adapters = 1 if prefix_index is None else prefix_key.shape[0]
    gate_index = rows.without_ignored(gate_index, prefix_index)
    gate, gate_index = _gate(gate, gate_index, batch, queries, length, device)
    if sinks is not None:
        _check_float("sinks", sinks, (heads,), device)
    return Inputs(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        gate=gate,
        layer_scale=_layer_scale(layer_scale, adapters, device),
        sinks=sinks,
        gate_index=gate_index,
        seed=_seed(dropout_p, seed, device),
        prefix_index=prefix_index,
        prefix_lengths=prefix_lengths,
        scale=head_dim**-0.5 if scale is None else _finite("scale", scale),
        softcap=_softcap(softcap),
        dropout_p=float(dropout_p),
        **_of_mask(mask, keys - queries),
    )


def _of_mask(mask: Mask, default_offset: int) -> dict[str, Any]:
    """The fields of `Inputs` that a mask gives."""
    offset, query_offset = _offset(mask, default_offset)
    window_left, window_right = mask.window_sizes
    return {
        "bias": _four_d(mask.bias),
        "dense": _four_d(mask.dense),
        "key_padding": mask.key_padding,
        "query_segments": mask.query_segments,
        "key_segments": mask.key_segments,
        "query_offset": query_offset,
        "offset": offset,
        "causal": bool(mask.causal),
        "window_left": window_left,
        "window_right": window_right,
    }


def _ordinary(query, key, value, prefix_key, prefix_value, gate, layer_scale, mask, scale, dropout_p) -> Inputs | None:
    """The `Inputs` of an ordinary call on a CPU; None: something is not ordinary, and may be wrong.

    It accepts only what the checks of each argument accept, with the same result, in a third of their time, which they
    take in every layer of a decoding step (bench/NOTES.md).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if not _all_plain(query, key, value, prefix_key, prefix_value) or torch.is_autocast_enabled("cpu"):
        return None
    shape, key_shape, value_shape, prefix_shape = query.shape, key.shape, value.shape, prefix_key.shape
    if not (len(shape) == len(key_shape) == len(value_shape) == 4 and len(prefix_shape) == 3):
        return None
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _), length = shape, key_shape, prefix_shape[1]
    value_dim, dtype = value_shape[3], query.dtype
    if not (batch and heads and queries and head_dim and kv_heads and keys and length and value_dim):
        return None
    fits = (
        heads % kv_heads == 0
        and key_shape == (batch, kv_heads, keys, head_dim)
        and value_shape == (batch, kv_heads, keys, value_dim)
        and prefix_shape == (kv_heads, length, head_dim)
        and prefix_value.shape == (kv_heads, length, value_dim)
        and dtype in _DTYPES
        and key.dtype == value.dtype == dtype
        and prefix_key.dtype in (torch.float32, dtype)
        and prefix_value.dtype in (torch.float32, dtype)
        and (layer_scale is None or (_is_side(layer_scale) and layer_scale.shape == (1,)))
        and type(dropout_p) is float
        and (scale is None or (type(scale) is float and math.isfinite(scale)))
    )
    if not fits:
        return None
    if gate is not None:
        gate = _three_d(gate, batch, queries, length) if _is_side(gate) else None
        if gate is None:
            return None
    if mask is None:
        mask = _NO_MASK
    elif type(mask) is not Mask:
        return None
    else:
        mask.check(batch, heads, queries, keys, query.device)
    return Inputs(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        gate=gate,
        layer_scale=layer_scale,
        scale=head_dim**-0.5 if scale is None else scale,
        **_of_mask(mask, keys - queries),
        **_ABSENT,
    )


# What an ordinary call has not.
_ABSENT: dict[str, Any] = {
    **dict.fromkeys(("sinks", "gate_index", "seed", "prefix_index", "prefix_lengths")),
    **dict.fromkeys(("softcap", "dropout_p"), 0.0),
}
_NO_MASK = Mask()


def _all_plain(query, key, value, prefix_key, prefix_value) -> bool:
    """Whether all are plain dense tensors on the CPU."""
    if not (type(query) is type(key) is type(value) is Tensor and _plain(prefix_key) and _plain(prefix_value)):
        return False
    if not (query.is_cpu and key.is_cpu and value.is_cpu and prefix_key.is_cpu and prefix_value.is_cpu):
        return False
    return query.layout == key.layout == value.layout == prefix_key.layout == prefix_value.layout == torch.strided


def _plain(tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _is_side(tensor) -> bool:
    """Whether it is a plain floating-point tensor on the CPU."""
    return _plain(tensor) and tensor.is_cpu and tensor.layout is torch.strided and tensor.dtype in _DTYPES


def _cast(query: Tensor, key: Tensor, value: Tensor, *prefix: Tensor) -> list[Tensor]:
    """Under autocast, activations are cast to its dtype, as in ``scaled_dot_product_attention``.

    The prefix stays as it is, or becomes float32 where it is in another half-precision dtype than the activations: as
    in a model that was cast after the patch and attends in float32.
    """
    tokens, kind = [query, key, value], query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and all(t.dtype != torch.float64 for t in (*tokens, *prefix)):
        tokens = [t.to(torch.get_autocast_dtype(kind)) for t in tokens]
    dtype, half = tokens[0].dtype, (torch.float16, torch.bfloat16)
    return [*tokens, *[t.float() if t.dtype != dtype and t.dtype in half else t for t in prefix]]


def _check_core(query, key, value, prefix_key, prefix_value, by_row: bool) -> None:
    # Every attribute is read once: this runs in each layer of a decoding step.
    shape, key_shape, value_shape, dtype = query.shape, key.shape, value.shape, query.dtype
    if len(shape) != 4:
        raise ArgumentError(f"query has shape {list(shape)}; it needs [B, Hq, T, D]")
    if dtype not in _DTYPES:
        raise ArgumentError(f"query has dtype {dtype}; it needs float32, float64, bfloat16 or float16")
    batch, heads, _, head_dim = shape
    if len(key_shape) != 4 or key_shape[0] != batch or key_shape[3] != head_dim:
        raise ArgumentError(f"key has shape {list(key_shape)}; it needs [B, Hkv, S, D] = [{batch}, Hkv, S, {head_dim}]")
    kv_heads, keys = key_shape[1], key_shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(f"key has {kv_heads} heads; it needs a number that divides the query's {heads}")
    if len(value_shape) != 4 or value_shape[:3] != key_shape[:3]:
        raise ArgumentError(
            f"value has shape {list(value_shape)}; it needs [B, Hkv, S, Dv] = [{batch}, {kv_heads}, {keys}, Dv]"
        )
    rows.check_prefix(prefix_key, prefix_value, kv_heads, head_dim, value_shape[3], by_row)
    sizes = (("query", shape), ("key", key_shape), ("value", value_shape), ("prefix_key", prefix_key.shape))
    for name, size in sizes:
        if 0 in size:
            raise ArgumentError(f"{name} has shape {list(size)}; every size needs to be at least 1")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != dtype:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs the query's, {dtype}")
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if tensor.dtype != dtype and tensor.dtype != torch.float32:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs float32 or the query's, {dtype}")


def _check_float(name: str, tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name} is {its_type(tensor)}; it needs a torch.Tensor of shape {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name} has shape {list(tensor.shape)}; it needs {list(shape)}")
    if tensor.dtype not in _DTYPES:
        raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs float32, float64, bfloat16 or float16")
    check_place(name, tensor, device)


def _gate(gate, gate_index, batch: int, queries: int, length: int, device) -> tuple[Tensor | None, Tensor | None]:
    if gate is None:
        if gate_index is not None:
            raise ArgumentError("gate_index is given without gate; it needs gate [G, M]")
        return None, None
    if not isinstance(gate, Tensor):
        raise ArgumentError(f"gate is {its_type(gate)}; it needs a torch.Tensor of logits")
    check_place("gate", gate, device)
    if gate_index is not None:
        if gate.ndim != 2 or gate.shape[1] != length or gate.shape[0] == 0:
            raise ArgumentError(f"gate has shape {list(gate.shape)}; beside gate_index it needs [G, M] = [G, {length}]")
        _check_float("gate", gate, tuple(gate.shape), device)
        return gate, _gate_index(gate_index, gate.shape[0], batch, queries, device)
    rows = _three_d(gate, batch, queries, length)
    if rows is None:
        raise ArgumentError(
            f"gate has shape {list(gate.shape)}; it needs [M] = [{length}], [B, M] = [{batch}, {length}], "
            f"[B, T, M] = [{batch}, {queries}, {length}], or [G, {length}] with gate_index"
        )
    _check_float("gate", gate, tuple(gate.shape), device)
    return rows, None


def _three_d(gate: Tensor, batch: int, queries: int, length: int) -> Tensor | None:
    """Logits ``[M]``, ``[B, M]`` or ``[B, T, M]`` as ``[B|1, T|1, M]``; None: they have another shape."""
    # By the number of axes first: tuples of two lengths are compared by element, which guards unrelated sizes.
    shapes = {1: (length,), 2: (batch, length), 3: (batch, queries, length)}
    if tuple(gate.shape) != shapes.get(gate.ndim):
        return None
    return gate.view(1, 1, -1) if gate.ndim == 1 else gate.unsqueeze(1) if gate.ndim == 2 else gate


def _gate_index(index, rows: int, batch: int, queries: int, device) -> Tensor:
    check_integers("gate_index", index)
    if tuple(index.shape) not in ((batch,), (batch, queries)):
        raise ArgumentError(
            f"gate_index has shape {list(index.shape)}; it needs [B] = [{batch}] or [B, T] = [{batch}, {queries}]"
        )
    check_place("gate_index", index, device)
    check_range("gate_index", index, 0, rows - 1, f"gate has {rows} rows")
    index = index.to(torch.int64)
    return index[:, None] if index.ndim == 1 else index


def _layer_scale(layer_scale, adapters: int, device) -> Tensor | None:
    if layer_scale is None:
        return None
    if isinstance(layer_scale, (int, float)):
        return torch.full((1,), _finite("layer_scale", layer_scale), device=device)
    by_adapter = isinstance(layer_scale, Tensor) and tuple(layer_scale.shape) == (adapters,)
    if not isinstance(layer_scale, Tensor) or (layer_scale.numel() != 1 and not by_adapter):
        has = f"has shape {list(layer_scale.shape)}" if isinstance(layer_scale, Tensor) else f"is {layer_scale!r}"
        also = f", or [A] = [{adapters}]" if adapters > 1 else ""
        raise ArgumentError(f"layer_scale {has}; it needs a number or a tensor of one element{also}")
    _check_float("layer_scale", layer_scale, tuple(layer_scale.shape), device)
    return layer_scale if layer_scale.ndim == 1 else layer_scale.reshape(-1)


def _four_d(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim < 4 else tensor


def _offset(mask: Mask, default: int) -> tuple[int, Tensor | None]:
    if mask.query_offset is None:
        return default, None
    if isinstance(mask.query_offset, Tensor):
        return 0, mask.query_offset.reshape(-1).to(torch.int64)
    return mask.query_offset, None


def _seed(dropout_p, seed, device) -> Tensor | None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ArgumentError(f"dropout_p is {dropout_p!r}; it needs a number in [0, 1)")
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ArgumentError(f"seed has shape {list(seed.shape)}, dtype {seed.dtype}; it needs one int64 element")
        check_place("seed", seed, device)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise ArgumentError(f"seed is {seed!r}; it needs a 64-bit int, a one-element int64 tensor, or None")
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return seed.reshape(1) if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


def _softcap(softcap) -> float:
    if softcap is None:
        return 0.0
    softcap = _finite("softcap", softcap)
    if softcap < 0:
        raise ArgumentError(f"softcap is {softcap}; it needs a number >= 0 (0 or None: off)")
    return softcap


def _finite(name: str, number):
    if torch.compiler.is_compiling() and isinstance(number, (float, torch.SymFloat)):
        return number  # with dynamic shapes, a float of the model is symbolic and has no value while it is traced
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ArgumentError(f"{name} is {number!r}; it needs a finite number")
    return float(number)
