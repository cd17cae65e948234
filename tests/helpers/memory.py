"""The sizes of what torch's operators return, and of what autograd keeps."""

from collections.abc import Callable, Iterable

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return result


def kept_bytes(call: Callable[[], object], leaves: Iterable[torch.Tensor]) -> int:
    """Bytes of all that a call saves for its backward, each storage once, those of ``leaves`` left out."""
    held: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: held.append(tensor) or tensor, lambda tensor: tensor):
        result = call()
    given = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held}
    del result
    return sum(size for place, size in sizes.items() if place not in given)
