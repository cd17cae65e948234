"""The attention functions from before a patch: layers without a prefix keep them; in the others they are checked."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import PatchError
from ..site import Site
from .masks import AttentionMask

_sdpa = torch.nn.functional.scaled_dot_product_attention
# What transformers ships computes softmax(scale q k^T + mask) v, as the op does; so do hub kernels ("owner/name").
_PLAIN = ("eager", "sdpa", "flex_attention")
_TOKENS = 5
# The tolerance allows for half precision inside a function; a change of the scores differs by far more.
_SAME = 2e-2


def is_plain(name: str | None) -> bool:
    """Whether the attention implementation ``name`` is known to compute plain attention."""
    return name is None or name in _PLAIN or "flash" in name or "|" in name or "/" in name


def eager_of(module: nn.Module) -> Callable | None:
    """The function that the modeling code of ``module`` calls for the implementation "eager"."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def function_of(module: nn.Module, name: str | None) -> Callable:
    """The attention function that ``module`` called for the implementation ``name``."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_of(module) or ALL_ATTENTION_FUNCTIONS["sdpa"])


def mask_of(described: AttentionMask, name: str):
    """The mask that the implementation ``name`` would have created; None if it takes none."""
    if name not in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    if name not in described.others:
        described.others[name] = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[name](**described.arguments)
    return described.others[name]


def check(sites: list[Site], module_of: Callable[[str], Any]) -> None:
    """Raise `PatchError` if a prefix would replace an attention function that is not plain attention.

    ``module_of(name)`` gives a site's module, whose ``apt_before`` names the function. A function that the user
    registered is called once for each name, with random tensors; if it computes plain attention, a warning says that it
    is replaced.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        name = module_of(site.name).apt_before
        if site.inline is None and not is_plain(name):
            found.setdefault(name, []).append(site)
    for name, replaced in found.items():
        site = replaced[0]
        if site.device.type != "meta" and site.mesh is None:
            _compare(name, site, module_of(site.name))
        warnings.warn(
            f"the attention function {name!r} of {len(replaced)} modules ({site.name}, ...) is replaced by "
            "apt_kernels.attention, which adds the prefix; modules without a prefix keep it",
            stacklevel=4,
        )


def _compare(name: str, site: Site, module: nn.Module) -> None:
    instead = (
        "Leave these layers without a prefix (layers=...), or set another implementation before the patch, such as "
        "model.set_attn_implementation('sdpa')"
    )
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def draw(heads: int, size: int) -> Tensor:
        return torch.randn(1, heads, _TOKENS, size, generator=generator).to(site.device, dtype)

    query, key = draw(site.heads, site.head_dim), draw(site.kv_heads, site.head_dim)
    value, scale = draw(site.kv_heads, site.value_head_dim), site.head_dim**-0.5
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if mask is not None:
        kind = masking_utils.causal_mask_function if site.causal else masking_utils.bidirectional_mask_function
        mask = mask(
            batch_size=1,
            q_length=_TOKENS,
            kv_length=_TOKENS,
            q_offset=0,
            kv_offset=0,
            mask_function=kind,
            attention_mask=None,
            device=site.device,
            dtype=query.dtype,
            config=module.config,
        )
    try:
        with torch.no_grad():
            out = ALL_ATTENTION_FUNCTIONS[name](module, query, key, value, mask, dropout=0.0, scaling=scale)[0]
            key, value = (part.repeat_interleave(site.heads // site.kv_heads, dim=1) for part in (key, value))
            plain = _sdpa(query, key, value, is_causal=site.causal, scale=scale).transpose(1, 2)
            same = out.shape == plain.shape and torch.allclose(out.float(), plain.float(), rtol=_SAME, atol=_SAME)
    except Exception as error:  # a function of the user may raise any error
        raise PatchError(
            f"{site.name} attends by {name!r}, which could not be compared with softmax attention "
            f"({type(error).__name__}: {error}); a prefix would replace it. {instead}"
        ) from error
    if not same:
        raise PatchError(
            f"{site.name} attends by {name!r}, which gives other outputs than softmax attention (other scores or "
            f"another mask), and a prefix would replace it. {instead}"
        )
