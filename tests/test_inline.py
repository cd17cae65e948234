"""Models that write their attention out: exact in training and decoding, in every setting a user may choose."""

import copy

import columns
import pytest
import torch
from sweep import check, feeds, overrides, shrink
from test_models import randomise

import apt_kernels

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
        with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
            model.gradient_checkpointing_enable()
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(model, ids(), **options), plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", EVERY)
def test_a_half_precision_base_is_as_exact_as_half_precision_is(name):
    exact, plain = build(name)
    half = apt_kernels.patch(copy.deepcopy(plain).to(torch.bfloat16), prefix_length=4, init_seed=0)
    randomise(half)
    for prefix, wanted in zip(apt_kernels.prefixes(half).values(), apt_kernels.prefixes(exact).values()):
        assert prefix.key.dtype == torch.float32
        assert torch.equal(prefix.key, wanted.key.float())
    with torch.no_grad():
        # What half precision costs the model without a prefix is the yardstick: bfloat16 has 8 bits.
        own = (logits(copy.deepcopy(plain).to(torch.bfloat16), ids()).double() - logits(plain, ids())).abs()
        ours = (logits(half, ids()).double() - logits(exact, ids())).abs()
    assert ours.mean() <= 3 * own.mean() + 1e-3
    for each, grad in gradients(half, ids()).items():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()
        assert grad.abs().max() > 0, each


@pytest.mark.parametrize("name", EVERY)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    model, _ = build(name)
    options = {"use_cache": False} if name in CAUSAL else {}
    compiled = torch.compile(model, backend="aot_eager")
    wanted = gradients(model, ids(), **options)
    with torch.no_grad():
        found, eager = logits(compiled, ids(), **options), logits(model, ids(), **options)
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(compiled, ids(), **options).values(), wanted.values(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_the_relative_bias_is_zero_on_prefix_columns_and_its_gradient_flows(name):
    model, _ = build(name, trainable="rel_embeddings", gate="none")
    relative = next(p for n, p in model.named_parameters() if "rel_embeddings.weight" in n)
    prefix = next(iter(apt_kernels.prefixes(model).values()))
    assert gradients(model, ids())[next(n for n, p in model.named_parameters() if p is relative)].abs().max() > 0
    # Prefix keys that outweigh every token: what is left of the relative bias is its share on their columns.
    with torch.no_grad():
        for each in apt_kernels.prefixes(model).values():
            each.key.mul_(0).add_(0)
            each.value.mul_(0)
        weights = relative.clone()
        before = logits(model, ids())
        relative.add_(torch.randn(relative.shape, generator=torch.Generator().manual_seed(3)))
        assert not torch.allclose(logits(model, ids()), before, atol=1e-3)
        relative.copy_(weights)
    assert prefix.key.shape[1] == 4
