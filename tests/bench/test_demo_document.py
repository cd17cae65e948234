"""The decoder's demo on a tiny random model: all steps, a user's own files, and the checks that make it fail."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import apt_kernels
from bench.demo import cli, document, step_costs
from bench.quality.sources import DataError

TEXT = "the cat is red. the dog is green. the bird lives in the old tree."
WORDS = sorted(
    set(TEXT.replace(".", " .").split()) | set("which what colour has lives where ? system user assistant".split())
)
# Like SmolLM2's template, with words as markers.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} <e> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
QUESTIONS = [("which colour has the cat ?", "red"), ("which colour has the dog ?", "green")]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Restore the environment variables that the demo sets, after each test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.fixture(params=["template", "no template"])
def files(request, tmp_path):
    """Write a tiny model, a text and questions; return arguments that name the model, the text and the output."""
    words = ["<pad>", "<unk>", "<e>", *WORDS, "Question", "Answer", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<e>")
    if request.param == "template":
        made.chat_template = TEMPLATE
    made.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    rows = (json.dumps({"question": question, "answer": answer}) for question, answer in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    named = {"model": "model", "text": "text.txt", "output": "out"}
    return [part for name, value in named.items() for part in (f"--{name}", str(tmp_path / value))]


SMALL = "--steps 30 --learning-rate 0.05 --batch-size 2 --new-tokens 3 --compare-tokens 24 --compare-prefix 4".split()
ASKED = [part for question, _ in QUESTIONS for part in ("--ask", question)]


def test_the_whole_path(files, tmp_path, capsys):
    questions = ["--questions", str(tmp_path / "questions.jsonl"), *ASKED]
    assert cli.main(["--task", "document", *files, *SMALL, *questions, "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert result["failures"] == []
    assert result["losses"][-1] < result["losses"][0] / 4
    assert [answer.split()[0] for answer in result["answers"]["prefix trained"]] == ["red", "green"]
    assert result["answers"]["without the text"] != result["answers"]["prefix trained"]
    measured = {(row["method"], row["peer"]): row for row in result["costs"]}
    assert set(measured) == {(method, peer) for method, peers in step_costs._METHODS.items() for peer in peers}
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in measured.values() if row["obstacle"] is None)
    assert {path.name for path in (tmp_path / "out/adapter").iterdir()} == {"adapter.safetensors", "apt_config.json"}
    assert (tmp_path / "out/gates.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert (tmp_path / "out/table.md").read_text().strip() in printed
    assert str(tmp_path / "model") not in (tmp_path / "out/table.md").read_text() + json.dumps(result)


def test_a_text_alone_trains_on_its_sentences(files, tmp_path):
    assert document.main([*files, *SMALL, "--compare-tokens", "0", "--gate", "none", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert result["costs"] == []
    assert result["right"] is None
    assert result["losses"][-1] < result["losses"][0]


def test_another_result_of_a_contender_is_noticed(files, tmp_path, monkeypatch, capsys):
    from bench.common import naive as module

    right = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **options: right(*args, **options) * 1.05)
    assert document.main([*files, *SMALL, "--steps", "1", "--device", "cpu"]) == 1
    assert "concatenation: logits differ by" in capsys.readouterr().err


def test_an_adapter_that_comes_back_changed_is_noticed(files, monkeypatch, capsys):
    load = apt_kernels.load

    def damaged(model, folder):
        load(model, folder)
        with torch.no_grad():
            for prefix in apt_kernels.prefixes(model).values():
                prefix.value.neg_()
        return model

    monkeypatch.setattr(apt_kernels, "load", damaged, raising=False)
    options = ["--compare-tokens", "0", "--steps", "8", "--device", "cpu"]
    assert document.main([*files, *SMALL, *options]) == 1
    assert "the reloaded adapter answers otherwise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text", None, "cannot be read"),
        ("text", " \n", "is empty; it needs a text"),
        ("questions", "no json", "has a line that is not JSON"),
        ("questions", '{"question": "why ?"}', 'needs "question" and "answer"'),
        ("questions", "[1]", 'needs "question" and "answer"'),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    options = ["--text", str(tmp_path / "text"), *(["--questions", str(path)] if name == "questions" else [])]
    with pytest.raises(DataError, match=message):
        document.read(document.arguments(options))


def test_the_built_in_document_holds_the_answers():
    found = document.read(document.arguments([]))
    assert len(found.asked) == 8
    assert all(each.expected.lower() in found.text.lower() for each in found.asked)
    trained = {each.question for each in found.train}
    assert len(trained) == 32
    assert not trained & {each.question for each in found.asked}


def test_the_task_chooses_the_demo(capsys):
    for task, option in (("document", "--ask"), ("docstrings", "--epochs")):
        with pytest.raises(SystemExit):
            cli.main(["--task", task, "--help"])
        assert option in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--task", "poems"])
