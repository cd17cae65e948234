"""The CPU implementation with one query for each row: the error rule, and what it may not compute."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl.cpu import BACKEND as CPU
from apt_kernels.impl.cpu import decode, stock
from helpers import accuracy
from helpers.cases import CASES, ONE_PREFIX, Case, cases, examples
from helpers.memory import Largest


@pytest.fixture(params=[0, 1 << 40], ids=["apart", "joined"])
def way(request):
    """Both ways, whatever the sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "JOINED_ELEMENTS", request.param)
        yield "joined" if request.param else "apart"


_ONE = {"queries": (1,), "softcap": (0.0,), "dropout": (0.0,)}


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["apart", "joined"])
@examples(100)
@given(cases(**_ONE, dtype=(torch.float32, torch.float64, torch.bfloat16, torch.float16)))
@example(Case(batch=3, queries=1, keys=5, causal=True, offset=-2, sinks=True))  # no key is seen
@example(Case(batch=3, queries=1, keys=9, causal=True, offset="row", window=(2, None), gate="query"))
@example(Case(batch=3, queries=1, keys=9, padding="all", bias="BHTS", bias_fill="inf", gate="indexed"))
def test_any_inputs_with_one_query(limit, case):
    x = replace(case, value_dim=case.head_dim).inputs()
    assert CPU.strategy(x) == "merge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "JOINED_ELEMENTS", limit)
        accuracy.check(x, "cpu", logsumexp_gradient=False, generator=torch.Generator().manual_seed(case.seed))


@pytest.mark.parametrize("name", sorted(ONE_PREFIX))
def test_the_output_alone_has_the_bits_of_the_forward(name, way):
    x = replace(CASES[name], queries=1, value_dim=CASES[name].head_dim, batch=3).inputs()
    plan = CPU.plan(x)
    with torch.no_grad(), accuracy.poisoned_memory():
        result = CPU.forward(x, plan)
        alone, again = CPU.output(x, plan), CPU.output(x, plan)
    assert torch.equal(result.out, alone)
    assert torch.equal(alone, again)
    assert (result.logsumexp.shape, result.logsumexp.dtype) == (x.query.shape[:3], x.compute_dtype)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("offset", [4, torch.tensor([4])], ids=["int", "tensor"])
def test_keys_hidden_by_their_position_are_not_read(batch, offset, way, monkeypatch):
    """As in a static cache, whose buffer is longer than what was written."""
    case = Case(batch=batch, queries=1, keys=40)
    x, seen, original = case.inputs(), [], stock._flash
    monkeypatch.setattr(
        stock, "_flash", lambda *a, **k: seen.append((a[1].shape[2], k["attn_mask"])) or original(*a, **k)
    )
    given = [x.query, x.key, x.value, x.prefix_key, x.prefix_value, x.gate[:, 0], x.layer_scale]
    mask = Mask(causal=True, query_offset=offset)
    with torch.no_grad():
        found = apt_kernels.attention(*given, mask=mask)
    assert seen == [(5 + (case.length if way == "joined" else 0), None)]
    expected = apt_kernels.attention(*given, mask=mask, implementation="reference")
    torch.testing.assert_close(found, expected)
    x.key[:, :, 5:], x.value[:, :, 5:] = torch.nan, torch.inf
    with torch.no_grad():
        assert torch.equal(apt_kernels.attention(*given, mask=mask), found)


def test_a_long_prefix_is_not_copied_for_every_row():
    """Although every row has a gate of its own."""
    case = Case(batch=8, kv_heads=2, group=2, queries=1, keys=4, length=4096, head_dim=64, value_dim=64)
    x = case.inputs()
    with Largest() as largest:
        CPU.output(x, CPU.plan(x))
    assert largest.elements == x.prefix_key.numel()  # views of the prefix itself


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    "hidden", [{"key_padding": torch.arange(9)[None] < 6}, {"dense": torch.arange(9) < 6}], ids=str
)
def test_hidden_keys_of_any_size_are_hidden(hidden, value, way):
    x = Case(batch=1, queries=1, keys=9).inputs()
    given = [x.prefix_key, x.prefix_value, x.gate[:, 0], x.layer_scale]
    with torch.no_grad():
        expected = apt_kernels.attention(x.query, x.key, x.value, *given, mask=Mask(**hidden))
        key = x.key.clone()
        key[:, :, 6:] = value
        found = apt_kernels.attention(x.query, key, x.value, *given, mask=Mask(**hidden))
    torch.testing.assert_close(found, expected)
