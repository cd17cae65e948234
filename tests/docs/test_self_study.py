"""``examples/self_study.py``: it learns, continues after an interrupt, and says what the prefix costs."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import apt_kernels
from helpers import chats, pretrained
from helpers.documentation import script

TEXT = "the cat is red . the dog is green . the bird lives in the old tree . the fish lives in the blue sea ."


@pytest.fixture
def self_study():
    return script("examples/self_study.py")


SMALL = (
    "--prefix-length 6 --conversations 12 --held-out 4 --steps 30 --batch-size 6 --new-tokens 4 --chunk-size 5 "
    "--save-every 3 --learning-rate 0.05"
).split()


def tiny():
    tokenizer = chats.tokenizer(TEXT + " ?")
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, eos_token_id=2, **size))
    return model.eval(), tokenizer


def run(self_study, folder, *more):
    (folder / "text.txt").write_text(TEXT)
    options = self_study.arguments([*SMALL, "--text", str(folder / "text.txt"), "--output", str(folder / "out"), *more])
    return self_study.run(*tiny(), options)


def test_self_study_learns_from_the_model_that_reads_the_text(self_study, tmp_path, capsys):
    result = run(self_study, tmp_path, "--ask", "the cat is")
    start, end = result["prefix at the start"]["divergence"], result["prefix trained"]["divergence"]
    assert end < 0.8 * start, (start, end)
    assert end < 0.8 * result["no prefix"]["divergence"]
    assert len(result["losses"]) == 30
    conversations = [json.loads(line) for line in (tmp_path / "out/conversations.jsonl").read_text().splitlines()]
    assert len(conversations) == 16
    printed = capsys.readouterr().out
    for shown in ("MiB with its gates", "MiB of key/value cache", "training step", "the cat is\n  no prefix"):
        assert shown in printed
    model, tokenizer = tiny()
    options = self_study.arguments(["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")])
    chat = self_study.Chat(tokenizer, TEXT)
    apt_kernels.load(model, tmp_path / "out/adapter")
    apt_kernels.load(model, options.output / "text", adapter="text")
    apt_kernels.set_adapter(model, "default")
    assert self_study.evaluate(model, chat, conversations[12:], "default") == result["prefix trained"]
    assert self_study.evaluate(model, chat, conversations[12:], "text")["divergence"] < 1e-6


@pytest.mark.parametrize("at", ["conversations", "training"])
def test_an_interrupted_self_study_continues_to_the_same_result(self_study, tmp_path, monkeypatch, at):
    (tmp_path / "whole").mkdir()
    (tmp_path / "again").mkdir()
    expected = run(self_study, tmp_path / "whole")
    name = {"conversations": "generate", "training": "divergence"}[at]
    original, calls = getattr(self_study, name), []

    def interrupted(*given, **options):
        calls.append(1)
        if len(calls) == {"conversations": 4, "training": 19}[at]:
            raise KeyboardInterrupt
        return original(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(self_study, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(self_study, tmp_path / "again")
    found = run(self_study, tmp_path / "again")
    for part in ("losses", "no prefix", "prefix at the start", "prefix trained"):
        assert found[part] == expected[part], part


def test_a_folder_of_a_run_with_other_settings_is_refused(self_study, tmp_path):
    run(self_study, tmp_path, "--steps", "1")
    with pytest.raises(SystemExit, match="has a run with other settings; name another folder"):
        run(self_study, tmp_path, "--steps", "2")


@pytest.mark.slow
def test_self_study_on_smollm2(self_study, tmp_path):
    few = "--prefix-length 48 --conversations 8 --held-out 4 --steps 12 --batch-size 4 --new-tokens 16".split()
    options = self_study.arguments([*few, "--output", str(tmp_path / "out"), "--ask", "Who founded the observatory?"])
    result = self_study.run(*pretrained.smollm2(), options)
    start, end = result["prefix at the start"]["divergence"], result["prefix trained"]["divergence"]
    assert end < start < result["no prefix"]["divergence"], result
    # 0.50 of the first ones; the batches of both are not the same conversations.
    assert sum(result["losses"][-4:]) < 0.7 * sum(result["losses"][:4]), result
