"""The gate as a probe, lengths from it, pruning, reparameterisation and prefix dropout."""

import copy
import io
import json
import pickle

import pytest
import torch
import tqdm
import transformers

import apt_kernels
from apt_kernels.hf.probing import LayerProbe, Lengths
from helpers import models
from helpers.patched import assert_unchanged, randomise, snapshot


def patched(family="bert", **settings):
    model = apt_kernels.patch(models.build(family), **{"prefix_length": 4, "init_seed": 0, **settings})
    randomise(model)
    return model


def hidden_states(model, given):
    """The input of each attention module."""
    seen, handles = {}, []
    for name in apt_kernels.prefixes(model):

        def note(module, args, kwargs, name=name):
            seen[name] = kwargs.get("hidden_states", args[0] if args else None).detach()

        handles.append(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    ("family", "gate"), [("bert", "first"), ("bert", "mean"), ("bert", "token"), ("llama", "token")]
)
def test_a_probe_is_the_mean_and_spread_of_the_gates(family, gate, padding):
    model, batches = patched(family, gate=gate), [models.inputs(family, padding, seed=i) for i in range(2)]
    before = snapshot(model.train())
    found = apt_kernels.probe(model, batches)
    assert_unchanged(model, before)
    assert found.examples == 6
    states = [hidden_states(model.eval(), given) for given in batches]
    for layer, (name, prefix) in zip(found.layers, apt_kernels.prefixes(model).items()):
        rows = []
        for given, seen in zip(batches, states):
            for h, real in zip(seen[name], given["attention_mask"].bool()):
                h = h[real]
                h = {"first": h[:1], "mean": h.mean(dim=0, keepdim=True), "token": h}[gate]
                rows.append(torch.sigmoid(h @ prefix.gate_weight.T).detach())
        every, means = torch.cat(rows), torch.stack([row.mean(dim=0) for row in rows])
        within = torch.stack([row.var(dim=0, correction=0) for row in rows]).mean(dim=0).sqrt()
        expected = {
            "gate_mean": every.mean(dim=0),
            "gate_std_tokens": within,
            "gate_std_examples": means.std(dim=0, correction=0),
            "effective": prefix.layer_scale.detach() * every.mean(dim=0),
        }
        for field, value in expected.items():
            torch.testing.assert_close(torch.tensor(getattr(layer, field)), value, rtol=1e-4, atol=1e-5, msg=field)
        shares = torch.stack([torch.histc(column, 20, 0, 1) for column in every.T]) / len(every)
        torch.testing.assert_close(torch.tensor(layer.histogram), shares)
        assert (layer.name, layer.gate, layer.length) == (name, gate, 4)
        assert layer.layer_scale == prefix.layer_scale.item()


def test_gates_that_read_nothing_and_no_gate():
    for gate, expected in (("static", None), ("none", 1.0)):
        model = patched("bert", gate=gate, layer_scale=False)
        layer = apt_kernels.probe(model, [models.inputs("bert")]).layers[0]
        prefix = next(iter(apt_kernels.prefixes(model).values()))
        mean = torch.full((4,), expected) if expected else torch.sigmoid(prefix.gate_logits.detach())
        torch.testing.assert_close(torch.tensor(layer.effective), mean)
        assert layer.gate_std_examples == pytest.approx([0] * 4, abs=1e-6)


def test_cross_attention_leaves_the_decoders_padding_out():
    model, given = patched("t5", gate="token"), models.inputs("t5", "right")
    mask = torch.ones_like(given["decoder_input_ids"])
    mask[:, 5:] = 0
    whole = apt_kernels.probe(model, [{**given, "decoder_attention_mask": mask}])
    cut = {**given, "decoder_input_ids": given["decoder_input_ids"][:, :5]}
    for layer, expected in zip(whole.layers, apt_kernels.probe(model, [cut]).layers):
        assert layer.gate_mean == pytest.approx(expected.gate_mean, abs=1e-5)


@pytest.mark.parametrize("data", [[], {}, {"layers": []}, {"layers": [1], "modules": [], "examples": 1}])
def test_what_is_no_probe_is_named(data):
    with pytest.raises(apt_kernels.ArgumentError, match=r"not what Probe\.to_json returns"):
        apt_kernels.Probe.from_json(data)


