"""A counter-based random stream for attention dropout, the same in every implementation.

The element of batch row ``b``, query head ``h``, query ``t`` and column ``j`` (prefix columns ``0..M-1``, then token
columns ``M..M+S-1``) is kept iff ``mix(row_key ^ (j * 0x9E3779B9)) >> 8 >= round(p * 2^24)``, all in unsigned 32-bit
arithmetic, with ``row_key = mix(mix(mix(seed_low) ^ seed_high) + b * Hq + h), then mix(. + t)``. ``mix`` is the
two-multiply finaliser of C. Wellons ("hash-prospector", lowbias32). Nothing depends on tiles, so any kernel may
recompute any element.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_STEP = 0x9E3779B9
MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_LOW = 0xFFFFFFFF


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _constant(value: int) -> Tensor:
    return torch.tensor(_signed(value), dtype=torch.int32, device="cpu")


# Tensors, since a Python number would be converted to one at every call.
_SHIFTS = {n: (_constant(n), _constant((1 << (32 - n)) - 1)) for n in (8, 15, 16)}
_FIRST, _SECOND = map(_constant, MIX_MULTIPLIERS)
_STEP, _SIGN = _constant(COLUMN_STEP), _constant(31)


def _shift(x: Tensor, n: int, out: Tensor) -> Tensor:
    """The unsigned shift, which torch does not have: an arithmetic one with the sign bits masked off."""
    places, left = _SHIFTS[n]
    return torch.bitwise_right_shift(x, places, out=out).bitwise_and_(left)


def _stir_(x: Tensor, scratch: Tensor) -> Tensor:
    """`mix` in place, up to its last step."""
    x.bitwise_xor_(_shift(x, 16, scratch)).mul_(_FIRST)
    return x.bitwise_xor_(_shift(x, 15, scratch)).mul_(_SECOND)


def mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser on int32 bit patterns."""
    scratch = torch.empty_like(x)
    x = _stir_(x.clone(), scratch)
    return x.bitwise_xor_(_shift(x, 16, scratch))


def threshold(p: float) -> int:
    """Columns whose 24-bit hash is below this are dropped."""
    return round(p * (1 << 24))


def row_keys(seed: Tensor, batch: int, heads: int, first: int, rows: int) -> Tensor:
    """int32 keys ``[B, Hq, rows]`` of the query rows ``first .. first + rows - 1``. ``seed``: int64 ``[1]``."""
    low = (seed.reshape(()) & _LOW).to(torch.int32)
    high = ((seed.reshape(()) >> 32) & _LOW).to(torch.int32)
    key = mix(mix(low) ^ high)
    head = torch.arange(batch * heads, device=seed.device, dtype=torch.int32).view(batch, heads, 1)
    row = torch.arange(first, first + rows, device=seed.device, dtype=torch.int32)
    return mix(mix(key + head) + row)


def keep_bits(keys: Tensor, columns: Tensor, p: float, out: Tensor, scratch: Tensor) -> Tensor:
    """Fill ``out``, int32 ``[..., columns]``, with -1 where a probability is kept and 0 where it is dropped.

    ``keys``: the `row_keys`, ``[...]``; ``columns``: int32, their numbers. ``scratch`` has the shape of ``out``.
    """
    torch.bitwise_xor(keys[..., None], columns * _STEP, out=out)
    # The last step on the 24 bits that decide: mix(x) >> 8 == y ^ (y >> 16) with y = x >> 8.
    _shift(_stir_(out, scratch), 8, out)
    out.bitwise_xor_(torch.bitwise_right_shift(out, _SHIFTS[16][0], out=scratch))
    torch.sub(threshold(p) - 1, out, out=out)
    return out.bitwise_right_shift_(_SIGN)


def keep_mask(
    seed: Tensor, p: float, batch: int, heads: int, first: int, rows: int, first_column: int, columns: int
) -> Tensor:
    """bool ``[B, Hq, rows, columns]``, True where the probability is kept."""
    keys = row_keys(seed, batch, heads, first, rows)
    column = torch.arange(first_column, first_column + columns, device=seed.device, dtype=torch.int32)
    bits = keys.new_empty(*keys.shape, columns)
    return keep_bits(keys, column, p, bits, torch.empty_like(bits)).bool()
