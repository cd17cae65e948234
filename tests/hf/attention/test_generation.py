"""Cached generation equals recomputing every step without a cache, token for token."""

import copy
import pickle

import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.generation import NEW, assert_same, generate, tuned

FAMILIES = models.DECODERS + models.SEQ2SEQ


@pytest.mark.proves("greedy and beam search, left padding", "no cache (use_cache=False)")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("family", "gate"), [(f, g) for f in FAMILIES for g in ("first", "token")])
def test_left_padded_generation_equals_recomputation(family, gate, beams):
    model, given = tuned(family, gate), models.inputs(family, "left")
    cached = generate(model, given, num_beams=beams)
    assert_same(cached, generate(model, given, num_beams=beams, use_cache=False))
    apt_kernels.unpatch(model)
    moved = cached[1][0] - generate(model, given, num_beams=beams)[1][0]
    assert moved.nan_to_num(posinf=0, neginf=0).abs().max() > 1e-2, "the prefix has no influence"


@pytest.mark.proves("a row alone and padded in a batch")
@pytest.mark.parametrize("gate", ["token", "first"])
@pytest.mark.parametrize("family", FAMILIES if models.EVERY else ["gpt2", "opt", "qwen3", "phi3", "t5"])
def test_a_row_generates_the_same_alone_and_padded_in_a_batch(family, gate):
    model, given = tuned(family, gate), models.inputs(family, "right" if family in models.SEQ2SEQ else "left")
    together, logits = generate(model, given)
    for row in range(3):
        ids = given["input_ids"][row, given["attention_mask"][row].bool()][None]
        alone, expected = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert torch.equal(alone[0, -NEW:], together[row, -NEW:])
        torch.testing.assert_close(logits[:, row], expected[:, 0])
        with apt_kernels.disabled(model):
            plain = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[1]
        moved = (expected[0] - plain[0]).nan_to_num(posinf=0, neginf=0)
        assert moved.abs().max() > 1e-2, "the prefix has no influence"


@pytest.mark.parametrize("gate", ["token", "first"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "t5", "bart"])
def test_static_cache(family, gate):
    model, given = tuned(family, gate), models.inputs(family, "left")
    static = generate(model, given, cache_implementation="static", disable_compile=True)
    assert_same(static, generate(model, given, use_cache=False))


@pytest.mark.parametrize("change", ["copy", "crop", "reset"])
def test_the_kept_gate_belongs_to_the_cache(change):
    model = tuned("llama", "first")
    first, second = (models.inputs("llama", seed=s)["input_ids"] for s in (0, 1))
    with torch.no_grad():
        # A static cache: on transformers 5.17 a dynamic one keeps its length through `reset`.
        cache = transformers.StaticCache(model.config, max_cache_len=40) if change == "reset" else None
        cache = model(first, use_cache=True, past_key_values=cache).past_key_values
        if change == "copy":
            twin = copy.deepcopy(cache)
            model(second, past_key_values=cache)
            cache = twin
            expected, found = torch.cat([first, second], 1), model(second, past_key_values=cache)
        else:
            cache.crop(-cache.get_seq_length()) if change == "crop" else cache.reset()
            assert cache.get_seq_length() == 0
            expected, found = second, model(second, past_key_values=cache)
        expected = model(expected, use_cache=False).logits[:, -12:]
    torch.testing.assert_close(found.logits, expected)


def test_the_kept_gate_follows_the_caches_rows():
    model, first = tuned("llama", "first"), models.inputs("llama")["input_ids"]
    following = models.inputs("llama", seed=1)["input_ids"]
    rows, picked = torch.tensor([2, 0, 1]), torch.tensor([4, 1, 3])
    with torch.no_grad():
        cache = model(first, use_cache=True).past_key_values
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(picked)
        found = model(following, past_key_values=cache).logits
        prompt = first[rows].repeat_interleave(2, dim=0)[picked]
        expected = model(torch.cat([prompt, following], 1), use_cache=False).logits[:, -12:]
    torch.testing.assert_close(found, expected)


def test_a_cache_with_gates_can_be_pickled():
    model, given = tuned("llama", "first"), models.inputs("llama")["input_ids"]
    with torch.no_grad():
        cache = model(given, use_cache=True).past_key_values
        twin = pickle.loads(pickle.dumps(cache))
        assert isinstance(twin, transformers.DynamicCache)
        assert torch.equal(model(given, past_key_values=twin).logits, model(given, past_key_values=cache).logits)


def test_a_filled_cache_without_a_gate_raises():
    model, given = models.build("llama"), models.inputs("llama")
    cache = model(**given, use_cache=True).past_key_values
    apt_kernels.patch(model, gate="first")
    with pytest.raises(apt_kernels.PatchError, match="but not the prompt's gate"):
        model(given["input_ids"], past_key_values=cache)
