"""Models that accelerate offloads: exact, or refused by name; a value is never read from or copied to meta."""

import copy

import pytest
import torch
import transformers
from torch import nn

import apt_kernels
from helpers import models
from helpers.patched import randomise

accelerate = pytest.importorskip("accelerate", reason="the package accelerate is not installed")
HEAD = "AutoModelForSequenceClassification"


def cpu(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def disk(model, folder):
    return accelerate.disk_offload(model, str(folder / "offloaded"), execution_device=torch.device("cpu"))


def dispatched(model, folder):
    """The last layer and the head on disk, the rest stays."""
    places = {name: "cpu" for name, _ in model.named_children()}
    body = next(name for name in ("bert", "model", "transformer") if name in places)
    del places[body]
    inside = getattr(model, body)
    places |= {f"{body}.{name}": "cpu" for name, _ in inside.named_children()}
    layers = "encoder" if hasattr(inside, "encoder") else "layers"
    del places[f"{body}.{layers}"]
    if layers == "encoder":
        places |= {f"{body}.encoder.layer.0": "cpu", f"{body}.encoder.layer.1": "disk"}
    else:
        places |= {f"{body}.layers.0": "cpu", f"{body}.layers.1": "disk"}
    for name in ("classifier", "score"):
        if name in places:
            places[name] = "disk"
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "offloaded"))


OFFLOADS = [cpu, disk, dispatched]
both = pytest.mark.parametrize("offload", OFFLOADS)
families = pytest.mark.parametrize("family", ["bert", "llama"])


def made(family):
    return models.build(family, HEAD, num_labels=3)


