"""Decoding with a whole model: one token a row after a full cache, as CUDA graphs where there is a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import apt_kernels
from bench.common.naive import naive

from .models import SIZES, ModelShape, build, patched, rotation, with_same_weights
from .op import Measured, captured
from .timing import Clock, in_turn, peak_bytes
from .training_step import checked, said, within

_REPLAYS = 16


@dataclass(frozen=True)
class Decoding:
    """``batch`` rows with ``tokens`` tokens in a static cache; ``gate`` as in `ModelShape`."""

    size: str
    batch: int
    tokens: int
    length: int
    gate: str = "auto"
    layers: int = 0

    @property
    def name(self) -> str:
        return f"{self.size}-b{self.batch}-s{self.tokens}-m{self.length}-{'apt' if self.gate == 'auto' else 'prefix'}"

    @property
    def model(self) -> ModelShape:
        return ModelShape(self.size, self.batch, self.tokens, self.length, self.gate, layers=self.layers)

    def small(self) -> Decoding:
        """The smaller problem that is checked in float64."""
        return replace(self, batch=min(self.batch, 2), layers=min(2, SIZES[self.size][1]))


def passes(device: torch.device) -> tuple[str, ...]:
    """The timed passes: a token launched from Python, and on a GPU also as a CUDA graph."""
    return ("token", "graph") if device.type == "cuda" else ("token",)


class Decoder:
    """A model, a cache full of random keys and values, and one token for each row."""

    def __init__(self, model: nn.Module, shape: Decoding, before: int = 0, around: Callable | None = None):
        from transformers import StaticCache

        self.model, self.around = model.eval(), around
        self.filled = shape.tokens + before
        self.cache = StaticCache(config=model.config, max_cache_len=self.filled + 2 * _REPLAYS)
        generator = torch.Generator().manual_seed(3)
        config, layers = model.config, model.config.num_hidden_layers
        dim = config.hidden_size // config.num_attention_heads
        size = (shape.batch, config.num_key_value_heads, shape.tokens, dim)
        for layer in self.cache.layers:
            seed = int(torch.randint(1 << 30, (1,), generator=generator))
            drawn = torch.Generator(model.device).manual_seed(seed)
            tokens = [torch.randn(size, generator=drawn, device=model.device).to(model.dtype) for _ in range(2)]
            layer.lazy_initialization(*(part[:, :, :1] for part in tokens))
            layer.keys[:, :, before : self.filled] = tokens[0]
            layer.values[:, :, before : self.filled] = tokens[1]
        assert len(self.cache.layers) == layers
        ids = torch.randint(5, SIZES[shape.size][-1], (shape.batch, 1), generator=generator)
        self.ids = ids.to(model.device)
        self.rewind()

    def rewind(self) -> None:
        """Reset the cache to the tokens before decoding."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Logits ``[B, 1, vocabulary]`` of the next token."""
        if self.around is None:
            return self.model(self.ids, past_key_values=self.cache, use_cache=True).logits
        with self.around():
            return self.model(self.ids, past_key_values=self.cache, use_cache=True).logits


def _no_prefix(base: nn.Module, shape: Decoding) -> Decoder:
    return Decoder(with_same_weights(base), shape)


def _in_cache(base: nn.Module, shape: Decoding) -> Decoder:
    """As PEFT generates: the prefix in the cache, a copy for every row, and the unpatched model."""
    decoder = Decoder(with_same_weights(base), shape, before=shape.length)
    turn = rotation(base, shape.length)
    prefixes = apt_kernels.prefixes(patched(base, shape.model)).values()
    for layer, prefix in zip(decoder.cache.layers, prefixes):
        tokens = slice(shape.length, decoder.filled)
        layer.keys[:, :, tokens] = turn(layer.keys[:, :, tokens])
        layer.keys[:, :, : shape.length] = turn(prefix.key.detach())
        layer.values[:, :, : shape.length] = prefix.value.detach()
    return decoder


def _ours(base: nn.Module, shape: Decoding, around=None, implementation: str = "auto") -> Decoder:
    model = patched(base, shape.model, implementation)
    return Decoder(model.double() if base.dtype == torch.float64 else model, shape, around=around)


