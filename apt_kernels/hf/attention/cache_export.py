"""The cache of gate ``first`` in `torch.export`: a pytree with the gates beside keys and values."""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.integrations import executorch

from .. import compat
from . import gate_cache

_Kept = gate_cache.keeping(DynamicCache)


def register_cache_for_export() -> None:
    """Register transformers' ``DynamicCache`` with torch, so that an exported program takes and returns it.

    Like ``transformers.integrations.executorch.register_dynamic_cache_export_support``, which it calls, and in addition
    for the cache of a model with the gate ``first``: the program's cache then holds the prompt's gates as well. Call it
    before `torch.export.export`, and before ``torch.export.load`` of such a program. A second call does nothing.

    Raises:
        PatchError: transformers or torch lack a name that it needs.

    Examples:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> model = apt_kernels.patch(model, prefix_length=16, gate="first")
        >>> apt_kernels.register_cache_for_export()
        >>> prompt = torch.tensor([[1, 2, 3, 4]])
        >>> given = {"input_ids": prompt, "past_key_values": model(prompt[:, :3]).past_key_values}
        >>> given["input_ids"] = prompt[:, 3:]  # this example has one size; see dynamic_shapes of torch.export
        >>> program = torch.export.export(model, (), given, strict=False)
        >>> program.module()(**given).past_key_values.get_seq_length()
        4
    """
    compat.require("exported caches", "exported pytrees")
    executorch.register_dynamic_cache_export_support()
    try:
        torch.utils._pytree.register_pytree_node(
            _Kept,
            _flatten,
            _unflatten,
            serialized_type_name=f"{gate_cache.__name__}.{_Kept.__name__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )
    except ValueError as error:
        if "already registered" not in str(error):
            raise
    torch.fx._pytree.register_pytree_flatten_spec(_Kept, lambda cache, spec: _flatten(cache)[0])


def _flatten(cache) -> tuple[list, list]:
    """The cache without the gates, the gates, and which rows have them; their owners, as lists for JSON."""
    plain, kept = DynamicCache(), cache.apt_gates
    plain.layers = cache.layers
    parts = [plain, [each.gate for each in kept.values()], [each.begun for each in kept.values()]]
    return parts, [list(owner) for owner in kept]


def _flatten_with_keys(cache) -> tuple[list, list]:
    parts, owners = _flatten(cache)
    return [*zip(map(torch.utils._pytree.MappingKey, ("cache", "gates", "begun")), parts)], owners


def _unflatten(parts, owners: list):
    plain, gates, begun = parts
    # The program itself decides which rows still wait for their gate.
    kept = [gate_cache.Kept(*each, True) for each in zip(gates, begun)]
    cache = _Kept()
    cache.layers = plain.layers
    cache.apt_gates = {tuple(owner): each for owner, each in zip(owners, kept)}
    return cache
