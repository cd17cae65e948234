"""Prefixes follow PEFT's adapters by name when PEFT loads, switches, saves and deletes them."""

import json

import pytest
import torch

import apt_kernels
from helpers import models
from helpers.patched import randomise

peft = pytest.importorskip("peft", reason="the package peft is not installed")


def lora(seed):
    torch.manual_seed(seed)
    return peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


def logits(model):
    with torch.no_grad():
        return model(**models.inputs("llama")).logits


def pair(seed, length, folder, name="default"):
    """A LoRA with its prefix, saved by PEFT; what they compute."""
    model = peft.get_peft_model(models.build("llama"), lora(seed), adapter_name=name)
    apt_kernels.patch(model, prefix_length=length)
    randomise(model, seed)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture
def two(tmp_path):
    """Two pairs in one model, and what each computes."""
    expected = {name: pair(seed, seed + 2, tmp_path / name) for seed, name in ((1, "a"), (2, "b"))}
    model = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    return model, expected


def test_each_lora_runs_with_its_own_prefix(two):
    model, expected = two
    assert list(apt_kernels.adapters(model)) == ["a", "b"]
    assert torch.equal(logits(model), expected["a"])
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        assert next(iter(apt_kernels.adapters(model))) == name
        assert torch.equal(logits(model), expected[name])


def test_all_are_saved_where_peft_saves_them_and_load_again(two, tmp_path):
    model, expected = two
    model.save_pretrained(tmp_path / "both")
    assert torch.equal(logits(model), expected["a"])
    for name in ("a", "b"):
        again = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path / "both" / name, adapter_name=name)
        assert torch.equal(logits(again), expected[name])
        assert list(apt_kernels.adapters(again)) == [name]
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert sorted(path.parent.name for path in (tmp_path / "one").rglob("apt_config.json")) == ["b"]


def test_deleting_deletes_both(two):
    model, expected = two
    model.delete_adapter("a")
    assert list(apt_kernels.adapters(model)) == ["b"]
    assert torch.equal(logits(model), expected["b"])
    base = model.get_base_model()
    model.delete_adapter("b")
    with pytest.raises(apt_kernels.PatchError, match="not patched"):
        apt_kernels.prefixes(base)
    assert not any(".apt." in name for name, _ in model.named_parameters())


def test_an_inactive_adapter_is_deleted(two):
    model, expected = two
    model.delete_adapter("b")
    assert list(apt_kernels.adapters(model)) == ["a"]
    assert torch.equal(logits(model), expected["a"])


def test_a_pair_that_is_loaded_again_is_replaced(two, tmp_path):
    model, expected = two
    model.set_adapter("b")
    other = pair(3, 3, tmp_path / "other")
    model.load_adapter(tmp_path / "other", adapter_name="a")
    assert torch.equal(logits(model), expected["b"])
    model.set_adapter("a")
    assert torch.equal(logits(model), other)


@pytest.mark.parametrize("name", ["default", "x"])
def test_a_prefix_that_patch_made_belongs_to_pefts_active_adapter(name, tmp_path):
    """`patch` calls it "default", whatever PEFT's is called; training goes on in the same parameters."""
    expected = pair(1, 3, tmp_path, name)
    folder = tmp_path if name == "default" else tmp_path / name
    assert json.loads((folder / "apt_config.json").read_text())
    model = peft.get_peft_model(models.build("llama"), lora(5), adapter_name=name)
    apt_kernels.patch(model, prefix_length=3)
    before = [id(p) for p in model.parameters()]
    model.load_adapter(folder, name, is_trainable=True)
    assert list(apt_kernels.adapters(model)) == ["default"]
    assert [id(p) for p in model.parameters()] == before
    assert torch.equal(logits(model), expected)


def test_the_prefix_of_patch_stays_with_its_lora_when_another_is_activated(two, tmp_path):
    """Its name was "default", and it went to the folder of whichever LoRA was active."""
    model = peft.get_peft_model(models.build("llama"), lora(5), adapter_name="x")
    apt_kernels.patch(model, prefix_length=3)
    randomise(model, 4)
    expected = logits(model)
    model.add_adapter("y", lora(6))
    with pytest.warns(UserWarning, match="no prefix of the name 'y': that of 'x' stays active"):
        model.set_adapter("y")
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "x" / "adapter.safetensors").exists()
    assert not (tmp_path / "both" / "y" / "adapter.safetensors").exists()
    again = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path / "both" / "x", adapter_name="x")
    assert torch.equal(logits(again), expected)
    model.set_adapter("x")
    assert torch.equal(logits(model), expected)


def test_a_lora_without_a_prefix_says_which_stays_active(two, tmp_path):
    model, _ = two
    model.add_adapter("c", lora(4))
    with pytest.warns(UserWarning, match="no prefix of the name 'c': that of 'a' stays active"):
        model.set_adapter("c")
    model.set_adapter("b")
    assert next(iter(apt_kernels.adapters(model))) == "b"


def test_a_prefix_that_peft_has_no_adapter_for_is_named_when_peft_saves(two, tmp_path):
    model, _ = two
    apt_kernels.set_adapter(apt_kernels.add_adapter(model, "alone"), "a")
    with pytest.warns(UserWarning, match=r"'alone': its prefix is not saved. apt_kernels.save\(.*adapter='alone'\)"):
        model.save_pretrained(tmp_path / "all")


def test_a_refused_switch_leaves_both_as_they_were(two):
    model, expected = two
    with apt_kernels.disabled(model):
        with pytest.raises(apt_kernels.PatchError, match="disabled"):
            model.set_adapter("b")
        assert model.active_adapter == "a"
    assert torch.equal(logits(model), expected["a"])
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("unknown")
    assert torch.equal(logits(model), expected["a"])
