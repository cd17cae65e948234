"""The search for tiles as far as possible without a GPU: candidates, compilation and verdicts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("tqdm", reason="the package tqdm is not installed")

from apt_kernels.impl.triton import tiles
from bench.compiled import tune

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", tune.PARTS)
def test_candidates_are_distinct_and_share_their_launch(part):
    for head in tiles.HEADS:
        found = tune.candidates(part, "sm_90", 2, head)
        assert len(found) == len(set(found)) > 1
        host = tune.PARTS[part].host
        if host:
            own = tiles.tile(host, "sm_90", 2, head)
            assert {(tile.warps, tile.stages) for tile in found} == {(own.warps, own.stages)}


def test_a_replaced_tile_is_put_back():
    before = tiles.tile("forward", "sm_90", 2, 64)
    with tune.replaced("forward", "sm_90", 2, 64, tiles.Tile(16, 16, 4, 1)):
        assert tiles.tile("forward", "sm_90", 2, 64) == tiles.Tile(16, 16, 4, 1)
    assert tiles.tile("forward", "sm_90", 2, 64) == before


@pytest.mark.slow
def test_compiles_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = "--compile-only --architecture sm_90 --head 64 --part split --seconds 0.1"
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "compiled", "tune", *options.split(), "--out", str(tmp_path / "tune.json")],
        cwd=_ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    entries = json.loads((tmp_path / "tune.json").read_text())
    assert entries[0]["current"]
    assert entries[0]["fault"] is None
    assert entries[0]["compiled"][0]["registers"] > 0
    assert "split" in ran.stdout
