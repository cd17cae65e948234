"""``num_frozen_tokens``: the first tokens of a prefix keep their initial key and value, whatever trains."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import apt_kernels
from apt_kernels.hf import adapter_file, offload
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot
from helpers.training import trainer

TEXT = torch.tensor([7, 31, 12, 55, 60, 9])


def tokens(model):
    return {name: tuple(p.detach().clone() for p in x.tokens()) for name, x in apt_kernels.prefixes(model).items()}


def step(model, optimizer, given):
    optimizer.zero_grad(set_to_none=False)
    model(**given, labels=given["input_ids"]).loss.backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_changes_frozen_tokens(optimizer, every):
    """Not even one of all parameters, each set to require a gradient: no gradient arrives at frozen tokens."""
    model = apt_kernels.patch(models.build("llama"), prefix_length=6, num_frozen_tokens=2)
    before = tokens(model)
    if every:
        model.requires_grad_(True)
    made = OPTIMIZERS[optimizer](model.parameters() if every else apt_kernels.parameter_groups(model))
    for _ in range(3):
        step(model, made, models.inputs("llama"))
    for name, parts in tokens(model).items():
        for now, then in zip(parts, before[name]):
            assert torch.equal(now[:, :2], then[:, :2])
            assert not torch.isclose(now[:, 2:], then[:, 2:]).all(dim=-1).any()


def test_outputs_and_gradients_are_those_of_the_prefix_without_frozen_tokens():
    base, given = models.build("llama").double(), models.inputs("llama")
    plain = apt_kernels.patch(copy.deepcopy(base), prefix_length=6, gate="token").double()
    frozen = apt_kernels.patch(copy.deepcopy(base), prefix_length=6, gate="token", num_frozen_tokens=2).double()
    randomise(plain)
    with torch.no_grad():
        for source, target in zip(apt_kernels.prefixes(plain).values(), apt_kernels.prefixes(frozen).values()):
            target.copy_(*source.tokens())
            target.gate_weight.copy_(source.gate_weight)
            target.layer_scale.copy_(source.layer_scale)
    for model in (plain, frozen):
        model(**given).logits.square().mean().backward()
    assert torch.equal(plain(**given).logits, frozen(**given).logits)
    for expected, found in zip(apt_kernels.prefixes(plain).values(), apt_kernels.prefixes(frozen).values()):
        torch.testing.assert_close(found.key.grad, expected.key.grad[:, 2:])
        torch.testing.assert_close(found.value.grad, expected.value.grad[:, 2:])
        torch.testing.assert_close(found.gate_weight.grad, expected.gate_weight.grad)
        assert found.frozen_key.grad is found.frozen_value.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("init", ["normal", "zero", "vocabulary"])
def test_the_initial_values_are_those_without_frozen_tokens(init, dropout):
    settings = {"prefix_length": 4, "init": init, "init_seed": 3}
    made = [
        tokens(apt_kernels.patch(models.build("llama"), **settings, **more).eval())
        for more in ({}, {"num_frozen_tokens": 2, "prefix_dropout": dropout})
    ]
    for name, parts in made[0].items():
        assert all(torch.equal(a, b) for a, b in zip(parts, made[1][name]))


@pytest.mark.parametrize(
    ("given", "frozen"),
    [(TEXT, 1), (TEXT[:1], 0)],
)
def test_a_text_freezes_its_first_token_by_default(given, frozen):
    model = apt_kernels.patch_from_text(models.build("llama"), given)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(model).values()} == {frozen}
    assert next(iter(apt_kernels.adapters(model).values())).num_frozen_tokens == frozen


def test_a_text_freezes_what_the_settings_say():
    config = apt_kernels.AptConfig(num_frozen_tokens=0)
    model = apt_kernels.patch_from_text(models.build("llama"), TEXT, config)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(model).values()} == {0}
    assert {prefix.frozen for prefix in apt_kernels.prefixes(apt_kernels.patch(models.build("llama"))).values()} == {0}


def test_save_and_load_keep_frozen_tokens(tmp_path):
    """The file has whole keys and values; a load separates the frozen tokens again."""
    base = models.build("llama")
    model = apt_kernels.patch_from_text(copy.deepcopy(base), TEXT, num_frozen_tokens=2)
    step(model, torch.optim.AdamW(apt_kernels.parameter_groups(model)), models.inputs("llama"))
    apt_kernels.save(model, tmp_path)
    with apt_kernels.hf.checkpoint.open_adapter(tmp_path) as file:
        shapes = {name: entry.shape for name, entry in file.entries.items()}
    assert not any("frozen" in name for name in shapes)
    assert {shape[1] for name, shape in shapes.items() if name.endswith((".key", ".value"))} == {6}
    back = apt_kernels.load(copy.deepcopy(base), tmp_path)
    assert apt_kernels.adapters(back) == apt_kernels.adapters(model)
    given = models.inputs("llama")
    assert torch.equal(back(**given).logits, model(**given).logits)
    apt_kernels.load(model, tmp_path, adapter="b")
    apt_kernels.add_adapter(model, "c", prefix_length=3, num_frozen_tokens=1)
    apt_kernels.set_adapter(model, "b")
    assert torch.equal(back(**given).logits, model(**given).logits)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(model).values()} == {2}
    apt_kernels.set_adapter(model, "c")
    assert {(prefix.frozen, prefix.length) for prefix in apt_kernels.prefixes(model).values()} == {(1, 3)}


def test_an_adapter_with_other_frozen_tokens_is_not_loaded_in_place(tmp_path):
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, num_frozen_tokens=1)
    apt_kernels.save(model, tmp_path)
    other = apt_kernels.patch(models.build("llama"), prefix_length=4)
    before = snapshot(other)
    with pytest.raises(apt_kernels.PatchError, match="has other settings"):
        apt_kernels.load(other, tmp_path)
    assert_unchanged(other, before)


def test_files_without_the_setting_load_with_none_frozen(tmp_path):
    data = apt_kernels.AptConfig(prefix_length=4).to_json()
    del data["num_frozen_tokens"]
    assert apt_kernels.AptConfig.from_json(data) == apt_kernels.AptConfig(prefix_length=4)


def test_trainer_resumes_with_frozen_tokens(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def made():
        torch.manual_seed(0)
        return apt_kernels.patch_from_text(models.build("llama"), TEXT, init_seed=0)

    whole = made()
    start = tokens(whole)
    trainer(whole, tmp_path / "whole", "llama", steps=4, save_steps=2)[0].train()
    resumed = made()
    again, _ = trainer(resumed, tmp_path / "again", "llama", steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parts in tokens(resumed).items():
        for now, expected, first in zip(parts, tokens(whole)[name], start[name]):
            torch.testing.assert_close(now, expected)
            assert torch.equal(now[:, :1], first[:, :1])
            assert not torch.equal(now, first)


def test_prune_keeps_frozen_tokens_first():
    model = apt_kernels.patch(models.build("llama"), prefix_length=5, gate="static", num_frozen_tokens=2)
    before = tokens(model)
    with torch.no_grad():
        for prefix in apt_kernels.prefixes(model).values():
            prefix.gate_logits.copy_(torch.tensor([-3.0, -2.0, 1.0, 3.0, 2.0]))
    found = apt_kernels.probe(model, [models.inputs("llama")])
    assert {layer.frozen for layer in found.layers} == {2}
    assert found.lengths(threshold=1.7).keep[found.layers[0].name] == (0, 1, 3, 4)
    count = len(found.layers)
    lengths = [3, 1, *[2] * (count - 2)]
    apt_kernels.prune(model, lengths)
    kept = dict(zip(before, ((0, 1, 3), (0,), *((0, 1),) * (count - 2))))
    for name, prefix in apt_kernels.prefixes(model).items():
        assert (prefix.length, prefix.frozen) == (len(kept[name]), min(2, len(kept[name])))
        for now, then in zip(prefix.tokens(), before[name]):
            assert torch.equal(now, then[:, list(kept[name])])
    step(model, torch.optim.AdamW(apt_kernels.parameter_groups(model)), models.inputs("llama"))


def test_a_pruned_model_is_saved_and_loaded(tmp_path):
    base = models.build("llama")
    model = apt_kernels.patch(copy.deepcopy(base), prefix_length=5, gate="static", num_frozen_tokens=3)
    count = len(apt_kernels.prefixes(model))
    apt_kernels.prune(model, [2] * count)
    assert apt_kernels.adapters(model)["default"].num_frozen_tokens == 2
    apt_kernels.save(model, tmp_path)
    back, given = apt_kernels.load(base, tmp_path), models.inputs("llama")
    assert torch.equal(back(**given).logits, model(**given).logits)


def test_summary_counts_what_trains():
    model = apt_kernels.patch(models.build("llama"), prefix_length=6, num_frozen_tokens=2)
    found = apt_kernels.summary(model)
    assert {layer.frozen for layer in found.layers} == {2}
    assert str(found).count("  6 (2 frozen)  ") == len(found.layers)
    assert "frozen" not in str(apt_kernels.summary(apt_kernels.patch(models.build("llama"), prefix_length=6)))
    assert found.trainable == sum(layer.parameters for layer in found.layers)
    assert found.trainable == sum(p.numel() for group in apt_kernels.parameter_groups(model) for p in group["params"])


def test_fold_has_all_tokens():
    model = apt_kernels.patch(models.build("llama"), prefix_length=6, gate="none", num_frozen_tokens=2)
    for name, (key, value) in apt_kernels.fold(model).items():
        expected = tokens(model)[name]
        assert torch.equal(key, expected[0])
        assert torch.equal(value, expected[1])


@pytest.mark.parametrize("frozen", [0, 1, 6])
def test_a_cartridge_keeps_its_frozen_tokens_both_ways(frozen, tmp_path):
    base = models.build("llama")
    model = apt_kernels.patch_from_text(copy.deepcopy(base), TEXT, gate="none", num_frozen_tokens=frozen)
    step(model, torch.optim.AdamW(apt_kernels.parameter_groups(model)), models.inputs("llama"))
    apt_kernels.export(model, tmp_path, format="cartridge")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_frozen_tokens"] == frozen
    back = apt_kernels.patch_from_peft(copy.deepcopy(base), tmp_path, gate="none")
    assert {prefix.frozen for prefix in apt_kernels.prefixes(back).values()} == {frozen}
    more = apt_kernels.patch_from_peft(copy.deepcopy(base), tmp_path, gate="none", num_frozen_tokens=3)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(more).values()} == {3}


def test_peft_freezes_the_same_tokens(tmp_path):
    """PEFT's own frozen tokens, trained on by PEFT, are the ones that stay."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = models.build("llama").float()
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    model = apt_kernels.patch_from_peft(copy.deepcopy(base), tmp_path, gate="none")
    before, given = tokens(model), models.inputs("llama")
    step(model, torch.optim.AdamW(apt_kernels.parameter_groups(model)), given)
    for name, parts in tokens(model).items():
        assert all(torch.equal(a[:, :2], b[:, :2]) for a, b in zip(parts, before[name]))
        assert not any(torch.equal(a[:, 2:], b[:, 2:]) for a, b in zip(parts, before[name]))
    apt_kernels.export(model, tmp_path / "back", format="cartridge")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back").eval()
    encoder = again.prompt_encoder["default"]
    assert encoder.num_frozen_tokens == 2
    assert not encoder.frozen_embedding.requires_grad
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(again(**given).logits, expected, rtol=1e-4, atol=1e-4)  # float32, rotated keys


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frozen_tokens": -1}, "num_frozen_tokens is -1; it needs an int >= 0"),
        ({"num_frozen_tokens": True}, "num_frozen_tokens is True; it needs an int >= 0"),
        ({"num_frozen_tokens": 1.0}, "num_frozen_tokens is 1.0; it needs an int >= 0"),
        ({"num_frozen_tokens": 5, "prefix_length": 4}, "the longest prefix has 4 tokens"),
        ({"num_frozen_tokens": 5, "prefix_length": (4, 2)}, "the longest prefix has 4 tokens"),
        ({"num_frozen_tokens": 1, "reparameterisation": 8}, "with reparameterisation, .* it needs 0"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.AptConfig(**settings)


def test_a_checkpoint_with_more_frozen_tokens_than_it_has_is_refused(tmp_path):
    base = models.build("llama")
    model = apt_kernels.patch_from_text(copy.deepcopy(base), TEXT, gate="none")
    apt_kernels.export(model, tmp_path, format="cartridge")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_frozen_tokens": 7}))
    with pytest.raises(apt_kernels.AdapterError, match="has 7 as num_frozen_tokens; it needs an int from 0 to 6"):
        apt_kernels.patch_from_peft(base, tmp_path)


# Prefix length and frozen tokens of the adapters of one model: some, none, all.
MIXED = {"default": (5, 2), "b": (3, 0), "c": (4, 4)}
ROWS = ["c", "default", "__base__", "b", "default"]


def mixed(family, gates):
    """A model without adapters, and its copy with the adapters of `MIXED`, in float64."""
    plain = models.build(family).double()
    model = copy.deepcopy(plain)
    for seed, ((name, (length, frozen)), gate) in enumerate(zip(MIXED.items(), gates)):
        settings = {"prefix_length": length, "num_frozen_tokens": frozen, "gate": gate}
        if name == "default":
            apt_kernels.patch(model, **settings)
        else:
            apt_kernels.add_adapter(model, name, **settings)
        randomise(model, seed)
    return plain, model.double()


@pytest.mark.parametrize("active", MIXED)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_rows_of_a_batch_with_different_numbers_of_frozen_tokens(family, active):
    """Outputs and gradients of a mixed batch are those of each row alone under its adapter."""
    plain, model = mixed(family, ("auto", "static", "none"))
    apt_kernels.set_adapter(model, active).double()
    given = models.inputs(family, "right", batch=len(ROWS))
    real = given["attention_mask"].bool()
    logits = model(**given, adapter_names=ROWS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    weight = weight * real[..., None]
    (logits * weight).sum().backward()
    alone = copy.deepcopy(model)
    alone.zero_grad()
    for i, name in enumerate(ROWS):
        one = {key: part[i : i + 1] for key, part in given.items()}
        single = plain if name == "__base__" else apt_kernels.set_adapter(copy.deepcopy(model), name).double()
        expected = (alone if name == active else single)(**one).logits
        torch.testing.assert_close(logits[i][real[i]], expected[0][real[i]], rtol=1e-9, atol=1e-9)
        if name == active:
            (expected * weight[i]).sum().backward()
    for (name, found), (_, expected) in zip(model.named_parameters(), alone.named_parameters()):
        assert (found.grad is None) == (expected.grad is None) == (not found.requires_grad), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)
    for name, prefix in apt_kernels.prefixes(model).items():
        length, frozen = MIXED[active]
        assert prefix.key.shape[1] == length - frozen, name
        assert frozen == length or prefix.key.grad.abs().max() > 0, name


def test_generation_with_different_numbers_of_frozen_tokens():
    _, model = mixed("llama", ("token", "none", "static"))
    given, rows = models.inputs("llama", "left", batch=3), ["c", "default", "b"]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**given, **options, adapter_names=rows)
    for i, name in enumerate(rows):
        single = apt_kernels.set_adapter(copy.deepcopy(model), name).double()
        one = {key: part[i : i + 1] for key, part in given.items()}
        assert torch.equal(found[i], single.generate(**one, **options)[0]), name


