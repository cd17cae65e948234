"""lm-evaluation-harness on a patched model: ``HFLM(pretrained=model)``, and ``python -m apt_kernels lm-eval``."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import apt_kernels
from apt_kernels.__main__ import main
from apt_kernels.hf import harness
from helpers import models
from helpers.patched import randomise

try:
    from lm_eval.api import instance
    from lm_eval.models import huggingface
except ModuleNotFoundError:
    huggingface = None

# It brings 35 packages, so that the extra "test" leaves it out.
needs_lm_eval = pytest.mark.skipif(huggingface is None, reason="lm_eval is not installed (pip install lm_eval)")


def words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words w0 to w89, one token each."""
    ids = {word: i for i, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(90))])}
    tokens = Tokenizer(tokenizer_models.WordLevel(ids, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


def score(model, tokenizer, context: str, continuation: str) -> float:
    """The log-likelihood of the last two words after those before them."""
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    with torch.no_grad():
        logits = model(ids).logits.log_softmax(-1)[0, :-1]
    return logits.gather(1, ids[0, 1:, None])[-2:].sum().item()


@needs_lm_eval
def test_it_computes_with_the_prefix():
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, init_seed=0)
    randomise(model)
    tokenizer = words()
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)

    # Rows of different lengths: a batch is padded.
    asked = [(" ".join(f"w{i + j}" for j in range(2 + i)), " w7 w9") for i in range(5)]
    found = [
        value for value, _ in lm.loglikelihood([instance.Instance("loglikelihood", {}, each, 0) for each in asked])
    ]
    for given, each in zip(found, asked):
        assert given == pytest.approx(score(model, tokenizer, *each), abs=1e-4)  # sums in another order, in float32
    with apt_kernels.disabled(model):
        plain = lm.loglikelihood([instance.Instance("loglikelihood", {}, each, 0) for each in asked])
    assert max(abs(one - other) for one, (other, _) in zip(found, plain)) > 1e-2, "the prefix has no influence"

    options = {"until": ["[EOS]"], "max_gen_toks": 5, "do_sample": False}
    (text,) = lm.generate_until([instance.Instance("generate_until", {}, ("w1 w2", options), 0)])
    ids = torch.tensor([tokenizer("w1 w2").input_ids])
    expected = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 2:]
    assert text.split() == tokenizer.decode(expected).split()


TASK = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


@needs_lm_eval
def test_the_command_line_evaluates_a_base_with_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tokenizer, base = words(), models.build("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = apt_kernels.patch(base, prefix_length=4, init_seed=0)
    randomise(model)
    apt_kernels.save(model, tmp_path / "adapter")
    asked = [(" ".join(f"w{i + j}" for j in range(2 + i)), " w7 w9") for i in range(5)]
    rows = [json.dumps({"context": context, "continuation": continuation}) for context, continuation in asked]
    (tmp_path / "rows.json").write_text("\n".join(rows))
    (tmp_path / "words.yaml").write_text(TASK.replace("DATA", str(tmp_path / "rows.json")))
    own = list(sys.argv)
    given = f"pretrained={tmp_path / 'base'},adapter={tmp_path / 'adapter'},dtype=float32"
    options = ["--tasks", "words", "--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path)]
    assert main(["lm-eval", "--model_args", given, *options]) == 0
    assert sys.argv == own
    (written,) = Path(tmp_path).rglob("results_*.json")
    (found,) = [
        v for k, v in json.loads(written.read_text())["results"]["words"].items() if k.startswith("perplexity,")
    ]
    expected = torch.tensor([score(model, tokenizer, *each) for each in asked]).mean().neg().exp().item()
    assert found == pytest.approx(expected, rel=1e-4)  # sums in another order, in float32
    with apt_kernels.disabled(model):
        plain = torch.tensor([score(model, tokenizer, *each) for each in asked]).mean().neg().exp().item()
    assert abs(found - plain) > 1e-2, "the prefix has no influence"


@needs_lm_eval
def test_a_run_without_an_adapter_says_what_it_needs(tmp_path, capsys):
    models.build("llama").save_pretrained(tmp_path)
    assert main(["lm-eval", "--model_args", f"pretrained={tmp_path}", "--tasks", "hellaswag"]) == 1
    assert "model_args has no adapter; the model type 'apt' needs adapter=FOLDER" in capsys.readouterr().err


def test_without_the_harness_the_command_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert main(["lm-eval", "--tasks", "hellaswag"]) == 1
    assert "lm-eval needs lm-evaluation-harness: pip install lm_eval" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("--tasks a", "--model apt --tasks a"),
        ("run --tasks a", "run --model apt --tasks a"),
        ("--model hf --tasks a", None),
        ("run -M hf --tasks a", None),
        ("--model=hf --tasks a", None),
        ("run --config a.yaml", None),
        ("--help", None),
        ("ls tasks", None),
        ("validate --tasks a", None),
        ("", None),
    ],
)
def test_the_model_type_is_the_default_of_a_run_alone(given, passed):
    assert harness._with_model(given.split()) == (given if passed is None else passed).split()