def test_table_json_and_picture(tmp_path):
    found = apt_kernels.probe(patched(prefix_length=[4, 0]), [models.inputs("bert")])
    assert found.modules == [f"bert.encoder.layer.{i}.attention.self" for i in (0, 1)]
    assert len(found.layers) == 1
    assert len(found.table().splitlines()) == 3
    found.save(tmp_path / "probe.json")
    assert apt_kernels.Probe.from_json(json.loads((tmp_path / "probe.json").read_text())) == found
    found.picture(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches is empty"),
        ([torch.ones(1, 2).long()], "a batch is a Tensor"),
        ({"input_ids": torch.ones(1, 2).long()}, "batches is a dict; it needs dicts .* in a list"),
        ("text", "batches is a str"),
        (
            [{"labels": torch.ones(1, 2).long()}],
            r"cannot run a batch of labels \[1, 2\]: .* needs the forward's arguments",
        ),
        ([{"input_ids": [[1, 2]]}], r"cannot run a batch of input_ids \(a list\): .* return_tensors='pt'"),
        (
            [{"input_ids": torch.tensor([[1, 1000]])}],
            r"cannot run a batch of input_ids \[1, 2\]: IndexError: index out",
        ),
    ],
)
def test_batches_that_cannot_be_probed(given, message):
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        apt_kernels.probe(patched(), given)


@pytest.mark.parametrize(
    ("shown", "given"),
    [(True, {}), (False, {"progress": False}), (False, "disabled")],
    ids=["shown", "off", "disabled"],
)
def test_progress_is_shown_where_transformers_shows_it(shown, given, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(self)
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

    monkeypatch.setattr(transformers.utils.logging.tqdm_lib, "tqdm", Bar)
    model, batches = patched(), [models.inputs("bert", seed=seed) for seed in range(3)]
    # Another test may have called transformers.logging.disable_progress_bar().
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", given != "disabled")
    given = {} if given == "disabled" else given
    found = apt_kernels.probe(model, batches, **given)
    assert [(bar.n, bar.total, bar.desc) for bar in bars] == ([(3, 3, "probe")] if shown else [])
    assert found == apt_kernels.probe(model, iter(batches), progress=False)
    with pytest.raises(apt_kernels.ArgumentError, match="progress is 1; it needs True or False"):
        apt_kernels.probe(model, batches, progress=1)


def made(*weights):
    layers = [
        LayerProbe(f"layer{i}", "first", 1.0, list(w), [0.0] * len(w), [0.0] * len(w), [], list(w))
        for i, w in enumerate(weights)
    ]
    return apt_kernels.Probe(layers, [f"layer{i}" for i in range(len(weights))], 1)


def test_lengths_follow_the_weights():
    found = made([0.1, 0.9, 0.5, 0.5], [1.0, -3.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    assert found.lengths(budget=4) == (1, 3, 0)
    assert found.lengths(budget=4).keep == {"layer0": (1,), "layer1": (0, 1, 2), "layer2": ()}
    assert found.lengths(budget=12) == (4, 4, 4)
    assert found.lengths(budget=24, grow=True) == (6, 18, 0)
    assert found.lengths(budget=24, grow=True).keep == {}
    assert found.lengths(threshold=0.5) == (3, 4, 0)
    assert found.lengths(threshold=0.5).keep["layer0"] == (1, 2, 3)
    assert made([0.0] * 4, [0.0] * 4).lengths(budget=6) == (3, 3)
    assert pickle.loads(pickle.dumps(found.lengths(budget=4))).keep["layer0"] == (1,)


@pytest.mark.parametrize("budget", [1, 2, 5, 11, 23, 30])
def test_a_budget_is_spent_to_the_token(budget):
    found = made(*torch.rand(5, 6, generator=torch.Generator().manual_seed(budget)).tolist())
    lengths = found.lengths(budget=budget)
    assert sum(lengths) == budget
    assert max(lengths) <= 6
    assert sum(found.lengths(budget=10 * budget, grow=True)) == 10 * budget


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of budget and threshold"),
        ({"budget": 2, "threshold": 0.1}, "exactly one of budget and threshold"),
        ({}, "exactly one of budget and threshold; neither is given"),
        ({"budget": 2, "threshold": 0.5}, "exactly one of budget and threshold; both are given"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 9}, "budget is 9; the layers have 8 tokens"),
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"threshold": "0.1"}, "threshold is '0.1'; it needs a finite number"),
        ({"threshold": float("nan")}, "threshold is nan; it needs"),
        ({"threshold": True}, "threshold is True"),
        ({"budget": 2, "grow": 1}, "grow is 1"),
    ],
)
def test_lengths_that_cannot_be(given, message):
    with pytest.raises(apt_kernels.ArgumentError, match=message):
        made([0.5] * 4, [0.5] * 4).lengths(**given)


