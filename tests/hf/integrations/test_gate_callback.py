"""`GateCallback`: what it logs is what `probe` finds, and the training is as without it."""

import json
import logging
import random
import sys

import numpy
import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.training import fresh, rows, trainer

NAMES = ("layer_scale", "gate_mean", "gate_std_tokens", "gate_std_examples")


def entries(made):
    """The gates' entries in the log, by step."""
    found = {}
    for entry in made.state.log_history:
        if any(name.startswith("gates/") for name in entry):
            assert entry["step"] not in found
            found[entry["step"]] = {n: v for n, v in entry.items() if n.startswith("gates/")}
    return found


def batches(family, count=2):
    return [models.inputs(family, "right", seed=seed) for seed in range(count)]


def flat(probe):
    mean = {name: lambda values: sum(values) / len(values) for name in NAMES[1:]}
    return {
        f"gates/{layer.name}/{name}": mean[name](getattr(layer, name)) if name in mean else getattr(layer, name)
        for layer in probe.layers
        for name in NAMES
    }


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_what_is_logged_is_what_a_probe_finds(family, tmp_path):
    made, _ = trainer(fresh(family), tmp_path, family)
    before = flat(apt_kernels.probe(made.model, batches(family)))
    callback = apt_kernels.GateCallback(made, batches(family))
    made.add_callback(callback)
    made.train()
    found = entries(made)
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6]
    assert found[0] == before
    assert found[6] == flat(apt_kernels.probe(made.model, batches(family))) == flat(callback.probe)
    assert len({found[step][f"gates/{callback.probe.layers[0].name}/gate_mean"] for step in found}) == 7
    # Trainer's own entries are as without the callback.
    assert [e["step"] for e in made.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in made.state.log_history if "eval_loss" in e] == [3, 6]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert [e for e in saved if "gates/" in str(e)] == [e for e in made.state.log_history if "gates/" in str(e)]


def test_what_the_trainer_reports_to_gets_the_gates(tmp_path):
    seen = []

    class Sink(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, dict(logs)))

    made, _ = trainer(fresh("bert"), tmp_path, "bert", steps=2)
    made.add_callback(Sink())  # before and after the callback's own place in the list
    made.add_callback(apt_kernels.GateCallback(made, batches("bert"), picture=None))
    made.add_callback(Sink())
    made.train()
    gates = [step for step, logs in seen if any(name.startswith("gates/") for name in logs)]
    assert sorted(gates) == [0, 0, 1, 1, 2, 2]
    assert not (tmp_path / "gates.png").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"eval_strategy": "no", "logging_steps": 2, "dataloader_num_workers": 1},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("given", [True, False], ids=["batches", "own rows"])
def test_the_training_is_as_without_it(options, given, tmp_path):
    """Dropout and the order of rows draw random numbers: one more or less of them changes every later weight."""
    ends = []
    for measured in (False, True):
        model = fresh("bert", attention_probs_dropout_prob=0.2, hidden_dropout_prob=0.1)
        made, losses = trainer(model, tmp_path / str(measured), "bert", **options)
        if measured:
            loader = torch.utils.data.DataLoader(rows("bert"), batch_size=4, shuffle=True)
            made.add_callback(apt_kernels.GateCallback(made, loader if given else None))
        made.train()
        state = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        ends.append((weights, losses.by_step, state, [module.training for module in model.modules()]))
    (one, losses, state, modes), (other, *rest) = ends
    assert [losses, state, modes] == rest
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(losses) >= 3


def test_gradients_and_every_random_number_generator_are_kept(tmp_path):
    """A measuring in the middle of a step."""
    made, _ = trainer(fresh("bert"), tmp_path, "bert")
    made.model.train()
    made.model(**models.inputs("bert"), labels=torch.zeros(3).long()).loss.backward()
    grads = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}

    class Noisy(list):
        def __iter__(self):
            random.random(), numpy.random.rand(), torch.rand(1)
            return super().__iter__()

    callback = apt_kernels.GateCallback(made, Noisy(batches("bert")))
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    callback.on_train_begin(made.args, made.state, made.control)
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert grads
    assert all(torch.equal(grads[n], p.grad) for n, p in made.model.named_parameters() if n in grads)
    assert made.model.training


