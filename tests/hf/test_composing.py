"""`apt_kernels.compose`: adapters one behind the other equal attention over the concatenation of their prefixes."""

from __future__ import annotations

import copy

import pytest
import torch

import apt_kernels
from apt_kernels.errors import ConfigError, PatchError
from helpers import models, oracle
from helpers.patched import randomise, real_of


def several(family: str, settings: dict[str, dict], **options):
    """A float64 model and a patched copy with an adapter of random parameters for each entry of ``settings``."""
    model = models.build(family, **options).double()
    patched = copy.deepcopy(model)
    for seed, (name, given) in enumerate(settings.items()):
        if seed:
            apt_kernels.add_adapter(patched, name, **given)
        else:
            apt_kernels.patch(patched, prefix_length=1)
            apt_kernels.add_adapter(patched, name, **given)
            apt_kernels.delete_adapter(patched, "default")
        patched.double()
        randomise(patched, seed)
    return model, patched


def of(patched, name: str):
    """Copies of the prefixes of an adapter."""
    return copy.deepcopy(apt_kernels.prefixes(apt_kernels.set_adapter(copy.deepcopy(patched), name)))


def check(family: str, plain, patched, names: list[str], padding: str | None = "right"):
    """Compose the adapters; the logits equal those of the eager model with the prefixes one behind the other."""
    given = models.inputs(family, padding=padding)
    first, *others = [of(patched, name) for name in names]
    eager, _ = oracle.build(plain, first, real_of(given, family), others)
    apt_kernels.compose(patched, names, "composed")
    assert next(iter(apt_kernels.adapters(patched))) == "composed"
    with torch.no_grad():
        got, wanted = patched(**given).logits, eager(**given).logits
    real = given["attention_mask"].bool()
    keep = real if real.shape == got.shape[:2] and family not in models.SEQ2SEQ else torch.ones(got.shape[:2]).bool()
    torch.testing.assert_close(got[keep], wanted[keep], rtol=0, atol=1e-9)
    return got


PAIRS = [
    ("auto", "auto"),
    ("none", "none"),
    ("static", "static"),
    ("none", "static"),
    ("static", "none"),
    ("auto", "static"),
    ("none", "auto"),
]


BOTH, ONE, NEITHER = (True, True), (True, False), (False, False)


@pytest.mark.proves("one adapter out of several, their prefixes one behind the other")
@pytest.mark.parametrize("family", models.some(models.FAMILIES))
def test_every_family(family):
    settings = {"a": {"prefix_length": 3}, "b": {"prefix_length": 5, "gate": "static"}}
    plain, patched = several(family, settings)
    check(family, plain, patched, ["a", "b"])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("family", "scales"),
    [("llama", BOTH), ("llama", ONE), ("llama", NEITHER), ("bert", BOTH), ("t5", BOTH)],
)
def test_outputs(family, pair, scales):
    settings = {
        name: {"prefix_length": length, "gate": gate, "layer_scale": scale}
        for name, length, gate, scale in zip("ab", (3, 5), pair, scales)
    }
    plain, patched = several(family, settings)
    check(family, plain, patched, ["a", "b"])


@pytest.mark.parametrize("padding", [None, "left"])
def test_three_adapters_on_different_layers_one_of_them_twice(padding):
    settings = {
        "a": {"prefix_length": 3, "gate": "token", "layers": [0]},
        "b": {"prefix_length": [0, 4], "gate": "static"},
        "c": {"prefix_length": 2, "gate": "token", "reparameterisation": 6},
    }
    plain, patched = several("qwen3", settings)
    names = ["a", "c", "b", "a"]
    prefixes = [of(patched, name) for name in names]
    for prefix in prefixes[1].values():
        prefix.fold()
    given = models.inputs("qwen3", padding=padding)
    eager, _ = oracle.build(plain, prefixes[0], real_of(given, "qwen3"), prefixes[1:])
    apt_kernels.compose(patched, names, "all")
    assert [prefix.length for prefix in apt_kernels.prefixes(patched).values()] == [8, 6]
    keep = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(patched(**given).logits[keep], eager(**given).logits[keep], rtol=0, atol=1e-9)


def test_equal_gates_and_scales_are_joined_bit_for_bit_in_order():
    _, patched = several("llama", {name: {"prefix_length": n, "gate": "token"} for name, n in (("a", 3), ("b", 2))})
    for name in "ab":
        for prefix in apt_kernels.prefixes(apt_kernels.set_adapter(patched, name)).values():
            prefix.layer_scale.data.fill_(1.5)
    a, b = of(patched, "a"), of(patched, "b")
    apt_kernels.compose(patched, ["b", "a"], "ba")
    for site, prefix in apt_kernels.prefixes(patched).items():
        for field, dim in (("key", 1), ("value", 1), ("gate_weight", 0)):
            assert torch.equal(getattr(prefix, field), torch.cat([getattr(x[site], field) for x in (b, a)], dim))
        assert prefix.layer_scale.item() == 1.5


