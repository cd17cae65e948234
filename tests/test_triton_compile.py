"""The Triton kernels compiled ahead of time, which needs no GPU: limits, instructions, and how often they compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("tqdm")

_ROOT = Path(__file__).parent.parent
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
        assert set(kernels) == {
            "attention_forward", "row_deltas", "query_gradient", "key_value_gradient", "prefix_partials"
        }  # fmt: skip
        assert instruction in kernels["attention_forward"]
        assert instruction in kernels["key_value_gradient"]


def test_report_fails_on_a_broken_limit(tmp_path):
    """A table whose tiles cannot fit makes the report exit with 1 and say why."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from apt_kernels.impl.triton import table\n"
        "table.tile = lambda *entry: table.Tile(128, 128, 8, 4)\n"
        "from bench import compile_report\n"
        "sys.argv[1:] = '--architecture sm_86 --width 2 --head 64 --variant full --processes 1'.split()\n"
        "compile_report.ProcessPoolExecutor = compile_report.InProcess\n"
        "sys.exit(compile_report.main())\n"
    )


def _count_compilations(variant: str) -> dict[str, int]:
    """Compilations of each kernel over calls that differ in B, T, S and M only. Runs without the interpreter."""
    from bench import compile_report

    job = next(iter(compile_report.jobs(["sm_80"], [2], [64], [variant])))
    kernels = {}

    def execute(kernel, programs, *args, **named):
        kernel.warmup(*args, grid=(programs,), **named)
        kernels[kernel.__name__] = kernel

    for batch, queries, keys, prefix in _LENGTHS:
        compile_report.run_launchers(job, execute, batch=batch, queries=queries, keys=keys, prefix=prefix)
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["causal", "window"])
def test_lengths_cost_no_compilation(variant, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.syspath_prepend(_ROOT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        counts = pool.submit(_count_compilations, variant).result()
    assert counts == dict.fromkeys(counts, 1)
    assert len(counts) == 5


def test_import_needs_torch_alone():
    code = "import apt_kernels, sys; sys.exit(any(name.partition('.')[0] == 'triton' for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=_ROOT).returncode == 0
