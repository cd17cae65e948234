"""`make test-vllm`: several adapters in one engine, one for each request, give the answers of transformers."""

import pytest

from helpers import served

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in an environment with it")

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from apt_kernels.serving.vllm import several
from helpers.vllm_engine import answers_by_name, assert_same, counting_preemptions, engine, generate

SETTINGS = {
    "none": {"prefix_length": 10},
    "static": {"prefix_length": (0, 21)},
    "token": {"prefix_length": (10, 37)},
    "first": {"prefix_length": 5},
}
# None: the base model.
NAMES = [*SETTINGS, None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return served.base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        gate: str(served.adapter(llama, root / gate, seed, gate=gate, **settings))
        for seed, (gate, settings) in enumerate(SETTINGS.items())
    }


@pytest.fixture(scope="module")
def running(llama, adapters):
    with engine(llama, adapters, max_num_batched_tokens=96, enable_chunked_prefill=True) as llm:
        yield llm


def test_adapters_mixed_in_one_batch(llama, adapters, running, monkeypatch):
    seen, plain = [], several.Batch.choice

    def choice(*args):
        seen.append(plain(*args))
        return seen[-1]

    monkeypatch.setattr(several.Batch, "choice", choice)
    prompts = served.prompts((5, 40, 70, 9, 33, 2, 64, 80, 12, 1))
    names = [NAMES[i % len(NAMES)] for i in range(len(prompts))]
    expected = answers_by_name(llama, adapters, prompts, names)
    assert_same(generate(running, prompts, prompt_logprobs=2, names=names), expected)
    assert max(len(step.tokens) for step in seen) == len(SETTINGS)
    # Any prompt with any adapter: the adapters change places in the batch.
    names.reverse()
    assert_same(generate(running, prompts, names=names), answers_by_name(llama, adapters, prompts, names))


def under_each(llama, adapters, running, prompt):
    """The same prompt under one adapter after the other: each answer, the expected one, and how much was cached."""
    expected = [answers_by_name(llama, adapters, [prompt], [name]) for name in NAMES]
    assert len({tuple(one.tokens[0]) for one in expected}) == len(NAMES), "adapters have the same answers"
    outputs = [generate(running, [prompt], names=[name])[0] for name in NAMES]
    return outputs, expected, [out.num_cached_tokens for out in outputs]


def test_adapters_share_no_cached_prefix(llama, adapters, running):
    (prompt,) = served.prompts((75,))
    for cached in (0, 64):  # the second time, each adapter finds its own blocks
        outputs, expected, found = under_each(llama, adapters, running, prompt)
        assert found == [cached] * len(NAMES)
        for out, one in zip(outputs, expected):
            assert_same([out], one)


def test_without_the_name_in_block_hashes_the_answers_are_wrong(llama, adapters, running, monkeypatch):
    """The test above notices if the blocks of adapters have the same hashes."""
    monkeypatch.setattr("vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys", lambda request: [])
    (_, prompt) = served.prompts((3, 77))
    outputs, expected, found = under_each(llama, adapters, running, prompt)
    assert found == [0, *[64] * len(SETTINGS)]
    wrong = [list(out.outputs[0].token_ids) != one.tokens[0] for out, one in zip(outputs, expected)]
    assert not wrong[0]
    assert any(wrong[1:])


def test_an_unknown_name_is_an_error_of_its_request(llama, adapters, running):
    prompts = served.prompts((9,))
    with pytest.raises(VLLMValidationError, match=r"'nobody'; this engine's adapters are 'none', 'static', 'token'"):
        generate(running, prompts, names=["nobody"])
    assert_same(generate(running, prompts, names=["token"]), answers_by_name(llama, adapters, prompts, ["token"]))


def test_a_lora_request_with_the_name_and_folder_of_an_adapter(llama, adapters, running):
    prompts = served.prompts((9,))
    given = LoRARequest("static", 9, adapters["static"])
    expected = answers_by_name(llama, adapters, prompts, ["static"])
    assert_same(generate(running, prompts, lora_request=given), expected)
    with pytest.raises(VLLMValidationError, match="this engine's has"):
        generate(running, prompts, lora_request=LoRARequest("static", 9, adapters["token"]))


def test_preempted_requests_keep_their_adapters(llama, adapters, monkeypatch):
    """The prompt is computed again, with the gate of its first tokens, under the adapter of its request."""
    preempted = counting_preemptions(monkeypatch)
    prompts = served.prompts((60, 62, 61, 63, 60, 59))
    names = [NAMES[i % len(NAMES)] for i in range(len(prompts))]
    with engine(llama, adapters, num_gpu_blocks_override=16) as llm:
        assert_same(generate(llm, prompts, new=40, names=names), answers_by_name(llama, adapters, prompts, names, 40))
    assert preempted


def test_two_processes(llama, adapters):
    """Tensor parallelism: each process has its own heads of every adapter."""
    prompts = served.prompts((40, 7, 33, 90, 5))
    with engine(llama, adapters, tensor_parallel_size=2) as llm:
        for names in (NAMES, NAMES[::-1]):
            found = generate(llm, prompts, prompt_logprobs=2, names=names)
            assert_same(found, answers_by_name(llama, adapters, prompts, names))
