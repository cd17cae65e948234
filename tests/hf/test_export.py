"""Exported adapters: folded prefixes, caches and PEFT checkpoints give the logits of the patched model."""

import copy
import json

import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.causal import EXACT, build, close
from helpers.patched import assert_unchanged, randomise, snapshot

LENGTH = 5


def patched(base, gate="static", **settings):
    """A patched copy of the base with random prefix values."""
    return randomise_(apt_kernels.patch(copy.deepcopy(base), prefix_length=LENGTH, gate=gate, **settings))


def randomise_(model):
    randomise(model)
    return model


def tokens(batch=2, length=9, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "t5", "gpt2"])
def test_fold_gives_the_same_attention_without_gate_and_scale(family, gate):
    base, given = models.build(family).double(), models.inputs(family, "right")
    model = patched(base, gate, reparameterisation=3 if family == "qwen3" else None)
    before = snapshot(model)
    found = apt_kernels.fold(model)
    assert_unchanged(model, before)
    assert list(found) == list(apt_kernels.prefixes(model))
    plain = apt_kernels.patch(copy.deepcopy(base), prefix_length=LENGTH, gate="none", layer_scale=False)
    with torch.no_grad():
        for name, prefix in apt_kernels.prefixes(plain).items():
            key, value = found[name]
            assert key.dtype == value.dtype == torch.float32
            prefix.key.copy_(key), prefix.value.copy_(value)
    assert (logits(model, **given) - logits(base, **given)).abs().max() > 1e-2
    # The folded tensors and the prefix of `plain` are float32, everything else is float64.
    torch.testing.assert_close(logits(plain, **given), logits(model, **given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "gate"), [("llama", "token"), ("llama", "first"), ("bert", "mean")])
def test_gates_that_depend_on_the_input_are_refused(family, gate, tmp_path):
    model = patched(models.build(family), gate)
    calls = [apt_kernels.fold]
    if family == "llama":
        calls += [apt_kernels.as_past_key_values, lambda model: apt_kernels.export(model, tmp_path / "x")]
    for call in calls:
        with pytest.raises(apt_kernels.PatchError, match=f"gate='{gate}', whose weights depend on the input"):
            call(model)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("gate", ["none", "static"])
@pytest.mark.parametrize("case", EXACT)
def test_the_base_continues_from_the_cache(case, gate):
    base, given = build(case), tokens()
    model = patched(base, gate)
    before = snapshot(model)
    cache = apt_kernels.as_past_key_values(model, 2, max_length=20)
    assert_unchanged(model, before)
    assert cache.get_seq_length() == LENGTH
    close(logits(base, given, past_key_values=cache), logits(model, given), logits(base, given))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_padded_rows_and_generation_from_the_cache(family):
    base, given = models.build(family).double(), models.inputs(family, "left")
    model = patched(base)
    ids, mask = given["input_ids"], given["attention_mask"]
    rows, longer = len(ids), torch.nn.functional.pad(mask, (LENGTH, 0), value=1)
    found = logits(base, ids, attention_mask=longer, past_key_values=apt_kernels.as_past_key_values(model, rows))
    expected, bare = logits(model, **given), logits(base, **given)
    close(found[mask.bool()], expected[mask.bool()], bare[mask.bool()])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**given, **options)[:, ids.shape[1] :]
    # `generate` expects ids for all tokens in the cache; those of the prefix can have any value.
    found = base.generate(
        torch.nn.functional.pad(ids, (LENGTH, 0), value=7),
        attention_mask=longer,
        past_key_values=apt_kernels.as_past_key_values(model, rows),
        **options,
    )[:, LENGTH + ids.shape[1] :]
    assert torch.equal(found, expected)
    assert not torch.equal(expected, base.generate(**given, **options)[:, ids.shape[1] :])


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize(("family", "overrides"), [("gpt2", {}), ("opt", {}), ("llama", DYNAMIC), ("qwen3", {})])
def test_position_ids_from_zero_serve_any_positions(family, overrides):
    base, given = models.build(family, **overrides).double(), tokens()
    model = patched(base)
    cache = apt_kernels.as_past_key_values(model, 2, first_position=0)
    found = logits(base, given, position_ids=torch.arange(9)[None], past_key_values=cache)
    close(found, logits(model, given), logits(base, given))


