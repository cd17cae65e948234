"""transformers' Trainer: evaluation, best model, checkpoints without base weights, and a resumed run's losses."""

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file

import apt_kernels
from helpers import models
from helpers.patched import randomise
from helpers.training import fresh, head_of, rows, trainer

FAMILIES = models.some(("bert", "llama", "t5")) if not models.EVERY else models.FAMILIES


@pytest.mark.proves("Trainer: checkpoint without base weights, resume with equal losses, best model")
@pytest.mark.parametrize("family", FAMILIES)
def test_resume_gives_the_losses_of_the_uninterrupted_run(family, tmp_path, caplog):
    dropout = {"bert": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1}}.get(family, {})
    whole, expected = trainer(fresh(family, **dropout), tmp_path / "whole", family)
    start = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    whole.train()
    assert all(torch.equal(p, start[n]) != p.requires_grad for n, p in whole.model.named_parameters())

    folder = tmp_path / "whole" / "checkpoint-3"
    trained = {n for n, p in whole.model.named_parameters() if p.requires_grad}
    for file in ("adapter.safetensors", "model.safetensors"):
        assert set(load_file(folder / file)) == trained
    weights = {"adapter.safetensors", "model.safetensors", "apt_config.json", "config.json"}
    state = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
    assert {path.name for path in folder.iterdir()} == weights | state

    again, found = trainer(fresh(family, seed=9, **dropout), tmp_path / "again", family)
    again.train(resume_from_checkpoint=str(folder))
    assert found.by_step == {step: expected.by_step[step] for step in (4, 5, 6)}
    assert "missing keys" not in caplog.text
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name
    twin = apt_kernels.load(models.build(family, head_of(family), **dropout), tmp_path / "whole" / "checkpoint-6")
    given = models.inputs(family)
    assert torch.equal(twin(**given).logits, whole.model.eval()(**given).logits)


def test_the_best_model_is_loaded_at_the_end(tmp_path, caplog):
    model = fresh("bert")
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=0.3)
    made, _ = trainer(model, tmp_path, "bert", save_total_limit=5, **best)
    made.train()
    scores = {log["step"]: log["eval_loss"] for log in made.state.log_history if "eval_loss" in log}
    step = min(scores, key=scores.get)
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    saved = load_file(tmp_path / f"checkpoint-{step}" / "adapter.safetensors")
    for name, parameter in model.named_parameters():
        assert name not in saved or torch.equal(parameter, saved[name])
    assert made.evaluate()["eval_loss"] == pytest.approx(scores[step])
    assert "missing keys" not in caplog.text


def test_from_pretrained_refuses_an_adapter_folder(tmp_path):
    model = fresh("llama")
    model.save_pretrained(tmp_path)
    for kind in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.LlamaModel):
        with pytest.raises((OSError, ValueError), match=r"apt_kernels adapter.*apt_kernels\.load"):
            kind.from_pretrained(tmp_path)
    apt_kernels.unpatch(model).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "config.json").exists()


@pytest.mark.proves("Trainer: predictions")
@pytest.mark.parametrize("family", models.FAMILIES if models.EVERY else ["bert", "t5"])
def test_predictions_are_those_of_the_patched_model(family, tmp_path):
    model = fresh(family)
    randomise(model)
    made, _ = trainer(model, tmp_path, family)
    data = rows(family)[:5]
    with torch.no_grad():
        expected = torch.cat([model(**one_row(row)).logits for row in data])
        with apt_kernels.disabled(model):
            plain = torch.cat([model(**one_row(row)).logits for row in data])
    assert (plain - expected).abs().max() > 1e-2, "the prefix has no influence"
    found = made.predict(data).predictions
    torch.testing.assert_close(torch.tensor(found[0] if isinstance(found, tuple) else found), expected)


def one_row(row):
    return {name: tensor[None] for name, tensor in row.items()}


@pytest.mark.proves("gradient checkpointing under Trainer, bfloat16 base under autocast")
@pytest.mark.parametrize("family", FAMILIES if models.EVERY else ["llama"])
def test_checkpointing_and_mixed_precision_under_trainer(family, tmp_path):
    model = fresh(family).to(torch.bfloat16)
    for prefix in apt_kernels.prefixes(model).values():
        prefix.float()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    made, _ = trainer(model, tmp_path, family, bf16=True, gradient_checkpointing=True)
    made.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
        assert parameter.dtype == (torch.float32 if ".apt." in name else torch.bfloat16)


@pytest.mark.proves("Accelerate")
@pytest.mark.parametrize("family", FAMILIES if models.EVERY else ["bert"])
def test_accelerate(family, tmp_path):
    curves = []
    for accelerated in (False, True):
        model = fresh(family).train()
        optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=3e-2)
        loader = torch.utils.data.DataLoader(rows(family)[:16], batch_size=4)
        backward = torch.Tensor.backward
        if accelerated:
            accelerator = Accelerator(cpu=True)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            backward = accelerator.backward
        curve = []
        for batch in loader:
            loss = model(**batch).loss
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == curves[1]
    assert curves[0][-1] != curves[0][0]
    accelerator.save_state(tmp_path / "state")
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomise(accelerator.unwrap_model(model), seed=5)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(p, want[n]) for n, p in model.named_parameters())


def test_a_resumed_checkpoint_goes_into_the_adapter_that_it_was_saved_from(tmp_path):
    def two():
        model = apt_kernels.patch(models.build("bert"), prefix_length=3)
        return apt_kernels.add_adapter(model, "b", prefix_length=3)

    model, given = randomise_and_return(two(), 5), models.inputs("bert")
    model.save_pretrained(tmp_path)
    other = two()
    apt_kernels.set_adapter(other, "default")
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert next(iter(apt_kernels.adapters(other))) == "b"
    assert torch.equal(other(**given).logits, model(**given).logits)
    alone = apt_kernels.patch(models.build("bert"), prefix_length=3)
    with pytest.raises(apt_kernels.AdapterError, match="saved from the adapter 'b'; the model has 'default'"):
        alone.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def randomise_and_return(model, seed):
    randomise(model, seed)
    return model
