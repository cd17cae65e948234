"""The benchmark measures what it says: every peer is checked, a wrong one is not timed."""

import json

import pytest
import torch

from bench import op, peers
from bench.shapes import REGISTRIES, TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_every_shape_times_its_peers_or_says_why_not(shape, tmp_path):
    result = op.measure(shape, CPU, torch.float32, seconds=0)
    assert {"no_prefix", "naive", "ours:cpu"} <= set(result["peers"])
    assert set(result["peers"]) | set(result["skipped"]) == {peer.name for peer in peers.peers(CPU)}
    assert all(result["skipped"].values())
    for peer in result["peers"].values():
        assert peer["forward"]["median"] > 0
        assert peer["both"]["median"] > 0


def test_a_wrong_peer_is_not_timed(monkeypatch):
    def wrong(tensors, mask, shape):
        return peers._naive(tensors, None, shape)

    monkeypatch.setattr(op, "peers", lambda device: [peers.Peer("wrong", wrong, lambda shape, device: None)])
    result = op.measure(TINY[0], CPU, torch.float32, seconds=0)
    assert result["peers"] == {}
    assert "off by" in result["skipped"]["wrong"]


def test_results_are_written_with_the_machine(tmp_path):
    op.main(
        ["--shapes", "tiny", "--only", "decode", "--seconds", "0", "--device", "cpu", "--out", f"{tmp_path}/o.json"]
    )
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert [result["name"] for result in written["results"]] == [s.name for s in TINY if s.kind == "decode"]


def test_shape_names_are_unique():
    for shapes in REGISTRIES.values():
        assert len({shape.name for shape in shapes}) == len(shapes)
