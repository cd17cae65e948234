"""Hypothesis profiles and fixtures shared by the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import interpreter
import pytest
from accuracy import poisoned_memory
from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
# Before anything imports Triton, which reads its environment once.
interpreter.use()

settings.register_profile("default", max_examples=100, **_COMMON)
settings.register_profile("fuzz", max_examples=10_000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN during the test. Property-based tests use `accuracy.poisoned_memory` instead."""
    with poisoned_memory():
        yield
