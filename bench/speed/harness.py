"""Shared by the tests of bench/speed/suite: their options, and the measurement of a case by its first test."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from . import registry
from .op import Measured, is_called

# How a line about the progress within a stage begins; `run` prints these lines as they come.
PROGRESS = "case"


class Settings:
    """The options, resolved."""

    def __init__(self, config):
        self.device = torch.device(config.getoption("device"))
        self.dtype = getattr(torch, config.getoption("dtype") or registry.default_dtype(self.device))
        self.registry = config.getoption("registry") or registry.default_registry(self.device)
        self.stage, self.only = config.getoption("stage"), config.getoption("only")
        self.peers = tuple(filter(None, config.getoption("peers").split(",")))
        self.seconds, self.limit = config.getoption("seconds"), config.getoption("limit")

    def wants(self, peer: str) -> bool:
        """Whether a peer was asked for, itself or as a variant."""
        return not self.peers or any(is_called(peer, name) for name in self.peers)

    def chosen(self, cases: dict[str, list]) -> list[tuple[str, object]]:
        """``(stage, case)`` of the stages and cases asked for."""
        stages = [name for name in cases if self.stage in (None, name)]
        return [(name, case) for name in stages for case in cases[name] if self.only in case.name]


class Measurements:
    """Results by case. The first test of a case starts its measurement, which takes its part of the stage's time.

    ``say`` prints one line as each case begins. Cases that would begin after the stage's limit are left out.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None] = lambda line: None):
        self.settings, self.say, self.begin = settings, say, time.perf_counter()
        self.total = self.done = 0
        self.current: tuple[str, Measured] | None = None
        self.skipped: list[dict] = []

    def of(self, name: str, measure: Callable[[float], Measured]) -> Measured:
        if self.current is None or self.current[0] != name:
            elapsed = time.perf_counter() - self.begin
            counted = f"{PROGRESS} {self.done + 1}/{self.total}, {elapsed:.0f} s: {name}"
            if self.settings.limit is not None and elapsed > self.settings.limit:
                self.say(f"{counted}: left out")
                self.current = name, Measured(left_out=f"no time was left after {elapsed:.0f} s of the stage")
            else:
                self.say(counted)
                # Later cases get the time that earlier ones did not use.
                left = self.settings.seconds - elapsed
                self.current = name, measure(max(0.0, left) / max(1, self.total - self.done))
            self.done += 1
        return self.current[1]


def parametrize(metafunc, cases: list[tuple[str, object]], peers: list[str], passes: Callable[[object], tuple]) -> None:
    """A test for every case, peer and pass, those of a case side by side."""
    metafunc.config.apt.total += len(cases)
    found = [(stage, case, peer, which) for stage, case in cases for peer in peers for which in passes(case)]
    identities = [f"{case.name}|{peer}|{which}" for _, case, peer, which in found]
    metafunc.parametrize(("stage", "case", "peer", "which"), found, ids=identities)