def test_its_own_rows_are_the_first_of_the_evaluation_data(tmp_path):
    made, _ = trainer(fresh("bert"), tmp_path, "bert", steps=1)
    made.add_callback(apt_kernels.GateCallback(made, examples=3))
    made.train()
    given = [{name: row[name][None] for name in ("input_ids", "attention_mask")} for row in rows("bert")[16:19]]
    assert made.callback_handler.callbacks[-1].probe.examples == 3
    expected = flat(apt_kernels.probe(made.model, given))
    assert entries(made)[1] == pytest.approx(expected, abs=1e-6)  # sums in another order


def test_every_few_steps_and_at_the_end(tmp_path):
    made, _ = trainer(fresh("bert"), tmp_path, "bert", steps=5)
    made.add_callback(apt_kernels.GateCallback(made, batches("bert"), every=2, picture=tmp_path / "new" / "x.svg"))
    made.train()
    assert sorted(entries(made)) == [0, 2, 4, 5]
    assert b"<svg" in (tmp_path / "new" / "x.svg").read_bytes()


def test_the_picture_is_of_the_model_that_remains(tmp_path):
    """`load_best_model_at_end` loads another checkpoint after the last step's entry in the log."""
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    made, _ = trainer(fresh("bert"), tmp_path, "bert", **best)
    callback = apt_kernels.GateCallback(made, batches("bert"))
    made.add_callback(callback)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-3")
    assert flat(callback.probe) == entries(made)[3] != entries(made)[6]


def test_without_matplotlib_the_training_ends_with_a_message(tmp_path, monkeypatch, caplog):
    made, losses = trainer(fresh("bert"), tmp_path, "bert", steps=2)
    made.add_callback(apt_kernels.GateCallback(made, batches("bert")))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "apt_kernels"):
        made.train()
    assert len(losses.by_step) == 2
    assert "no picture of the gates: Probe.picture needs matplotlib: pip install matplotlib" in caplog.text


def test_a_picture_that_cannot_be_written_does_not_end_the_training(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    made, losses = trainer(fresh("bert"), tmp_path, "bert", steps=2)
    made.add_callback(apt_kernels.GateCallback(made, batches("bert"), picture=tmp_path / "file" / "gates.png"))
    made.train()
    assert len(losses.by_step) == 2
    assert "no picture of the gates: " in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0; it needs an int of at least 1, or None"),
        ({"examples": 0}, "examples is 0; it needs an int of at least 1"),
        ({"trainer": "trainer"}, "trainer is a str; it needs a transformers Trainer"),
        ({"batches": {"input_ids": 1}}, "batches is a dict"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    made, _ = trainer(fresh("bert"), tmp_path, "bert")
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.GateCallback(**{"trainer": made, **arguments})


def test_what_cannot_be_measured_is_refused_before_the_first_step(tmp_path):
    made, _ = trainer(apt_kernels.unpatch(fresh("bert")), tmp_path, "bert")
    with pytest.raises(apt_kernels.PatchError, match="is not patched"):
        apt_kernels.GateCallback(made)
    made, losses = trainer(fresh("bert"), tmp_path, "bert")
    made.add_callback(apt_kernels.GateCallback(made, [{"input_ids": torch.tensor([[1, 1000]])}]))
    with pytest.raises(apt_kernels.ArgumentError, match="cannot run a batch"):
        made.train()
    assert not losses.by_step
    made.eval_dataset = []
    made.add_callback(apt_kernels.GateCallback(made))
    made.pop_callback(made.callback_handler.callbacks[-2])
    with pytest.raises(apt_kernels.ArgumentError, match="give GateCallback batches"):
        made.train()


def test_a_generator_of_batches_is_read_once(tmp_path):
    made, _ = trainer(fresh("bert"), tmp_path, "bert", steps=2)
    made.add_callback(apt_kernels.GateCallback(made, (batch for batch in batches("bert"))))
    made.train()
    assert sorted(entries(made)) == [0, 1, 2]


def test_trainers_own_entries_stay_beside_those_of_every_step(tmp_path):
    made, losses = trainer(fresh("bert"), tmp_path, "bert", steps=3)
    made.add_callback(apt_kernels.GateCallback(made, batches("bert"), every=1))
    made.train()
    assert sorted(entries(made)) == [0, *losses.by_step] == [0, 1, 2, 3]
