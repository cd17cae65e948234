"""A prefix for an attention kernel that takes no prefix and returns no log-sum-exp: one additional key, the marker.

For one query, the effect of a prefix is determined by the log-sum-exp ``L`` of its logits and by ``O``, the output of
attention over the prefix alone:

    attention over prefix and keys  =  (attention over the keys and a key with the logit L and the value 0)  +  s O

where ``s`` is the softmax weight of the additional key. This equation is exact. The marker is that key. It uses `SPARE`
additional dimensions of query, key and value. There, the query contains ``L / scale``, split into numbers of its dtype
that sum to it, and the marker's key contains ones. The marker's value is 1 in the first additional dimension, where all
other values are 0, so the kernel returns ``s`` there. The marker does not depend on the adapter, the gate or the
request; only the query does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# The number of pieces into which L / scale is split: three of bfloat16 have the 24 bits of a float32.
_PIECES = 3
# One more dimension hides the other slots of the marker's cache block.
SPARE = _PIECES + 1
# The logit of hidden slots, before the scale: a float16 number, far below any logit whose weight is not 0 in float32.
_HIDDEN = -60000.0
# The marker's own logit, before the scale, for a query without a prefix: the marker is hidden too.
ABSENT = _HIDDEN


def pad_query(query: Tensor, logsumexp: Tensor, scale: float, size: int) -> Tensor:
    """The query with the prefix's log-sum-exp in the additional dimensions.

    Args:
        query: ``[N, Hq, D]``.
        logsumexp: ``[N, Hq]``, float32: of the prefix's logits, scale included.
        scale: the factor by which the kernel multiplies ``query . key``.
        size: the kernel's head size, at least ``D + SPARE``.

    Returns:
        ``[N, Hq, size]``, in the query's dtype.
    """
    rest, pieces = logsumexp / scale, []
    for _ in range(_PIECES):
        pieces.append(rest.to(query.dtype))
        rest = rest - pieces[-1].float()
    tail = torch.stack([*pieces, torch.ones_like(pieces[0])], dim=-1)
    return torch.cat([query, F.pad(tail, (0, size - query.shape[-1] - SPARE))], dim=-1)


def pad_zeros(states: Tensor, size: int) -> Tensor:
    """Keys or values ``[N, Hkv, D]`` with zeros up to ``[N, Hkv, size]``."""
    return F.pad(states, (0, size - states.shape[-1]))


def block(length: int, heads: int, head_dim: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of a cache block with the marker in its first slot; the other slots are hidden from all queries.

    Args:
        length: slots of a block.
        heads: key heads.
        head_dim: ``D`` of the model.
        size: the kernel's head size, at least ``D + SPARE``.
        like: a tensor of the wanted dtype and device.

    Returns:
        Two tensors ``[length, heads, size]``.
    """
    key = like.new_zeros(length, heads, size)
    value = torch.zeros_like(key)
    key[0, :, head_dim : head_dim + _PIECES] = 1
    value[0, :, head_dim] = 1
    key[1:, :, head_dim + _PIECES] = _HIDDEN
    return key, value


def merge(out: Tensor, prefix_out: Tensor) -> Tensor:
    """The output over prefix and keys.

    Args:
        out: ``[N, Hq, size]``, the kernel's output.
        prefix_out: ``[N, Hq, D]``, float32: attention over the prefix alone.

    Returns:
        ``[N, Hq, D]``, in the dtype of ``out``.
    """
    head_dim = prefix_out.shape[-1]
    share = out[..., head_dim : head_dim + 1].float()
    return (out[..., :head_dim].float() + share * prefix_out).to(out.dtype)
