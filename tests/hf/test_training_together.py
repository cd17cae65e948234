"""``set_adapter(model, ["a", "b"])``: adapters that train together, each on the rows that name it."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import transformers

import apt_kernels
from apt_kernels.errors import ConfigError, PatchError
from helpers import models
from helpers.patched import randomise

FAMILIES = models.some(models.FAMILIES)
BASE = "__base__"
NAMES = ["a", "b", "c", BASE, "b", "a"]


def several(family: str):
    """A float64 model with the adapters a, b and c, of different lengths, gates and layers."""
    patched = apt_kernels.patch(models.build(family).to(models.widest(family)), prefix_length=1)
    last = -1 if family == "t5" else 1
    settings = {
        "a": {"prefix_length": 5, "layers": [0, last] if family == "llama" else None, "num_frozen_tokens": 1},
        "b": {"prefix_length": 3, "gate": "static", "layers": [last]},
        "c": {"prefix_length": 4, "gate": "none"},
    }
    for seed, (name, given) in enumerate(settings.items()):
        apt_kernels.add_adapter(patched, name, **given)
        patched.to(models.widest(family))
        randomise(patched, seed)
    apt_kernels.delete_adapter(patched, "default")
    return patched


def batch(family: str, padding: str | None = "right", rows: int = len(NAMES)) -> dict:
    given = models.inputs(family, padding=padding, batch=rows)
    labels = given.get("decoder_input_ids", given["input_ids"].masked_fill(given["attention_mask"] == 0, -100))
    return {**given, "labels": labels}


def gradients(patched, name: str) -> dict:
    """The gradients of an adapter's prefixes, by module and parameter."""
    state = patched._apt_state
    prefixes = state.prefixes if name == state.adapter else state.parked[name].prefixes
    return {
        f"{site}.{n}": p.grad
        for site, prefix in prefixes.items()
        for n, p in prefix.named_parameters()
        if p.requires_grad
    }


def loss(patched, given: dict, **names):
    """The sum of the tokens' losses: that of a batch is the sum of its rows'."""
    logits = patched(**{k: v for k, v in given.items() if k != "labels"}, **names).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten(), reduction="sum")


@pytest.mark.proves("several adapters that train together, each on its rows")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_each_adapter_is_that_of_its_rows_alone(family, checkpointing):
    patched = several(family)
    given, wanted = batch(family), {}
    for name in "abc":
        single = apt_kernels.set_adapter(copy.deepcopy(patched), name).train()
        own = [i for i, each in enumerate(NAMES) if each == name]
        loss(single, {k: v[own] for k, v in given.items()}).backward()
        wanted[name] = gradients(single, name)
    apt_kernels.set_adapter(patched, ["b", "a", "c"]).train()
    if checkpointing:
        patched.gradient_checkpointing_enable()
    loss(patched, given, adapter_names=NAMES).backward()
    for name in "abc":
        found = gradients(patched, name)
        assert found.keys() == wanted[name].keys()
        for each, gradient in found.items():
            close = models.rounding(family)
            torch.testing.assert_close(gradient, wanted[name][each], **close, msg=f"{name}: {each}")


def test_the_parameters_of_both_are_parameters_of_the_model_and_of_the_optimizer():
    patched = several("llama")
    apt_kernels.set_adapter(patched, ["a", "b"])
    assert list(apt_kernels.adapters(patched)) == ["a", "b", "c"]
    names = [n for n, p in patched.named_parameters() if p.requires_grad]
    assert [n for n in names if "layers.1" in n and "key" in n] == [
        "model.layers.1.self_attn.apt.key",
        "model.layers.1.self_attn.apt_others.0.key",
    ]
    assert not any(n.startswith("model.layers.0.self_attn.apt_others") for n in names)
    groups = apt_kernels.parameter_groups(patched)
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["name"] for group in groups} == {"prefix", "gate", "scale"}
    shown = str(apt_kernels.summary(patched))
    assert shown.startswith("adapters 'a', 'b': ")
    assert re.search(r"model\.layers\.1\.self_attn \(b\) +causal self-attention +3", shown)
    apt_kernels.set_adapter(patched, "b")
    assert not any("apt_others" in n for n, _ in patched.named_modules())
    assert all("layers.1" in n for n, p in patched.named_parameters() if p.requires_grad)


