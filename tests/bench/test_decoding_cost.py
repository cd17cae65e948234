"""``python -m bench decoding``: the cache is the same before every step, and the table has the differences by layer."""

from __future__ import annotations

import pytest
import torch

from bench import __main__ as bench
from bench.speed import decoding


@pytest.mark.parametrize("cache", decoding.CACHES)
@pytest.mark.parametrize("gate", decoding.GATES)
def test_every_step_follows_the_same_prompt(cache, gate):
    model = decoding.models((gate,), length=3)[gate]
    step, back = decoding.decoder(model, cache, rows=2, prompt=5)
    with torch.no_grad():
        found = []
        for _ in range(3):
            found.append(step())
            back()
    ids = torch.randint(5, decoding.VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
    assert all(torch.equal(found[0], each) for each in found[1:])
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5)  # another shape of the same products


def test_a_patched_step_has_its_prefix():
    models = decoding.models(("none",), length=3)
    with torch.no_grad():
        plain, patched = (decoding.decoder(each, "dynamic", rows=1, prompt=5)[0]() for each in models.values())
    assert not torch.allclose(plain, patched, rtol=1e-3, atol=1e-4)


def test_figures_are_microseconds_by_layer_that_a_round_adds():
    base = [decoding.LAYERS * 1e-6 * each for each in (100, 110, 120, 130, 140)]
    slower = [each + decoding.LAYERS * 1e-6 * more for each, more in zip(base, (5, 9, 7, 6, 8))]
    found = decoding.figures({"unpatched": base, "none": slower})
    assert found["unpatched"] == pytest.approx((102, 120, 110, 130))
    assert found["none"] == pytest.approx((107.8 - 102, 7, 6, 8))


def test_the_command_prints_a_row_for_each_model(capsys):
    threads = torch.get_num_threads()
    try:
        given = ["--rounds", "2", "--caches", "static", "--rows", "1", "--gates", "none", "first"]
        assert bench.main(["decoding", *given]) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for said in ("unpatched", "gate none, more", "gate first, more"):
        assert sum(f"| {said} " in line for line in printed.splitlines()) == 1
    assert "2 rounds, prefix 16, prompt 8, commit " in printed