def stir(model, seed=1):
    """Change the prefixes and the head as training would."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".apt." not in name:
            assert parameter.device.type != "meta", name
            nn.init.normal_(parameter, generator=generator)


def logits(model, family):
    with torch.no_grad():
        return model(**models.inputs(family, "right")).logits


def offloaded(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


@both
@families
def test_patched_afterwards_everything_is_as_without_offloading(offload, family, tmp_path):
    plain, model = made(family), offload(made(family), tmp_path)
    before, expected = offloaded(model), logits(model, family)
    assert before
    assert torch.equal(expected, logits(plain, family))
    for each in (plain, model):
        apt_kernels.patch(each, prefix_length=3, init_seed=0)
        stir(each)
    assert not any(parameter.device.type == "meta" for parameter in model.parameters() if parameter.requires_grad)
    assert offloaded(model)
    assert torch.equal(logits(model, family), logits(plain, family))

    for each in (plain, model):
        each(**models.inputs(family, "right"), labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in found)

    apt_kernels.save(model, tmp_path / "a")
    again = apt_kernels.load(made(family), tmp_path / "a")
    assert torch.equal(logits(again, family), logits(plain, family))
    for each in (plain, model):
        apt_kernels.add_adapter(each, "b", prefix_length=4, init_seed=1, gate="static")
        stir(each, 2)
    assert torch.equal(logits(model, family), logits(plain, family))
    for name in ("default", "b", "default"):
        for each in (plain, model):
            apt_kernels.set_adapter(each, name)
        assert torch.equal(logits(model, family), logits(plain, family))
    apt_kernels.set_adapter(model, "b")
    apt_kernels.prune(model, [2, 1])
    logits(model, family)
    apt_kernels.load(apt_kernels.set_adapter(model, "default"), tmp_path / "a")
    assert torch.equal(logits(model, family), logits(again, family))
    apt_kernels.unpatch(model)
    assert offloaded(model) == before
    assert torch.equal(logits(model, family), expected)


@both
@families
def test_offloaded_afterwards_values_go_through_the_hooks(offload, family, tmp_path):
    plain = apt_kernels.patch(made(family), prefix_length=3, init_seed=0)
    stir(plain)
    apt_kernels.save(plain, tmp_path / "default")
    apt_kernels.add_adapter(plain, "b", prefix_length=2)
    stir(plain, 2)
    apt_kernels.save(plain, tmp_path / "b")
    apt_kernels.set_adapter(plain, "default")
    model = offload(copy.deepcopy(plain), tmp_path)
    assert any(".apt." in name for name in offloaded(model))
    assert torch.equal(logits(model, family), logits(plain, family))

    apt_kernels.save(model, tmp_path / "again")
    assert torch.equal(logits(apt_kernels.load(made(family), tmp_path / "again"), family), logits(plain, family))
    for name in ("b", "default", "b", "default"):
        for each in (plain, model):
            apt_kernels.set_adapter(each, name)
        assert torch.equal(logits(model, family), logits(plain, family))
        apt_kernels.save(model, tmp_path / "again")
        assert torch.equal(logits(apt_kernels.load(made(family), tmp_path / "again"), family), logits(plain, family))
    apt_kernels.add_adapter(model, "c", prefix_length=3, init_seed=0)
    apt_kernels.set_adapter(model, "default")
    other = apt_kernels.patch(made(family), prefix_length=3)
    stir(other, 5)
    apt_kernels.save(other, tmp_path / "other")
    apt_kernels.load(model, tmp_path / "other")
    assert torch.equal(logits(model, family), logits(other, family))
    assert apt_kernels.probe(model, [models.inputs(family)]).layers
    with pytest.raises(apt_kernels.PatchError, match="accelerate offloads the prefix of"):
        apt_kernels.prune(model, [1, 1])
    apt_kernels.unpatch(model)
    assert torch.equal(logits(model, family), logits(made(family), family))


@both
def test_a_gradient_that_would_be_lost_is_refused(offload, tmp_path):
    model = offload(apt_kernels.patch(made("bert"), prefix_length=3), tmp_path)
    given = models.inputs("bert", "right")
    logits(model, "bert")
    loss = model(**given, labels=torch.tensor([0, 1, 2])).loss
    with pytest.raises(apt_kernels.PatchError, match=r"apt\.\w+ trains, but accelerate offloads it"):
        loss.backward()
    loss = model.requires_grad_(False)(**given, labels=torch.tensor([0, 1, 2])).loss
    assert not loss.requires_grad


def test_a_layer_that_is_loaded_as_a_whole_is_refused(tmp_path):
    model = made("bert")
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=["BertLayer"])
    before = logits(model, "bert")
    with pytest.raises(apt_kernels.PatchError, match="preload_module_classes"):
        apt_kernels.patch(model)
    assert torch.equal(logits(model, "bert"), before)
    assert not apt_kernels_state(model)


def apt_kernels_state(model):
    return [name for name, _ in model.named_parameters() if ".apt." in name]


def test_a_model_from_pretrained_on_cpu_and_disk(tmp_path):
    made("llama").save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "score": "disk"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offloaded")
    )
    assert offloaded(model)
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    for each in (plain, model):
        apt_kernels.patch(each, prefix_length=3, init_seed=0)
        stir(each)
        apt_kernels.add_adapter(each, "b", init_seed=1)
        apt_kernels.set_adapter(each, "default")
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    apt_kernels.save(model, tmp_path / "a")
    apt_kernels.load(model, tmp_path / "a")
    assert torch.equal(logits(model, "llama"), logits(plain, "llama"))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == weights


def test_a_model_without_values_is_refused_by_name(tmp_path):
    with torch.device("meta"):
        model = made("bert")
    apt_kernels.patch(model, prefix_length=3)
    apt_kernels.set_adapter(apt_kernels.add_adapter(model, "b"), "default")
    with pytest.raises(apt_kernels.PatchError, match=r"is on the meta device and has no value"):
        apt_kernels.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    apt_kernels.save(apt_kernels.patch(made("bert"), prefix_length=3), tmp_path / "a")
    with pytest.raises(apt_kernels.PatchError, match=r"is on the meta device and has no value"):
        apt_kernels.load(model, tmp_path / "a")
    apt_kernels.unpatch(model)


def test_an_offloaded_model_is_exported_and_starts_from_a_text(tmp_path):
    model = models.build("llama")
    apt_kernels.patch(model, prefix_length=3, gate="static")
    randomise(model)
    expected = apt_kernels.as_past_key_values(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    found = apt_kernels.as_past_key_values(model)
    for layer, wanted in zip(found.layers, expected.layers):
        assert torch.equal(layer.keys, wanted.keys)
        assert torch.equal(layer.values, wanted.values)
    base, plain = models.build("llama"), models.build("llama")
    accelerate.cpu_offload(base, execution_device="cpu")
    text, given = [7, 31, 12], models.inputs("llama")
    apt_kernels.patch_from_text(base, text)
    apt_kernels.patch_from_text(plain, text)
    torch.testing.assert_close(base(**given).logits, plain(**given).logits)


def test_probe_of_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = models.build("llama")
    apt_kernels.patch(model, prefix_length=3)
    with pytest.raises(apt_kernels.PatchError, match="on the meta device and has no values"):
        apt_kernels.probe(model, [models.inputs("llama")])
