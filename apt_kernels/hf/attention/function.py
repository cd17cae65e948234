"""The call of the op: the attention module's forward, which has the hidden states, and the attention function."""

from __future__ import annotations

import sys
from functools import cache as memoise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import PatchError, its_type
from ...mask import Mask
from ...ops.attention import attention
from .. import calls
from . import gate_cache, paged_cache, replaced, rows, subclass
from .masks import AttentionMask, describe

NAME = "apt_kernels"
_CACHES = ("past_key_values", "past_key_value", "layer_past")
# The attributes in which modules have the index of their layer in the cache.
_LAYER = ("layer_idx", "layer_id")


class Prefixed(subclass.Mixin):
    """Added to the class of an attention module that has a prefix (``module.apt``)."""

    apt_token = apt_held = None

    apt_around = None  # called as ``apt_around(forward, args, kwargs)`` in the place of the base's forward

    def forward(self, *args, **kwargs):
        if self.apt_held is not None:  # a replica, in a thread of nn.DataParallel
            return calls.applied(self.apt_held, _forward, self, super().forward, args, kwargs)
        return _forward(self, super().forward, args, kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.apt_held = calls.hold()
        return replica


def _forward(module, forward, args, kwargs):
    """``forward(*args, **kwargs)``, with what the attention function needs beside its own arguments."""
    (prefix, mixture), local = rows.serving(module), calls.local
    if prefix is None:
        return forward(*args, **kwargs)
    cache = filled = None
    keeping = mixture.prefixes if mixture else [prefix]
    if any([each.gate_entry.kept_in_cache for each in keeping]):
        keeping = [each for each in keeping if each.gate_entry.kept_in_cache]
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        filled = cache is not None and any(_holds_tokens(cache, module, each) for each in keeping)
    hidden_states, outer = kwargs.get("hidden_states", args[0] if args else None), local.call
    call = calls.Call(module, hidden_states, cache, bool(filled), outer, mixture)
    try:
        local.call = call
        around = module.apt_around
        output = forward(*args, **kwargs) if around is None else around(forward, args, kwargs)
    finally:
        local.call = outer
    if not call.served:
        raise PatchError(
            f"{prefix.name} attended without its prefix: the model's attention implementation was switched away "
            f"from {NAME!r}. Switch it back with model.set_attn_implementation({NAME!r}), or call "
            "apt_kernels.unpatch(model) first"
        )
    return output


def _holds_tokens(cache, module, prefix) -> bool:
    """Whether the cache has tokens of this module from an earlier forward, and therefore has to have its gate."""
    if gate_cache.has(cache, (prefix.name, prefix.adapter)):
        return True
    if prefix.cross:
        cache = getattr(cache, "cross_attention_cache", cache)
    index = next((i for i in map(module.__dict__.get, _LAYER) if isinstance(i, int)), None)
    try:
        return index is not None and int(cache.get_seq_length(index)) > 0
    except ValueError:  # a layer that uses the keys of another layer has none in the cache
        return False


def attention_forward(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function registered with transformers: ``[B, T, Hq, Dv]`` and no attention weights."""
    prefix, mixture = rows.serving(module)
    if cache is not None:
        key, value = paged_cache.update(module, cache, key, value, kwargs)
    if prefix is None:
        given = dict(is_causal=is_causal, softcap=softcap, s_aux=s_aux, position_bias=position_bias, **kwargs)
        return attend_without_prefix(module, query, key, value, attention_mask, dropout, scaling, given)
    call = calls.local.call
    if call is None or call.module is not module:
        call = calls.call_of(module)
    call.served = True
    out = attention(
        query,
        key,
        value,
        **_parts(prefix, call, attention_mask, query),
        mask=_mask(module, query, key, attention_mask, is_causal, position_bias),
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        implementation=prefix.implementation if mixture is None else mixture.implementation,
    )
    return out.transpose(1, 2).contiguous(), None


def _parts(prefix, call: calls.Call, attention_mask, query: Tensor) -> dict[str, Any]:
    """The prefix, gate and layer scale of the running forward, as keywords of the op."""
    real = segments = None
    if isinstance(attention_mask, AttentionMask) and not prefix.cross:
        real, segments = attention_mask.real_tokens(query.shape[2]), attention_mask.mask.query_segments
    elif isinstance(attention_mask, Tensor) and not prefix.cross and attention_mask.ndim == 4:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > _closed(attention_mask)
        real = _real(seen, query)
    return _gated(prefix, call, query, real, segments)


def parts_inline(prefix, call: calls.Call, seen: Tensor | None, query: Tensor, time_major: bool) -> dict[str, Any]:
    """`_parts` of a module with inline attention; ``seen [B, H, T, S]`` determines which queries are padding."""
    if seen is not None and call.filled:
        seen = seen[..., -query.shape[2] :]  # the queries follow the keys of the cache
    return _gated(prefix, call, query, None if seen is None else _real(seen, query), None, time_major)


def _real(seen: Tensor, query: Tensor) -> Tensor:
    """``[B, T]``: tokens that no other query sees are padding (in some models, padding sees itself)."""
    batch, queries = query.shape[0], query.shape[2]
    seen = seen[..., :queries].any(dim=1)
    own = torch.eye(queries, seen.shape[-1], dtype=torch.bool, device=seen.device)
    by_others, at_all = (part.any(dim=1).expand(batch, -1) for part in (seen & ~own, seen))
    return torch.where(by_others.any(dim=1, keepdim=True), by_others, at_all)


def _gated(prefix, call: calls.Call, query: Tensor, real, segments, time_major: bool = False) -> dict[str, Any]:
    if call.mixture is None:
        key, value, gate, scale = _of_rows(prefix, None, call, query, real, segments, time_major)
        return {"prefix_key": key, "prefix_value": value, "gate": gate, "layer_scale": scale}

    def part(prefix, chosen):
        return _of_rows(prefix, chosen, call, query, real, segments, time_major)

    return call.mixture.parts(query.shape[0], query.device, part)


def _of_rows(
    prefix, chosen: Tensor | None, call: calls.Call, query: Tensor, real, segments, time_major: bool
) -> tuple[Tensor | None, ...]:
    """Prefix key, prefix value, gate logits and layer scale; the logits of the rows ``chosen`` (None: of all).

    A gate that a cache keeps is that of all rows: generation reorders and repeats them.
    """
    cache, owner = (call.cache if prefix.gate_entry.kept_in_cache else None), (prefix.name, prefix.adapter)
    if not prefix.gate_entry.reads_hidden_states:
        key, value, gate, scale = prefix(None)
    elif cache is not None and call.filled and not gate_cache.waits(cache, owner):
        key, value, _, scale = prefix(None)
        return key, value, gate_cache.recall(cache, owner), scale
    else:
        # In a model on several devices, a hook that runs after this one may move the inputs.
        hidden_states = call.hidden_states.to(query.device)
        hidden_states = hidden_states.transpose(0, 1) if time_major else hidden_states
        hidden_states = hidden_states.reshape(query.shape[0], query.shape[2], -1)
        if chosen is not None and cache is None:
            hidden_states, real, segments = (
                part if part is None or part.shape[0] != query.shape[0] else part.index_select(0, chosen)
                for part in (hidden_states, real, segments)
            )
        key, value, gate, scale = prefix(hidden_states, real, segments)
    if calls.local.observe is not None:
        calls.local.observe(prefix, gate, real)
    if cache is not None:
        begun = None if real is None else real.any(dim=1)
        gate = gate_cache.keep(cache, owner, gate, begun, add=call.filled)
    return key, value, gate, scale


def _closed(mask: Tensor) -> float:
    """The largest value that hides a key: additive masks use the dtype's minimum or minus infinity."""
    return torch.finfo(mask.dtype).min / 2


def causal_without_mask(module) -> bool:
    """Whether a module is causal without a mask: by its attribute ``is_causal`` or, if it has none, as in transformers.

    Its sdpa function then is causal; eager attention, the only one that some models support, is not.
    """
    return getattr(module, "is_causal", _supports_sdpa(sys.modules[type(module).__module__]))


@memoise
def _supports_sdpa(source) -> bool:
    return any(getattr(found, "_supports_sdpa", False) is True for found in vars(source).values())


def _mask(module, query: Tensor, key: Tensor, attention_mask, is_causal, position_bias) -> Mask | None:
    """The op's mask; tensors and None have the meaning that they have in transformers' sdpa function."""
    if isinstance(attention_mask, AttentionMask):
        mask = attention_mask.mask
        if attention_mask.shape[3] != key.shape[2] and not attention_mask.hides_nothing:
            raise PatchError(f"the mask is for {attention_mask.shape[3]} keys; the layer has {key.shape[2]}")
    elif isinstance(attention_mask, Tensor):
        dense = attention_mask.dtype == torch.bool
        mask = Mask(dense=attention_mask) if dense else Mask(bias=attention_mask)
    elif attention_mask is None:
        causal = is_causal if is_causal is not None else causal_without_mask(module)
        mask = Mask(causal=True, query_offset=0) if causal and query.shape[2] > 1 else None
    else:
        raise PatchError(f"the attention mask is {its_type(attention_mask)}; it needs a tensor or None")
    if position_bias is None:
        return mask
    mask = Mask() if mask is None else mask
    bias = position_bias if mask.bias is None else position_bias + mask.bias
    return Mask(**{**mask.__dict__, "bias": bias})


def attend_without_prefix(module, query, key, value, attention_mask, dropout, scaling, given) -> tuple:
    """The attention of a module without a prefix: that of the model before the patch."""
    name = getattr(module, "apt_before", None) or "sdpa"
    drops = given["softcap"] is not None or given["s_aux"] is not None
    if name == "sdpa" and drops and replaced.eager_of(module) is not None:
        name = "eager"  # the sdpa function of some releases ignores both without an error
    if isinstance(attention_mask, AttentionMask):
        # Flash attention reads packed documents from the keywords.
        if attention_mask.packed and "flash" not in name:
            attention_mask = _as_tensor(attention_mask, query, additive=name == "eager")
        else:
            attention_mask = replaced.mask_of(attention_mask, name)
    given = {each: option for each, option in given.items() if option is not None}
    function = replaced.function_of(module, name)
    return function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given)


def _as_tensor(described: AttentionMask, query: Tensor, additive: bool) -> Tensor:
    """The ``[B, 1, T, S]`` tensor that `AttentionMask` represents."""
    batch, _, queries, keys = described.shape
    seen = described.mask.visible(batch, queries, keys, query.device)
    if not additive:
        return seen
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~seen, torch.finfo(query.dtype).min)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, describe)