def test_an_adapter_without_rows_does_not_move_nor_its_optimizer_state():
    patched = apt_kernels.set_adapter(several("llama"), ["a", "b"]).train()
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(patched, lr=0.1, weight_decay=0.1))
    given = batch("llama", rows=2)
    loss(patched, given, adapter_names=["a", "b"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    of_b = [p for prefix in patched._apt_state.parked["b"].prefixes.values() for p in prefix.parameters()]
    before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in of_b]
    start = patched._apt_state.prefixes["model.layers.0.self_attn"].key.detach().clone()
    loss(patched, given, adapter_names=["a", BASE]).backward()
    assert all(p.grad is None for p in of_b)
    optimizer.step()
    for parameter, (value, state) in zip(of_b, before):
        assert torch.equal(parameter, value)
        assert all(torch.equal(optimizer.state[parameter][n], x) for n, x in state.items())
    assert not torch.equal(patched._apt_state.prefixes["model.layers.0.self_attn"].key, start)


def test_training_together_is_training_apart():
    patched = several("llama")
    given, apart = batch("llama", padding=None, rows=4), {}
    names = ["a", "b", "b", "a"]
    for name in "ab":
        single = apt_kernels.set_adapter(copy.deepcopy(patched), name).train()
        optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(single))
        own = [i for i, each in enumerate(names) if each == name]
        for _ in range(5):
            loss(single, {k: v[own] for k, v in given.items()}).backward()
            optimizer.step()
            optimizer.zero_grad()
        apart[name] = apt_kernels.prefixes(single)
    apt_kernels.set_adapter(patched, ["a", "b"]).train()
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(patched))
    for _ in range(5):
        loss(patched, given, adapter_names=names).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name in "ab":
        for site, prefix in apt_kernels.prefixes(apt_kernels.set_adapter(patched, name)).items():
            for x, y in zip(prefix.parameters(), apart[name][site].parameters()):
                torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_a_call_without_names_raises():
    patched = apt_kernels.set_adapter(several("llama"), ["a", "b"])
    given = models.inputs("llama")
    names = ["b", "a", BASE]
    message = "'a', 'b' are active together.*adapter_names="
    for call in (
        lambda: patched(**given),
        lambda: patched.model(**given),
        lambda: patched.generate(**given, max_new_tokens=2),
    ):
        with pytest.raises(PatchError, match=message):
            call()
    with torch.no_grad():
        mixed = patched(**given, adapter_names=names).logits
        assert patched.generate(**given, adapter_names=names, max_new_tokens=2).shape[0] == 3
        with apt_kernels.disabled(patched):
            bare = patched(**given).logits
        assert torch.equal(patched(**given, adapter_names=[BASE] * 3).logits, bare)
        first = patched(**given, adapter_names=["a"] * 3).logits
        single = apt_kernels.set_adapter(patched, "a")
        for i, name in enumerate(names[:2]):
            row = {k: v[i : i + 1] for k, v in given.items()}
            alone = apt_kernels.set_adapter(single, name)(**row).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(first, apt_kernels.set_adapter(single, "a")(**given).logits, rtol=0, atol=1e-9)


def test_rows_of_an_adapter_that_is_not_active_are_constants():
    patched = apt_kernels.set_adapter(several("llama"), ["a", "b"]).train()
    loss(patched, batch("llama", rows=3), adapter_names=["a", "c", "b"]).backward()
    assert all(gradient is not None for name in "ab" for gradient in gradients(patched, name).values())
    assert all(gradient is None for gradient in gradients(patched, "c").values())


def test_save_names_the_adapter(tmp_path):
    patched = apt_kernels.set_adapter(several("llama"), ["a", "b"])
    with pytest.raises(PatchError, match=r"'a', 'b' are active together; name one"):
        apt_kernels.save(patched, tmp_path)
    with pytest.raises(ConfigError, match=r"adapter is \['a', 'b'\]; it needs one adapter's name"):
        apt_kernels.save(patched, tmp_path, adapter=["a", "b"])
    for name in "ab":
        apt_kernels.save(patched, tmp_path / name, adapter=name)
    given = models.inputs("llama", padding=None)
    for name in "ab":
        loaded = apt_kernels.patch(models.build("llama").double(), apt_kernels.adapters(patched)[name]).double()
        apt_kernels.load(loaded, tmp_path / name)
        settings = json.loads((tmp_path / name / "apt_config.json").read_text())
        assert settings["prefix_length"] == apt_kernels.adapters(patched)[name].to_json()["prefix_length"]
        assert not any("apt" in each for each in settings["base"]["fingerprint"])
        alone = apt_kernels.set_adapter(copy.deepcopy(patched), name)
        with torch.no_grad():
            assert torch.equal(loaded(**given).logits, alone(**given).logits)


@pytest.mark.parametrize("name", ["..", ".", "up/down", "adapter.safetensors", "config.json", "model.safetensors"])
def test_a_name_that_no_folder_can_have_is_refused_before_anything_is_written(name, tmp_path):
    patched = several("llama")
    apt_kernels.add_adapter(patched, name, prefix_length=2)
    apt_kernels.set_adapter(patched, ["a", name])
    with pytest.raises(PatchError, match=f"the adapter {name!r} would be saved in a subfolder of its name"):
        patched.save_pretrained(tmp_path / "inside")
    assert not list(tmp_path.rglob("*"))
    apt_kernels.save(patched, tmp_path, adapter=name)


@torch.no_grad()
def test_load_into_one_of_several_active_adapters(tmp_path):
    patched = several("llama")
    apt_kernels.save(patched, tmp_path, adapter="b")
    given = models.inputs("llama")
    expected = apt_kernels.set_adapter(patched, "b")(**given).logits
    for names in (["b", "c"], ["c", "b"]):
        apt_kernels.set_adapter(patched, names)
        for parameter in patched.parameters():
            parameter.add_(parameter.requires_grad)
        with pytest.warns(UserWarning, match="the adapter 'b' is replaced"):
            apt_kernels.load(patched, tmp_path, adapter="b")
        assert next(iter(apt_kernels.adapters(patched))) == "b"
        assert torch.equal(patched(**given).logits, expected)


