"""TRL's trainers on a patched decoder, and what their reference model is, in numbers."""

import math

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

import apt_kernels
from helpers import models
from helpers.patched import randomise

# The extra "test" has TRL for Python 3.11 or newer, and TRL has datasets; Python 3.10 has neither.
trl = pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
datasets = pytest.importorskip("datasets", reason="datasets is not installed; TRL needs it")

WORDS = [f"w{i}" for i in range(90)]
SIZE = 8  # rows of the data


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("llama")
    special = {name: i for i, name in enumerate(("[PAD]", "[BOS]", "[EOS]", "[UNK]"))}
    words = Tokenizer(tokenizer_models.WordLevel({**special, **{w: i + 4 for i, w in enumerate(WORDS)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    models.build("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def patched(folder, auto=transformers.AutoModelForCausalLM, **options):
    model = apt_kernels.patch(auto.from_pretrained(folder, **options), prefix_length=4, init_seed=0)
    randomise(model)
    return model


def base_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def assert_only_the_adapter_trained(model, before):
    now = dict(model.named_parameters())
    assert before
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def sentence(start, count):
    return " ".join(WORDS[(7 * start + 3 * i) % 90] for i in range(count))


def texts():
    return datasets.Dataset.from_dict({"text": [sentence(i, 4 + i % 3) for i in range(SIZE)]})


def pairs():
    rows = range(SIZE)
    return datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i, 5) for i in rows],
            "chosen": [" " + sentence(i + 50, 4) for i in rows],
            "rejected": [" " + sentence(i + 70, 5) for i in rows],
        }
    )


def arguments(kind, folder, **options):
    given = dict(
        output_dir=folder,
        report_to="none",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    return kind(**{**given, **options})


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry and "step" in entry]


def log_probability(model, tokenizer, prompt, completion):
    """Of a completion (its end included) after a prompt, by the model's own logits."""
    prompt = tokenizer(prompt).input_ids
    ids = torch.tensor([prompt + tokenizer(completion).input_ids + [tokenizer.eos_token_id]])
    with torch.no_grad():
        found = model(ids).logits.log_softmax(-1)
    return found[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def dpo_loss(model, reference, tokenizer, beta=0.1):
    """The mean loss over the first batch, from the definition."""
    losses = []
    for row in list(pairs()):
        ratio = {
            name: log_probability(model, tokenizer, row["prompt"], row[name])
            - log_probability(reference, tokenizer, row["prompt"], row[name])
            for name in ("chosen", "rejected")
        }
        losses.append(-torch.nn.functional.logsigmoid(beta * (ratio["chosen"] - ratio["rejected"])).item())
    return losses


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sft(packed, folder, tokenizer, tmp_path):
    model = patched(folder)
    before, ids = base_of(model), [[*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id] for row in texts()]
    found = [model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in ids]
    weights = [len(row) - 1 for row in ids]
    expected = sum(loss * weight for loss, weight in zip(found, weights)) / sum(weights)
    # Packed: one row holds all texts, without padding.
    options = {"packing": True, "max_length": 64} if packed else {"per_device_train_batch_size": SIZE}
    args = arguments(trl.SFTConfig, tmp_path, **options, save_strategy="steps", save_steps=3)
    trainer = trl.SFTTrainer(model, args=args, train_dataset=texts(), processing_class=tokenizer)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert_only_the_adapter_trained(model, before)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    apt_kernels.load(again, tmp_path / "checkpoint-3")
    given = torch.tensor([ids[0]])
    assert torch.equal(again(given).logits, model.eval()(given).logits)


@pytest.mark.parametrize("own", [True, False], ids=["the adapter", "the base model"])
def test_dpo_reference(own, folder, tokenizer, tmp_path):
    """With the adapter as it was, the first loss is ln 2; with the base model it is another, by the definition."""
    model = patched(folder)
    before = base_of(model)
    reference = apt_kernels.reference_model(model, prefix=own)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = dpo_loss(model, reference if own else plain, tokenizer)
    args = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=SIZE)
    trainer = trl.DPOTrainer(model, ref_model=reference, args=args, train_dataset=pairs(), processing_class=tokenizer)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert (losses[0] == pytest.approx(math.log(2), abs=1e-5)) == own
    assert losses[-1] < losses[0]
    assert_only_the_adapter_trained(model, before)
    # The reference has not moved while the model has.
    assert dpo_loss(model, reference, tokenizer) != pytest.approx(expected, abs=1e-3)
    start = patched(folder) if own else plain
    ids = torch.tensor([[5, 9, 12, 30]])
    assert torch.equal(reference(ids).logits, start(ids).logits)
    shared = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    assert shared <= {p.data_ptr() for p in reference.parameters()}


@pytest.mark.parametrize("own", [True, False], ids=["the adapter", "the base model"])
def test_kto_reference(own, folder, tokenizer, tmp_path):
    """1 - sigmoid(0) at the first step where the model equals its reference."""
    model = patched(folder)
    data = datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i, 5) for i in range(SIZE)],
            "completion": [" " + sentence(i + 50, 4) for i in range(SIZE)],
            "label": [i % 2 == 0 for i in range(SIZE)],
        }
    )
    args = arguments(trl.KTOConfig, tmp_path, per_device_train_batch_size=SIZE)
    given = {"args": args, "train_dataset": data, "processing_class": tokenizer}
    if own:
        with pytest.raises(apt_kernels.PatchError, match="second base model"):
            trl.KTOTrainer(patched(folder), **given)
    trainer = trl.KTOTrainer(model, ref_model=apt_kernels.reference_model(model, prefix=own), **given)
    trainer.train()
    losses = logged(trainer)
    assert (losses[0] == pytest.approx(0.5, abs=1e-5)) == own
    assert losses[-1] < losses[0]


