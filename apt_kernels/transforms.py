"""Detection of torch's transforms that need more of an operator than one forward and one backward."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack  # looked up once: this runs several times a call


def active() -> bool:
    """Whether a transform of ``torch.func`` (grad, vjp, jvp, vmap and their combinations) or forward-mode
    differentiation is active."""
    return _peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# As `torch.compiler.assume_constant_result` does, without importing the compiler. Dynamo enters the transforms that it
# traces and guards on their state, but treats the None that `peek_interpreter_stack` returns as an object.
active.__dict__["_dynamo_marked_constant"] = True
