"""The weights that a trained model gives its prefix tokens, and prefix lengths and pruning derived from them."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import logging

from ..errors import ArgumentError, ConfigError, PatchError, its_type
from ..ops.values import check_flag
from ..prefix.adaptive import AdaptivePrefix
from . import calls, events, offload, pruning
from .adapter_file import writing
from .batches import check_batches, moved, run
from .checkpoint import check_path
from .discovery.recording import evaluating
from .state import Model, refuse_several, state_of
from .transaction import atomic, exclusive

_one_at_a_time = threading.RLock()
BINS = 20
# The most layers that are printed.
_SHOWN = 12


class Lengths(tuple):
    """Prefix lengths, one int for each attention module in model order, and the tokens that they keep.

    A tuple of ints, accepted wherever lengths are (``patch(prefix_length=lengths)``). ``keep`` maps a
    module's name to the indices of its tokens with the largest weights, in ascending order; it is empty where a
    length exceeds that of the probed prefix.
    """

    keep: dict[str, tuple[int, ...]]

    def __new__(cls, lengths: Iterable[int], keep: dict[str, tuple[int, ...]] | None = None):
        made = super().__new__(cls, lengths)
        made.keep = dict(keep or {})
        return made

    def __getnewargs__(self):
        return tuple(self), self.keep


@dataclass(frozen=True, repr=False)
class LayerProbe:
    """Statistics of one attention module's gate over the batches; lists have one entry per prefix token (M).

    Attributes:
        name: the attention module's name.
        gate: its gate mode.
        layer_scale: lambda; 1 if it is not learned.
        gate_mean: mean of alpha over all computed gates.
        gate_std_tokens: standard deviation of alpha over the tokens of an example (0 if a sequence has one gate).
        gate_std_examples: standard deviation over examples of an example's mean alpha.
        histogram: ``[M][20]`` shares of alpha's values in 20 equal bins of [0, 1].
        effective: ``layer_scale * gate_mean``: the mean factor on the token's key and value; 1 leaves them unchanged.
        frozen: how many tokens at the beginning are frozen (``num_frozen_tokens``); they are the last to be pruned.

    Examples:
        >>> layer = apt_kernels.probe(model, [batch]).layers[0]
        >>> len(layer.gate_mean) == len(layer.effective) == layer.length
        True
        >>> weakest = min(range(layer.length), key=lambda token: abs(layer.effective[token]))
    """

    name: str
    gate: str
    layer_scale: float
    gate_mean: list[float]
    gate_std_tokens: list[float]
    gate_std_examples: list[float]
    histogram: list[list[float]]
    effective: list[float]
    frozen: int = 0

    def __repr__(self) -> str:
        scale = f"layer_scale={self.layer_scale:.3g}, weight={self.weight:.3g}"
        return f"LayerProbe({self.name!r}, gate={self.gate!r}, length={self.length}, {scale})"

    @property
    def length(self) -> int:
        return len(self.effective)

    @property
    def weight(self) -> float:
        """Mean over the layer's tokens of ``|effective|``."""
        return sum(map(abs, self.effective)) / self.length


