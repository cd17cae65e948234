"""Whole training steps: every contender checked against the reference in float64, then stepped in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .checking import Wrong
from .models import TRAINING_PEERS, Contender, ModelShape, _ours, batch, build, obstacle
from .op import Measured
from .timing import Clock, in_turn, peak_bytes

_BATCHES = 4


def measure(shape: ModelShape, device: torch.device, dtype: torch.dtype, seconds: float, only: tuple[str, ...] = ()):
    """`Measured` for one training step within about ``seconds``, of which checks and compilation may take theirs."""
    found, begin = Measured(), time.perf_counter()
    small = Checker(shape.small(), device, dtype)
    for peer in (peer for peer in TRAINING_PEERS if not only or peer in only):
        reason = obstacle(peer, shape)
        if reason is None and shape.compiled and time.perf_counter() > begin + seconds / 2:
            reason = "no time was left to compile it"
        if reason is None:
            reason = _checked(peer, small, found)
        if reason is not None:
            found.skipped[peer] = reason
    del small
    gc.collect()
    runners = _runners(list(found.figures), shape, device, dtype, found)
    deadline = max(begin + seconds, time.perf_counter() + seconds / 4)
    for name, samples in in_turn(runners, device, deadline, warm_up=1, least=3).items():
        found.samples[name] = samples
        found.figures[name].update(note=_note(shape), peak_bytes=peak_bytes(device, lambda n=name: runners[n](0)))
    runners.clear()
    gc.collect()
    return found


def _note(shape: ModelShape) -> str:
    return f"{shape.batch * shape.tokens} tokens a step"


def _runners(names: list[str], shape: ModelShape, device, dtype, found: Measured) -> dict[str, Callable]:
    base, data, runners = build(shape, device, dtype), [batch(shape, device, seed) for seed in range(_BATCHES)], {}
    for peer in names:
        runner = _runner(_prepared(TRAINING_PEERS[peer](base, shape), shape), data, Clock(device))
        try:
            for round_ in range(2):  # compiles
                runner(round_)
        except Exception as error:  # any error of the compilation is a line of the table
            found.skipped[peer] = said(error)
            del found.figures[peer]
            continue
        runners[peer] = runner
    return runners


def within(found: dict[str, Tensor], truth: dict[str, Tensor], eager: dict[str, Tensor], slack: float) -> float:
    """The error rule for whole models, whose sums have no closed form: in norm, all gradients of a kind as one tensor.

    An error may be twice that of the reference in the model's dtype, and ``slack`` of the truth. Few numbers have
    little noise by luck, so what counts is no less than the median over the kinds. Returns the worst share of what is
    allowed; raises `Wrong` above 1.
    """
    noise = {name: float((eager[name].double() - exact).norm() / exact.norm()) for name, exact in truth.items()}
    typical, worst = statistics.median(noise.values()), 0.0
    for name, exact in truth.items():
        if name not in found:
            raise Wrong(f"{name} is missing")
        error = float(((found[name].double() - exact).norm() / exact.norm()).nan_to_num(torch.inf))
        part = error / (2 * max(noise[name], typical) + slack)
        if part > 1:
            raise Wrong(f"{name} is off by {error:.3g} relative, {part:.3g} of what is allowed")
        worst = max(worst, part)
    return worst


class Checker:
    """The model of a shape in float64 by the reference, and the bounds that its rounding sets."""

    def __init__(self, shape: ModelShape, device: torch.device, dtype: torch.dtype):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.base, self.given = build(shape, device, dtype), batch(shape, device, 0)
        self.right: dict[bool, tuple[dict, dict]] = {}

    def check(self, peer: str) -> float:
        """The largest error of a contender divided by the allowed one; raises `Wrong` above 1."""
        truth, eager = self._expected(peer != "no_prefix")
        contender = _prepared(TRAINING_PEERS[peer](self.base, self.shape), self.shape)
        slack = torch.finfo(self.dtype).eps + torch.finfo(torch.float32).eps * contender.turned
        return within(self._results(contender), truth, eager, slack)

    def _expected(self, has_prefix: bool) -> tuple[dict, dict]:
        """Results in float64, and those of the reference in the model's own dtype; made once."""
        if has_prefix not in self.right:
            wide = build(self.shape, self.device, self.dtype).double()
            self.right[has_prefix] = tuple(self._results(self._by_reference(b, has_prefix)) for b in (wide, self.base))
        return self.right[has_prefix]

    def _by_reference(self, base: nn.Module, has_prefix: bool) -> Contender:
        if has_prefix:
            contender = _ours(base, self.shape, implementation="reference")
        else:
            contender = TRAINING_PEERS["no_prefix"](base, self.shape)
            contender.model.set_attn_implementation("eager")
        if base.dtype == torch.float64:
            contender.model.double()
        return contender

    def _results(self, contender: Contender) -> dict[str, Tensor]:
        for parameter in contender.trained:
            parameter.grad = None
        out = contender.forward({**self.given, "output_hidden_states": True})
        contender.backward(out.loss)
        return {"last_hidden_state": out.hidden_states[-1].detach(), **contender.gradients()}


def _checked(peer: str, small: Checker, found: Measured) -> str | None:
    return checked(peer, lambda: small.check(peer), found)


def checked(peer: str, check: Callable[[], float], found: Measured) -> str | None:
    """Note a contender's worst error, or return why it is not timed."""
    try:
        found.figures[peer] = {"error": check()}
    except Wrong as error:
        if peer not in ("peft", "cartridge"):  # a peer may compute wrong results without an error
            found.wrong[peer] = str(error)
        return f"wrong: {error}"
    except Exception as error:  # any error of a peer is the reason why it is not timed
        if peer == "ours":
            found.wrong[peer] = said(error)
        return said(error)
    return None


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _prepared(contender: Contender, shape: ModelShape) -> Contender:
    if shape.checkpointing:
        contender.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if shape.compiled:
        torch._dynamo.reset()
        contender.model.compile()
    return contender


def _runner(contender: Contender, data: list[dict], clock: Clock) -> Callable[[int], dict[str, float]]:
    trained = contender.trained
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def run(round_: int) -> dict[str, float]:
        begin = clock.mark()
        contender.backward(contender.forward(data[round_ % len(data)]).loss)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return {"step": clock.between(begin, clock.mark())}

    return run
