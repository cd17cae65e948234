"""What an adapter's file would leave out: weights that changed since the patch and are not part of the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import first_of
from . import base_record, events
from .state import State, inner
from .transaction import undisturbed


def samples(state: State) -> dict[str, Tensor]:
    """A few elements of everything that stays frozen, by name: parameters, and buffers that belong to a checkpoint."""
    return {name: base_record.sample(tensor) for name, tensor in _frozen(state)}


def _frozen(state: State) -> Iterator[tuple[str, Tensor]]:
    added = events.added_parameters(state.model)
    added |= {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
    for name, parameter in state.model.named_parameters():
        if id(parameter) not in added and not parameter.requires_grad and base_record.is_whole(parameter):
            yield base_record.plain(name), parameter
    for name, module in state.model.named_modules():
        yield from ((base_record.plain(f"{name}.{key}"), buffer) for key, buffer in _buffers(module))


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers of a module without others inside that a checkpoint holds: running statistics, but no caches."""
    found = dict(module.named_buffers(recurse=False))
    if (
        not found
        or next(module.children(), None) is not None
        or any(type(buffer) is not Tensor for buffer in found.values())
    ):
        return []
    held = module.state_dict(keep_vars=True)
    return [(key, buffer) for key, buffer in found.items() if key in held and _is_here(buffer)]


def _is_here(buffer: Tensor) -> bool:
    return buffer.device.type != "meta" and buffer.numel() > 0


@undisturbed
def warn_of_changes(state: State) -> None:
    """Warn if something frozen changed since the patch: trained and frozen again, or the statistics of a module."""
    known = {base_record.plain(name) for name in (*state.start, *state.merged)}
    merged = base_record.merged_weights(state.model)  # PEFT has the difference
    changed = [
        name
        for name, now in _frozen(state)
        if name in state.samples and name not in known | merged and not _same(state.samples[name], now)
    ]
    if changed:
        warnings.warn(
            f"{first_of(changed)} changed since the patch and would not be in the adapter. A parameter is saved if it "
            "is trainable at the save, or if trainable= names it in the patch; for statistics of normalisation layers, "
            "train with these layers in eval mode, or save the base model as well",
            stacklevel=7,
        )


@undisturbed
def warn_of_others(model, state: State) -> None:
    """Warn if ``model`` holds weights of PEFT, which `save` does not write."""
    added = events.added_parameters(state.model)
    ours = {id(parameter) for parameter in state.model.parameters()}
    theirs = [name for name, parameter in inner(model).named_parameters() if id(parameter) in added]
    theirs += [name for name, p in model.named_parameters() if id(p) not in ours and p.requires_grad]
    if not theirs:
        return
    own = getattr(state.model, "_hf_peft_config_loaded", False)
    call = "model.save_pretrained(folder)" if own else "save_pretrained(folder) of the PeftModel around it"
    warnings.warn(
        f"the model holds weights of PEFT ({first_of(theirs)}), which are not in this adapter: {call} saves them with "
        "the prefixes",
        stacklevel=4,
    )


def _same(before: Tensor, now: Tensor) -> bool:
    """Whether ``now`` has the values of ``before``, or what casts to other dtypes leave of them."""
    now = base_record.sample(now)
    if before.shape != now.shape:
        return False
    # The tolerance is the spacing of float16 near 0, for a cast after another one.
    casts = (before.to(dtype).float() for dtype in (before.dtype, torch.bfloat16, torch.float16))
    return any(torch.allclose(cast, now.float(), rtol=0, atol=6e-8, equal_nan=True) for cast in casts)