GENERATION_PEERS: dict[str, Callable[[nn.Module, Decoding], Decoder]] = {
    "no_prefix": _no_prefix,
    "ours": _ours,
    "naive": lambda base, shape: _ours(base, shape, naive),
    "in_cache": _in_cache,
}


def obstacle(peer: str, shape: Decoding) -> str | None:
    """The reason why a peer cannot decode this, or None."""
    if peer == "in_cache" and shape.gate != "none":
        return "does not apply: the gate changes with every token"
    return None


def measure(shape: Decoding, device: torch.device, dtype: torch.dtype, seconds: float, only: tuple[str, ...] = ()):
    """`Measured` for one decoding step within about ``seconds``."""
    found, begin = Measured(), time.perf_counter()
    chosen = [peer for peer in GENERATION_PEERS if not only or peer in only]
    small = shape.small()
    base = build(small.model, device, dtype)
    for peer in chosen:
        reason = obstacle(peer, shape)
        if reason is None:
            reason = checked(peer, lambda name=peer: _error(name, base, small), found)
        if reason is not None:
            found.skipped[peer] = reason
    base, clock, runners = build(shape.model, device, dtype), Clock(device), {}
    for peer in list(found.figures):
        decoder = GENERATION_PEERS[peer](base, shape)
        runners[peer] = _runner(decoder, clock)
        if clock.cuda:
            runners[peer], found.figures[peer]["graph"] = _graph_runner(decoder, clock, runners[peer])
    deadline = max(begin + seconds, time.perf_counter() + seconds / 4)
    for name, samples in in_turn(runners, device, deadline, least=3).items():
        found.samples[name] = samples
        peak = peak_bytes(device, lambda n=name: runners[n](0))
        found.figures[name].update(note=f"{shape.batch} tokens a step", peak_bytes=peak)
    runners.clear()
    gc.collect()
    return found


def _error(peer: str, base: nn.Module, shape: Decoding) -> float:
    """The largest error of a decoder's logits against the reference in float64, divided by the allowed one."""
    wide = with_own_weights(base)
    if peer == "no_prefix":
        exact, eager = (_no_prefix(b, shape) for b in (wide, base))
        for decoder in (exact, eager):
            decoder.model.set_attn_implementation("eager")
    else:
        exact, eager = (_ours(b, shape, implementation="reference") for b in (wide, base))
        _same_cache(exact, eager)
    _same_cache(exact, eager)
    results = ({"logits": decoder()} for decoder in (GENERATION_PEERS[peer](base, shape), exact, eager))
    shifted = torch.finfo(torch.float32).eps * (shape.tokens + shape.length)
    # A cache rotated to later positions is rounded a second time.
    slack = torch.finfo(base.dtype).eps * (2 if peer == "in_cache" else 1) + (shifted if peer == "in_cache" else 0)
    return within(*results, slack)


def with_own_weights(base: nn.Module) -> nn.Module:
    """A float64 copy."""
    import copy

    return copy.deepcopy(base).double()


def _same_cache(exact: Decoder, eager: Decoder) -> None:
    """Copy the rounded values of the other cache into the float64 cache."""
    for wide, narrow in zip(exact.cache.layers, eager.cache.layers):
        wide.keys.copy_(narrow.keys)
        wide.values.copy_(narrow.values)


def _runner(decoder: Decoder, clock: Clock) -> Callable[[int], dict[str, float]]:
    def run(round_: int) -> dict[str, float]:
        decoder.rewind()
        begin = clock.mark()
        decoder()
        return {"token": clock.between(begin, clock.mark())}

    return run


def _graph_runner(decoder: Decoder, clock: Clock, eager: Callable) -> tuple[Callable, str]:
    """A runner that also replays a CUDA graph of the step, which moves on by a token each time."""
    try:
        graph = captured(decoder)
    except RuntimeError as error:
        return eager, f"not captured: {said(error)}"

    def run(round_: int) -> dict[str, float]:
        taken = eager(round_)
        decoder.rewind()
        begin = clock.mark()
        for _ in range(_REPLAYS):
            graph.replay()
        return {**taken, "graph": clock.between(begin, clock.mark()) / _REPLAYS}

    return run, "captured"
