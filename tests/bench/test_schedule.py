"""How evenly the programs of the Triton kernels share a chip: the simulation, and its limit over the registry."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from apt_kernels.impl.triton import tiles
from bench.compiled import schedule
from bench.speed.shapes import causal

# The last program ends at most a tenth later than if the work were divided evenly.
_MOST = 1.10


def test_list_scheduling():
    assert schedule.makespan([1, 1, 1, 1], 2) == 2
    assert schedule.makespan([1, 1, 4], 2) == 5
    assert schedule.makespan([4, 1, 1], 2) == 4


def test_every_tile_of_every_head_has_a_program():
    found = list(schedule.order(3, 5, 2))
    assert sorted(found) == [(tile, head) for tile in range(3) for head in range(5)]
    assert found[:3] == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("architecture", ["sm_90"])
def test_registered_shapes_are_balanced(architecture):
    found = [balance for shape in schedule.registered() for balance in schedule.balances(shape, architecture)]
    assert len(found) > 100
    assert max(found, key=lambda balance: balance.over_even).over_even <= _MOST


def test_heads_one_after_another_are_not(monkeypatch):
    monkeypatch.setattr(tiles, "band", lambda *given: 1)
    found = schedule.balances(causal(1, 32, 8, 2048, 128, 64))
    assert max(balance.over_even for balance in found) > _MOST


def test_a_group_is_cut_where_its_programs_are_too_long():
    assert tiles.shares("sm_90", 8, 4, 16, 16, True) == 4
    assert tiles.shares("sm_90", 8, 4, 256, 256, True) == 1
    assert tiles.shares("sm_90", 128, 1, 8, 8, True) == 1
    # Too little work to fill the chip: partial sums would gain nothing.
    assert tiles.shares("sm_90", 1, 4, 1, 1, False) == 1
