"""What `patch` and `unpatch` change, do not change, and refuse."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

import apt_kernels
from apt_kernels.hf.attention import function as attention_function
from apt_kernels.hf.attention import masks
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot


@pytest.mark.proves("unpatch, bit for bit")
@pytest.mark.parametrize("family", models.FAMILIES)
def test_unpatch_restores_the_model_bit_for_bit(family):
    model, given = models.build(family), models.inputs(family, "right")
    next(model.parameters()).requires_grad_(False)
    before, expected = snapshot(model), model(**given).logits
    model.train()
    modes = snapshot(model)["training"]
    assert apt_kernels.patch(model, prefix_length=3) is model
    assert snapshot(model)["training"][0] == modes[0] is True
    model.eval()
    randomise(model)
    assert not torch.equal(model(**given).logits, expected)
    assert apt_kernels.unpatch(model) is model
    assert_unchanged(model, before)
    assert torch.equal(model(**given).logits, expected)


def test_parameters_have_the_stable_names_shapes_and_dtype():
    model = apt_kernels.patch(models.build("qwen3").bfloat16(), prefix_length=[3, 5], gate="token")
    found = apt_kernels.prefixes(model)
    assert list(found) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for name, length in zip(found, (3, 5)):
        prefix = model.get_submodule(name).apt
        assert prefix is found[name]
        assert isinstance(prefix, apt_kernels.AdaptivePrefix)
        assert prefix.key.shape == prefix.value.shape == (2, length, 12)
        assert prefix.gate_weight.shape == (length, 32)
        assert prefix.gate_logits is None
        assert prefix.layer_scale.shape == (1,)
        assert all(type(p) is nn.Parameter and p.dtype == torch.float32 for p in prefix.parameters())
        assert not any(isinstance(m, nn.Linear) for m in prefix.modules())


@pytest.mark.parametrize(
    ("gate", "layer_scale", "expected"),
    [
        ("first", True, {"key", "value", "gate_weight", "layer_scale"}),
        ("static", True, {"key", "value", "gate_logits", "layer_scale"}),
        ("none", True, {"key", "value", "layer_scale"}),
        ("none", False, {"key", "value"}),
    ],
)
def test_each_ablation_is_one_setting_and_starts_as_plain_prefix_tuning(gate, layer_scale, expected):
    given = models.inputs("bert", "right")
    plain = apt_kernels.patch(models.build("bert"), gate="none", layer_scale=False, init_seed=3)
    model = apt_kernels.patch(models.build("bert"), gate=gate, layer_scale=layer_scale, init_seed=3)
    prefix = next(iter(apt_kernels.prefixes(model).values()))
    assert {name for name, _ in prefix.named_parameters()} == expected
    torch.testing.assert_close(model(**given).logits, plain(**given).logits)


@pytest.mark.parametrize(("family", "kinds"), [("bert", {"first"}), ("llama", {"token"}), ("t5", {"first", "token"})])
def test_auto_gate_follows_what_the_attention_sees(family, kinds):
    found = apt_kernels.prefixes(apt_kernels.patch(models.build(family)))
    assert {prefix.gate for prefix in found.values()} == kinds
    if family == "t5":
        assert {n: p.gate for n, p in found.items() if p.cross or "encoder" in n} == {
            n: ("token" if p.cross else "first") for n, p in found.items() if p.cross or "encoder" in n
        }
        assert sum(prefix.cross for prefix in found.values()) == 2


@pytest.mark.parametrize(
    ("family", "head", "trainable"),
    [
        ("bert", "AutoModelForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("bert", "AutoModelForTokenClassification", {"classifier.weight", "classifier.bias"}),
        ("bert", "AutoModelForQuestionAnswering", {"qa_outputs.weight", "qa_outputs.bias"}),
        ("bert", "AutoModelForMultipleChoice", {"classifier.weight", "classifier.bias"}),
        ("llama", "AutoModelForSequenceClassification", {"score.weight"}),
        ("bert", "AutoModelForMaskedLM", set()),
        ("bert", "AutoModel", set()),
        ("llama", "AutoModelForCausalLM", set()),
        ("t5", "AutoModelForSeq2SeqLM", set()),
    ],
)
def test_task_heads_stay_trainable_and_pretrained_ones_freeze(family, head, trainable):
    model = apt_kernels.patch(models.build(family, head))
    found = {n for n, p in model.named_parameters() if p.requires_grad and ".apt." not in n}
    assert found == trainable


def test_trainable_pattern_overrides_the_heads():
    model = apt_kernels.patch(models.build("bert", "AutoModelForSequenceClassification"), trainable=r"LayerNorm\.bias$")
    found = {n for n, p in model.named_parameters() if p.requires_grad and ".apt." not in n}
    assert found
    assert all(n.endswith("LayerNorm.bias") for n in found)


def test_patch_twice_keeps_the_prefixes_and_refuses_other_settings():
    model = apt_kernels.patch(models.build("llama"), prefix_length=4)
    randomise(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    apt_kernels.patch(model, prefix_length=4)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(apt_kernels.PatchError, match="other settings"):
        apt_kernels.patch(model, prefix_length=5)


def test_models_built_from_one_config_do_not_switch_each_other():
    config = models.config("llama")
    a, b = (transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert a.config is b.config
    given, expected = models.inputs("llama", "left"), None
    expected = b(**given).logits
    apt_kernels.patch(a)
    assert b.config._attn_implementation == "sdpa"
    assert torch.equal(b(**given).logits.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_independent(family, copier):
    model, given = apt_kernels.patch(models.build(family)), models.inputs(family)
    randomise(model)
    expected = model(**given).logits
    twin = copier(model)
    assert torch.equal(twin(**given).logits, expected)
    randomise(twin, seed=9)
    assert not torch.equal(twin(**given).logits, expected)
    assert torch.equal(model(**given).logits, expected)
    apt_kernels.unpatch(twin)
    assert torch.equal(model(**given).logits, expected)


def test_a_pickled_model_works_in_a_fresh_process(tmp_path):
    model, given = apt_kernels.patch(models.build("bert")), models.inputs("bert", "right")
    randomise(model)
    torch.save({"model": model, "given": given, "expected": model(**given).logits}, tmp_path / "all.pt")
    code = (
        "import sys, torch; d = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(d['model'](**d['given']).logits, d['expected'])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "all.pt"], check=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_switched_attention_implementation_raises(implementation):
    model = apt_kernels.patch(models.build("llama"))
    model.set_attn_implementation(implementation)
    with pytest.raises(apt_kernels.PatchError, match="switched away"):
        model(**models.inputs("llama"))
    model.set_attn_implementation("apt_kernels")
    model(**models.inputs("llama"))


@pytest.mark.parametrize(
    ("family", "before"), [("bert", "sdpa"), ("bert", "eager"), ("gemma2", "eager"), ("t5", "sdpa"), ("t5", "eager")]
)
def test_layers_of_length_zero_keep_no_prefix_and_attend_as_before(family, before):
    model = models.build(family)
    model.set_attn_implementation(before)
    count = len(apt_kernels.prefixes(apt_kernels.patch(copy.deepcopy(model))))
    given = models.inputs(family, "right")
    lengths = [0] * (count - 1) + [2]

    def keep(into):
        return lambda module, args, output: into.append(output[0] if isinstance(output, tuple) else output)

    first = next(iter(apt_kernels.prefixes(apt_kernels.patch(copy.deepcopy(model)))))
    expected, found = [], []
    model.get_submodule(first).register_forward_hook(keep(expected))
    model(**given)
    patched = apt_kernels.patch(copy.deepcopy(model), prefix_length=lengths)
    patched.get_submodule(first)._forward_hooks.clear()
    patched.get_submodule(first).register_forward_hook(keep(found))
    assert len(apt_kernels.prefixes(patched)) == 1
    patched(**given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    apt_kernels.unpatch(patched)
    assert torch.equal(patched(**given).logits, model(**given).logits)


@pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
def test_a_prompt_of_every_position_still_fits(family):
    model = apt_kernels.patch(models.build(family), prefix_length=7)
    given = models.inputs(family, length=40)
    assert model(**given).logits.isfinite().all()


@pytest.mark.parametrize("gate", ["token", "first"])
def test_packed_documents_compile(gate):
    torch._dynamo.reset()
    model = apt_kernels.patch(models.build("mistral").double(), gate=gate)
    randomise(model)
    ids = models.inputs("mistral", batch=1, length=13)["input_ids"]
    given = {"input_ids": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(8)])[None], "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits)


def test_a_mask_that_tracing_would_misread_stays_dense(monkeypatch):
    monkeypatch.setattr(masks, "_dense_when_traced", set())
    original = masking_utils.sliding_window_overlay
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda window: original(window + 1))
    torch._dynamo.reset()
    model = apt_kernels.patch(models.build("mistral"))
    assert masks._dense_when_traced == {transformers.MistralConfig}
    given = models.inputs("mistral", "right")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).logits, model(**given).logits)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_no_dense_mask_for_causal_window_or_padding(family, padding, monkeypatch):
    seen, original = [], attention_function.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: seen.append(k["mask"]) or original(*a, **k))
    model = apt_kernels.patch(models.build(family))
    model(**models.inputs(family, padding))
    assert seen
    for mask in seen:
        assert mask.dense is None
        assert (mask.bias is not None) == (family == "t5")
        assert padding is None or mask.key_padding is not None or family in models.SEQ2SEQ
    if family in ("mistral", "phi3", "gemma2", "gemma3"):
        assert any(mask.window == (4, None) for mask in seen)


@pytest.mark.parametrize("gate", ["token", "first", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_do_not_see_each_other(family, gate, monkeypatch):
    seen, original = [], attention_function.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: seen.append(k["mask"]) or original(*a, **k))
    model = apt_kernels.patch(models.build(family).double(), gate=gate)
    randomise(model)
    ids = models.inputs(family, batch=1, length=13)["input_ids"]
    positions = torch.cat([torch.arange(5), torch.arange(8)])[None]
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert all(mask.dense is None and mask.query_segments is not None for mask in seen)
    alone = torch.cat([model(input_ids=ids[:, s], use_cache=False).logits for s in (slice(5), slice(5, 13))], dim=1)
    torch.testing.assert_close(packed, alone)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_four_d_mask_of_the_users_own(kind):
    model, given = apt_kernels.patch(models.build("bert").double(), gate="first"), models.inputs("bert", "left")
    randomise(model)
    expected = model(**given).logits
    seen = given["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 12, -1)
    low = torch.finfo(torch.float64).min
    given["attention_mask"] = seen if kind == "bool" else torch.zeros(seen.shape).double().masked_fill(~seen, low)
    torch.testing.assert_close(model(**given).logits, expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_model_on_the_meta_device_can_be_patched(family):
    with torch.device("meta"):
        model = models.build(family)
    found = apt_kernels.prefixes(apt_kernels.patch(model))
    expected = apt_kernels.prefixes(apt_kernels.patch(models.build(family)))
    assert {n: p.gate for n, p in found.items()} == {n: p.gate for n, p in expected.items()}
    assert {prefix.key.device.type for prefix in found.values()} == {"meta"}


def test_half_precision_base_and_prefix():
    given = models.inputs("llama", "left")
    model = apt_kernels.patch(models.build("llama").bfloat16())
    randomise(model)
    mixed = model(**given).logits
    assert mixed.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for prefix in apt_kernels.prefixes(model).values() for p in prefix.parameters())
    mixed.float().sum().backward()
    model.to(torch.bfloat16)  # casts the prefix like any other parameter
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    torch.testing.assert_close(model(**given).logits, mixed, rtol=0.1, atol=0.2)


def test_autocast_takes_the_low_precision_path():
    model, given = apt_kernels.patch(models.build("llama")), models.inputs("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**given).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(**given).logits, rtol=0.1, atol=0.2)


def test_the_seed_fixes_the_start_and_patching_draws_nothing_else():
    a = apt_kernels.patch(models.build("bert"), init_seed=5)
    b = apt_kernels.patch(models.build("bert"), init_seed=5)
    c = apt_kernels.patch(models.build("bert"), init_seed=6)
    key = "bert.encoder.layer.0.attention.self.apt.key"
    assert torch.equal(a.get_parameter(key), b.get_parameter(key))
    assert not torch.equal(a.get_parameter(key), c.get_parameter(key))
    torch.manual_seed(0)
    model = models.build("bert", hidden_dropout_prob=0.5).train()
    state = torch.get_rng_state()
    apt_kernels.patch(model, init_seed=5)
    assert torch.equal(torch.get_rng_state(), state)


BAD = [
    ({"prefix_length": -1}, apt_kernels.ConfigError, "prefix_length is -1"),
    ({"prefix_length": 0}, apt_kernels.ConfigError, "at least one entry"),
    ({"prefix_length": 2.5}, apt_kernels.ConfigError, "prefix_length is 2.5"),
    ({"prefix_length": [1, 2, 3]}, apt_kernels.ConfigError, "3 entries; the model has 2"),
    ({"gate": "last"}, apt_kernels.ConfigError, "gate is 'last'"),
    ({"gate": "mean"}, apt_kernels.ConfigError, "would let a token see later"),
    ({"layer_scale": 1.0}, apt_kernels.ConfigError, "layer_scale is 1.0"),
    ({"init_std": -1.0}, apt_kernels.ConfigError, "init_std is -1.0"),
    ({"trainable": "("}, apt_kernels.ConfigError, "regular expression"),
    ({"trainable": ""}, apt_kernels.ConfigError, "trainable has '', which matches every name"),
    ({"trainable": "no_such_name"}, apt_kernels.ConfigError, "no parameter's name matches"),
    ({"implementation": "cuddn"}, apt_kernels.ImplementationError, "implementation is 'cuddn'"),
    ({"lenght": 3}, apt_kernels.ConfigError, "unknown setting 'lenght'"),
    ({"prefix_lenght": 3}, apt_kernels.ConfigError, "'prefix_lenght' .did you mean 'prefix_length'"),
    ({"trainable": "lm_haed"}, apt_kernels.ConfigError, "matches it .did you mean 'lm_head'"),
]


def test_a_pattern_that_names_a_tied_weight_says_to_which():
    model = models.build("llama", tie_word_embeddings=True)
    before = snapshot(model)
    message = (
        r"lm_head.weight is tied to model.embed_tokens.weight: .*trainable=\['model.embed_tokens.weight'\], or give"
    )
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.patch(model, trainable=["lm_head"])
    assert_unchanged(model, before)
    # What the message says to do.
    apt_kernels.unpatch(apt_kernels.patch(model, trainable=["model.embed_tokens.weight"]))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    apt_kernels.patch(model, trainable=["lm_head"])
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("given", [torch.ones(1, 3).long(), [1, 2], "text", {}, {1: 2}])
def test_example_inputs_that_are_no_arguments(given):
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.ArgumentError, match=r"example_inputs (is a|has the names).*arguments of one small"):
        apt_kernels.patch(model, example_inputs=given)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_bad_settings_change_nothing(settings, error, message):
    model = models.build("llama").train()
    before = snapshot(model)
    with pytest.raises(error, match=message.replace("(", r"\(")):
        apt_kernels.patch(model, **settings)
    assert_unchanged(model, before)


def test_mean_is_refused_on_cross_attention():
    with pytest.raises(apt_kernels.ConfigError, match=r"EncDecAttention is cross-attention"):
        apt_kernels.patch(models.build("t5"), gate="mean", prefix_length=[4, 4, 0, 4, 0, 0])
    with pytest.raises(apt_kernels.ConfigError, match="mean"):
        apt_kernels.patch(models.build("t5"), gate="mean")


def test_models_that_cannot_be_patched_are_refused_by_name_and_unchanged():
    model = transformers.FNetForMaskedLM(transformers.FNetConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50))
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match="FNetForMaskedLM has no attention"):
        apt_kernels.patch(model)
    assert_unchanged(model, before)
    with pytest.raises(apt_kernels.PatchError, match="Linear"):
        apt_kernels.patch(nn.Linear(2, 2))


@pytest.mark.parametrize("gate", ["first", "token", "static"])
def test_attention_that_is_written_out_keeps_its_class_and_travels(gate, tmp_path):
    config = transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=99, n_positions=32)
    model = transformers.GPTJForCausalLM(config).eval()
    given, before = models.inputs("gpt2"), snapshot(model)
    expected = model(**given).logits
    apt_kernels.patch(model, prefix_length=3, gate=gate)
    randomise(model)
    assert {type(m).__name__ for m in model.modules()} >= {"GPTJAttention"}
    found = model(**given).logits
    assert not torch.allclose(found, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**given).logits, found)
        assert torch.equal(apt_kernels.unpatch(twin)(**given).logits, expected)
    apt_kernels.unpatch(model)
    assert_unchanged(model, before)
    assert all(isinstance(type(m), type) and "apt" not in type(m).__module__ for m in model.modules())


def test_a_failing_recording_pass_says_what_to_give():
    config = transformers.PerceiverConfig(
        d_latents=32, d_model=32, num_latents=5, num_blocks=1, num_self_attends_per_block=1, num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )  # fmt: skip
    model = transformers.PerceiverModel(config)
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match="example_inputs"):
        apt_kernels.patch(model)
    assert_unchanged(model, before)
    apt_kernels.patch(model, example_inputs={"inputs": torch.zeros(2, 9, 32)})
    assert len(apt_kernels.prefixes(model)) == 2


def test_a_vision_model_needs_no_example():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    model = apt_kernels.patch(transformers.ViTModel(config))
    assert [prefix.gate for prefix in apt_kernels.prefixes(model).values()] == ["first"]


def test_functions_need_a_patched_model():
    for function in (apt_kernels.unpatch, apt_kernels.prefixes):
        with pytest.raises(apt_kernels.PatchError, match="not patched"):
            function(models.build("bert"))


@pytest.mark.parametrize(
    ("family", "padding"),
    [(family, "right") for family in ("bert", "llama", "mistral", "gemma3", "t5")]
    + [(family, padding) for family in ("bert", "mistral") for padding in ("none given", None)],
)
def test_compiles_in_one_graph_without_a_dense_mask(family, padding, monkeypatch):
    def refuse(*args):
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(masks, "_dense", refuse)
    torch._dynamo.reset()
    model, given = apt_kernels.patch(models.build(family)), models.inputs(family, padding)
    if padding == "none given":
        given.pop("attention_mask")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**given).logits
    compiled.sum().backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    expected = model(**given).logits
    expected.sum().backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(gradient, [p.grad for p in model.parameters() if p.requires_grad])