@pytest.mark.parametrize(
    ("family", "gate"), [("bert", "first"), ("llama", "token"), ("bert", "static"), ("t5", "token")]
)
def test_pruning_is_taking_the_tokens_out(family, gate, tmp_path):
    model, given = patched(family, gate=gate), models.inputs(family, "right")
    whole = copy.deepcopy(model)
    lengths = apt_kernels.probe(model, [given]).lengths(budget=3 * len(apt_kernels.prefixes(model)) - 1)
    assert apt_kernels.prune(model, lengths) is model
    by_hand = models.build(family)
    apt_kernels.patch(by_hand, prefix_length=list(lengths), gate=gate)
    found, old = apt_kernels.prefixes(model), apt_kernels.prefixes(whole)
    with torch.no_grad():
        for name, prefix in apt_kernels.prefixes(by_hand).items():
            keep = list(lengths.keep[name])
            assert keep == sorted(keep)
            prefix.key.copy_(old[name].key[:, keep])
            prefix.value.copy_(old[name].value[:, keep])
            prefix.layer_scale.copy_(old[name].layer_scale)
            for field in ("gate_weight", "gate_logits"):
                if getattr(prefix, field) is not None:
                    getattr(prefix, field).copy_(getattr(old[name], field)[keep])
    expected = by_hand(**given).logits
    assert torch.equal(model(**given).logits, expected)
    assert not torch.allclose(whole(**given).logits, expected, atol=1e-4)
    assert all(p.requires_grad for prefix in found.values() for p in prefix.parameters())
    apt_kernels.save(model, tmp_path)
    assert torch.equal(apt_kernels.load(models.build(family), tmp_path)(**given).logits, expected)


@pytest.mark.parametrize("family", ["bert", "gemma2"])
def test_a_layer_pruned_to_nothing_attends_as_before_the_patch(family):
    model, given = patched(family), models.inputs(family, "right")
    expected = patched(family, prefix_length=[0, 4])
    apt_kernels.prune(model, [0, 4])
    with torch.no_grad():
        for prefix, own in zip(apt_kernels.prefixes(expected).values(), apt_kernels.prefixes(model).values()):
            for target, source in zip(prefix.parameters(), own.parameters()):
                target.copy_(source)
    assert torch.equal(model(**given).logits, expected(**given).logits)
    plain = models.build(family)
    assert torch.equal(apt_kernels.unpatch(model)(**given).logits, plain(**given).logits)
    assert snapshot(model)["attributes"] == snapshot(plain)["attributes"]


def test_closing_a_gate_is_not_pruning():
    model, given = patched(gate="static"), models.inputs("bert")
    closed, short = copy.deepcopy(model), copy.deepcopy(model)
    lengths = apt_kernels.probe(model, [given]).lengths(budget=4)
    apt_kernels.prune(short, lengths)
    with torch.no_grad():
        for name, prefix in apt_kernels.prefixes(closed).items():
            gone = [i for i in range(4) if i not in lengths.keep[name]]
            prefix.gate_logits[gone] = -1e4
    assert (closed(**given).logits - short(**given).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2], "lengths has 1 entries; the model has 2"),
        ([5, 4], "lengths has 5 for bert.encoder.layer.0.attention.self; it needs an int from 0 to 4"),
        ([2.0, 4], "it needs an int from 0 to 4"),
        ([0, 0], "lengths is 0 everywhere"),
        (2, "lengths is 2; it needs a list of 2 ints, one for each attention module, such as"),
        ([2, 4], "its 4 tokens cannot be ranked"),
    ],
)
def test_a_refused_pruning_changes_nothing(lengths, message):
    model = patched()
    before = snapshot(model)
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.prune(model, lengths)
    assert_unchanged(model, before)


def test_plain_lengths_are_ranked_by_a_probe_or_by_static_gates():
    given = models.inputs("bert")
    model = patched()
    found = apt_kernels.probe(model, [given])
    expected = apt_kernels.prune(copy.deepcopy(model), Lengths([2, 4], found.lengths(budget=8).keep), probe=found)
    assert torch.equal(apt_kernels.prune(model, [2, 4], probe=found)(**given).logits, expected(**given).logits)
    static = patched(gate="static")
    strongest = next(iter(apt_kernels.prefixes(static).values())).gate_logits.detach().topk(2).indices.sort().values
    key = next(iter(apt_kernels.prefixes(static).values())).key.detach()[:, strongest]
    apt_kernels.prune(static, [2, 4])
    assert torch.equal(next(iter(apt_kernels.prefixes(static).values())).key, key)


def test_a_reparameterised_prefix_trains_and_is_folded_on_save(tmp_path):
    model, given = patched("llama", reparameterisation=6), models.inputs("llama", "right")
    name, prefix = next(iter(apt_kernels.prefixes(model).items()))
    assert prefix.key is None
    assert {n for n, _ in prefix.named_parameters() if n.startswith("mlp.")} == {
        f"mlp.{n}" for n in ("embedding", "weight_in", "bias_in", "weight_out", "bias_out")
    }
    out = model(**given).logits
    out.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in prefix.parameters())
    apt_kernels.save(model, tmp_path)
    assert prefix.mlp is not None, "saving must not end the training"
    plain = apt_kernels.load(models.build("llama"), tmp_path)
    assert apt_kernels.prefixes(plain)[name].mlp is None
    assert torch.equal(plain(**given).logits, out)
    with pytest.raises(apt_kernels.PatchError, match="other settings"):
        apt_kernels.load(model, tmp_path)
    lengths = apt_kernels.probe(model, [given]).lengths(budget=5)
    assert torch.equal(
        apt_kernels.prune(model, lengths)(**given).logits, apt_kernels.prune(plain, lengths)(**given).logits
    )


