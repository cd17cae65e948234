"""Small vLLM engines in this process, and their answers against those of transformers. Imports vLLM."""

import contextlib
import gc

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.sched.scheduler import Scheduler

from helpers import served

NEW = 8
# One key/value block is 32 tokens on the CPU: below, at and above its bounds.
LENGTHS = (1, 7, 33, 64, 90, 5)


@contextlib.contextmanager
def engine(model, adapter, **options):
    """An engine of ``model`` with one adapter, a folder, or several, folders by name; None: without."""
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
        chosen = {"adapters": adapter} if isinstance(adapter, dict) else {"adapter": str(adapter)}
        given |= {"load_format": "apt_kernels", "model_loader_extra_config": chosen}
    llm = LLM(model=str(model), **{**given, **options})
    try:
        yield llm
    finally:
        end(llm)


def end(llm: LLM | None) -> None:
    """Stop an engine, so that another can start in this process."""
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def generate(llm, prompts, prompt_logprobs=None, new=NEW, names=None, lora_request=None):
    """Greedy answers to prompts in one batch; ``names``: the adapter of each, or None."""
    settings = [
        SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=prompt_logprobs,
            detokenize=False,
            extra_args={"apt_adapter": name} if names else None,
        )
        for name in names or [None] * len(prompts)
    ]
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given, settings, use_tqdm=False, lora_request=lora_request)


def assert_same(outputs, answers):
    """The same tokens, and the same log-probability for every token that vLLM reports one of."""
    assert [list(out.outputs[0].token_ids) for out in outputs] == answers.tokens
    for out, answer in zip(outputs, answers.each):
        rows = [*zip(out.outputs[0].logprobs, answer.steps), *zip((out.prompt_logprobs or [])[1:], answer.prompt)]
        assert len(rows) >= len(answer.tokens)
        for reported, expected in rows:
            ours = torch.tensor([entry.logprob for entry in reported.values()], dtype=torch.float64)
            torch.testing.assert_close(ours, expected[list(reported)], rtol=0, atol=answers.allowed)


def answers_of(model, adapter, prompts, new=NEW):
    """What transformers answers with the adapter, which is something else than without."""
    found, bare = (served.answers(model, each, prompts, new) for each in (adapter, None))
    assert found.tokens != bare.tokens, "the adapter has no influence"
    return found


def answers_by_name(model, adapters, prompts, names, new=NEW):
    """What transformers answers to each prompt with the adapter of its name; None: the base model."""
    found = {name: served.answers(model, adapters.get(name), prompts, new) for name in set(names)}
    each = [found[name].each[i] for i, name in enumerate(names)]
    return served.Answers(each, max(one.allowed for one in found.values()))


def counting_preemptions(monkeypatch) -> list:
    """A list that grows with each request that an engine preempts."""
    preempted, plain = [], Scheduler._preempt_request

    def preempt(*args, **kwargs):
        preempted.append(args)
        return plain(*args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return preempted


def check(model, adapter, prompts=None, **options):
    """One engine, prompts of unequal lengths in one batch, against transformers."""
    prompts = served.prompts(LENGTHS) if prompts is None else prompts
    answers = answers_of(model, adapter, prompts)
    with engine(model, adapter, **options) as llm:
        assert_same(generate(llm, prompts, prompt_logprobs=2), answers)
