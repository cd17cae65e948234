"""The initialisation ``init="vocabulary"``: keys and values of random tokens of the model's own vocabulary.

Keys drawn with the standard deviation 0.02 have logits near 0. Most logits of a decoder's own keys are far lower, so
such a prefix takes much softmax mass from the start. Keys that the model computes for real tokens have logits of the
usual size. M unrelated tokens together would still take too much mass, so their logits are lowered by log(M) + 1.
Adding ``-a u`` to a key lowers its logits by ``a`` for every query ``q`` with ``q . u = 1``. Trained models have a
direction ``u`` for which this holds almost exactly; it is fitted by least squares on random texts (`_direction`).

In a causal model, the queries of the first token differ from the others, and all other queries give the first token
the mass for which a head has no other use (an attention sink). With a prefix, the first prefix token receives this
mass. It is the mean of many tokens, each read alone at the position before the text: what they share as first tokens
remains, and the differences between them average out.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import AptConfig
from ..errors import PatchError
from .capture import Captured, capture_forward, sees_positions
from .discovery import dummy_inputs
from .site import Site

# Rows and tokens of the random texts on whose queries the direction is fitted.
_ROWS, _TOKENS = 8, 32
# The number of single tokens whose mean is the first prefix token of a causal module.
_ALONE = 64
# Added to the diagonal of the queries' second moments, relative to the diagonal's mean.
_RIDGE = 1e-3
# The longest text that is read at once if positions are learned and the config does not give their number.
_LONGEST = 512

Tokens = tuple[Tensor, Tensor]  # key [Hkv, M, D] and value [Hkv, M, Dv]


class _Readings(NamedTuple):
    """The inputs of each attention module for random tokens, by its name."""

    text: dict[str, Captured]  # one text
    alone: dict[str, Captured]  # texts of one token
    asked: dict[str, Captured]  # texts whose queries are used


def vocabulary_tokens(
    model, config: AptConfig, sites: list[Site], lengths: list[int], generator: torch.Generator | None
) -> tuple[dict[str, Tokens], dict[str, str]]:
    """Initial keys and values, and the reasons of modules that get none, by the name of the attention module.

    Args:
        model: the model without prefixes (unpatched, or within `disabled`); it is left as it was.
        config: its gate and layer scale determine the factor by which the tokens are multiplied at the start.
        sites: the attention modules, with their prefix ``lengths``.
        generator: draws the tokens, on the CPU; None: torch's global generator.
    """
    wanted = {site: length for site, length in zip(sites, lengths) if length}
    reasons = {site.name: reason for site in wanted if (reason := _refusal(site))}
    wanted = {site: length for site, length in wanted.items() if site.name not in reasons}
    if not wanted:
        return {}, reasons
    try:
        with torch.autocast(dummy_inputs.device(model).type, enabled=False):
            read = _read(model, max(wanted.values()), generator)
    except Exception as error:  # a model may raise any error for a text alone; the caller reports it
        return {}, {**reasons, **{site.name: f"reading random tokens failed: {error}" for site in wanted}}
    found = {}
    for site, length in wanted.items():
        reason = _mismatch(site, read)
        if reason:
            reasons[site.name] = reason
            continue
        with torch.autocast(site.device.type, enabled=False):
            found[site.name] = _tokens(site, length, read, _start_weight(config))
        if not all(part.isfinite().all() for part in found[site.name]):
            del found[site.name]
            reasons[site.name] = "keys of random tokens are not finite"
    return found, reasons


def _refusal(site: Site) -> str | None:
    if site.inline is not None:
        return "it attends inline"
    if site.repeated:
        return "it attends more than once in a forward"
    if site.sharded:
        return "tensor parallelism shards its heads"
    if "text" not in site.senses:
        return "it reads no text"
    if site.device.type == "meta":
        return "its weights are on the meta device"
    return None


def _mismatch(site: Site, read: _Readings) -> str | None:
    if any(site.name not in each for each in read):
        return "a text alone does not reach it"
    found = read.text[site.name]
    shape = found.key.shape[1], found.key.shape[3], found.value.shape[3]
    if shape != (site.kv_heads, site.head_dim, site.value_head_dim):
        return "it attends over something else than tokens"
    return None


def _start_weight(config: AptConfig) -> float:
    """The factor of a prefix at the start: 1/2 with a gate and without a layer scale, 1 otherwise."""
    return 0.5 if config.gate != "none" and not config.layer_scale else 1.0


def _read(model, length: int, generator: torch.Generator | None) -> _Readings:
    """Run a random text of ``length`` tokens, single tokens, and texts of which the queries are used."""
    body = getattr(model, "base_model", model)
    accepted = inspect.signature(body.forward).parameters
    if "input_ids" not in accepted and "kwargs" not in accepted:
        raise PatchError(f"{type(body).__name__} takes no input_ids")
    vocabulary = _vocabulary(model)
    most = _positions(model)

    def text(rows: int, tokens: int) -> Tensor:
        drawn = torch.randint(len(vocabulary), (rows, tokens), generator=generator)
        return vocabulary[drawn].to(dummy_inputs.device(model))

    def run(ids: Tensor, positions: Tensor | None = None) -> dict[str, Captured]:
        given: dict[str, Any] = {"input_ids": ids}
        if "decoder_input_ids" in accepted:
            given["decoder_input_ids"] = ids
        if "use_cache" in accepted:
            given["use_cache"] = False
        if positions is not None:
            given["position_ids"] = positions.to(ids.device)
        return capture_forward(model, body, **given)

    long, single, short = text(1, length), text(_ALONE, 1), text(_ROWS, min(_TOKENS, most))
    if _can_move(model, accepted, run, short):
        steps = torch.arange(short.shape[1])
        starts = [0, *((most - len(steps)) // 2**i for i in range(_ROWS - 1))]
        return _Readings(
            run(long, torch.arange(-length, 0)[None]),
            run(single, torch.full(single.shape, -1)),
            run(short, torch.tensor(starts)[:, None] + steps),
        )
    # With learned positions, a long text is read in pieces; the last one is padded with tokens of the text's beginning.
    rows = -(-length // most)
    if rows > 1:
        long = long.repeat(1, 2)[:, : rows * most].reshape(rows, most)
    return _Readings(run(long), run(single), run(short))


def _can_move(model, accepted, run, ids: Tensor) -> bool:
    """Whether a text can be read at positions before 0: no hidden state depends on the position itself."""
    if "position_ids" not in accepted or getattr(model.config, "is_encoder_decoder", False):
        return False
    ids = ids[:4, :1]
    here, near = (run(ids, torch.full(ids.shape, position)) for position in (0, 1))
    return sees_positions(here, near) is None


def _vocabulary(model) -> Tensor:
    """The ids of all tokens except the special tokens that the config names."""
    config = model.config.get_text_config()
    size = min(model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size", 2**31))
    special = {id for name, id in vars(config).items() if name.endswith("_token_id") for id in _ints(id)}
    return torch.tensor([i for i in range(size) if i not in special] or list(range(size)))


def _ints(value) -> list[int]:
    return [value] if isinstance(value, int) else [v for v in value or () if isinstance(v, int)]


def _positions(model) -> int:
    """The length of the longest text that the positions allow. Some models reserve two positions for padding."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    return max(1, most - 2) if isinstance(most, int) and most > 0 else _LONGEST


