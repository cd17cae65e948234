"""pytest-benchmark with one difference: times are taken for all peers in turn, then entered peer by peer.

A ratio between two separate loops says as much about the minutes between them as about the code. So the first test of
a case measures every peer of that case, in turn, in one process; each test then plays its own samples into
pytest-benchmark through a timer that advances by them. What could not be timed is in the JSON too, with its reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from bench import machine
from bench.speed.harness import TAPE, Measurements, Settings
from bench.speed.op import Measured

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks
_SETTINGS = {"measured": "in turn, in one process", "order": "turning every round", "garbage_collection": "off"}


def pytest_addoption(parser):
    group = parser.getgroup("apt", "what to measure")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtype", default=None, help="default: bfloat16 on CUDA, float32 elsewhere")
    group.addoption("--registry", default=None, choices=("gpu", "cpu", "tiny"), help="default: by device")
    group.addoption("--stage", default=None, help="one stage; default: all of the file")
    group.addoption("--only", default="", help="cases whose name contains this")
    group.addoption("--peers", default="", help="peers, separated by commas; default: all")
    group.addoption("--seconds", type=float, default=60, help="for a stage")


def pytest_configure(config):
    config.apt = Measurements(Settings(config))


@pytest.fixture
def settings(request) -> Settings:
    return request.config.apt.settings


@pytest.fixture
def enter(request, benchmark):
    """Enter the samples of one peer and pass, or say why there are none."""

    def function(stage: str, case, peer: str, which: str, measure: Callable[[float], Measured], extra: dict):
        found = request.config.apt.of(case.name, measure)
        samples = found.samples.get(peer, {}).get(which)
        if not samples:
            reason = found.skipped.get(peer, f"no such pass of {peer} here")
            request.config.apt.skipped.append({"stage": stage, "case": case.name, "peer": peer, "reason": reason})
            if peer in found.wrong:
                pytest.fail(f"{peer} on {case.name}: {reason}", pytrace=False)
            pytest.skip(reason)
        played = iter(samples)

        def play():
            TAPE.now += next(played)

        benchmark.group = f"{case.name} {which}"
        benchmark.extra_info.update(stage=stage, case=case.name, peer=peer, which=which, **found.figures[peer], **extra)
        benchmark.pedantic(play, rounds=len(samples))

    return function


def pytest_benchmark_generate_machine_info(config):
    return machine.machine(config.apt.settings.device)


def pytest_benchmark_generate_commit_info(config):
    return machine.commit()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    settings, skipped = config.apt.settings, {}
    for entry in config.apt.skipped:  # one line for all passes
        skipped[entry["case"], entry["peer"]] = entry
    output_json["skipped"] = list(skipped.values())
    output_json["settings"] = {
        **_SETTINGS,
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "registry": settings.registry,
        "seconds": settings.seconds,
        "peers": list(settings.peers),
        "only": settings.only,
    }
    for entry in output_json["benchmarks"]:
        del entry["params"]  # they say what extra_info says
        entry["stats"]["data"] = [float(f"{sample:.4g}") for sample in entry["stats"]["data"]]
