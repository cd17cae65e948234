"""Saving and loading: trained weights only, whole or not at all, never unpickled."""

import json

import pytest
import torch
from safetensors.torch import load_file

import apt_kernels
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot


def trained(family="bert", head=None, **settings):
    model = apt_kernels.patch(models.build(family, head), **settings)
    randomise(model)
    return model


@pytest.mark.parametrize("gate", ["first", "token", "static", "none"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_loaded_model_gives_the_same_bits(family, gate, tmp_path):
    model, given = trained(family, gate=gate, prefix_length=3), models.inputs(family, "right")
    apt_kernels.save(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors", "apt_config.json"]
    fresh = models.build(family)
    assert apt_kernels.load(fresh, tmp_path) is fresh
    assert torch.equal(fresh(**given).logits, model(**given).logits)
    twice = apt_kernels.patch(models.build(family), gate=gate, prefix_length=3)
    assert torch.equal(apt_kernels.load(twice, tmp_path)(**given).logits, model(**given).logits)


def test_the_file_holds_the_trained_weights_and_no_other(tmp_path):
    model = trained("bert", "AutoModelForSequenceClassification", prefix_length=[0, 3])
    with torch.no_grad():
        model.classifier.weight.fill_(0.5)
    apt_kernels.save(model, tmp_path)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(load_file(tmp_path / "adapter.safetensors")) == names
    assert "classifier.weight" in names
    config = json.loads((tmp_path / "apt_config.json").read_text())
    assert config["prefix_length"] == [0, 3]
    assert config["lengths"] == {"bert.encoder.layer.1.attention.self": 3}
    fresh = apt_kernels.load(models.build("bert", "AutoModelForSequenceClassification"), tmp_path)
    assert torch.equal(fresh.classifier.weight, model.classifier.weight)


def test_the_implementation_of_this_machine_does_not_travel(tmp_path):
    apt_kernels.save(trained("bert", implementation="reference"), tmp_path)
    model = apt_kernels.load(models.build("bert"), tmp_path)
    assert {prefix.implementation for prefix in apt_kernels.prefixes(model).values()} == {"auto"}


def test_prefixes_frozen_by_the_user_are_saved_too(tmp_path):
    model = trained("bert")
    model.requires_grad_(False)
    apt_kernels.save(model, tmp_path)
    given = models.inputs("bert")
    assert torch.equal(apt_kernels.load(models.build("bert"), tmp_path)(**given).logits, model(**given).logits)


def test_saving_again_replaces_and_a_crash_leaves_the_old_files(tmp_path, monkeypatch):
    model = trained("bert")
    apt_kernels.save(model, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    randomise(model, seed=7)

    def crash(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("apt_kernels.hf.checkpoint.save_file", crash)
        with pytest.raises(OSError, match="disk full"):
            apt_kernels.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    apt_kernels.save(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() != old["adapter.safetensors"]


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "truncated weights": (lambda d: truncate(d / "adapter.safetensors"), "damaged"),
    "not safetensors": (lambda d: (d / "adapter.safetensors").write_bytes(b"\x80\x04pickle" * 9), "damaged"),
    "no weights": (lambda d: (d / "adapter.safetensors").unlink(), "no adapter.safetensors"),
    "no config": (lambda d: (d / "apt_config.json").unlink(), "no apt_config.json"),
    "broken config": (lambda d: truncate(d / "apt_config.json"), "not valid JSON"),
    "not an object": (lambda d: (d / "apt_config.json").write_text("[]"), "needs a JSON object"),
    "newer format": (lambda d: edit(d / "apt_config.json", lambda c: c.update(format=99)), "newer apt_kernels"),
    "no format": (lambda d: edit(d / "apt_config.json", lambda c: c.pop("format")), "format is None"),
    "unknown key": (lambda d: edit(d / "apt_config.json", lambda c: c.update(colour="red")), "unknown key 'colour'"),
    "bad value": (lambda d: edit(d / "apt_config.json", lambda c: c.update(gate="last")), "gate is 'last'"),
    "other length": (
        lambda d: edit(d / "apt_config.json", lambda c: c.update(prefix_length=7)),
        r"layer\.0\.attention\.self\.apt\.(key|gate_weight) is \[",
    ),
    "other count": (
        lambda d: edit(d / "apt_config.json", lambda c: c.update(prefix_length=[3, 3, 3])),
        "3 entries; the model has 2",
    ),
    "other gate": (
        lambda d: edit(d / "apt_config.json", lambda c: c.update(gate="none")),
        "gate_weight, which the model does not have",
    ),
    "missing weight": (
        lambda d: edit(d / "apt_config.json", lambda c: c.update(prefix_length=[3, 3], gate="static")),
        "which the model",
    ),
}


@pytest.mark.parametrize("patched", [False, True], ids=["bare", "patched"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_adapter_names_its_fault_and_changes_nothing(damage, patched, tmp_path):
    apt_kernels.save(trained("bert", prefix_length=3), tmp_path)
    harm, message = DAMAGE[damage]
    harm(tmp_path)
    model = models.build("bert")
    if patched:
        apt_kernels.patch(model, prefix_length=3)
    before = snapshot(model)
    error = (apt_kernels.AdapterError, apt_kernels.PatchError) if patched else apt_kernels.AdapterError
    with pytest.raises(error, match=f"({message}|other settings)" if patched else message):
        apt_kernels.load(model, tmp_path)
    assert_unchanged(model, before)


def test_a_model_of_another_shape_is_named(tmp_path):
    apt_kernels.save(trained("bert", prefix_length=3), tmp_path)
    model = models.build("bert", num_attention_heads=2)
    before = snapshot(model)
    with pytest.raises(apt_kernels.AdapterError, match=r"apt\.key is \[4, 3, 8\]; the model's is \[2, 3, 16\]"):
        apt_kernels.load(model, tmp_path)
    assert_unchanged(model, before)


def test_a_model_patched_with_other_settings_is_refused(tmp_path):
    apt_kernels.save(trained("bert", prefix_length=3), tmp_path)
    model = apt_kernels.patch(models.build("bert"), prefix_length=4)
    with pytest.raises(apt_kernels.PatchError, match="other settings"):
        apt_kernels.load(model, tmp_path)


def test_an_unpatched_model_cannot_be_saved(tmp_path):
    with pytest.raises(apt_kernels.PatchError, match="not patched"):
        apt_kernels.save(models.build("bert"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_keep_the_models_dtype(tmp_path):
    apt_kernels.save(trained("bert"), tmp_path)
    model = apt_kernels.patch(models.build("bert")).to(torch.bfloat16)
    apt_kernels.load(model, tmp_path)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
