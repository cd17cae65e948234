"""Transforms of torch that ask more of an operator than one forward and one backward."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of ``torch.func`` (grad, vjp, jvp, vmap and what is made of them) or forward-mode
    differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# What `torch.compiler.assume_constant_result` does, which would import the compiler: Dynamo enters the transforms that
# it traces and guards on their state, but would take the None of
# `peek_interpreter_stack` for an object.
active.__dict__["_dynamo_marked_constant"] = True
