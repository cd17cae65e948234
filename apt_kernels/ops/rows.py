"""Validation of a prefix for each row or query: ``prefix_index`` and what belongs to it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..mask import check_place
from .values import check_integers, check_range


def check_prefix(
    prefix_key: Tensor, prefix_value: Tensor, kv_heads: int, head_dim: int, value_dim: int, by_row: bool
) -> None:
    """Raise `ArgumentError` unless the prefix has the shapes of one, or those of A adapters if ``by_row``."""
    shape = tuple(prefix_key.shape)
    if not by_row and len(shape) == 4:
        raise ArgumentError(
            f"prefix_key has shape {list(shape)}; without prefix_index it needs [Hkv, M, D] = "
            f"[{kv_heads}, M, {head_dim}]. For prefixes of several adapters, give prefix_index [B]"
        )
    if len(shape) != 3 + by_row or shape[-3] != kv_heads or shape[-1] != head_dim:
        lead = "A, " if by_row else ""
        raise ArgumentError(
            f"prefix_key has shape {list(shape)}; it needs [{lead}Hkv, M, D] = [{lead}{kv_heads}, M, {head_dim}], "
            "with Hkv and D of key [B, Hkv, S, D]"
        )
    need = (*shape[:-1], value_dim)
    if tuple(prefix_value.shape) != need:
        raise ArgumentError(
            f"prefix_value has shape {list(prefix_value.shape)}; it needs [{'A, ' if by_row else ''}Hkv, M, Dv] = "
            f"{list(need)}"
        )


def check(index, lengths, prefix_key: Tensor, batch: int, queries: int, device) -> tuple[Tensor | None, Tensor | None]:
    """``prefix_index`` and ``prefix_lengths`` as `Inputs` holds them: both, or None and None."""
    if index is None:
        if lengths is not None:
            raise ArgumentError("prefix_lengths is given without prefix_index; it needs prefix_index [B]")
        return None, None
    adapters, length = prefix_key.shape[0], prefix_key.shape[2]
    check_integers("prefix_index", index)
    if tuple(index.shape) != ((batch,) if index.ndim == 1 else (batch, queries)):
        raise ArgumentError(
            f"prefix_index has shape {list(index.shape)}; it needs [B] = [{batch}], one adapter for each batch row, or "
            f"[B, T] = [{batch}, {queries}], one for each query"
        )
    check_place("prefix_index", index, device)
    check_range("prefix_index", index, -1, adapters - 1, f"-1: no prefix; prefix_key has {adapters} adapters")
    if lengths is None:
        return index.to(torch.int64), torch.full((adapters,), length, dtype=torch.int64, device=device)
    check_integers("prefix_lengths", lengths)
    if tuple(lengths.shape) != (adapters,):
        raise ArgumentError(f"prefix_lengths has shape {list(lengths.shape)}; it needs [A] = [{adapters}]")
    check_place("prefix_lengths", lengths, device)
    check_range("prefix_lengths", lengths, 0, length, f"prefix_key has {length} columns")
    return index.to(torch.int64), lengths.to(torch.int64)


def without_ignored(gate_index, index: Tensor | None):
    """``gate_index`` with a valid value in the rows (or queries) without a prefix, where it is ignored."""
    if index is None or not isinstance(gate_index, Tensor) or gate_index.shape[:1] != index.shape[:1]:
        return gate_index
    absent = index < 0
    if absent.ndim > gate_index.ndim:
        absent = absent.all(1)
    elif absent.ndim < gate_index.ndim:
        absent = absent[:, None]
    return gate_index.masked_fill(absent, 0) if absent.ndim == gate_index.ndim else gate_index
