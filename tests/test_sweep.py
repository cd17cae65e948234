"""A fast part of the sweep over every architecture (`make sweep`), and what its table says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sweep import feeds, report, run

ROOT = Path(__file__).parent.parent
# One of each way to attend; the rest is in the whole sweep.
GROUPS = {
    "interface": ("causal", ["gemma3n_text", "gemma4_text", "gpt_oss", "deepseek_v3", "llama4_text"]),
    "hybrids": ("causal", ["qwen3_next", "jamba", "deepseek_v32", "cpmant"]),
    "inline": ("causal", ["bloom", "falcon", "mpt", "gptj", "gpt_neo", "xlnet", "codegen", "xglm"]),
    "encoders": ("masked", ["deberta", "deberta-v2", "mpnet", "rembert", "mobilebert", "squeezebert", "funnel"]),
    "seq2seq": ("seq2seq", ["t5", "t5gemma2", "fsmt", "longt5"]),
    "images": ("image", ["vit", "dinov2", "swin"]),
    "contrasted": ("contrastive", ["clip", "siglip2"]),
    "audio": ("audio", ["wav2vec2", "wavlm", "sew-d"]),
    "speech": ("speech", ["whisper"]),
    "vision and language": ("vision-language", ["qwen2_vl", "gemma3", "llama4", "mllama"]),
}


@pytest.mark.parametrize("group", GROUPS)
def test_architectures_equal_the_oracle(group, tmp_path):
    kind, types = GROUPS[group]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "sweep", "--workers", "1", "--kind", kind, "--json", "out.json", *types]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    results = {result["type"]: result for result in json.loads((tmp_path / "out.json").read_text())}
    assert {name: results[name].get("reason") for name in types if not results[name]["green"]} == {}
    assert set(results) == set(types)
    for result in results.values():
        assert {"outputs", "gradients", "influence"} <= set(result["checks"])
        assert kind != "causal" or "causality" in result["checks"] or result["causality"]


def test_what_was_green_and_is_not_is_reported():
    kind, known = next(iter(report.known_green().items()))
    name, senses = next(iter(known.items()))
    fine = {"type": name, "kind": kind, "green": True, "senses": senses}
    fewer = {**fine, "senses": {**senses, "text": senses["text"] - 1}}
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


def test_nine_in_ten_text_architectures_are_green():
    green = report.known_green()
    total = sum(len(feeds.architectures(kind)) for kind in feeds.TEXT)
    assert sum(len(green[kind]) for kind in feeds.TEXT) >= 0.9 * total
