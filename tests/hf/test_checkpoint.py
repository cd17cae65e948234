"""Saving and loading: trained weights only, whole or not at all, never unpickled."""

import json
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import apt_kernels
from apt_kernels.hf import base_record
from apt_kernels.hf.adapter_file import open_adapter, write_adapter
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot
from helpers.processor_time import at_most


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

    def crash(file, tensors, metadata):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("apt_kernels.hf.adapter_file._serialise", crash)
        with pytest.raises(apt_kernels.AdapterError, match="cannot be written: disk full"):
            apt_kernels.save(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    apt_kernels.save(model, tmp_path)
    assert (tmp_path / "adapter.safetensors").read_bytes() != old["adapter.safetensors"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit(path, change):
    """Change the copy of the settings."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def forge(**changes):
    """Change the settings in the weights' file, with a checksum that fits, and the copy."""

    def harm(folder):
        with open_adapter(folder) as file:
            settings, tensors = file.settings, file.tensors()
        write_adapter(folder, tensors, {name: v for name, v in {**settings, **changes}.items() if v is not ...})

    return harm


def as_release_0_1(folder):
    """Write the files as release 0.1 did: no metadata, settings in apt_config.json alone."""
    save_file(load_file(folder / "adapter.safetensors"), folder / "adapter.safetensors", metadata={"format": "pt"})
    new = ("save_id", "adapter", "trained", "base")
    edit(folder / "apt_config.json", lambda data: (data.update(format=1), [data.pop(name) for name in new]))


DAMAGE = {
    "truncated weights": (lambda d: truncate(d / "adapter.safetensors"), "damaged"),
    "not safetensors": (lambda d: (d / "adapter.safetensors").write_bytes(b"\x80\x04pickle" * 9), "damaged"),
    "no weights": (lambda d: (d / "adapter.safetensors").unlink(), r"no adapter\.safetensors"),
    "an old adapter without its config": (
        lambda d: (as_release_0_1(d), (d / "apt_config.json").unlink()),
        r"no apt_config\.json",
    ),
    "broken config": (lambda d: truncate(d / "apt_config.json"), "not valid JSON"),
    "not an object": (lambda d: (d / "apt_config.json").write_text("[]"), "needs a JSON object"),
    "newer copy": (lambda d: edit(d / "apt_config.json", lambda c: c.update(format=99)), "newer apt_kernels"),
    "bad value in the copy": (lambda d: edit(d / "apt_config.json", lambda c: c.update(gate="last")), "gate is 'last'"),
    "other copy": (lambda d: edit(d / "apt_config.json", lambda c: c.update(gate="none")), "differs from the settings"),
    "newer format": (forge(format=99), "newer apt_kernels"),
    "no format": (forge(format=...), "format is None"),
    "unknown key": (forge(colour="red"), "unknown key 'colour'"),
    "bad value": (forge(gate="last"), "gate is 'last'"),
    "a list for a gate": (forge(gate=[]), r"gate is \[\]"),
    "a number for patterns": (forge(trainable=5), "trainable is 5"),
    "numbers for patterns": (forge(trainable=[5]), "trainable has 5"),
    "an object for layers": (forge(layers={}), "layers is {}"),
    "lists for lengths": (forge(prefix_length=[[3], [3]]), "prefix_length is"),
    "a wide MLP": (forge(reparameterisation=10**9), "reparameterisation is set"),
    "a pattern on which re takes for ever": (forge(layers=[r"((\w+\.?)+)+!"]), "layers has"),
    "such a pattern for what trains": (forge(trainable=[r"((\w+\.?)+)+!"]), "trainable has"),
    "a pattern that is huge": (forge(trainable=["a" * 10**5]), "pattern of 100000 characters"),
    "other length": (forge(prefix_length=7), r"layer\.0\.attention\.self 7 tokens; its weights there have 3"),
    "a length out of proportion": (forge(prefix_length=10**7), "10000000 tokens; its weights there have 3"),
    "other count": (forge(prefix_length=[3, 3, 3]), "3 entries; the model has 2"),
    "other gate": (forge(gate="none"), "gate_weight', which the model does not have"),
    "missing weight": (forge(prefix_length=[3, 3], gate="static"), "which the model"),
    "a base of another kind": (forge(base=3), "its base is an int"),
    "a base that is malformed": (forge(base={"sizes": []}), "of another type"),
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
    with at_most(5), pytest.raises(error, match=f"({message}|other settings)" if patched else message):
        apt_kernels.load(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("copy", ["kept", "missing", "earlier"])
def test_files_of_release_0_1_and_a_copy_of_an_earlier_save_load(copy, tmp_path):
    model, given = trained("bert", prefix_length=3), models.inputs("bert")
    if copy == "kept":
        apt_kernels.save(model, tmp_path)
        as_release_0_1(tmp_path)
    else:
        apt_kernels.save(trained("bert", prefix_length=2), tmp_path)
        old = (tmp_path / "apt_config.json").read_bytes()
        apt_kernels.save(model, tmp_path)
        (tmp_path / "apt_config.json").unlink() if copy == "missing" else (tmp_path / "apt_config.json").write_bytes(
            old
        )
    loaded = apt_kernels.load(models.build("bert"), tmp_path)
    assert torch.equal(loaded(**given).logits, model(**given).logits)


def test_a_config_of_a_saved_adapter_is_read_back(tmp_path):
    config = apt_kernels.AptConfig(prefix_length=3, layers="self", gate="static")
    apt_kernels.save(apt_kernels.patch(models.build("bert"), config), tmp_path)
    assert apt_kernels.AptConfig.from_json(json.loads((tmp_path / "apt_config.json").read_text())) == config


HEAD = "AutoModelForSequenceClassification"


def test_what_the_patch_made_trainable_is_saved_whatever_trains_now(tmp_path):
    model = trained("bert", HEAD, prefix_length=3)
    with torch.no_grad():
        model.classifier.weight.fill_(0.5)
    model.requires_grad_(False)
    apt_kernels.save(model, tmp_path)
    loaded = apt_kernels.load(models.build("bert", HEAD), tmp_path)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_what_the_user_made_trainable_is_saved_and_unpatch_gives_the_base_back(tmp_path):
    model, given = trained("llama", prefix_length=3), models.inputs("llama")
    model.lm_head.weight.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    apt_kernels.save(model, tmp_path)
    fresh = models.build("llama")
    before = snapshot(fresh)
    apt_kernels.load(fresh, tmp_path)
    assert torch.equal(fresh(**given).logits, model(**given).logits)
    assert_unchanged(apt_kernels.unpatch(fresh), before)


def test_a_weight_that_the_settings_do_not_name_is_refused(tmp_path):
    model = trained("llama", prefix_length=3)
    model.lm_head.weight.requires_grad_(True)
    apt_kernels.save(model, tmp_path)
    forge(trainable=None)(tmp_path)
    fresh = models.build("llama")
    before = snapshot(fresh)
    with pytest.raises(apt_kernels.AdapterError, match=r"holds 'lm_head\.weight', which the adapter's settings do not"):
        apt_kernels.load(fresh, tmp_path)
    assert_unchanged(fresh, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_not_finite_are_refused_unless_asked_for(value, tmp_path):
    model = trained("bert", prefix_length=3)
    prefix = next(iter(apt_kernels.prefixes(model).values()))
    with torch.no_grad():
        prefix.key[0, 0, 0] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if value != 1e30 else "error")
        apt_kernels.save(model, tmp_path)
    fresh = apt_kernels.patch(models.build("bert"), prefix_length=3)
    if value == 1e30:  # finite in the file, infinite in the model's dtype
        fresh.half()
    before = snapshot(fresh)
    with pytest.raises(apt_kernels.AdapterError, match=r"apt\.key has values that are not finite"):
        apt_kernels.load(fresh, tmp_path)
    assert_unchanged(fresh, before)
    apt_kernels.load(fresh, tmp_path, allow_non_finite=True)
    assert not torch.isfinite(next(iter(apt_kernels.prefixes(fresh).values())).key).all()


def test_saving_what_is_not_finite_warns(tmp_path):
    model = trained("bert", prefix_length=3)
    with torch.no_grad():
        next(iter(apt_kernels.prefixes(model).values())).layer_scale.fill_(float("nan"))
    with pytest.warns(UserWarning, match="layer_scale has values that are not finite"):
        apt_kernels.save(model, tmp_path)


def test_adapters_are_saved_and_loaded_by_name(tmp_path):
    model, given = trained("bert", HEAD, prefix_length=3), models.inputs("bert")
    first = model(**given).logits
    apt_kernels.add_adapter(model, "b", prefix_length=2, gate="static")
    randomise(model, seed=5)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    second = model(**given).logits
    apt_kernels.save(model, tmp_path / "a", adapter="default")
    apt_kernels.save(model, tmp_path / "b")
    assert list(apt_kernels.adapters(model)) == ["b", "default"]
    apt_kernels.set_adapter(model, "default")
    apt_kernels.save(model, tmp_path / "b2", adapter="b")
    assert (
        load_file(tmp_path / "b" / "adapter.safetensors").keys()
        == load_file(tmp_path / "b2" / "adapter.safetensors").keys()
    )
    fresh = models.build("bert", HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.load(fresh, tmp_path / "a")
        assert torch.equal(fresh(**given).logits, first)
        apt_kernels.load(fresh, tmp_path / "b2", adapter="b")
    assert list(apt_kernels.adapters(fresh)) == ["b", "default"]
    assert torch.equal(fresh(**given).logits, second)
    apt_kernels.set_adapter(fresh, "default")
    assert torch.equal(fresh(**given).logits, first)
    with pytest.raises(apt_kernels.ConfigError, match="adapter is 'c'; the model has the adapters"):
        apt_kernels.save(model, tmp_path, adapter="c")
    with pytest.raises(apt_kernels.PatchError, match="adapter 'default' has other settings"):
        apt_kernels.load(fresh, tmp_path / "b")
    alone = apt_kernels.load(models.build("bert", HEAD), tmp_path / "b", adapter="b")
    assert list(apt_kernels.adapters(alone)) == ["b"]
    assert {prefix.adapter for prefix in apt_kernels.prefixes(alone).values()} == {"b"}


def test_an_adapter_that_is_replaced_warns_and_a_new_one_is_filled(tmp_path):
    model = trained("bert", prefix_length=3)
    apt_kernels.save(model, tmp_path)
    with pytest.warns(UserWarning, match="the adapter 'default' is replaced"):
        apt_kernels.load(model, tmp_path)
    fresh = apt_kernels.patch(models.build("bert"), prefix_length=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.load(fresh, tmp_path)
    with pytest.warns(UserWarning, match="the adapter 'default' is replaced"):
        apt_kernels.load(fresh, tmp_path)


def test_an_adapter_of_another_base_is_refused_or_warned_about(tmp_path):
    apt_kernels.save(trained("llama", prefix_length=3), tmp_path)
    base = json.loads((tmp_path / "apt_config.json").read_text())["base"]
    assert base["model_type"] == "llama"
    assert base["sizes"]["hidden_size"] == 32
    assert base["fingerprint"]
    other = models.build("mistral")
    before = snapshot(other)
    with pytest.raises(apt_kernels.AdapterError, match="of the type 'llama'; this one is 'mistral'"):
        apt_kernels.load(other, tmp_path)
    assert_unchanged(other, before)
    with pytest.raises(apt_kernels.AdapterError, match="intermediate_size 48; this one has 64"):
        apt_kernels.load(models.build("llama", intermediate_size=64), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (models.build("llama"), models.build("llama").bfloat16(), models.build("llama").half()):
            apt_kernels.load(same, tmp_path)
        torch.manual_seed(0)
        apt_kernels.load(type("Mine", (LlamaForCausalLM,), {})(models.config("llama")), tmp_path)
    changed = models.build("llama")
    with torch.no_grad():
        changed.model.embed_tokens.weight.add_(0.1)
    with pytest.warns(UserWarning, match=r"trained on other weights.*embed_tokens.*1 more|embed_tokens"):
        apt_kernels.load(changed, tmp_path)
    with torch.device("meta"):
        nowhere = models.build("llama")
    apt_kernels.save(apt_kernels.load(models.build("llama"), tmp_path), tmp_path)
    assert (
        base_record.of(SimpleNamespace(model=nowhere, prefixes={}, training_prefixes=[], start={}))["fingerprint"]
        is None
    )


def test_a_record_is_the_same_in_a_narrower_dtype_and_behind_peft():
    def record(model):
        return base_record.of(SimpleNamespace(model=model, prefixes={}, training_prefixes=[], start={}))["fingerprint"]

    wide, narrow = record(models.build("llama")), record(models.build("llama").bfloat16())
    assert narrow == {name: {"bfloat16": hashes["bfloat16"]} for name, hashes in wide.items()}
    assert len(wide) == 11


def test_a_model_of_another_shape_is_named(tmp_path):
    apt_kernels.save(trained("bert", prefix_length=3), tmp_path)
    model = models.build("bert", num_attention_heads=2)
    before = snapshot(model)
    with pytest.raises(apt_kernels.AdapterError, match="num_attention_heads 4; this one has 2"):
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


def test_a_save_beside_threads_that_switch_adapters_holds_one_of_them(tmp_path):
    model = trained("bert", prefix_length=3, init_seed=0)
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    randomise(model, seed=5)
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            for name in ("default", "b"):
                apt_kernels.set_adapter(model, name)

    wanted = {}
    for name in ("default", "b"):
        apt_kernels.save(model, tmp_path / name, adapter=name)
        wanted[name] = load_file(tmp_path / name / "adapter.safetensors")
    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(20):
            apt_kernels.save(model, tmp_path / "c")
            name = json.loads((tmp_path / "c" / "apt_config.json").read_text())["adapter"]
            found = load_file(tmp_path / "c" / "adapter.safetensors")
            assert found.keys() == wanted[name].keys()
            assert all(torch.equal(found[each], wanted[name][each]) for each in found)
    finally:
        stop.set()
        thread.join()


OTHERS = [3, 1.5, b"x", ["a"], {"a": 1}, object(), torch.ones(2)]


@pytest.mark.parametrize("value", OTHERS, ids=lambda v: type(v).__name__)
def test_arguments_of_another_type_are_named(value, tmp_path):
    """None of them may end in an error that Python or torch raises."""
    model = trained("bert", prefix_length=3, gate="static")
    apt_kernels.save(model, tmp_path)
    before = snapshot(model)
    calls = {
        "folder is": [lambda: apt_kernels.load(model, value), lambda: apt_kernels.save(model, value)],
        "adapter is": [lambda: apt_kernels.load(model, tmp_path, adapter=value)],
        "state_dict": [lambda: apt_kernels.save(model, tmp_path, state_dict=value)],
        "name is": [lambda: apt_kernels.set_adapter(model, value), lambda: apt_kernels.delete_adapter(model, value)],
        "lengths ": [lambda: apt_kernels.prune(model, value)],
        "batch": [lambda: apt_kernels.probe(model, value)],
        "config is a": [lambda: apt_kernels.patch(models.build("bert"), value)],
        "the model is a": [lambda: apt_kernels.load(value, tmp_path), lambda: apt_kernels.patch(value)],
        "is not patched": [lambda: apt_kernels.save(value, tmp_path), lambda: apt_kernels.unpatch(value)],
    }
    ours = (apt_kernels.ConfigError, apt_kernels.AdapterError, apt_kernels.PatchError, apt_kernels.ArgumentError)
    for message, each in calls.items():
        for call in each:
            with pytest.raises(ours, match=message):
                call()
    with pytest.raises(apt_kernels.ConfigError, match="adapter is"):
        apt_kernels.save(model, tmp_path, adapter=value)
    with pytest.raises(apt_kernels.ImplementationError, match="implementation is"):
        apt_kernels.attention(*torch.randn(3, 1, 2, 5, 16), *torch.randn(2, 2, 3, 16), implementation=value)
    assert_unchanged(model, before)


NO_FLAGS = ["no", 1, 0, None, torch.tensor(True)]


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
def test_what_is_no_flag_is_refused_and_not_taken_for_true(value, tmp_path):
    model = trained("bert", prefix_length=3, gate="static")
    apt_kernels.save(model, tmp_path / "adapter")
    probe = apt_kernels.probe(model, [models.inputs("bert")])
    operands = (*torch.randn(3, 1, 2, 5, 16), *torch.randn(2, 2, 3, 16))
    calls = {
        "return_logsumexp": lambda: apt_kernels.attention(*operands, return_logsumexp=value),
        "allow_non_finite": lambda: apt_kernels.load(model, tmp_path / "adapter", allow_non_finite=value),
        "grow": lambda: probe.lengths(budget=2, grow=value),
        "layer_scale": lambda: apt_kernels.patch(models.build("bert"), layer_scale=value),
        "private": lambda: apt_kernels.save(model, tmp_path / "other", repo_id="a/b", private=value),
    }
    if value is None:
        del calls["private"]
    for name, call in calls.items():
        with pytest.raises((apt_kernels.ArgumentError, apt_kernels.ConfigError), match=f"{name} is .*True or False"):
            call()
    with pytest.raises(apt_kernels.ArgumentError, match="return_logsumexp is"):
        apt_kernels.selected(*operands, return_logsumexp=value)
    if value not in (0, 1) or isinstance(value, torch.Tensor):
        with pytest.raises(apt_kernels.ArgumentError, match=r"mask\.causal is .*True or False"):
            apt_kernels.attention(*operands, mask=apt_kernels.Mask(causal=value))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "value", ["1e-2", True, -1.0, float("nan"), [1e-2], torch.tensor(-1.0), torch.tensor(float("inf"))], ids=repr
)
def test_rates_that_are_no_numbers_are_named(value):
    model = trained("bert", prefix_length=3)
    for name in ("lr", "gate_lr", "scale_lr", "head_lr", "weight_decay"):
        with pytest.raises(apt_kernels.ArgumentError, match=f"^{name} is .*; it needs a finite number of at least 0"):
            apt_kernels.parameter_groups(model, **{name: value})


def test_a_rate_at_which_prefixes_hardly_change_is_named(recwarn):
    model = trained("bert", prefix_length=3)
    with pytest.warns(UserWarning, match="lr is 5e-05, at which prefixes hardly change; they need about 0.01"):
        apt_kernels.parameter_groups(model, lr=5e-5)
    recwarn.clear()
    for rate in (None, 0.0, 1e-4):
        apt_kernels.parameter_groups(model, lr=rate, head_lr=1e-5)
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": [0.9]}, "metrics is a list"),
        ({"metrics": {"accuracy": "high"}}, "metrics has 'accuracy': 'high'"),
        ({"commit_message": 3}, "commit_message is 3"),
    ],
)
def test_what_the_hub_could_not_take_is_refused_before_anything_is_written(given, message, tmp_path):
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.save(trained("bert"), tmp_path / "adapter", repo_id="owner/name", **given)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_a_language_model_gives_a_classifier_its_prefixes(tmp_path):
    """Another head is new: it keeps its values, is named, and trains."""
    language = apt_kernels.patch(models.build("llama"), prefix_length=3)
    randomise(language)
    apt_kernels.save(language, tmp_path)
    model = models.build("llama", "AutoModelForSequenceClassification")
    model.model.load_state_dict(models.build("llama").model.state_dict())
    head = model.score.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"trained on a model without score\.weight"):
        apt_kernels.load(model, tmp_path)
    assert torch.equal(model.score.weight, head)
    assert model.score.weight.requires_grad
    for prefix, expected in zip(apt_kernels.prefixes(model).values(), apt_kernels.prefixes(language).values()):
        assert torch.equal(prefix.key, expected.key)
    # A head that the adapter was trained with has to be in the file, and has to be in the model.
    apt_kernels.save(model, tmp_path / "classifier")
    with pytest.raises(apt_kernels.AdapterError, match=r"'score\.weight', which the model does not have"):
        apt_kernels.load(models.build("llama"), tmp_path / "classifier")
    apt_kernels.save(apt_kernels.patch(models.build("llama"), prefix_length=3, trainable="lm_head"), tmp_path / "named")
    with pytest.raises(apt_kernels.AdapterError, match="does not fit"):
        apt_kernels.load(models.build("llama", "AutoModelForSequenceClassification"), tmp_path / "named")


def test_a_folder_that_does_not_exist_is_told_from_one_without_an_adapter(tmp_path):
    model = models.build("llama")
    with pytest.raises(apt_kernels.AdapterError, match=r"nowhere does not exist; it needs .* apt_kernels\.save"):
        apt_kernels.load(model, tmp_path / "nowhere")
    with pytest.raises(apt_kernels.AdapterError, match=r"has no apt_config\.json and no adapter\.safetensors"):
        apt_kernels.load(model, tmp_path)


def test_a_folder_of_trainer_checkpoints_is_refused_with_their_names(tmp_path):
    model = apt_kernels.patch(models.build("bert"))
    for step in (4, 12, 8):
        apt_kernels.save(model, tmp_path / f"checkpoint-{step}")
    message = r"not an adapter folder\. It contains some: checkpoint-4, checkpoint-8, checkpoint-12$"
    with pytest.raises(apt_kernels.AdapterError, match=message):
        apt_kernels.load(models.build("bert"), tmp_path)
