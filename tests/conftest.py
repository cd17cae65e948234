"""Hypothesis profiles and fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from helpers import interpreter
from helpers.accuracy import poisoned_memory

# Workers side by side share the cores; more threads than cores make tiny operations hundreds of times slower.
_SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", _SHARE)))

pytest_plugins = ["helpers.capabilities"]

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
# Before anything imports Triton, which reads its environment once.
interpreter.use()

settings.register_profile("default", max_examples=100, **_COMMON)
# Every property 10,000 times, in parts that run side by side.
_PROFILE, _PARTS = os.environ.get("HYPOTHESIS_PROFILE", "default"), 16
settings.register_profile("fuzz", max_examples=10_000 // _PARTS, **_COMMON)
settings.load_profile(_PROFILE)


@pytest.fixture(scope="module", params=range(_PARTS) if _PROFILE == "fuzz" else None)
def part() -> None:
    """A part of the examples of a property: see `cases.examples`."""


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN during the test. Property-based tests use `accuracy.poisoned_memory` instead."""
    with poisoned_memory():
        yield


@pytest.fixture
def compiling(monkeypatch) -> Iterator[Callable]:
    """``compiling(function, *arguments)`` runs a test module's function in a process without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()
