"""Adaptive Prefix Tuning fused into attention: exact, complete, and fast. See README.md."""

from .dispatch import info
from .mask import Mask
from .op import attention

__all__ = ["Mask", "attention", "info"]
