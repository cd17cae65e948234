"""Adapters one behind the other, as one new adapter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..config import AptConfig
from ..errors import ConfigError, PatchError
from ..prefix import gates
from .adapters import adapters, add_checked
from .checkpoint import adapter_weights, fill
from .site import Site
from .state import Model, State, same_values, state_of
from .transaction import atomic

# Settings on which adapters may differ without a difference in what they compute after training.
_COMMON = ("prefix_dropout", "implementation", "init", "init_std", "init_seed")


@atomic
def compose(model: Model, names: Sequence[str], name: str) -> Model:
    """Add an adapter whose prefixes are those of other adapters, one behind the other; it becomes the active one.

    Attention with it is exactly attention over ``[prefix of the first ; prefix of the second ; ... ; tokens]``, each
    with its own gate and layer scale. The new adapter has copies: it trains apart from the others, which do not change.
    Adapters that were trained apart never shared a softmax, and mixing them can lose what each learned
    (arXiv 2606.04557): measure the result.

    Where the adapters differ at an attention module, the new one has parameters that compute the same:

    - layer scales: they are multiplied into keys and values, and the new scale is 1;
    - ``"none"`` or ``"static"`` beside another gate: a weight that is the same for all inputs is multiplied into keys
      and values. Where the new adapter has a gate there, its logits start at 0 for these tokens, with keys and values
      doubled (``2 sigmoid(0) = 1``).

    A reparameterisation is replaced by its result. Frozen tokens (``num_frozen_tokens``) stay frozen if they are the
    first ones at every attention module; those of later adapters train. Settings in which the adapters differ beyond
    that (``prefix_dropout``, ``implementation``) have their defaults.

    Args:
        model: a patched model.
        names: the adapters, in the order of their tokens; one may be there more than once.
        name: the new adapter's name.

    Returns:
        The same model.

    Raises:
        ConfigError: ``names`` is empty or has an unknown name, or ``name`` is taken.
        PatchError: gates that read different hidden states (``"token"``, ``"first"``, ``"mean"``) meet at an attention
            module; or the adapters have different values of what trains beside the prefixes, such as a task head; or
            the prefix is disabled.

    Examples:
        >>> apt_kernels.add_adapter(model, "b", prefix_length=8)
        >>> apt_kernels.compose(model, ["default", "b"], name="both")
        >>> apt_kernels.adapters(model)["both"].prefix_length
        24
    """
    state = state_of(model)
    known = adapters(model)
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(f"names is {names!r}; it needs a list of adapters' names")
    for each in names:
        if not isinstance(each, str) or each not in known:
            raise ConfigError(f"names has {each!r}; the model has {', '.join(map(repr, known))}")
    found = {each: adapter_weights(model, each) for each in dict.fromkeys(names)}
    beside = _beside(state, {each: weights for each, (_, weights) in found.items()})
    parts = [_parts(*found[each]) for each in names]
    configs = [known[each] for each in names]
    setting, chosen = _gate(state, configs, parts)
    config = _config(state, configs, parts, setting, set(beside))
    add_checked(model, name, config, initialise=False)
    tensors = dict(beside)
    for site, gate in chosen.items():
        here = [part[site.name] for part in parts if site.name in part]
        made = _joined(here, site, gate, config.layer_scale)
        tensors |= {f"{site.name}.apt.{each}": tensor for each, tensor in made.items()}
    fill(model, tensors)
    return model


class _Part(NamedTuple):
    """What an adapter has at one attention module."""

    gate: gates.Gate
    tensors: dict[str, Tensor]  # by the names of an `AdaptivePrefix`'s parameters

    @property
    def scale(self) -> Tensor:
        found = self.tensors.get("layer_scale")
        return self.tensors["key"].new_ones(1) if found is None else found


def _beside(state: State, found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the adapters train beside their prefixes, by name; `PatchError` where their values differ."""
    values: dict[str, Tensor] = {}
    parameters = state.parameters
    for adapter, tensors in found.items():
        for each in state.start:
            value = tensors.get(each, state.start[each])
            first = values.setdefault(each, value)
            # In the dtype of the model's parameter, which may have been cast since one of them was stored.
            held = first.to("cpu", parameters[each].dtype)
            if not same_values(held, value):
                raise PatchError(
                    f"the adapters {next(iter(found))!r} and {adapter!r} have different values of {each}; a composed "
                    "adapter has one task head. Train one of them with the other's head, frozen"
                )
    trained = {each for tensors in found.values() for each in tensors}
    return {each: value for each, value in values.items() if each in trained}


def _parts(prefixes: dict, tensors: dict[str, Tensor]) -> dict[str, _Part]:
    """By the names of the attention modules on which the adapter has a prefix."""
    found = {}
    for site, prefix in prefixes.items():
        start = f"{site}.apt."
        own = {each.removeprefix(start): t for each, t in tensors.items() if each.startswith(start)}
        found[site] = _Part(prefix.gate_entry, own)
    return found