def _tokens(site: Site, length: int, read: _Readings, weight: float) -> Tokens:
    """The first ``length`` tokens read, with logits lowered by log(length) + 1: together they take less softmax mass
    than one token.

    In a causal module, the first one is the mean of single tokens.
    """
    text, alone, asked = (part[site.name] for part in read)
    key, value = (part.transpose(0, 1).flatten(1, 2)[:, :length].float() for part in (text.key, text.value))
    if length > 1:
        key -= (math.log(length) + 1) * _direction(asked, key.shape[0])[:, None]
    if site.causal and not site.cross:
        key[:, 0], value[:, 0] = (part[:, :, 0].float().mean(0) for part in (alone.key, alone.value))
    return key / weight, value / weight


def _direction(asked: Captured, kv_heads: int) -> Tensor:
    """``u [Hkv, D]`` with ``scaling * q . u`` nearest to 1 over the queries of each key/value head."""
    query = asked.query[:, :, 1:] if asked.query.shape[2] > 1 else asked.query
    query = query.transpose(0, 1).unflatten(0, (kv_heads, -1)).flatten(1, 3).float() * asked.scaling
    moments = query.mT @ query / query.shape[1]
    ridge = _RIDGE * moments.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
    moments += ridge[:, None, None] * torch.eye(moments.shape[1], device=query.device)
    return torch.linalg.solve(moments, query.mean(1)[..., None]).squeeze(-1)
