"""Models with inline attention: exact in training and decoding, with every setting."""

import copy

import pytest
import torch

import apt_kernels
from apt_kernels.hf.attention import inline
from helpers import columns, models
from helpers.patched import randomise
from sweep import check, feeds, overrides, shrink

CAUSAL = ("bloom", "falcon", "falcon-new", "falcon-multi-query", "falcon-rotary", "mpt", "gptj", "codegen", "gpt_neo")
BIDIRECTIONAL = ("deberta", "deberta-v2", "mpnet", "rembert", "mobilebert")
EVERY = CAUSAL + BIDIRECTIONAL
FALCON = {
    "falcon": {"alibi": True, "multi_query": False, "new_decoder_architecture": False},
    "falcon-new": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-multi-query": {"alibi": True, "multi_query": True, "new_decoder_architecture": False},
    "falcon-rotary": {"alibi": False, "multi_query": True, "new_decoder_architecture": False},
}


def build(name, dtype=torch.float64, **settings):
    """A tiny model with a random prefix, in evaluation mode, and the model before the patch."""
    kind, model_type = ("causal" if name in CAUSAL else "masked"), name.partition("-")[0] if name in FALCON else name
    given = {**overrides.of(model_type, kind), **FALCON.get(name, {})}
    config = shrink.tiny(model_type, copy.deepcopy(given))
    auto = getattr(check.transformers, feeds.KINDS[kind].auto)
    torch.manual_seed(0)
    plain = auto.from_config(config).to(dtype).eval()
    shrink.perturb(plain)
    patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=4, init_seed=0, **settings)
    randomise(patched)
    return patched, plain


def ids(length=11, seed=0):
    return torch.randint(5, 80, (2, length), generator=torch.Generator().manual_seed(seed))


def logits(model, given, **options):
    return model(input_ids=given, **options).logits


def gradients(model, given, **options):
    model.zero_grad(set_to_none=True)
    logits(model, given, **options).double().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", sorted(FALCON))
def test_every_falcon_equals_the_oracle(name):
    patched, plain = build(name, gate="token")
    patched = patched.double()
    eager, params, context = columns.build(plain, apt_kernels.prefixes(patched))
    with context():
        expected = logits(eager, ids())
    found = logits(patched, ids())
    # Falcon takes its softmax in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(plain, ids())).abs().max() > 1e-2
    found.square().mean().backward()
    expected.square().mean().backward()
    named = dict(patched.named_parameters())
    for each, parameter in params.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(named[each].grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=each: n + m)


@pytest.mark.parametrize("name", CAUSAL)
def test_first_tokens_do_not_depend_on_later_ones(name):
    model, _ = build(name)
    later = ids()
    later[:, 7:] = ids(seed=1)[:, 7:]
    with torch.no_grad():
        before, after, alone = logits(model, ids()), logits(model, later), logits(model, ids()[:, :7])
    # Some of these models compute in float32 whatever their weights are.
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, before[:, :7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-2)


