"""cuDNN's kernels on the tokens, through torch; torch's own for the CPU where Triton is interpreted."""

from __future__ import annotations

import torch
from torch import Tensor

from ...inputs import Inputs, dense_last

_OPS = torch.ops.aten
_CUDNN_BATCH = 65535


def obstacle(x: Inputs) -> str | None:
    """Why it cannot compute the tokens of these inputs; None: it can."""
    _, _, _, queries, keys, _, head_dim, value_dim = x.sizes
    given = ("key_padding", "query_segments", "dense", "bias", "query_offset", "sinks")
    present = [name for name in given if getattr(x, name) is not None]
    if present:
        return f"the stock kernel takes no {present[0]}"
    if x.dropout_p or x.softcap or x.window_left >= 0 or x.window_right >= 0:
        return "the stock kernel is called without dropout, soft-cap and windows"
    if head_dim != value_dim:
        return f"head sizes are {head_dim} and {value_dim}; the stock kernel takes equal ones"
    if x.causal and (queries != keys or x.offset):
        return "the stock kernel's causal mask is a square from the first key on"
    return _cudnn_obstacle(x) if x.query.device.type == "cuda" else None


def _cudnn_obstacle(x: Inputs) -> str | None:
    """torch's conditions for a call to cuDNN (``check_cudnn_tensor_shapes``)."""
    batch, heads, _, _, keys, _, head_dim, _ = x.sizes
    if torch.version.hip or not torch.backends.cudnn.is_available():
        return "cuDNN is not available"
    if x.query.dtype not in (torch.bfloat16, torch.float16):
        return f"query has dtype {x.query.dtype}; cuDNN takes bfloat16 and float16"
    most = _most_columns(x.query.device)
    if head_dim > most or head_dim % 8:
        return f"the head size is {head_dim}; cuDNN takes multiples of 8 up to {most} here"
    if keys == 1 or max(batch, heads) > _CUDNN_BATCH:
        return f"cuDNN takes two keys or more, and up to {_CUDNN_BATCH} batch rows and heads"
    if any(stride % 8 for part in (x.query, x.key, x.value) for stride in (*part.stride()[:3], part.storage_offset())):
        return "cuDNN takes rows that begin at multiples of 16 bytes"
    if torch.are_deterministic_algorithms_enabled():
        return "cuDNN's gradients are not deterministic, and torch.use_deterministic_algorithms asks for that"
    return None


def _most_columns(device: torch.device) -> int:
    """The widest heads: 256 on compute capability 9.0 from cuDNN 9.10 on, else 128."""
    wide = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return 256 if wide and torch.backends.cudnn.version() >= 91000 else 128


def _operands(*tensors: Tensor) -> list[Tensor]:
    """A tensor with contiguous rows, which torch's kernel for the CPU assumes without a check."""
    return [dense_last(tensor) for tensor in tensors]


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the tokens alone."""
    given = _operands(x.query, x.key, x.value)
    if x.query.device.type == "cpu":
        out, logsumexp = _OPS._scaled_dot_product_flash_attention_for_cpu(*given, 0.0, x.causal, scale=x.scale)
    else:
        ask = (None, True, 0.0, x.causal, False)
        out, logsumexp, *_ = _OPS._scaled_dot_product_cudnn_attention(*given, *ask, scale=x.scale)
    # [B, H, T] with other strides, or [B, H, T, 1].
    return out, logsumexp.reshape(x.query.shape[:3]).contiguous()


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the tokens; ``out, logsumexp`` are those of the whole softmax.

    Neither library takes a gradient of the log-sum-exp.
    """
    given = _operands(grad_out, x.query, x.key, x.value, out)
    if x.query.device.type == "cpu":
        return _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
            *given, logsumexp, 0.0, x.causal, scale=x.scale
        )
    # The random state: unused, since there is no dropout.
    state = (torch.empty((), dtype=torch.int64, device=x.query.device),) * 2
    lengths = (None, None, x.query.shape[2], x.key.shape[2])
    return _OPS._scaled_dot_product_cudnn_attention_backward(
        *given, logsumexp.unsqueeze(3), *state, None, *lengths, 0.0, x.causal, scale=x.scale
    )
