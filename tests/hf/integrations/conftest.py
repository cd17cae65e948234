"""Fixtures of the tests that train."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """Accelerate stores its settings in the process; they are reset after each test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
