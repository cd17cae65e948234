"""Prefixes as plain keys and values, multiplied by gate and layer scale, for ordinary attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..prefix.adaptive import AdaptivePrefix
from .checkpoint import folded_weights
from .state import refuse_several, state_of


def fold(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values that ordinary attention over ``[prefix ; tokens]`` needs to compute the same outputs.

    Keys and values are multiplied by the gate's weights and the layer scale. An MLP reparameterisation is evaluated.
    Tensors sharded over processes are gathered, so every process has to call. The model is not changed.

    Args:
        model: a patched model whose gates do not depend on its input: ``"none"`` or ``"static"``.

    Returns:
        By the attention modules' names, in model order: key ``[Hkv, M, D]`` and value ``[Hkv, M, Dv]`` of the active
        adapter, float32 copies on the CPU. Keys are for use without rotary embedding; token positions start at 0.

    Raises:
        PatchError: the model is not patched, or a gate depends on the input; the message names the module.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = apt_kernels.patch(model, prefix_length=8, gate="static")
        >>> key, value = apt_kernels.fold(model)["model.layers.0.self_attn"]
        >>> key.shape[1], key.dtype
        (8, torch.float32)
    """
    return folded(model, torch.float32)


def folded(
    model: nn.Module, dtype: torch.dtype, weights: Mapping[str, Sequence[float]] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """`fold` in another dtype. ``weights``: for each module the M factors to use instead of its gate and scale."""
    refuse_several(state_of(model), "to fold")
    prefixes = state_of(model).prefixes
    if weights is None:
        refuse_gates(prefixes)
    tensors, found = folded_weights(model), {}
    for name, prefix in prefixes.items():
        key, value = (tensors[f"{name}.apt.{part}"].to(dtype) for part in ("key", "value"))
        factor = _factor(name, prefix, tensors, dtype) if weights is None else torch.tensor(weights[name], dtype=dtype)
        found[name] = key * factor[:, None], value * factor[:, None]
    return found


def refuse_gates(prefixes: Mapping[str, AdaptivePrefix]) -> None:
    """Raise `PatchError` if a gate depends on the model's input."""
    for name, prefix in prefixes.items():
        if prefix.gate_entry.reads_hidden_states:
            raise PatchError(
                f"{name} has gate={prefix.gate!r}, whose weights depend on the input: fixed keys and values cannot be "
                "exact. Train with gate='static' or 'none', or ask apt_kernels.export for an approximation "
                "(approximate='mean', batches=...)"
            )


def _factor(name: str, prefix: AdaptivePrefix, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """``layer_scale * sigmoid(gate)``, ``[M]``."""
    factor = torch.ones(prefix.length, dtype=dtype)
    for field, change in (("gate_logits", torch.sigmoid), ("layer_scale", lambda scale: scale)):
        given = tensors.get(f"{name}.apt.{field}")
        if given is not None:
            factor = factor * change(given.to(dtype))
    return factor
