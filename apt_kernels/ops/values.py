"""Reading the values of tensors, where Python can."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import transforms
from ..errors import ArgumentError


def has_values(tensor: Tensor) -> bool:
    """Whether Python can read the values of a tensor: no compiler, transform or subclass is involved."""
    return not torch.compiler.is_compiling() and is_real(tensor) and not transforms.active()


def is_real(tensor: Tensor) -> bool:
    """Whether a tensor is not of a subclass: neither fake nor distributed nor wrapped by a mode."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def check_flag(name: str, value) -> None:
    """Raise `ArgumentError` unless ``value`` is a bool: the text "no" would count as true."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} is {value!r}; it needs True or False")


def check_integers(name: str, tensor) -> None:
    """Raise `ArgumentError` unless ``tensor`` is one of integers."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        has = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArgumentError(f"{name} is {has}; it needs an integer tensor")


def check_range(name: str, tensor: Tensor, least: int, most: int, because: str) -> None:
    """Raise `ArgumentError` if a value is out of range; not on an accelerator, where that would wait for the device."""
    if tensor.device.type == "cpu" and has_values(tensor) and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < least or high > most:
            raise ArgumentError(f"{name} has values {low}..{high}; it needs {least}..{most} ({because})")
