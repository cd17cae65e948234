"""`reference_model`: a frozen copy of a patched model that shares the base model's weights."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import PatchError
from ..ops.values import check_flag
from . import events, offload
from .patching import detach
from .state import Parked, refuse_several, state_of
from .trainable import trainable_names
from .transaction import undisturbed
from .weights import distributes, fsdp1


@undisturbed
def reference_model(model: nn.Module, *, prefix: bool = True) -> PreTrainedModel:
    """A frozen copy of the model as it is now, for instance the reference of DPO, without a second base model.

    It shares the base model's weights with ``model``. Only what trains is copied: the active adapter's prefixes and
    other trained parameters, and PEFT's adapters. Training ``model`` does not change it.

    Args:
        model: a patched model, also inside PEFT's wrapper. Call this before a Trainer prepares it.
        prefix: False: the copy computes without the prefix, as within `disabled`: the base model is the reference.

    Returns:
        A transformers model of the same class in evaluation mode. No parameter of it is trainable. It is for forward
        passes: do not train, save or unpatch it.

    Raises:
        PatchError: the model is not patched, or several adapters are active; its weights are sharded or offloaded; or
            another library replaced a ``forward`` by one that would compute with the weights of ``model``.
        ArgumentError: ``prefix`` is not a bool.

    Examples:
        >>> reference = apt_kernels.reference_model(model)
        >>> torch.equal(reference(**batch).logits, model.eval()(**batch).logits)
        True
        >>> any(parameter.requires_grad for parameter in reference.parameters())
        False
    """
    state = state_of(model)
    check_flag("prefix", prefix)
    base = state.model
    refuse_several(state, "that is to be the reference")
    _refuse(model, base)
    trained = trainable_names(base, state.config)
    own = {id(parameter) for each in state.prefixes.values() for parameter in each.parameters()}
    own |= events.added_parameters(base)
    own |= {id(p) for name, p in state.parameters.items() if name in trained or p.requires_grad}
    memo: dict[int, Any] = {id(t): t for t in itertools.chain(base.parameters(), base.buffers()) if id(t) not in own}
    memo |= {id(original.parameter): original.parameter for original in state.originals}
    memo |= {id(start): start for start in state.start.values()}
    parked: dict[str, Parked] = {}
    memo[id(state.parked)] = parked
    made = copy.deepcopy(base, memo).eval()
    if _is_of_trl(base):
        del made.forward  # its trainer adds one to the copy
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False)
    if not prefix:
        detach(state_of(made))
    return made


def _refuse(model: nn.Module, base: nn.Module) -> None:
    """Raise `PatchError` if a copy of ``base`` would not be one, or could not share its weights."""
    parts = [*model.modules(), *base.modules()]
    if distributes(base) or any(isinstance(part, fsdp1()) for part in parts):
        raise PatchError("the weights are spread over processes; call reference_model before they are")
    if any(hasattr(parameter, "ds_id") for parameter in base.parameters()):
        raise PatchError("ZeRO-3 spreads the weights over processes; call reference_model before DeepSpeed does")
    if any(hook.offload for part in parts for hook in offload.hooks(part)):
        raise PatchError("accelerate offloads weights of the model, which a copy cannot share; load it on one device")
    inside = {id(parameter) for parameter in base.parameters()}
    outside = next((name for name, p in model.named_parameters() if id(p) not in inside), None)
    if outside is not None:
        raise PatchError(
            f"{outside} is a parameter of the {type(model).__name__} outside of the {type(base).__name__}, which alone "
            "is copied"
        )
    modules = {id(part) for part in base.modules()}
    for name, part in base.named_modules():
        if _holds(part.__dict__.get("forward"), modules, set()) and not (part is base and _is_of_trl(base)):
            raise PatchError(
                f"the forward of {name or type(base).__name__} was replaced by one that holds the module itself: a "
                "copy would compute with this model's weights. Call reference_model before that, or save the adapter, "
                "load it into a fresh model, and call reference_model there"
            )


def _is_of_trl(base: nn.Module) -> bool:
    """Whether TRL replaced the forward of ``base``, by one that calls the forward of its class."""
    forward = base.__dict__.get("forward")
    if not isinstance(forward, MethodType):
        return False
    while True:
        function = forward.__func__
        if function is type(base).forward:
            return forward is not base.__dict__.get("forward")
        if not str(getattr(function, "__globals__", {}).get("__name__")).startswith("trl."):
            return False
        forward = inspect.getclosurevars(function).nonlocals.get("original_forward")
        if not isinstance(forward, MethodType):
            return False


def _holds(value: Any, modules: set[int], seen: set[int]) -> bool:
    """Whether a function has one of ``modules``, or a method of one, among its closure variables."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, MethodType):
        return _holds(value.__func__, modules, seen)
    if isinstance(value, functools.partial):
        return _holds(value.func, modules, seen)
    return isinstance(value, FunctionType) and any(
        id(found) in modules or id(getattr(found, "__self__", None)) in modules or _holds(found, modules, seen)
        for found in _cells(value)
    )


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable without a value yet
            continue
