"""The selection of attention modules that get a prefix, and its length."""

from __future__ import annotations

from typing import cast

from ... import patterns
from ...config import AptConfig
from ...errors import ConfigError
from ..site import Site

KINDS = {
    "self": lambda site: not site.cross,
    "cross": lambda site: site.cross,
    "encoder": lambda site: not (site.causal or site.cross),
    "decoder": lambda site: site.causal or site.cross,
    # By the input modalities of the part of the model that contains the module.
    "text": lambda site: "text" in site.senses,
    "vision": lambda site: bool(site.senses & {"image", "video"}) and "text" not in site.senses,
    "audio": lambda site: "audio" in site.senses and "text" not in site.senses,
}


def lengths_of(config: AptConfig, sites: list[Site]) -> list[int]:
    """The prefix length of every attention module; 0 where ``config.layers`` leaves it out.

    Raises `ConfigError` if an entry of ``layers`` selects no module, or no module would get a prefix.
    """
    lengths = [config.length_of(i, len(sites)) for i in range(len(sites))]
    if config.layers is None:
        return lengths
    chosen = set()
    for entry in cast("tuple[int | str, ...]", config.layers):
        meant = _meant(entry, sites)
        if not meant:
            names = ", ".join(site.name for site in sites)
            kinds = ", ".join(repr(kind) for kind, matches in KINDS.items() if any(map(matches, sites)))
            known = f"{names}; of the kinds {kinds}"
            raise ConfigError(f"layers has {entry!r}; the model has no such attention module (it has {known})")
        chosen |= meant
    lengths = [length if i in chosen else 0 for i, length in enumerate(lengths)]
    if not any(lengths):
        raise ConfigError(f"layers is {config.layers!r}; prefix_length gives each of these modules 0")
    return lengths


def _meant(entry: int | str, sites: list[Site]) -> set[int]:
    if isinstance(entry, int):
        return {entry % len(sites)} if -len(sites) <= entry < len(sites) else set()
    matches = KINDS.get(entry, lambda site: patterns.search(entry, site.name))
    return {i for i, site in enumerate(sites) if matches(site)}