def _gate(state: State, configs: list[AptConfig], parts: list[dict[str, _Part]]) -> tuple[str, dict[Site, gates.Gate]]:
    """The setting ``gate`` and the gate of every module: the fewest trained gates are lost, then converted."""
    best: Any = None
    for setting in dict.fromkeys([*(config.gate for config in configs), "auto", *gates.names()]):
        chosen, lost, converted = {}, 0, 0
        for site in state.sites:
            here = [part[site.name] for part in parts if site.name in part]
            if not here:
                continue
            gate = _resolved(setting, site)
            if gate is None or any(part.gate is not gate and part.gate.reads_hidden_states for part in here):
                break
            chosen[site] = gate
            converted += sum(part.gate is not gate for part in here)
            lost += sum(bool(part.gate.parameter) and not gate.parameter for part in here)
        else:
            if best is None or (lost, converted) < best[0]:
                best = (lost, converted), setting, chosen
    if best is None:
        raise PatchError(_refusal(state, parts))
    return best[1:]


def _resolved(setting: str, site: Site) -> gates.Gate | None:
    try:
        return gates.resolve(setting, site)
    except ConfigError:
        return None


def _refusal(state: State, parts: list[dict[str, _Part]]) -> str:
    """Why no setting of ``gate`` serves all of the prefixes."""
    found = []
    for site in state.sites:
        here = [part[site.name].gate for part in parts if site.name in part]
        found.append((site.name, list(dict.fromkeys(gate.name for gate in here if gate.reads_hidden_states))))
    several = [each for each in found if len(each[1]) > 1]
    name, read = several[0] if several else found[0]
    where = f"{name} would have the gates {' and '.join(map(repr, read))}" if several else "the modules' gates differ"
    return (
        f"{where}, which read different hidden states; an adapter has one setting of gate. Train these adapters with "
        "the same gate, or all but one with gate='static' or 'none'"
    )


def _config(
    state: State, configs: list[AptConfig], parts: list[dict[str, _Part]], gate: str, trained: set[str]
) -> AptConfig:
    lengths = [sum(p[s.name].tensors["key"].shape[1] for p in parts if s.name in p) for s in state.sites]
    trainable = {config.trainable for config in configs}
    defaults = {field.name: field.default for field in fields(AptConfig)}
    common: dict[str, Any] = {}
    for each in _COMMON:
        values = {getattr(config, each) for config in configs}
        common[each] = values.pop() if len(values) == 1 else defaults[each]
    return AptConfig(
        prefix_length=lengths[0] if len(set(lengths)) == 1 else tuple(lengths),
        gate=cast("gates.GateName", gate),
        layer_scale=any(config.layer_scale for config in configs),
        num_frozen_tokens=_frozen(configs, parts) or None,
        trainable=trainable.pop() if len(trainable) == 1 else tuple(f"^{re.escape(each)}$" for each in sorted(trained)),
        **common,
    )


def _frozen(configs: list[AptConfig], parts: list[dict[str, _Part]]) -> int:
    """The number of tokens at the beginning of every prefix that are frozen in their adapters."""
    found: dict[str, int] = {}
    open_: set[str] = set()  # modules whose prefixes so far are frozen entirely
    for config, part in zip(configs, parts):
        for site, each in part.items():
            length = each.tensors["key"].shape[1]
            frozen = min(config.num_frozen_tokens or 0, length)
            if site not in found or site in open_:
                found[site] = found.get(site, 0) + frozen
                (open_.add if frozen == length else open_.discard)(site)
    return min(found.values())


def _joined(parts: list[_Part], site: Site, gate: gates.Gate, has_scale: bool) -> dict[str, Tensor]:
    """The parameters of the new prefix at an attention module."""
    same = all(torch.equal(part.scale, parts[0].scale) for part in parts)
    joined = [_converted(part, site, gate, None if same else part.scale) for part in parts]
    made = {each: torch.cat([part[each] for part in joined], 0 if each == gate.parameter else 1) for each in joined[0]}
    if has_scale:
        made["layer_scale"] = parts[0].scale if same else torch.ones_like(parts[0].scale)
    return made


def _converted(part: _Part, site: Site, gate: gates.Gate, scale: Tensor | None) -> dict[str, Tensor]:
    """Key, value and the gate's parameter that compute the same with ``gate``, multiplied by ``scale``."""
    key, value, factor = part.tensors["key"], part.tensors["value"], scale
    if part.gate is not gate:
        constant = part.tensors["gate_logits"].sigmoid() if part.gate.parameter else key.new_ones(key.shape[1])
        constant = constant * 2 if gate.parameter else constant
        factor = constant if factor is None else factor * constant
    if factor is not None:
        factor = factor.reshape(-1, 1)
        key, value = key * factor, value * factor
    made = {"key": key, "value": value}
    if gate.parameter:
        width = [site.hidden_size] if gate.reads_hidden_states else []
        zero = key.new_zeros(key.shape[1], *width)
        made[gate.parameter] = part.tensors[gate.parameter] if part.gate is gate else zero
    return made