def frozen_of(model):
    return {prefix.frozen for prefix in apt_kernels.prefixes(model).values()}


@pytest.mark.parametrize(("names", "frozen"), [("ab", 2), ("ba", 0), ("cab", 6), ("ac", 2), ("cc", 8)])
def test_composed_adapters_keep_the_frozen_tokens_at_their_beginning(names, frozen):
    names = [{"a": "default"}.get(name, name) for name in names]
    _, model = mixed("llama", ("none", "none", "none"))
    parts = [tokens(apt_kernels.set_adapter(copy.deepcopy(model), name)) for name in names]
    given = models.inputs("llama")
    with torch.no_grad():
        apt_kernels.compose(model, names, "composed")
    assert frozen_of(model) == {frozen}
    assert apt_kernels.adapters(model)["composed"].num_frozen_tokens == (frozen or None)
    before = tokens(model)
    for site, found in before.items():
        for i in (0, 1):
            joined = torch.cat([part[site][i] for part in parts], dim=1)
            weights = torch.cat([part_scale(model, name, site, part[site][i]) for name, part in zip(names, parts)])
            expected = joined * (weights / apt_kernels.prefixes(model)[site].layer_scale.detach())[:, None]
            torch.testing.assert_close(found[i], expected)
    if frozen < before[site][0].shape[1]:
        step(model, torch.optim.AdamW(apt_kernels.parameter_groups(model), lr=0.1), given)
    for site, parts in tokens(model).items():
        for now, then in zip(parts, before[site]):
            assert torch.equal(now[:, :frozen], then[:, :frozen])
            assert not torch.isclose(now[:, frozen:], then[:, frozen:]).all(dim=-1).any()


