"""Trainer: warn if the optimizer that it makes has a rate at which a prefix hardly changes, such as its default."""

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
    if given is None and is_patched(trainer.model):
        _warn_of_low_rates(trainer)
    return made


def _warn_of_low_rates(trainer) -> None:
    state = state_of(trainer.model)
    ours = {id(parameter) for prefix in state.training_prefixes for parameter in prefix.parameters()}
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
