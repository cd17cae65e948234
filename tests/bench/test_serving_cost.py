"""``python -m bench serving``: the arithmetic of a prefix, and the table. No engine is started."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import apt_kernels
from bench import __main__ as bench
from bench.common.machine import RESULTS, ROOT
from bench.speed import serving


def test_the_arithmetic_is_that_of_the_patched_model():
    """Against PyTorch's count of a prompt, every query over every key; our operator is added, as it is not counted."""
    size = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**size, head_dim=16, vocab_size=60, attn_implementation="eager"))
    ids, head, ours = torch.randint(0, 60, (3, 10)), 30 * 48 * 60, 0
    for length in (0, 7):
        if length:
            apt_kernels.patch(model, prefix_length=length, gate="token")
            ours = 2 * 30 * 2 * 64 * (10 + length)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False)
        counted = counter.get_total_flops() / 2 - head + ours
        assert serving.arithmetic(model.config, 30, 10, length) == pytest.approx(counted, rel=0.01)


def test_what_an_adapter_may_cost_grows_with_its_length():
    size = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlamaConfig(**size, head_dim=16, vocab_size=100)
    for which in serving.PASSES:
        ratios = [serving.over(config, which, length) for length in (0, *serving.LENGTHS)]
        assert ratios[0] == 1
        assert ratios == sorted(ratios)
        assert ratios[-1] > 1.5


def test_a_row_shows_rates_and_ratios():
    def passes(first: float, batch: float, more: float) -> dict:
        quartiles = {"median": more, "q1": more - 0.01, "q3": more + 0.01}
        seconds = {"first token": {"median": first}, "batch": {"median": batch}}
        return {name: {"seconds": seconds[name], "ratio": quartiles, "arithmetic": 1.1} for name in serving.PASSES}

    shown = serving.table({"engines": {serving.WITHOUT: passes(0.5, 4.0, 1.0), "prefix 16": passes(0.6, 5.0, 1.2)}})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()[2:]]
    assert rows[0] == ["no adapter", "500", "64", "", ""]
    assert rows[1] == ["prefix 16", "600", "51", *["1.20 (1.19 to 1.21); 1.16"] * 2]


def test_the_page_shows_the_stored_results():
    page = (ROOT / "docs" / "how-to" / "serving.md").read_text(encoding="utf-8")
    stored = (RESULTS / "serving.json").read_text(encoding="utf-8")
    assert serving.table(json.loads(stored)) in page


def test_without_vllm_the_command_names_the_target(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Run `make bench-vllm`"):
        bench.main(["serving"])
