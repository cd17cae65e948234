"""Every decoding strategy gives the tokens of recomputing each step without a cache."""

import pytest
import torch
import transformers
from packaging.version import Version

import apt_kernels
from helpers import models
from helpers.generation import NEW, assert_same, generate, tuned

GATES = ("token", "first")
DECODERS = models.some(models.DECODERS)
FAMILIES = DECODERS + models.SEQ2SEQ
every_model = pytest.mark.parametrize(("family", "gate"), [(f, g) for f in FAMILIES for g in GATES])
decoder_only = pytest.mark.parametrize(("family", "gate"), [(f, g) for f in DECODERS for g in GATES])


def prompt(family, padding="left", **options):
    given = models.inputs(family, padding, **options)
    given.pop("decoder_input_ids", None)
    return given


def tokens(model, given, **options):
    return model.generate(**given, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def skip_where_unpatched_fails(family, given, **options):
    """Skip on older releases of transformers if the unpatched model fails, too."""
    if Version(transformers.__version__) >= Version("5.23"):
        return
    plain, why = models.build(family).double(), f"transformers {transformers.__version__}, {family} unpatched: "
    expected = tokens(plain, given, do_sample=False, use_cache=False)
    try:
        found = tokens(plain, given, do_sample=False, **options)
    except Exception as error:  # any error of the unpatched model is the reason
        pytest.skip(f"{why}{type(error).__name__}: {str(error)[:100]}")
    if not torch.equal(found, expected):
        pytest.skip(f"{why}other tokens than without a cache")


@pytest.fixture
def influence():
    """Check that the prefix has an effect: the first step's logits differ from the unpatched model's."""

    def check(model, given):
        patched = generate(model, given)[1][0]
        apt_kernels.unpatch(model)
        assert (patched - generate(model, given)[1][0]).nan_to_num(posinf=0, neginf=0).abs().max() > 1e-2

    return check


@pytest.mark.proves("seeded sampling")
@every_model
def test_seeded_sampling(family, gate, influence):
    model, given = tuned(family, gate), prompt(family)

    def sample(**options):
        torch.manual_seed(3)
        return tokens(model, given, do_sample=True, top_k=20, **options)

    assert torch.equal(sample(), sample(use_cache=False))
    assert torch.equal(sample(num_beams=2), sample(num_beams=2, use_cache=False))
    influence(model, given)


@pytest.mark.proves("prompt-lookup decoding")
@every_model
def test_prompt_lookup(family, gate, influence):
    model, given = tuned(family, gate), prompt(family, None, batch=1)
    given["input_ids"][:, 6:] = given["input_ids"][:, :6]  # something to look up
    skip_where_unpatched_fails(family, given, prompt_lookup_num_tokens=3)
    found = tokens(model, given, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, tokens(model, given, do_sample=False, use_cache=False))
    influence(model, given)


@pytest.mark.proves("assisted decoding")
@pytest.mark.parametrize("patched", [False, True], ids=["plain assistant", "patched assistant"])
@every_model
def test_assisted_decoding(family, gate, patched, influence):
    model, given = tuned(family, gate), prompt(family, None, batch=1)
    skip_where_unpatched_fails(family, given, assistant_model=models.build(family).double())
    assistant = tuned(family, gate) if patched else models.build(family).double()
    found = tokens(model, given, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, tokens(model, given, do_sample=False, use_cache=False))
    influence(model, given)


@pytest.mark.proves("chunked prefill")
@pytest.mark.parametrize("chunk", [1, 3])
@decoder_only
def test_chunked_prefill(family, gate, chunk, influence):
    # Two rows begin with whole chunks of padding: their first real token comes in a later chunk.
    model, given = tuned(family, gate), prompt(family)
    found = generate(model, given, prefill_chunk_size=chunk)
    assert_same(found, generate(model, given, use_cache=False))
    influence(model, given)


@pytest.mark.parametrize("gate", GATES)
def test_chunked_prefill_of_a_static_cache(gate):
    model, given = tuned("llama", gate), prompt("llama")
    found = generate(model, given, prefill_chunk_size=3, cache_implementation="static", disable_compile=True)
    assert_same(found, generate(model, given, use_cache=False))


@pytest.mark.proves("chunked prefill")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", models.SEQ2SEQ)
def test_chunked_prefill_of_an_encoder_decoder(family, gate):
    model, given = tuned(family, gate), prompt(family, None)
    assert_same(generate(model, given, prefill_chunk_size=1), generate(model, given, use_cache=False))


@pytest.mark.proves("generation from inputs_embeds")
@every_model
def test_input_embeddings(family, gate, influence):
    model, given = tuned(family, gate), prompt(family)
    expected = generate(model, given, use_cache=False)
    embeds = model.get_input_embeddings()(given["input_ids"]).detach()
    given_embeds = {"inputs_embeds": embeds, "attention_mask": given["attention_mask"]}
    for use_cache in (True, False):
        found = generate(model, given_embeds, use_cache=use_cache)
        assert_same((found[0][:, -NEW:], found[1]), (expected[0][:, -NEW:], expected[1]))
    influence(model, given)


@pytest.mark.proves("static cache", "sliding-window cache")
@pytest.mark.parametrize("kind", ["static", "sliding_window"])
@every_model
def test_fixed_caches(family, gate, kind, influence):
    model, given = tuned(family, gate), prompt(family)
    found = generate(model, given, cache_implementation=kind, disable_compile=True)
    assert_same(found, generate(model, given, use_cache=False))
    influence(model, given)


# The masks of modules without a prefix are made during the forward, after the cache has counted the new tokens.
@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding_window"])
@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches_beside_modules_without_a_prefix(family, layer, kind):
    # Gemma 2 itself gives NaN for padded rows in float64.
    given = prompt(family, None if family == "gemma2" else "left")
    model = tuned(family, "token", layers=[layer])
    found = generate(model, given, cache_implementation=kind, disable_compile=True)
    assert_same(found, generate(model, given, use_cache=False))


def longer(model, given, old, use_cache=True, **options):
    """``given`` continued by the tokens of ``old``, the output of an earlier `generate`."""
    ids = old.sequences
    mask = given["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    cache = {"past_key_values": old.past_key_values} if use_cache else {"use_cache": False}
    return tokens(model, {"input_ids": ids, "attention_mask": mask}, do_sample=False, **cache, **options)


@pytest.mark.proves("continuing from a returned cache", "interleaved generations")
@decoder_only
def test_continuing_from_returned_caches_of_interleaved_generations(family, gate, influence):
    model, prompts = tuned(family, gate), [prompt(family, seed=seed) for seed in (0, 1)]
    keep = {"do_sample": False, "return_dict_in_generate": True}
    first = [tokens(model, given, **keep) for given in prompts]
    expected = [longer(model, given, old, use_cache=False) for given, old in zip(prompts, first)]
    for given, old, want in zip(prompts, first, expected):
        assert torch.equal(longer(model, given, old), want)
    influence(model, prompts[0])


@pytest.mark.proves("quantised cache")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "qwen3"] if models.EVERY else ["llama"])
def test_quantised_cache(family, gate):
    """A quantised cache rounds what it keeps; a 4-bit one changes the logits, the prefix stays exact beside it."""
    pytest.importorskip("optimum.quanto", reason="the package optimum-quanto is not installed")
    model, given = tuned(family, gate).float(), prompt(family)
    options = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 32},
    }
    found, exact = generate(model, given, **options), generate(model, given, use_cache=False)
    torch.testing.assert_close(found[1][0], exact[1][0])  # the prompt itself is attended before it is rounded
    moved = (found[1] - exact[1]).abs().max()
    apt_kernels.unpatch(model)
    plain = (generate(model, given, **options)[1] - generate(model, given, use_cache=False)[1]).abs().max()
    assert moved < 2 * plain


@pytest.mark.cuda
@pytest.mark.proves("offloaded cache")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers' offloaded caches need a CUDA device")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@every_model
def test_offloaded_caches(family, gate, kind):
    model, given = tuned(family, gate).cuda(), {name: t.cuda() for name, t in prompt(family).items()}
    found = generate(model, given, cache_implementation=kind, disable_compile=True)
    assert_same(found, generate(model, given, use_cache=False))


@pytest.mark.proves("compiled decoding")
@pytest.mark.parametrize(
    ("family", "gate"),
    [("llama", "first"), ("gemma2", "token"), *((f, "token") for f in FAMILIES if models.EVERY and f != "gemma2")],
)
def test_compiled_decoding(family, gate):
    torch._dynamo.reset()
    model, given = tuned(family, gate), prompt(family)
    compiling = transformers.CompileConfig(fullgraph=True, dynamic=None, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = generate(model, given, cache_implementation="static", compile_config=compiling)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    assert_same(found, generate(model, given, use_cache=False))
