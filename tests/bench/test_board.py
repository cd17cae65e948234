"""The board on a tiny decoder: every method and task, resuming, and what the page says of what was not run."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.common import machine
from bench.quality.board import cli, report, tasks, training
from bench.quality.board.methods import METHODS, obstacle
from bench.quality.sources import DataError

STEPS = ["--steps", "2", "--prefix-length", "4", "--small", "--seeds", "2"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of two layers whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("decoder")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=257, **shape, num_key_value_heads=1, eos_token_id=0, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("data")
    rows = {
        "copa": {"premise": "It rained.", "choice1": "It is wet.", "choice2": "It is dry.", "question": "effect"},
        "rte": {"premise": "A cat sleeps.", "hypothesis": "A cat is awake."},
    }
    for name, row in rows.items():
        (top / name).mkdir()
        for part, count in (("train", 40), ("val", 6)):
            lines = [json.dumps({**row, "label": i % 2}) for i in range(count)]
            (top / name / f"{part}.jsonl").write_text("\n".join(lines))
    (top / "wnut17").mkdir()
    sentence = "Anna\tB-person\nlives\tO\nin\tO\nNew\tB-location\nYork\tI-location\n\n"
    for part, count in (("train", 40), ("dev", 4), ("test", 4)):
        (top / "wnut17" / f"{part}.conll").write_text(sentence * count)
    return top


def _run(model_folder, output, *more):
    assert cli.main(["--model", model_folder, "--output", str(output), *STEPS, *more]) == 0
    return (output / "board.md").read_text()


def _records(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_every_method_trains_and_the_rest_is_not_run(model_folder, tmp_path, monkeypatch):
    page = _run(model_folder, tmp_path, "--task", "documents")
    found = _records(tmp_path)
    assert {r["method"] for r in found} == set(METHODS)
    assert sum(r["choosing"] for r in found) == 2, "the small board compares two settings of one method"
    parameters = {r["method"]: r["parameters"] for r in found}
    assert parameters["none"] == 0
    assert abs(parameters["prefix-same-budget"] / parameters["apt"] - 1) < 0.1
    assert parameters["apt-fixed-scale"] == parameters["apt"] - 2, "one scale for each of two layers"
    for name in ("rte", "copa", "wsc", "wnut17", "questions"):
        assert f"- {name}: not run." in page
    assert page.count("not run") == 6, "the five tasks, and the costs"
    assert (tmp_path / "board.png").stat().st_size > 10_000

    # A second command trains nothing.
    monkeypatch.setattr(training, "run", None)
    assert _run(model_folder, tmp_path, "--task", "documents") == page
    assert _run(model_folder, tmp_path, "--report", "--task", "documents") == page


def test_an_interrupted_board_continues_and_says_what_is_missing(model_folder, tmp_path, monkeypatch):
    run, given = training.run, []

    def interrupted(*arguments):
        if len(given) == 3:
            raise KeyboardInterrupt
        given.append(arguments)
        return run(*arguments)

    chosen = ("--task", "documents", "--method", "none", "apt", "lora")
    monkeypatch.setattr(training, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run(model_folder, tmp_path, *chosen)
    page = (tmp_path / "board.md").read_text()
    assert "(1 of 2 seeds)" in page
    assert "| full fine-tuning | - | not run |" in page
    before = _records(tmp_path)
    monkeypatch.setattr(training, "run", run)
    page = _run(model_folder, tmp_path, *chosen)
    assert _records(tmp_path)[: len(before)] == before
    assert len(_records(tmp_path)) == 5
    assert "of 2 seeds" not in page


def test_the_same_seed_gives_the_same_training(model_folder, tmp_path):
    chosen = ("--task", "documents", "--method", "apt", "peft-prefix", "lora")
    for name in ("a", "b"):
        _run(model_folder, tmp_path / name, *chosen)
    one, two = ([(r["loss"], r["seed"]) for r in _records(tmp_path / name)] for name in ("a", "b"))
    assert one == two
    assert len({loss for loss, _ in one}) == len(one)


@pytest.mark.parametrize("name", ["copa", "rte", "wnut17", "questions"])
def test_every_kind_of_task(name, model_folder, data_folder, tmp_path):
    page = _run(model_folder, tmp_path, "--task", name, "--data", str(data_folder), "--method", "none", "apt")
    records = [r for r in _records(tmp_path) if r["method"] == "apt"]
    assert len(records) == 2
    assert all(0 <= r["score"] <= 1 and 0 < r["loss"] < 20 for r in records)
    assert "points" in page


def test_costs(model_folder, tmp_path):
    page = _run(model_folder, tmp_path, "--costs", "--method", "apt", "lora")
    rows = json.loads((tmp_path / "costs.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["apt", "lora"]
    assert all(r["seconds"] > 0 and r["bytes"] > 0 for r in rows)
    assert "peak memory, MiB" in page


def test_wrong_names_are_refused(model_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        _run(model_folder, tmp_path, "--method", "aptt")
    assert "invalid choice: 'aptt'" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"the task 'boolqq' needs --data; without it there are documents, questions"):
        _run(model_folder, tmp_path, "--task", "boolqq")
    with pytest.raises(DataError, match="--seeds and --steps need at least 1"):
        _run(model_folder, tmp_path, "--steps", "0")


def test_full_fine_tuning_needs_memory():
    model = torch.nn.Linear(1000, 1000)
    assert obstacle("full", model, 10**6) == "it needs 0.0 GiB, 0.0 GiB are free"
    assert obstacle("full", model, 10**9) is None
    assert obstacle("apt", model, 0) is None


# ---- Tasks and tables


def test_entities_of_tags():
    tags = ["B-person", "O", "B-location", "I-location", "B-location"]
    spans = tasks.entities(["Anna", "in", "New", "York", "Rome"], tags)
    assert spans == [("person", "Anna"), ("location", "New York"), ("location", "Rome")]
    item = tasks.Item([], [[]], 0, spans)
    assert tasks.entities_f1(["person: Anna; location: New York; location: Rome"], [item]) == 1
    assert tasks.entities_f1(["person: Anna; person: Anna"], [item]) == pytest.approx(2 / 5)
    assert tasks.entities_f1(["none"], [item]) == 0


def test_answers_are_whole_words():
    items = [tasks.Item([], [[]], 0, "1931"), tasks.Item([], [[]], 0, "eleven")]
    assert tasks.answers_found(["It was founded in 1931.", "Eleven people."], items) == 1
    assert tasks.answers_found(["19310", "seven"], items) == 0


def _found(scores):
    size = {"steps": 2, "batch_size": 2, "max_length": 8}
    return {
        (method, "copa"): [
            {
                "method": method,
                "seed": seed,
                "score": score,
                "loss": 1.0,
                "parameters": 10,
                "rows": {"train": 8, "evaluated": 100},
                "settings": {"size": size},
            }
            for seed, score in enumerate(every)
        ]
        for method, every in scores.items()
    }


def test_differences_are_paired_and_named_in_words():
    found = _found({"apt": [0.5, 0.6, 0.7], "prefix": [0.4, 0.501, 0.6], "lora": [0.6, 0.5, 0.8], "full": [0.5]})
    described = [{"name": "copa", "kind": "choice", "metric": "accuracy"}]
    shown = report.columns(described)
    table = report.against(found, shown, "apt")
    assert "| plain prefix, same length | **-10.0 ± 0.1, worse** |" in table
    assert "| LoRA r 16 | +3.3 ± 28.7, within noise |" in table
    assert "| full fine-tuning | +0.0 (one seed) |" in table
    assert "| PEFT prefix tuning | not run |" in table
    text = report.notes(found, described, shown)
    # 2.8 standard deviations of the difference, 11.5 points, over 2 points; 100 rows of accuracy 0.6: 4.9 points.
    assert "standard error of 4.9 points" in text or "standard error of 5.0 points" in text
    assert "a difference of 2 points between two methods needs about" in text


def test_a_lower_loss_is_better():
    found = _found({"apt": [0.5, 0.5], "prefix": [0.5, 0.5]})
    for seed, record in enumerate(found["apt", "copa"]):
        record["loss"] = 1.2 + 1e-4 * seed
    (column,) = [c for c in report.columns([{"name": "copa", "kind": "choice", "metric": "accuracy"}]) if c.tokens]
    assert "-0.200 ± 0.001, better" in report.against(found, [column], "apt")


def test_the_documented_tables_are_the_committed_ones():
    root = machine.ROOT
    board = (root / "bench/results/quality/smollm2-135m-instruct/board.md").read_text(encoding="utf-8")
    page = (root / "docs/quality/decoder.md").read_text(encoding="utf-8")
    rows = [line for line in board.splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert [row for row in rows if row not in page] == []
    picture = (root / "bench/results/quality/smollm2-135m-instruct/board.png").read_bytes()
    assert picture == (root / "docs/quality/board-smollm2.png").read_bytes()


def test_a_gate_may_have_a_rate_of_its_own(model_folder, tmp_path, monkeypatch):
    seen, plain = [], torch.optim.AdamW

    def optimizer(groups, **given):
        made = plain(groups, **given)
        seen.append({group.get("name"): group["lr"] for group in made.param_groups})
        return made

    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    _run(model_folder, tmp_path, "--task", "documents", "--method", "apt-slow-gate", "prefix", "--seeds", "1")
    assert seen == [{"prefix": 1e-2, "gate": 1e-3, "scale": 1e-2}, {None: 1e-2}]
