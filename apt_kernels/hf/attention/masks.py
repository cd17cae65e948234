"""transformers' mask interface: an `AttentionMask` instead of a 4-D tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import masking_utils

from ...errors import PatchError
from ...mask import Mask
from .. import compat
from . import implementations, packing, subclass

# Whether the parts of a mask function can be read. A constant, since torch.compile traces its uses.
_STRUCTURED = compat.available("masks")


class AttentionMask:
    """The mask that transformers passes from the mask function to the attention function of every layer.

    It represents a ``[B, 1, T, S]`` tensor and has ``ndim``, ``contiguous()`` and ``to()``, which generation with a
    static cache uses before it passes the mask to the model as ``attention_mask``.
    """

    ndim = 4

    def __init__(
        self,
        mask: Mask,
        shape: tuple[int, int, int, int],
        padding: Tensor | None,
        kv_offset: int = 0,
        query_offset: int | Tensor = 0,
        arguments: dict | None = None,
        packed: bool = False,
    ):
        self.mask = mask
        self.shape = shape
        self.padding = padding  # [B, S], True at real tokens, also if `mask` does not contain it
        self.kv_offset = kv_offset
        self.query_offset = query_offset  # of query 0 among the keys
        self.arguments = arguments  # the arguments of the mask function, to call that of another implementation
        self.packed = packed  # `mask` holds documents that are not in the arguments
        self.others: dict[str, object] = {}  # the masks of other implementations for these arguments

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise PatchError(
            f"{getattr(function, '__name__', function)} got the mask of a patched model: the attention module that "
            "called it was put into the model since the patch, or its attention implementation was changed. Call "
            "apt_kernels.unpatch(model), change the model, and patch it then"
        )

    def contiguous(self) -> AttentionMask:
        return self

    def to(self, *args, **kwargs) -> AttentionMask:
        padding = self.padding if self.padding is None else self.padding.to(*args, **kwargs).to(torch.bool)
        mask = self.mask.to(*args, **kwargs)
        return AttentionMask(mask, self.shape, padding, self.kv_offset, self.query_offset, self.arguments, self.packed)

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def real_tokens(self, queries: int) -> Tensor | None:
        """``[B, T]`` bool for self-attention: the queries that are not padding; None: all of them."""
        if self.padding is None:
            return None
        if isinstance(self.query_offset, int):
            return self.padding[:, self.query_offset : self.query_offset + queries]
        return self.padding[:, torch.arange(queries, device=self.padding.device) + self.query_offset]

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key, however many there are."""
        mask = self.mask
        parts = (mask.window, mask.key_padding, mask.query_segments, mask.dense, mask.bias)
        return not mask.causal and all(part is None for part in parts)


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    device="cpu",
    **kwargs,
) -> AttentionMask:
    """The mask function registered with transformers; arguments as for ``masking_utils.sdpa_mask``."""
    if isinstance(attention_mask, AttentionMask):
        return attention_mask
    # A static cache adds to this tensor in place before the mask of another implementation is made from it.
    q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **kwargs,
    }
    shape = (batch_size, 1, q_length, kv_length)
    padding = _padding(attention_mask, kv_length, kv_offset)
    if torch.compiler.is_compiling():
        alone = attention_mask is None and q_length == kv_length
        parts = _recognise_traced(mask_function, batch_size, q_length, alone, device, kwargs)
    else:
        parts = _recognise(mask_function)
    offset = q_offset - kv_offset
    token = implementations.token_of(kwargs.get("config"))
    segments = packing.documents(token, parts is None or parts.causal, batch_size, q_length, kv_length)
    packed = segments is not None
    if parts is None:
        mask = Mask(dense=_dense(arguments), query_segments=segments, key_segments=segments)
        return AttentionMask(mask, shape, padding, kv_offset, offset, arguments, packed)
    segments = parts.segments if segments is None else segments
    mask = Mask(
        causal=parts.causal,
        window=parts.window,
        query_offset=offset if parts.has_positions else None,
        key_padding=padding,
        query_segments=segments,
        key_segments=segments,
    )
    return AttentionMask(mask, shape, padding, kv_offset, offset, arguments, packed)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """``[B, kv_length]`` bool, or None if every key is real (checked only if that needs no synchronisation)."""
    if attention_mask is None:
        return None
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(padding) is not Tensor
    if not tracing and padding.device.type == "cpu" and bool(padding.all()):
        return None
    return padding


