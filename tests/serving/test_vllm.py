"""`make test-vllm`: adapters in vLLM give the tokens and log-probabilities of transformers with apt_kernels."""

import contextlib
import gc

import pytest
import torch

from helpers import served

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in an environment with it")

NEW = 8
# One key/value block is 32 tokens on the CPU: below, at and above its bounds.
LENGTHS = (1, 7, 33, 64, 90, 5)
# vLLM without an adapter differs from transformers by 2e-5 on these models; the prefix adds sums of its own.
TOLERANCE = 2e-4


@contextlib.contextmanager
def engine(model, adapter, **options):
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    given = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 96,
        "block_size": 32,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    if adapter is not None:
        given |= {"load_format": "apt_kernels", "model_loader_extra_config": {"adapter": str(adapter)}}
    llm = LLM(model=str(model), **{**given, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm, prompts, prompt_logprobs=None, new=NEW):
    from vllm import SamplingParams

    settings = SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        logprobs=3,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)


def assert_same(outputs, answers, tolerance=TOLERANCE):
    """The same tokens, and the same log-probability for every token that vLLM reports one of."""
    assert [list(out.outputs[0].token_ids) for out in outputs] == [answer.tokens for answer in answers]
    for out, answer in zip(outputs, answers):
        rows = [*zip(out.outputs[0].logprobs, answer.steps), *zip((out.prompt_logprobs or [])[1:], answer.prompt)]
        assert len(rows) >= len(answer.tokens)
        for reported, expected in rows:
            ours = torch.tensor([entry.logprob for entry in reported.values()])
            torch.testing.assert_close(ours, expected[list(reported)], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return served.base("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("gate", ["none", "static", "token"])
def test_every_gate_as_transformers(llama, gate, tmp_path):
    prompts = served.prompts(LENGTHS)
    adapter = served.adapter(llama, tmp_path, prefix_length=10, gate=gate)
    answers, bare = (served.answers(llama, each, prompts, NEW) for each in (adapter, None))
    assert [one.tokens for one in answers] != [one.tokens for one in bare], "the adapter has no influence"
    with engine(llama, adapter) as llm:
        assert_same(generate(llm, prompts, prompt_logprobs=2), answers)
