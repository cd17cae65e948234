"""A prefix for each query (``prefix_index [B, T]``): each query equals that of a row with its adapter."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import apt_kernels
from apt_kernels.errors import ArgumentError, ImplementationError
from apt_kernels.impl import reference
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from helpers.cases import CASES, examples, mixtures


def by_query(x: Inputs, seed: int = 0) -> Inputs:
    """The inputs with an adapter, or none, drawn for each query."""
    batch, _, _, queries, *_ = x.sizes
    generator = torch.Generator().manual_seed(seed)
    return replace(x, prefix_index=torch.randint(-1, len(x.prefix_key), (batch, queries), generator=generator))


def results(x: Inputs, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, log-sum-exp, and the gradients of a sum over the queries, each with its ``weight [B, T]``."""
    names = [name for name in DIFFERENTIABLE if getattr(x, name) is not None]
    leaves = {name: getattr(x, name).detach().requires_grad_() for name in names}
    out, logsumexp = torch.ops.apt_kernels.attention(*replace(x, **leaves).flat(), "reference")[:2]
    total = (out.sin() * weight[:, None, :, None]).sum() + torch.where(weight[:, None] != 0, logsumexp, 0.0).sum()
    return {"out": out, "logsumexp": logsumexp, **dict(zip(names, torch.autograd.grad(total, list(leaves.values()))))}


def expected(x: Inputs, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`results` from one call for each adapter, with that adapter in every row."""
    index, made = x.prefix_index, {}
    for adapter in range(-1, len(x.prefix_key)):
        own = index == adapter
        found = results(replace(x, prefix_index=torch.full(index.shape[:1], adapter)), weight * own)
        for name, part in found.items():
            if name in ("out", "logsumexp"):
                mine = own[:, None, :, None] if name == "out" else own[:, None]
                made[name] = torch.where(mine, part, made.get(name, 0.0))
            else:
                made[name] = made.get(name, 0.0) + part
    return made


def compare(x: Inputs, weight: torch.Tensor, wanted: dict[str, torch.Tensor]) -> None:
    for name, part in results(x, weight).items():
        torch.testing.assert_close(part, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def weights_of(x: Inputs) -> torch.Tensor:
    batch, _, _, queries, *_ = x.sizes
    weight = torch.arange(1.0, 1 + batch * queries, dtype=x.query.dtype).cos().view(batch, queries)
    # A query that sees nothing has a log-sum-exp of -inf, whose sum has no use.
    nothing = torch.isneginf(reference.attend(x)[1]).any(1)
    return weight.masked_fill(nothing, 0.0)


@given(case=mixtures(dtype=(torch.float64,), dropout=(0.0, 0.3)), seed=st.integers(0, 99))
@examples(40)
def test_each_query_equals_the_query_in_a_row_of_its_adapter(case, seed):
    x = by_query(case.inputs(), seed)
    weight = weights_of(x)
    compare(x, weight, expected(x, weight))


@pytest.mark.parametrize("name", ["mixed", "mixed_gate_query", "mixed_everything", "mixed_decode"])
def test_the_same_adapter_for_all_queries_of_a_row(name):
    x = replace(CASES[name], dtype=torch.float64).inputs()
    index = x.prefix_index[:, None].expand(-1, x.query.shape[2])
    weight = weights_of(x)
    compare(replace(x, prefix_index=index), weight, results(x, weight))


@pytest.mark.parametrize("fault", ["neighbour", "length"])
def test_planted_faults_are_noticed(fault, monkeypatch):
    x = by_query(replace(CASES["mixed"], dtype=torch.float64).inputs())
    weight = weights_of(x)
    wanted = expected(x, weight)
    if fault == "neighbour":
        own = reference._queries_of_adapters
        monkeypatch.setattr(reference, "_queries_of_adapters", lambda x: own(x)[1:] + own(x)[:1])
    else:
        seen = Inputs.prefix_seen
        monkeypatch.setattr(Inputs, "prefix_seen", lambda self: seen(self).roll(1, 1))
    with pytest.raises(AssertionError):
        compare(x, weight, wanted)


def test_packed_documents_equal_the_documents_alone():
    generator = torch.Generator().manual_seed(0)
    lengths, adapters = (3, 5, 1, 4), (1, -1, 0, 1)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 16, generator=generator)
    prefix = torch.randn(2, 2, 2, 4, 16, generator=generator)
    of_documents = torch.tensor(lengths)
    segments = torch.arange(4).repeat_interleave(of_documents)[None]
    mask = apt_kernels.Mask(causal=True, query_segments=segments, key_segments=segments)
    index = torch.tensor(adapters).repeat_interleave(of_documents)[None]
    rows = {"prefix_lengths": torch.tensor([2, 4])}
    out = apt_kernels.attention(query, key, value, *prefix, mask=mask, prefix_index=index, **rows)
    parts = (part.split(lengths, 2) for part in (query, key, value, out))
    for adapter, own_query, own_key, own_value, found in zip(adapters, *parts):
        alone = apt_kernels.attention(
            own_query, own_key, own_value, *prefix, mask=apt_kernels.Mask(causal=True),
            prefix_index=torch.tensor([adapter]), implementation="reference", **rows,
        )  # fmt: skip
        torch.testing.assert_close(found, alone)


def operands(**change) -> dict:
    query, key, value = torch.randn(3, 2, 4, 6, 16)
    prefix_key, prefix_value = torch.randn(2, 3, 4, 5, 16)
    parts = dict(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    return {**parts, "prefix_index": torch.zeros(2, 6, dtype=torch.long), **change}


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_implementations_that_have_none_refuse_it_by_name(name, monkeypatch):
    monkeypatch.setattr(apt_kernels.ops.choose.load(name), "obstacle", lambda: None)
    plan = apt_kernels.selected(**operands())
    assert plan.name == "reference"
    assert "cpu: prefix_index is [B, T]" in plan.reason
    with pytest.raises(ImplementationError, match=rf"{name!r} cannot serve .*('reference'|the tensors are on)"):
        apt_kernels.attention(**operands(), implementation=name)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 6, 1)], ids=str)
def test_messages(shape):
    with pytest.raises(ArgumentError, match=r"prefix_index has shape .* or \[B, T\] = \[2, 6\]"):
        apt_kernels.attention(**operands(prefix_index=torch.zeros(shape, dtype=torch.long)))


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 77]), torch.tensor([[2] * 6, [77, 1, 77, 0, 0, 0]])], ids=["B", "BT"]
)
def test_gate_index_of_queries_without_a_prefix_is_ignored(index):
    rows = torch.tensor([[0, -1, 2, 2, 0, 1], [-1, -1, -1, -1, -1, -1]])
    given = operands(prefix_index=rows, gate=torch.randn(3, 5))
    found = apt_kernels.attention(**given, gate_index=index)
    torch.testing.assert_close(found, apt_kernels.attention(**given, gate_index=index.clamp(max=2)))
