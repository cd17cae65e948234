"""Modules of a patched model that are replaced, wrapped or removed: the next forward is right, or refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import apt_kernels
from helpers.workflows import bert, llama, stir, token_ids

IDS = token_ids()


def foreign(model):
    """From another model, with its config."""
    model.model.layers[1].self_attn = copy.deepcopy(llama().model.layers[1].self_attn)


def of_the_models_config(model):
    model.model.layers[1].self_attn = LlamaAttention(model.config, 1)


def whole_layer(model):
    model.model.layers[1] = LlamaDecoderLayer(model.config, 1)


def all_layers(model):
    model.model.layers = copy.deepcopy(llama().model.layers)


REPLACED = [foreign, of_the_models_config, whole_layer, all_layers]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("change", REPLACED)
@torch.no_grad()
def test_a_module_with_a_prefix_that_was_replaced(change, copied):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))) if copied else model
    expected, before = model(input_ids=IDS).logits, copy.copy(model.model._modules)
    layers = list(model.model.layers), model.model.layers[1].self_attn
    change(model)
    for call in (model, model.model, lambda **given: model.generate(**given, max_new_tokens=2, pad_token_id=0)):
        with pytest.raises(
            apt_kernels.PatchError, match=r"layers\.[01]\.self_attn has no prefix any more: it was repl"
        ):
            call(input_ids=IDS)
    model.model._modules.update(before)
    model.model.layers[1] = layers[0][1]
    model.model.layers[1].self_attn = layers[1]
    assert torch.equal(model(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_an_encoders_module_that_was_replaced():
    model = stir(apt_kernels.patch(bert(), prefix_length=4))
    model.bert.encoder.layer[2].attention.self = BertSelfAttention(model.config)
    with pytest.raises(apt_kernels.PatchError, match=r"layer\.2\.attention\.self has no prefix any more"):
        model(input_ids=IDS)
    apt_kernels.unpatch(model)
    model(input_ids=IDS)


@torch.no_grad()
def test_a_foreign_module_without_a_prefix_in_the_place_of_one_without():
    """It would get a mask that it cannot read."""
    model = stir(apt_kernels.patch(llama(), prefix_length=4, layers=[2]))
    foreign(model)
    with pytest.raises(apt_kernels.PatchError, match=r"got the mask of a patched model.*put into the model since"):
        model(input_ids=IDS)
    model.model.layers[1].self_attn.config = model.config
    expected = stir(apt_kernels.patch(llama(), prefix_length=4, layers=[2]))(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, expected)


def checkpointed(model, kind=LlamaAttention):
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: isinstance(module, kind)
    )


def checkpointed_layers(model):
    checkpointed(model, LlamaDecoderLayer)


def compiled(model):
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")


@pytest.mark.parametrize("wrap", [checkpointed, compiled])
@torch.no_grad()
def test_wrapped_modules_keep_their_prefix(wrap):
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    expected = model(input_ids=IDS).logits
    wrap(model)
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def two(model):
    """The adapters "default" and "b", which is active."""
    stir(apt_kernels.patch(model, prefix_length=4, gate="static", init_seed=0))
    return stir(apt_kernels.add_adapter(model, "b", prefix_length=3, gate="static", init_seed=0), seed=2)


@pytest.mark.parametrize(
    ("wrap", "first"),
    [(checkpointed, "wrap"), (checkpointed, "patch"), (checkpointed_layers, "patch"), (compiled, "patch")],
)
@torch.no_grad()
def test_wrapped_modules_keep_their_names(wrap, first, tmp_path):
    model, bare = llama(), two(llama())
    if first == "wrap":
        wrap(model)
    two(model)
    if first == "patch":
        wrap(model)
    assert list(apt_kernels.prefixes(model)) == list(apt_kernels.prefixes(bare))
    names = ["default", "b", "__base__"]
    rows = IDS[:1].expand(3, -1)
    expected = bare(input_ids=rows, adapter_names=names).logits
    assert torch.equal(model(input_ids=rows, adapter_names=names).logits, expected)
    for name in ("default", "b"):
        apt_kernels.set_adapter(model, name)
        assert torch.equal(model(input_ids=rows).logits, apt_kernels.set_adapter(bare, name)(input_ids=rows).logits)
        apt_kernels.save(model, tmp_path / name)
        loaded = apt_kernels.load(llama(), tmp_path / name)
        assert torch.equal(loaded(input_ids=rows).logits, model(input_ids=rows).logits)
    assert all(parameter.requires_grad for parameter in apt_kernels.unpatch(model).parameters())


@torch.no_grad()
def test_layers_in_another_order_are_refused_where_adapters_go_by_their_names(tmp_path):
    model = two(llama())
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    for call in (
        lambda: model(input_ids=IDS, adapter_names=["default"] * len(IDS)),
        lambda: apt_kernels.save(model, tmp_path),
        lambda: apt_kernels.set_adapter(model, "default"),
    ):
        with pytest.raises(apt_kernels.PatchError, match=r"0\.self_attn has the prefix of model\.layers\.1\.self_attn"):
            call()
    layers[0], layers[1] = layers[1], layers[0]
    apt_kernels.set_adapter(model, "default")
    model.model.layers = layers[:2]
    with pytest.raises(apt_kernels.PatchError, match=r"layers\.2\.self_attn is no longer there: it was removed"):
        model(input_ids=IDS, adapter_names=["b"] * len(IDS), use_cache=False)


@torch.no_grad()
def test_layers_that_were_removed_or_repeated():
    model = stir(apt_kernels.patch(llama(), prefix_length=4))
    model.model.layers = model.model.layers[:2]
    model(input_ids=IDS, use_cache=False)
    expected = model(input_ids=IDS, use_cache=False).logits
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
