"""`make test-vllm`: adapters in vLLM give the tokens and log-probabilities of transformers with apt_kernels."""

import pytest

from apt_kernels import AdapterError, ConfigError
from helpers import served

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in an environment with it")

from helpers.vllm_engine import LENGTHS, NEW, answers_of, assert_same, check, counting_preemptions, engine, generate


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return served.base("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["token", "first"])
def adapted(llama, tmp_path_factory, request):
    """An adapter with one gate per token or per request. The two layers have different prefix lengths."""
    return served.adapter(llama, tmp_path_factory.mktemp("adapter"), prefix_length=(10, 37), gate=request.param)


@pytest.mark.parametrize("gate", ["none", "static", "token", "first"])
def test_every_gate_as_transformers(llama, gate, tmp_path):
    check(llama, served.adapter(llama, tmp_path, prefix_length=10, gate=gate))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gpt2", "opt"])
def test_families(family, tmp_path):
    """vLLM's own classes, with rotary and learned positions, normed keys, fused and separate projections."""
    model = served.base(family, tmp_path / "base")
    check(model, served.adapter(model, tmp_path / "adapter", prefix_length=12, gate="token"))


def test_layers_without_a_prefix(llama, tmp_path):
    check(llama, served.adapter(llama, tmp_path, prefix_length=(0, 9), gate="token"))


def test_compiled(llama, adapted, monkeypatch, tmp_path):
    """torch.compile traces the prefix with the model."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    check(llama, adapted, enforce_eager=False)


def test_two_adapters_compiled(llama, tmp_path, monkeypatch):
    """The adapters of a batch are no part of the graph."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    prompts = served.prompts((40, 7))
    adapters = {
        gate: str(served.adapter(llama, tmp_path / gate, prefix_length=length, gate=gate))
        for gate, length in {"static": 9, "token": 21}.items()
    }
    with engine(llama, adapters, enforce_eager=False) as llm:
        for names in (["static", "token"], ["token", None]):
            found = generate(llm, prompts, names=names)
            for out, prompt, name in zip(found, prompts, names):
                assert_same([out], served.answers(llama, adapters.get(name), [prompt], NEW))


@pytest.mark.parametrize("caching", [True, False])
def test_chunked_prompts_and_cached_prefixes(llama, adapted, caching):
    prompts = served.prompts((3, 20, 40), shared=70)
    answers = answers_of(llama, adapted, prompts)
    options = {"max_num_batched_tokens": 48, "enable_chunked_prefill": True, "enable_prefix_caching": caching}
    with engine(llama, adapted, **options) as llm:
        assert_same(generate(llm, prompts, prompt_logprobs=2), answers)
        # One prompt at a time, and again all at once: each prompt's first blocks are in the cache by now.
        for prompt, answer in zip(prompts, answers.each):
            (out,) = generate(llm, [prompt])
            assert_same([out], served.Answers([answer], answers.allowed))
            assert (out.num_cached_tokens >= 64) is caching
        assert_same(generate(llm, prompts), answers)


def test_preempted_requests(llama, adapted, monkeypatch):
    preempted = counting_preemptions(monkeypatch)
    prompts = served.prompts((60, 62, 61, 63, 60, 59))
    answers = answers_of(llama, adapted, prompts, 40)
    with engine(llama, adapted, num_gpu_blocks_override=16) as llm:
        assert_same(generate(llm, prompts, new=40), answers)
    assert preempted


@pytest.mark.parametrize(("gate", "heads"), [("token", 2), ("first", 1)])
def test_two_processes(gate, heads, tmp_path):
    """Tensor parallelism: each process has its own heads of the prefix; a single key head is on both."""
    model = served.base("llama", tmp_path / "base", num_key_value_heads=heads)
    adapter = served.adapter(model, tmp_path / "adapter", prefix_length=12, gate=gate)
    check(model, adapter, tensor_parallel_size=2)


def test_another_base_is_refused(adapted, tmp_path):
    model = served.base("llama", tmp_path, num_hidden_layers=3)
    with pytest.raises(AdapterError, match=r"num_hidden_layers 2; this one has 3"), engine(model, adapted):
        pass


def test_one_of_several_of_another_base_is_refused_by_name(llama, adapted, tmp_path):
    model = served.base("llama", tmp_path / "base", num_hidden_layers=3)
    deep = served.adapter(model, tmp_path / "adapter", prefix_length=4)
    adapters = {"flat": str(adapted), "deep": str(deep)}
    with pytest.raises(AdapterError, match=r"adapter 'deep': .*num_hidden_layers 3"), engine(llama, adapters):
        pass


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_is_refused(family, tmp_path):
    model = served.base(family, tmp_path / "base", sliding_window=32)
    adapter = served.adapter(model, tmp_path / "adapter", prefix_length=4)
    with pytest.raises(ConfigError, match="sliding window"), engine(model, adapter):
        pass


def test_without_an_adapter_the_load_format_is_refused(llama):
    with pytest.raises(ConfigError, match="adapter"), engine(llama, None, load_format="apt_kernels"):
        pass


def test_other_load_formats_are_as_they_were(llama):
    """The plugin is installed, and the engine has no adapter."""
    prompts = served.prompts(LENGTHS)
    with engine(llama, None) as llm:
        assert_same(generate(llm, prompts, prompt_logprobs=2), served.answers(llama, None, prompts, NEW))


def test_smollm2(tmp_path):
    """A real decoder: 30 layers, 9 query and 3 key heads of 64."""
    model = served.smollm2(tmp_path / "base")
    adapter = served.adapter(model, tmp_path / "adapter", prefix_length=45, gate="token")
    check(model, adapter, served.prompts((1, 7, 33, 90), vocabulary=49000))
