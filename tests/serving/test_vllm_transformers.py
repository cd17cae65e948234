"""`make test-vllm`: models of transformers inside vLLM (``model_impl="transformers"``). These tests have to run last.

For such a model, vLLM changes classes of transformers in the whole process. The expected answers are therefore computed
before the first engine starts, and no test that uses transformers' models runs after this file.
"""

import pytest

from helpers import served

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs this in an environment with it")

from helpers.vllm_engine import LENGTHS, answers_by_name, answers_of, assert_same, engine, generate

FAMILIES = {"llama": "token", "qwen3": "first"}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """By family: the base model, the adapter, and the answers of transformers."""
    found = {}
    for family, gate in FAMILIES.items():
        root = tmp_path_factory.mktemp(family)
        model = served.base(family, root / "base")
        adapter = served.adapter(model, root / "adapter", prefix_length=12, gate=gate)
        found[family] = model, adapter, answers_of(model, adapter, served.prompts(LENGTHS))
    model, adapter, _ = found["llama"]
    named = {
        "token": str(adapter),
        "static": str(served.adapter(model, root / "static", 1, prefix_length=5, gate="static")),
    }
    names = ["static", None, "token", "token", "static", None]
    found["several"] = model, named, names, answers_by_name(model, named, served.prompts(LENGTHS), names)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers_in_vllm(family, answered):
    model, adapter, answers = answered[family]
    with engine(model, adapter, model_impl="transformers") as llm:
        assert_same(generate(llm, served.prompts(LENGTHS), prompt_logprobs=2), answers)


def test_several_adapters(answered):
    model, named, names, answers = answered["several"]
    with engine(model, named, model_impl="transformers") as llm:
        assert_same(generate(llm, served.prompts(LENGTHS), prompt_logprobs=2, names=names), answers)
