"""The op and its peers on one shape: check all of them, then time all of them in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from bench.speed import counts

from .checking import Expected, Wrong, expected, results
from .peers import Peer, Problem, peers
from .shapes import Shape, operands
from .timing import Clock, in_turn, input_sets, peak_bytes

# Replays of a graph between two events: a single one of some microseconds is shorter than their resolution.
_REPLAYS = 16


@dataclass
class Measured:
    """The results of one case: seconds by peer and pass, figures by peer, and why other peers are missing.

    ``wrong`` holds the peers whose results broke the error rule; they are not timed either. ``left_out``: why none was.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    figures: dict[str, dict] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    left_out: str = ""


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, seconds: float, only: tuple[str, ...] = ()):
    """`Measured` for one shape within about ``seconds``, checks included.

    ``only``: peers by name; ``"no_prefix"`` and ``"ours"`` include their variants. Empty: all.
    """
    dtype = shape.dtype_in(dtype)
    deadline, problem, found = time.perf_counter() + seconds, Problem(shape, device, dtype), Measured()
    chosen = [peer for peer in peers() if not only or any(is_called(peer.name, name) for name in only)]
    right, ready = {}, {}
    for peer in chosen:
        reason = peer.obstacle(problem)
        if reason is None and peer.name == "flex" and time.perf_counter() > deadline - seconds / 2:
            reason = "no time was left to compile it"
        if reason is None:
            reason = _prepare(peer, peer.problem(problem), right, found, ready)
        if reason is not None:
            found.skipped[peer.name] = reason
    right.clear()
    sets = input_sets(counts.fewest_bytes(shape, dtype, "forward"), device)
    runners = _runners(ready, problem, sets, found)
    for name, samples in in_turn(runners, device, deadline).items():
        found.samples[name] = samples
        found.figures[name].update(input_sets=sets, peak_bytes=peak_bytes(device, lambda n=name: runners[n](0)))
    return found


def passes(shape: Shape, device: torch.device) -> tuple[str, ...]:
    """The timed passes of a shape; on a GPU, decoding also as a CUDA graph."""
    return (*shape.passes, "graph") if shape.kind == "decode" and device.type == "cuda" else shape.passes


def is_called(name: str, asked: str) -> bool:
    """Whether a peer's name is the one asked for, or a variant of it."""
    return name == asked or (asked in ("no_prefix", "ours") and name.startswith(asked + ":"))


def _prepare(peer: Peer, problem: Problem, right: dict, found: Measured, ready: dict) -> str | None:
    """Set a peer up and check it; why it cannot be timed, or None."""
    try:
        steps = peer.setup(problem)
        worst = check(peer, steps, problem, right)
    except Wrong as error:
        found.wrong[peer.name] = str(error)
        return f"wrong: {error}"
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
    ) as error:  # a stock kernel that does not support these inputs
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    found.figures[peer.name] = {"error": worst, "note": peer.note(problem), "automatic": peer.automatic(problem)}
    ready[peer.name] = (*steps, peer.has_prefix, problem.dtype)
    return None


def check(peer: Peer, steps: tuple[Callable, Callable], problem: Problem, right: dict[tuple, Expected]) -> float:
    """The largest error of a peer's output and gradients divided by the allowed one."""
    gradients = "both" in problem.shape.passes
    given, grad_out = operands(problem.leaves(0)), problem.grad_out(0)
    key = peer.has_prefix, problem.dtype
    if key not in right:
        right[key] = expected(problem.shape, given, grad_out, peer.has_prefix, gradients)
    forward, backward = steps
    out = forward(given)
    return right[key].check(results(out, given, grad_out, peer.has_prefix, gradients, backward))


def _runners(ready: dict, problem: Problem, sets: int, found: Measured) -> dict[str, Callable]:
    own = {dtype: replace(problem, dtype=dtype) for *_, dtype in ready.values()}
    inputs = {dtype: [(p.leaves(seed), p.grad_out(seed)) for seed in range(sets)] for dtype, p in own.items()}
    clock, runners = Clock(problem.device), {}
    for name, (forward, backward, has_prefix, dtype) in ready.items():
        data = inputs[dtype]
        if "both" in problem.shape.passes:
            runners[name] = _training_runner(forward, backward, has_prefix, data, clock)
            continue
        runners[name] = _decoding_runner(forward, has_prefix, data, clock)
        if clock.cuda:
            graphed = _graph_runner(forward, has_prefix, data, clock, runners[name])
            runners[name] = graphed if callable(graphed) else runners[name]
            found.figures[name]["graph"] = "captured" if callable(graphed) else graphed
    return runners


def _prepared(leaves: dict, has_prefix: bool) -> dict:
    """The operands; without a prefix no gate is computed."""
    return operands(leaves) if has_prefix else leaves


def _training_runner(forward, backward, has_prefix, data, clock):
    def run(round_: int) -> dict[str, float]:
        leaves, grad_out = data[round_ % len(data)]
        wanted = [t for name, t in leaves.items() if has_prefix or name in ("query", "key", "value")]
        begin = clock.mark()
        out = forward(_prepared(leaves, has_prefix))
        middle = clock.mark()
        backward(out, wanted, grad_out)
        end = clock.mark()
        taken = {"both": clock.between(begin, end)}
        return {"forward": clock.between(begin, middle), "backward": clock.between(middle, end), **taken}

    return run


def _decoding_runner(forward, has_prefix, data, clock):
    @torch.no_grad()
    def run(round_: int) -> dict[str, float]:
        leaves, _ = data[round_ % len(data)]
        begin = clock.mark()
        forward(_prepared(leaves, has_prefix))
        return {"forward": clock.between(begin, clock.mark())}

    return run


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a call, after one on a side stream, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@torch.no_grad()
def _graph_runner(forward, has_prefix, data, clock, eager):
    """A runner that also replays CUDA graphs of the calls, or why none could be captured."""
    try:
        graphs = [captured(lambda given=leaves: forward(_prepared(given, has_prefix))) for leaves, _ in data]
    except RuntimeError as error:
        return f"not captured: {' '.join(str(error).split())[:160]}"

    def run(round_: int) -> dict[str, float]:
        taken = eager(round_)
        begin = clock.mark()
        for replay in range(_REPLAYS):
            graphs[(round_ + replay) % len(graphs)].replay()
        return {**taken, "graph": clock.between(begin, clock.mark()) / _REPLAYS}

    return run
