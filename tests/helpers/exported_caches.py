"""The registration of caches with torch, which `apt_kernels.register_cache_for_export` changes, as it was before."""

import torch
from transformers import DynamicCache

from apt_kernels.hf.attention import gate_cache


def forget() -> None:
    """Undo `apt_kernels.register_cache_for_export`, if it was called."""
    for kind in (DynamicCache, gate_cache.keeping(DynamicCache)):
        if kind in torch.utils._pytree.SUPPORTED_NODES:
            torch.utils._pytree._deregister_pytree_node(kind)
        for registered in (torch.fx._pytree.SUPPORTED_NODES, torch.fx._pytree.SUPPORTED_NODES_EXACT_MATCH):
            registered.pop(kind, None)
