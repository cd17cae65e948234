"""The comparisons on a tiny model: every form of data, whole experiments, resuming, and the tables."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

import apt_kernels
from bench.quality import cli, examine, methods, models, run_cache, running, sources, summary, tables, tasks
from bench.quality.methods import METHODS, Settings
from bench.quality.sources import DataError

ANIMALS, PLANTS = "cat dog horse bird".split(), "oak fern moss tulip".split()
FILLER = "the a some green old over under beside because so : , .".split()


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


def _tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *ANIMALS, *PLANTS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    return len(words)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_tokenizer(folder),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaModel(LlamaConfig(vocab_size=_tokenizer(folder), **shape, pad_token_id=0)).save_pretrained(folder)
    return str(folder)


def _text(draw, label):
    words = [draw.choice((ANIMALS, PLANTS)[label]), *draw.choices(FILLER[:8], k=draw.randint(2, 5))]
    return " ".join(draw.sample(words, len(words)))


def _row(form, draw, i):
    label, text = i % 2, _text(draw, i % 2)
    if form == "text":
        return {"text": text, "label": ["animal", "plant"][label]}
    if form == "pair":
        return {"premise": text, "hypothesis": _text(draw, label), "label": label}
    if form == "choice":
        right, wrong = _text(draw, 0), _text(draw, 1)
        choices = {"choice1": right, "choice2": wrong} if label == 0 else {"choice1": wrong, "choice2": right}
        return {"premise": _text(draw, 0), **choices, "question": draw.choice(["cause", "effect"]), "label": label}
    if form == "spans":
        target = {"span1_text": text.split()[0], "span2_text": "the", "span1_index": 0, "span2_index": 1}
        return {"text": text, "target": target, "label": bool(label)}
    return {"word": "old", "sentence1": text, "sentence2": _text(draw, label), "label": bool(label)}


FORMS = ("text", "pair", "choice", "spans", "words")


def _columns(draw, count):
    lines = ["-DOCSTART- -X- O", ""]
    for i in range(count):
        for word in _text(draw, i % 2).split():
            lines.append(f"{word}\t{'B-animal' if word in ANIMALS else 'B-plant' if word in PLANTS else 'O'}")
        lines.append("")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """One folder for each format; none has the name of a known task."""
    top, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for form in FORMS:
        (top / form).mkdir()
        for part, count in (("train", 24), ("val", 12)):
            rows = [json.dumps(_row(form, draw, i)) for i in range(count)]
            (top / form / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    (top / "tags").mkdir()
    for name, count in (("some.train.conll", 24), ("some.testa", 12), ("some.testb", 10)):
        (top / "tags" / name).write_text(_columns(draw, count))
    return top


def _settings(model_folder, **changes):
    small = {"batch_size": 8, "epochs": 2, "max_length": 32, "prefix_length": 3}
    return Settings(**{"model": model_folder, **small, **changes})


def _task(data_folder, form):
    return tasks.build(form, sources.load(str(data_folder / form)))


def _silent(epoch, score):
    pass


@pytest.mark.parametrize("form", [*FORMS, "tags"])
def test_every_form_of_data_is_recognised_and_trained(form, model_folder, data_folder):
    task = _task(data_folder, form)
    assert task.kind == {"choice": "choice", "tags": "tags"}.get(form, "classification")
    record = running.run(task, "apt", _settings(model_folder), 0, None, _silent).record
    assert len(record["curve"]) == 2
    assert record["dev"] == max(record["curve"]) == record["curve"][record["best_epoch"] - 1]
    assert 0 <= record["last"] <= record["dev"] <= 1
    assert (record["test"] is None) == (form != "tags")
    assert record["examples"] == {"train": 24, "dev": 12, "test": 10 if form == "tags" else 0}


@pytest.mark.parametrize("form", ["text", "choice", "tags"])
def test_decoders_run_as_well(form, decoder_folder, data_folder):
    record = running.run(_task(data_folder, form), "apt", _settings(decoder_folder), 0, None, _silent).record
    assert record["parameters"]["prefix"] > 0


def test_inputs_are_written_as_p_tuning_v2_does():
    copa = {"premise": "p", "choice1": "a", "choice2": "b", "question": "effect", "label": 0}
    assert tasks.format_of(copa).texts(copa) == [("p so", "a"), ("p so", "b")]
    wic = {"word": "w", "sentence1": "s", "sentence2": "t", "label": True}
    assert tasks.format_of(wic).texts(wic) == [("w: s", "w: t")]
    wsc = {"text": "t", "target": {"span1_text": "one", "span2_text": "two"}, "label": True}
    flat = {"text": "t", "span1_text": "one", "span2_text": "two", "label": True}
    assert tasks.format_of(wsc).texts(wsc) == tasks.format_of(flat).texts(flat) == [("two: t", "one")]
    odd = {"headline": "h", "body": "b", "label": 0}
    assert tasks.format_of(odd, ("headline", "body")).texts(odd) == [("h", "b")]
    with pytest.raises(DataError, match="the rows have the columns headline, body, label"):
        tasks.format_of(odd)
    with pytest.raises(DataError, match="they need the columns text, label"):
        tasks.format_of(odd, ("text",))


def test_cut_off_words_count_as_missed(model_folder, data_folder):
    task = _task(data_folder, "tags")
    rows = [{"tokens": ["the", "cat", "old", "oak"], "tags": ["O", "B-animal", "O", "B-plant"]}]
    tokenizer = models.load_tokenizer(model_folder, task)
    for length, expected in ((32, 1.0), (5, 2 / 3)):  # [CLS] the cat old [SEP]: one of two spans is found
        features = tasks.encode(task, rows, tokenizer, length)
        targets = torch.tensor([features[0]["labels"]]).numpy()
        logits = torch.nn.functional.one_hot(torch.tensor(targets).clamp(min=0), len(task.labels)).numpy()
        assert tasks.score(task, logits, targets, rows, features) == pytest.approx(expected)


def test_subsets_are_fixed_by_the_seed_and_take_labels_in_turn(data_folder):
    task = _task(data_folder, "pair")
    rows = task.splits.train
    few = tasks.subset(task, rows, 6, 1)
    assert few == tasks.subset(task, rows, 6, 1)
    assert few != tasks.subset(task, rows, 6, 2)
    assert sorted(row["label"] for row in few) == [0, 0, 0, 1, 1, 1]
    assert tasks.subset(task, rows, None, 1) is rows


def test_rows_of_a_hub_data_set_lose_their_class_numbers():
    class Column:
        def __init__(self, *names):
            self.int2str = names.__getitem__

    class Split(list):
        def __init__(self, rows, features):
            super().__init__(rows)
            self.features, self.column_names = features, list(features)

    tagged = {"tokens": None, "ner_tags": SimpleNamespace(feature=Column("O", "B-x"))}
    rows = sources.from_dataset(Split([{"tokens": ["a", "b"], "ner_tags": [0, 1]}], tagged))
    assert rows == [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}]
    named = {"premise": None, "label": Column("choice1", "choice2")}
    assert sources.from_dataset(Split([{"premise": "p", "label": 1}], named)) == [{"premise": "p", "label": "choice2"}]
    assert sources.from_dataset(Split([{"premise": "p", "label": -1}], named)) == []
    choice = {"premise": "p", "choice1": "a", "choice2": "b", "label": "choice2"}
    assert tasks.right_choice(choice) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.jsonl": '{"text": "a", "label": 1}'}, r"has \['train'\]; it needs"),
        ({"train.jsonl": "{", "dev.jsonl": ""}, "train.jsonl, line 1, is not JSON"),
        ({"train.jsonl": "[]", "dev.jsonl": ""}, "is a list; it needs a JSON object"),
        ({"a.train": "word tag", "a.dev": ""}, "'word tag'; it needs a token and a BIO tag"),
        ({"a.train": "x O", "b.train": "x O"}, "two files for train: a.train and b.train"),
        ({"train.jsonl": '{"text": "a", "label": 1}', "dev.jsonl": '{"text": "a", "label": 2}'}, "two or more"),
        ({"train.jsonl": '{"text": "a", "label": 1}', "dev.jsonl": '{"text": "a"}'}, "dev, row 1, has no 'label'"),
    ],
)
def test_data_that_cannot_be_read(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        tasks.build("some", sources.load(str(tmp_path)))


def test_hidden_test_labels_leave_no_test_split(data_folder, tmp_path):
    for part in ("train", "val"):
        (tmp_path / f"{part}.jsonl").write_text((data_folder / "pair" / f"{part}.jsonl").read_text())
    (tmp_path / "test.jsonl").write_text('{"premise": "a", "hypothesis": "b"}')
    assert sources.load(str(tmp_path)).test == []


def test_a_hold_out_makes_the_development_set_a_test(model_folder, data_folder):
    record = running.run(
        _task(data_folder, "pair"), "head", _settings(model_folder, hold_out=8), 0, None, _silent
    ).record
    assert record["examples"] == {"train": 16, "dev": 8, "test": 12}
    assert record["test"] is not None


@pytest.mark.parametrize("method", METHODS)
def test_what_each_method_trains(method, model_folder, data_folder):
    task, settings = _task(data_folder, "text"), _settings(model_folder)
    fresh = models.fresh_model(task, settings, models.load_tokenizer(model_folder, task), 0)
    model = methods.prepare(fresh, method, settings, 0)
    found, whole = methods.counts(model), sum(p.numel() for p in model.parameters())
    head, token = 2 * 16 + 2, 2 * 16  # the classifier; key and value of one token in one layer
    expected = {
        "apt": 2 * (3 * token + 3 * 16 + 1),
        "apt-no-gate": 2 * (3 * token + 1),
        "apt-no-scale": 2 * (3 * token + 3 * 16),
        "apt-no-hidden": 2 * (3 * token + 3 + 1),
        "prefix": 2 * 3 * token,
        "prefix-same-budget": 2 * 4 * token,
    }.get(method, 0)
    assert found == {"trained": whole if method == "full" else expected + head, "prefix": expected}
    assert ("gate_weight" in str([n for n, p in model.named_parameters() if p.requires_grad])) == (
        method in ("apt", "apt-no-scale")
    )


def test_an_interrupted_training_goes_on_where_it_was(model_folder, data_folder, tmp_path):
    job = run_cache.Job(_task(data_folder, "text"), "apt", 0, _settings(model_folder, epochs=3))
    whole = running.run(job.task, "apt", job.settings, 0, None, _silent).record["curve"]

    class Stopped(Exception):
        pass

    def stop(epoch, score):
        if epoch == 2:
            raise Stopped

    shop = run_cache.RunCache(tmp_path)
    with pytest.raises(Stopped):
        running.run(job.task, "apt", job.settings, 0, _claimed(shop, job), stop)
    seen = []
    bar = SimpleNamespace(update=seen.append, set_description=lambda *a, **k: None)
    assert shop.train(job, bar).record["curve"] == whole
    assert not (tmp_path / "checkpoint").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["runs.jsonl"]


def _claimed(shop, job):
    folder = shop.output / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "job.txt").write_text(repr(job.key))
    return folder


def test_checkpoints_hold_no_base_weight(model_folder, data_folder, tmp_path):
    from safetensors.torch import load_file

    def stop(epoch, score):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(_task(data_folder, "text"), "apt", _settings(model_folder), 0, tmp_path, stop)
    saved = load_file(next(tmp_path.glob("checkpoint-*/trained.safetensors")))
    assert all(".apt." in name or name.startswith("classifier.") for name in saved)


def _run(data_folder, model_folder, output, *more):
    small = "--epochs 1 --batch-size 8 --prefix-length 3 --max-length 32 --train-examples 16 --no-resume".split()
    given = ["--data", str(data_folder), "--model", model_folder, "--output", str(output), *small, *more]
    return cli.main(given)


def test_the_main_comparison_from_the_command_line(model_folder, data_folder, tmp_path, capsys, monkeypatch):
    assert _run(data_folder, model_folder, tmp_path, "main", "--task", "pair", "tags", "--seeds", "1") == 0
    page = (tmp_path / "main.md").read_text()
    assert page.strip() in capsys.readouterr().out
    for name in METHODS:
        assert f"| {tables.NAMES[name]} | " in page
    assert "commonest label | 50.0" in page
    assert "pair: development accuracy (12 rows) of the best of 1 epochs" in page
    assert "tags: test span F1 (10 rows) of the epoch that is the best of 1" in page
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len(METHODS)
    assert model_folder not in (tmp_path / "runs.jsonl").read_text().replace(records[0]["settings"]["model"], "")
    monkeypatch.setattr(running, "run", lambda *a: pytest.fail("a completed training was repeated"))
    assert _run(data_folder, model_folder, tmp_path, "ablation", "--task", "pair", "tags", "--seeds", "1") == 0
    assert "full fine-tuning" not in (tmp_path / "ablation.md").read_text()


def test_a_gate_on_the_command_line_is_that_of_the_methods_with_auto(model_folder, data_folder, tmp_path):
    given = ("--task", "pair", "--seeds", "1", "--method", "apt", "prefix", "apt-no-hidden", "prefix-same-budget")
    assert _run(data_folder, model_folder, tmp_path, *given, "--patch", "gate=token", "init=vocabulary") == 0
    task, settings = _task(data_folder, "text"), _settings(model_folder, patch={"gate": "token", "init": "vocabulary"})
    gates = {}
    for method in ("apt", "apt-no-scale", "apt-no-hidden", "prefix"):
        model = models.fresh_model(task, settings, models.load_tokenizer(model_folder, task), 0)
        prefixes = apt_kernels.prefixes(methods.prepare(model, method, settings, 0))
        gates[method] = {prefix.gate for prefix in prefixes.values()}
    assert gates == {"apt": {"token"}, "apt-no-scale": {"token"}, "apt-no-hidden": {"static"}, "prefix": {"none"}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("gate", "--patch has 'gate'; it needs NAME=VALUE"),
        ("gaet=token", "--patch has 'gaet=token'; it needs one of gate, "),
        ("prefix_length=3", "--patch has 'prefix_length=3'; use --prefix-length"),
        ("layer_scale=False", "use --method apt apt-no-scale"),
        ("gate=token", "--patch has a gate; none of the methods prefix, full takes one"),
    ],
)
def test_patch_settings_that_are_refused(entry, message, model_folder, data_folder, tmp_path):
    given = ("--task", "pair", "--method", "prefix", "full", "--patch", entry)
    with pytest.raises(SystemExit, match=re.escape(message)):
        _run(data_folder, model_folder, tmp_path, *given)


def test_the_other_experiments_from_the_command_line(model_folder, data_folder, tmp_path):
    one = ("--seeds", "1", "--gate-learning-rate", "0.3")
    for experiment in ("weights", "lengths", "prune", "parity", "low-resource"):
        assert _run(data_folder, model_folder, tmp_path, experiment, "--task", "choice", *one) == 0
    weights = (tmp_path / "weights.md").read_text()
    assert "centre of weight" in weights
    for name in ("weights-choice", "weights-profile", "parity-choice-apt", "parity-choice-prefix"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "6 tokens; by the weights [" in (tmp_path / "lengths.md").read_text()
    prune = (tmp_path / "prune.md").read_text()
    assert all(f"| {row} | " in prune for row in ("whole", "pruned", "closed"))
    assert "the losses differ by" in (tmp_path / "parity.md").read_text()
    assert "## 32 training examples" in (tmp_path / "low-resource.md").read_text()


@pytest.mark.parametrize("form", ["pair", "tags"])
@pytest.mark.parametrize("method", ["apt", "apt-no-hidden", "prefix"])
def test_the_naive_way_has_the_same_learning_curve(method, form, model_folder, data_folder):
    # All rows in every batch, so that the loss falls visibly.
    settings = _settings(model_folder, epochs=12, batch_size=24, learning_rate=3e-2, attention_dropout=0.0)
    curves = examine.compare_attention(_task(data_folder, form), method, settings, 0)
    assert len(curves["ours"]) == 12
    assert curves["ours"][-1] < 0.95 * curves["ours"][0], "nothing was learned, the comparison proves little"
    # Float32 rounding along twelve steps of AdamW.
    assert curves["ours"] == pytest.approx(curves["naive"], abs=1e-3)


def test_curves_that_part_are_an_error(model_folder, data_folder, monkeypatch):
    from bench.common import naive

    right = naive.attention
    monkeypatch.setattr(naive, "attention", lambda *args, **options: right(*args, **options) * 1.3)
    task = _task(data_folder, "pair")
    curves = examine.compare_attention(task, "apt", _settings(model_folder, attention_dropout=0.0), 0)
    with pytest.raises(SystemExit, match="the curves differ by"):
        examine.check_apart(max(abs(a - b) for a, b in zip(*curves.values())), task, "apt")


def test_tables_say_mean_spread_and_noise(data_folder):
    assert tables.mean_and_spread([0.5, 0.7]) == "60.0 ± 14.1"
    assert tables.mean_and_spread([0.5]) == "50.0"
    assert tables.difference([0.6, 0.7, 0.8], [0.5, 0.6, 0.7]).startswith("**+10.0")
    assert tables.difference([0.6, 0.5], [0.5, 0.6]) == "+0.0 ± 127.1"  # Student's t, one degree of freedom
    task = _task(data_folder, "pair")
    assert tables.majority(task) == 0.5
    record = {"dev": 0.5, "test": None, "curve": [0.5], "examples": {"train": 4, "dev": 12, "test": 0}}
    assert tables.value(record) == 0.5
    assert tables.value({**record, "test": 0.25}) == 0.25


def test_a_summary_holds_what_the_tables_say():
    def record(method, seed, test):
        parts = {"dev": 0.5, "test": test, "last": 0.4, "seconds": 2.0 + seed, "parameters": {"trained": 3}}
        same = {"task": "t", "settings": {"epochs": 1}, "examples": {"train": 4}, "machine": "m"}
        return {**same, "method": method, "seed": seed, **parts}

    scores = {"apt": (0.5, 0.6, 0.7), "prefix": (0.61, 0.7, 0.79)}
    records = [record(name, seed, score) for name, found in scores.items() for seed, score in enumerate(found)]
    (entry,) = summary.summarise(records)
    assert entry["settings"] == {"epochs": 1}
    assert entry["methods"]["apt"]["test"] == pytest.approx(
        {"median": 0.6, "q1": 0.55, "q3": 0.65, "mean": 0.6, "standard_deviation": 0.1}
    )
    over = entry["methods"]["prefix"]["over_apt"]
    assert f"**{100 * over['mean']:+.1f} ± {100 * over['half_interval']:.1f}**" == tables.difference(
        scores["prefix"], scores["apt"]
    )
    assert "over_apt" not in entry["methods"]["apt"]


def test_recipes_hold_the_published_settings():
    assert methods.recipe("bert-large", "rte") == {
        "batch_size": 32,
        "learning_rate": 1e-2,
        "prefix_length": 20,
        "epochs": 60,
    }
    assert methods.recipe("bert-large", "conll04")["dropout"] == 0.2
    assert methods.recipe("roberta-large", "conll03")["max_length"] == 152
    assert methods.recipe("bert-base", "conll03")["schedule"] == "exponential"
    assert methods.recipe("bert-base", "cb") == {}
    for table in methods.RECIPES.values():
        for chosen in table.values():
            assert replace(Settings("m"), **chosen)


def test_a_method_that_patches_leaves_no_trace_of_the_budget(model_folder, data_folder):
    task, settings = _task(data_folder, "text"), _settings(model_folder)
    model = models.fresh_model(task, settings, models.load_tokenizer(model_folder, task), 0)
    assert methods.same_budget(model, settings) == (4, 4)
    assert methods.same_budget(model, replace(settings, prefix_length=(0, 6))) == (0, 9)
    with pytest.raises(apt_kernels.PatchError):
        apt_kernels.prefixes(model)
