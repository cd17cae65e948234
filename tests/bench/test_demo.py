"""The whole demo on a tiny random model, and its parts."""

from __future__ import annotations

import csv
import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import apt_kernels
from bench.common.naive import naive
from bench.demo import classification as demo
from bench.demo import data, docstrings, report
from bench.quality import sources
from bench.speed.timing import peak_bytes

WORDS = {"animal": "cat dog horse bird".split(), "plant": "oak fern moss tulip".split()}
FILLER = "the a some green old over under beside".split()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """Settings that `demo.main` changes are restored after each test."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *WORDS["animal"], *WORDS["plant"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _texts(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = list(WORDS)[i % 2]
        words = [draw.choice(WORDS[label]), *draw.choices(FILLER, k=draw.randint(2, 9))]
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": label})
    return rows


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in _texts(64, 0)))
    with (folder / "test.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ("text", "label"))
        table.writeheader()
        table.writerows(_texts(24, 1))
    return folder


def _arguments(model_folder, data_folder, output) -> list[str]:
    small = "--epochs 2 --batch-size 8 --prefix-length 4 --max-length 16 --learning-rate 0.01 --device cpu".split()
    return ["--model", str(model_folder), "--data", str(data_folder), "--output", str(output), *small]


def test_the_whole_path(model_folder, data_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/demo.md").write_text("before\n{}\nold\n{}\nafter\n".format(*report.markers("docstrings")))
    assert demo.main([*_arguments(model_folder, data_folder, "out"), "--update-docs"]) == 0
    printed = capsys.readouterr().out
    assert "predicts the same to the last bit" in printed
    output = tmp_path / "out"
    found = json.loads((output / "results.json").read_text())
    assert found["reloaded_equal"]
    assert found["failures"] == []
    assert set(found["trainings"]) == set(demo.METHODS)
    for runs in found["trainings"].values():
        assert set(runs) == {"ours", "naive"}
        for run in runs.values():
            assert len(run["losses"]) == 16
            assert run["peak_bytes"] > 0
            assert run["step_seconds"] > 0
    assert found["trainings"]["APT"]["ours"]["trained_parameters"] == 2 * (4 * 32 * 3 + 1) + 33 * 2
    assert torch.tensor(found["gates"]).shape == (2, 4)
    assert {path.name for path in (output / "adapter").iterdir()} == {"adapter.safetensors", "apt_config.json"}
    assert (output / "gates.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "docs/demo.md").read_text()
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert (output / "table.md").read_text().strip() in page
    assert (tmp_path / "docs/demo-docstrings.png").exists()
    for written in (page, json.dumps(found), printed):
        assert str(model_folder.parent) not in written


def test_a_difference_fails(model_folder, data_folder, tmp_path, monkeypatch, capsys):
    """A naive attention with other results, and an adapter that is loaded with changes, are detected."""
    from bench.common import naive as module

    right = module.attention
    monkeypatch.setattr(module, "attention", lambda *args, **options: right(*args, **options) * 1.1)
    load = apt_kernels.load

    def damaged(model, folder):
        load(model, folder)
        with torch.no_grad():
            model.classifier.weight.mul_(1.01)
        return model

    monkeypatch.setattr(apt_kernels, "load", damaged, raising=False)
    assert demo.main(_arguments(model_folder, data_folder, tmp_path)) == 1
    complaints = capsys.readouterr().err
    assert "without dropout the curves differ" in complaints
    assert "the reloaded adapter predicts differently" in complaints


def test_docstrings_are_the_same_every_time_and_never_shared():
    first, second = docstrings.load(160, 80), docstrings.load(160, 80)
    assert first == second
    assert {part: len(rows) for part, rows in first.items()} == {"train": 160, "test": 80}
    for rows in first.values():
        counts = {group: sum(label == group for _, label in rows) for group in docstrings.GROUPS}
        assert len(set(counts.values())) == 1
    starts = [docstrings._start(text) for rows in first.values() for text, _ in rows]
    assert len(set(starts)) == len(starts)
    assert not any("numpy" in text.lower().split() for text, _ in first["train"])


def test_docstrings_say_when_there_are_too_few(monkeypatch):
    monkeypatch.setattr(docstrings, "_texts", lambda group: {f"{group} {i}": f"text {i}" for i in range(9)})
    with pytest.raises(RuntimeError, match="'text' has 9 docstrings; it needs 10"):
        docstrings.load(36, 4)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it needs a train split"),
        (
            {"train.jsonl": '{"text": "a"}', "test.jsonl": '{"text": "a", "label": 1}'},
            "the rows have the columns text; they need",
        ),
        ({"train.csv": "text,label\na,x\nb,x", "test.csv": "text,label\na,x"}, "two or more"),
        ({"train.csv": "text,label\na,x\nb,y", "test.csv": "text,label\na,z"}, r"\['z'\]"),
    ],
)
def test_data_that_cannot_be_read(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(data.DataError, match=message):
        data.load(str(tmp_path), 10, 10)


def test_fewer_texts_than_a_batch(model_folder, data_folder, tmp_path):
    with pytest.raises(data.DataError, match="5 training texts are fewer than one batch of 8"):
        demo.main([*_arguments(model_folder, data_folder, tmp_path), "--train", "5"])


def test_hub_data_without_its_package(monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="install the package `datasets` first"):
        data.load("owner/name", 10, 10)


def test_naive_is_taken_back_on_an_error():
    from apt_kernels.hf.attention import function

    ours = function.attention
    with naive():
        assert function.attention is not ours
    assert function.attention is ours
    with pytest.raises(TypeError), naive():
        function.attention()
    assert function.attention is ours


def test_peak_counts_what_is_alive_at_once():
    def step():
        for _ in range(3):  # one megabyte each, none kept
            torch.zeros(1 << 18)
        (torch.zeros(1 << 19, requires_grad=True) * 2).sum().backward()

    peak = peak_bytes(torch.device("cpu"), step)
    assert 4 << 20 <= peak < 7 << 20


@pytest.mark.parametrize("gate", ["first", "token", "static", "none"])
def test_the_probe_gives_the_mean_weights_of_the_figure(gate, model_folder):
    model = BertForSequenceClassification.from_pretrained(model_folder).eval()
    apt_kernels.patch(model, prefix_length=3, gate=gate)
    prefixes = list(apt_kernels.prefixes(model).values())
    for prefix in prefixes:
        torch.nn.init.constant_(prefix.layer_scale, 1.5)
        if prefix.gate_weight is not None:
            torch.nn.init.normal_(prefix.gate_weight)
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states
    found = apt_kernels.probe(model, [{"input_ids": ids, "attention_mask": real}])
    for layer, prefix, hidden in zip(found.layers, prefixes, states):
        if gate in ("none", "static"):
            expected = torch.full((3,), 1.5 if gate == "none" else 0.75)
        else:
            alpha = torch.sigmoid(hidden @ prefix.gate_weight.T)
            expected = 1.5 * (alpha[:, 0] if gate == "first" else alpha[real.bool()]).mean(dim=0)
        torch.testing.assert_close(torch.tensor(layer.effective), expected.detach())
