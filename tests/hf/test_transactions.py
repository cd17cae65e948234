"""Calls that change a model are transactions: if one ends early, the model is restored bit for bit."""

import copy
import os
import random
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import apt_kernels
from apt_kernels.hf import calls
from helpers.patched import randomise
from helpers.workflows import llama

PACKAGE = str(Path(apt_kernels.__file__).parent)


class Stop(KeyboardInterrupt):
    """Raised at one line."""


class AtLine:
    """While active, raises `Stop` when a line of the package runs for the given time; counts without ``stop``."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.call)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def call(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def line(self, frame, event, arg):
        if event != "line":
            return self.line
        place = (frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_lineno)
        self.seen[place] = self.seen.get(place, 0) + 1
        if self.stop == (place, self.seen[place]):
            sys.settrace(None)
            raise Stop(f"{place[0]}:{place[1]}")
        return self.line


def frozen(value, depth=0):
    """``value`` by identity, and what it holds."""
    if isinstance(value, torch.Tensor):
        grad = None if value.grad is None else id(value.grad)
        return id(value), value.requires_grad, grad, value.dtype, str(value.device), value.detach().clone()
    if isinstance(value, dict):
        return id(value), [(key, frozen(each, depth + 1)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set)) and depth < 3:
        return id(value), [frozen(each, depth + 1) for each in value]
    if type(value).__name__ in ("State", "Parked") or hasattr(value, "_attn_implementation_internal"):
        return id(value), frozen(vars(value), depth + 1)
    return type(value), id(value)


def everything(model):
    """The whole state of a model by name, inactive adapters included."""
    modules = dict(model.named_modules())
    for name, adapter in getattr(getattr(model, "_apt_state", None), "parked", {}).items():
        for site, prefix in adapter.prefixes.items():
            modules |= {f"parked {name} {site} {inside}": module for inside, module in prefix.named_modules()}
    return {name: (type(module), frozen(module.__dict__)) for name, module in modules.items()}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


C = dict(vocab_size=19, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(**C, num_labels=3, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config).eval()


def gptj():
    """Its attention is inline, and its layers are checkpointed."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(n_embd=8, n_layer=1, n_head=2, rotary_dim=2, vocab_size=19, n_positions=16)
    return transformers.GPTJForCausalLM(config).eval()


def trained(build, **settings):
    """A patched model with the adapters "default", active, and "b"; each has its own head where there is one."""
    model = apt_kernels.patch(build(), prefix_length=3, gate="static", **settings)
    for name in ("default", "b"):
        if name == "b":
            apt_kernels.add_adapter(model, "b", prefix_length=2, gate="token", num_frozen_tokens=1)
        randomise(model, seed=len(name))
        for parameter in (p for n, p in model.named_parameters() if p.requires_grad and ".apt." not in n):
            nn.init.normal_(parameter)
    apt_kernels.set_adapter(model, "default")
    ids = torch.tensor([[3, 4, 5, 6]])
    model(input_ids=ids).logits.sum().backward()
    return model


CALLS = {
    "patch": lambda model, folder: apt_kernels.patch(model, prefix_length=2),
    "unpatch": lambda model, folder: apt_kernels.unpatch(model),
    "load": lambda model, folder: apt_kernels.load(model, folder),
    "load into a model that is not patched": lambda model, folder: apt_kernels.load(model, folder),
    "add_adapter": lambda model, folder: apt_kernels.add_adapter(model, "c", prefix_length=1),
    "set_adapter": lambda model, folder: apt_kernels.set_adapter(model, "b"),
    "delete_adapter": lambda model, folder: apt_kernels.delete_adapter(model, "b"),
    "compose": lambda model, folder: apt_kernels.compose(model, ["default", "default"], "c"),
    "prune": lambda model, folder: apt_kernels.prune(model, [2]),
}
NEW = ("patch", "load into a model that is not patched")
# The recording pass changes nothing that outlives it: outside of `make fuzz`, some of its lines are enough.
RECORDING = ("hf/discovery", "hf/attention/lazy_scores", "hf/attention/masks", "mask.py", "config.py", "hf/compat.py")

LOADING = ("hf/checkpoint", "hf/adapter_file", "hf/hub", "hf/offload", "hf/weights", "hf/transaction")


