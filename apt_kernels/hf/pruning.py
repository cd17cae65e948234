"""Removing tokens from the prefixes of a patched model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from . import events
from .patching import remove_prefix
from .state import State, named_modules

# The dimension of each parameter of an `AdaptivePrefix` that counts tokens.
_TOKEN_DIM = {"frozen_key": 1, "frozen_value": 1, "key": 1, "value": 1, "gate_weight": 0, "gate_logits": 0}


def modules(state: State) -> list[str]:
    """Names of all attention modules that the patch found, with a prefix or without, in model order."""
    found = state.prefixes
    return [
        name for name, module in named_modules(state.model).items() if name in found or "apt_before" in module.__dict__
    ]


def keep_tokens(state: State, keep: dict[str, tuple[int, ...]], lengths: tuple[int, ...]) -> None:
    """Keep these tokens of each prefix (folded first); a module without any computes as before the patch."""
    for name, prefix in state.prefixes.items():
        if not keep[name]:
            remove_prefix(state, name)
            continue
        prefix.fold()
        frozen = [i for i in keep[name] if i < prefix.frozen]
        trained = [i - prefix.frozen for i in keep[name] if i >= prefix.frozen]
        kept_of = {"frozen_key": frozen, "frozen_value": frozen, "key": trained, "value": trained}
        prefix.length, prefix.frozen = len(keep[name]), len(frozen)
        for field, dim in _TOKEN_DIM.items():
            parameter = getattr(prefix, field)
            if parameter is None:
                continue
            index = torch.tensor(kept_of.get(field, keep[name]), dtype=torch.long, device=parameter.device)
            kept = parameter.detach().index_select(dim, index)
            setattr(prefix, field, nn.Parameter(kept, requires_grad=parameter.requires_grad))
    most = state.config.num_frozen_tokens
    most = None if most is None else min(most, max(lengths))
    state.config = replace(state.config, prefix_length=lengths, reparameterisation=None, num_frozen_tokens=most)
    events.changed("prune", state)
