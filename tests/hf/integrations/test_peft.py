"""LoRA and other methods of PEFT on a patched model, in either order."""

import pytest
import torch
from safetensors.torch import load_file

import apt_kernels
from helpers import models, workflows
from helpers.patched import assert_unchanged, randomise, snapshot
from helpers.training import trainer

peft = pytest.importorskip("peft", reason="the package peft is not installed")
FAMILIES = models.some(("bert", "gpt2", "llama", "t5", "gemma2")) if not models.EVERY else models.FAMILIES


def lora(family, **options):
    return peft.LoraConfig(target_modules="all-linear", r=2, lora_alpha=8, init_lora_weights=False, **options)


def ia3(family):
    return peft.IA3Config(target_modules="all-linear", feedforward_modules=[], init_ia3_weights=False)


def both(family, first, method):
    """A model with PEFT's method and a prefix, and the transformers model inside."""
    base = models.build(family).double()
    settings = dict(prefix_length=3, init_seed=0)
    torch.manual_seed(5)
    if first == "patch":
        base = apt_kernels.patch(base, **settings)
        model = peft.get_peft_model(base, method(family), autocast_adapter_dtype=False)
    else:
        model = peft.get_peft_model(base, method(family), autocast_adapter_dtype=False)
        assert apt_kernels.patch(model, **settings) is model
    return model.double(), base


@pytest.mark.proves("LoRA and other PEFT methods on the same model, patched before or after, merged and unmerged")
@pytest.mark.parametrize("first", ["patch", "peft"])
@pytest.mark.parametrize(("family", "method"), [*((f, lora) for f in FAMILIES), ("llama", ia3)])
def test_both_train_and_neither_disturbs_the_other(family, method, first):
    model, base = both(family, first, method)
    given = models.inputs(family, "right")
    with torch.no_grad():
        without = model(**given).logits
    randomise(model)
    found = apt_kernels.prefixes(model)
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for x in found.values() for p in x.parameters())
    trained = {n for n, p in base.named_parameters() if p.requires_grad}
    ours = {n for n in trained if ".apt." in n}
    assert ours
    assert trained - ours
    assert all("lora_" in n or "ia3_" in n for n in trained - ours)

    logits = model(**given).logits
    assert (logits - without).abs().max() > 1e-2, "the prefix has no influence"
    logits.square().mean().backward()
    named = dict(base.named_parameters())
    assert all(named[n].grad.abs().max() > 0 for n in trained)
    with torch.no_grad():
        with model.disable_adapter():
            alone = model(**given).logits
            plain = randomise_like(apt_kernels.patch(models.build(family).double(), prefix_length=3), model)
            torch.testing.assert_close(alone, plain(**given).logits)
        assert (alone - logits).abs().max() > 1e-3, "PEFT's adapter has no influence"
        model.merge_adapter()
        near = {"rtol": 1e-5, "atol": 1e-5} if method is ia3 else {}  # IA3 keeps float32 whatever the model's dtype
        torch.testing.assert_close(model(**given).logits, logits, **near)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**given).logits, logits, **near)
        assert apt_kernels.prefixes(merged).keys() == found.keys()


def randomise_like(plain, model):
    theirs = apt_kernels.prefixes(model)
    for name, prefix in apt_kernels.prefixes(plain.double()).items():
        prefix.load_state_dict(theirs[name].state_dict())
    return plain


def test_both_are_saved_and_loaded_together(tmp_path):
    model, base = both("llama", "patch", lora)
    model, base = model.float(), base.float()
    randomise(model)
    given, expected = models.inputs("llama"), model(**models.inputs("llama")).logits
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(models.build("llama"), tmp_path)
    assert torch.equal(fresh(**given).logits, expected)
    apt_kernels.unpatch(model)
    assert not any(".apt." in n for n, _ in model.named_parameters())
    assert all("lora_" in n for n, p in base.named_parameters() if p.requires_grad)


def test_gathered_weights_are_saved_in_place_of_the_models_own(tmp_path):
    """As Trainer hands them over, by PEFT's names, where processes hold parts of the model."""
    model, _ = both("llama", "patch", lora)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    found = load_file(tmp_path / "adapter.safetensors")
    assert found
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"base_model.model.{name}"])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "adapter.safetensors").exists()


def test_a_model_without_a_prefix_is_left_to_peft(tmp_path):
    apt_kernels.patch(models.build("llama"))  # PEFT's methods are wrapped now
    model = peft.get_peft_model(models.build("llama"), lora("llama"))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "apt_config.json").exists()