def test_what_needs_one_adapter_is_refused(tmp_path):
    patched = apt_kernels.set_adapter(several("llama"), ["b", "c"])
    for call in (
        lambda: apt_kernels.prune(patched, [1, 1]),
        lambda: apt_kernels.probe(patched, [{**models.inputs("llama", batch=2), "adapter_names": ["b", "c"]}]),
        lambda: apt_kernels.fold(patched),
        lambda: apt_kernels.as_past_key_values(patched),
        lambda: apt_kernels.reference_model(patched),
        lambda: apt_kernels.export(patched, tmp_path, format="cartridge"),
    ):
        with pytest.raises(PatchError, match=r"'b', 'c' are active together; set the one .*set_adapter\(model, name\)"):
            call()
    with pytest.raises(ConfigError, match="name is 'c', an active adapter"):
        apt_kernels.delete_adapter(patched, "c")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name is "),
        (["a", "x"], "name is 'x'; the model has the adapters"),
        (["a", "a"], "each adapter may be there once"),
        (["a", 3], "it needs an adapter's name, or a list"),
        (3, "it needs an adapter's name, or a list"),
    ],
)
def test_wrong_names(names, message):
    patched = several("llama")
    with pytest.raises(ConfigError, match=message):
        apt_kernels.set_adapter(patched, names)
    assert list(apt_kernels.adapters(patched)) == ["c", "a", "b"]
    with pytest.raises(PatchError, match="disabled"), apt_kernels.disabled(patched):
        apt_kernels.set_adapter(patched, ["a", "b"])


def test_task_heads_are_refused():
    model = apt_kernels.patch(models.build("bert", "AutoModelForSequenceClassification"), prefix_length=2)
    apt_kernels.add_adapter(model, "b")
    with pytest.raises(PatchError, match=r"'default' trains classifier\.bias beside its prefixes"):
        apt_kernels.set_adapter(model, ["default", "b"])
    apt_kernels.add_adapter(model, "c", trainable=[])
    apt_kernels.add_adapter(model, "d", trainable=[])
    apt_kernels.set_adapter(model, ["c", "d"])


def test_a_replaced_module_with_the_prefix_of_a_further_adapter_is_refused():
    model = apt_kernels.patch(models.build("llama"), prefix_length=2, layers=[0])
    apt_kernels.add_adapter(model, "b", prefix_length=2, layers=[1])
    apt_kernels.set_adapter(model, ["default", "b"])
    model.model.layers[1].self_attn = copy.deepcopy(models.build("llama").model.layers[1].self_attn)
    with pytest.raises(PatchError, match=r"layers\.1\.self_attn has no prefix any more"):
        model(**models.inputs("llama", batch=2), adapter_names=["default", "b"])


def test_unpatch_leaves_nothing():
    before = models.build("llama").double()
    patched = apt_kernels.unpatch(apt_kernels.set_adapter(several("llama"), ["a", "b"]))
    assert [n for n, _ in patched.named_modules()] == [n for n, _ in before.named_modules()]
    given = models.inputs("llama")
    with torch.no_grad():
        assert torch.equal(patched(**given).logits, before(**given).logits)


def collate(rows):
    bare = [{key: value for key, value in row.items() if key != "adapter_names"} for row in rows]
    return {**transformers.default_data_collator(bare), "adapter_names": [row["adapter_names"] for row in rows]}


def data(names):
    """Rows with a column that names the adapter."""
    given = models.inputs("llama", padding=None, batch=len(names))
    rows = [{key: part[i] for key, part in given.items()} for i in range(len(names))]
    return [{**row, "labels": row["input_ids"], "adapter_names": name} for row, name in zip(rows, names)]


def test_trainer_with_a_column_of_names_saves_and_resumes(tmp_path):
    names = ["a", "b", "b", "a", "a", "b", BASE, "a"]

    def trainer(model, steps):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=3, save_steps=2, report_to=[], seed=3,
            learning_rate=1e-2, remove_unused_columns=False, use_cpu=True, logging_steps=1,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=data(names), data_collator=collate)

    whole = trainer(apt_kernels.set_adapter(several("llama"), ["a", "b"]), 4)
    whole.train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "adapter.safetensors").exists()
    assert (folder / "b" / "adapter.safetensors").exists()
    resumed = trainer(several("llama"), 4)
    assert list(apt_kernels.adapters(resumed.model)) == ["c", "a", "b"]
    resumed.train(resume_from_checkpoint=str(folder))
    for name in "ab":
        first, second = (apt_kernels.prefixes(apt_kernels.set_adapter(t.model, name)) for t in (whole, resumed))
        for site, prefix in first.items():
            for x, y in zip(prefix.parameters(), second[site].parameters()):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
