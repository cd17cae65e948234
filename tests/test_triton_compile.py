"""The Triton kernels compiled ahead of time, which needs no GPU: limits, instructions, and how often they compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("tqdm")

_ROOT = Path(__file__).parent.parent
FORWARD_AND_BACKWARD = {
    "attention_forward", "query_gradient", "column_gradients", "finish_gradients"
}  # fmt: skip
SPLIT_FORWARD = {"split_attention", "merge_shares"}
_LENGTHS = [(1, 1, 1, 1), (2, 16, 16, 16), (3, 17, 40, 5), (1, 1, 64, 32), (2, 48, 33, 130)]


def _report(*options: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.compile_report", *options],
        cwd=_ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_representative_entries_compile_within_limits():
    chips = {"sm_86": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    report = _report("--architecture", *chips, "--width", "2", "--head", "64", "--variant", "causal")
    assert report.returncode == 0, report.stdout + report.stderr
    for chip, instruction in chips.items():
        lines = re.findall(rf"^ +{chip.removeprefix('sm_')} 16-bit .*$", report.stdout, re.MULTILINE)
        kernels = {line.split()[4]: line for line in lines}
        assert set(kernels) == FORWARD_AND_BACKWARD
        assert instruction in kernels["attention_forward"]
        assert instruction in kernels["column_gradients"]


def _count_compilations(variant: str) -> dict[str, int]:
    """Compilations of each kernel over calls that differ in B, T, S and M only. Runs without the interpreter."""
    from bench import ahead

    job = ahead.jobs(["sm_80"], [2], [64], [variant])[0]
    kernels = {}

    def execute(kernel, programs, *args, **named):
        kernel.warmup(*args, grid=(programs,), **named)
        kernels[kernel.__name__] = kernel

    for batch, queries, keys, prefix in _LENGTHS:
        ahead.run_launchers(job, execute, batch=batch, queries=queries, keys=keys, prefix=prefix)
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


def _faults_of_wide_tiles() -> dict[str, tuple[str, ...]]:
    """What the report says of tiles too wide for the registers and a chip of 4 KiB. Runs without the interpreter."""
    from apt_kernels.impl.triton import table
    from bench import ahead
    from bench.compile_report import results_of

    table.tile = lambda kernel, *entry: table.Tile(128, 128, 4, 1)
    ahead.CHIPS["sm_86"] = [replace(chip, block_shared=4096) for chip in ahead.CHIPS["sm_86"]]
    found = ahead.units(ahead.jobs(["sm_86"], [2], [64], ["full"]))
    results = [result for unit in found for result in results_of(unit, ahead.compile_unit(unit))]
    assert {result.chip.target for result in results} == {86, 89}
    return {result.unit.kernel: result.faults for result in results}


@pytest.fixture
def compiling(monkeypatch):
    """Runs a function of this module in a process without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(_ROOT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["window", "causal_gate_query", "bias"])
def test_lengths_cost_no_compilation(variant, compiling):
    counts = compiling(_count_compilations, variant)
    kernels = FORWARD_AND_BACKWARD | SPLIT_FORWARD | ({"token_bias_gradient"} if variant == "bias" else set())
    assert counts == dict.fromkeys(kernels, 1)


@pytest.mark.slow
def test_report_finds_faults(compiling):
    faults = compiling(_faults_of_wide_tiles)
    assert faults["finish_gradients"] == ()
    assert "spills in a default configuration" in faults["attention_forward"]
    assert "shared memory is over the limit of 4 KiB" in faults["column_gradients"]


def test_import_needs_torch_alone():
    code = "import apt_kernels, sys; sys.exit(any(name.partition('.')[0] == 'triton' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT).returncode == 0