def test_new_heads_are_left_to_the_one_that_trains_them():
    model = models.build("bert", "AutoModelForSequenceClassification")
    model = peft.get_peft_model(model, lora("bert", task_type="SEQ_CLS"))
    apt_kernels.patch(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n and ".apt." not in n}
    assert trained == {f"base_model.model.classifier.modules_to_save.default.{n}" for n in ("weight", "bias")}


def test_trainer_keeps_the_prefix_beside_peft(tmp_path):
    """Trainer saves a PEFT model through PEFT; the prefix goes along, and comes back on resume."""

    def made():
        torch.manual_seed(0)
        model = peft.get_peft_model(models.build("llama"), lora("llama"))
        return apt_kernels.patch(model, prefix_length=4, init_seed=0)

    whole, expected = trainer(made(), tmp_path / "whole", "llama")
    whole.train()
    again, found = trainer(made(), tmp_path / "again", "llama")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert found.by_step == {step: expected.by_step[step] for step in (4, 5, 6)}


def with_own_lora(seed, **settings):
    """A patched model to which transformers itself added a LoRA, both as if trained."""
    model = apt_kernels.patch(models.build("llama"), prefix_length=3, **settings)
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    randomise(model, seed)
    return model


@pytest.mark.parametrize("width", [None, 4])
def test_a_lora_that_transformers_added_is_saved_with_the_prefix(width, tmp_path):
    model, given = with_own_lora(1, reparameterisation=width), models.inputs("llama")
    expected = model(**given).logits
    model.save_pretrained(tmp_path)
    fresh = models.build("llama")
    fresh.load_adapter(str(tmp_path))
    torch.testing.assert_close(apt_kernels.load(fresh, tmp_path)(**given).logits, expected)
    # As Trainer resumes: what it reads holds both.
    other = with_own_lora(2, reparameterisation=width)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert not any("lora_" in name or ".apt." in name for name in found.missing_keys)
    assert torch.equal(other(**given).logits, expected)


def test_weights_of_peft_that_would_be_left_out_are_refused_by_name(tmp_path):
    model, base = both("llama", "patch", lora)
    with pytest.raises(apt_kernels.PatchError, match="which its save_pretrained would leave out"):
        base.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model.save_pretrained(tmp_path)


def test_a_folder_that_holds_a_base_model_is_not_overwritten(tmp_path):
    models.build("llama").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = apt_kernels.patch(models.build("llama"))
    with pytest.raises(apt_kernels.AdapterError, match="holds a model, which save_pretrained of a patched model would"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "other")


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_weights_that_peft_merged_are_saved_and_unpatch_gives_the_base_back(way, tmp_path):
    base, given = models.build("llama"), models.inputs("llama")
    before = snapshot(base)
    settings = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(apt_kernels.patch(models.build("llama"), prefix_length=3), settings)
    randomise(model)
    merged = model.merge_and_unload()
    expected = merged(**given).logits
    apt_kernels.save(merged, tmp_path) if way == "save" else merged.save_pretrained(tmp_path)
    apt_kernels.load(base, tmp_path)
    assert torch.equal(base(**given).logits, expected)
    assert_unchanged(apt_kernels.unpatch(base), before)


def test_a_head_that_peft_replaced_is_not_compared(tmp_path, recwarn):
    """`modules_to_save`, which task_type="SEQ_CLS" sets: the copy is loaded, the original is new in every process."""
    model = apt_kernels.patch(workflows.bert(), prefix_length=3)
    lora_too = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_lora_weights=False)
    saved = peft.get_peft_model(model, lora_too)
    randomise(model)
    saved.save_pretrained(tmp_path)
    fresh = workflows.bert()
    for parameter in fresh.classifier.parameters():
        torch.nn.init.normal_(parameter)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert not [each for each in recwarn if "other weights" in str(each.message)]
    given = {"input_ids": torch.arange(3, 12)[None]}
    torch.testing.assert_close(loaded.eval()(**given).logits, saved.eval()(**given).logits)


def test_the_summary_names_parameters_of_all_layers_together():
    model = apt_kernels.patch(workflows.llama(), prefix_length=4)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    found = apt_kernels.summary(model)
    layers, sizes = len(found.layers), dict(found.beside)
    assert len(sizes) == 2 * layers
    lines = [line.split() for line in str(found).splitlines() if "other parameter" in line]
    for line, matrix in zip(lines, "AB", strict=True):
        name = f"model.layers.*.self_attn.q_proj.lora_{matrix}.default.weight"
        assert line[:3] == [name, "(x", f"{layers})"]
        size = sum(size for each, size in sizes.items() if f"lora_{matrix}" in each)
        assert line[-1] == f"{size:,}"
