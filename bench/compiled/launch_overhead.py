"""Host time of the Triton implementation, with no GPU: the time to launch the kernels, launches replaced by stubs.

    python -m bench compiled overhead [--architecture sm_90]

Kernels are compiled for the chip (cached by Triton), and a driver that does nothing replaces the real one. What remains
is Python: ours, Triton's and torch's. It is a lower bound of short calls on a GPU. Median microseconds of many calls;
run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch

from apt_kernels.impl.inputs import DIFFERENTIABLE
from apt_kernels.impl.triton import tiles
from bench.common.machine import line, machine
from bench.common.markdown import markdown

from .aot_compile import CHIPS, Job, _Driver, _gpu_target, driver_of, make_job_inputs

CALLS = 500


class Launches:
    """As a context: launches for the architecture are counted and do nothing. Afterwards all is as before."""

    def __init__(self, architecture: str):
        self.count, self.architecture, self.undo = 0, architecture, ExitStack()

    def __enter__(self) -> Launches:
        chip = CHIPS[self.architecture][0]
        driver = _Driver(_gpu_target(chip.target, chip.lanes))
        driver.launcher_cls, driver.utils = lambda *_: self, _Utils
        self.undo.enter_context(driver_of(driver))
        self.undo.enter_context(mock.patch.object(tiles, "architecture", self._architecture))
        return self

    def _architecture(self, device) -> str:
        return self.architecture

    def __exit__(self, *raised) -> None:
        self.undo.close()

    def __call__(self, *given) -> None:
        self.count += 1


class _Utils:
    load_binary = staticmethod(lambda *_: (None, 0, 0, 0, 1024))
    get_device_properties = staticmethod(lambda _: {"max_shared_mem": 1 << 20})


def passes(architecture: str) -> dict[str, Callable[[], object]]:
    """The timed calls, by name."""
    from apt_kernels.impl.triton import BACKEND

    x, single = (make_job_inputs(Job(architecture, 2, 128, variant)) for variant in ("causal", "decode"))
    result = BACKEND.forward(x, BACKEND.plan(x))
    needs = [getattr(x, name) is not None for name in DIFFERENTIABLE]
    return {
        "forward": lambda: BACKEND.forward(x, BACKEND.plan(x)),
        "backward": lambda: BACKEND.backward(x, BACKEND.plan(x), result, result.out, None, needs),
        "decoding": lambda: BACKEND.forward(single, BACKEND.plan(single)),
    }


def microseconds(call: Callable[[], object]) -> float:
    """The median of a call's time, the first few left out."""
    taken = []
    for i in range(CALLS + 10):
        begin = time.perf_counter()
        call()
        if i >= 10:
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken) * 1e6


def main(given: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench compiled overhead", description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", choices=[name for name in CHIPS if name.startswith("sm_")], default="sm_90")
    architecture = parser.parse_args(given).architecture
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: the interpreter would be timed", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    lines = []
    with Launches(architecture) as launches:
        for name, call in passes(architecture).items():
            call()
            launches.count = 0
            call()
            count = launches.count
            lines.append((name, str(count), f"{microseconds(call):.0f}"))
    print(markdown(("pass", "launches", "microseconds"), lines))
    print(f"\n{line(machine(torch.device('cpu')))}; tiles of {architecture}, head size 128, bfloat16")
    return 0
