"""Continuous batching (``generate_batch``): each prompt generates what it generates alone without a cache."""

import copy
import inspect

import pytest
import torch
import transformers

import apt_kernels
from apt_kernels.hf import calls
from helpers import models
from helpers.generation import tuned
from helpers.patched import randomise

FAMILIES = models.some(models.DECODERS)
LENGTHS, NEW = (12, 3, 7, 1), 6


def prompts(family):
    return [models.inputs(family, batch=1, length=n, seed=n)["input_ids"] for n in LENGTHS]


def settings(**options):
    known = inspect.signature(transformers.ContinuousBatchingConfig).parameters
    size = "page_size" if "page_size" in known else "block_size"  # before transformers 5.23
    defaults = {"num_blocks": 64, "max_batch_tokens": 64, size: 8}
    return transformers.ContinuousBatchingConfig(**{**defaults, **options})


def generation():
    # No end of text: every prompt generates as many tokens.
    return transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)


def batched(model, rows, config=None, **options):
    given = [row[0].tolist() for row in rows]
    config = config or settings()
    out = model.generate_batch(given, generation(), continuous_batching_config=config, **options)
    assert [result.error for result in out.values()] == [None] * len(rows)
    return [result.generated_tokens for result in out.values()]


def alone(model, rows):
    """Token by token, without a cache."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = row
            for _ in range(NEW):
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            found.append(ids[0, -NEW:].tolist())
    return found


@pytest.mark.proves("continuous batching")
@pytest.mark.parametrize("gate", ["token", "static", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_generates_as_alone(family, gate):
    model, rows = tuned(family, gate), prompts(family)
    found, expected = batched(model, rows), alone(model, rows)
    assert found == expected
    assert alone(apt_kernels.unpatch(model), rows) != expected, "the prefix has no influence"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_prompts_in_chunks_and_layers_without_a_prefix(family):
    model = apt_kernels.patch(models.build(family).double(), prefix_length=[0, 4], gate="token")
    rows = prompts(family)
    assert batched(model, rows, settings(max_batch_tokens=5, num_blocks=16)) == alone(model, rows)


@pytest.mark.proves(
    "continuous batching",
    refused="gate='first': requests share a prompt's cache, and the hidden state of their first token is then gone",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gate_first_is_refused(family):
    model, rows = tuned(family, "first"), prompts(family)
    with pytest.raises(apt_kernels.PatchError, match="gate='first': continuous batching"):
        batched(model, rows)
    assert model.generate(rows[0], max_new_tokens=2).shape[1] == LENGTHS[0] + 2


def test_attention_that_is_written_out_is_refused():
    config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    model = apt_kernels.patch(transformers.BloomForCausalLM(config), gate="token")
    with pytest.raises(apt_kernels.PatchError, match="cannot read a paged cache"):
        batched(model, prompts("llama"))


def test_a_kept_manager_does_not_outlive_its_adapter():
    model, rows = tuned("llama", "token"), prompts("llama")
    first = batched(model, rows, persistent_manager=True)
    assert first == alone(model, rows)
    assert batched(model, rows, persistent_manager=True) == first
    with apt_kernels.disabled(model):
        assert batched(model, rows, persistent_manager=True) == alone(model, rows) != first
    apt_kernels.add_adapter(model, "x", gate="static")
    assert batched(model, rows, persistent_manager=True) == alone(model, rows)
    apt_kernels.unpatch(model)
    assert "init_continuous_batching" not in vars(model)
    assert batched(model, rows) == alone(model, rows)


def test_a_copy_batches_for_itself():
    model, rows = tuned("llama", "token"), prompts("llama")
    twin = copy.deepcopy(model)
    expected = alone(apt_kernels.unpatch(model), rows)
    assert batched(twin, rows) == alone(twin, rows) != expected


def mixed():
    """A model with the adapters default (gate token), b (static, without the last layer) and first (gate first)."""
    model = tuned("llama", "token")
    apt_kernels.add_adapter(model, "b", prefix_length=[3, 0], gate="static")
    apt_kernels.add_adapter(model, "first", prefix_length=2, gate="first")
    for seed, name in enumerate(("b", "first")):
        randomise(apt_kernels.set_adapter(model, name).double(), seed)
    return apt_kernels.set_adapter(model, "default").double()


@pytest.mark.parametrize("names", [["b", "default", "__base__", "default"], ["b"] * 4, ["__base__"] * 4], ids=str)
def test_every_request_generates_as_alone_under_its_adapter(names):
    model, rows = mixed(), prompts("llama")
    rows[3] = rows[0]  # the same prompt under two adapters shares no cache
    expected = {}
    for name in dict.fromkeys(names):
        other = copy.deepcopy(model)
        other = apt_kernels.unpatch(other) if name == "__base__" else apt_kernels.set_adapter(other, name).double()
        expected[name] = alone(other, rows)
    assert batched(model, rows, adapter_names=names) == [expected[name][i] for i, name in enumerate(names)]
    assert calls.local.rows is None
    given = [row[0].tolist() for row in rows]
    found = model.generate_batch(given, generation(), continuous_batching_config=settings(), adapter_names=names)
    assert list(found) == [result.request_id for result in found.values()] == [f"req_{i}" for i in range(4)]


def test_returned_sequences_of_requests_with_names():
    model, rows = mixed(), prompts("llama")
    sampled = transformers.GenerationConfig(max_new_tokens=2, do_sample=True, num_return_sequences=2, eos_token_id=-1)
    found = model.generate_batch(
        [row[0].tolist() for row in rows], sampled, continuous_batching_config=settings(),
        adapter_names=["b", "__base__", "default", "b"],
    )  # fmt: skip
    assert [each.partition("__")[0] for each in found] == [f"req_{i // 2}" for i in range(8)]


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        (["b"], {}, apt_kernels.ConfigError, "adapter_names has 1 name; generate_batch has 4 requests"),
        (["b", "b", "b", "d"], {}, apt_kernels.ConfigError, "adapter_names has 'd'"),
        (["b", "first", "b", "b"], {}, apt_kernels.PatchError, "gate='first': continuous batching"),
        (["b"] * 4, {"persistent_manager": True}, apt_kernels.PatchError, "pass it without adapter_names"),
    ],
)
def test_names_of_requests_that_are_refused(names, options, error, message):
    model, rows = mixed(), prompts("llama")
    with pytest.raises(error, match=message):
        batched(model, rows, adapter_names=names, **options)
    assert calls.local.rows is None
    assert batched(model, rows) == alone(model, rows)
