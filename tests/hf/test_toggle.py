"""Disabling the prefix, several named adapters, the choice of layers, and the summary."""

import contextlib
import copy
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import apt_kernels
from helpers import models, oracle
from helpers.patched import assert_unchanged, randomise, snapshot


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.proves("prefix off and on by a context manager")
@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()  # T5's bias needs a gradient before the patch and none after it: torch picks another kernel
def test_disabled_is_the_unpatched_model_bit_for_bit(family):
    model, given = models.build(family), models.inputs(family, "right")
    expected = model(**given).logits
    randomise(apt_kernels.patch(model, prefix_length=3))
    patched = model(**given).logits
    with apt_kernels.disabled(model) as same:
        assert same is model
        with apt_kernels.disabled(model):
            assert torch.equal(model(**given).logits, expected)
        assert torch.equal(model(**given).logits, expected)
    with pytest.raises(RuntimeError), apt_kernels.disabled(model):
        raise RuntimeError
    assert torch.equal(model(**given).logits, patched)
    assert not close(patched, expected)


@torch.no_grad()
def test_an_inline_model_is_switched_and_changes_adapters():
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model, ids = transformers.BloomForCausalLM(config).eval(), models.inputs("llama")["input_ids"]
    expected = model(ids).logits
    randomise(apt_kernels.patch(model))
    patched = model(ids).logits
    with apt_kernels.disabled(model):
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model(ids).logits, patched)
    apt_kernels.add_adapter(model, "x", layers=[1])
    randomise(model, seed=2)
    assert not close(model(ids).logits, patched)
    assert torch.equal(apt_kernels.set_adapter(model, "default")(ids).logits, patched)
    assert torch.equal(apt_kernels.unpatch(model)(ids).logits, expected)


