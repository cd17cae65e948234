"""Fixtures of the tests that train."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """Accelerate keeps its settings for the process; a test must not hand its own to the next."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
