"""The straight loops of the CUDA library, as nvcc compiles them."""

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


# What the loop over whole tokens may issue for a pair, on 7.5 with 64 columns.
_MOST = {"plain_forward": 15, "plain_query_gradient": 18}


@pytest.mark.parametrize("kernel", _MOST)
def test_the_loops_keep_their_budgets(kernel):
    found = cuda_rates.loops_of(kernel, "7.5", 64)
    assert [one.loop.loop for one in found] == [
        "prefix, gate per row",
        "prefix, gate per query",
        "tokens, edge",
        "tokens",
    ]
    allowed = rates.budgets()
    assert [fault for one in found for fault in one.faults(allowed)] == []
    row, query, _, tokens = (allowed[one.loop.key]["nvcc"] for one in found)
    assert tokens <= _MOST[kernel]
    assert row <= 1.5 * tokens
    assert query <= 2 * tokens
    # Registers hold what they load: one of the two tensors' tiles.
    assert kernel == "plain_forward" or [one.ahead for one in found] == [4] * 4


def test_two_tiles_are_copied_at_once_where_copies_are_asynchronous():
    """A barrier each then suffices."""
    names = [name for name in cuda_rates.KERNELS if name != "plain_forward"]
    found = [one for name in names for one in cuda_rates.loops_of(name, "8.0", 64)]
    assert [one.barriers for one in found] == [1] * 8
    allowed = rates.budgets()
    assert [fault for one in found for fault in one.faults(allowed)] == []
    _, tokens, row, query = (allowed[one.loop.key]["nvcc"] for one in found[4:])
    assert tokens <= 18
    assert row <= 1.5 * tokens
    assert query <= 2 * tokens


@pytest.mark.parametrize(
    ("kernel", "source", "line"),
    [
        ("plain_forward", "plain.cuh", "kind.weigh(c);"),
        ("plain_query_gradient", "plain_gradients.cuh", "kind.weigh(r);"),
    ],
)
def test_a_branch_on_a_setting_and_a_barrier_are_noticed(kernel, source, line, tmp_path):
    folder = shutil.copytree(build.CSRC, tmp_path / "csrc")
    text = (folder / source).read_text()
    assert text.count(line) == 1
    planted = "if (scale < 0) { for (int e = 0; e < 4; ++e) { c[0][e] = tanhf(c[0][e]); } } sync_block();"
    (folder / source).write_text(text.replace(line, f"{line} {planted}"))
    tokens = cuda_rates.loops_of(kernel, "7.5", 64, folder)[-1]
    faults = "; ".join(tokens.faults(rates.budgets()))
    assert "3 barriers of the block" in faults
    assert "branches inside" in faults
    assert "instructions an element; the budget is" in faults
