"""Batches that a user passes: dicts of the arguments of a model's forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ConfigError, its_type
from . import offload
from .discovery.recording import evaluating
from .state import inner

_IGNORED = -100  # the label of a token that transformers' losses leave out


def check_batches(batches: Any) -> None:
    """Raise `ArgumentError` for what is no iterable of batches."""
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping)):
        raise ArgumentError(f"batches is {its_type(batches)}; it needs dicts of the forward's arguments, in a list")


def moved(batches: Iterable[Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Each of ``batches`` with its tensors on ``device``; `ArgumentError` for what is no batch."""
    for batch in batches:
        if not hasattr(batch, "items"):
            raise ArgumentError(f"a batch is {its_type(batch)}; it needs a dict of the forward's arguments")
        yield {name: part.to(device) if isinstance(part, Tensor) else part for name, part in batch.items()}


def run(model: nn.Module, batch: dict[str, Any]) -> Any:
    """One forward; `ArgumentError` where the model refuses the batch."""
    try:
        return model(**batch)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, (ArgumentError, ConfigError)):
            raise
        given = ", ".join(
            f"{name} {list(part.shape)}" if isinstance(part, Tensor) else f"{name} ({its_type(part)})"
            for name, part in batch.items()
        )
        raise ArgumentError(
            f"the {type(inner(model)).__name__} cannot run a batch of {given}: {type(error).__name__}: {error}. "
            "A batch needs the forward's arguments as tensors: tokenizer(..., padding=True, return_tensors='pt')"
        ) from error


@torch.no_grad()
def next_token_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """The mean loss of a causal model over all tokens of ``batches`` that it has to predict."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in moved(batches, offload.device(inner(model))):
            labels = batch.get("labels")
            if labels is None:
                raise ArgumentError(f"a batch has no labels to predict, but {', '.join(batch)}; it needs labels")
            if not isinstance(labels, Tensor):
                raise ArgumentError(f"the labels of a batch are {its_type(labels)}; they need to be a tensor")
            predicted = int((labels[..., 1:] != _IGNORED).sum())
            if not predicted:
                which = "" if (labels == _IGNORED).all() else " after the first token of a row"
                raise ArgumentError(
                    f"all labels of a batch{which} are {_IGNORED}, so there is nothing to predict; the tokens to "
                    "predict need their ids as labels"
                )
            total += float(run(model, batch).loss) * predicted
            count += predicted
    if not count:
        raise ArgumentError("batches is empty; it needs at least one")
    if not math.isfinite(total):
        raise ArgumentError(f"the loss of batches is {total / count}; it needs a finite one")
    return total / count