def made(call, build, folder):
    """What the call gets: a model, and a folder with other weights."""
    other = trained(build, num_frozen_tokens=1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad or ".frozen_" in name:
                parameter += 1
    apt_kernels.save(other, folder)
    # An adapter with an MLP is folded by prune; load takes one without.
    model = (
        build()
        if call in NEW
        else trained(build, **({"num_frozen_tokens": 1} if call == "load" else {"reparameterisation": 4}))
    )
    next(model.parameters()).requires_grad_(False)
    return model


# `make fuzz`: the first and the last time of every line with every model. Else, in a minute of one core, lines drawn by
# a seed, the first or the last time in turn: half of them with one model, few with the others and in recording.
EVERY = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"


def stops(call, build, seen):
    """Where to raise: a line, and which of the times that it runs."""
    draw = random.Random(f"{call} {build.__name__}")
    for i, (place, count) in enumerate(seen.items()):
        if call.startswith("load into") and not place[0].startswith(LOADING):
            continue  # as in "patch"
        if EVERY:
            yield from ((place, each) for each in sorted({1, count}))
        elif draw.random() < (0.04 if place[0].startswith(RECORDING) else 0.5 if build is half_bert else 0.1):
            yield place, (1, count)[i % 2]


def half_bert():
    """Its head trains as a float32 copy."""
    return bert().bfloat16()


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("build", [bert, half_bert, gptj])
@pytest.mark.parametrize("call", CALLS)
def test_interrupted_at_every_line_the_model_is_as_it_was(call, build, tmp_path):
    model = made(call, build, tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(input_ids=ids).logits
    CALLS[call](copy.deepcopy(model), tmp_path)  # what is computed once a process
    twin = copy.deepcopy(model)
    with AtLine() as counted:
        CALLS[call](twin, tmp_path)
    before, tried = everything(model), 0
    for stop in stops(call, build, counted.seen):
        with pytest.raises(Stop), AtLine(stop):
            CALLS[call](model, tmp_path)
        assert equal(everything(model), before), stop
        assert torch.is_grad_enabled()
        assert not calls.local.disabled
        assert torch._C._is_torch_function_enabled()
        assert not torch._C._len_torch_function_stack()
        tried += 1
    assert tried > (25 if EVERY else 10 if build is half_bert else 1)
    assert torch.equal(model(input_ids=ids).logits, expected)
    CALLS[call](model, tmp_path)
    assert not equal(everything(model), before)


BOTH = ["b", "default"]
TOGETHER = {
    "one, then several": ("default", lambda model: apt_kernels.set_adapter(model, BOTH)),
    "several, then one": (BOTH, lambda model: apt_kernels.set_adapter(model, "b")),
    "several, then others": (BOTH, lambda model: apt_kernels.set_adapter(model, BOTH[::-1])),
    "several, then a new one": (BOTH, lambda model: apt_kernels.add_adapter(model, "c", prefix_length=1)),
    "several, then none": (BOTH, apt_kernels.unpatch),
}


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("call", TOGETHER)
def test_interrupted_at_every_line_as_several_adapters_become_active(call):
    model, (start, change) = trained(gptj), TOGETHER[call]
    apt_kernels.set_adapter(model, start)
    change(copy.deepcopy(model))  # what is computed once a process
    twin = copy.deepcopy(model)
    with AtLine() as counted:
        change(twin)
    before, draw = everything(model), random.Random(call)
    for place, count in counted.seen.items():
        if EVERY or draw.random() < 0.3:
            with pytest.raises(Stop), AtLine((place, count)):
                change(model)
            assert equal(everything(model), before), place
    names = [name for name in ("default", "b") if name in apt_kernels.adapters(model)]
    ids = torch.tensor([[3, 4, 5, 6]] * len(names))
    model(input_ids=ids, adapter_names=names).logits.sum().backward()
    change(model)
    assert not equal(everything(model), before)


def checkpoint(folder):
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    settings = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    peft.get_peft_model(llama(), settings).save_pretrained(folder)
    return folder


STARTS = {
    "patch_from_text": lambda model, folder: apt_kernels.patch_from_text(model, [3, 4, 5]),
    "patch_from_peft": lambda model, folder: apt_kernels.patch_from_peft(model, folder),
}


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.parametrize("call", STARTS)
def test_interrupted_at_a_line_of_a_start_the_model_is_as_it_was(call, tmp_path):
    """Also where the copy turns out not to be exact, after the patch."""
    model, folder = llama().train(), checkpoint(tmp_path) if call == "patch_from_peft" else None
    STARTS[call](copy.deepcopy(model), folder)  # what is computed once a process
    with AtLine() as counted:
        STARTS[call](copy.deepcopy(model), folder)
    before, draw = everything(model), random.Random(call)
    for place, count in counted.seen.items():
        if EVERY or place[0] == "hf/initialise.py" or draw.random() < 0.02:
            with pytest.raises(Stop), AtLine((place, count)):
                STARTS[call](model, folder)
            assert equal(everything(model), before), place
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("apt_kernels.hf.initialise.SAME", -1.0)
        with pytest.raises(apt_kernels.PatchError, match="differ from those of the source"):
            STARTS[call](model, folder)
    assert equal(everything(model), before)
    STARTS[call](model, folder)


def test_a_module_that_was_exchanged_is_refused_by_name():
    """The adapters hold a head of another shape: switching would raise half way."""
    model = trained(bert)
    model.classifier = nn.Linear(8, 5)
    before = everything(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(input_ids=ids).logits
    for call in (lambda: apt_kernels.set_adapter(model, "b"), lambda: apt_kernels.add_adapter(model, "c")):
        with pytest.raises(apt_kernels.PatchError, match=r"classifier\.bias has the shape \[5\]; it had \[3\]"):
            call()
        assert equal(everything(model), before)
    assert torch.equal(model(input_ids=ids).logits, expected)
    apt_kernels.unpatch(model)
    assert model.classifier.out_features == 5


def exchanged(model):
    model.model.layers[1].self_attn = copy.deepcopy(llama().model.layers[1].self_attn)


def removed(model):
    model.model.layers = model.model.layers[:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [(exchanged, "layers.1.self_attn has no prefix any more"), (removed, "layers.1.self_attn is no longer there")],
)
def test_an_attention_module_that_was_exchanged_is_refused_by_name(change, message, tmp_path):
    """A file with the remaining prefixes would not load, and the others would be lost without a word."""
    model = apt_kernels.patch(llama(), prefix_length=3)
    apt_kernels.add_adapter(model, "b", prefix_length=2)
    change(model)
    attached = list(apt_kernels.prefixes(model))
    for call in (
        lambda: apt_kernels.save(model, tmp_path / "adapter"),
        lambda: model.save_pretrained(tmp_path / "adapter"),
        lambda: apt_kernels.set_adapter(model, "default"),
        lambda: apt_kernels.add_adapter(model, "c", prefix_length=2),
    ):
        with pytest.raises(apt_kernels.PatchError, match=message):
            call()
        assert list(apt_kernels.prefixes(model)) == attached
        assert not (tmp_path / "adapter").exists()
    apt_kernels.unpatch(model)
    apt_kernels.patch(model, prefix_length=3)


def test_an_adapter_that_is_refused_while_disabled_is_not_there():
    model = trained(bert)
    with apt_kernels.disabled(model):
        with pytest.raises(apt_kernels.PatchError, match="disabled"):
            apt_kernels.add_adapter(model, "c")
        with pytest.raises(apt_kernels.PatchError, match="disabled"):
            apt_kernels.set_adapter(model, "b")
    assert list(apt_kernels.adapters(model)) == ["default", "b"]


def test_an_interrupted_patch_can_be_patched_and_unpatched():
    model = bert()
    before = everything(model)
    parameter = model.get_parameter("bert.embeddings.word_embeddings.weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", lambda *args, **kwargs: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            apt_kernels.patch(model)
    assert equal(everything(model), before)
    assert parameter.requires_grad
    apt_kernels.unpatch(apt_kernels.patch(model))


def test_unpatch_gives_back_the_head_that_was_trained():
    model = bert()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    apt_kernels.patch(model)
    nn.init.normal_(model.classifier.weight)
    apt_kernels.unpatch(model)
    assert all(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())


def test_a_refused_call_touches_nothing():
    """Other threads may be in a forward: what did not change is not written to."""
    model = trained(bert)

    class Watched(dict):
        def __copy__(self):
            return dict(self)

        def clear(self, *args):
            raise AssertionError("written to")

        update = __setitem__ = __delitem__ = clear

    for module in model.modules():
        module._forward_hooks = Watched(module._forward_hooks)
    with pytest.raises(apt_kernels.ConfigError):
        apt_kernels.set_adapter(model, "unknown")
