"""The event "prefixes changed": every call that changes them announces it, and what each integration then drops."""

import copy

import pytest
import transformers

import apt_kernels
from apt_kernels.hf import events
from helpers import models
from helpers.generation import tuned
from helpers.patched import randomise

MANAGER = "_cached_continuous_batching_manager"


class Record(events.Integration):
    def __init__(self):
        self.checked, self.changes = [], []

    def check(self, action, model):
        self.checked.append(action)

    def changed(self, action, state):
        self.changes.append((action, [prefix.length for prefix in state.prefixes.values()]))


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(events, "_subscribed", list(events._subscribed))
    found = Record()
    events.subscribe(found)
    return found


def test_every_change_is_announced_once_with_the_prefixes_as_they_are_then(record, tmp_path):
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, gate="static")
    apt_kernels.save(model, tmp_path)
    apt_kernels.load(model, tmp_path)
    apt_kernels.add_adapter(model, "x", prefix_length=2)
    apt_kernels.set_adapter(model, "x")  # active already: nothing changes
    apt_kernels.set_adapter(model, "default")
    apt_kernels.delete_adapter(model, "x")
    apt_kernels.prune(model, [2, 1])
    apt_kernels.unpatch(model)
    assert record.changes == [
        ("patch", [4, 4]),
        ("load", [4, 4]),
        ("add", [2, 2]),
        ("set", [4, 4]),
        ("delete", [4, 4]),
        ("prune", [2, 1]),
        ("unpatch", []),
    ]
    assert record.checked == ["patch", "load", "add", "set", "set", "delete", "prune", "unpatch"]


def test_an_integration_can_refuse_every_change(monkeypatch, tmp_path):
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, gate="static")
    apt_kernels.save(model, tmp_path)
    apt_kernels.set_adapter(apt_kernels.add_adapter(model, "x"), "default")
    plain = models.build("llama")

    class Refusing(events.Integration):
        def check(self, action, model):
            raise apt_kernels.PatchError(f"{action} is refused")

    monkeypatch.setattr(events, "_subscribed", [*events._subscribed, Refusing()])
    for action, call in {
        "patch": lambda: apt_kernels.patch(plain),
        "unpatch": lambda: apt_kernels.unpatch(model),
        "add": lambda: apt_kernels.add_adapter(model, "y"),
        "add ": lambda: apt_kernels.compose(model, ["default", "x"], "y"),
        "set": lambda: apt_kernels.set_adapter(model, "x"),
        "delete": lambda: apt_kernels.delete_adapter(model, "x"),
        "prune": lambda: apt_kernels.prune(model, [1, 1]),
        "load": lambda: apt_kernels.load(model, tmp_path),
    }.items():
        with pytest.raises(apt_kernels.PatchError, match=f"{action.strip()} is refused"):
            call()


CHANGES = {
    "set": lambda model, folder: apt_kernels.set_adapter(model, "other"),
    "add": lambda model, folder: apt_kernels.add_adapter(model, "new", gate="static"),
    "delete": lambda model, folder: apt_kernels.delete_adapter(model, "other"),
    "prune": lambda model, folder: apt_kernels.prune(model, [2, 1]),
    "load": lambda model, folder: apt_kernels.load(model, folder),
    "unpatch": lambda model, folder: apt_kernels.unpatch(model),
}


@pytest.fixture
def changeable(tmp_path):
    """A model with two adapters, and a folder with other weights for its active one."""
    model = tuned("llama", "static")
    other = copy.deepcopy(model)
    randomise(other, seed=5)
    apt_kernels.save(other, tmp_path)
    apt_kernels.set_adapter(apt_kernels.add_adapter(model, "other", gate="static"), "default")
    return model, tmp_path


@pytest.mark.parametrize("change", CHANGES)
def test_continuous_batching_drops_its_blocks(change, changeable):
    model, folder = changeable
    manager = model.init_continuous_batching(continuous_batching_config=transformers.ContinuousBatchingConfig())
    setattr(model, MANAGER, manager)  # as a persistent one is kept
    destroyed = []
    manager.destroy = lambda: destroyed.append(True)
    CHANGES[change](model, folder)
    assert destroyed == [True]
    assert getattr(model, MANAGER, None) is None


@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"unpatch"}))
def test_trainer_expects_the_weights_that_there_are(change, changeable):
    model, folder = changeable
    CHANGES[change](model, folder)
    ours = {name for name, _ in model.named_parameters() if ".apt." in name}
    ignored = set(model._keys_to_ignore_on_save)
    assert not ours & ignored
    assert {name for name, _ in model.named_parameters()} - ours <= ignored


def test_trainer_no_longer_expects_a_prefix_that_was_pruned_away(changeable):
    model, _ = changeable
    apt_kernels.prune(model, [0, 3])
    assert not any("layers.0.self_attn.apt" in name for name in model._keys_to_ignore_on_save)
    assert model.load_state_dict({}, strict=False).missing_keys  # what Trainer compares with


def readers(model):
    found = [getattr(module, "apt_documents", None) for module in model.modules()]
    return [each for each in found if each is not None]


def test_packing_follows_the_gates(tmp_path):
    """Bart's encoder has the gate "first", its decoder "token": without the encoder's prefixes no gate is "first"."""
    model = apt_kernels.patch(models.build("bart"), prefix_length=2, gate="static")
    apt_kernels.set_adapter(apt_kernels.add_adapter(model, "first", gate="auto", prefix_length=2), "default")
    assert readers(model)
    assert not any(reader.gated for reader in readers(model))
    apt_kernels.set_adapter(model, "first")
    assert all(reader.gated for reader in readers(model))
    names = list(apt_kernels.prefixes(model))
    probe = apt_kernels.probe(model, [models.inputs("bart")])
    apt_kernels.prune(model, [0 if "encoder.layers" in name else 2 for name in names], probe)
    assert readers(model)
    assert not any(reader.gated for reader in readers(model))
    apt_kernels.unpatch(model)
    assert not readers(model)
