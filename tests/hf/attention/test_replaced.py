"""Attention functions from before a patch: kept in layers without a prefix, replaced or refused elsewhere."""

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import apt_kernels
from helpers import models
from helpers.patched import randomise

CALLED = []


def plain(module, query, key, value, attention_mask, **kwargs):
    CALLED.append((module, attention_mask))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)


def sharper(module, query, key, value, attention_mask, scaling=None, **kwargs):
    CALLED.append((module, attention_mask))
    scaling = 3 * query.shape[-1] ** -0.5
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def failing(module, *args, **kwargs):
    raise ValueError("only on Sundays")


AttentionInterface.register("test_plain", plain)
AttentionMaskInterface.register("test_plain", sdpa_mask)
AttentionInterface.register("test_plain_without_masks", plain)
AttentionInterface.register("test_sharper", sharper)
AttentionMaskInterface.register("test_sharper", sdpa_mask)
AttentionInterface.register("test_failing", failing)


def build(name, family="llama"):
    model = models.build(family)
    model.set_attn_implementation(name)
    return model


def outputs(model, given):
    """What the attention modules return, in order."""
    found, handles = [], []
    for layer in model.model.layers:
        handles.append(layer.self_attn.register_forward_hook(lambda module, args, output: found.append(output[0])))
    model(**given)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["test_plain", "test_plain_without_masks", "test_sharper", "sdpa", "eager"])
def test_layers_without_a_prefix_keep_the_function_they_had(name, padding):
    model, given = build(name), models.inputs("llama", padding)
    CALLED.clear()
    expected = outputs(model, given)
    masks = [mask for _, mask in CALLED]
    if name in ("test_sharper",):
        apt_kernels.patch(copy.deepcopy(build("sdpa")), layers=[1])
        with pytest.raises(apt_kernels.PatchError, match="other outputs than softmax attention"):
            apt_kernels.patch(model, layers=[1])
        assert model.config._attn_implementation == name
        assert all(map(torch.equal, outputs(model, given), expected))
        return
    if name.startswith("test"):
        with pytest.warns(UserWarning, match=f"{name!r} of 1 modules"):
            apt_kernels.patch(model, layers=[1])
    else:
        apt_kernels.patch(model, layers=[1])
    randomise(model)
    CALLED.clear()
    found = outputs(model, given)
    assert torch.equal(found[0].nan_to_num(), expected[0].nan_to_num())
    assert not torch.allclose(found[1], expected[1])
    if name.startswith("test"):
        assert [module for module, _ in CALLED] == [model.model.layers[0].self_attn]
        assert (CALLED[0][1] is None) == (masks[0] is None)
        assert masks[0] is None or torch.equal(CALLED[0][1], masks[0])
    CALLED.clear()
    with apt_kernels.disabled(model):
        assert all(map(torch.equal, outputs(model, given), expected))
    assert len(CALLED) == 2 * name.startswith("test")
    assert all(map(torch.equal, outputs(apt_kernels.unpatch(model), given), expected))


@torch.no_grad()
def test_a_function_that_changes_the_scores_stays_where_there_is_no_prefix():
    """It is refused only where a prefix would replace it."""
    model, given = build("sdpa", "t5"), models.inputs("t5")
    config = model.encoder.config
    config._attn_implementation_internal = "test_sharper"
    encoder = [module for module in model.encoder.modules() if hasattr(module, "relative_attention_num_buckets")]
    for module in encoder:
        assert module.config is config or module.config._attn_implementation == "sdpa"
    with pytest.raises(apt_kernels.PatchError):
        apt_kernels.patch(model, layers="encoder")
    apt_kernels.patch(model, layers="cross")
    assert model(**given).logits.isfinite().all()


def test_a_function_that_cannot_be_compared_is_refused_by_name():
    model = build("test_failing")
    with pytest.raises(apt_kernels.PatchError, match=r"'test_failing'.*ValueError: only on Sundays"):
        apt_kernels.patch(model)
    assert model.config._attn_implementation == "test_failing"
    assert not any("apt_before" in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_added_adapter_is_checked_too():
    with pytest.warns(UserWarning, match="test_plain"):
        model = apt_kernels.patch(build("test_plain"), layers=[1])
    model.model.layers[0].self_attn.apt_before = "test_sharper"  # as if that layer had a config of its own
    expected = model(**models.inputs("llama")).logits
    with pytest.raises(apt_kernels.PatchError, match="other outputs than softmax attention"):
        apt_kernels.add_adapter(model, "b", layers=[0])
    assert list(apt_kernels.adapters(model)) == ["default"]
    assert torch.equal(model(**models.inputs("llama")).logits, expected)


@torch.no_grad()
def test_the_weights_of_eager_layers_without_a_prefix_are_returned():
    model = build("eager")
    weights = model(**models.inputs("llama"), output_attentions=True).attentions
    apt_kernels.patch(model, layers=[1])
    with pytest.warns(UserWarning, match="output_attentions"):
        found = model(**models.inputs("llama"), output_attentions=True).attentions
    assert torch.equal(found[0], weights[0])
    assert isinstance(model, transformers.LlamaForCausalLM)
