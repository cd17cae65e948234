"""vLLM's attention layer with a prefix: subclasses of the layer, implementation and backend that vLLM selected.

The marker (`marker`) is stored in vLLM's null block, block 0, which belongs to no request. In the metadata of each
step, this block is put in front of each request's blocks, as `block_size` more computed tokens. Scheduler, block hashes
and token positions do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, subclass_attention_backend

from . import first_gate, marker
from .prefix import ServedPrefix
from .several import Batch

_NULL_BLOCK = 0
# The classes below are mixed in before classes that vLLM selects when it loads a model.
_Base: Any = object


def add_prefix(layer: Attention, prefix: ServedPrefix, size: int) -> None:
    """Add a prefix to ``layer``, which then requests a key/value cache of the head size ``size``."""
    layer.apt, layer.apt_first, layer.apt_batch = prefix, first_gate.Memory(), None
    _add(layer, prefix.scale, size, _prefixed_layer(layer.__class__))


def add_prefixes(layer: Attention, prefixes: Mapping[int, ServedPrefix], size: int, batch: Batch) -> None:
    """Add the prefixes of several adapters, by their numbers. ``batch`` says which number each request has."""
    layer.apt = nn.ModuleDict({str(number): prefix for number, prefix in prefixes.items()})
    layer.apt_first, layer.apt_batch = {number: first_gate.Memory() for number in prefixes}, batch
    scale = next(iter(prefixes.values())).scale
    _add(layer, scale, size, _choosing_layer(layer.__class__))


def _add(layer: Attention, scale: float, size: int, layer_class: Any) -> None:
    layer.apt_head_dim, layer.apt_hidden_states, layer.apt_scale = layer.head_size, None, scale
    layer.head_size = layer.head_size_v = size
    layer.attn_backend = _marked_backend(layer.attn_backend)
    kind = _marked_impl(layer.impl.__class__)
    impl = kind.__new__(kind)  # the class of an existing implementation cannot be changed
    vars(impl).update(vars(layer.impl), head_size=size, apt_head_dim=layer.apt_head_dim, apt_marked=None)
    layer.impl = impl
    layer.__class__ = layer_class


def remember_hidden_states(layer: Attention):
    """A forward pre-hook of the module around ``layer``: stores that module's input for the call of ``layer``.

    The layer itself is called with query, key and value only. An attribute is safe, because vLLM runs one forward at a
    time in a process (`refusals` rejects microbatches). torch.compile traces it; it would not trace a context variable.
    """

    def before(module, args: tuple, kwargs: dict) -> None:
        hidden = kwargs.get("hidden_states")
        if hidden is None:  # vLLM's models pass it by position too, after positions of integers
            hidden = next(part for part in args if isinstance(part, Tensor) and part.is_floating_point())
        layer.apt_hidden_states = hidden.reshape(-1, hidden.shape[-1])

    return before


class _Prefixed(_Base):
    """Mixin before an attention layer's class. torch.compile traces it with the model, up to vLLM's own operator."""

    apt_hidden_states: Tensor | None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, output_shape=None, output_dtype=None) -> Tensor:
        hidden, self.apt_hidden_states = self.apt_hidden_states, None
        query = query.view(-1, self.num_heads, self.apt_head_dim)
        key, value = (part.view(-1, self.num_kv_heads, self.apt_head_dim) for part in (key, value))
        prefix_out, logsumexp = self._attend_to_prefix(query, hidden)
        out = super().forward(
            marker.pad_query(query, logsumexp, self.apt_scale, self.head_size).flatten(1),
            marker.pad_zeros(key, self.head_size).flatten(1),
            marker.pad_zeros(value, self.head_size).flatten(1),
        )
        return marker.merge(out.view(-1, self.num_heads, self.head_size), prefix_out).flatten(1)

    def _attend_to_prefix(self, query: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = self.apt.logits(hidden)
        if logits is not None and self.apt.entry.kept_in_cache:
            logits = torch.ops.apt_kernels_vllm.first_gate(logits, self.layer_name)
        return self.apt(query, logits)


class _Choosing(_Prefixed):
    """The same with several adapters."""

    def _attend_to_prefix(self, query: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.apt_kernels_vllm.chosen_prefix(query, hidden, self.layer_name)


class _MarkedImpl(_Base):
    """Mixin before an attention implementation's class: writes the marker into a cache that does not contain it yet."""

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        if attn_metadata is not None and self.apt_marked != kv_cache.data_ptr():
            self._mark(layer, kv_cache)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

    def _mark(self, layer, kv_cache: Tensor) -> None:
        length = layer.apt_block_size
        key, value = marker.block(
            length,
            self.num_kv_heads,
            self.apt_head_dim,
            self.head_size,
            torch.empty(0, dtype=layer.kv_cache_torch_dtype, device=kv_cache.device),
        )
        slots = torch.arange(length, device=kv_cache.device) + _NULL_BLOCK * length
        self.do_kv_cache_update(layer, key, value, kv_cache, slots)
        self.apt_marked = kv_cache.data_ptr()


class _MarkedBuilder(_Base):
    """Mixin before a metadata builder's class: puts the marker's block in front of each request's blocks."""

    # Full CUDA graphs need metadata at fixed addresses. `build` creates new tensors, so graphs are piecewise.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        layers = vllm_config.compilation_config.static_forward_context
        for name in layer_names:
            # The block size of the kernel. The cache manager's block size may be a multiple of it.
            layers[name].apt_block_size = kv_cache_spec.block_size
        self.apt_batch = layers[layer_names[0]].apt_batch

    @classmethod
    def get_cudagraph_support(cls, *args, **kwargs):
        return AttentionCGSupport.NEVER

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        return False

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False, **kwargs):
        metadata = super().build(0, self._behind_marker(common_attn_metadata), fast_build, **kwargs)
        if self.apt_batch is not None:
            metadata.apt_choice = self.apt_batch.choice(common_attn_metadata)
        return metadata

    def _behind_marker(self, given):
        more = self.kv_cache_spec.block_size

        def longer(lengths: Tensor | None) -> Tensor | None:  # rows of 0 are padding of the batch
            return None if lengths is None else torch.where(lengths > 0, lengths + more, 0).to(lengths.dtype)

        table = given.block_table_tensor
        first = torch.full_like(table[:, :1], _NULL_BLOCK)
        return given.replace(
            seq_lens=longer(given.seq_lens),
            seq_lens_cpu_upper_bound=longer(given.seq_lens_cpu_upper_bound),
            max_seq_len=given.max_seq_len + more,
            block_table_tensor=torch.cat([first, table], dim=1),
            _num_computed_tokens_cache=None,
        )


# One derived class per original class (cached), because vLLM groups layers by the name of their backend.
@functools.cache
def _prefixed_layer(kind: Any) -> Any:
    return type(f"Prefixed{kind.__name__}", (_Prefixed, kind), {})


@functools.cache
def _choosing_layer(kind: Any) -> Any:
    return type(f"Choosing{kind.__name__}", (_Choosing, kind), {})


@functools.cache
def _marked_impl(kind: Any) -> Any:
    return type(f"Marked{kind.__name__}", (_MarkedImpl, kind), {})


@functools.cache
def _marked_backend(kind: Any) -> Any:
    builder = kind.get_builder_cls()
    marked = type(f"Marked{builder.__name__}", (_MarkedBuilder, builder), {})
    return subclass_attention_backend("Marked", kind, marked)
