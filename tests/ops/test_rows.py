"""A prefix for each row: each row of a mixed batch against the same row alone, planted faults, and messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given

import apt_kernels
from apt_kernels.errors import ArgumentError, ImplementationError
from apt_kernels.impl.cpu import decode
from apt_kernels.impl.cuda import library
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from apt_kernels.ops import choose
from helpers import accuracy
from helpers.cases import CASES, examples, mixtures


@given(case=mixtures())
@examples(60)
def test_any_mixture(case):
    accuracy.check(case.inputs(), "cpu")


@pytest.mark.parametrize("limit", [0, 1 << 40], ids=["apart", "joined"])
@given(case=mixtures(queries=(1,)))
@examples(30)
def test_any_mixture_in_decoding(limit, case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "JOINED_ELEMENTS_BY_ROW", limit)
        accuracy.check(case.inputs(), "cpu")


def alone(x: Inputs, row: int) -> tuple[Inputs, int]:
    """The inputs of one row, with one prefix of its own length; and its adapter."""
    adapter = int(x.prefix_index[row])
    length = int(x.prefix_lengths[adapter])

    def cut(tensor, dim=0):
        return tensor if tensor is None or tensor.shape[dim] == 1 else tensor.narrow(dim, row, 1)

    gate, index = x.gate, cut(x.gate_index)
    if gate is not None:
        gate = (gate if index is not None else cut(gate))[..., :length]
    scale = x.layer_scale
    if scale is not None and len(scale) > 1:
        scale = scale[adapter : adapter + 1]
    parts = {name: cut(getattr(x, name)) for name in ("query", "key", "value", "bias", "dense", "key_padding")}
    parts |= {name: cut(getattr(x, name)) for name in ("query_segments", "key_segments", "query_offset")}
    prefix = {name: getattr(x, name)[adapter, :, :length] for name in ("prefix_key", "prefix_value")}
    own = {"gate": gate, "gate_index": index, "layer_scale": scale, "prefix_index": None, "prefix_lengths": None}
    return replace(x, **parts, **prefix, **own), adapter


@given(case=mixtures(dtype=(torch.float64,)))
@examples(40)
def test_each_row_equals_the_row_alone_under_its_adapter(case):
    x = case.inputs()
    wanted = [name for name in DIFFERENTIABLE if getattr(x, name) is not None]

    def run(inputs, implementation, rows):
        out, logsumexp = torch.ops.apt_kernels.attention(*inputs.flat(), implementation)[:2]
        weight = torch.arange(1.0, 1 + out.shape[3], dtype=out.dtype).cos()
        return out, logsumexp, (out * weight * rows[:, None, None, None]).sum()

    leaves = {name: getattr(x, name).detach().requires_grad_() for name in wanted}
    x = replace(x, **leaves)
    factors = torch.arange(1.0, 1 + case.batch, dtype=torch.float64)
    out, logsumexp, total = run(x, "cpu", factors)
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True, allow_unused=True)
    expected = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for row in range(case.batch):
        if int(x.prefix_index[row]) < 0 or not int(x.prefix_lengths[x.prefix_index[row]]):
            continue
        single, _ = alone(x, row)
        own_out, own_logsumexp, own = run(single, "reference", factors[row : row + 1])
        torch.testing.assert_close(out[row], own_out[0])
        torch.testing.assert_close(logsumexp[row], own_logsumexp[0])
        parts = torch.autograd.grad(own, list(leaves.values()), materialize_grads=True, allow_unused=True)
        for name, part in zip(leaves, parts):
            expected[name] += part
    for name, grad in zip(leaves, grads):
        if name in (
            "prefix_key",
            "prefix_value",
            "gate",
            "layer_scale",
        ):  # of the others, rows without a prefix have some
            torch.testing.assert_close(grad, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["mixed", "mixed_gate_query", "mixed_causal", "mixed_decode"])
def test_rows_without_a_prefix_are_attention_without_one(name, implementation):
    x = replace(CASES[name], dtype=torch.float64).inputs()
    out, logsumexp = torch.ops.apt_kernels.attention(*x.flat(), implementation)[:2]
    group = x.query.shape[1] // x.key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (x.key, x.value))
    logits, visible = x.query @ key.mT * x.scale, x.visible()
    logits = logits if visible is None else logits.masked_fill(~visible, -torch.inf)
    base = x.prefix_index < 0
    assert base.any()
    torch.testing.assert_close(out[base], (logits.softmax(-1) @ value)[base])
    torch.testing.assert_close(logsumexp[base], logits.logsumexp(-1)[base])


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["mixed_gate_static", "mixed_gate_query"])
def test_an_adapter_without_rows_and_columns_beyond_a_length_get_no_gradient(name, implementation):
    case = replace(CASES[name], batch=3, adapters=(5, 2, 3, 4), rows=(1, -1, 3))
    x = case.inputs()
    leaves = {
        part: getattr(x, part).detach().requires_grad_() for part in ("prefix_key", "prefix_value", "layer_scale")
    }
    out = torch.ops.apt_kernels.attention(*replace(x, **leaves).flat(), implementation)[0]
    grads = dict(zip(leaves, torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    for part in ("prefix_key", "prefix_value"):
        used = torch.zeros(4, 5, dtype=torch.bool)
        used[1, :2] = used[3, :4] = True
        assert (grads[part][~used[:, None].expand(4, 2, 5)] == 0).all()
        assert (grads[part][used[:, None].expand(4, 2, 5)] != 0).all()
    assert (grads["layer_scale"] != 0).tolist() == [False, True, False, True]


def test_a_gate_of_inf_is_exactly_one():
    x = replace(CASES["mixed_gate_query"], gate_inf=False).inputs()
    opened = replace(x, gate=torch.full_like(x.gate, torch.inf))
    for implementation in ("cpu", "reference"):
        found = torch.ops.apt_kernels.attention(*opened.flat(), implementation)[0]
        expected = torch.ops.apt_kernels.attention(*replace(x, gate=None).flat(), implementation)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_row_without_a_prefix_whose_keys_are_hidden_sees_nothing(implementation, queries):
    given = operands(batch=3)
    given["query"] = given["query"][:, :, :1].expand(-1, -1, queries, -1)
    given["prefix_index"] = torch.tensor([-1, 0, -1])
    padding = torch.ones(3, given["key"].shape[2], dtype=torch.bool)
    padding[:2] = False  # of the first row, which sees nothing, and of the second, which sees its prefix
    out, logsumexp = apt_kernels.attention(
        **given, mask=apt_kernels.Mask(key_padding=padding), implementation=implementation, return_logsumexp=True
    )
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool(torch.isneginf(logsumexp[0]).all())
    assert bool(torch.isfinite(logsumexp[1:]).all())
    assert bool((out[1:] != 0).any(-1).all())


def neighbour(x: Inputs, monkeypatch) -> None:
    rows = Inputs.prefix_rows
    monkeypatch.setattr(Inputs, "prefix_rows", lambda self, prefix: rows(self, prefix.roll(1, 0).nan_to_num()))


def length_of_neighbour(x: Inputs, monkeypatch) -> None:
    seen = Inputs.prefix_seen
    monkeypatch.setattr(Inputs, "prefix_seen", lambda self: seen(self).roll(1, 0))


def gradient_into_another(x: Inputs, monkeypatch) -> None:
    add = torch.Tensor.index_add_

    def wrong(self, dim, index, source, **keywords):
        return add(self, dim, (index + 1) % self.shape[dim], source, **keywords)

    monkeypatch.setattr(torch.Tensor, "index_add_", wrong)


@pytest.mark.parametrize("fault", [neighbour, length_of_neighbour, gradient_into_another])
@pytest.mark.parametrize("name", ["mixed", "mixed_gate_query", "mixed_gate_none", "mixed_dropout"])
def test_planted_faults_are_noticed(name, fault, monkeypatch):
    x = replace(CASES[name], spread=3.0).inputs()
    wanted, generator = accuracy.differentiable(x), torch.Generator().manual_seed(0)
    grads = accuracy._output_gradients(x, False, generator)

    def op(leaves):
        return torch.ops.apt_kernels.attention(*leaves.flat(), "cpu")[:2]

    accuracy.compare(accuracy.evaluate(op, x, wanted, *grads), x, wanted, *grads)
    with monkeypatch.context() as patch:
        fault(x, patch)
        ours = accuracy.evaluate(op, x, wanted, *grads)
    with pytest.raises(AssertionError, match="is off by"):
        accuracy.compare(ours, x, wanted, *grads)


def operands(adapters: int = 3, batch: int = 2, **change) -> dict:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, batch, 4, 6, 16, generator=generator)
    prefix_key, prefix_value = torch.randn(2, adapters, 4, 5, 16, generator=generator)
    parts = dict(query=query, key=key, value=value, prefix_key=prefix_key, prefix_value=prefix_value)
    return {**parts, "prefix_index": torch.tensor([2, -1]), **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prefix_index": None},
            r"prefix_key has shape \[3, 4, 5, 16\]; without prefix_index it needs .*give prefix_index",
        ),
        ({"prefix_index": torch.tensor([0.0, 1.0])}, "prefix_index is torch.float32; it needs an integer tensor"),
        ({"prefix_index": [0, 1]}, "prefix_index is list; it needs an integer tensor"),
        ({"prefix_index": torch.tensor([0])}, r"prefix_index has shape \[1\]; it needs \[B\] = \[2\]"),
        ({"prefix_index": torch.tensor([0, 3])}, r"prefix_index has values 0..3; it needs -1..2 \(-1: no prefix"),
        ({"prefix_index": torch.tensor([-2, 0])}, r"prefix_index has values -2..0; it needs -1..2"),
        ({"prefix_lengths": torch.tensor([5, 5])}, r"prefix_lengths has shape \[2\]; it needs \[A\] = \[3\]"),
        ({"prefix_lengths": torch.tensor([5, 6, 5])}, r"prefix_lengths has values 5..6; it needs 0..5"),
        ({"prefix_lengths": torch.ones(3)}, "prefix_lengths is torch.float32"),
        ({"prefix_key": torch.zeros(4, 5, 16)}, r"prefix_key has shape .* \[A, Hkv, M, D\]"),
        ({"prefix_value": torch.zeros(2, 4, 5, 16)}, r"prefix_value has shape .* \[A, Hkv, M, Dv\] = \[3, 4, 5, 16\]"),
        ({"layer_scale": torch.ones(2)}, r"layer_scale has shape \[2\]; .* or \[A\] = \[3\]"),
        ({"gate": torch.zeros(3, 5), "gate_index": torch.tensor([3, 0])}, "gate_index has values 0..3"),
    ],
)
def test_messages(change, message):
    with pytest.raises(ArgumentError, match=message):
        apt_kernels.attention(**operands(**change))


def test_lengths_need_an_index():
    one = operands(prefix_key=torch.zeros(4, 5, 16), prefix_value=torch.zeros(4, 5, 16), prefix_index=None)
    with pytest.raises(ArgumentError, match="prefix_lengths is given without prefix_index"):
        apt_kernels.attention(**one, prefix_lengths=torch.tensor([5]))


def test_gate_and_index_of_rows_without_a_prefix_are_ignored():
    gate, index = torch.zeros(3, 5), torch.tensor([2, 77])
    found = apt_kernels.attention(**operands(), gate=gate, gate_index=index)
    torch.testing.assert_close(found, apt_kernels.attention(**operands(), gate=gate, gate_index=index.clamp(max=2)))


def test_the_choice_says_which_implementations_have_no_prefix_for_each_row(monkeypatch):
    plan = apt_kernels.selected(**operands())
    assert (plan.name, plan.strategy) == ("cpu", "merge")
    for name in ("cpu", "triton"):
        monkeypatch.setattr(type(choose.load(name)), "obstacle_for", lambda self, x: "planted")
    monkeypatch.setattr(choose.load("cuda"), "obstacle", lambda: None)
    monkeypatch.setattr(library, "host", object())
    plan = apt_kernels.selected(**operands())
    assert plan.name == "reference"
    assert "cuda: prefix_index is given; it takes one prefix for all rows" in plan.reason
    with pytest.raises(ImplementationError, match=r"'cuda' cannot serve this call: prefix_index is given.*'triton'"):
        apt_kernels.attention(**operands(), implementation="cuda")


@pytest.mark.parametrize("name", ["mixed_gate_static", "mixed_gate_query", "mixed_decode"])
def test_compiled_calls_are_the_same(name):
    x = CASES[name].inputs()

    def function(*flat):
        return torch.ops.apt_kernels.attention(*flat, "cpu")[0]

    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="eager")(*x.flat()), function(*x.flat()))
