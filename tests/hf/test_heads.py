"""Task heads, forward and backward, equal the eager oracle; and every query sees the whole prefix, window or not."""

import copy

import pytest
import torch
import transformers as t

import apt_kernels
from helpers import models, oracle
from helpers.patched import randomise, real_of

HEADS = {
    "causal language model": ("AutoModelForCausalLM", models.DECODERS, {}),
    "masked language model": ("AutoModelForMaskedLM", models.ENCODERS, {}),
    "sequence to sequence": ("AutoModelForSeq2SeqLM", models.SEQ2SEQ, {}),
    "sequence classification": ("AutoModelForSequenceClassification", models.FAMILIES, {"num_labels": 3}),
    "reward (one number a sequence)": (
        "AutoModelForSequenceClassification",
        models.DECODERS + models.SEQ2SEQ,
        {"num_labels": 1},
    ),
    "token classification": (
        "AutoModelForTokenClassification",
        (*models.ENCODERS, *"gpt2 llama mistral qwen2 qwen3 gemma2 phi3 t5".split()),
        {},
    ),
    "question answering": (
        "AutoModelForQuestionAnswering",
        (*models.ENCODERS, *"gpt2 opt llama mistral qwen2 qwen3 t5 bart".split()),
        {},
    ),
    "multiple choice": ("AutoModelForMultipleChoice", models.ENCODERS, {}),
    "embeddings (bare model)": ("AutoModel", models.FAMILIES, {}),
    "embeddings of the encoder alone": ("AutoModelForTextEncoding", ("t5",), {}),
}

# Their heads, where they have one, were pretrained.
UNTRAINED = (
    "causal language model",
    "masked language model",
    "sequence to sequence",
    "embeddings (bare model)",
    "embeddings of the encoder alone",
)
END = {"t5": 1, "bart": 2}


def inputs(family, head):
    """The padding is on the right. An encoder-decoder's task head has the decoder read the tokens again."""
    given = models.inputs(family, "right")
    if family in models.SEQ2SEQ and head not in ("AutoModelForSeq2SeqLM", "AutoModel"):
        del given["decoder_input_ids"]
    if family in models.SEQ2SEQ and head == "AutoModelForSequenceClassification":
        ends = given["attention_mask"].sum(1, keepdim=True) - 1
        given["input_ids"].scatter_(1, ends, END[family])  # whose decoder state is classified
    if head == "AutoModelForMultipleChoice":
        given = {name: tensor[:, None].repeat(1, 2, 1) for name, tensor in given.items()}
        given["input_ids"][:, 1, 1:4] += 1
    return given


def result(out, given):
    """The part of the model's output that a task uses, as one tensor without padding."""
    if "start_logits" in out:
        return torch.stack([out.start_logits, out.end_logits])[:, given["attention_mask"].bool()]
    if "logits" in out:
        found = out.logits
    elif "decoder_input_ids" in given:
        return out.last_hidden_state.mean(1)
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
    assert bool(heads) == (task not in UNTRAINED), "a new head trains, a pretrained one does not"
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


@pytest.mark.proves("embeddings (bare model)")
@families("embeddings of the encoder alone")
def test_embeddings_of_the_encoder_alone(family):
    check(family, "embeddings of the encoder alone")


_TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
_TINY_WHISPER = {
    **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))},
    **{"d_model": 32, "num_mel_bins": 8, "max_source_positions": 16, "classifier_proj_size": 8, "vocab_size": 99},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
SELF_MADE = {
    "SiglipForImageClassification": (
        lambda: t.SiglipConfig(vision_config={**_TINY, "image_size": 16, "patch_size": 8}),
        {"classifier.weight", "classifier.bias"},
    ),
    "WhisperForAudioClassification": (
        lambda: t.WhisperConfig(**_TINY_WHISPER, use_weighted_layer_sum=True),
        {"layer_weights", *(f"{name}.{each}" for name in ("projector", "classifier") for each in ("weight", "bias"))},
    ),
    "T5ForQuestionAnswering": (lambda: t.T5Config(**_TINY_T5), {"qa_outputs.weight", "qa_outputs.bias"}),
    "T5EncoderModel": (lambda: t.T5Config(**_TINY_T5), set()),
}


@pytest.mark.parametrize("kind", SELF_MADE)
def test_the_heads_of_models_that_hold_no_base_model_train(kind):
    """Their parts are direct children, without a module of the name in ``base_model_prefix``."""
    config, heads = SELF_MADE[kind]
    model = getattr(t, kind)(config())
    assert model.base_model is model
    apt_kernels.patch(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".apt." not in n} == heads
    assert set(dict(apt_kernels.summary(model).beside)) == heads


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


def test_a_new_head_that_trainable_leaves_out_is_named(recwarn):
    head = "AutoModelForSequenceClassification"
    message = r"trainable leaves out classifier\.bias and 1 more, .* name it in trainable"
    with pytest.warns(UserWarning, match=message) as found:
        apt_kernels.patch(models.build("bert", head), trainable=("pooler",))
    assert [warning.filename for warning in found] == [__file__]
    recwarn.clear()
    for trainable in (None, (), ("pooler", "classifier")):
        apt_kernels.patch(models.build("bert", head), trainable=trainable)
    apt_kernels.patch(models.build("llama"), trainable=("lm_head",))
    assert not [warning for warning in recwarn if "trainable" in str(warning.message)]
