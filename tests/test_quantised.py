"""A quantised base: its weights stay quantised, the prefix stays float32 and trains."""

import models
import pytest
import torch
import transformers
from test_models import randomise
from test_trainer import own_accelerator_state, trainer  # noqa: F401 - a fixture
from torch import nn

import apt_kernels


class Rounded(nn.Module):
    """A stand-in for a quantised linear layer: 8-bit weights in a buffer, one scale a row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


# bitsandbytes packs four-bit weights in blocks of 64 on the CPU.
BLOCKS = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128},
}


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
    model.train()
    if quantise_first:
        quantise(model)
        plain = model(**given).logits.detach()
        apt_kernels.patch(model, prefix_length=3, init_seed=0)
    else:
        apt_kernels.patch(model, prefix_length=3, init_seed=0)
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
    [(f, q) for f in (models.FAMILIES if models.EVERY else BLOCKS) for q in (stand_in, torchao)]
    + [(f, bitsandbytes(bits)) for f in BLOCKS for bits in (8, 4)],
)
def test_a_quantised_base_trains_its_prefix(family, quantise):
    given = models.inputs(family, "right")
    sizes = BLOCKS.get(family, {})
    before, after = (check(models.build(family, **sizes), given, first, quantise) for first in (True, False))
    torch.testing.assert_close(before, after)


@pytest.mark.proves("Trainer with a base that from_pretrained quantised by bitsandbytes")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["llama"])
def test_a_base_quantised_by_transformers(family, bits, tmp_path, caplog):
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    models.build(family, **BLOCKS[family]).save_pretrained(tmp_path / "base")
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def made():
        torch.manual_seed(0)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(tmp_path / "base", quantization_config=quantised, device_map="cpu", dtype=torch.float32)
        return apt_kernels.patch(model, prefix_length=3, init_seed=0)

    assert any("bit" in type(module).__name__ for module in made().modules())
    # On CPUs with AVX-512 bitsandbytes repacks four-bit weights in an evaluation, and training is not the same after.
    options = {"eval_strategy": "no"} if bits == 4 else {}
    whole, expected = trainer(made(), tmp_path / "whole", family, **options)
    whole.train()
    again, found = trainer(made(), tmp_path / "again", family, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert found.by_step == {step: expected.by_step[step] for step in (4, 5, 6)}
    assert "missing keys" not in caplog.text
    model, given = whole.model.eval(), models.inputs(family)
    with torch.no_grad():
        logits = model(**given).logits
        with apt_kernels.disabled(model):
            assert (model(**given).logits - logits).abs().max() > 1e-2, "the prefix has no influence"