def test_dpo_with_log_probabilities_from_before_the_training(folder, tokenizer, tmp_path):
    """TRL's own way without any reference model: the model that trains computes them before the first step."""
    model = patched(folder)
    args = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=SIZE, precompute_ref_log_probs=True)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tokenizer)
    assert trainer.ref_model is None
    trainer.train()
    kept = trl.DPOTrainer(
        patched(folder),
        ref_model=apt_kernels.reference_model(patched(folder)),
        args=arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=SIZE),
        train_dataset=pairs(),
        processing_class=tokenizer,
    )
    kept.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer) == pytest.approx(logged(kept), abs=1e-5)


def test_dpo_of_a_lora_beside_the_prefix(folder, tokenizer, tmp_path):
    """Both are in the reference as they were: the first loss is ln 2 although the LoRA is not new."""
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(patched(folder), settings)
    args = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=SIZE)
    given = {"args": args, "train_dataset": pairs(), "processing_class": tokenizer}
    trainer = trl.DPOTrainer(model, ref_model=apt_kernels.reference_model(model), **given)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    moved = {name for name, p in model.named_parameters() if name in start and not torch.equal(p, start[name])}
    assert {"lora" in name for name in moved} == {".apt." in name for name in moved} == {True, False}


def test_a_reference_that_would_be_another_is_refused(folder, tokenizer, tmp_path):
    given = {"train_dataset": pairs(), "processing_class": tokenizer}
    args = arguments(trl.DPOConfig, tmp_path)
    with pytest.raises(apt_kernels.PatchError, match=r"second base model .* Pass ref_model=apt_kernels"):
        trl.DPOTrainer(patched(folder), args=args, **given)
    model = peft.get_peft_model(patched(folder), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = trl.DPOTrainer(model, args=args, **given)
    with pytest.raises(apt_kernels.PatchError, match="the reference would have the prefix that trains"):
        trainer.train()
    for name in ("GRPO", "RLOO"):
        with pytest.raises(apt_kernels.PatchError, match=r"second base model .* Create the trainer with beta=0"):
            grpo(patched(folder), tokenizer, tmp_path, name, beta=0.04)
    # Models without a prefix are unaffected.
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    trl.DPOTrainer(plain, args=arguments(trl.DPOConfig, tmp_path), **given).train()


def test_a_reference_between_two_trainers(folder, tokenizer, tmp_path):
    """TRL replaced the model's forward by one that holds the model; the copy computes with its own prefix."""
    model, ids = patched(folder), torch.tensor([[5, 9, 12, 30]])
    args = arguments(trl.SFTConfig, tmp_path)
    for _ in range(2):
        trl.SFTTrainer(model, args=args, train_dataset=texts(), processing_class=tokenizer).train()
    expected = model.eval()(ids).logits
    reference = apt_kernels.reference_model(model)
    assert torch.equal(reference(ids).logits, expected)
    args = arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=SIZE)
    given = {"args": args, "train_dataset": pairs(), "processing_class": tokenizer}
    trainer = trl.DPOTrainer(model, ref_model=reference, **given)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert torch.equal(reference(ids).logits, expected)
    assert not torch.equal(model.eval()(ids).logits, expected)
    wrapped = model.forward
    model.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    with pytest.raises(apt_kernels.PatchError, match="the forward of LlamaForCausalLM was replaced"):
        apt_kernels.reference_model(model)


def lengths(completions, **given):
    """A reward: the number of words of which the name ends in 1."""
    return [float(sum(word.endswith("1") for word in text.split())) for text in completions]


GRPO = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 4, "temperature": 1.0}


def grpo(model, tokenizer, folder, name="GRPO", **options):
    data = datasets.Dataset.from_dict({"prompt": [sentence(i, 4) for i in range(SIZE)]})
    args = arguments(getattr(trl, f"{name}Config"), folder, **{**GRPO, **options})
    return getattr(trl, f"{name}Trainer")(model, lengths, args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("own", [True, False], ids=["the adapter", "the base model"])
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_reference_of_grpo_and_rloo(name, own, folder, tokenizer, tmp_path):
    """The logged KL divergence is 0 at the first step if the reference is the adapter as it was."""
    model = patched(folder)
    before = base_of(model)
    reference = apt_kernels.reference_model(model, prefix=own)
    trainer = grpo(model, tokenizer, tmp_path, name, beta=0.0)
    assert trainer.ref_model is None
    trl.trainer.utils.add_fused_lm_head(reference, temperature=trainer.temperature)
    trainer.ref_model, trainer.beta = reference, 0.1
    trainer.train()
    divergence = logged(trainer, "kl")
    assert (divergence[0] == pytest.approx(0, abs=1e-6)) == own
    assert divergence[-1] > 1e-4
    assert_only_the_adapter_trained(model, before)
    assert len(logged(trainer, "reward")) == 3


def test_reward_trainer(folder, tokenizer, tmp_path):
    """It has no reference; its head trains beside the prefix."""
    options = {"num_labels": 1}
    model = patched(folder, transformers.AutoModelForSequenceClassification, **options)
    before = base_of(model)
    data = pairs().map(lambda row: {n: row["prompt"] + row[n] for n in ("chosen", "rejected")}, remove_columns="prompt")
    scores = {}
    for name in ("chosen", "rejected"):
        ids = [[*tokenizer(row[name]).input_ids, tokenizer.eos_token_id] for row in data]
        scores[name] = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in ids]).detach()
    expected = -torch.nn.functional.logsigmoid(scores["chosen"] - scores["rejected"]).mean().item()
    args = arguments(trl.RewardConfig, tmp_path, per_device_train_batch_size=SIZE)
    trainer = trl.RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    assert_only_the_adapter_trained(model, before)
    assert "score.weight" not in before
