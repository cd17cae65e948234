"""The gates: one entry for each, with everything that is particular to it.

An entry defines the parameter that the gate trains, the axes of its logits and how they are computed from hidden
states, the attention modules on which it is allowed, whether a key/value cache keeps its logits, and its documentation.
Settings, error messages and `apt_kernels.hf` read it from here: CONTRIBUTING.md has the steps to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from . import segments as documents
from .gate_product import gate_product

# What a type checker accepts as ``gate=``; a test compares it with the entries.
GateName = Literal["auto", "first", "mean", "token", "static", "none"]


class AttentionSite(Protocol):
    """The properties of an attention module on which the choice of its gate depends."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...  # such as "causal self-attention", for messages
    @property
    def causal(self) -> bool: ...
    @property
    def cross(self) -> bool: ...
    @property
    def repeated(self) -> bool: ...  # it attends more than once in a forward
    @property
    def hidden_size(self) -> int | None: ...  # None: it does not receive one hidden state for every query


class Gate:
    """A gate. The defaults are those of ``token``: a learned product with every query's own hidden state."""

    name: ClassVar[str]
    # What the docstring of `AptConfig` says of it.
    documentation: ClassVar[str]
    # The parameter of `AdaptivePrefix` that it trains: "gate_weight" ``[M, d]``, for the product with hidden states;
    # "gate_logits" ``[M]``; or None.
    parameter: ClassVar[str | None] = "gate_weight"
    # The axes of its logits: "BTM", "BM", "M", or "" where there are none. "BM" becomes "BTM" for packed documents.
    axes: ClassVar[str] = "BTM"
    # Whether the logits of a prompt serve all tokens decoded after it and are kept with the key/value cache.
    kept_in_cache: ClassVar[bool] = False

    @property
    def reads_hidden_states(self) -> bool:
        """Whether its logits come from hidden states."""
        return self.parameter == "gate_weight"

    @property
    def per_sequence(self) -> bool:
        """Whether a sequence has one gate computed from its hidden states, which needs its padding and documents."""
        return self.reads_hidden_states and self.axes == "BM"

    def obstacle(self, site: AttentionSite) -> str | None:
        """Why the gate is not allowed on an attention module, beginning with the module's name; None: it is."""
        if self.reads_hidden_states and site.hidden_size is None:
            return f"{site.name} does not receive one hidden state for every query"
        return None

    def states(self, hidden_states: Tensor, real_tokens: Tensor | None, segments: Tensor | None) -> Tensor:
        """The states ``[B, d]`` or ``[B, T, d]`` that are multiplied with the weight; arguments as for `logits`."""
        return hidden_states

    def logits(
        self,
        parameter: Tensor | None,
        hidden_states: Tensor | None,
        real_tokens: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor | None:
        """The logits, with the gate's `axes`.

        Args:
            parameter: the one named by `parameter`.
            hidden_states: ``[B, T, d]``, the input of the attention module.
            real_tokens: ``[B, T]`` bool, False at padding; None: every token is real.
            segments: ``[B, T]`` integers, equal within a packed document. The logits of a gate per sequence are then
                those of each document, for every token: ``[B, T, M]``.
        """
        if not self.reads_hidden_states or hidden_states is None or parameter is None:
            return parameter
        return gate_product(self.states(hidden_states, real_tokens, segments), parameter)


class First(Gate):
    name = "first"
    documentation = "the first real token's hidden state, one gate for each sequence"
    axes = "BM"
    kept_in_cache = True

    def obstacle(self, site):
        if site.causal and site.repeated:
            return (
                f"{site.name} attends more than once in a forward, each time with another gate, and a cache keeps "
                "only one"
            )
        return super().obstacle(site)

    def states(self, hidden_states, real_tokens, segments):
        if segments is not None:
            return documents.first_states(hidden_states, segments)
        if real_tokens is None:
            return hidden_states[:, 0]
        index = real_tokens.to(torch.uint8).argmax(dim=1)
        # Not by indexing, the gradient of which sorts.
        return hidden_states.gather(1, index[:, None, None].expand(-1, 1, hidden_states.shape[2])).squeeze(1)


class Mean(Gate):
    name = "mean"
    documentation = (
        "the mean hidden state of the real tokens, one gate for each sequence (refused where a token would see later "
        "ones through it)"
    )
    axes = "BM"

    def obstacle(self, site):
        if site.causal or site.cross:
            return f"{site.name} is {site.kind}: the mean over all tokens would let a token see later ones"
        return super().obstacle(site)

    def states(self, hidden_states, real_tokens, segments):
        if segments is not None:
            return documents.mean_states(hidden_states, real_tokens, segments)
        if real_tokens is None:
            return hidden_states.mean(dim=1)
        real = real_tokens[..., None].to(torch.promote_types(hidden_states.dtype, torch.float32))
        total = (hidden_states * real).sum(dim=1)
        return (total / real.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)


class Token(Gate):
    name = "token"
    documentation = "every query's own hidden state"


class Static(Gate):
    name = "static"
    documentation = "learned logits, the same for all inputs"
    parameter = "gate_logits"
    axes = "M"


class Unused(Gate):
    name = "none"
    documentation = "no gate"
    parameter = None
    axes = ""


_GATES: dict[str, Gate] = {gate.name: gate for gate in (First(), Mean(), Token(), Static(), Unused())}


def names() -> tuple[str, ...]:
    """Every gate by name."""
    return tuple(_GATES)


def find(name: str) -> Gate:
    """The gate of a name; `ConfigError` if there is none."""
    if name not in _GATES:
        raise ConfigError(f"gate is {name!r}; it needs one of {', '.join(map(repr, _GATES))}")
    return _GATES[name]


def resolve(name: str, site: AttentionSite) -> Gate:
    """The gate of an attention module for a setting; ``"auto"`` chooses by the kind of attention.

    Raises:
        ConfigError: the gate is not allowed there; the message says why and which are.
    """
    if name == "auto":
        return find("static" if site.hidden_size is None else "token" if site.causal or site.cross else "first")
    gate = find(name)
    obstacle = gate.obstacle(site)
    if obstacle:
        allowed = choice(lambda other: other.obstacle(site) is None)
        raise ConfigError(f"gate is {name!r}, but {obstacle}; use {allowed}")
    return gate


def choice(condition: Callable[[Gate], bool], word: str = "or") -> str:
    """The names of the gates for which ``condition`` is true, for a message: ``'token', 'static' or 'none'``."""
    listed = [repr(gate.name) for gate in _GATES.values() if condition(gate)]
    return f" {word} ".join([", ".join(listed[:-1]), listed[-1]]) if len(listed) > 1 else "".join(listed)
