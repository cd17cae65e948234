"""What people do when they save: paths that cannot be written, and what else was trained on the model."""

from __future__ import annotations

import os
import warnings

import peft
import pytest
import torch
import transformers

import apt_kernels
from apt_kernels import AdapterError, ConfigError, PatchError
from helpers.workflows import bert, llama, stir, token_ids

IDS = token_ids()


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file"


def below_a_file(folder):
    return a_file(folder) / "inside" / "adapter"


def a_broken_link(folder):
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


def a_folder_of_the_weights_name(folder):
    (folder / "adapter" / "adapter.safetensors").mkdir(parents=True)
    return folder / "adapter"


def a_folder_of_the_settings_name(folder):
    (folder / "adapter" / "apt_config.json").mkdir(parents=True)
    return folder / "adapter"


def a_null_character(folder):
    return f"{folder}/a\0b"


def a_name_that_is_too_long(folder):
    return folder / ("x" * 300)


def a_device(folder):
    return "/dev/null"


PATHS = [a_file, below_a_file, a_broken_link, a_null_character, a_name_that_is_too_long, a_device]


@pytest.mark.parametrize("made", [*PATHS, a_folder_of_the_weights_name, a_folder_of_the_settings_name])
def test_a_path_that_cannot_be_written(made, tmp_path):
    model = stir(apt_kernels.patch(llama(), prefix_length=4, gate="static"))
    path = made(tmp_path)
    before = tree(tmp_path)
    for save in (apt_kernels.save, lambda model, path: model.save_pretrained(path)):
        with pytest.raises(AdapterError, match="cannot be written: ") as error:
            save(model, path)
        assert str(path).strip("\0") in str(error.value) or "\\x00" in str(error.value)
        assert tree(tmp_path) == before
    if made in PATHS:
        with pytest.raises(AdapterError, match="cannot be written: "):
            apt_kernels.export(model, path)
        assert tree(tmp_path) == before


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="the administrator, or this system, may write in a read-only folder"
)
def test_a_folder_without_permission(tmp_path):
    model = apt_kernels.patch(llama(), prefix_length=4)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(AdapterError, match="cannot be written: Permission denied"):
            apt_kernels.save(model, tmp_path / "adapter")
    finally:
        tmp_path.chmod(0o755)


