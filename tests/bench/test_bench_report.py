"""Tables, plots and comparisons of results; the committed ones follow from their JSON; the GPU script's dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.common import machine
from bench.speed import plots, report, tables, targets, words

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "triton": None}


def _entry(stage: str, case: str, peer: str, which: str, median: float, **info) -> dict:
    given = {
        "stage": stage,
        "case": case,
        "peer": peer,
        "which": which,
        "note": "",
        "error": 0.1,
        "peak_bytes": 1 << 20,
    }
    samples = [median * f for f in (0.9, 0.95, 1.0, 1.05, 1.1)]
    shape = {"tokens": 2048, "batch": 4, "heads": 32, "kv_heads": 32, "dim": 128, "length": 16}
    return {"extra_info": {**given, "shape": shape, **info}, "stats": tables.statistics_of(samples)}


def _write(folder: Path, entries: list[dict], device: str = "NVIDIA H200", commit: str = "abc") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    found = {"device": device, "threads": 16, "versions": VERSIONS} | ({"cuda": "13.0"} if "NVIDIA" in device else {})
    skipped = [{"stage": "causal", "case": "c1", "peer": "flex", "reason": "not compiled"}]
    (folder / "causal.json").write_text(
        json.dumps(
            {
                "machine_info": found,
                "commit_info": {"id": commit, "dirty": False},
                "settings": {"dtype": "bfloat16"},
                "benchmarks": entries,
                "skipped": skipped,
            }
        )
    )
    return folder


def _causal(ours: float = 1.1e-3) -> list[dict]:
    return [
        _entry("causal", "c1", "no_prefix", "both", 1.2e-3, flops=1e9),
        _entry("causal", "c1", "no_prefix:cudnn", "both", 1.0e-3, flops=1e9),
        _entry("causal", "c1", "ours:triton", "both", ours, flops=1.08e9, flop_overhead=0.08, automatic=True),
        _entry("causal", "c1", "ours:cuda", "both", ours / 4, flops=1.08e9, flop_overhead=0.08, automatic=False),
        _entry("causal", "c1", "naive", "both", 3.3e-3, flops=1.08e9, flop_overhead=0.08, peak_bytes=4 << 20),
        _entry("causal", "c1", "ours:triton", "forward", 1e-4, flops=1e9, flop_overhead=0.08, automatic=True),
    ]


def test_a_row_holds_ours_against_the_best_without_a_prefix(tmp_path):
    row = next(row for row in tables.load(_write(tmp_path, _causal())).rows if row.which == "both")
    assert row.ours.median == pytest.approx(1.1e-3)
    assert row.no_prefix.median == pytest.approx(1.0e-3)
    assert row.over_no_prefix == pytest.approx(1.1)
    assert row.relative_rate == pytest.approx(1.08 / 1.1)
    assert row.against("naive") == pytest.approx(3.0)
    assert row.against("flex") is None
    assert row.memory_against("naive") == 0.25


def test_the_table_and_what_is_missing(tmp_path, capsys):
    folder = _write(tmp_path / "results", _causal())
    assert report.main([str(folder), "--out", str(tmp_path / "out"), "--details"]) == 0
    printed = capsys.readouterr().out
    cells = [cell.strip() for cell in printed.splitlines()[4].split("|")[1:-1]]
    assert cells == "causal|c1|both|1.100 ±8%||0.982|1.10|1.08|98%|3.00|1.0|0.25".split("|")
    assert "not compiled" in printed
    assert "ours:cuda" in printed
    assert (tmp_path / "out/report.md").read_text().startswith("NVIDIA H200, 16 threads; python 3.12.1, torch 2.11.0;")
    assert plots.fingerprint_of(tmp_path / "out/report.png") == plots.fingerprint(plots.series(tables.load(folder)))


def test_every_peer_has_a_line(tmp_path):
    shape = {"batch": 4, "heads": 32, "kv_heads": 32, "dim": 128, "length": 16}
    entries = [
        _entry("causal", f"t{tokens}", peer, "both", 1e-3, flops=1e9, shape={**shape, "tokens": tokens}, automatic=True)
        for peer in words.PEERS
        for tokens in (512, 1024)
    ]
    results = tables.load(_write(tmp_path / "results", entries))
    (panel,) = plots.series(results)["time"]
    assert set(panel["lines"]) == set(plots._TRAINING)
    plots.draw(results, tmp_path / "all.png", "all peers")
    assert (tmp_path / "all.png").stat().st_size


def test_targets_are_met_missed_or_not_measured(tmp_path):
    def lines(ours: float, device: str = "NVIDIA H200") -> list[list[str]]:
        text = targets.table([tables.load(_write(tmp_path, _causal(ours), device))])
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]

    assert len(lines(1.1e-3)) == len(targets.TARGETS)
    assert lines(0.8e-3)[0][2:] == ["at most 1.05", "0.72", "met", "c1 (worst of 1)"]
    assert lines(1.1e-3)[0][3:5] == ["1.02", "undecided"]  # 1.20 with ours at its slow quartile
    assert lines(1.5e-3)[0][3:5] == ["1.42", "missed"]
    assert lines(1.1e-3)[3][3:5] == ["3.00", "met"]
    assert lines(1.1e-3)[1][3] == "not measured"
    library = [line for line in lines(1.1e-3) if "ours:cuda" in line[1]]
    assert [line[3] for line in library] == ["12.00", "4.00"]
    assert all(line[3] == "not measured" for line in lines(1.1e-3, "NVIDIA L4") if line[0] == "H200")


def test_a_verdict_needs_quartiles_that_exclude_equality(tmp_path):
    row = next(row for row in tables.load(_write(tmp_path, _causal())).rows if row.which == "both")
    assert words.ratio_in_words(row, "naive") == "3.00 (2.58 to 3.49): faster"
    assert words.ratio_in_words(row, "no_prefix") == "1.09 (0.94 to 1.27): within the spread"
    assert words.ratio_in_words(row, "flex") == "-"
    row.peers["naive"] = replace(row.peers["naive"], rounds=2)
    assert words.ratio_in_words(row, "naive") == "3.00"


def test_cases_are_named_in_words(tmp_path):
    shape = {"kind": "encoder", "batch": 32, "heads": 12, "kv_heads": 12, "dim": 64, "gate": "row", "padded": True}
    entry = _entry("encoder", "c1", "ours", "both", 1e-3, shape={**shape, "tokens": 1024, "keys": 1024, "length": 16})
    row = tables.load(_write(tmp_path, [entry])).rows[0]
    assert (
        words.case_in_words(row) == "Encoder, 12 heads of 64, 32 x 1,024 tokens, prefix 16, a gate per sequence, padded"
    )


def test_two_commits_are_compared_by_what_was_measured_in_one_run(tmp_path, capsys):
    before = _write(tmp_path / "before", _causal(2.2e-3), commit="old")
    after = _write(tmp_path / "after", _causal(1.1e-3), commit="new")
    assert report.main(["--compare", str(before), str(after)]) == 0
    printed = capsys.readouterr().out
    assert "before: commit old" in printed
    assert "after: commit new" in printed
    row = next(line for line in printed.splitlines() if "| both" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["c1", "both", "2.200", "1.100", "2.20", "1.10", "2.00", "1.50", "3.00"]


def test_a_source_without_results_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no results; it needs"):
        tables.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no-such-revision"):
        tables.load("no-such-revision:bench/results")


def test_results_of_a_commit_are_read_from_git(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    _write(tmp_path / "bench/results/here", _causal(), commit="committed")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "results"]):
        if subprocess.run([*git, *command], capture_output=True).returncode:
            pytest.skip("git is missing or refuses")
    _write(tmp_path / "bench/results/here", _causal(), commit="since")
    assert tables.load("HEAD:bench/results/here").commit["id"] == "committed"


def test_the_machine_is_named_without_its_host():
    found = machine.machine(torch.device("cpu"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert os.uname().nodename not in json.dumps(found)
    assert machine.slug(torch.device("cpu")).endswith(f"{os.cpu_count()}-cores")
    assert set(machine.commit()) == {"id", "dirty"}


def test_what_is_committed_is_what_its_results_give():
    """docs/performance.md, bench/results/README.md and the figures are those of `python -m bench report --update`."""
    for path, text in report.generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: python -m bench report --update"
    for name, folder in report.machines().items():
        drawn = plots.series(tables.load(folder))
        for kind in plots.FIGURES:
            picture = plots.fingerprint_of(ROOT / "docs" / f"bench-{name}-{kind}.png")
            assert picture == plots.fingerprint({kind: drawn[kind]}), f"docs/bench-{name}-{kind}.png is stale"
        picture = plots.fingerprint_of(ROOT / "docs" / f"models-{name}.png")
        drawn = plots.model_ratios(tables.load(folder))
        assert picture == plots.fingerprint({"models": drawn}), f"docs/models-{name}.png is stale"


@pytest.mark.slow
def test_the_gpu_script_runs_dry(tmp_path):
    """The stages of bench/gpu.sh on the CPU with tiny shapes: the same code, and results of each on disk."""
    stages = ("training", "compilation")  # decode: test_notebooks.py
    settings = {
        "APT_OUT": str(tmp_path),
        "APT_STAGES": f"machine tests {' '.join(stages)} table",
        "APT_TESTS": "tests/bench/test_bench_report.py -k host",
        "APT_WORKERS": "1",
        "APT_REGISTRY": "tiny",
        "APT_DEVICE": "cpu",
        "APT_SECONDS": "0",
        "APT_PEERS": "naive,ours",
        "APT_COMMIT": "dry-run",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "TRITON_"))} | settings
    done = subprocess.run(["bash", str(ROOT / "bench/gpu.sh")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in (tmp_path / "tests.log").read_text()
    for stage in stages:
        written = json.loads((tmp_path / "json" / f"{stage}.json").read_text())
        assert written["commit_info"]["id"] == "dry-run"
        assert written["machine_info"]["threads"] == 1
        assert {entry["extra_info"]["stage"] for entry in written["benchmarks"]} == {stage}
        assert all(entry["reason"] for entry in written["skipped"])
    found = tables.load(tmp_path / "json")
    assert [row.stage for row in tables.main_rows(found)] == ["training"] * 3 + ["compilation"]
    assert (tmp_path / "report.png").exists()
    assert "llama-tiny" in done.stdout


def test_the_gpu_script_says_what_there_was_no_time_for(tmp_path):
    settings = {"APT_OUT": str(tmp_path), "APT_STAGES": "decode", "APT_MINUTES": "0.1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh")], capture_output=True, text=True, env={**os.environ, **settings}
    )
    assert done.returncode == 1
    assert "decode: no time left" in done.stdout
    assert "failed or cut short: decode" in done.stdout
