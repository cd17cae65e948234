"""Weights that are sharded over processes: gathered before they are read or written."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, PatchError
from . import compat

# How long a process waits for the others before it gathers: the default timeout of NCCL's collectives.
PATIENCE = timedelta(minutes=10)
# The number of rendezvous of the processes of these ranks.
_met: Counter[tuple[int, ...]] = Counter()


def fsdp1() -> tuple[Any, ...]:
    """The wrapper FullyShardedDataParallel; none where it was never imported."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return () if kind is None else (kind,)


def refuse_pieces(model) -> None:
    """Raise `PatchError` if FullyShardedDataParallel holds shards, whose sizes are not those of the parameters."""
    if any(isinstance(module, fsdp1()) for module in model.modules()):
        raise PatchError(
            "FullyShardedDataParallel holds the parameters in pieces, and their sizes are not those of the model; call "
            "apt_kernels.summary before it wraps the model"
        )


def distributes(model) -> bool:
    """Whether parameters are distributed tensors, as under FSDP2 and tensor parallelism."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def reshard(model) -> None:
    """Make FSDP2 shard what it keeps gathered after a forward: what is written to gathered weights is lost."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in model.modules() if kind is not None and isinstance(model, nn.Module) else ():
        if isinstance(module, kind):
            module.reshard()


@contextmanager
def gathered(model, parameters: Iterable[Tensor], changed: bool = False) -> Iterator[None]:
    """Within this context, parameters that ZeRO-3 or FullyShardedDataParallel shard are gathered.

    ``changed``: values written to them are kept. Every process has to enter it, with the wrapped model.
    """
    parameters = list(parameters)
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if isinstance(model, fsdp1()):
        compat.require("fsdp")
        with type(model).summon_full_params(model, writeback=changed):
            yield
    elif any(getattr(parameter, "_fsdp_flattened", False) for parameter in parameters):
        raise PatchError(
            "FullyShardedDataParallel holds the weights of the model in pieces; pass the "
            "FullyShardedDataParallel itself, or a state_dict"
        )
    elif spread:
        import deepspeed

        with deepspeed.zero.GatheredParameters(spread, modifier_rank=0 if changed else None):
            yield
    else:
        yield


def in_float32(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 values that DeepSpeed trains in the place of half-precision parameters of ZeRO-3, gathered, by name.

    Every process has to call.
    """
    ours = {name: p for name, p in parameters.items() if is_zero3_half(p)}
    if not ours:
        return {}
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: safe_get_full_fp32_param(parameter) for name, parameter in ours.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def is_zero3_half(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in half precision."""
    return hasattr(parameter, "ds_id") and parameter.dtype in (torch.float16, torch.bfloat16)


def meet(model, parameters: Iterable[Tensor]) -> None:
    """Wait until every process that holds a part of ``parameters`` has called this, before they are gathered.

    Raises `AdapterError` after `PATIENCE`: a collective that not all enter would wait for ever, or break its group.
    """
    parameters = list(parameters)
    ranks = {rank for p in parameters if hasattr(p, "device_mesh") for rank in p.device_mesh.mesh.flatten().tolist()}
    if isinstance(model, fsdp1()) or any(hasattr(p, "ds_id") for p in parameters):
        ranks = set(range(torch.distributed.get_world_size()))
    several = len(ranks) > 1 and compat.available("missing ranks")
    store = torch.distributed.distributed_c10d._get_default_store() if several else None
    if store is None:  # one process, or MPI
        return
    group, me = tuple(sorted(ranks)), torch.distributed.get_rank()
    meeting = f"apt_kernels/{hash(group)}/{_met[group]}"
    keys = {rank: f"{meeting}/{rank}" for rank in group}
    store.set(keys[me], "here")
    try:
        store.wait(list(keys.values()), PATIENCE)
    except RuntimeError as error:  # stores raise different errors, all derived from this one
        late = [rank for rank, key in keys.items() if not store.check([key])]
        store.delete_key(keys[me])
        raise AdapterError(
            f"the weights are spread over the processes {list(group)}, and each has to call save (under FSDP2 and "
            "tensor parallelism save_pretrained(..., is_main_process=False) does as well), or the one that writes "
            f"needs the gathered state_dict; {late} did not within {PATIENCE}"
        ) from error
    _met[group] += 1


def placed_like(target, tensor: Tensor) -> Tensor:
    """``tensor``, distributed over the processes if ``target`` is a distributed tensor."""
    if not hasattr(target, "device_mesh") or hasattr(tensor, "device_mesh"):
        return tensor
    from ..prefix.sharding import distribute

    return distribute(tensor.to(target.device), target.device_mesh, target.placements)