def _dense(arguments: dict) -> Tensor:
    names = (
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "kv_offset",
        "mask_function",
        "attention_mask",
        "device",
    )
    return masking_utils.sdpa_mask(
        **{name: arguments[name] for name in names},
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=arguments.get("use_vmap", False),
    )


class _Parts:
    """The parts of a mask function of transformers."""

    def __init__(self, causal=False, left=None, right=None, segments=None):
        self.causal, self.left, self.right, self.segments = causal, left, right, segments

    @property
    def window(self) -> tuple[int | None, int | None] | None:
        return None if self.left is None and self.right is None else (self.left, self.right)

    @property
    def has_positions(self) -> bool:
        return self.causal or self.window is not None

    def __and__(self, other: _Parts) -> _Parts | None:
        if self.segments is not None and other.segments is not None:
            return None
        return _Parts(
            self.causal or other.causal,
            _tighter(self.left, other.left),
            _tighter(self.right, other.right),
            self.segments if other.segments is None else other.segments,
        )


def _tighter(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _recognise(function) -> _Parts | None:
    """The parts of a mask function built by transformers' factories; None: it has to be evaluated densely."""
    if function is masking_utils.causal_mask_function:
        return _Parts(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Parts()
    if not _STRUCTURED:
        return None
    factory = getattr(function, "__qualname__", "").partition(".<locals>")[0]
    if getattr(function, "__module__", None) != masking_utils.__name__ or not function.__closure__:
        return None
    cells = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    if factory == "and_masks":
        parts = _Parts()
        for inner in cells["mask_functions"]:
            found = _recognise(inner)
            parts = None if found is None or parts is None else parts & found
        return parts
    if factory == "sliding_window_overlay":
        return _Parts(left=cells["sliding_window"] - 1)
    if factory == "sliding_window_bidirectional_overlay":
        return _Parts(left=cells["sliding_window"], right=cells["sliding_window"])
    if factory == "packed_sequence_mask_function":
        return _Parts(segments=cells["packed_sequence_mask"])
    if factory == "remap_positions_for_packed_sequence":
        # Positions increase by one within a segment, so differences of positions are differences of indices.
        return _recognise(cells["mask_function"])
    return None


# Config classes for whose masks `_recognise_traced` is wrong, as the recording pass determined.
_dense_when_traced: set[type] = set()


def _recognise_traced(function, batch: int, queries: int, alone: bool, device, kwargs: dict) -> _Parts | None:
    """`_recognise` under ``torch.compile``, where closures cannot be read: from the other arguments."""
    if function is masking_utils.causal_mask_function:
        return _Parts(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Parts()
    if not _STRUCTURED or kwargs.get("use_vmap") or subclass.parts(type(kwargs.get("config")))[0] in _dense_when_traced:
        return None
    if not function.__qualname__.startswith("and_masks"):
        return None
    window = kwargs.get("local_size")
    if "allow_is_bidirectional_skip" in kwargs:
        return None if window is None else _Parts(left=window, right=window)
    left = None if window is None else window - 1
    # When traced, transformers always assumes packed documents: one begins where the last token is hidden.
    return _Parts(causal=True, left=left, segments=_documents(function, batch, queries, device) if alone else None)


def _documents(function, batch: int, queries: int, device) -> Tensor:
    row = torch.arange(batch, device=device)[:, None]
    position = torch.arange(1, queries, device=device)[None]
    begins = ~function(row, torch.zeros_like(row), position, position - 1)
    return torch.nn.functional.pad(begins.expand(batch, -1).cumsum(1), (1, 0))


def trust_tracing_only_where_it_agrees(mask_function, config, kwargs: dict) -> None:
    """Compare both recognitions on a mask of the recorded model; if they differ, traced masks are dense."""
    kwargs = {**kwargs, "config": config}
    traced = _recognise_traced(mask_function, 1, 1, False, "cpu", kwargs)
    parts = _recognise(mask_function)
    if traced is not None and (
        parts is None or (traced.causal, traced.window) != (parts.causal, parts.window) or parts.segments is not None
    ):
        _dense_when_traced.add(type(config))
