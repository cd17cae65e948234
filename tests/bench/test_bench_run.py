"""A run of the benchmark: its time, its progress, what it names as not measured, and how threads wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.common import sharing
from bench.speed import op, tables

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_keeps_to_its_minutes():
    from bench.speed import run
    from bench.speed.registry import SECONDS, STAGES

    times, stages = SECONDS["cpu"], list(STAGES)

    def shared(stage: str, left: float, *given: str) -> tuple[float, float | None]:
        options, limit = run.shared(run.arguments(["--registry", "cpu", *given])[0], stage, left)
        return run.seconds_of(options, stage), limit

    # On time: what the registry gives, and no limit before the time that later stages need.
    assert shared(stages[0], 600) == (times[stages[0]], 600 - sum(times[name] for name in stages[1:]))
    # Late: less, in proportion.
    late, limit = shared("training", 60)
    rest = sum(times[name] for name in stages[stages.index("training") :])
    assert late == pytest.approx(40 * times["training"] / rest)
    assert limit == pytest.approx(60 * times["training"] / rest)
    # The caller shares the time.
    assert shared("training", 60, "--seconds", "7") == (7, None)
    assert shared("training", 60, "--within", "9999")[1] is None
    assert run.command(run.arguments([])[0], "training", Path("out"), 12.5)[-1] == "--limit=12.5"


def test_cases_after_the_limit_are_left_out_and_named():
    from bench.speed.harness import Measurements

    settings, said = SimpleNamespace(seconds=0, limit=-1), []
    measured = Measurements(settings, said.append)
    measured.total = 2
    assert measured.of("first", lambda seconds: pytest.fail("measured")).left_out.startswith("no time was left after")
    settings.limit = 60
    assert measured.of("second", lambda seconds: op.Measured()).left_out == ""
    assert [line.partition(", ")[0] for line in said] == ["case 1/2", "case 2/2"]
    assert said[0].endswith(" s: first: left out")
    assert said[1].endswith(" s: second")


def test_what_was_not_measured_is_named_by_reason():
    given = [
        {"peer": "ours:reference", "case": "a", "reason": "it materialises 12,976 scores; up to 8,388"},
        {"peer": "ours:reference", "case": "b", "reason": "it materialises 8,519 scores; up to 8,388"},
        {"peer": "flash", "case": "a", "reason": "a CUDA kernel"},
        {"peer": "cudnn", "case": "a", "reason": "a CUDA kernel"},
    ]
    assert tables.left_out(given) == [
        "cudnn, flash (1 case): a CUDA kernel",
        "ours:reference (2 cases): it materialises 12,976 scores; up to 8,388",
    ]


@pytest.mark.parametrize(
    ("environment", "busy", "policy"),
    [({}, 0.0, None), ({}, 1.5, "PASSIVE"), ({}, None, None), ({"OMP_WAIT_POLICY": "ACTIVE"}, 1.5, "ACTIVE")],
)
def test_threads_wait_passively_beside_other_processes(environment, busy, policy, monkeypatch, capsys):
    monkeypatch.setattr(sharing, "busy_cores", lambda: busy)
    sharing.wait_passively(environment)
    assert environment.get("OMP_WAIT_POLICY") == policy
    assert ("Other processes use 1.5 of" in capsys.readouterr().err) == (policy == "PASSIVE")


def test_busy_cores_are_read_from_the_system(tmp_path, monkeypatch):
    source = tmp_path / "stat"
    source.write_text("cpu  100 0 0 100 0 0 0 0 0 0\ncpu0 1\n")
    later = "cpu  130 0 0 160 10 0 0 0 0 0\ncpu0 1\n"  # 30 of 100 used, 10 waited for a disk
    monkeypatch.setattr(sharing.time, "sleep", lambda seconds: source.write_text(later))
    monkeypatch.setattr(sharing.os, "cpu_count", lambda: 4)
    assert sharing.busy_cores(source=source) == pytest.approx(1.2)
    assert sharing.busy_cores(source=tmp_path / "missing") is None


def test_the_setting_comes_before_torch():
    """OpenMP reads it when torch is loaded; the module of the commands must not load it earlier."""
    code = "import sys, bench.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_progress_is_printed_and_stages_without_time_are_named(tmp_path):
    given = ["speed", "--registry", "tiny", "--device", "cpu", "--stage", "decode", "--peers", "ours:cpu"]

    def run(*more: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "bench", *given, "--out", str(tmp_path), *more],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    said = run()
    cases = [line for line in said if line.startswith("decode: case 1/")]
    assert len(cases) == 1
    assert said.index(cases[0]) < next(i for i, line in enumerate(said) if "exit status" in line)
    assert "Not measured:" in said
    assert json.loads((tmp_path / "decode.json").read_text())["benchmarks"]
    said = run("--minutes", "0")
    assert said == ["decode: no time was left", "Not measured:", "- decode: no case was measured"]
    # Nothing of the earlier run is reported as this one's.
    assert not list(tmp_path.glob("*.json"))
