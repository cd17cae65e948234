"""Task heads, forward and backward, equal the eager oracle; and every query sees the whole prefix, window or not."""

import copy

import models
import oracle
import pytest
import torch
from test_models import randomise, real_of

import apt_kernels

BOTH = models.ENCODERS + models.DECODERS
HEADS = {
    "causal language model": ("AutoModelForCausalLM", models.DECODERS, {}),
    "masked language model": ("AutoModelForMaskedLM", models.ENCODERS, {}),
    "sequence to sequence": ("AutoModelForSeq2SeqLM", models.SEQ2SEQ, {}),
    "sequence classification": ("AutoModelForSequenceClassification", BOTH, {"num_labels": 3}),
    "reward (one number a sequence)": ("AutoModelForSequenceClassification", models.DECODERS, {"num_labels": 1}),
    "token classification": (
        "AutoModelForTokenClassification",
        (*models.ENCODERS, *"gpt2 llama mistral qwen2 qwen3 gemma2 phi3".split()),
        {},
    ),
    "question answering": (
        "AutoModelForQuestionAnswering",
        (*models.ENCODERS, *"gpt2 opt llama mistral qwen2 qwen3".split()),
        {},
    ),
    "multiple choice": ("AutoModelForMultipleChoice", models.ENCODERS, {}),
    "embeddings (bare model)": ("AutoModel", BOTH, {}),
}


def inputs(family, head):
    """Inputs with labels; the padding is on the right."""
    given = models.inputs(family, "right")
    if head == "AutoModelForMultipleChoice":
        given = {name: tensor[:, None].repeat(1, 2, 1) for name, tensor in given.items()}
        given["input_ids"][:, 1, 1:4] += 1
    return given


def result(out, given):
    """What a task takes from the model's output, as one tensor; padding aside."""
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits])[:, given["attention_mask"].bool()]
    if "logits" in out:
        found = out.logits
    else:  # mean pooling
        real = given["attention_mask"][..., None].to(out.last_hidden_state.dtype)
        return (out.last_hidden_state * real).sum(1) / real.sum(1)
    rows = given["attention_mask"].shape
    per_token = found.ndim == 3 and found.shape[:2] == rows and "decoder_input_ids" not in given
    return found[given["attention_mask"].bool()] if per_token else found


def check(family, task):
    head, _, options = HEADS[task]
    plain = models.build(family, head, **options).double()
    given = inputs(family, head)
    patched = apt_kernels.patch(copy.deepcopy(plain), prefix_length=4, init_seed=0).double()
    randomise(patched)
    flat = {**given, "attention_mask": given["attention_mask"].flatten(0, -2)}
    eager, params = oracle.build(plain, apt_kernels.prefixes(patched), real_of(flat, family))
    bare, _ = oracle.build(plain, {})
    heads = {n: p for n, p in patched.named_parameters() if p.requires_grad and ".apt." not in n}
    for name in heads:
        params[name] = eager.get_parameter(name).requires_grad_()

    found, expected = result(patched(**given), given), result(eager(**given), given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (expected - result(bare(**given), given)).abs().max() > 1e-3, "the prefix has no influence"

    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    named = dict(patched.named_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == set(params)
    for name, parameter in params.items():
        assert parameter.grad.abs().max() > 0 or name.endswith("bias"), name
        torch.testing.assert_close(named[name].grad, parameter.grad, rtol=1e-8, atol=1e-9)


def families(task):
    return pytest.mark.parametrize("family", models.some(HEADS[task][1]))


@pytest.mark.proves("causal language model")
@families("causal language model")
def test_causal_language_models(family):
    check(family, "causal language model")


@pytest.mark.proves("masked language model")
@families("masked language model")
def test_masked_language_models(family):
    check(family, "masked language model")


@pytest.mark.proves("sequence to sequence")
@families("sequence to sequence")
def test_sequence_to_sequence(family):
    check(family, "sequence to sequence")


@pytest.mark.proves("sequence classification")
@families("sequence classification")
def test_sequence_classification(family):
    check(family, "sequence classification")


@pytest.mark.proves("reward (one number a sequence)")
@families("reward (one number a sequence)")
def test_rewards(family):
    check(family, "reward (one number a sequence)")


@pytest.mark.proves("token classification")
@families("token classification")
def test_token_classification(family):
    check(family, "token classification")


@pytest.mark.proves("question answering")
@families("question answering")
def test_question_answering(family):
    check(family, "question answering")


@pytest.mark.proves("multiple choice")
@families("multiple choice")
def test_multiple_choice(family):
    check(family, "multiple choice")


@pytest.mark.proves("embeddings (bare model)")
@families("embeddings (bare model)")
def test_embeddings(family):
    check(family, "embeddings (bare model)")


@pytest.mark.proves("sliding window: every query sees the whole prefix")
@pytest.mark.parametrize("family", models.some(("mistral", "gemma2", "gemma3", "phi3")))
def test_late_queries_see_the_whole_prefix(family):
    """The window is 5 and the prompt 12 long: the last query's gradient still reaches every prefix token."""
    model = apt_kernels.patch(models.build(family).double(), prefix_length=4)
    randomise(model)
    assert model.config.sliding_window < 12
    model(**models.inputs(family, batch=1)).logits[:, -1].square().sum().backward()
    for prefix in apt_kernels.prefixes(model).values():
        assert (prefix.key.grad.abs().amax(dim=(0, 2)) > 0).all()
        assert (prefix.value.grad.abs().amax(dim=(0, 2)) > 0).all()
