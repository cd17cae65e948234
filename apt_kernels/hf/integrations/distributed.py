"""Models spread over processes: what `patch` has to know of them, and when it comes too late."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch
from torch import Tensor, nn

from ...errors import AdapterError, PatchError
from ..discovery.recording import Site
from ..state import engines, fsdp1

# How long a process waits for the others before it gathers: as long as a collective of NCCL does.
PATIENCE = timedelta(minutes=10)
# How often the processes of these ranks have met.
_met: Counter[tuple[int, ...]] = Counter()


def refuse_wrapped(model) -> None:
    """Raise `PatchError` if ``model`` was wrapped in a way that has settled which parameters it has."""
    for module in model.modules():
        if isinstance(module, _settled()):
            name = type(module).__name__
            raise PatchError(
                f"the model is already wrapped for training on several processes ({name}), which would leave the "
                "prefixes out of it: their gradients would differ between the processes. Call apt_kernels.patch (and "
                "add_adapter, set_adapter, prune) before"
            )


def refuse_pieces(model) -> None:
    """Raise `PatchError` if FullyShardedDataParallel holds the parameters in pieces, of which sizes tell nothing."""
    if any(isinstance(module, fsdp1()) for module in model.modules()):
        raise PatchError(
            "FullyShardedDataParallel holds the parameters in pieces, and their sizes are not those of the model; call "
            "apt_kernels.summary before it wraps the model"
        )


def refuse_to_undo(model) -> None:
    """Raise `PatchError` where a wrapper would go on with the parameters that the patched model had."""
    for module in model.modules():
        if isinstance(module, _wrappers()):
            raise PatchError(
                f"{type(module).__name__} has settled which parameters it keeps equal between the processes: the base "
                "model's, which would train again, are not among them. Hand over the model inside, before it is wrapped"
            )


def _settled() -> tuple[type, ...]:
    module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return (*_wrappers(), *([] if module is None else [module]))


def _wrappers() -> tuple[type, ...]:
    return (nn.parallel.DistributedDataParallel, *fsdp1(), *engines())


def with_meshes(model, sites: list[Site]) -> list[Site]:
    """``sites`` with the mesh over which tensor parallelism spreads them, and with the heads of all processes.

    Raises `PatchError` where the sharding of an attention module's heads cannot be told.
    """
    if not distributes(model):
        return sites
    return [_with_mesh(model, site) for site in sites]


def distributes(model) -> bool:
    """Whether parameters are distributed tensors, as under FSDP2 and tensor parallelism."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _with_mesh(model, site: Site) -> Site:
    module = model.get_submodule(site.name)
    sharded = [p for p in module.parameters() if hasattr(p, "device_mesh") and any(x.is_shard() for x in p.placements)]
    if not sharded:
        return site
    mesh, config = sharded[0].device_mesh, getattr(module, "config", model.config).get_text_config()
    total, kv_total = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if total == site.heads:
        return replace(site, mesh=mesh)  # the projections' outputs are gathered
    kv_heads = site.kv_heads * mesh.size()
    if mesh.ndim != 1 or total != site.heads * mesh.size() or kv_total not in (None, kv_heads):
        raise PatchError(
            f"{site.name} attends with {site.heads} query heads and {site.kv_heads} key/value heads on this process; "
            f"the config has {total} and {kv_total}, and {mesh.size()} processes hold its weights: how its heads are "
            "spread over them is not known"
        )
    return replace(site, heads=total, kv_heads=kv_heads, mesh=mesh, sharded=True)


def shared_generator(seed: int | None, sites: list[Site]) -> torch.Generator | None:
    """Where prefixes are drawn from: with tensor parallelism, the same on all processes; None: torch's generator."""
    mesh = next((site.mesh for site in sites if site.mesh is not None), None)
    if seed is None and mesh is not None:
        drawn = torch.randint(2**63 - 1, (1,)).to(mesh.device_type)
        torch.distributed.broadcast(drawn, group=mesh.get_group(), group_src=0)
        seed = int(drawn)
    return None if seed is None else torch.Generator().manual_seed(seed)


@contextmanager
def gathered(model, parameters: Iterable[Tensor], changed: bool = False) -> Iterator[None]:
    """Within, parameters that ZeRO-3 or FullyShardedDataParallel spread over processes are whole.

    ``changed``: what is written to them is kept. Every process has to come here, with the model as it is wrapped.
    """
    parameters = list(parameters)
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if isinstance(model, fsdp1()):
        with type(model).summon_full_params(model, writeback=changed):
            yield
    elif any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise PatchError(
            "FullyShardedDataParallel holds the weights of the model in pieces; hand over the "
            "FullyShardedDataParallel itself, or a state_dict"
        )
    elif spread:
        import deepspeed

        with deepspeed.zero.GatheredParameters(spread, modifier_rank=0 if changed else None):
            yield
    else:
        yield


def meet(model, parameters: Iterable[Tensor]) -> None:
    """Wait until every process that holds a part of ``parameters`` has come here, before they are gathered.

    Raises `AdapterError` after `PATIENCE`: a collective that not all enter would wait for ever, or break its group.
    """
    parameters = list(parameters)
    ranks = {rank for p in parameters if hasattr(p, "device_mesh") for rank in p.device_mesh.mesh.flatten().tolist()}
    if isinstance(model, fsdp1()) or any(hasattr(p, "ds_id") for p in parameters):
        ranks = set(range(torch.distributed.get_world_size()))
    store = torch.distributed.distributed_c10d._get_default_store() if len(ranks) > 1 else None
    if store is None:  # one process, or MPI
        return
    ranks, me = tuple(sorted(ranks)), torch.distributed.get_rank()
    meeting = f"apt_kernels/{hash(ranks)}/{_met[ranks]}"
    keys = {rank: f"{meeting}/{rank}" for rank in ranks}
    store.set(keys[me], "here")
    try:
        store.wait(list(keys.values()), PATIENCE)
    except RuntimeError as error:  # stores differ in what they raise; all of it derives from this
        late = [rank for rank, key in keys.items() if not store.check([key])]
        store.delete_key(keys[me])
        raise AdapterError(
            f"the weights are spread over the processes {list(ranks)}, and each has to call save (under FSDP2 and "
            "tensor parallelism save_pretrained(..., is_main_process=False) does as well), or the one that writes "
            f"needs the gathered state_dict; {late} did not within {PATIENCE}"
        ) from error
    _met[ranks] += 1
