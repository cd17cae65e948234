"""Add the prefixes to a model that vLLM has loaded. All layers are found and checked before any is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention

from ...errors import AdapterError
from . import layers, marker, refusals
from .adapter import Adapter
from .prefix import ServedPrefix
from .several import Batch

# The head sizes that kernels support are multiples of this.
_STEP = 8


@dataclass
class _Checked:
    """A layer, the module around it, the head size of its kernel, and its prefixes by the adapter's number."""

    layer: Attention
    parent: nn.Module
    size: int
    prefixes: dict[int, ServedPrefix] = field(default_factory=dict)


def attach(model: nn.Module, adapters: Sequence[Adapter], batch: Batch | None = None) -> None:
    """Give each attention layer of ``model`` its prefixes of ``adapters``, which have numbers from 1.

    Args:
        model: the model, loaded.
        adapters: one for all requests; with ``batch`` any number, from which ``batch`` says which each request has.
        batch: the running batch.

    Raises:
        AdapterError: a layer of the adapter is not in the model, or has other sizes there.
        ConfigError: a layer cannot be served; the message says why.
    """
    made: dict[Attention, _Checked] = {}
    for number, adapter in enumerate(adapters, 1):
        for site, (parent, layer) in _by_site(model, adapter).items():
            fields = adapter.layers[site]
            refusals.check_layer(layer, site)
            _check(adapter, site, layer, fields)
            prefix = ServedPrefix(adapter.gate(site), fields, _heads(layer, fields["key"].shape[0]), layer.impl.scale)
            one = made.setdefault(layer, _Checked(layer, parent, _size(layer, site)))
            one.prefixes[number] = prefix.to(next(model.parameters()).device)
    for one in made.values():
        if batch is None:
            layers.add_prefix(one.layer, one.prefixes[1], one.size)
        else:
            layers.add_prefixes(one.layer, one.prefixes, one.size, batch)
        if any(prefix.gate_weight is not None for prefix in one.prefixes.values()):
            one.parent.register_forward_pre_hook(layers.remember_hidden_states(one.layer), with_kwargs=True)


def _by_site(model: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Module, Attention]]:
    """For each attention module of the adapter: the module in vLLM's model, and the attention layer inside it."""
    here: dict[str, tuple[nn.Module, list[Attention]]] = {}
    for name, module in model.named_modules():
        inside = [child for child in module.children() if isinstance(child, Attention)]
        if inside:
            here[name] = module, inside
    found = {}
    for site in adapter.layers:
        parent, inside = here.get(_name_here(model, site), (None, []))
        if parent is None or len(inside) != 1:
            raise AdapterError(
                f"{adapter.path} has a prefix for {site}; vLLM's {type(model).__name__} has attention in "
                f"{', '.join(here) or 'no module'}. Try model_impl='transformers'"
            )
        found[site] = parent, inside[0]
    return found


def _name_here(model: nn.Module, site: str) -> str:
    """A module's name in vLLM's model, which may rename those of the checkpoint."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return site
    renamed = mapper.apply_list([f"{site}.apt"])
    return renamed[0].removesuffix(".apt") if renamed else site


def _heads(layer: Attention, total: int) -> slice:
    """The adapter's key heads of this process. With fewer heads than processes, processes have the same head."""
    first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return slice(first, first + layer.num_kv_heads)


def _check(adapter: Adapter, site: str, layer: Attention, fields: Mapping[str, Tensor]) -> None:
    processes = get_tensor_model_parallel_world_size()
    total, length = fields["key"].shape[:2]
    wanted = {
        "key": (total, length, layer.head_size),
        "value": (total, length, layer.head_size_v),
        "gate_logits": (length,),
        "layer_scale": (1,),
    }
    for name, tensor in fields.items():
        shape = tuple(tensor.shape)
        if name in wanted and shape != wanted[name]:
            raise AdapterError(f"{adapter.path}: {site}.apt.{name} is {list(shape)}; vLLM needs {list(wanted[name])}")
    if max(total // processes, 1) != layer.num_kv_heads:
        raise AdapterError(
            f"{adapter.path}: {site}.apt.key has {total} heads; vLLM's layer has {layer.num_kv_heads} on each of "
            f"{processes} processes"
        )


def _size(layer: Attention, site: str) -> int:
    """The smallest head size of vLLM's kernel that has the marker's additional dimensions."""
    sizes = range(-(-(layer.head_size + marker.SPARE) // _STEP) * _STEP, 4 * layer.head_size + 1, _STEP)
    found = next((size for size in sizes if layer.attn_backend.supports_head_size(size)), None)
    if found is None:
        raise refusals.not_served(
            f"{site} has the head size {layer.head_size}: {layer.attn_backend.get_name()} has no kernel with "
            f"{marker.SPARE} dimensions more"
        )
    return found
