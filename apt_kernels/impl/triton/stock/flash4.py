"""flash-attn-4's kernels on the tokens: Hopper and Blackwell (the package ``flash-attn-4``, a beta; extra ``fa4``)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from ...inputs import Inputs

# The release whose functions are called here, and which of their arguments.
_RELEASE = "4.0.0b36"
_FORWARD = "softmax_scale causal softcap window_size_left window_size_right learnable_sink return_lse"
_BACKWARD = "softmax_scale causal softcap window_size_left window_size_right deterministic dlse"
_ARGUMENTS = {"_flash_attn_fwd": f"q k v {_FORWARD}", "_flash_attn_bwd": f"q k v out dout lse {_BACKWARD}"}
# The widest heads of its kernels for each major compute capability. Those for 12.x have no deterministic backward.
_MOST_COLUMNS = {9: 256, 10: 128, 11: 128}
_NOT_TAKEN = ("key_padding", "query_segments", "dense", "bias", "query_offset")


class _Library(NamedTuple):
    forward: Callable
    backward: Callable


@cache
def library() -> _Library | str:
    """flash-attn-4's functions, or why they cannot be called."""
    try:
        module = importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        return f"flash-attn-4 cannot be imported ({error}); the extra fa4 installs it"
    for name, arguments in _ARGUMENTS.items():
        function = getattr(module, name, None)
        known = inspect.signature(function).parameters if callable(function) else ()
        lacking = [argument for argument in arguments.split() if argument not in known]
        if lacking:
            what = f"{name} has no argument {lacking[0]!r}" if known else f"there is no {name}"
            return f"flash-attn-4 is {_version()}, where {what}; install {_RELEASE}, which has it"
    return _Library(module._flash_attn_fwd, module._flash_attn_bwd)


def _version() -> str:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _major(device: torch.device) -> int | None:
    """The major compute capability; None: no CUDA device."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" and not torch.version.hip else None


def obstacle(x: Inputs) -> str | None:
    """Why it cannot compute the tokens of these inputs; None: it can."""
    _, _, _, queries, keys, _, *dims = x.sizes
    present = [name for name in _NOT_TAKEN if getattr(x, name) is not None]
    if present:
        return f"flash-attn-4 is called without {present[0]}"
    if x.dropout_p:
        return "flash-attn-4 has no dropout"
    if x.has_positions and x.offset != keys - queries:
        return "flash-attn-4 places the last query at the last key"
    if x.scale <= 0:
        return f"the scale is {x.scale}; flash-attn-4 takes positive ones"
    if x.query.dtype not in (torch.bfloat16, torch.float16):
        return f"query has dtype {x.query.dtype}; flash-attn-4 takes bfloat16 and float16"
    most = _MOST_COLUMNS.get(_major(x.query.device))
    if most is None:
        return "flash-attn-4 is called on compute capability 9.x, 10.x and 11.x"
    if any(dim % 8 or dim > most for dim in dims):
        return f"head sizes are {dims[0]} and {dims[1]}; flash-attn-4 takes multiples of 8 up to {most} here"
    found = library()
    return found if isinstance(found, str) else None


def _arguments(x: Inputs) -> dict:
    """What both passes receive: a window that is open on a side is None there."""
    left, right = (None if side < 0 else side for side in (x.window_left, x.window_right))
    given = {"softmax_scale": x.scale, "causal": x.causal, "softcap": x.softcap}
    return given | {"window_size_left": left, "window_size_right": 0 if x.causal else right}


def _heads_last(*tensors: Tensor) -> list[Tensor]:
    """``[B, H, T, D]`` as ``[B, T, H, D]``, a view; the library copies what it cannot read."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the tokens and the sinks."""
    given = _heads_last(x.query, x.key, x.value)
    out, logsumexp, *_ = library().forward(*given, learnable_sink=x.sinks, return_lse=True, **_arguments(x))
    return out.transpose(1, 2), logsumexp


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the tokens; ``out, logsumexp`` are those of the whole softmax."""
    given = _heads_last(x.query, x.key, x.value, out, grad_out)
    options = _arguments(x) | {"deterministic": True, "dlse": grad_logsumexp}
    grads = library().backward(*given, logsumexp, **options)
    return tuple(grad.transpose(1, 2) for grad in grads[:3])