def test_it_trains_apart_from_the_adapters_that_it_is_made_of():
    _, patched = several("llama", {"a": {"prefix_length": 3}, "b": {"prefix_length": 2, "gate": "static"}})
    before = {name: of(patched, name) for name in "ab"}
    apt_kernels.compose(patched, ["a", "b"], "ab")
    made = {site: prefix.key.detach().clone() for site, prefix in apt_kernels.prefixes(patched).items()}
    given = models.inputs("llama")
    optimizer = torch.optim.AdamW(apt_kernels.parameter_groups(patched))
    patched(**given, labels=given["input_ids"]).loss.backward()
    optimizer.step()
    for site, prefix in apt_kernels.prefixes(patched).items():
        assert all(parameter.grad is not None for parameter in prefix.parameters())
        assert not torch.equal(prefix.key, made[site])
    for name in "ab":
        now = of(patched, name)
        for site, prefix in before[name].items():
            assert all(torch.equal(x, y) for x, y in zip(prefix.parameters(), now[site].parameters()))


def test_save_and_load(tmp_path):
    settings = {"a": {"prefix_length": 3, "gate": "none"}, "b": {"prefix_length": 2, "gate": "static", "layers": [1]}}
    plain, patched = several("llama", settings)
    apt_kernels.compose(patched, ["a", "b"], "ab")
    assert all(prefix.key.dtype == torch.float64 for prefix in apt_kernels.prefixes(patched).values())
    given = models.inputs("llama")
    apt_kernels.save(patched, tmp_path)
    loaded = apt_kernels.load(apt_kernels.patch(plain, prefix_length=[3, 5], gate="static").double(), tmp_path)
    with torch.no_grad():
        assert torch.equal(patched(**given).logits, loaded(**given).logits)


def test_the_adapters_that_rows_name(monkeypatch):
    _, patched = several("llama", {"a": {"prefix_length": 3}, "b": {"prefix_length": 2}})
    apt_kernels.compose(patched, ["a", "b"], "ab")
    given = models.inputs("llama", padding=None)
    names = ["ab", "a"] * len(given["input_ids"])
    names = names[: len(given["input_ids"])]
    with torch.no_grad():
        mixed = patched(**given, adapter_names=names).logits
        for i, name in enumerate(names):
            row = {field: tensor[i : i + 1] for field, tensor in given.items()}
            alone = apt_kernels.set_adapter(patched, name)(**row).logits
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=0, atol=1e-9)


def heads(same: bool):
    _, patched = several(
        "bert", {"a": {"prefix_length": 3}, "b": {"prefix_length": 2}}, head="AutoModelForSequenceClassification"
    )
    for name in "ab":
        apt_kernels.set_adapter(patched, name)
        torch.nn.init.constant_(patched.classifier.weight, 0.5 if same or name == "a" else 0.25)
    return patched


def test_equal_task_heads_are_kept():
    patched = apt_kernels.compose(heads(same=True), ["a", "b"], "ab")
    assert patched.classifier.weight.requires_grad
    assert bool((patched.classifier.weight == 0.5).all())
    apt_kernels.set_adapter(patched, "b")
    patched.classifier.weight.data.fill_(3)
    assert bool((apt_kernels.set_adapter(patched, "ab").classifier.weight == 0.5).all())


def test_different_task_heads_are_refused():
    with pytest.raises(PatchError, match=r"'a' and 'b' have different values of classifier\.weight"):
        apt_kernels.compose(heads(same=False), ["a", "b"], "ab")


def test_gates_that_read_different_states_are_refused():
    _, patched = several("llama", {"a": {"gate": "token"}, "b": {"gate": "first"}, "c": {"gate": "static"}})
    with pytest.raises(PatchError, match=r"would have the gates 'token' and 'first'.*Train these adapters"):
        apt_kernels.compose(patched, ["a", "c", "b"], "ab")
    assert list(apt_kernels.adapters(patched)) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("names", "name", "message"),
    [
        ("ab", "new", "names is 'ab'; it needs a list"),
        ([], "new", r"names is \[\]; it needs a list"),
        (["a", "x"], "new", "names has 'x'; the model has 'b', 'a'"),
        (["a", 3], "new", "names has 3"),
        (["a", "b"], "b", "name is 'b'; the model already has"),
        (["a", "b"], "", "name is ''"),
    ],
)
def test_wrong_names(names, name, message):
    _, patched = several("llama", {"a": {}, "b": {}})
    with pytest.raises(ConfigError, match=message):
        apt_kernels.compose(patched, names, name)
    with pytest.raises(PatchError, match="disabled"), apt_kernels.disabled(patched):
        apt_kernels.compose(patched, ["a", "b"], "new")
    assert list(apt_kernels.adapters(patched)) == ["b", "a"]
