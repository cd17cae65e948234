"""One random stream for attention dropout, the same in every implementation, addressed by position.

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


def _mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """`mix` in place (torch has no unsigned shifts: the sign's copies are masked off)."""

    def fold(shift: int) -> None:
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))

    fold(16)
    x.mul_(_signed(MIX_MULTIPLIERS[0]))
    fold(15)
    x.mul_(_signed(MIX_MULTIPLIERS[1]))
    fold(16)
    return x


def mix(x: Tensor) -> Tensor:
    """The 32-bit finaliser on int32 bit patterns."""
    return _mix_(x.clone(), torch.empty_like(x))


def threshold(p: float) -> int:
    """Columns whose 24-bit hash lies below this are dropped."""
    return round(p * (1 << 24))


def row_keys(seed: Tensor, batch: int, heads: int, first: int, rows: int) -> Tensor:
    """int32 keys ``[B, Hq, rows]`` of the query rows ``first .. first + rows - 1``. ``seed``: int64 ``[1]``."""
    low = (seed.reshape(()) & _LOW).to(torch.int32)
    high = ((seed.reshape(()) >> 32) & _LOW).to(torch.int32)
    key = mix(mix(low) ^ high)
    head = torch.arange(batch * heads, device=seed.device, dtype=torch.int32).view(batch, heads, 1)
    row = torch.arange(first, first + rows, device=seed.device, dtype=torch.int32)
    return mix(mix(key + head) + row)


def keep_bits(keys: Tensor, p: float, first_column: int, out: Tensor, scratch: Tensor) -> Tensor:
    """Fill ``out``, int32 ``[..., columns]``, with -1 where a probability is kept and 0 where it is dropped.

    ``keys``: the `row_keys`, ``[...]``. ``out`` and ``scratch`` have the same shape; all work is in place.
    """
    column = torch.arange(first_column, first_column + out.shape[-1], device=out.device, dtype=torch.int32)
    torch.bitwise_xor(keys[..., None], column * _signed(COLUMN_STEP), out=out)
    _mix_(out, scratch).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    torch.sub(threshold(p) - 1, out, out=out)
    return out.bitwise_right_shift_(31)


def keep_mask(
    seed: Tensor, p: float, batch: int, heads: int, first: int, rows: int, first_column: int, columns: int
) -> Tensor:
    """bool ``[B, Hq, rows, columns]``, True where the probability is kept."""
    keys = row_keys(seed, batch, heads, first, rows)
    bits = keys.new_empty(*keys.shape, columns)
    return keep_bits(keys, p, first_column, bits, torch.empty_like(bits)).bool()