@pytest.mark.parametrize("backward_in", ["this thread", "another thread"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_is_recomputed_as_it_was_in_the_forward(reentrant, backward_in):
    """On a GPU the backward, and so the recomputation, runs in a thread of autograd."""
    model = apt_kernels.patch(models.build("llama").double(), trainable="norm").double().train()
    randomise(model)
    given = models.inputs("llama")
    embeds = model.get_input_embeddings()(given.pop("input_ids")).detach()

    def gradients(forward_disabled, backward_disabled):
        model.zero_grad()
        with apt_kernels.disabled(model) if forward_disabled else contextlib.nullcontext():
            loss = model(inputs_embeds=embeds, **given, use_cache=False).logits.square().sum()

        def backward():
            with apt_kernels.disabled(model) if backward_disabled else contextlib.nullcontext():
                loss.backward()

        if backward_in == "another thread":
            with ThreadPoolExecutor() as pool:
                pool.submit(backward).result()
        else:
            backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected = {off: gradients(off, off) for off in (False, True)}
    assert expected[True].keys() < expected[False].keys()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for off in (False, True):
        for backward_off in (False, True):
            torch.testing.assert_close(gradients(off, backward_off), expected[off])


@pytest.mark.proves("several named adapters")
@pytest.mark.parametrize("family", models.some(models.FAMILIES))
def test_adapters_do_not_touch_each_other(family, tmp_path):
    head = "AutoModelForSequenceClassification" if family in models.ENCODERS else None
    model, given = models.build(family, head), models.inputs(family, "right")
    pristine = copy.deepcopy(model)
    apt_kernels.patch(model, prefix_length=3)
    outputs = {}

    def learn(name, seed):
        randomise(model, seed=seed)
        for parameter in (p for n, p in model.named_parameters() if p.requires_grad and ".apt." not in n):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        outputs[name] = model(**given).logits
        apt_kernels.save(model, tmp_path / name)

    learn("default", 1)
    assert apt_kernels.add_adapter(model, "other", prefix_length=5, gate="static") is model
    assert next(iter(apt_kernels.prefixes(model).values())).length == 5
    learn("other", 2)
    apt_kernels.add_adapter(model, "few", prefix_length=2, layers=[-1])
    learn("few", 3)
    assert list(apt_kernels.adapters(model)) == ["few", "default", "other"]
    for name in ("default", "other", "few", "other"):
        apt_kernels.set_adapter(model, name)
        assert torch.equal(model(**given).logits, outputs[name])
        alone = apt_kernels.load(copy.deepcopy(pristine), tmp_path / name)
        assert torch.equal(alone(**given).logits, outputs[name])
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in alone.named_parameters() if p.requires_grad
        }
    twin = copy.deepcopy(model)
    apt_kernels.set_adapter(twin, "few")
    assert torch.equal(twin(**given).logits, outputs["few"])
    apt_kernels.delete_adapter(model, "few")
    assert list(apt_kernels.adapters(model)) == ["other", "default"]
    assert not close(outputs["default"], outputs["other"])


def test_adapters_are_named_in_every_refusal():
    model = apt_kernels.patch(models.build("llama"))
    before = snapshot(model)
    with pytest.raises(apt_kernels.ConfigError, match="'x'; the model has the adapters 'default'"):
        apt_kernels.set_adapter(model, "x")
    with pytest.raises(apt_kernels.ConfigError, match="already has an adapter"):
        apt_kernels.add_adapter(model, "default")
    with pytest.raises(apt_kernels.ConfigError, match="mean"):
        apt_kernels.add_adapter(model, "x", gate="mean")
    with pytest.raises(apt_kernels.ConfigError, match="an active adapter"):
        apt_kernels.delete_adapter(model, "default")
    with pytest.raises(apt_kernels.ConfigError, match="not empty"):
        apt_kernels.add_adapter(model, "")
    assert_unchanged(model, before)
    apt_kernels.add_adapter(model, "x")
    with apt_kernels.disabled(model), pytest.raises(apt_kernels.PatchError, match="disabled"):
        apt_kernels.set_adapter(model, "default")


def test_a_cache_of_one_adapter_is_refused_by_another():
    model, given = apt_kernels.patch(models.build("llama"), gate="first"), models.inputs("llama")
    cache = model(**given, use_cache=True).past_key_values
    apt_kernels.add_adapter(model, "x", gate="first")
    with pytest.raises(apt_kernels.PatchError, match="another adapter"):
        model(given["input_ids"], past_key_values=cache)


def test_unpatching_with_another_adapter_active_restores_the_base():
    model, given = models.build("bert"), models.inputs("bert")
    before, expected = snapshot(model), model(**given).logits
    apt_kernels.patch(model, trainable=r"LayerNorm\.bias$")
    torch.nn.init.normal_(model.get_parameter("bert.encoder.layer.0.output.LayerNorm.bias"))
    apt_kernels.add_adapter(model, "x")  # trains no base weight: it sees them as they were
    assert torch.equal(apt_kernels.unpatch(model)(**given).logits, expected)
    assert_unchanged(model, before)


BART_CROSS = [f"model.decoder.layers.{i}.encoder_attn" for i in (0, 1)]
CHOICES = [
    ("llama", 0, ["model.layers.0.self_attn"]),
    ("llama", -1, ["model.layers.1.self_attn"]),
    ("llama", r"layers\.1\.", ["model.layers.1.self_attn"]),
    ("bart", "cross", BART_CROSS),
    ("bart", ["encoder"], [f"model.encoder.layers.{i}.self_attn" for i in (0, 1)]),
    ("bart", ["cross", 0], ["model.encoder.layers.0.self_attn", *BART_CROSS]),
    ("t5", "decoder", [f"decoder.block.{i}.layer.{j}" for i in (0, 1) for j in (0, 1)]),
    ("t5", "self", [f"{side}.block.{i}.layer.0" for side in ("encoder", "decoder") for i in (0, 1)]),
]


def chosen(way, names):
    """Settings that select layers in this ``way``, and the selected modules."""
    if way == "index":
        return {"layers": -1}, names[-1:]
    if way == "name":
        return {"layers": rf"^{re.escape(names[0])}$"}, names[:1]
    if way == "kind":
        return {"layers": "self"}, [name for name in names if not name.endswith(("encoder_attn", "EncDecAttention"))]
    return {"prefix_length": [3, 0] * (len(names) // 2)}, names[::2]


@pytest.mark.proves("which layers, by name, index or kind; a length each")
@pytest.mark.parametrize("way", ["index", "name", "kind", "a length each"])
@pytest.mark.parametrize("family", models.some(models.FAMILIES))
def test_the_layers_that_are_asked_for_have_the_prefix_and_no_others(family, way, tmp_path):
    plain, given = models.build(family).double(), models.inputs(family)
    settings, names = chosen(way, list(apt_kernels.prefixes(apt_kernels.patch(copy.deepcopy(plain)))))
    model = apt_kernels.patch(copy.deepcopy(plain), **{"prefix_length": 3, "gate": "static", **settings})
    randomise(model)
    found = apt_kernels.prefixes(model.double())
    assert {name: prefix.length for name, prefix in found.items()} == dict.fromkeys(names, 3)
    eager, _ = oracle.build(plain, found)
    # Layers without a prefix attend as before the patch: Gemma 2's take their softmax in float32.
    torch.testing.assert_close(model(**given).logits, eager(**given).logits, rtol=1e-4, atol=1e-5)
    assert not close(plain(**given).logits, model(**given).logits)
    apt_kernels.save(model, tmp_path)
    twin = apt_kernels.load(plain, tmp_path).double()
    assert torch.equal(twin(**given).logits, model(**given).logits)


@pytest.mark.proves("which layers, by name, index or kind; a length each")
@pytest.mark.parametrize(
    ("family", "layers", "expected"), CHOICES, ids=lambda v: str(v) if not isinstance(v, list) else ""
)
def test_layers_by_name_index_and_kind(family, layers, expected, tmp_path):
    model, given = apt_kernels.patch(models.build(family), layers=layers), models.inputs(family, "right")
    found = list(apt_kernels.prefixes(model))
    assert [name.removesuffix(".SelfAttention").removesuffix(".EncDecAttention") for name in found] == expected
    randomise(model)
    apt_kernels.save(model, tmp_path)
    twin = apt_kernels.load(models.build(family), tmp_path)
    assert torch.equal(twin(**given).logits, model(**given).logits)
    assert not close(models.build(family)(**given).logits, model(**given).logits)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, "layers has 2; the model has no such attention module"),
        ("cross", "layers has 'cross'"),
        ("nowhere", "layers has 'nowhere'"),
        ([], r"layers is \[\]"),
        (True, "layers has True"),
        ("", "layers has '', which matches every name"),
        (b"x", "layers is b'x'"),
        ("(", "regular expression"),
        ([0, 1.5], "layers has 1.5"),
    ],
)
def test_a_choice_that_means_no_layer_is_refused(layers, message):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.patch(model, layers=layers)
    with pytest.raises(apt_kernels.ConfigError, match="gives each of these modules 0"):
        apt_kernels.patch(model, layers=0, prefix_length=[0, 3])
    assert_unchanged(model, before)


@pytest.mark.proves("summary of what trains")
@pytest.mark.parametrize("family", models.FAMILIES if models.EVERY else ["bert", "bart"])
def test_summary(family):
    model = models.build(family, "AutoModelForSequenceClassification")
    lengths = [0, 5] * (3 if family in models.SEQ2SEQ else 1)
    found = apt_kernels.summary(apt_kernels.patch(model, prefix_length=lengths))
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert [layer.length for layer in found.layers] == lengths
    assert found.trainable == sum(x.parameters for x in found.layers) + sum(size for _, size in found.beside)
    text = str(found)
    assert f"{found.trainable:,} of {found.total:,}" in text
    assert all(layer.name in text for layer in found.layers)
    heads = {"classifier.weight", "score.weight", "classifier.dense.weight", "classification_head.dense.weight"}
    assert heads & set(text.split())
