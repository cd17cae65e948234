"""Multimodal models: a prefix in the text part, in the vision part, or in both."""

import copy

import pytest
import torch
import transformers as t

import apt_kernels
from helpers import oracle
from helpers.patched import randomise
from sweep.shrink import perturb

TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = 90
TOWER = [f"model.vision_tower.encoder.layers.{i}.self_attn" for i in range(2)]
READER = [f"model.language_model.layers.{i}.self_attn" for i in range(2)]


def gemma3():
    vision = {**TEXT, "image_size": 16, "patch_size": 4}
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 4, "initializer_range": 0.2}
    vision["initializer_range"] = 0.2
    config = t.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE)
    torch.manual_seed(0)
    model = t.Gemma3ForConditionalGeneration(config).double().eval()
    perturb(model)  # its projection starts as zeros
    return model


def given():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (2, 11), generator=generator)
    ids[:, 3:7] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, TOWER + READER), ("text", READER), ("vision", TOWER), (["vision", "text"], TOWER + READER)],
)
def test_each_part_and_both_equal_the_oracle(layers, expected):
    plain = gemma3()
    patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=3, layers=layers, init_seed=0).double()
    randomise(patched)
    assert sorted(apt_kernels.prefixes(patched)) == sorted(expected)
    eager, params = oracle.build(plain, apt_kernels.prefixes(patched))
    found, wanted = patched(**given()).logits, eager(**given()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert (found - plain(**given()).logits).abs().max() > 1e-2
    found.square().sum().backward()
    wanted.square().sum().backward()
    named = dict(patched.named_parameters())
    for name, parameter in params.items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-7, atol=1e-9)


def test_tokens_of_one_image_see_each_other_and_no_later_image():
    model, inputs = apt_kernels.patch(gemma3(), prefix_length=3), given()
    later = {**inputs, "input_ids": inputs["input_ids"].clone()}
    later["input_ids"][:, 7:] += 1
    with torch.no_grad():
        before, after = model(**inputs).logits, model(**later).logits
        pixels = inputs["pixel_values"].clone()
        pixels[:, :, 8:] += 1  # the last of the image's tokens
        seen = model(**{**inputs, "pixel_values": pixels}).logits
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:])
    assert not torch.allclose(seen[:, 3], before[:, 3])
    torch.testing.assert_close(seen[:, :3], before[:, :3])


def test_a_part_that_the_model_has_not_is_an_error():
    with pytest.raises(apt_kernels.ConfigError, match="layers has 'audio'"):
        apt_kernels.patch(gemma3(), layers="audio")


def test_a_part_whose_inputs_cannot_be_guessed_is_named(monkeypatch):
    tower = t.SiglipVisionModel
    monkeypatch.setattr(tower, "forward", lambda self, unheard_of: None)
    with pytest.warns(UserWarning, match="model.vision_tower stays without a prefix"):
        model = apt_kernels.patch(gemma3(), prefix_length=3)
    assert list(apt_kernels.prefixes(model)) == READER


def test_whisper_hears_and_reads():
    config = t.WhisperConfig(
        vocab_size=99,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = t.WhisperForConditionalGeneration(config).eval()
    found = apt_kernels.prefixes(apt_kernels.patch(model, layers="audio"))
    assert list(found) == ["model.encoder.layers.0.self_attn"]
    apt_kernels.unpatch(model)
    assert len(apt_kernels.prefixes(apt_kernels.patch(model, layers="text"))) == 2
