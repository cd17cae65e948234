"""The gradients of the gate's logits and of lambda from that of the weights ``g = lambda * sigmoid(gate)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .inputs import Inputs


def gate_gradients(
    x: Inputs, d_weights: Tensor, sum_by_index: Callable[[Inputs, Tensor], Tensor] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``gate`` and ``layer_scale``, each None where that input is None.

    ``d_weights``: ``[B|1, T|1, M]``, summed to the sizes of ``x.weights()`` (the last one always M); zero in the
    columns that a row has not. ``sum_by_index`` replaces `index_add_`, which is not deterministic on a GPU.
    """
    gate = x.gate_rows()
    if gate is None:
        return None, None if x.layer_scale is None else _scale_gradient(x, d_weights)
    sigmoid = torch.sigmoid(gate.to(d_weights.dtype))
    d_scale = None if x.layer_scale is None else _scale_gradient(x, d_weights * sigmoid)
    d_gate = d_weights * sigmoid * (1 - sigmoid)
    scale = x.scale_rows()
    if scale is not None:
        d_gate = d_gate * scale.to(d_gate.dtype)
    if x.gate_index is not None:
        d_gate = (sum_by_index or _sum_by_index)(x, d_gate)
    elif x.prefix_index is not None:
        d_gate = d_gate.sum_to_size(x.gate.shape)
    return d_gate, d_scale


def _scale_gradient(x: Inputs, terms: Tensor) -> Tensor:
    """The sum of ``terms [B|1, T|1, M]``, ``[1]``, or of each adapter's rows, ``[A]``."""
    if x.layer_scale.shape[0] == 1:
        return terms.sum().reshape(1)
    found = terms.new_zeros(x.layer_scale.shape)
    return found.index_add_(0, x.adapter_index(), terms.sum((1, 2)))


def _sum_by_index(x: Inputs, rows: Tensor) -> Tensor:
    """``[G, M]``: the rows ``[B, T|1, M]`` summed by their index in the gate."""
    return rows.new_zeros(x.gate.shape).index_add_(0, x.gate_index.flatten(), rows.flatten(0, 1))
