"""Launches, multiplications and bytes of the fused kernels for a layer, counted in the interpreter, with limits."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace

import pytest

from bench.compiled import launches
from bench.speed import counts
from bench.speed.shapes import causal, encoder

pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counting needs Triton's interpreter; here a GPU compiles"
)

# Every size is a multiple of the interpreter's tiles: nothing is computed for padding.
WHOLE = encoder(1, 2, 64, 32, "row", padded=False)


def _by_name(found: launches.Counted) -> dict[str, launches.Launch]:
    return {launch.kernel: launch for launch in found.launches if launch.ours}


@pytest.fixture(scope="module")
def whole():
    return launches.of(WHOLE)


def test_forward_is_one_launch_at_the_floor(whole):
    forward, size = whole["forward"], 2
    assert forward.ours == ["attention_forward"]
    assert len(forward.launches) == 1
    assert forward.total("flops") == counts.attention_flops(WHOLE, 64 + 32, "forward")
    kernel = _by_name(forward)["attention_forward"]
    heads, tokens, dim, tiles = 2, 64, 64, 4
    assert kernel.written == heads * tokens * (dim * size + 4)
    # Queries once; keys, values and the float32 prefix once for each tile of queries; gate and scale besides.
    columns = 2 * (tokens * size + 32 * 4) * dim
    assert heads * tokens * dim * size + heads * tiles * columns <= kernel.read
    assert kernel.read <= 1.02 * (heads * tokens * dim * size + heads * tiles * columns)


def test_backward_computes_scores_twice_and_nothing_in_vain(whole):
    backward = whole["backward"]
    assert backward.ours == ["query_gradient", "column_gradients", "finish_gradients"]
    assert len(backward.launches) == 3
    # Five products are the least; kernels that share no scores need seven.
    assert backward.total("flops") == pytest.approx(7 / 5 * counts.attention_flops(WHOLE, 64 + 32, "backward"))
    kernels = _by_name(backward)
    assert kernels["query_gradient"].written == 2 * 64 * (64 * 2 + 8)  # dq, and the rows' log-sum-exp and delta
    assert kernels["column_gradients"].written >= 2 * 2 * 64 * 64 * 2  # dk, dv and the prefix's partial sums


@pytest.mark.parametrize(("gate", "padded"), [("none", False), ("row", False), ("query", False), ("row", True)])
def test_launches_of_a_layer(gate, padded):
    shape = replace(encoder(2, 1, 32, 16, gate), padded=padded)
    found = launches.of(shape)
    assert len(found["forward"].launches) == 1
    assert len(found["backward"].launches) == 3


def test_a_causal_mask_skips_what_it_hides():
    """Of a causal square of n tiles, n (n + 1) / 2 are computed; the prefix in full."""
    shape = causal(1, 1, 1, 64, 64, 16, "none")
    found = launches.of(shape)["forward"]
    assert found.total("flops") == 4 * 64 * (10 * 16 * 16 + 64 * 16)


def test_no_prefix_memory_grows_with_the_batch():
    shape = encoder(1, 2, 32, 64, "none", padded=False)
    found = [launches.of(replace(shape, batch=batch)) for batch in (4, 5, 6)]
    row = 2 * 32 * 64 * 2  # one row of a query, key or value
    sums = 2 * 32 * 4
    more = {which: _steps([of[which].allocated for of in found]) for which in ("forward", "backward")}
    assert more["forward"] == [row + sums] * 2  # the output and its log-sum-exp
    # dq, dk, dv and the rows' delta; and of the gate some floats a prefix column, never its heads and dimensions.
    assert all(3 * row + sums <= step <= 3 * row + sums + 16 * shape.length for step in more["backward"])


def _steps(values: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise(values)]


def test_the_table_names_every_launch():
    found = list(launches.passes(shapes=(replace(WHOLE, tokens=32, keys=32, length=16),)))
    text = launches.table(found)
    assert all(name in text for name in ("attention_forward", "column_gradients", "finish_gradients", "1 of ours"))
    recorded = launches.record("sm_90", found)["passes"]
    assert [(row["pass"], row["all"]) for row in recorded] == [("forward", 1), ("backward", 3)]
    assert all(row["flops_by_floor"] >= 1 <= row["bytes_by_floor"] for row in recorded)


def test_what_is_recorded_is_of_the_registered_shapes():
    recorded = json.loads(launches.RECORD.read_text(encoding="utf-8"))
    cases = [(shape.name, which) for shape in launches.SHAPES for which in shape.passes if which != "both"]
    assert [(row["case"], row["pass"]) for row in recorded["passes"]] == cases