def bloom():
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    return transformers.BloomForCausalLM(config).eval()


REFUSED = {
    "gpt2": (lambda: models.build("gpt2"), {}, "learned absolute positions.*first_position=0"),
    "bert": (lambda: models.build("bert"), {}, r"attention\.self is self-attention; a key/value cache holds causal"),
    "t5": (lambda: models.build("t5"), {}, r"encoder\.block\.0.* is self-attention; a key/value cache"),
    "t5 decoder": (lambda: models.build("t5"), {"layers": "decoder"}, "is cross-attention; a key/value cache"),
    "bart": (lambda: models.build("bart"), {"layers": r"decoder.*self_attn"}, "tokens and .* has 0; a key/value cache"),
    "dynamic": (lambda: models.build("llama", **DYNAMIC), {}, "depend on the length.*first_position=0"),
    "alibi": (bloom, {}, r"adds a bias by position \(ALiBi\)"),
    "window": (lambda: models.build("mistral", sliding_window=12), {}, "window of 12 .*max_length, at most 7"),
    "narrow": (lambda: models.build("gemma3"), {}, "window of 5 .* no token is left beside it"),
    "lengths": (lambda: models.build("llama"), {"prefix_length": (5, 3)}, "has 5 prefix tokens and .* has 3"),
    "layers": (lambda: models.build("llama"), {"layers": 0}, "has 5 prefix tokens and .* has 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(case, tmp_path):
    make, settings, message = REFUSED[case]
    model = apt_kernels.patch(make(), **{"prefix_length": LENGTH, "gate": "static", **settings})
    randomise(model)
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=message):
        apt_kernels.export(model, tmp_path / "x")
    with pytest.raises(apt_kernels.PatchError, match=message):
        apt_kernels.as_past_key_values(model)
    assert_unchanged(model, before)
    assert not (tmp_path / "x").exists()


def test_a_window_serves_as_many_tokens_as_fit_beside_the_prefix(tmp_path):
    base = models.build("mistral", sliding_window=14).double()
    model, given = patched(base), tokens(length=9)
    with pytest.raises(apt_kernels.PatchError, match="window of 14"):
        apt_kernels.export(model, tmp_path, max_length=10)
    cache = apt_kernels.as_past_key_values(model, 2, max_length=9)
    close(logits(base, given, past_key_values=cache), logits(model, given), logits(base, given))
    # One more token, and the prefix leaves the window: the limit is not lower than necessary.
    given = tokens(length=10)
    cache = apt_kernels.as_past_key_values(model, 2, max_length=9)
    apart = logits(base, given, past_key_values=cache) - logits(model, given)
    assert apart.abs().max() > 1e-2


def test_beams_and_cropping_of_the_cache():
    base = models.build("qwen3").double()
    model, given = patched(base), tokens()
    rows, beams = given.shape[0], 3
    options = {"num_beams": beams, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt, cache = torch.nn.functional.pad(given, (LENGTH, 0)), apt_kernels.as_past_key_values(model, rows * beams)
    found = base.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    expected = model.generate(given, attention_mask=torch.ones_like(given), **options)
    assert torch.equal(found[:, LENGTH:], expected)
    cache = apt_kernels.as_past_key_values(model, rows)
    logits(base, given, past_key_values=cache)
    cache.crop(-4)
    found = logits(base, given[:, -4:], past_key_values=cache)
    close(found, logits(model, given)[:, -4:], logits(base, given)[:, -4:])


@pytest.mark.parametrize("format", ["peft", "cartridge"])
@pytest.mark.parametrize("case", EXACT)
def test_peft_computes_the_same_from_an_exported_checkpoint(case, format, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base, given = build(case), tokens()
    model = patched(base)
    report = apt_kernels.export(model, tmp_path, format, max_length=20)
    assert (report.length, report.layers, report.difference) == (LENGTH, 2, None)
    expected, bare = logits(model, given), logits(base, given)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    mask = torch.ones_like(given)
    # PEFT passes the prefix in float32, and computes rotary angles in float32.
    close(logits(theirs, given, attention_mask=mask), expected, bare)
    back = apt_kernels.patch_from_peft(copy.deepcopy(base), tmp_path, gate="none")
    close(logits(back, given), expected, bare)
    for name, (key, value) in apt_kernels.fold(model).items():
        prefix = apt_kernels.prefixes(back)[name]
        # Keys were rotated by M and back, in float32.
        torch.testing.assert_close(prefix.key.float(), key, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(prefix.value.float(), value, rtol=1e-5, atol=1e-6)


def test_the_mean_gate_is_exported_when_asked_and_the_difference_reported(tmp_path):
    base = models.build("llama").double()
    model = patched(base, "token")
    batches = [models.inputs("llama", "right", seed=seed) for seed in (0, 1)]
    report = apt_kernels.export(model, tmp_path, approximate="mean", batches=iter(batches))
    weights = {layer.name: layer.effective for layer in apt_kernels.probe(model, batches).layers}
    plain = apt_kernels.patch(copy.deepcopy(base), prefix_length=LENGTH, gate="none", layer_scale=False)
    back = apt_kernels.patch_from_peft(copy.deepcopy(base), tmp_path, gate="none", layer_scale=False)
    with torch.no_grad():
        for name, prefix in apt_kernels.prefixes(plain).items():
            own, factor = apt_kernels.prefixes(model)[name], torch.tensor(weights[name])[:, None]
            prefix.key.copy_(own.key * factor), prefix.value.copy_(own.value * factor)
    apart, moved = [], []
    for given in batches:
        real = given["attention_mask"].bool()
        approximation, expected = logits(plain, **given)[real], logits(model, **given)[real]
        torch.testing.assert_close(logits(back, **given)[real], approximation, rtol=2e-4, atol=2e-5)
        apart.append((approximation - expected).abs())
        moved.append((expected - logits(base, **given)[real]).abs())
    apart, moved = torch.cat(apart), torch.cat(moved)
    found = report.difference
    assert found.examples == 6
    assert found.largest == pytest.approx(apart.max().item(), rel=1e-3)
    assert found.mean == pytest.approx(apart.mean().item(), rel=1e-3) != 0
    assert found.influence == pytest.approx(moved.mean().item(), rel=1e-3)
    assert "logits differ by" in str(report)


def test_the_mean_of_a_fixed_gate_is_exact(tmp_path):
    model = patched(models.build("qwen3").double())
    report = apt_kernels.export(model, tmp_path, approximate="mean", batches=[{"input_ids": tokens()}])
    assert report.difference.largest < 1e-4 * report.difference.influence


def test_what_a_checkpoint_would_leave_out_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = patched(models.build("llama"), trainable="lm_head")
    with pytest.raises(apt_kernels.PatchError, match=r"lm_head\.weight was trained beside the prefix"):
        apt_kernels.export(model, tmp_path)
    model = patched(models.build("llama"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(apt_kernels.PatchError, match="parameters of PEFT beside the prefix"):
        apt_kernels.export(wrapped, tmp_path)
    model = patched(models.build("llama"))
    with apt_kernels.disabled(model), pytest.raises(apt_kernels.PatchError, match="the prefix is disabled"):
        apt_kernels.as_past_key_values(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "gguf"}, "format is 'gguf'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"approximate": "median"}, "approximate is 'median'"),
        ({"approximate": "mean"}, "batches is None"),
        ({"batches": []}, "batches is given without approximate"),
    ],
)
def test_arguments_of_export(given, message, tmp_path):
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.export(patched(models.build("llama")), tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"), [({"batch_size": 0}, "batch_size is 0"), ({"first_position": 3}, "first_position is 3")]
)
def test_arguments_of_as_past_key_values(given, message):
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.as_past_key_values(patched(models.build("llama")), **given)


def test_a_copy_that_turns_out_wrong_is_refused(monkeypatch, tmp_path):
    """A cache that gives other outputs is never returned, however the model uses positions."""
    from apt_kernels.hf import export

    monkeypatch.setattr(export, "rotated", lambda module, name, key, here, there: key)
    with pytest.raises(apt_kernels.PatchError, match="with the prefix in the cache, the logits of"):
        apt_kernels.export(patched(models.build("llama")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_checkpoint_names_its_base(tmp_path):
    base = models.build("llama")
    base.config._name_or_path = "owner/base"
    apt_kernels.export(patched(base), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/base"
    assert settings["peft_type"] == "PREFIX_TUNING"
