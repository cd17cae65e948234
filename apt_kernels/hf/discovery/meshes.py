"""Tensor parallelism: the device mesh over which the heads of an attention module are sharded."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...errors import PatchError
from ..site import Site
from ..weights import distributes


def with_meshes(model, sites: list[Site]) -> list[Site]:
    """``sites`` with their tensor-parallel mesh and with the number of heads on all processes together.

    Raises `PatchError` where the sharding of an attention module's heads cannot be determined.
    """
    if not distributes(model):
        return sites
    return [_with_mesh(model, site) for site in sites]


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
            f"the config has {total} and {kv_total}, and {mesh.size()} processes hold its weights; how its heads are "
            "sharded among them cannot be determined"
        )
    return replace(site, heads=total, kv_heads=kv_heads, mesh=mesh, sharded=True)


def shared_generator(seed: int | None, sites: list[Site]) -> torch.Generator | None:
    """The generator of the initial values, the same on all processes of a mesh; None: torch's global generator."""
    mesh = next((site.mesh for site in sites if site.mesh is not None), None)
    if seed is None and mesh is not None:
        drawn = torch.randint(2**63 - 1, (1,)).to(mesh.device_type)
        torch.distributed.broadcast(drawn, group=mesh.get_group(), group_src=0)
        seed = int(drawn)
    return None if seed is None else torch.Generator().manual_seed(seed)