def test_a_disk_that_is_full_while_writing(tmp_path, monkeypatch):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    apt_kernels.save(model, tmp_path)
    before = tree(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdapterError, match="cannot be written: No space left on device"):
        apt_kernels.save(stir(model, 2), tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("call", [apt_kernels.save, apt_kernels.load, apt_kernels.export])
def test_a_path_that_is_empty(call, tmp_path, monkeypatch):
    """An unset variable must not mean the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"folder is ''; it needs a path \('\.' for the current folder\)"):
        call(apt_kernels.patch(llama(), prefix_length=4, gate="static"), "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["adapter", ("a", "b")])
def test_save_of_what_is_no_model(given, tmp_path):
    """The two arguments swapped, or a tokenizer."""
    with pytest.raises(PatchError, match=r"the (str|tuple) is not patched; pass a patched model instead"):
        apt_kernels.save(given, tmp_path)


def test_folders_of_the_other_library_are_named(tmp_path):
    model = apt_kernels.patch(llama(), prefix_length=4, gate="static")
    apt_kernels.save(model, tmp_path / "ours")
    apt_kernels.export(model, tmp_path / "theirs")
    with pytest.raises(AdapterError, match="but a PEFT checkpoint: patch_from_peft reads"):
        apt_kernels.load(llama(), tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"no PEFT checkpoint; apt_kernels\.load"):
        apt_kernels.patch_from_peft(llama(), tmp_path / "ours")


def test_the_warning_about_other_weights_points_at_the_call_and_says_what_to_do(tmp_path):
    apt_kernels.save(apt_kernels.patch(llama(), prefix_length=4), tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(0.1)
    with pytest.warns(UserWarning, match=r"1 of \d+ compared differ.*MISSING.*trainable=") as found:
        apt_kernels.load(other, tmp_path)
    assert [each.filename for each in found] == [__file__]


def test_the_warning_about_a_replaced_adapter_points_at_the_call(tmp_path):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    apt_kernels.save(model, tmp_path)
    with pytest.warns(UserWarning, match="is replaced by") as found:
        apt_kernels.load(model, tmp_path)
    assert [each.filename for each in found] == [__file__]


# What else was trained on the model.


def with_lora(how, build=llama, targets=("q_proj",)):
    """A patched model with a LoRA, added by transformers or by PEFT; and the transformers model inside."""
    base = stir(apt_kernels.patch(build(), prefix_length=4))
    settings = peft.LoraConfig(target_modules=list(targets), r=2, init_lora_weights=False)
    if how == "transformers":
        base.add_adapter(settings)
        return base, base
    return peft.get_peft_model(base, settings), base


@pytest.mark.parametrize(
    ("how", "around", "message"),
    [
        ("transformers", True, r"q_proj.lora_A.default.weight and 5 more\).*: model.save_pretrained\(folder\) saves"),
        ("peft", True, r"q_proj.lora_A.default.weight and 5 more\).*save_pretrained\(folder\) of the PeftModel"),
        ("peft", False, r"q_proj.lora_A.default.weight and 5 more\).*save_pretrained\(folder\) of the PeftModel"),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_save_of_a_model_with_a_live_lora(how, around, message, merged, tmp_path):
    model, base = with_lora(how)
    for layer in base.modules():
        if merged and isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.merge()
    with pytest.warns(UserWarning, match=message) as said:
        apt_kernels.save(model if around else base, tmp_path)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.load(llama(), tmp_path)  # of the same base, though a LoRA was merged into its weights


def test_save_of_a_model_with_trained_prompt_embeddings(tmp_path):
    base = apt_kernels.patch(llama(), prefix_length=4)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.warns(UserWarning, match="prompt_encoder.*save_pretrained"):
        apt_kernels.save(model, tmp_path)


@pytest.mark.parametrize("how", ["transformers", "peft"])
def test_what_saves_a_lora_says_nothing(how, tmp_path):
    model, _ = with_lora(how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(weights of PEFT|since the patch)")
        model.save_pretrained(tmp_path)


def same(folder, expected, build=llama):
    """Whether the adapter in ``folder`` gives these logits, and `unpatch` the base."""
    base = build()
    before = base(input_ids=IDS).logits
    torch.testing.assert_close(apt_kernels.load(base, folder)(input_ids=IDS).logits, expected)
    assert torch.equal(apt_kernels.unpatch(base)(input_ids=IDS).logits, before)


def test_merge_adapter_and_then_unload(tmp_path):
    model, _ = with_lora("peft")
    expected = model(input_ids=IDS).logits
    model.merge_adapter()
    apt_kernels.save(model.unload(), tmp_path)
    same(tmp_path, expected)


def test_a_lora_on_a_tied_head_is_merged(tmp_path):
    def tied():
        return llama(tie_word_embeddings=True)

    model, _ = with_lora("peft", tied, ("lm_head",))
    merged = model.merge_and_unload()
    expected = merged(input_ids=IDS).logits
    apt_kernels.save(merged, tmp_path)
    same(tmp_path, expected, tied)


def test_what_the_user_trained_and_froze_again_is_named(tmp_path):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    model.lm_head.requires_grad_(True)
    torch.nn.init.normal_(model.lm_head.weight)
    expected = model(input_ids=IDS).logits
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"lm_head.weight changed since the patch and would not be in the adapter"):
        apt_kernels.save(model, tmp_path)
    model.lm_head.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.save(model, tmp_path)
    same(tmp_path, expected)


def conformer():
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_kernel=(3,), conv_stride=(2,), num_feat_extract_layers=1, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_depthwise_kernel_size=3, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return transformers.Wav2Vec2ConformerForCTC(config)


def test_running_statistics_that_training_changed_are_named(tmp_path):
    model, sound = apt_kernels.patch(conformer(), prefix_length=2), torch.randn(2, 400)
    model.eval()(input_values=sound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apt_kernels.save(model, tmp_path)
    model.train()(input_values=sound)
    with pytest.warns(UserWarning, match=r"batch_norm\.running_mean and 2 more changed since the patch.*in eval mode"):
        apt_kernels.save(model, tmp_path)


def test_save_pretrained_of_one_of_two_adapters(tmp_path):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    stir(apt_kernels.add_adapter(model, "b", prefix_length=2))
    with pytest.warns(UserWarning, match="active adapter, 'b', alone; 'default' changed since the last save"):
        model.save_pretrained(tmp_path / "b")
    apt_kernels.save(model, tmp_path / "default", adapter="default")
    other = apt_kernels.load(llama(), tmp_path / "default")
    apt_kernels.add_adapter(other, "new")
    for each in (model, other):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            each.save_pretrained(tmp_path / "again")


def test_casts_and_moves_are_no_changes(tmp_path):
    model = apt_kernels.patch(bert(), prefix_length=4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*since the patch")
            apt_kernels.save(model.to(dtype), tmp_path)
