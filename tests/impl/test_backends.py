"""The requirements on every implementation, for each registered one and for one that a test registers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import apt_kernels
from apt_kernels.errors import ImplementationError
from apt_kernels.impl.backend import Plan
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from apt_kernels.ops import choose
from helpers import accuracy
from helpers.backends import Toy, place, serves, small
from helpers.cases import CASES


@pytest.mark.parametrize("name", sorted(CASES))
def test_results_obey_the_error_rule(backend, name):
    x = serves(backend, small(name).inputs(place(backend)))
    accuracy.check(x, backend.name, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_or_a_reason(backend, dtype):
    x = serves(backend, small("causal_gate_query", dtype=dtype).inputs(place(backend)))
    accuracy.check(x, backend.name, generator=torch.Generator().manual_seed(0))


PROMISES = ("plain", "causal", "causal_gate_query", "causal_decode", "dropout", "bias_gradient", "everything")
PROMISES += ("mixed", "mixed_gate_query", "mixed_decode", "mixed_everything")


def run(x: Inputs, plan: Plan, of_logsumexp: bool, needs: list[bool]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What the two operators return."""
    found = torch.ops.apt_kernels.attention(*x.flat(), plan.text)
    out, logsumexp, *kept = found
    if kept[0].numel():
        keys = x.key.shape[2]
        x = replace(x, key=kept[0][:, :, :keys], value=kept[1][:, :, :keys])
    grads = torch.ops.apt_kernels.attention_backward(
        out, logsumexp if of_logsumexp else None, out, logsumexp, *(kept if kept[0].numel() else (None, None)), needs,
        *x.flat(), plan.text,
    )  # fmt: skip
    return found, grads


def needed(x: Inputs) -> list[bool]:
    return [name in accuracy.differentiable(x) for name in DIFFERENTIABLE]


@pytest.mark.parametrize("of_logsumexp", [False, True])
@pytest.mark.parametrize("name", PROMISES)
def test_shapes_dtypes_and_layouts_are_those_that_a_compiler_is_promised(backend, name, of_logsumexp):
    x = serves(backend, small(name).inputs(place(backend)))
    plan = backend.plan(x)
    with torch.no_grad(), accuracy.poisoned_memory():
        found, grads = run(x, plan, of_logsumexp, needed(x))
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        fake = Inputs(*(mode.from_tensor(part) if isinstance(part, Tensor) else part for part in x.flat()))
        promised, promised_grads = run(fake, plan, of_logsumexp, needed(x))
    for have, said in zip((*found, *grads), (*promised, *promised_grads)):
        assert (have.shape, have.dtype) == (said.shape, said.dtype)
        # A stride along a single element means nothing.
        strides = [(a, b) for size, a, b in zip(have.shape, have.stride(), said.stride()) if size > 1]
        assert all(a == b for a, b in strides), (have.stride(), said.stride())


@pytest.mark.parametrize("name", PROMISES)
def test_the_same_bits_twice_and_inputs_are_left_alone(backend, name):
    x = serves(backend, small(name).inputs(place(backend)))
    before = [part.clone() for part in x.tensors()]
    with torch.no_grad():
        first, second = (run(x, backend.plan(x), True, needed(x)) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1])):
        assert torch.equal(one, other)
    for was, now in zip(before, x.tensors()):  # the columns beyond an adapter's length are NaN
        assert torch.equal(was.nan_to_num(), now.nan_to_num())


@pytest.mark.parametrize("name", ["plain", "causal_gate_query", "dropout"])
def test_a_gradient_that_is_not_needed_is_not_returned_and_changes_no_other(backend, name):
    x = serves(backend, small(name).inputs(place(backend)))
    plan, wanted = backend.plan(x), accuracy.differentiable(x)
    result = backend.forward(x, plan)
    if result.kept:
        x = replace(x, key=result.kept[0][:, :, : x.key.shape[2]], value=result.kept[1][:, :, : x.value.shape[2]])
    grad = torch.ones_like(result.out)
    whole = backend.backward(x, plan, result, grad, None, needed(x))
    for only in wanted:
        needs = [name == only for name in DIFFERENTIABLE]
        grads = backend.backward(x, plan, result, grad, None, needs)
        assert [found is not None for found in grads] == needs
        i = needs.index(True)
        torch.testing.assert_close(grads[i], whole[i])


def test_the_plan_is_made_once_and_shown(backend, monkeypatch):
    case = replace(small("causal"), dtype=torch.float32)
    x = serves(backend, case.inputs(place(backend)))
    plan = choose.choose(x, backend.name)
    assert plan.reason == "asked for by name"
    assert plan.strategy.isidentifier()
    assert Plan.parse(plan.text) == plan._replace(reason="")
    made, strategy = [], backend.strategy
    monkeypatch.setattr(backend, "strategy", lambda x: made.append(1) or strategy(x))
    given = [x.query, x.key, x.value, x.prefix_key, x.prefix_value.requires_grad_()]
    apt_kernels.attention(*given, implementation=backend.name).sum().backward()
    assert made == [1]
    assert apt_kernels.selected(*given, implementation=backend.name).strategy == strategy(x)
    assert apt_kernels.info()["implementations"][backend.name].startswith("usable")


def test_a_registered_implementation_is_asked_last_and_by_its_name_alone():
    choose.register(Toy())
    try:
        assert choose.names()[-1] == "toy"
        x = CASES["plain"].inputs()
        assert choose.choose(x).name != "toy"
        assert choose.choose(x, "toy") == ("toy", "eager", "asked for by name")
        with pytest.raises(ImplementationError, match="'toy'; it needs an identifier that is not taken"):
            choose.register(Toy())
    finally:
        choose.unregister("toy")
    with pytest.raises(ImplementationError, match="implementation is 'toy'"):
        choose.choose(x, "toy")
    with pytest.raises(ImplementationError, match="it needs a Backend"):
        choose.register(Toy)
