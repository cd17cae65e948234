"""Prefixes initialised from a text or a PEFT checkpoint: exact copies of their source, or an error."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import DynamicCache

import apt_kernels
from helpers import models
from helpers.causal import EXACT, build, close
from helpers.patched import assert_unchanged, snapshot

TEXT = torch.tensor([7, 31, 12, 55, 60, 9])


@pytest.mark.parametrize(
    ("case", "gate"), [*((case, "auto") for case in EXACT), ("llama", "none"), ("llama", "first"), ("llama", "static")]
)
def test_a_text_becomes_its_prefix(case, gate):
    model = build(case)
    given = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = torch.cat([TEXT.expand(2, -1), given], dim=1)
    with torch.no_grad():
        expected, bare = model(whole).logits[:, len(TEXT) :], model(given).logits
        assert apt_kernels.patch_from_text(model, TEXT, gate=gate) is model
        close(model(given).logits, expected, bare)
    assert {prefix.length for prefix in apt_kernels.prefixes(model).values()} == {len(TEXT)}


def checkpoint(folder, model, length=5, kind="PREFIX_TUNING", **changes):
    """A checkpoint as PEFT writes it, of random numbers; the flat tensor is returned."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    flat = torch.randn(length, layers * 2 * heads * head_dim, generator=torch.Generator().manual_seed(1))
    given = {"peft_type": kind, "num_layers": layers, "num_virtual_tokens": length, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    save_file({"prompt_embeddings": flat}, folder / "adapter_model.safetensors")
    return flat.view(length, layers, 2, heads, head_dim)


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "PREFIX_TUNING") for case in EXACT), ("llama", "CARTRIDGE"), ("yarn", "CARTRIDGE")]
)
def test_a_peft_checkpoint_is_copied(case, kind, tmp_path):
    model = build(case)
    tokens = checkpoint(tmp_path, model, kind=kind).double()
    given = torch.randint(5, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    for layer in range(tokens.shape[1]):
        key, value = (tokens[:, layer, i].transpose(0, 1).expand(2, -1, -1, -1) for i in (0, 1))
        cache.update(key, value, layer)
    with torch.no_grad():
        positions = torch.arange(5, 14)[None]
        expected = model(given, past_key_values=cache, position_ids=positions).logits
        bare = model(given).logits
        assert apt_kernels.patch_from_peft(model, tmp_path) is model
        close(model(given).logits, expected, bare)


@pytest.mark.parametrize("projection", [False, True])
def test_what_peft_itself_saves_is_copied(projection, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = build("llama").float()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=8
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path)
    given = models.inputs("llama")
    with torch.no_grad():
        expected, bare = theirs(**given).logits, base(**given).logits
        apt_kernels.patch_from_peft(base, tmp_path)
        assert (expected - bare).abs().max() > 1e-2
        torch.testing.assert_close(base(**given).logits, expected, rtol=1e-4, atol=1e-4)  # float32 throughout


REFUSED = {
    "gpt2": ({}, "learned absolute positions"),
    "opt": ({}, "learned absolute positions"),
    "mistral": ({"sliding_window": 5}, "has a window of 5 tokens, too short"),
    "gemma3": ({"sliding_window": 5}, "has a window of 5 tokens, too short"),
    "t5": ({}, "encoder-decoder"),
    "bert": ({}, "learned absolute positions|is not causal|not a causal language model"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "depend on the length"),
}


@pytest.mark.parametrize("source", ["text", "peft"])
@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(family, source, tmp_path):
    overrides, message = REFUSED[family]
    model = models.build(family, **overrides)
    before = snapshot(model)
    checkpoint(tmp_path, model, length=6)
    patch, given = {
        "text": (apt_kernels.patch_from_text, TEXT),
        "peft": (apt_kernels.patch_from_peft, tmp_path),
    }[source]
    with pytest.raises(apt_kernels.PatchError, match=message):
        patch(model, given)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_length": 3}, "prefix_length is given"),
        ({"layer_scale": False}, "layer_scale is False"),
        ({"reparameterisation": 4}, "reparameterisation is set"),
        ({"colour": "red"}, "unknown setting 'colour'"),
    ],
)
def test_settings_that_do_not_start_at_the_source(settings, message):
    model = models.build("llama")
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.patch_from_text(model, TEXT, **settings)
    assert not hasattr(model, "_apt_state")