def test_the_first_reparameterised_prefix_has_the_asked_spread():
    model = apt_kernels.patch(models.build("llama"), prefix_length=64, reparameterisation=16, init_std=0.05)
    key, value = next(iter(apt_kernels.prefixes(model).values())).tokens()
    assert key.shape == value.shape == (2, 64, 8)
    assert torch.cat([key, value]).std().item() == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize("width", [None, 6])
def test_prefix_dropout_is_for_training_alone(width):
    given = models.inputs("bert")
    # The normal start: the tolerance below is for values of about 1.
    model = patched(prefix_dropout=0.5, reparameterisation=width, init="normal")
    plain = patched(reparameterisation=width, init="normal")
    assert torch.equal(model(**given).logits, plain(**given).logits)
    model.train()
    assert not torch.equal(model(**given).logits, model(**given).logits)
    prefix = next(iter(apt_kernels.prefixes(model).values()))
    mean = torch.stack([prefix.tokens()[0] for _ in range(2000)]).mean(dim=0)
    torch.testing.assert_close(mean, prefix.eval().tokens()[0], rtol=0, atol=0.15)  # four standard errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reparameterisation": 0}, "reparameterisation is 0"),
        ({"reparameterisation": True}, "reparameterisation is True"),
        ({"prefix_dropout": 1.0}, "prefix_dropout is 1.0"),
        ({"prefix_dropout": "a"}, "prefix_dropout is 'a'"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(apt_kernels.ConfigError, match=message):
        apt_kernels.AptConfig(**settings)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compile", "data parallel"])
def test_a_model_in_a_wrapper_is_probed_and_pruned(wrap):
    model = apt_kernels.patch(models.build("llama"), prefix_length=4, gate="static", init_seed=0)
    randomise(model)
    twin = copy.deepcopy(model)
    found, expected = (
        apt_kernels.probe(each, [models.inputs("llama")]).lengths(budget=3) for each in (wrap(model), twin)
    )
    assert (found, found.keep) == (expected, expected.keep)
    wrapped = wrap(model)
    assert apt_kernels.prune(wrapped, found) is wrapped
    apt_kernels.prune(twin, expected)
    assert torch.equal(model(**models.inputs("llama")).logits, twin(**models.inputs("llama")).logits)


def test_a_probe_prints_in_a_few_short_lines():
    model = apt_kernels.patch(models.build("bert"), prefix_length=3)
    found = apt_kernels.probe(model, [models.inputs("bert")])
    lines = str(found).splitlines()
    assert lines[0] == "Probe of 2 layers on 3 examples:"
    assert len(lines) == 3
    assert all("3 tokens, mean weight" in line and len(line) < 100 for line in lines[1:])
    many = type(found)(found.layers * 30, found.modules * 30, 3)
    assert str(many).splitlines()[-1] == "  ... and 49 more"
    assert len(repr(found.layers[0])) < 150


def test_names_of_adapters_are_refused():
    """The prefixes that are watched are the active adapter's."""
    model = apt_kernels.patch(models.build("llama"), prefix_length=4)
    apt_kernels.add_adapter(model, "b", prefix_length=4)
    batch = {**models.inputs("llama", batch=2), "adapter_names": ["default", "b"]}
    for call in (
        lambda: apt_kernels.probe(model, [batch]),
        lambda: apt_kernels.export(model, "folder", approximate="mean", batches=[batch]),
    ):
        with pytest.raises(apt_kernels.ArgumentError, match=r"a batch has adapter_names; .* active adapter, 'b'"):
            call()


def test_a_probe_that_cannot_be_written_and_an_argument_without_a_name_are_named(tmp_path):
    found = apt_kernels.probe(apt_kernels.patch(models.build("llama"), prefix_length=2), [models.inputs("llama")])
    with pytest.raises(apt_kernels.AdapterError, match="cannot be written: Is a directory"):
        found.save(tmp_path)
    with pytest.raises(apt_kernels.ConfigError, match="folder is None; it needs a path"):
        found.save(None)
    with pytest.raises(apt_kernels.ArgumentError, match="lengths is given 3 without a name; it needs budget= or"):
        found.lengths(3)
