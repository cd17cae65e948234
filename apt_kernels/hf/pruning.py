"""Removing tokens from the prefixes of a patched model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from . import events
from .patching import remove_prefix
from .state import State

# The dimension of each parameter of an `AdaptivePrefix` that counts tokens.
_TOKEN_DIM = {"key": 1, "value": 1, "gate_weight": 0, "gate_logits": 0}


def modules(state: State) -> list[str]:
    """Names of all attention modules that the patch found, with a prefix or without, in model order."""
    found = state.prefixes
    return [name for name, module in state.model.named_modules() if name in found or "apt_before" in module.__dict__]


def keep_tokens(state: State, keep: dict[str, tuple[int, ...]], lengths: tuple[int, ...]) -> None:
    """Keep these tokens of each prefix (folded first); a module without any computes as before the patch."""
    for name, prefix in state.prefixes.items():
        if not keep[name]:
            remove_prefix(state, name)
            continue
        prefix.fold()
        prefix.length = len(keep[name])
        for field, dim in _TOKEN_DIM.items():
            parameter = getattr(prefix, field)
            if parameter is None:
                continue
            index = torch.tensor(keep[name], device=parameter.device)
            kept = parameter.detach().index_select(dim, index)
            setattr(prefix, field, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    state.config = replace(state.config, prefix_length=lengths, reparameterisation=None)
    events.changed("prune", state)
