"""Transforms of torch.func, forward-mode differentiation and second derivatives: correct, or an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import apt_kernels
from apt_kernels import ImplementationError, Mask
from apt_kernels.impl.inputs import Inputs
from helpers import accuracy, models
from helpers.cases import CASES, small
from helpers.patched import randomise

_GENERATOR = torch.Generator().manual_seed(0)
_SHAPES = {
    "query": (2, 4, 3, 6),
    "key": (2, 2, 5, 6),
    "value": (2, 2, 5, 4),
    "prefix_key": (2, 3, 6),
    "prefix_value": (2, 3, 4),
    "gate": (2, 3),
    "layer_scale": (1,),
}
_OPERANDS = {name: torch.randn(shape, generator=_GENERATOR, dtype=torch.float64) for name, shape in _SHAPES.items()}


def given(**change):
    """Operands in float64, and a causal mask."""
    return {**_OPERANDS, "mask": Mask(causal=True), **change}


NAMES = tuple(_SHAPES)


def loss(tensors, **change):
    return apt_kernels.attention(**{**given(**change), **dict(zip(NAMES, tensors))}).sin().sum()


def tensors():
    return [given()[name] for name in NAMES]


def gradients(function, parts):
    leaves = [part.detach().requires_grad_() for part in parts]
    return torch.autograd.grad(function(leaves), leaves)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_reverse_mode(implementation):
    parts = tensors()
    expected = gradients(lambda leaves: loss(leaves, implementation="cpu"), parts)

    def function(*parts):
        return loss(parts, implementation=implementation)

    every = tuple(range(len(NAMES)))
    torch.testing.assert_close(grad(function, argnums=every)(*parts), expected)
    torch.testing.assert_close(vjp(function, *parts)[1](torch.ones((), dtype=torch.float64)), expected)
    torch.testing.assert_close(jacrev(function, argnums=every)(*parts), expected)


def test_forward_mode():
    parts, tangents = tensors(), [torch.randn_like(part) for part in tensors()]
    expected = sum((a * b).sum() for a, b in zip(gradients(loss, parts), tangents))
    out, slope = jvp(lambda *parts: loss(parts), tuple(parts), tuple(tangents))
    torch.testing.assert_close(out, loss(parts))
    torch.testing.assert_close(slope, expected)
    of_gate = jacfwd(lambda gate: loss([*parts[:5], gate, parts[6]]))(parts[5])
    torch.testing.assert_close(of_gate, gradients(loss, parts)[5])
    with forward_ad.dual_level():
        dual = loss([forward_ad.make_dual(*pair) for pair in zip(parts, tangents)])
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)


def test_second_order_by_transforms():
    parts = tensors()

    def function(gate):
        return loss([*parts[:5], gate, parts[6]])

    ours = hessian(function)(parts[5])
    assert ours.abs().max() > 1e-3
    steps = [1e-5 * step.view(2, 3) for step in torch.eye(6, dtype=torch.float64)]
    numbers = [(grad(function)(parts[5] + step) - grad(function)(parts[5] - step)) / 2e-5 for step in steps]
    torch.testing.assert_close(ours, torch.stack(numbers).view(2, 3, 2, 3), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("index", [False, True])
def test_gradients_for_each_sample(index):
    parts = given()
    rows = {name: parts[name] for name in ("query", "key", "value", "gate")}
    options = {"mask": Mask(causal=True)}
    if index:
        options["gate_index"] = torch.zeros(1, dtype=torch.int64)

    def one(prefix_key, query, key, value, gate):
        batch = {"query": query[None], "key": key[None], "value": value[None], "gate": gate[None]}
        prefix = {"prefix_key": prefix_key, "prefix_value": parts["prefix_value"]}
        return apt_kernels.attention(**batch, **prefix, **options).sin().sum()

    ours = vmap(grad(one), in_dims=(None, 0, 0, 0, 0))(parts["prefix_key"], *rows.values())
    each = [grad(one)(parts["prefix_key"], *(part[i] for part in rows.values())) for i in range(2)]
    torch.testing.assert_close(ours, torch.stack(each))
    assert ours.abs().max() > 1e-2


def test_dropout_under_vmap_follows_its_seed():
    parts = given(dropout_p=0.5, seed=3)
    keys = torch.stack([parts["prefix_key"], 2 * parts["prefix_key"]])
    ours = vmap(lambda key: apt_kernels.attention(**{**parts, "prefix_key": key}))(keys)
    for i in range(2):
        torch.testing.assert_close(ours[i], apt_kernels.attention(**{**parts, "prefix_key": keys[i]}))


def test_selected_says_why():
    chosen = []

    def function(query):
        chosen.append(apt_kernels.selected(**given(query=query)))
        return query.sum()

    grad(function)(given()["query"])
    assert chosen[0].name == "reference"
    assert "cpu: torch.func and forward-mode differentiation need implementation='reference'" in chosen[0].reason
    assert apt_kernels.selected(**given()).name == "cpu"


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_an_implementation_asked_for_by_name_refuses(transform):
    def function(query):
        return apt_kernels.attention(**given(query=query), implementation="cpu").sum()

    query = given()["query"]
    run = {
        "grad": lambda: grad(function)(query),
        "jvp": lambda: jvp(function, (query,), (query,)),
        "vmap": lambda: vmap(function)(query[None]),
    }
    with pytest.raises(ImplementationError, match=r"torch.func and forward-mode differentiation need"):
        run[transform]()


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_the_operator_itself_refuses(transform):
    x = small("plain").inputs()

    def function(query):
        return torch.ops.apt_kernels.attention(*replace(x, query=query).flat(), "cpu")[0].sum()

    with pytest.raises(ImplementationError, match="the registered operator supports neither"):
        grad(function)(x.query) if transform == "grad" else jvp(function, (x.query,), (x.query,))


@pytest.mark.parametrize("gate", ["first", "token"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_for_each_sample_of_a_patched_model(family, gate):
    model = apt_kernels.patch(models.build(family), prefix_length=3, gate=gate).eval()
    randomise(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    options, ids = {} if family in models.ENCODERS else {"use_cache": False}, torch.randint(3, 50, (3, 6))

    def function(parameters, ids):
        return functional_call(model, parameters, (), {"input_ids": ids, **options})[0].square().mean()

    each = vmap(grad(function), in_dims=(None, 0))(trained, ids[:, None])
    for i in range(3):
        expected = torch.autograd.grad(function(trained, ids[i : i + 1]), list(trained.values()))
        torch.testing.assert_close([part[i] for part in each.values()], list(expected), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("transform", [grad, vmap], ids=["grad", "vmap"])
def test_transforms_compile_in_one_graph(transform):
    query = given()["query"]
    if transform is vmap:
        query, function = torch.stack([query, 2 * query]), _rows
    else:

        def function(query):
            return _rows(query).sin().sum()

    compiled = torch.compile(transform(function), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(query), transform(function)(query))


def _rows(query):
    return apt_kernels.attention(**given(query=query))


def test_a_compiled_call_outside_of_transforms_uses_the_operator():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compile(lambda query: apt_kernels.attention(**given(query=query)), fullgraph=True, backend=backend)(
        given()["query"]
    )
    assert "apt_kernels.attention" in graphs[0]


@pytest.mark.parametrize("name", sorted(CASES))
def test_second_derivatives_of_the_specification(name):
    x = small(name).inputs()
    names = [part for part in accuracy.differentiable(x) if part != "bias" or name != "bias_hides_inf"]

    def function(*parts):
        flat = Inputs(**{**x.__dict__, **dict(zip(names, parts))}).flat()
        out, logsumexp = torch.ops.apt_kernels.attention(*flat, "reference")[:2]
        return out, logsumexp.nan_to_num(neginf=0.0)  # a difference of infinities is NaN

    leaves = [getattr(x, part).detach().requires_grad_() for part in names]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("of", ["query", "key", "value", "prefix_value", "gate"])
@pytest.mark.parametrize("causal", [False, True])
def test_other_implementations_refuse_at_the_call_that_needs_one(causal, of):
    """The gradient of a plain sum, for which the output's gradient has no graph, raises as well."""
    parts = given(mask=Mask(causal=causal), implementation="cpu")
    leaf = parts[of] = parts[of].clone().requires_grad_()
    (found,) = torch.autograd.grad(apt_kernels.attention(**parts).sum(), leaf, create_graph=True)
    assert found.requires_grad
    torch.testing.assert_close(found, torch.autograd.grad(apt_kernels.attention(**parts).sum(), leaf)[0])
    with pytest.raises(ImplementationError, match=r"'cpu' has no second derivatives; .*implementation='reference'"):
        torch.autograd.grad(found.square().sum(), leaf)
    # A sum with another term, whose graph alone would have given half of it.
    with pytest.raises(ImplementationError, match="no second derivatives"):
        (found.square().sum() + leaf.square().sum()).backward()


def test_a_graph_that_is_not_used_is_no_error():
    parts = given(implementation="cpu")
    leaf = parts["prefix_key"] = parts["prefix_key"].clone().requires_grad_()
    apt_kernels.attention(**parts).sum().backward(create_graph=True)
    with torch.no_grad():
        leaf.grad.zero_()
    assert leaf.grad.abs().max() == 0
