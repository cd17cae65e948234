"""A quantised base: its weights stay quantised, the prefix stays float32 and trains."""

import pytest
import torch
import transformers
from torch import nn

import apt_kernels
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot
from helpers.training import head_of, trainer


class Rounded(nn.Module):
    """A minimal quantised linear layer: 8-bit weights in a buffer, one scale per row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


# bitsandbytes packs four-bit weights in blocks of 64 on the CPU.
_WIDE = {"hidden_size": 64, "intermediate_size": 128}
BLOCKS = {
    **dict.fromkeys(("bert", "roberta"), _WIDE),
    "electra": {**_WIDE, "embedding_size": 64},
    **{f: {**_WIDE, "head_dim": 16} for f in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")},
    "gpt2": {"n_embd": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
    "bart": {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128},
}
FAMILIES = models.FAMILIES if models.EVERY else ("bert", "llama", "t5")


def stand_in(model):
    in_place_of_linears(model, Rounded)


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def in_place_of_linears(model, make, keep=()):
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings() and name not in keep:
                setattr(parent, name, make(child))


def bitsandbytes(bits):
    def quantise(model):
        bnb = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")

        def make(linear):
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            if bits == 4:
                made = bnb.nn.Linear4bit(*sizes, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
            made.bias = linear.bias
            return made.to("cpu")  # which quantises

        # T5 casts what enters `wo` to its weight's dtype; transformers never quantises it.
        in_place_of_linears(model, make, keep=("wo",))

    quantise.__name__ = f"bitsandbytes{bits}"
    return quantise


def check(model, given, quantise_first, quantise):
    # The normal start: tokens of the vocabulary differ between a model and its quantised copy.
    model.train()
    if quantise_first:
        quantise(model)
        plain = model(**given).logits.detach()
        apt_kernels.patch(model, prefix_length=3, init="normal", init_seed=0)
    else:
        apt_kernels.patch(model, prefix_length=3, init="normal", init_seed=0)
        quantise(model)
        with apt_kernels.disabled(model):
            plain = model(**given).logits.detach()
    randomise(model)
    for prefix in apt_kernels.prefixes(model).values():
        assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in prefix.parameters())
    logits = model.train()(**given).logits
    assert (logits - plain).abs().max() > 1e-2, "the prefix has no influence"
    logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if ".apt." in n)
    assert all(p.grad is None for n, p in model.named_parameters() if ".apt." not in n)
    return logits.detach()


@pytest.mark.proves("quantised base")
@pytest.mark.parametrize(
    ("family", "quantise"),
    [(f, q) for f in FAMILIES for q in (stand_in, torchao, bitsandbytes(8), bitsandbytes(4))],
)
def test_a_quantised_base_trains_its_prefix(family, quantise):
    given = models.inputs(family, "right")
    before, after = (check(models.build(family, **BLOCKS[family]), given, first, quantise) for first in (True, False))
    torch.testing.assert_close(before, after)


@pytest.mark.proves("Trainer with a base that from_pretrained quantised by bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", models.FAMILIES if models.EVERY else ["llama"])
def test_a_base_quantised_by_transformers(family, bits, tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    base = models.build(family, head_of(family), **BLOCKS[family])
    base.save_pretrained(tmp_path / "base")
    # transformers quantises new heads as well, unless told not to.
    skipped = {"llm_int8_skip_modules": ["classifier"]} if head_of(family) else {}
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **skipped)

    def made():
        torch.manual_seed(0)
        load = type(base).from_pretrained
        model = load(tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32)
        return apt_kernels.patch(model, prefix_length=3, init="normal", init_seed=0)

    assert any("bit" in type(module).__name__ for module in made().modules())
    # On CPUs with AVX-512 bitsandbytes repacks four-bit weights in an evaluation, and training is not the same after.
    options = {"eval_strategy": "no"} if bits == 4 else {}
    whole, expected = trainer(made(), tmp_path / "whole", family, **options)
    whole.train()
    again, found = trainer(made(), tmp_path / "again", family, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert found.by_step == {step: expected.by_step[step] for step in (4, 5, 6)}
    assert "missing keys" not in caplog.text
    unquantised = apt_kernels.patch(base, prefix_length=3)
    assert str(apt_kernels.summary(whole.model)) == str(apt_kernels.summary(unquantised))
    model, given = whole.model.eval(), models.inputs(family)
    with torch.no_grad():
        logits = model(**given).logits
        with apt_kernels.disabled(model):
            assert (model(**given).logits - logits).abs().max() > 1e-2, "the prefix has no influence"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_head_is_refused(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    kind = "AutoModelForSequenceClassification"
    models.build("bert", kind, **BLOCKS["bert"]).save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = getattr(transformers, kind).from_pretrained(tmp_path, quantization_config=quantised, device_map="cpu")
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=r"classifier\.weight would train.*llm_int8_skip_modules"):
        apt_kernels.patch(model)
    assert_unchanged(model, before)
    apt_kernels.patch(model, trainable=r"classifier\.bias")
    with pytest.raises(apt_kernels.PatchError, match=r"classifier\.weight would train"):
        apt_kernels.add_adapter(model, "x")
    assert list(apt_kernels.adapters(model)) == ["default"]


def test_a_head_quantised_by_torchao_is_refused():
    """Its weight has the dtype float32 and requires a gradient, but gets none."""
    model = models.build("bert", "AutoModelForSequenceClassification", **BLOCKS["bert"])
    torchao(model)
    implementation, hooks = model.config._attn_implementation, len(model._forward_pre_hooks)
    with pytest.raises(apt_kernels.PatchError, match=r"classifier\.weight would train.*Int8"):
        apt_kernels.patch(model)
    assert (model.config._attn_implementation, len(model._forward_pre_hooks)) == (implementation, hooks)
    assert not any(".apt." in name for name, _ in model.named_parameters())
