"""The initialisation: a patched model starts close to the base model, and the README's snippet trains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import apt_kernels
from bench.quality import first_use
from helpers import models, pretrained
from helpers.patched import assert_unchanged, snapshot

README = Path(__file__).parents[2] / "README.md"


def values(model):
    return {n: torch.cat([p.key.flatten(), p.value.flatten()]) for n, p in apt_kernels.prefixes(model).items()}


# ---- On pretrained models


@pytest.mark.slow
def test_smollm2_starts_no_worse_than_the_base_model():
    model, tokenizer = pretrained.smollm2()
    ids = pretrained.windows(tokenizer, pretrained.HELD_OUT, 4, 256)
    base = pretrained.next_token_loss(model, ids)
    for length in (1, 4, 16, 32, 128):
        apt_kernels.patch(model, prefix_length=length, init_seed=0)
        assert pretrained.next_token_loss(model, ids) < base + 0.02, length
        apt_kernels.unpatch(model)
    apt_kernels.patch(model, prefix_length=32, init="normal", init_seed=0)
    assert pretrained.next_token_loss(model, ids) > base + 0.2, "the text does not tell a bad start"


@pytest.mark.slow
def test_minilm_starts_near_the_base_model():
    model, tokenizer = pretrained.minilm()
    texts = pretrained.long_docstrings(*pretrained.HELD_OUT)[:40]
    given = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")

    def embeddings():
        with torch.no_grad():
            states, real = model(**given).last_hidden_state, given["attention_mask"][..., None]
        return torch.nn.functional.normalize((states * real).sum(1), dim=-1)

    base = embeddings()
    for length in (1, 16, 128):
        apt_kernels.patch(model, prefix_length=length, init_seed=0)
        assert (embeddings() * base).sum(-1).mean() > 0.98, length
        apt_kernels.unpatch(model)
    apt_kernels.patch(model, prefix_length=128, init="normal", init_seed=0)
    assert (embeddings() * base).sum(-1).mean() < 0.95, "the texts do not tell a bad start"


def trainer_snippet() -> str:
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "Trainer(" in code]
    return code


def run_snippet(task, folder, monkeypatch):
    """Run the README's code unchanged on the task's model and rows, not padded; return the metric before and after."""
    before = task.measure(task.model)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    lengths = [sum(row["attention_mask"]) if "attention_mask" in row else None for row in task.rows]
    data = [
        {name: value if name == "labels" else value[:length] for name, value in row.items()}
        for row, length in zip(task.rows, lengths)
    ]
    exec(trainer_snippet(), {"model": task.model, "data": data, "tokenizer": task.tokenizer})
    assert (folder / "adapter").is_dir()
    return before, task.measure(task.model)


@pytest.mark.slow
def test_the_trainer_snippet_of_the_readme_trains_minilm(tmp_path, monkeypatch):
    before, accuracy = run_snippet(pretrained.minilm_task(), tmp_path, monkeypatch)
    assert before < 0.4, "chance is 1/4"
    # At least 60% of what full fine-tuning gains over chance; 160 rows have a standard error of 4 points.
    full = first_use.best_full("MiniLM")
    assert accuracy - 0.25 > 0.6 * (full - 0.25), (accuracy, full)


@pytest.mark.slow
def test_the_trainer_snippet_of_the_readme_trains_smollm2(tmp_path, monkeypatch):
    before, loss = run_snippet(pretrained.smollm2_task(), tmp_path, monkeypatch)
    # At least 60% of what full fine-tuning at its best rate gains, as for MiniLM.
    full = first_use.best_full("SmolLM2", min)
    assert before - loss > 0.6 * (before - full), (before, loss, full)


# ---- On random models


@pytest.mark.parametrize("family", models.some(models.FAMILIES))
def test_a_seed_gives_the_same_tokens_of_the_vocabulary(family):
    first, again, other = (
        values(apt_kernels.patch(models.build(family), prefix_length=5, init_seed=seed)) for seed in (3, 3, 4)
    )
    for name, found in first.items():
        assert found.isfinite().all()
        assert torch.equal(found, again[name]), name
        assert not torch.equal(found, other[name]), name
        assert found.std() > 0.03, "it starts from random values"


@pytest.mark.parametrize("gate", ["auto", "none"])
@pytest.mark.parametrize("layer_scale", [True, False])
def test_one_token_of_the_vocabulary_is_that_token_read_before_the_text(gate, layer_scale, monkeypatch):
    """With one token no logits are lowered: the prefix is the exact copy that `patch_from_text` also creates."""
    from apt_kernels.hf import vocabulary

    monkeypatch.setattr(vocabulary, "_vocabulary", lambda model: torch.tensor([31]))
    model, given = models.build("llama"), models.inputs("llama")
    ids = torch.cat([torch.full((3, 1), 31), given["input_ids"]], dim=1)
    with torch.no_grad():
        expected = model(ids).logits[:, 1:]
        apt_kernels.patch(model, prefix_length=1, gate=gate, layer_scale=layer_scale, init="vocabulary")
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-4, atol=1e-4)  # float32, rotated otherwise


@pytest.mark.parametrize("length", [60, (3, 70)])
def test_prefixes_longer_than_the_positions_of_the_model(length):
    model = apt_kernels.patch(models.build("gpt2"), prefix_length=length, init="vocabulary", init_seed=0)
    assert all(found.isfinite().all() and found.std() > 0.03 for found in values(model).values())


def test_queries_all_agree_with_their_direction():
    from apt_kernels.hf.capture import Captured
    from apt_kernels.hf.vocabulary import _direction

    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2, 8, generator=generator)
    query = shared.repeat_interleave(2, dim=0)[None, :, None] + 0.01 * torch.randn(3, 4, 20, 8, generator=generator)
    direction = _direction(Captured(None, None, None, None, query, 0.5), 2)
    logits = 0.5 * torch.einsum("bhtd,hd->bht", query, direction.repeat_interleave(2, dim=0))
    assert (logits - 1).abs().max() < 0.05


def test_zero_and_normal():
    zero, normal = (
        apt_kernels.prefixes(apt_kernels.patch(models.build("llama"), prefix_length=5, init=init, init_seed=0))
        for init in ("zero", "normal")
    )
    for name, prefix in normal.items():
        assert prefix.key.std().item() == pytest.approx(0.02, rel=0.3)
        assert torch.equal(zero[name].key, prefix.key)
        assert not zero[name].value.any()


def test_what_cannot_read_the_vocabulary_is_named(caplog):
    model = apt_kernels.patch(models.build("bert"), prefix_length=3, init_seed=0)
    assert "start from N(0" not in caplog.text
    apt_kernels.unpatch(model)
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)).eval()
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match=r"init is 'vocabulary'.*it attends inline; use 'auto'"):
        apt_kernels.patch(model, init="vocabulary")
    assert_unchanged(model, before)
    apt_kernels.patch(model, prefix_length=3, init_seed=0)
    assert "2 of 2 prefixes start from random values (init_std=0.02)" in caplog.text
    assert "attends inline" in caplog.text
    assert all(found.std() < 0.03 for found in values(model).values())


def test_meta_device_models_are_patched_and_named(caplog):
    with torch.device("meta"):
        model = models.build("llama")
    apt_kernels.patch(model, prefix_length=3)
    assert "its weights are on the meta device" in caplog.text


def test_a_text_that_fails_is_no_silent_fallback(monkeypatch, caplog):
    from apt_kernels.hf import vocabulary

    def fails(*args):
        raise ValueError("no text today")

    monkeypatch.setattr(vocabulary, "_read", fails)
    model = models.build("llama")
    before = snapshot(model)
    with pytest.raises(apt_kernels.PatchError, match="reading random tokens failed: no text today"):
        apt_kernels.patch(model, init="vocabulary")
    assert_unchanged(model, before)
    apt_kernels.patch(model)
    assert "no text today" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "random"}, "init is 'random'; it needs one of 'auto'"),
        ({"init": "vocabulary", "reparameterisation": 4}, "init is 'vocabulary'; with reparameterisation"),
        ({"init": "zero", "reparameterisation": 4}, "init is 'zero'; with reparameterisation"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.AptConfig(**settings)


def test_an_adapter_loads_into_any_start(tmp_path):
    model, given = apt_kernels.patch(models.build("llama"), prefix_length=3, init="normal"), models.inputs("llama")
    apt_kernels.save(model, tmp_path)
    for twin in (models.build("llama"), apt_kernels.patch(models.build("llama"), prefix_length=3)):
        apt_kernels.load(twin, tmp_path)
        assert torch.equal(twin(**given).logits, model(**given).logits)


def test_a_second_adapter_starts_from_the_base_model():
    alone = apt_kernels.patch(models.build("llama"), prefix_length=5, init_seed=3)
    model = apt_kernels.patch(models.build("llama"), prefix_length=2, init_seed=1)
    apt_kernels.add_adapter(model, "b", prefix_length=5, init_seed=3)
    for name, found in values(alone).items():
        assert torch.equal(values(model)[name], found), name


# ---- Groups of parameters


@pytest.mark.parametrize("gate", ["auto", "static", "none"])
@pytest.mark.parametrize("settings", [{}, {"reparameterisation": 4}, {"trainable": ["classifier", "LayerNorm"]}])
def test_every_trainable_parameter_is_in_one_group(gate, settings):
    model = models.build("bert", "AutoModelForSequenceClassification")
    apt_kernels.patch(model, prefix_length=3, gate=gate, **settings)
    groups = apt_kernels.parameter_groups(model, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(set(found)) == len(found)
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "prefix": (1e-2, 0.1),
        **({} if gate == "none" else {"gate": (1e-2 if gate == "static" else 1e-3, 0.1)}),
        "scale": (1e-2, 0.0),
        "head": (1e-2, 0.1),
    }
    torch.optim.AdamW(groups)


def test_rates_by_group():
    model = apt_kernels.patch(models.build("bert", "AutoModelForSequenceClassification"), prefix_length=3)
    groups = apt_kernels.parameter_groups(model, lr=1, gate_lr=2, scale_lr=3, head_lr=4)
    assert {g["name"]: g["lr"] for g in groups} == {"prefix": 1, "gate": 2, "scale": 3, "head": 4}
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {g["name"]: {names[id(p)].rsplit(".", 1)[-1] for p in g["params"]} for g in groups}
    assert kinds == {
        "prefix": {"key", "value"},
        "gate": {"gate_weight"},
        "scale": {"layer_scale"},
        "head": {"weight", "bias"},
    }
    with pytest.raises(apt_kernels.PatchError, match="is not patched"):
        apt_kernels.parameter_groups(models.build("bert"))


def test_gates_of_adapters_that_train_together_have_rates_of_their_own():
    model = apt_kernels.patch(models.build("llama"), prefix_length=3, gate="token")
    apt_kernels.add_adapter(model, "static", prefix_length=3, gate="static")
    apt_kernels.set_adapter(model, ["default", "static"])
    groups = apt_kernels.parameter_groups(model, lr=1.0)
    assert [(g["name"], g["lr"]) for g in groups] == [("prefix", 1.0), ("gate", 0.1), ("gate", 1.0), ("scale", 1.0)]
    assert {g["lr"] for g in apt_kernels.parameter_groups(model, gate_lr=2.0) if g["name"] == "gate"} == {2.0}


def test_the_learning_rates_are_logged_once(caplog):
    from apt_kernels.hf import optimizer

    optimizer.log_rates.cache_clear()
    for _ in range(2):
        apt_kernels.patch(models.build("bert"), prefix_length=3)
    assert caplog.text.count("parameter_groups") == 1
