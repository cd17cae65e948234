"""Training on two processes gives the losses and gradients of one, and saves and loads the same adapter.

tests/helpers/processes.py has the code of the processes.
"""

import functools
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import models

TESTS = Path(__file__).parents[2]
# Families that have a tensor-parallel plan in transformers; Phi-3's gathers the heads again.
PLANNED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def few(*families: str) -> tuple[str, ...]:
    return models.FAMILIES if models.EVERY else families


@functools.cache
def run(kind: str, families: tuple[str, ...]) -> subprocess.CompletedProcess:
    """Two processes run all ``families``, so that packages are imported once."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "ACCELERATE_"))}
    paths = os.pathsep.join(filter(None, [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "helpers.processes", kind, *families]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120 + 10 * len(families))


def check(kind: str, families: tuple[str, ...], family: str) -> None:
    done = run(kind, families)
    if f"done {kind} {family}" not in done.stdout:
        pytest.fail(f"{kind}, {family}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}", pytrace=False)


@pytest.mark.proves("DDP, two processes: losses, gradients, a step, saved adapters")
@pytest.mark.parametrize("family", few("bert", "t5"))
def test_data_parallel(family):
    check("ddp", few("bert", "t5"), family)


@pytest.mark.proves("FSDP2, two processes: losses, gradients, a step, saved adapters")
@pytest.mark.parametrize("family", few("bert", "llama", "t5"))
def test_fully_sharded(family):
    check("fsdp2", few("bert", "llama", "t5"), family)


@pytest.mark.proves("FSDP (FullyShardedDataParallel), two processes: losses, gradients, a step, saved adapters")
@pytest.mark.parametrize("family", few("bert", "t5"))
def test_fully_sharded_by_its_first_version(family):
    check("fsdp1", few("bert", "t5"), family)


@pytest.mark.proves("tensor parallel by transformers' plan, two processes: heads of the prefix sharded, as above")
@pytest.mark.parametrize("family", PLANNED if models.EVERY else ("llama", "phi3"))
def test_tensor_parallel(family):
    check("tensor_parallel", PLANNED if models.EVERY else ("llama", "phi3"), family)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="the package deepspeed is not installed")
@pytest.mark.proves("DeepSpeed ZeRO-3, two processes: losses, gradients, a step, saved adapters")
@pytest.mark.parametrize("family", few("bert", "llama"))
def test_zero3(family):
    check("zero3", few("bert", "llama"), family)
