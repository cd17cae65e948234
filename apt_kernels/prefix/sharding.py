"""Tensor parallelism: the heads of a prefix are sharded over processes, its parameters are distributed tensors."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def shard_heads(prefix, mesh) -> None:
    """Distribute a prefix's parameters over a one-dimensional ``mesh``: key and value by heads, the others replicated.

    Before the call, every process has to hold the same values of all heads.
    """
    prefix.mesh = mesh
    for module in prefix.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            tokens = module is prefix and name.removeprefix("frozen_") in ("key", "value")
            made = distribute(parameter.detach(), mesh, [Shard(0) if tokens else Replicate()])
            setattr(module, name, nn.Parameter(made, requires_grad=parameter.requires_grad))


def distribute(tensor: Tensor, mesh, placements) -> DTensor:
    """A tensor that every process holds, as a distributed one: each keeps its own part, without communication."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def by_heads(tokens: DTensor) -> DTensor:
    """Key or value ``[Hkv, M, D]`` with its heads sharded, from any placement."""
    return tokens.redistribute(placements=[Shard(0)])


def sum_gradient(tensor: Tensor, mesh) -> Tensor:
    """``tensor``, which every process of ``mesh`` holds; its gradient is summed over the processes."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
