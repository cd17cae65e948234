"""TRL: refuse references that are not what the caller means.

Without ``ref_model``, TRL's trainers load the base model a second time, or switch PEFT's adapter alone: the reference
would then be without the prefix, or with the one that trains.
"""

from __future__ import annotations

import functools
import sys
import warnings

from ...errors import PatchError
from ...wrapping import when_loaded, wrap
from ..attention.function import NAME
from ..state import is_patched

# TRL's modules whose trainers have a reference, and how to give them one.
_WITH_ARGUMENT = "Pass ref_model=apt_kernels.reference_model(model), with prefix=False if the base model is meant"
_WITHOUT_ARGUMENT = (
    "Create the trainer with beta=0 and set trainer.ref_model and trainer.beta then: docs/how-to/trl.md shows how"
)
_TRAINERS = {"dpo": _WITH_ARGUMENT, "kto": _WITH_ARGUMENT, "grpo": _WITHOUT_ARGUMENT, "rloo": _WITHOUT_ARGUMENT}


def join_trl() -> None:
    """Wrap the two functions by which TRL's trainers get a reference. Once per process, at their import."""
    for name in _TRAINERS:
        when_loaded(f"trl.trainer.{name}_trainer", functools.partial(_join, name))


def _join(name: str) -> None:
    module, instead = sys.modules[f"trl.trainer.{name}_trainer"], _TRAINERS[name]
    for function, around in (("create_model_from_path", _create_model), ("use_adapter", _use_adapter)):
        if hasattr(module, function):
            wrap(module, function, functools.partial(around, instead))
        else:
            warnings.warn(
                f"{module.__name__} lacks {function}: a reference with a wrong prefix is not refused. {instead}",
                stacklevel=2,
            )


def _create_model(instead: str, original, model_id, *args, **kwargs):
    if kwargs.get("attn_implementation") == NAME:  # taken from the config of the model that trains
        raise PatchError(
            f"TRL would load a second base model without the prefix ({model_id}) as the reference. {instead}"
        )
    return original(model_id, *args, **kwargs)


def _use_adapter(instead: str, original, model, *args, **kwargs):
    if is_patched(model):
        raise PatchError(
            f"TRL switches PEFT's adapter alone: the reference would have the prefix that trains. {instead}"
        )
    return original(model, *args, **kwargs)
