"""The trainable parameters of a patched model in groups, each with a learning rate, for any optimizer."""

from __future__ import annotations

import logging
import math
import warnings
from functools import cache as memoise

from torch import Tensor, nn

from ..errors import ArgumentError
from .state import state_of

logger = logging.getLogger(__name__)

# SmolLM2's loss on docstrings, 32 prefix tokens, 24 steps from 2.82: 2.66 at 3e-3, 2.65 at 1e-2, 2.71 at 3e-2.
# Gates and scales had the same rate.
PREFIX_RATE = 1e-2
# SmolLM2, documents, three seeds: at a tenth of the prefix's rate, a token gate's loss is lower by 0.053 ± 0.004, and
# equals a static gate's at the prefix's rate. MiniLM, WNUT17, three seeds: no difference (0.9 ± 2.1 points of F1).
GATE_SHARE = 0.1
# At 1e-3, a new head on MiniLM has an accuracy of 0.69 after 60 steps (4 classes), full fine-tuning 0.84.
HEAD_RATE = 1e-2
# The lowest published rate of a prefix, with an MLP: docs/hyperparameters.md.
LOWEST_RATE = 1e-4


def parameter_groups(
    model,
    lr: float | None = None,
    gate_lr: float | None = None,
    scale_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict]:
    """The trainable parameters of a patched model in groups for an optimizer, each parameter in one of them.

    Prefixes need a higher learning rate than the usual defaults for fine-tuning: at 5e-5, Trainer's default, they
    hardly change.

    Args:
        model: a patched model; of its adapters, the active one's parameters are returned, or those of all active ones.
        lr: of the prefixes' keys and values, or of the MLP that produces them. None: 1e-2.
        gate_lr: of the gates. None: a tenth of ``lr`` for gates that read hidden states, ``lr`` for static gates.
        scale_lr: of the layer scales. None: as ``lr``.
        head_lr: of everything else: new task heads, PEFT's adapters, parameters that ``trainable`` names. None: 1e-2.
        weight_decay: of all parameters except the layer scales, which it would move towards 0, that is, no prefix.

    Returns:
        Dicts with ``name`` (``"prefix"``, ``"gate"``, ``"scale"``, ``"head"``), ``params``, ``lr`` and
        ``weight_decay``; groups without parameters are left out. Two groups are named ``"gate"`` where adapters that
        train together have static gates and others.

    Raises:
        PatchError: the model is not patched.
        ArgumentError: a rate or the decay is no number of at least 0.

    Warns if ``lr`` is above 0 and below 1e-4.

    Examples:
        >>> optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(model))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('prefix', 0.01), ('gate', 0.001), ('scale', 0.01), ('head', 0.01)]

    For transformers' Trainer: ``Trainer(..., optimizers=(optimizer, None))``. Trainer makes its schedule for such an
    optimizer; ``TrainingArguments.learning_rate`` is not used.
    """
    given = {"lr": lr, "gate_lr": gate_lr, "scale_lr": scale_lr, "head_lr": head_lr, "weight_decay": weight_decay}
    for name, number in given.items():
        if (number is not None or name == "weight_decay") and not _is_rate(number):
            raise ArgumentError(f"{name} is {number!r}; it needs a finite number of at least 0")
    state, lr = state_of(model), PREFIX_RATE if lr is None else lr
    if 0 < float(lr) < LOWEST_RATE:
        warnings.warn(
            f"lr is {float(lr):g}, at which prefixes hardly change; they need about {PREFIX_RATE:g}. head_lr is the "
            "rate of other parameters",
            stacklevel=2,
        )
    kinds = {}
    for prefix in state.training_prefixes:
        for name, parameter in prefix.named_parameters():
            kinds[id(parameter)] = _KINDS.get(name, "prefix")
    groups: dict[str, list[nn.Parameter]] = {"prefix": [], "gate": [], "static gate": [], "scale": [], "head": []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[kinds.get(id(parameter), "head")].append(parameter)
    rates = {
        "prefix": lr,
        "gate": lr * GATE_SHARE if gate_lr is None else gate_lr,
        "static gate": lr if gate_lr is None else gate_lr,
        "scale": lr if scale_lr is None else scale_lr,
        "head": HEAD_RATE if head_lr is None else head_lr,
    }
    return [
        {
            "name": name.removeprefix("static "),
            "params": found,
            "lr": rates[name],
            "weight_decay": 0.0 if name == "scale" else weight_decay,
        }
        for name, found in groups.items()
        if found
    ]


def _is_rate(number) -> bool:
    if isinstance(number, Tensor):  # for optimizers in a CUDA graph
        if number.numel() != 1 or not number.is_floating_point():
            return False
        number = number.item()
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number < math.inf


_KINDS = {"gate_weight": "gate", "gate_logits": "static gate", "layer_scale": "scale"}


@memoise
def log_rates() -> None:
    """Log once per process which learning rate prefixes need."""
    logger.warning(
        "apt_kernels: to train, a prefix needs a learning rate of about %g, more than the usual default of an "
        "optimizer or of Trainer (5e-5). torch.optim.AdamW(apt_kernels.parameter_groups(model)) has such rates",
        PREFIX_RATE,
    )