@pytest.mark.parametrize("gate", ["first", "token"])
@pytest.mark.parametrize("name", CAUSAL)
def test_cached_equals_uncached(name, gate):
    model, plain = build(name, gate=gate)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    padded = torch.ones(2, 11, dtype=torch.long)
    padded[1, :3] = 0
    for mask in (torch.ones_like(padded), padded):
        cached, whole = (model.generate(ids(), attention_mask=mask, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-4)
    bare = plain.generate(ids(), attention_mask=mask, **options)
    assert not torch.allclose(torch.stack(bare.logits), torch.stack(cached.logits), atol=1e-2)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_share_a_cache_keep_a_gate_each(model_type):
    torch.manual_seed(0)
    config = shrink.tiny(model_type, overrides.of(model_type, "causal"))
    model = check.transformers.AutoModelForCausalLM.from_config(config).double().eval()
    shrink.perturb(model)
    randomise(apt_kernels.patch(model, prefix_length=4, gate="first").double())
    prompt = model(input_ids=ids()[:, :9], use_cache=True)
    step = model(input_ids=ids()[:, 9:], past_key_values=prompt.past_key_values, use_cache=True).logits
    # These models compute some numbers in float32.
    torch.testing.assert_close(step, logits(model, ids(), use_cache=False)[:, 9:], rtol=1e-4, atol=1e-4)


def test_a_module_that_attends_in_several_layers_has_no_one_first_gate():
    config = shrink.tiny("hrm_text", overrides.of("hrm_text", "causal"))
    model = check.transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(apt_kernels.ConfigError, match="attends more than once in a forward"):
        apt_kernels.patch(model, gate="first")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_gradient_checkpointing_keeps_every_gradient(name, reentrant):
    model, _ = build(name)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = {"use_cache": False} if name in CAUSAL else {}
    plain = gradients(model, ids(), **options)
    assert all(grad.abs().max() > 0 for grad in plain.values())
    if not model.supports_gradient_checkpointing:
        with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
            model.gradient_checkpointing_enable()
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, ids(), **options), plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", EVERY)
def test_a_half_precision_base_is_as_exact_as_half_precision_is(name):
    exact, plain = build(name, init="normal")
    half = apt_kernels.patch(copy.deepcopy(plain).to(torch.bfloat16), prefix_length=4, init="normal", init_seed=0)
    randomise(half)
    for prefix, wanted in zip(apt_kernels.prefixes(half).values(), apt_kernels.prefixes(exact).values()):
        assert prefix.key.dtype == torch.float32
        assert torch.equal(prefix.key, wanted.key.float())
    with torch.no_grad():
        # The tolerance is the error of half precision without a prefix: bfloat16 has 8 bits.
        own = (logits(copy.deepcopy(plain).to(torch.bfloat16), ids()).double() - logits(plain, ids())).abs()
        ours = (logits(half, ids()).double() - logits(exact, ids())).abs()
    assert ours.mean() <= 3 * own.mean() + 1e-3
    for each, grad in gradients(half, ids()).items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        assert grad.abs().max() > 0, each


@pytest.mark.parametrize("name", EVERY if models.EVERY else ("bloom",))
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    model, _ = build(name)
    options = {"use_cache": False} if name in CAUSAL else {}
    wanted = gradients(model, ids(), **options)
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, ids(), **options)
    torch.testing.assert_close(list(found.values()), list(wanted.values()), rtol=1e-4, atol=1e-6)


def test_one_graph_is_refused_with_the_reason():
    torch._dynamo.reset()
    model, _ = build("bloom")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="attention written inline runs outside of graphs"):
        logits(torch.compile(model, fullgraph=True, backend="eager"), ids(), use_cache=False)


@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_the_relative_bias_is_zero_on_prefix_columns_and_its_gradient_flows(name, monkeypatch):
    model, _ = build(name, trainable="rel_embeddings")
    relative = next(n for n, _ in model.named_parameters() if "rel_embeddings.weight" in n)
    assert gradients(model, ids())[relative].abs().max() > 0
    seen = []
    original = inline.attention
    monkeypatch.setattr(inline, "attention", lambda *a, **k: seen.append((a, k)) or original(*a, **k))
    with torch.no_grad():
        logits(model, ids())
        assert len(seen) == 2
        for (query, key, value), options in seen:
            prefix_key = options.pop("prefix_key")
            options |= {"prefix_value": torch.ones_like(prefix_key), "gate": None, "layer_scale": None}
            # The bias has a column for each token and none for the prefix: the op adds zero there.
            assert options["mask"].bias.shape[-1] == key.shape[2] == 11
            assert options["mask"].bias.abs().max() > 1e-2
            keys = torch.cat([prefix_key.to(key.dtype).expand(2, -1, -1, -1), key], dim=2)
            bias = torch.nn.functional.pad(options["mask"].bias, (prefix_key.shape[1], 0))
            scores = query @ keys.mT * options["scale"] + bias
            alone = original(query, key, value, prefix_key, **options)
            share = scores.softmax(-1)[..., : prefix_key.shape[1]].sum(-1, keepdim=True)
            tokens = scores.softmax(-1)[..., prefix_key.shape[1] :] @ value
            torch.testing.assert_close(alone, tokens + share, rtol=1e-5, atol=1e-5)
