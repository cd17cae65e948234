"""The implementations under test: every registered one that runs on this machine, and one that a test registers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from apt_kernels.impl import reference
from apt_kernels.impl.backend import Backend, Result
from apt_kernels.impl.inputs import Inputs, heads_last
from apt_kernels.ops import choose
from helpers import cuda_host
from helpers.cases import CASES, Case
from helpers.kernels import DEVICE


class Toy(Backend):
    """The smallest implementation: eager attention, which keeps copies of key and value."""

    name = "toy"

    def strategy(self, x):
        return "eager"

    def forward(self, x, plan):
        with torch.no_grad():
            out, logsumexp = reference.attend(x)
        return Result(heads_last(out), logsumexp, (x.key.clone(), x.value.clone()))

    def empty_kept(self, x, plan):
        return torch.empty_like(x.key), torch.empty_like(x.value)

    def backward(self, x, plan, result, grad_out, grad_logsumexp, needs):
        return reference.BACKEND.backward(x, plan, result, grad_out, grad_logsumexp, needs)


@pytest.fixture(params=[*choose.names(), "toy"])
def backend(request) -> Iterator[Backend]:
    """Each implementation that runs on this machine, by name."""
    if request.param == "cuda" and DEVICE == "cpu":
        cuda_host.use()
    if request.param == "toy":
        choose.register(Toy())
    if choose.load(request.param).obstacle():
        pytest.skip(choose.load(request.param).obstacle())
    yield choose.load(request.param)
    if request.param == "toy":
        choose.unregister("toy")


def small(name: str, **change) -> Case:
    """A named case with small sizes; cases about sizes keep theirs."""
    case = CASES[name]
    if name not in ("odd_sizes", "window_tile", "multi_head", "multi_query"):
        sizes = {"kv_heads": 1, "group": 2, "queries": min(case.queries, 6), "length": 3}
        if case.adapters:
            sizes["adapters"] = tuple(min(length, 3) for length in case.adapters)
        case = replace(case, **sizes, keys=min(case.keys, 9) if case.keys != case.queries else sizes["queries"])
    return replace(case, **change)


def serves(backend: Backend, x: Inputs) -> Inputs:
    obstacle = backend.obstacle_for(x)
    if obstacle:
        pytest.skip(obstacle)
    return x


def place(backend: Backend) -> str:
    return "cpu" if backend.name == "cpu" else DEVICE
