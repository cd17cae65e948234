"""A fast part of the sweep over every architecture (`make sweep`), and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweep import feeds, report, run

ROOT = Path(__file__).parents[3]
# One of each way to attend; the rest is in the whole sweep.
GROUPS = {
    "interface": ("causal", ["gemma3n_text", "gemma4_text", "gpt_oss", "deepseek_v3", "llama4_text"]),
    "hybrids": ("causal", ["qwen3_next", "jamba", "deepseek_v32", "cpmant"]),
    "inline": ("causal", ["bloom", "falcon", "mpt", "gptj", "gpt_neo", "xlnet", "codegen", "xglm"]),
    "encoders": ("masked", ["deberta", "deberta-v2", "mpnet", "rembert", "mobilebert", "squeezebert", "funnel"]),
    "seq2seq": ("seq2seq", ["t5", "t5gemma2", "fsmt", "longt5"]),
    "senses": (
        ("image", "audio", "speech", "vision-language"),
        ["vit", "siglip2", "dinov2", "swin", "wav2vec2", "wavlm", "sew-d", "whisper", "qwen2_vl", "gemma3", "llama4"],
    ),
}


@pytest.mark.parametrize("group", GROUPS)
def test_architectures_equal_the_oracle(group, tmp_path):
    kinds, types = GROUPS[group]
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "sweep", "--workers", "1", "--json", "out.json", *types]
    command += [part for kind in kinds for part in ("--kind", kind)]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    results = json.loads((tmp_path / "out.json").read_text())
    assert {result["type"]: result.get("reason") for result in results if not result["green"]} == {}
    assert {result["type"] for result in results} == set(types)
    for result in results:
        assert {"outputs", "gradients", "influence"} <= set(result["checks"])
        assert kinds != ("causal",) or "causality" in result["checks"] or result["causality"]
        assert "vision-language" not in kinds or result["senses"]["vision"] or result["senses"]["audio"]


def test_what_was_green_and_is_not_is_reported(monkeypatch):
    monkeypatch.setattr(report, "known_green", lambda: {"masked": {"bert": {"text": 2}}})
    fine = {"type": "bert", "kind": "masked", "green": True, "senses": {"text": 2}}
    fewer = {**fine, "senses": {"text": 1}}
    assert report.lost([fine, {**fine, "type": "new", "green": False}]) == []
    assert report.lost([{**fine, "green": False}]) == [{**fine, "green": False}]
    assert report.lost([fewer]) == [fewer]


def test_a_lost_architecture_fails_the_sweep_and_leaves_the_table(monkeypatch, tmp_path):
    kind, known = next(iter(report.known_green().items()))
    written = []
    monkeypatch.setattr(report, "update", written.append)
    failed = {
        "type": next(iter(known)),
        "kind": kind,
        "green": False,
        "stage": "outputs",
        "reason": "off",
        "checks": [],
    }
    monkeypatch.setattr(run, "sweep", lambda jobs, *_: [failed])
    arguments = [failed["type"], "--kind", kind, "--json", str(tmp_path / "out.json"), "--update"]
    assert run.main(arguments) == 1
    assert written == []
    assert run.main([*arguments, "--lose"]) == 0
    assert written == [[failed]]


def test_the_table_and_the_list_of_what_is_green_agree():
    page, green = report.TABLE.read_text(), report.known_green()
    for kind, types in green.items():
        section = page.partition(f"## {feeds.KINDS[kind].title}\n")[2].partition("\n## ")[0]
        rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| ")][2:]
        assert sorted(name.strip() for name, said in rows if said.strip().startswith("yes")) == list(types)


def test_groups_that_were_not_run_keep_their_section():
    row = {"type": "bert", "kind": "masked", "green": True, "checks": [], "senses": {"text": 2}, "alone": []}
    page, before = report.table([{**row, "left out": []}], "1.2", report.TABLE.read_text()), report.TABLE.read_text()
    assert "| Masked language models | 1 | 1 | 0 |\n" in page
    made = page.partition("\n## Masked language models\n")[2].partition("\n## ")[0]
    assert [line for line in made.splitlines() if line.startswith("| bert")] == ["| bert | yes: text 2 |  |  |"]
    for kind in ("causal", "seq2seq"):
        section = before.partition(f"\n## {feeds.KINDS[kind].title}\n")[2].partition("\n## ")[0]
        assert section.strip() in page


def test_nine_in_ten_text_architectures_are_green():
    green = report.known_green()
    total = sum(len(feeds.architectures(kind)) for kind in feeds.TEXT)
    assert sum(len(green[kind]) for kind in feeds.TEXT) >= 0.9 * total
