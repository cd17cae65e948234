"""The example scripts run, and what they print is right."""

import math
import re
import runpy
import sys

import pytest
from accelerate.state import AcceleratorState

from helpers.documentation import ROOT


@pytest.fixture(autouse=True)
def own_accelerator_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(name, monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for a script
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_decoder(monkeypatch, capsys):
    found = run("decoder.py", monkeypatch, capsys, "--steps", "10")
    assert float(re.search(r"logits differ by (\S+)", found)[1]) < 1e-4  # two sums in another order, in float32
    before, after = map(float, re.search(r"text: (\S+) before, (\S+) after", found).groups())
    assert after < before
    assert "it generates the same: True" in found


def test_lora_beside_the_prefix(monkeypatch, capsys):
    found = run("lora.py", monkeypatch, capsys)
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", found).groups())
    assert after < before - 0.3
    assert "prefix: 4,096 parameters at 0.01" in found
    assert "head: 4,096 parameters at 0.001" in found
    assert "it computes the same: True" in found


@pytest.mark.parametrize("base", [False, True], ids=["the adapter", "the base model"])
def test_sft_and_dpo(base, monkeypatch, capsys):
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    found = run("sft_dpo.py", monkeypatch, capsys, *(["--base-reference"] if base else []))
    before, after = map(float, re.search(r"SFT: loss (\S+) before, (\S+) after", found).groups())
    assert after < before - 0.3
    extra = int(re.search(r"adds (\S+) parameters", found)[1].replace(",", ""))
    assert extra == (0 if base else 4096 + 2 * (16 * 64 + 1))  # keys and values; gates and scales
    first, last = map(float, re.search(r"DPO: loss (\S+) at the first step, (\S+) after", found).groups())
    assert (abs(first - math.log(2)) < 1e-3) == (not base)
    assert last < first
