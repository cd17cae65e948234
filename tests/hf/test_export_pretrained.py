"""Exports of the pretrained models that come as packages: each gives what the patched model gives, on text."""

import copy

import peft
import pytest
import torch

import apt_kernels
from helpers import onnx_models, pretrained
from helpers.patched import randomise

TEXTS = ["Return the sum of two numbers.", "Open a file and read all of its lines into a list."]
# Logits and states of these models reach some tens, in float32; the orders of summation differ.
CLOSE = {"rtol": 1e-4, "atol": 1e-3}


@pytest.fixture(scope="module")
def encoder():
    """MiniLM with the default gate of encoders, a batch of texts, and its program with dynamic sizes."""
    model, tokenizer = pretrained.minilm()
    randomise(apt_kernels.patch(model, prefix_length=8))
    given = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=128)
    # torch.export adds guards to the example's strides.
    example = {name: torch.cat([part, part])[:3, :7].contiguous() for name, part in given.items()}
    shapes = {name: {0: batch, 1: length} for name in example}
    return model, given, example, torch.export.export(model, (), example, dynamic_shapes=shapes)


@torch.no_grad()
def states(model, given):
    expected = model(**given).last_hidden_state
    with apt_kernels.disabled(model):
        assert (model(**given).last_hidden_state - expected).abs().max() > 1e-2
    return expected


@torch.no_grad()
def test_a_program_of_minilm(encoder):
    model, given, _, program = encoder
    torch.testing.assert_close(program.module()(**given).last_hidden_state, states(model, given), **CLOSE)


def test_onnx_of_minilm(encoder, tmp_path):
    onnx_models.require()
    model, given, _, program = encoder
    torch.onnx.export(program, (), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    found = onnx_models.runner(tmp_path / "model.onnx")(**given)
    torch.testing.assert_close(found, states(model, given), **CLOSE)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_minilm(encoder):
    model, given, example, _ = encoder

    class States(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    names = ("input_ids", "attention_mask")
    traced = torch.jit.trace(States(), tuple(example[name] for name in names), check_trace=False)
    given = {name: given[name] for name in names}
    torch.testing.assert_close(traced(**given), states(model, given), **CLOSE)


@torch.no_grad()
def test_smollm2_as_a_cache_and_as_a_checkpoint_of_peft(tmp_path):
    base, tokenizer = pretrained.smollm2()
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    bare = base(ids).logits
    # From a text, so that the prefix is one that this model can read; gates and scales drawn at random.
    model = apt_kernels.patch_from_text(copy.deepcopy(base), tokenizer(TEXTS[0]).input_ids, gate="static")
    for number, prefix in enumerate(apt_kernels.prefixes(model).values()):
        prefix.gate_logits.normal_(generator=torch.Generator().manual_seed(number))
        prefix.layer_scale.fill_(0.9)
    expected = model(ids).logits
    assert (expected - bare).abs().max() > 0.1
    cache = apt_kernels.as_past_key_values(model, 1)
    torch.testing.assert_close(base(ids, past_key_values=cache).logits, expected, **CLOSE)
    apt_kernels.export(model, tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, **CLOSE)