@dataclass(frozen=True, repr=False)
class Probe:
    """The result of `probe`: the layers that have a prefix, in model order, each as a `LayerProbe`.

    Examples:
        >>> found = apt_kernels.probe(model, [batch])
        >>> found.save("probe.json")
        >>> found.picture("probe.png")
        >>> lengths = found.lengths(budget=sum(layer.length for layer in found.layers) // 2)
        >>> sum(lengths) <= sum(layer.length for layer in found.layers) // 2
        True
    """

    layers: list[LayerProbe]
    modules: list[str]
    examples: int

    def __repr__(self) -> str:
        """A summary of the layers' weights; `table` has all figures."""
        shown = self.layers if len(self.layers) <= _SHOWN else self.layers[: _SHOWN - 1]
        width = max((len(layer.name) for layer in shown), default=0)
        rows = [
            f"  {layer.name:<{width}}  {layer.gate:<6}  {layer.length} tokens, mean weight {layer.weight:.3f}"
            for layer in shown
        ]
        if len(shown) < len(self.layers):
            rows.append(f"  ... and {len(self.layers) - len(shown)} more")
        return "\n".join([f"Probe of {len(self.layers)} layers on {self.examples} examples:", *rows])

    def table(self) -> str:
        """Markdown, one row for each layer."""
        rows = ["| layer | gate | prefix tokens | λ | mean α | α: min to max over prefix tokens "]
        rows[0] += "| std of α over text tokens | over examples | mean size of λα |"
        rows.append("|" + " --- |" * 9)
        for layer in self.layers:
            cells = (
                layer.name,
                layer.gate,
                str(layer.length),
                f"{layer.layer_scale:.3f}",
                f"{_mean(layer.gate_mean):.3f}",
                f"{min(layer.gate_mean):.3f} to {max(layer.gate_mean):.3f}",
                f"{_mean(layer.gate_std_tokens):.3f}",
                f"{_mean(layer.gate_std_examples):.3f}",
                f"{layer.weight:.3f}",
            )
            rows.append("| " + " | ".join(cells) + " |")
        return "\n".join(rows)

    def to_json(self) -> dict:
        """A JSON-ready dict."""
        return {"layers": [asdict(layer) for layer in self.layers], "modules": self.modules, "examples": self.examples}

    @classmethod
    def from_json(cls, data: dict) -> Probe:
        """The inverse of `to_json`. `ArgumentError` if ``data`` is something else."""
        try:
            return cls([LayerProbe(**layer) for layer in data["layers"]], data["modules"], data["examples"])
        except (KeyError, TypeError) as error:
            raise ArgumentError(f"data is not what Probe.to_json returns ({type(error).__name__}: {error})") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_json` to a file. `AdapterError` if it cannot be written."""
        check_path(path)
        with writing(Path(path)):
            Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def picture(self, path: str | os.PathLike, title: str = "Mean weight of each prefix token") -> None:
        """Write a heat map of layers by prefix tokens, with a profile by layer, to an image file. Needs matplotlib."""
        from .plot import draw

        draw(self, path, title)

    def lengths(
        self, *unnamed, budget: int | None = None, threshold: float | None = None, grow: bool = False
    ) -> Lengths:
        """Prefix lengths per attention module in proportion to the weights. Give exactly one of budget and threshold.

        Args:
            budget: prefix tokens in all layers together. Each layer gets a number in proportion to the sum of its
                tokens' ``|effective|`` (largest remainder method), at most its current length.
            threshold: keep every token whose ``|effective|`` is at least this, and frozen ones.
            grow: a layer may get more tokens than it has now; such lengths are for a new training run.

        Raises:
            ArgumentError: neither or both are given, or the budget exceeds the current total without ``grow``.
        """
        if unnamed:
            raise ArgumentError(f"lengths is given {unnamed[0]!r} without a name; it needs budget= or threshold=")
        if (budget is None) == (threshold is None):
            given = "neither is" if budget is None else "both are"
            raise ArgumentError(f"lengths needs exactly one of budget and threshold; {given} given")
        if threshold is not None and (
            isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf
        ):
            raise ArgumentError(f"threshold is {threshold!r}; it needs a finite number of at least 0")
        check_flag("grow", grow)
        if threshold is not None:
            found = [
                sum(i < layer.frozen or abs(weight) >= threshold for i, weight in enumerate(layer.effective))
                for layer in self.layers
            ]
        else:
            found = self._shares(cast(int, budget), grow)
        if not any(found):
            raise ArgumentError(f"threshold is {threshold!r}; no token's weight reaches it, and one has to remain")
        by_name = dict(zip((layer.name for layer in self.layers), found))
        fits = all(by_name[layer.name] <= layer.length for layer in self.layers)
        counts = [(layer, by_name[layer.name]) for layer in self.layers] if fits else []
        keep = {layer.name: _strongest(layer.effective, count, layer.frozen) for layer, count in counts}
        return Lengths((by_name.get(name, 0) for name in self.modules), keep)

    def _shares(self, budget: int, grow: bool) -> list[int]:
        have = [layer.length for layer in self.layers]
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ArgumentError(f"budget is {budget!r}; it needs an int of at least 1")
        if not grow and budget > sum(have):
            raise ArgumentError(f"budget is {budget}; the layers have {sum(have)} tokens. grow=True allows more")
        weights = [layer.weight * layer.length for layer in self.layers]
        if not any(weights):
            weights = [float(length) for length in have]
        return _apportion(budget, weights, [budget] * len(have) if grow else have)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _strongest(weights: Sequence[float], count: int, frozen: int) -> tuple[int, ...]:
    """``count`` indices, in their order: the ``frozen`` first, then the largest magnitudes; of equal ones the first."""
    order = sorted(range(len(weights)), key=lambda i: (i >= frozen, i < frozen or -abs(weights[i]), i))
    return tuple(sorted(order[:count]))


def _apportion(total: int, weights: list[float], most: list[int]) -> list[int]:
    """Integers in proportion to ``weights`` that sum to ``total``, none above its entry in ``most``."""
    found, open_ = [0] * len(weights), set(range(len(weights)))
    while True:
        left, mass = (
            total - sum(found[i] for i in range(len(weights)) if i not in open_),
            sum(weights[i] for i in open_),
        )
        share = {i: left * weights[i] / mass if mass else left / len(open_) for i in open_}
        full = {i for i in open_ if share[i] >= most[i]}
        if not full:
            break
        for i in full:
            found[i] = most[i]
        open_ -= full
        if not open_:
            return found
    for i in open_:
        found[i] = math.floor(share[i])
    for i in sorted(open_, key=lambda i: (found[i] - share[i], i))[: total - sum(found)]:
        found[i] += 1
    return found


class _Watch:
    """Running sums of one prefix's alpha, on the CPU in float64."""

    def __init__(self, prefix: AdaptivePrefix):
        self.prefix = prefix
        self.count = self.examples = 0
        self.total = self.within = self.of_means = self.of_squares = torch.zeros(
            prefix.length, dtype=torch.float64, device="cpu"
        )
        self.histogram = torch.zeros(prefix.length, BINS, dtype=torch.float64, device="cpu")

    def add(self, logits: Tensor | None, real_tokens: Tensor | None) -> None:
        alpha = (
            torch.ones(self.prefix.length, device="cpu") if logits is None else torch.sigmoid(logits.detach().float())
        )
        alpha = alpha.reshape(1, 1, -1) if alpha.ndim == 1 else alpha[:, None] if alpha.ndim == 2 else alpha
        alpha = alpha.cpu().double()
        real = torch.ones(alpha.shape[:2], dtype=torch.bool, device="cpu")
        if alpha.shape[1] > 1 and real_tokens is not None:
            real = real_tokens.cpu().bool().expand(alpha.shape[:2])
        weight = real[..., None].double()
        count = weight.sum(dim=1).clamp(min=1)
        mean = (alpha * weight).sum(dim=1) / count
        variance = ((alpha - mean[:, None]).square() * weight).sum(dim=1) / count
        seen = real.any(dim=1)
        self.count += int(real.sum())
        self.examples += int(seen.sum())
        self.total = self.total + (alpha * weight).sum(dim=(0, 1))
        self.within = self.within + variance[seen].sum(dim=0)
        self.of_means = self.of_means + mean[seen].sum(dim=0)
        self.of_squares = self.of_squares + mean[seen].square().sum(dim=0)
        bins = (alpha[real] * BINS).long().clamp(max=BINS - 1)
        self.histogram += torch.nn.functional.one_hot(bins, BINS).sum(dim=0)

    def found(self, name: str) -> LayerProbe:
        given = self.prefix.layer_scale
        scale = 1.0 if given is None else float(offload.read(self.prefix, "layer_scale", given).detach().float())
        mean = self.total / self.count
        spread = self.of_squares / self.examples - (self.of_means / self.examples).square()
        return LayerProbe(
            name=name,
            gate=self.prefix.gate,
            layer_scale=scale,
            gate_mean=mean.tolist(),
            gate_std_tokens=(self.within / self.examples).sqrt().tolist(),
            gate_std_examples=spread.clamp(min=0).sqrt().tolist(),
            histogram=(self.histogram / self.count).tolist(),
            effective=(scale * mean).tolist(),
            frozen=self.prefix.frozen,
        )


# `set_stance` holds for the process and evaluation mode for the model: calls that overlap would restore each other's.
@exclusive(_one_at_a_time)
def probe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, progress: bool = True) -> Probe:
    """Run ``batches`` through a patched model and record the weights of every layer's prefix tokens.

    The model runs in evaluation mode without gradients, eagerly even if it is compiled, and is left unchanged. Calls in
    several threads run one after the other. Padding is not counted; for cross-attention, whose queries are the
    decoder's tokens, ``decoder_attention_mask`` marks it.

    Args:
        model: a patched model.
        batches: dicts of keyword arguments of its forward, as a data loader yields them; tensors are moved
            to its device.
        progress: show transformers' progress bar once this takes longer than a second, unless
            ``transformers.logging.disable_progress_bar()`` was called.

    Raises:
        PatchError: the model is not patched, or has no values yet.
        ArgumentError: an argument is wrong, there are no batches, or the model cannot run one.

    Examples:
        >>> found = apt_kernels.probe(model, [batch])
        >>> print(found.table())
    """
    state = state_of(model)
    refuse_several(state, "to probe")
    check_batches(batches)
    check_flag("progress", progress)
    watches = {name: _Watch(prefix) for name, prefix in state.prefixes.items()}
    examples, device = 0, offload.device(state.model)
    if device.type == "meta":
        raise PatchError(
            "the model is on the meta device and has no values; give it values (model.to_empty, its weights)"
        )
    with evaluating(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        shown = logging.tqdm(batches, desc="probe", unit="batch", delay=1) if progress else batches
        for batch in moved(shown, device):
            if "adapter_names" in batch:
                raise ArgumentError(
                    f"a batch has adapter_names; the gates are those of the active adapter, {state.adapter!r}, for all "
                    "rows: leave the names out, and set the adapter to read (set_adapter)"
                )
            with calls.observing(_observer(watches, batch.get("decoder_attention_mask"))):
                run(model, batch)
            examples += len(next(iter(batch.values())))
    if not examples:
        raise ArgumentError("batches is empty; probe needs at least one")
    return Probe([watch.found(name) for name, watch in watches.items()], pruning.modules(state), examples)


def _observer(watches: dict[str, _Watch], decoder_mask: Tensor | None):
    """Called by every attention with a prefix with its gate's logits while `probe` runs, in this thread alone."""

    def observe(prefix: AdaptivePrefix, gate: Tensor | None, real_tokens: Tensor | None) -> None:
        watches[prefix.name].add(gate, decoder_mask if prefix.cross else real_tokens)

    return observe


@atomic
def prune(model: Model, lengths: Sequence[int], probe: Probe | None = None) -> Model:
    """Shorten a trained model's prefixes in place: each layer keeps the tokens with the largest weights, in order.
    Frozen tokens are removed last: only where a length is below their number, from their end.

    The other tokens' keys, values and gates are removed from the softmax. A gate of 0 does not do that: it leaves a key
    of zeros, which still takes softmax mass ("Probe and prune" in the documentation has a measurement). The shorter
    prefix is saved and loaded like any other. Parameters are replaced, so create a new optimizer.

    Args:
        model: a patched model.
        lengths: one length for each attention module in model order, 0 to remove its prefix. `Probe.lengths` returns
            them together with the tokens to keep.
        probe: ranks the tokens where ``lengths`` are plain ints. Without it, only gates that do not depend on the input
            (``gate="static"``) can be ranked.

    Returns:
        The same model.

    Raises:
        ConfigError: a length exceeds the layer's, or the tokens cannot be ranked; the model is unchanged.
        PatchError: the model is not patched, or its prefixes are sharded among processes.

    Examples:
        >>> lengths = apt_kernels.probe(model, [batch]).lengths(budget=24)
        >>> apt_kernels.prune(model, lengths)
        >>> sum(prefix.tokens()[0].shape[1] for prefix in apt_kernels.prefixes(model).values())
        24
    """
    state = state_of(model)
    events.check("prune", model)
    refuse_several(state, "to prune")
    names = pruning.modules(state)
    if probe is not None and not isinstance(probe, Probe):
        raise ConfigError(f"probe is {its_type(probe)}; it needs what apt_kernels.probe returns, or None")
    if not isinstance(lengths, Sequence) or isinstance(lengths, str):
        raise ConfigError(
            f"lengths is {lengths!r}; it needs a list of {len(names)} ints, one for each attention module, such as "
            "apt_kernels.probe(...).lengths(budget=...)"
        )
    if len(lengths) != len(names):
        raise ConfigError(f"lengths has {len(lengths)} entries; the model has {len(names)} attention modules")
    if not any(lengths):
        raise ConfigError("lengths is 0 everywhere; at least one entry needs to be above 0 (or unpatch the model)")
    known, keep = getattr(lengths, "keep", {}), {}
    ranks = {layer.name: layer.effective for layer in probe.layers} if probe is not None else {}
    found = state.prefixes
    for name, length in zip(names, lengths):
        have = found[name].length if name in found else 0
        if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= have:
            raise ConfigError(f"lengths has {length!r} for {name}; it needs an int from 0 to {have}")
        if not have:
            continue
        chosen = known.get(name)
        first = tuple(range(min(found[name].frozen, length)))
        fits = chosen is not None and len(chosen) == length and all(i < have for i in chosen)
        if chosen is not None and fits and chosen[: len(first)] == first:
            keep[name] = chosen
        else:
            keep[name] = _strongest(_weights(name, found[name], length, ranks), length, found[name].frozen)
    pruning.keep_tokens(state, keep, tuple(lengths))
    return model


def _weights(name: str, prefix: AdaptivePrefix, length: int, ranks: dict[str, list[float]]) -> list[float]:
    if name in ranks and len(ranks[name]) == prefix.length:
        return ranks[name]
    if length in (0, prefix.length):
        return [1.0] * prefix.length
    if prefix.gate_logits is not None:
        return torch.sigmoid(prefix.gate_logits.detach().float()).tolist()
    raise ConfigError(
        f"{name} has the gate {prefix.gate!r}, whose weights depend on the input, so its {prefix.length} tokens "
        "cannot be ranked by the parameters alone; pass lengths from probe(...).lengths(...), or probe="
    )
