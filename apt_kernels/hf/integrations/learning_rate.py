"""Trainer: warn of an optimizer that does not hold the prefixes, or whose rate hardly changes them, as its default."""

from __future__ import annotations

import sys
import warnings

from ...wrapping import when_loaded, wrap
from ..optimizer import LOWEST_RATE, PREFIX_RATE
from ..state import is_patched, state_of

_MODULE = "transformers.trainer"


def join_trainer() -> None:
    """Wrap the method by which Trainer makes its optimizer. Once per process, or at its import."""
    when_loaded(_MODULE, _join)


def _join() -> None:
    wrap(sys.modules[_MODULE].Trainer, "create_optimizer", _create_optimizer)


def _create_optimizer(original, trainer, *args, **kwargs):
    given = trainer.optimizer  # by the user: Trainer makes none
    made = original(trainer, *args, **kwargs)
    if is_patched(trainer.model):
        state = state_of(trainer.model)
        ours = {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
        (_warn_of_low_rates if given is None else _warn_without_prefixes)(trainer, state, ours)
    return made


def _warn_without_prefixes(trainer, state, ours: set[int]) -> None:
    groups = getattr(trainer.optimizer, "param_groups", None)
    if groups and ours and not any(id(parameter) in ours for group in groups for parameter in group["params"]):
        warnings.warn(
            f"the optimizer given to Trainer has no parameter of the adapter {state.adapter!r}: its prefixes would not "
            "train. Create it after patch: torch.optim.AdamW(apt_kernels.parameter_groups(model))",
            stacklevel=4,
        )


def _warn_of_low_rates(trainer, state, ours: set[int]) -> None:
    rates = [
        float(group["lr"])
        for group in getattr(trainer.optimizer, "param_groups", ())
        if group.get("lr") is not None and any(id(parameter) in ours for parameter in group["params"])
    ]
    if rates and max(rates) < LOWEST_RATE:
        warnings.warn(
            f"Trainer's learning rate for the prefixes of the adapter {state.adapter!r} is {max(rates):g}, at which "
            f"they hardly change; they need about {PREFIX_RATE:g}. Pass Trainer optimizers=(torch.optim.AdamW("
            f"apt_kernels.parameter_groups(model)), None), or set learning_rate={PREFIX_RATE:g} in TrainingArguments",
            stacklevel=4,
        )
