"""Which parameters train beside the prefixes."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from .. import patterns
from ..config import AptConfig
from ..errors import ConfigError, PatchError, first_of, similar
from ..prefix.adaptive import AdaptivePrefix
from . import events
from .state import named_parameters

_NAMED_FOR_A_TASK = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")


def trainable_names(model, config: AptConfig) -> set[str]:
    """Which parameters train beside the prefixes, by name."""
    owned = {id(p) for prefix in model.modules() if isinstance(prefix, AdaptivePrefix) for p in prefix.parameters()}
    owned |= events.added_parameters(model)
    parameters = named_parameters(model)
    names = [name for name, parameter in parameters.items() if id(parameter) not in owned]
    if config.trainable is not None:
        unused = [pattern for pattern in config.trainable if not any(patterns.search(pattern, name) for name in names)]
        if unused:
            raise ConfigError(f"trainable has {unused[0]!r}; {_why_unused(model, unused[0])}")
        return {name for name in names if any(patterns.search(pattern, name) for pattern in config.trainable)}
    inside = {id(parameter) for part in _pretrained_parts(model) for parameter in part.parameters()}
    # PEFT's `modules_to_save` trains copies of the modules that it names.
    outside = {name for name, parameter in parameters.items() if id(parameter) not in inside}
    return {name for name in outside if name in names and ".original_module." not in name}


def warn_of_a_frozen_head(model, config: AptConfig) -> None:
    """Warn if ``trainable`` names parameters, but not those of a new task head, which would train without it."""
    if not config.trainable:
        return
    left_out = sorted(trainable_names(model, replace(config, trainable=None)) - trainable_names(model, config))
    if left_out:
        warnings.warn(
            f"trainable leaves out {first_of(left_out)}, which would train without it. If this head is new, it is "
            "random, and another from_pretrained has other values: name it in trainable as well",
            stacklevel=6,
        )


def _why_unused(model, pattern: str) -> str:
    """Why ``pattern`` names no parameter of its own: the end of a message."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name and patterns.search(pattern, name):
            other = first[id(parameter)]
            return (
                f"{name} is tied to {other}: they are one parameter. Train both with trainable=[{other!r}], or give "
                f"the module a weight of its own before the patch: torch.nn.Parameter(model.{name}.detach().clone())"
            )
    parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
    return f"no parameter's name matches it{similar(pattern, parts)}; model.named_parameters() has the names"


def refuse_quantised(model, trainable: set[str]) -> None:
    """Raise `PatchError` if a parameter among those to train is quantised. Nothing is changed."""
    for name in sorted(trainable):
        parameter = model.get_parameter(name)
        # torchao's tensors are marked as parameters; their dtype is float32, and they get no gradient.
        stands_in = nn.Parameter not in type(parameter).__mro__ and not hasattr(parameter, "device_mesh")
        if stands_in or not parameter.is_floating_point():
            found = type(parameter).__name__ if stands_in else parameter.dtype
            raise PatchError(
                f"{name} would train with the prefix, but it is quantised ({found}). Quantise the model without its "
                "new head (transformers: "
                f"BitsAndBytesConfig(..., llm_int8_skip_modules=[{name.split('.')[0]!r}])), or say with trainable= "
                "what trains"
            )


def _pretrained_parts(model) -> list[nn.Module]:
    """The modules of ``model`` whose weights a checkpoint of the bare model holds: all but a new task head."""
    if model.get_output_embeddings() is not None:
        return [model]  # a language model: its head was pretrained
    if model.base_model is not model:
        return [model.base_model]
    if not _NAMED_FOR_A_TASK.search(type(model).__name__):
        return [model]  # a bare encoder
    # T5ForQuestionAnswering, SiglipForImageClassification and similar classes hold the bare model's parts themselves.
    return [part for part in model.children() if isinstance(part, PreTrainedModel)] or [model]
