"""The straight loops of the CUDA library's forward, as nvcc compiles them."""

from __future__ import annotations

import shutil

import pytest

from bench.compiled import cuda_rates, rates
from bench.compiled.csrc import build


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    # CUDA's compiler is no Python package: most machines that run the tests do not have it. The error says where it was
    # looked for.
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


def test_the_loops_keep_their_budgets():
    found = cuda_rates.loops_of("7.5", 64)
    assert [one.loop.loop for one in found] == [
        "prefix, gate per row",
        "prefix, gate per query",
        "tokens, edge",
        "tokens",
    ]
    allowed = rates.budgets()
    assert [fault for one in found for fault in one.faults(allowed)] == []
    assert allowed[found[-1].loop.key]["nvcc"] <= 15, "what such a loop needs"


def test_a_branch_on_a_setting_is_noticed(tmp_path):
    folder = shutil.copytree(build.CSRC, tmp_path / "csrc")
    source = (folder / "plain.cuh").read_text()
    line = "kind.weigh(c);"
    assert source.count(line) == 1
    planted = f"{line}\n            if (scale < 0) {{ for (int e = 0; e < 4; ++e) {{ c[0][e] = tanhf(c[0][e]); }} }}"
    (folder / "plain.cuh").write_text(source.replace(line, planted))
    tokens = cuda_rates.loops_of("7.5", 64, folder)[-1]
    branches, instructions = sorted(tokens.faults(rates.budgets()))
    assert "branches inside" in branches
    assert "instructions an element; the budget is" in instructions
