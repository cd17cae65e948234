"""lm-evaluation-harness on a patched model from Python: ``HFLM(pretrained=model)``."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import apt_kernels
from helpers import models
from helpers.patched import randomise

# It brings 35 packages, so that the extra "test" leaves it out.
MISSING = "lm_eval is not installed (pip install lm_eval)"
huggingface = pytest.importorskip("lm_eval.models.huggingface", reason=MISSING)
instance = pytest.importorskip("lm_eval.api.instance", reason=MISSING)


def test_it_computes_with_the_prefix():
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, init_seed=0)
    randomise(model)
    words = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(90))])}
    tokens = Tokenizer(tokenizer_models.WordLevel(words, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)

    # Rows of different lengths: a batch is padded.
    asked = [(" ".join(f"w{i + j}" for j in range(2 + i)), " w7 w9") for i in range(5)]
    found = [
        score for score, _ in harness.loglikelihood([instance.Instance("loglikelihood", {}, each, 0) for each in asked])
    ]
    with torch.no_grad():
        for score, (context, continuation) in zip(found, asked):
            ids = torch.tensor([tokenizer(context + continuation).input_ids])
            logits = model(ids).logits.log_softmax(-1)[0, :-1]
            expected = logits.gather(1, ids[0, 1:, None])[-2:].sum().item()
            assert score == pytest.approx(expected, abs=1e-4)  # sums in another order, in float32
    with apt_kernels.disabled(model):
        plain = harness.loglikelihood([instance.Instance("loglikelihood", {}, each, 0) for each in asked])
    assert max(abs(one - other) for one, (other, _) in zip(found, plain)) > 1e-2, "the prefix has no influence"

    options = {"until": ["[EOS]"], "max_gen_toks": 5, "do_sample": False}
    (text,) = harness.generate_until([instance.Instance("generate_until", {}, ("w1 w2", options), 0)])
    ids = torch.tensor([tokenizer("w1 w2").input_ids])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:]
    assert text.split() == tokenizer.decode(expected).split()