def part_scale(model, name, site, tokens):
    """The layer scale of an adapter for each of these tokens."""
    other = apt_kernels.set_adapter(copy.deepcopy(model), name)
    return apt_kernels.prefixes(other)[site].layer_scale.detach().expand(tokens.shape[1])


def test_composed_adapters_on_different_layers_freeze_what_both_froze():
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, num_frozen_tokens=3, layers=[0])
    apt_kernels.add_adapter(model, "b", prefix_length=5, num_frozen_tokens=1)
    apt_kernels.compose(model, ["default", "b"], "both")
    assert frozen_of(model) == {1}


def test_frozen_tokens_stay_frozen_beside_lora(tmp_path):
    """PEFT's own freezing leaves them without requires_grad, and its folder has the whole prefix."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = models.build("llama")
    model = apt_kernels.patch_from_text(copy.deepcopy(base), TEXT, num_frozen_tokens=2)
    before = tokens(model)
    both = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert not [name for name, p in both.named_parameters() if "frozen_" in name and p.requires_grad]
    step(both, torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=0.1), models.inputs("llama"))
    for name, parts in tokens(model).items():
        assert all(torch.equal(a[:, :2], b[:, :2]) for a, b in zip(parts, before[name]))
        assert not any(torch.equal(a[:, 2:], b[:, 2:]) for a, b in zip(parts, before[name]))
    both.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    given = models.inputs("llama")
    assert torch.equal(again(**given).logits, both.eval()(**given).logits)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(again).values()} == {2}


def test_an_interrupted_load_leaves_frozen_tokens_as_they_were(tmp_path, monkeypatch):
    """All of a load's writes or none, the frozen tokens included."""
    model = apt_kernels.patch_from_text(models.build("llama"), TEXT, num_frozen_tokens=2)
    apt_kernels.save(model, tmp_path)
    randomise(model)
    before, written, write = snapshot(model), [], offload.write

    def interrupted(root, name, *given):
        write(root, name, *given)
        written.append(name)
        if "frozen_" in name and len(written) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(offload, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apt_kernels.load(model, tmp_path)
    assert_unchanged(model, before)


def test_a_file_from_before_the_setting_loads(tmp_path):
    """Its settings lack the field; its prefixes have no frozen part."""
    base = models.build("llama")
    model = apt_kernels.patch(copy.deepcopy(base), prefix_length=4)
    randomise(model)
    apt_kernels.save(model, tmp_path)
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["apt_kernels"])
    del settings["num_frozen_tokens"]
    (tmp_path / "old").mkdir()
    text = json.dumps(settings)
    metadata = {"format": "pt", "apt_kernels": text, "apt_kernels.checksum": adapter_file._digest(text, tensors)}
    save_file(tensors, tmp_path / "old" / path.name, metadata)
    back, given = apt_kernels.load(copy.deepcopy(base), tmp_path / "old"), models.inputs("llama")
    assert torch.equal(back(**given).logits, model(**given).logits)
    assert {prefix.frozen for prefix in apt_kernels.prefixes(back).values()} == {0}
    apt_kernels.load(model, tmp_path / "old")
