"""The error rule: correct results pass it, planted faults do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from apt_kernels.impl import reference
from apt_kernels.impl.inputs import Inputs
from helpers import accuracy
from helpers.cases import CASES, Case

CASE = Case(
    queries=33,
    keys=40,
    length=7,
    gate="static",
    causal=True,
    window=(9, None),
    softcap=5.0,
    sinks=True,
    dropout=0.1,
    bias="1HTS",
    bias_grad=True,
)


def altered(x: Inputs, **fields) -> Inputs:
    return replace(x, **fields)


def unscaled_value(x: Inputs) -> Inputs:
    """A planted fault: the prefix's value without gate and scale."""
    return altered(x, prefix_value=x.prefix_value / x.weights()[0, 0, :, None].to(x.prefix_value.dtype))


FAULTS_OF_INPUTS = {
    "scale_missing_on_value": unscaled_value,
    "window_off_by_one": lambda x: altered(x, window_left=x.window_left - 1),
    "causal_off_by_one": lambda x: altered(x, offset=x.offset + 1),
    "sink_forgotten": lambda x: altered(x, sinks=None),
    "softcap_forgotten": lambda x: altered(x, softcap=0.0),
    "dropout_of_another_seed": lambda x: altered(x, seed=x.seed + 1),
    "bias_forgotten": lambda x: altered(x, bias=None),
    "softmax_scale_off_by_a_fifth": lambda x: altered(x, scale=x.scale * 1.2),
}


def results(x: Inputs, wanted: list[str], *grads):
    return accuracy.evaluate(reference.attend, x, wanted, *grads)


def output_gradients(x: Inputs):
    return accuracy._output_gradients(x, True, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fault", FAULTS_OF_INPUTS)
def test_wrong_attention_fails(fault, dtype):
    x = replace(CASE, dtype=dtype).inputs()
    grads = output_gradients(x)
    ours = accuracy.evaluate(lambda leaves: reference.attend(FAULTS_OF_INPUTS[fault](leaves)), x, [], *grads)
    with pytest.raises(AssertionError, match="of what is allowed"):
        accuracy.compare(ours, x, [], *grads)


@pytest.mark.parametrize("name", accuracy.DIFFERENTIABLE)
def test_gradient_off_by_one_percent_fails(name):
    x = CASE.inputs()
    wanted, grads = accuracy.differentiable(x), output_gradients(x)
    ours = results(x, wanted, *grads)
    accuracy.compare(ours, x, wanted, *grads)
    ours[name] = ours[name] * 1.01
    with pytest.raises(AssertionError, match=f"{name} is off"):
        accuracy.compare(ours, x, wanted, *grads)


def test_forgotten_logsumexp_gradient_fails():
    x = CASE.inputs()
    wanted, grads = accuracy.differentiable(x), output_gradients(x)
    ours = results(x, wanted, grads[0], None)
    with pytest.raises(AssertionError, match="query is off"):
        accuracy.compare(ours, x, wanted, *grads)


def test_one_wrong_element_and_nan_fail():
    x = CASE.inputs()
    grads = output_gradients(x)
    for value in (torch.nan, 0.0):
        ours = results(x, [], *grads)
        ours["out"][1, 2, 3, 4] = value
        with pytest.raises(AssertionError, match="out is off"):
            accuracy.compare(ours, x, [], *grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_the_reference_passes(name, dtype):
    shares = accuracy.check(replace(CASES[name], dtype=dtype).inputs(), "reference")
    assert {"out", "logsumexp", "query"} < shares.keys()


def test_poisoned_memory_shows():
    with accuracy.poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(2, 2).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.int32)).eq(2**31 - 1).all()
    assert torch.empty.__name__ == "empty"
