"""Global settings of torch do not change what the calls create: default dtype, default device, autocast."""

import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers

import apt_kernels
from helpers import models
from helpers.patched import randomise

HEAD = "AutoModelForSequenceClassification"


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "a default device": lambda: default_device("meta"),
    "within a device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "without gradients": torch.no_grad,
}


def everything(model, folder, setting):
    """Run every call that creates or moves tensors under the setting; compute outputs without it."""
    given, found = models.inputs("bert", "right"), []

    def note():
        with torch.no_grad():
            found.append(model(**given).logits)
        found.extend(p.detach().clone() for p in model.parameters() if p.requires_grad)

    def under(call):
        with setting():
            result = call()
        note()
        return result

    under(lambda: apt_kernels.patch(model, prefix_length=3, init_seed=0, gate="static", reparameterisation=4))
    randomise(model)
    under(lambda: apt_kernels.add_adapter(model, "b", prefix_length=2, init_seed=1, gate="static"))
    under(lambda: apt_kernels.compose(model, ["b", "default"], "both"))
    under(lambda: apt_kernels.set_adapter(model, "b"))
    under(lambda: apt_kernels.save(model, folder / "b"))
    under(lambda: apt_kernels.save(model, folder / "a", adapter="default"))
    under(lambda: model.save_pretrained(folder / "trainer"))
    under(lambda: apt_kernels.load(model, folder / "a", adapter="c"))
    under(lambda: apt_kernels.set_adapter(model, "default"))
    under(lambda: apt_kernels.load(model, folder / "b", adapter="b"))
    under(lambda: apt_kernels.set_adapter(model, "c"))
    under(lambda: apt_kernels.prune(model, [2, 1]))
    under(lambda: apt_kernels.delete_adapter(model, "b"))
    under(lambda: apt_kernels.unpatch(model))
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_made_is_the_same(name, tmp_path):
    base = models.build("bert", HEAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that adapters are replaced
        expected = everything(copy.deepcopy(base), tmp_path / "plain", nullcontext)
        found = everything(copy.deepcopy(base), tmp_path / "set", SETTINGS[name])
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["bfloat16 by default", "a default device", "within a device"])
def test_forwards_backwards_and_probes(name):
    model = apt_kernels.patch(models.build("bert", HEAD), prefix_length=3, init_seed=0)
    randomise(model)
    given, results = models.inputs("bert", "right"), []
    for setting in (nullcontext, SETTINGS[name]):
        model.zero_grad()
        with setting():
            logits = model(**given).logits
            logits.sum().backward()
            probe = apt_kernels.probe(model, [given])
        results.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
        results[-1].append(torch.tensor([layer.gate_mean for layer in probe.layers]))
    for plain, found in zip(*results):
        assert torch.equal(plain, found)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_vision_model_is_patched(name):
    """The example inputs that `patch` creates for it are floating-point, so a default dtype applies to them."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8
    )
    model = transformers.ViTModel(config).eval()
    with SETTINGS[name]():
        apt_kernels.patch(model, prefix_length=3)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["GPTJ", "CodeGen", "GPTNeo"])
def test_models_that_attend_in_float32_are_cast_before_or_after_the_patch(kind, dtype):
    sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=40)
    if kind == "GPTNeo":
        sizes = dict(vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=40)
        sizes["attention_types"] = [[["global", "local"], 1]]
    config = getattr(transformers, f"{kind}Config")(**sizes, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    base = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = torch.randint(3, 97, (2, 9))
    after = apt_kernels.patch(copy.deepcopy(base), prefix_length=3, init_seed=0)
    randomise(after)
    exact = after(input_ids=ids).logits
    after.to(dtype)
    before = apt_kernels.patch(copy.deepcopy(base).to(dtype), prefix_length=3, init_seed=0)
    randomise(before)
    for model in (after, before):
        found = model(input_ids=ids).logits
        assert found.dtype == dtype
        assert (found - exact).norm() < 0.05 * exact.norm()
        found.float().square().sum().backward()
        for prefix in apt_kernels.prefixes(model).values():
            assert all(p.grad.abs().max() > 0 for p in prefix.parameters())
