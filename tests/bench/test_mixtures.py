"""``python -m bench mixtures``: the mixed batch is checked before it is timed, and ratios are of the same round."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as bench
from bench.speed import mixtures


def made(which: str, count: int = 3, rows: int = 6):
    ours = mixtures.patched(mixtures.base_model(layers=1), count, length=4)
    ids = torch.randint(5, mixtures.VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(0))
    return mixtures.calls(ours, None, which, ids, count)


@pytest.mark.parametrize("which", mixtures.PASSES)
@torch.no_grad()
def test_mixed_rows_are_those_of_one_adapter_after_the_other(which):
    found = made(which)
    mixtures.check(found, which)
    assert not torch.equal(found["mixed"](), found[mixtures.OURS]())  # the adapters have an effect
    wrong = {**found, "mixed": found[mixtures.OURS]}
    with pytest.raises(RuntimeError, match=f"{which}: the mixed batch differs"):
        mixtures.check(wrong, which)


def test_ratios_are_to_one_adapter_of_the_same_round():
    samples = {
        mixtures.OURS: [1.0, 2.0, 4.0],
        "mixed": [1.1, 2.4, 4.0],
        mixtures.PEFT: [2.0, 2.0, 2.0],
        "PEFT, mixed LoRA": [3.0, 3.0, 3.0],
    }
    found = mixtures.ratios({name: {"call": each} for name, each in samples.items()})
    assert found["mixed"] == pytest.approx((1.1, 1.05, 1.15))
    assert found["PEFT, mixed LoRA"] == pytest.approx((1.5, 1.5, 1.5))


def test_the_command_prints_every_call(capsys, monkeypatch):
    monkeypatch.setattr(mixtures, "ROWS", 4)
    threads = torch.get_num_threads()
    try:
        assert bench.main(["mixtures", "--adapters", "2", "--rounds", "1", "--length", "2", "--rank", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for call in (mixtures.OURS, "mixed", "one after the other", mixtures.PEFT, "PEFT, mixed LoRA"):
        assert sum(f"| {call} " in line for line in printed.splitlines()) == 2
    # 4 layers: keys and values of 4 heads of 32, 2 tokens; gates of 2 x 256; one scale. LoRA: 256 + 256 and 256 + 128.
    assert f"prefix {4 * 4 * (2 * 4 * 2 * 32 + 2 * 256 + 1):,} bytes" in printed
    assert f"LoRA {4 * 4 * (256 + 256 + 256 + 128):,} bytes" in printed
