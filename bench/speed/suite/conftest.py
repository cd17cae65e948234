"""pytest-benchmark with one difference: the peers of a case are timed in turn, not one after the other.

A ratio between two separate loops depends on what the machine did in the minutes between them. So the first test of a
case times every peer of that case, in turn, in one process; each test then records the times of its own peer and pass
as pytest-benchmark's statistics. A peer that was not timed is in the JSON too, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from bench.common import machine
from bench.speed import registry
from bench.speed.harness import Measurements, Settings
from bench.speed.op import Measured
from bench.speed.tables import statistics_of

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's messages
_SETTINGS = {"measured": "in turn, in one process", "order": "rotated every round", "garbage_collection": "off"}


def pytest_addoption(parser):
    group = parser.getgroup("apt", "what to measure")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtype", default=None, help=registry.DTYPES)
    group.addoption("--registry", default=None, choices=tuple(registry.SECONDS), help="default: by device")
    group.addoption("--stage", default=None, help="one stage; default: all of the file")
    group.addoption("--only", default="", help="cases whose name contains this")
    group.addoption("--peers", default="", help="peers, separated by commas; default: all")
    group.addoption("--seconds", type=float, default=60, help="for a stage")
    group.addoption("--limit", type=float, default=None, help="seconds after which no case of a stage begins")


def pytest_configure(config):
    def say(line: str) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        with config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)
            reporter.flush()

    config.apt = Measurements(Settings(config), say)


@pytest.fixture
def settings(request) -> Settings:
    return request.config.apt.settings


def _record(benchmark, samples: list[float]) -> None:
    """Make seconds that were measured before the statistics of a test; pytest-benchmark has no public call for it."""
    statistics = benchmark._make_stats(iterations=1)
    for seconds in samples:
        statistics.update(seconds)
    benchmark._mode = "recorded"  # or the fixture warns that it was not used


@pytest.fixture
def enter(request, benchmark):
    """Record the times of one peer and pass, or skip with the reason why there are none."""

    def function(stage: str, case, peer: str, which: str, measure: Callable[[float], Measured], extra: dict):
        found = request.config.apt.of(case.name, measure)
        samples = found.samples.get(peer, {}).get(which)
        if not samples:
            reason = found.skipped.get(peer) or found.left_out or f"no such pass of {peer} here"
            request.config.apt.skipped.append({"stage": stage, "case": case.name, "peer": peer, "reason": reason})
            if peer in found.wrong:
                pytest.fail(f"{peer} on {case.name}: {reason}", pytrace=False)
            pytest.skip(reason)
        benchmark.group = f"{case.name} {which}"
        benchmark.extra_info.update(stage=stage, case=case.name, peer=peer, which=which, **found.figures[peer], **extra)
        _record(benchmark, samples)

    return function


def pytest_benchmark_generate_machine_info(config):
    return machine.machine(config.apt.settings.device)


def pytest_benchmark_generate_commit_info(config):
    return machine.commit()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    settings, skipped = config.apt.settings, {}
    for entry in config.apt.skipped:  # one entry for all passes
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
    output_json["benchmarks"] = [
        {"extra_info": entry["extra_info"], "stats": statistics_of(entry["stats"]["data"])}
        for entry in output_json["benchmarks"]
    ]
