"""Taking tokens out of the prefixes of a patched model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..errors import PatchError
from .integrations import distributed, trainer
from .patching import prefixes, remove_prefix, state_of, trainable_names
from .state import inner

# Where each parameter of an `AdaptivePrefix` counts its tokens.
_TOKEN_DIM = {"key": 1, "value": 1, "gate_weight": 0, "gate_logits": 0}


def modules(model) -> list[str]:
    """Names of all attention modules that the patch found, with a prefix or without, in model order."""
    found = prefixes(model)
    return [name for name, module in inner(model).named_modules() if name in found or "apt_before" in module.__dict__]


def refuse_spread(model) -> None:
    """Raise `PatchError` if processes share the model's prefixes."""
    distributed.refuse_wrapped(model)
    spread = [name for name, prefix in prefixes(model).items() if prefix.mesh is not None]
    if spread:
        raise PatchError(
            f"tensor parallelism spreads the prefix of {spread[0]} over processes; save the adapter, and call "
            "apt_kernels.prune on a model that one process holds, before it is sharded"
        )


def keep_tokens(model, keep: dict[str, tuple[int, ...]], lengths: tuple[int, ...]) -> None:
    """Keep these tokens of each prefix (folded first); with none, the module attends as before the patch."""
    for name, prefix in prefixes(model).items():
        if not keep[name]:
            remove_prefix(model, name)
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
    state = state_of(model)
    state.config = replace(state.config, prefix_length=lengths, reparameterisation=None)
    base = inner(model)
    trainer.expect_missing(base, trainable_names(base, state.config))
