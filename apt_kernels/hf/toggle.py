"""`disabled`: a patched model without its prefix within a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import calls
from .state import Model, state_of


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within this context the model computes without its prefix: bit for bit as before the patch.

    It holds in the thread that entered it, and in threads that a forward starts itself (`nn.DataParallel`). Inside
    asyncio it holds in the task that entered it and in tasks that this one creates; other tasks keep the prefix.
    Gradient checkpointing recomputes the layers as they were in the forward, wherever the backward runs. A copy of the
    model has its prefix. Trained heads keep their values.

    Yields the model. Raises `PatchError` if it is not patched.

    Examples:
        >>> with apt_kernels.disabled(model):
        ...     logits = model(**batch).logits  # of the base model's attention
    """
    with calls.disabling(state_of(model).token):
        yield model
