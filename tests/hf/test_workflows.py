"""What people do, one test for each thing that once went wrong: calls, saving, offloading, failed calls, other bases.

The inputs are the users' own. test_workflows_inputs.py has the other kinds; CONTRIBUTING.md names the tests of other
modules that hold an input of this kind.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import accelerate
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import apt_kernels
from apt_kernels.hf.adapter_file import write_adapter
from helpers.patched import assert_unchanged, snapshot
from helpers.workflows import bert, llama, stir, token_ids

IDS = token_ids()
LORA = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# 1. Every call is independent of every other.


@torch.no_grad()
def test_a_server_answers_from_a_thread_pool():
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    requests = [token_ids(seed) for seed in range(4)]
    expected = [model(input_ids=request).logits for request in requests]
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(lambda n: model(input_ids=requests[n % 4]).logits, range(200))):
            assert torch.equal(found, expected[number % 4])


@torch.no_grad()
def test_an_interrupt_in_a_packed_forward_then_a_plain_input():
    model, other = stir(apt_kernels.patch(llama(), prefix_length=4)), stir(apt_kernels.patch(llama(), prefix_length=2))
    plain, longer = IDS[:1].repeat(1, 2)[:, :12], IDS[:1]
    expected = [[each(input_ids=ids).logits for ids in (plain, longer)] for each in (model, other)]

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=plain, position_ids=torch.tensor([[*range(6), *range(6)]]), use_cache=False)
    hook.remove()
    found = [[each(input_ids=ids).logits for ids in (plain, longer)] for each in (model, other)]
    for one, other_one in zip(found, expected):
        assert all(map(torch.equal, one, other_one))


# 2. What trains is what is saved.


def with_lora(seed):
    model = stir(apt_kernels.patch(llama(), prefix_length=4), seed)
    torch.manual_seed(seed)
    model.add_adapter(LORA)
    return model


def test_a_lora_by_add_adapter_is_in_the_files_of_save_pretrained(tmp_path):
    model = with_lora(1)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = llama()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(apt_kernels.load(again, tmp_path)(input_ids=IDS).logits, expected)


def test_a_lora_by_add_adapter_is_resumed_by_trainer(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.cat([token_ids(seed) for seed in range(4)])]

    def trained(steps, resume):
        model = with_lora(1 if not resume else 2)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return {name: tensor for name, tensor in weights_of(model).items() if "lora_" in name or ".apt." in name}

    whole = trained(4, None)
    resumed = trained(4, str(tmp_path / "checkpoint-2"))
    assert whole.keys() == resumed.keys()
    assert any("lora_" in name for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_two_pairs_of_lora_and_prefix(tmp_path):
    expected = {}
    for seed, name in enumerate("ab", 1):
        pair = peft.get_peft_model(llama(), LORA)
        apt_kernels.patch(pair, prefix_length=4)
        stir(pair, seed)
        expected[name] = pair(input_ids=IDS).logits
        pair.save_pretrained(tmp_path / name)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", adapter_name="b")
    for name in "abab":
        model.set_adapter(name)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected[name])


def test_what_patch_made_trainable_is_saved_after_requires_grad_(tmp_path):
    model = stir(apt_kernels.patch(bert(), prefix_length=4))
    torch.nn.init.normal_(model.classifier.weight)
    expected = model(input_ids=IDS).logits
    model.requires_grad_(False)
    apt_kernels.save(model, tmp_path)
    again = bert()
    torch.nn.init.zeros_(again.classifier.weight)
    assert torch.equal(apt_kernels.load(again, tmp_path)(input_ids=IDS).logits, expected)


def test_save_pretrained_where_a_base_model_lies(tmp_path):
    llama().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(apt_kernels.AdapterError, match="holds a model"):
        apt_kernels.patch(llama()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_adapter_b_is_not_resumed_into_default(tmp_path):
    model = apt_kernels.patch(llama(), prefix_length=4)
    stir(apt_kernels.add_adapter(model, "b", prefix_length=4)).save_pretrained(tmp_path)
    other = apt_kernels.patch(llama(), prefix_length=4)
    before = weights_of(other)
    with pytest.raises(apt_kernels.AdapterError, match="saved from the adapter 'b'"):
        other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(other).items())


# 3. Weights that are elsewhere.


def test_adapters_of_a_model_with_layers_on_disk(tmp_path):
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = accelerate.dispatch_model(llama(), places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    stir(apt_kernels.patch(model, prefix_length=4))
    expected, held = model(input_ids=IDS).logits, weights_of(model)
    apt_kernels.add_adapter(model, "b", prefix_length=4)
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    apt_kernels.set_adapter(model, "default")
    assert torch.equal(model(input_ids=IDS).logits, expected)
    prefixes = {name: tensor for name, tensor in weights_of(model).items() if ".apt." in name}
    assert len(prefixes) == 12
    assert all(tensor.device.type == "cpu" and torch.equal(tensor, held[name]) for name, tensor in prefixes.items())


def test_saving_an_offloaded_model(tmp_path):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    apt_kernels.save(model, tmp_path / "before")
    accelerate.cpu_offload(model, execution_device="cpu")
    apt_kernels.save(model, tmp_path / "after")
    before, after = (load_file(tmp_path / each / "adapter.safetensors") for each in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# 4. All of a change, or none.


def test_a_classifier_that_was_exchanged_leaves_the_prefix_attached():
    model = stir(apt_kernels.patch(bert(), prefix_length=4))
    apt_kernels.add_adapter(model, "b", prefix_length=4)
    apt_kernels.set_adapter(model, "default")
    hidden = model.bert(input_ids=IDS).last_hidden_state
    model.classifier = torch.nn.Linear(64, 5)
    with pytest.raises(apt_kernels.PatchError, match=r"classifier.* has the shape"):
        apt_kernels.set_adapter(model, "b")
    assert len(apt_kernels.prefixes(model)) == 3
    assert torch.equal(model.bert(input_ids=IDS).last_hidden_state, hidden)


def test_add_adapter_within_disabled_registers_nothing():
    model = apt_kernels.patch(llama(), prefix_length=4)
    with apt_kernels.disabled(model), pytest.raises(apt_kernels.PatchError, match="while the prefix is disabled"):
        apt_kernels.add_adapter(model, "b", prefix_length=4)
    assert list(apt_kernels.adapters(model)) == ["default"]
    apt_kernels.add_adapter(model, "b", prefix_length=4)


def test_an_interrupt_within_patch(monkeypatch):
    from apt_kernels.hf import patching

    model, attached = llama(), patching.attaching.attach
    before, calls = snapshot(model), []

    def interrupted(*args):
        calls.append(attached(*args))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(patching.attaching, "attach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apt_kernels.patch(model, prefix_length=4)
    assert_unchanged(model, before)
    apt_kernels.unpatch(apt_kernels.patch(model, prefix_length=4))
    assert_unchanged(model, before)


# 5. Whose adapter, which base.


def test_a_llamas_adapter_is_refused_by_a_mistral_of_the_same_sizes(tmp_path):
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4)), tmp_path)
    settings = {name: getattr(llama().config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    settings |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**settings))
    with pytest.raises(apt_kernels.AdapterError, match=r"llama.*mistral"):
        apt_kernels.load(model, tmp_path)
    assert not hasattr(model, "_apt_state")


def test_the_base_is_recorded_by_name_and_revision(tmp_path):
    model = llama()
    model.config._name_or_path, model.config._commit_hash = "some/model", "f" * 40
    apt_kernels.save(apt_kernels.patch(model), tmp_path)
    base = json.loads((tmp_path / "apt_config.json").read_text())["base"]
    assert (base["model_type"], base["name_or_path"], base["revision"]) == ("llama", "some/model", "f" * 40)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {**ROPE, "rope_theta": 500.0}}, "rope_theta' was 10000.0, and this model has 500.0"),
        ({"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}, "rope_type' was 'default'"),
        ({"rms_norm_eps": 0.1}, "'rms_norm_eps' was 1e-06, and this model has 0.1$"),
        ({"hidden_act": "relu"}, "'hidden_act' was 'silu'"),
    ],
)
def test_a_base_that_computes_otherwise_with_equal_weights(changes, message, tmp_path):
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4)), tmp_path)
    with pytest.warns(UserWarning, match=f"trained on a model that computes otherwise.*{message}"):
        apt_kernels.load(llama(**changes), tmp_path)


def gemma(**changes):
    torch.manual_seed(0)
    config = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config |= {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16, **changes}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config)).eval()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 6),
        ("query_pre_attn_scalar", 64),
        ("attn_logit_softcapping", 5.0),
        ("final_logit_softcapping", None),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_base_with_another_attention_and_equal_weights(name, value, tmp_path):
    apt_kernels.save(stir(apt_kernels.patch(gemma(), prefix_length=4)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.load(gemma(attention_dropout=0.3, eos_token_id=5, use_cache=False), tmp_path)
    with pytest.warns(UserWarning, match=f"computes otherwise: '{name}' was"):
        apt_kernels.load(gemma(**{name: value}), tmp_path)


def test_a_record_without_the_bases_config_loads_without_a_warning(tmp_path):
    """Files of earlier versions have none."""
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4)), tmp_path)
    settings = json.loads((tmp_path / "apt_config.json").read_text())
    del settings["base"]["config"]
    write_adapter(tmp_path, load_file(tmp_path / "adapter.safetensors"), settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.load(llama(rms_norm_eps=0.1), tmp_path)


def test_a_second_load(tmp_path):
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4), 1), tmp_path / "first")
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4), 2), tmp_path / "second")
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=5), 3), tmp_path / "other")
    model = apt_kernels.load(llama(), tmp_path / "first")
    first = model(input_ids=IDS).logits
    with pytest.raises(apt_kernels.PatchError, match=r"other settings.*adapter="):
        apt_kernels.load(model, tmp_path / "other")
    apt_kernels.load(model, tmp_path / "other", adapter="b")
    assert list(apt_kernels.adapters(model)) == ["b", "default"]
    apt_kernels.set_adapter(model, "default")
    assert torch.equal(model(input_ids=IDS).logits, first)
    with pytest.warns(UserWarning, match="the adapter 'default' is replaced"):
        apt_kernels.load(model, tmp_path / "second")
    assert not torch.equal(model(input_ids=IDS).logits, first)


def test_a_file_with_the_bases_lm_head(tmp_path):
    apt_kernels.save(stir(apt_kernels.patch(llama(), prefix_length=4)), tmp_path)
    settings = json.loads((tmp_path / "apt_config.json").read_text())
    assert settings["trainable"] is None
    tensors = load_file(tmp_path / "adapter.safetensors")
    write_adapter(tmp_path, {**tensors, "lm_head.weight": torch.zeros(97, 64)}, settings)
    model = llama()
    before = snapshot(model)
    with pytest.raises(apt_kernels.AdapterError, match=r"lm_head.weight.*would overwrite the base model's"):
        apt_kernels.load(model, tmp_path)
    assert_unchanged(model, before)


def test_from_json_of_a_saved_apt_config(tmp_path):
    model = apt_kernels.patch(llama(), prefix_length=4, gate="token")
    apt_kernels.save(model, tmp_path)
    read = apt_kernels.AptConfig.from_json(json.loads((tmp_path / "apt_config.json").read_text()))
    assert read == next(iter(apt_kernels.adapters(model).values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    model = apt_kernels.patch(llama(), prefix_length=4)
    next(iter(apt_kernels.prefixes(model).values())).key.data[0, 1, 2] = value
    with pytest.warns(UserWarning, match="not finite"):
        apt_kernels.save(model, tmp_path)
    other = llama()
    with pytest.raises(apt_kernels.AdapterError, match=r"apt\.key has values that are not finite"):
        apt_kernels.load(other, tmp_path)
    assert not hasattr(other, "_apt_state")
    assert apt_kernels.load(copy.deepcopy(other), tmp_path, allow_non_finite=True) is not None


def test_the_tests_that_contributing_names_exist():
    root = Path(__file__).parents[2]
    page = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) >= 10
    for path, name in named:
        assert re.search(rf"^def {name}\(", (root / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{name}"
