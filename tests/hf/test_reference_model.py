"""`reference_model`: the model as it was, frozen, on the same weights of the base model."""

import copy

import peft
import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot


def patched(family="llama", **settings):
    model = apt_kernels.patch(models.build(family), **{"prefix_length": 4, "init_seed": 0, **settings})
    randomise(model)
    return model


def trained(model):
    """Every trainable parameter moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(
    ("family", "gate"), [("llama", "token"), ("gpt2", "static"), ("bert", "first"), ("t5", "token")]
)
def test_it_stays_as_the_model_was(family, gate):
    model, given = patched(family, gate=gate), models.inputs(family, "right")
    before, expected = snapshot(model.train()), copy.deepcopy(model).eval()(**given).logits
    reference = apt_kernels.reference_model(model)
    assert_unchanged(model, before)
    assert type(reference) is type(model)
    assert torch.equal(reference(**given).logits, expected)
    trained(model)
    assert torch.equal(reference(**given).logits, expected)
    assert (model.eval()(**given).logits - expected).abs().max() > 1e-2
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    model(**given).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_without_the_prefix_it_is_the_base_model(family):
    model, given = patched(family), models.inputs(family, "right")
    reference = apt_kernels.reference_model(model, prefix=False)
    with apt_kernels.disabled(model):
        assert torch.equal(reference(**given).logits, model(**given).logits)
    assert torch.equal(reference(**given).logits, models.build(family)(**given).logits)
    assert (reference(**given).logits - model(**given).logits).abs().max() > 1e-2


def test_only_what_trains_is_copied():
    model = patched(trainable=["lm_head"])
    own, copied = dict(model.named_parameters()), dict(apt_kernels.reference_model(model).named_parameters())
    assert own.keys() == copied.keys()
    for name in own:
        assert (copied[name].data_ptr() == own[name].data_ptr()) != own[name].requires_grad, name
    shared = {t.data_ptr() for t in model.buffers() if t.numel()}
    assert shared == {t.data_ptr() for t in apt_kernels.reference_model(model).buffers() if t.numel()}
    frozen = patched()
    next(iter(apt_kernels.prefixes(frozen).values())).requires_grad_(False)  # for now
    reference = apt_kernels.reference_model(frozen)
    for one, other in zip(apt_kernels.prefixes(frozen).values(), apt_kernels.prefixes(reference).values()):
        assert one.key.data_ptr() != other.key.data_ptr()


def test_the_other_adapters_stay_with_the_model():
    model, given = patched(), models.inputs("llama")
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    randomise(model, seed=3)
    expected = model(**given).logits
    reference = apt_kernels.reference_model(model)
    assert list(apt_kernels.adapters(reference)) == ["b"]
    apt_kernels.set_adapter(model, "default")
    assert torch.equal(reference(**given).logits, expected)
    assert list(apt_kernels.adapters(model)) == ["default", "b"]


def test_a_lora_beside_the_prefix_is_copied():
    model, given = patched(), models.inputs("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = wrapped(**given).logits
    reference = apt_kernels.reference_model(wrapped)
    assert isinstance(reference, transformers.LlamaForCausalLM)
    assert torch.equal(reference(**given).logits, expected)
    trained(wrapped)
    assert torch.equal(reference(**given).logits, expected)
    assert (wrapped(**given).logits - expected).abs().max() > 1e-2


def test_a_trained_head_on_a_half_precision_base():
    model = transformers.AutoModelForSequenceClassification.from_config(models.config("llama")).to(torch.bfloat16)
    given = models.inputs("llama")
    apt_kernels.patch(model.eval(), prefix_length=4)
    for prefix in (True, False):
        reference = apt_kernels.reference_model(model, prefix=prefix)
        assert reference.score.weight.dtype == torch.float32
        assert reference.score.weight.data_ptr() != model.score.weight.data_ptr()
        assert torch.equal(reference.score.weight, model.score.weight)
        reference(**given)


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(apt_kernels.PatchError, match="is not patched"):
        apt_kernels.reference_model(models.build("llama"))
    with pytest.raises(apt_kernels.ArgumentError, match="prefix is 1; it needs True or False"):
        apt_kernels.reference_model(patched(), prefix=1)
    model = patched()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(apt_kernels.PatchError, match="the forward of LlamaForCausalLM was replaced"):
        apt_kernels.reference_model(model)
    del model.forward
    apt_kernels.reference_model(model)
    holder = torch.nn.Module()
    holder.base, holder.more = model, torch.nn.Linear(2, 2)
    holder.get_base_model, holder.peft_config = lambda: model, {}
    with pytest.raises(apt_kernels.PatchError, match=r"more\.weight is a parameter of the Module outside"):
        apt_kernels.reference_model(holder)


def test_an_offloaded_model_is_refused():
    from accelerate import cpu_offload

    model = patched()
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(apt_kernels.PatchError, match="accelerate offloads weights"):
        apt_kernels.reference_model(model)