def test_a_copy_that_turns_out_wrong_is_taken_back(monkeypatch):
    """Whatever a model does with positions: outputs that differ from the source's are refused."""
    from apt_kernels.hf import initialise

    model = models.build("llama")
    before, original = snapshot(model), initialise.capture_text
    monkeypatch.setattr(
        initialise, "capture_text", lambda model, ids, first, chunk_size: original(model, ids, 0, chunk_size)
    )
    with pytest.raises(apt_kernels.PatchError, match="differ from those of the source"):
        apt_kernels.patch_from_text(model, TEXT)
    assert_unchanged(model, before)


def replace_by(path, make):
    path.unlink()
    make(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def weights(folder, tensor):
    save_file({"prompt_embeddings": tensor}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "adapter_model.safetensors").unlink(), "pickled checkpoints are not read"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 50), "is damaged"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[" * 10**5), "is not valid JSON"),
        (lambda d: (d / "adapter_config.json").write_text(" " * 2**23 + "{}"), "has 8388610 bytes; settings of more"),
        (lambda d: (d / "adapter_config.json").write_text('{"a": NaN}'), "which is not finite"),
        (lambda d: replace_by(d / "adapter_config.json", os.mkfifo), "is a pipe"),
        (lambda d: replace_by(d / "adapter_model.safetensors", Path.mkdir), "is a folder"),
        (lambda d: replace_by(d / "adapter_model.safetensors", lambda p: p.symlink_to("/dev/zero")), "is a device"),
        (lambda d: cut(d / "adapter_model.safetensors"), "is damaged"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "is damaged: its header has"),
        (lambda d: weights(d, torch.zeros(0, 96)), r"prompt_embeddings of \[0, 96\]"),
        (lambda d: weights(d, torch.zeros(2, 3, 4)), r"prompt_embeddings of \[2, 3, 4\]"),
        (lambda d: weights(d, torch.zeros(4, 96).long()), "has the dtype 'I64'"),
        (lambda d: weights(d, torch.full((4, 64), float("nan"))), "values that are not finite"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": ["LORA"]}'), r"peft_type \['LORA'\]"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "peft_type 'LORA'"),
        (lambda d: (d / "adapter_config.json").write_text('{"peft_type": "CARTRIDGE", "num_layers": 5}'), "it needs"),
        (lambda d: checkpoint(d, models.build("qwen3")), "it has|of width 24; model.layers.0.self_attn is layer 0"),
    ],
)
def test_a_bad_checkpoint_names_its_fault(harm, message, tmp_path):
    """Whatever is wrong with a file, nothing is unpickled, and nothing larger than the file is allocated."""
    model = models.build("llama")
    checkpoint(tmp_path, model)
    harm(tmp_path)
    before = snapshot(model)
    with pytest.raises(apt_kernels.AdapterError, match=message):
        apt_kernels.patch_from_peft(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a text", r"input_ids is a str; it needs the token ids of one text.*tokenizer\(text\)"),
        ({"input_ids": [1, 2]}, r"input_ids is a dict; .*its \['input_ids'\]"),
        (transformers.BatchEncoding({"input_ids": [1, 2]}), r"input_ids is a BatchEncoding; .*its \['input_ids'\]"),
        (["a", "b"], "input_ids is a list; it needs the token ids"),
        (torch.ones(2, 5, dtype=torch.long), r"input_ids has the shape \[2, 5\]; it needs .* one text"),
        (torch.ones(5), "input_ids is torch.float32"),
        ([], "the text is empty: input_ids has no tokens"),
        ([1, 99999], "input_ids has 99999; the model has tokens from 0 to 98"),
        ([1, -2], "input_ids has -2"),
    ],
)
def test_what_is_not_the_token_ids_of_a_text_is_named(given, message):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.patch_from_text(model, given)
    assert_unchanged(model, before)


def test_a_model_in_the_place_of_a_folder_is_named():
    with pytest.raises(apt_kernels.ArgumentError, match=r"folder is a Linear; it needs the path.*save_pretrained"):
        apt_kernels.patch_from_peft(models.build("llama"), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_model_that_cannot_start_from_a_text_is_told_what_can(family):
    model = models.build(family)
    with pytest.raises(apt_kernels.PatchError, match=r"use patch\(model, prefix_length=...\), which starts from"):
        apt_kernels.patch_from_text(model, [5, 6])


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_that_does_not_exist_is_told_from_one_without_a_checkpoint(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    message = "nowhere does not exist" if folder == "nowhere" else "empty has no adapter_config.json"
    with pytest.raises(apt_kernels.AdapterError, match=message):
        apt_kernels.patch_from_peft(models.build("llama"), tmp_path / folder)
