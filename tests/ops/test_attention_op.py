"""The op's contract: registration, derivatives, compilation, choice of implementation, errors."""

from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import apt_kernels
from apt_kernels import ArgumentError, ImplementationError, Mask
from apt_kernels.impl.inputs import Inputs
from helpers import accuracy
from helpers.cases import CASES, small


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_gradcheck(name, implementation):
    x = small(name).inputs()
    names = accuracy.differentiable(x)

    def function(*tensors):
        flat = Inputs(**{**x.__dict__, **dict(zip(names, tensors))}).flat()
        out, logsumexp = torch.ops.apt_kernels.attention(*flat, implementation)[:2]
        return out, logsumexp.nan_to_num(neginf=0.0)  # a difference of infinities is NaN

    leaves = [getattr(x, name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["plain", "causal_gate_query", "gate_indexed", "right_padding", "everything"])
def test_opcheck(name, implementation):
    x = CASES[name].inputs()
    flat = [t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in x.flat()]
    torch.library.opcheck(torch.ops.apt_kernels.attention.default, (*flat, implementation))
    if implementation == "reference":
        return  # its backward uses autograd, which the check of a backward operator disables
    with torch.no_grad():
        out, logsumexp, *kept = torch.ops.apt_kernels.attention(*x.flat(), implementation)
        kept = kept if kept[0].numel() else (None, None)
    needs = [True] * 6 + [x.layer_scale is not None, x.sinks is not None, x.bias is not None]
    needs = [need and part is not None for need, part in zip(needs, x.flat())]
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in flat]
    for grad_logsumexp in (None, torch.randn_like(logsumexp)):
        torch.library.opcheck(
            torch.ops.apt_kernels.attention_backward.default,
            (torch.randn_like(out), grad_logsumexp, out, logsumexp, *kept, needs, *detached, implementation),
        )


class _Functions(TorchFunctionMode):
    """The functions of torch that are called from outside of it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class _Marked(torch.Tensor):
    """A tensor that records the functions called on it."""

    called = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called.add(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


class _Seen(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
def test_whoever_watches_sees_the_operator_and_the_same_bits(grad):
    given = [torch.randn(2, 2, 5, 16) for _ in range(3)] + [torch.randn(2, 3, 16, requires_grad=grad)] * 2
    expected = apt_kernels.attention(*given)
    with _Seen() as seen:
        torch.testing.assert_close(apt_kernels.attention(*given), expected, rtol=0, atol=0)
    assert "apt_kernels::attention" in seen.names
    with _Functions() as functions:
        apt_kernels.attention(*given)
    assert [name for name in functions.names if not name.startswith("<")] == ["apt_kernels.attention.default"]
    with torch.profiler.profile() as profile:
        torch.testing.assert_close(apt_kernels.attention(*given), expected, rtol=0, atol=0)
    assert "apt_kernels::attention" in {event.key for event in profile.key_averages()}
    _Marked.called = set()
    marked = [t.detach().as_subclass(_Marked).requires_grad_(t.requires_grad) for t in given]
    apt_kernels.attention(*marked)
    assert "apt_kernels.attention.default" in _Marked.called
    mode = torch._subclasses.FakeTensorMode()
    fake = apt_kernels.attention(*[mode.from_tensor(t) for t in given])  # outside of the mode: the tensors bring it
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert fake.shape == expected.shape
    assert expected.requires_grad == grad


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("gate", [None, "row", "query"])
@pytest.mark.parametrize("causal", [False, True])
def test_compiles_in_one_graph(causal, gate, dynamic):
    torch._dynamo.reset()
    graphs, count = [], 0

    def backend(graph, inputs):
        graphs.append(graph)
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    def function(query, key, value, prefix, logits):
        mask = Mask(causal=causal)
        return apt_kernels.attention(query, key, value, prefix, prefix, logits, 1.5, mask=mask, return_logsumexp=True)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in (8, 12, 20):
        torch.manual_seed(size)
        logits = {None: None, "row": torch.randn(2, 3), "query": torch.randn(2, size, 3)}[gate]
        given = [torch.randn(2, 4, size, 16), torch.randn(2, 2, size, 16), torch.randn(2, 2, size, 16)]
        given = [t.requires_grad_() for t in (*given, torch.randn(2, 3, 16))] + [logits]
        ours, expected = compiled(*given), function(*given)
        torch.testing.assert_close(ours, expected)
        grads = [torch.autograd.grad([o.square().sum() for o in found], given[:4]) for found in (ours, expected)]
        torch.testing.assert_close(*grads)
        count = count or len(graphs)
    if dynamic:
        assert len(graphs) == count, "another length was another compilation"


def operands(**changes):
    """A valid call, with changes."""
    torch.manual_seed(0)
    given = {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 2, 6, 8),
        "value": torch.randn(2, 2, 6, 8),
        "prefix_key": torch.randn(2, 3, 8),
        "prefix_value": torch.randn(2, 3, 8),
        "gate": torch.randn(2, 3),
    }
    return {**given, **changes}


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


WRONG = {
    "sparse": ({"query": torch.ones(2, 4, 5, 8).to_sparse()}, "query has the layout torch.sparse_coo"),
    "sparse gate": ({"gate": torch.ones(3).to_sparse()}, "gate has the layout torch.sparse_coo"),
    "sparse scale": ({"layer_scale": torch.ones(1).to_sparse()}, "layer_scale has the layout torch.sparse_coo"),
    "sparse sinks": ({"sinks": torch.ones(4).to_sparse()}, "sinks has the layout torch.sparse_coo"),
    "sparse bias": (
        {"mask": Mask(bias=torch.ones(5, 7).to_sparse())},
        "mask.bias has the layout torch.sparse_coo",
    ),
    "sparse padding": (
        {"mask": Mask(key_padding=torch.ones(2, 7, dtype=torch.bool).to_sparse())},
        "mask.key_padding has the layout torch.sparse_coo",
    ),
    "query shape": ({"query": torch.randn(4, 5, 8)}, r"query has shape \[4, 5, 8\]; it needs \[B, Hq, T, D\]"),
    "query dtype": ({"query": ints(2, 4, 5, 8)}, "query has dtype torch.int64"),
    "query type": ({"query": [1.0]}, "query is a list; it needs a torch.Tensor"),
    "no queries": ({"query": torch.randn(2, 4, 0, 8)}, "query has shape .* at least 1"),
    "key dim": ({"key": torch.randn(2, 2, 6, 9)}, r"key has shape .*needs \[B, Hkv, S, D\] = \[2, Hkv, S, 8\]"),
    "key heads": ({"key": torch.randn(2, 3, 6, 8)}, "key has 3 heads; it needs a number that divides the query's 4"),
    "key dtype": ({"key": torch.randn(2, 2, 6, 8).double()}, "key has dtype torch.float64; it needs the query's"),
    "value length": ({"value": torch.randn(2, 2, 7, 8)}, r"value has shape .* = \[2, 2, 6, Dv\]"),
    "prefix heads": (
        {"prefix_key": torch.randn(4, 3, 8)},
        r"prefix_key has shape .* = \[2, M, 8\], with Hkv and D of key \[B, Hkv, S, D\]",
    ),
    "prefix value": ({"prefix_value": torch.randn(2, 4, 8)}, r"prefix_value has shape .* = \[2, 3, 8\]"),
    "prefix dtype": ({"prefix_key": torch.randn(2, 3, 8).double()}, "prefix_key has dtype torch.float64; it need"),
    "prefix empty": (
        {"prefix_key": torch.randn(2, 0, 8), "prefix_value": torch.randn(2, 0, 8)},
        "prefix_key has shape .* at least 1",
    ),
    "gate length": ({"gate": torch.randn(2, 4)}, r"gate has shape \[2, 4\]; it needs \[M\] = \[3\]"),
    "gate type": ({"gate": 1.0}, "gate is a float; it needs a torch.Tensor of logits"),
    "gate dtype": ({"gate": ints(2, 3)}, "gate has dtype torch.int64"),
    "gate rows": ({"gate": torch.randn(3), "gate_index": ints(2)}, r"beside gate_index it needs \[G, M\]"),
    "index alone": ({"gate": None, "gate_index": ints(2)}, "gate_index is given without gate"),
    "index shape": ({"gate_index": ints(3)}, r"gate_index has shape \[3\]; it needs \[B\] = \[2\]"),
    "index dtype": ({"gate_index": torch.zeros(2)}, "gate_index is torch.float32; it needs an integer"),
    "index range": ({"gate_index": ints(2) + 2}, r"gate_index has values 2\.\.2; it needs 0\.\.1"),
    "scale size": ({"layer_scale": torch.ones(2)}, r"layer_scale has shape \[2\]; it needs a number"),
    "scale text": ({"layer_scale": "big"}, "layer_scale is 'big'"),
    "softmax scale": ({"scale": float("nan")}, "scale is nan; it needs a finite number"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0; it needs a number >= 0"),
    "sinks": ({"sinks": torch.zeros(3)}, r"sinks has shape \[3\]; it needs \[4\]"),
    "dropout": ({"dropout_p": 1.0}, r"dropout_p is 1.0; it needs a number in \[0, 1\)"),
    "seed": ({"dropout_p": 0.1, "seed": 1.5}, "seed is 1.5; it needs a 64-bit int"),
    "seed tensor": ({"dropout_p": 0.1, "seed": torch.zeros(1)}, "seed has shape .* one int64 element"),
    "seed without dropout": ({"seed": "x"}, "seed is 'x'; it needs a 64-bit int"),
    "logsumexp": ({"return_logsumexp": "no"}, "return_logsumexp is 'no'; it needs True or False"),
    "mask type": ({"mask": torch.ones(5, 6)}, "mask is a Tensor; it needs an apt_kernels.Mask"),
    "window": ({"mask": Mask(window=(-1, None))}, r"mask.window is \(-1, None\); each side"),
    "window pair": ({"mask": Mask(window=3)}, r"mask.window is 3; it needs a pair"),
    "offset": ({"mask": Mask(causal=True, query_offset=ints(3))}, r"mask.query_offset has shape \[3\]"),
    "padding shape": ({"mask": Mask(key_padding=torch.ones(2, 5).bool())}, r"mask.key_padding .* needs \[2, 6\]"),
    "padding dtype": ({"mask": Mask(key_padding=ints(2, 6))}, "mask.key_padding has dtype torch.int64.*torch.bool"),
    "segments": ({"mask": Mask(query_segments=ints(2, 5))}, "need each other"),
    "dense shape": ({"mask": Mask(dense=torch.ones(3, 6).bool())}, "mask.dense has shape .* broadcasts to"),
    "bias dtype": ({"mask": Mask(bias=ints(5, 6))}, "mask.bias has dtype torch.int64; it needs a floating-point"),
    "mask of sdpa": ({"attn_mask": None}, r"no argument 'attn_mask'; use mask=Mask\(dense=...\) for a bool mask"),
    "causal of sdpa": ({"is_causal": True}, r"attention has no argument 'is_causal'; use mask=Mask\(causal=True\)"),
    "groups of sdpa": ({"enable_gqa": True}, "no argument 'enable_gqa'; use nothing: grouped heads follow"),
    "misspelt": ({"sofcap": 1.0}, r"no argument 'sofcap'; see help\(apt_kernels.attention\)"),
    "causal text": ({"mask": Mask(causal="no")}, "mask.causal is 'no'; it needs True or False"),
    "causal tensor": ({"mask": Mask(causal=torch.ones(2))}, "mask.causal is tensor.*; it needs True or False"),
    "offset number": ({"mask": Mask(query_offset=1.5)}, "mask.query_offset is 1.5; it needs an int, an integer tensor"),
    "offset bool": ({"mask": Mask(query_offset=True)}, "mask.query_offset is True; it needs an int"),
    "offset list": ({"mask": Mask(query_offset=[1, 2])}, r"mask.query_offset is \[1, 2\]; it needs an int"),
    "padding list": (
        {"mask": Mask(key_padding=[[True] * 6] * 2)},
        "mask.key_padding is a list; it needs a torch.Tensor",
    ),
    "segments list": ({"mask": Mask(query_segments=[0], key_segments=ints(2, 6))}, "mask.query_segments is a list"),
    "dense bool": ({"mask": Mask(dense=True)}, "mask.dense is a bool; it needs a torch.Tensor or None"),
    "bias number": ({"mask": Mask(bias=0.5)}, "mask.bias is a float; it needs a torch.Tensor or None"),
    "sinks list": ({"sinks": [0.0] * 4}, "sinks is a list; it needs a torch.Tensor"),
    "scale tensor": ({"scale": torch.tensor(0.5)}, "scale is tensor.*; it needs a finite number"),
    "layer scale infinite": ({"layer_scale": float("inf")}, "layer_scale is inf; it needs a finite number"),
    "implementation": ({"implementation": "cpu", "gate_index": [0, 1]}, "gate_index is list; it needs an integer"),
    "device": ({"key": torch.empty(2, 2, 6, 8, device="meta")}, "key is on meta; it needs the query's device, cpu"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    changes, message = WRONG[name]
    with pytest.raises(ArgumentError, match=message):
        apt_kernels.attention(**operands(**changes))


def test_selected_takes_what_attention_takes():
    assert apt_kernels.selected(**operands(), return_logsumexp=True, mask=Mask(causal=True)).name == "cpu"
    with pytest.raises(ArgumentError, match="no argument 'is_causal'"):
        apt_kernels.selected(**operands(), is_causal=True)


@pytest.mark.parametrize("causal", [True, 1, False, 0])
def test_causal_is_true_or_false(causal):
    ours = apt_kernels.attention(**operands(), mask=Mask(causal=causal))
    torch.testing.assert_close(ours, apt_kernels.attention(**operands(), mask=Mask(causal=bool(causal))))


def test_an_implementation_asked_for_is_obeyed_or_raises(monkeypatch):
    given = operands()
    expected = apt_kernels.attention(**given, implementation="reference")
    assert apt_kernels.selected(**given).name == "cpu"
    assert apt_kernels.selected(**given, implementation="reference").name == "reference"
    torch.testing.assert_close(apt_kernels.attention(**given), expected)
    with pytest.raises(ImplementationError, match=r"implementation is 'cudnn'; it needs 'auto' or one of"):
        apt_kernels.attention(**given, implementation="cudnn")
    monkeypatch.setenv("APT_KERNELS_IMPLEMENTATION", "reference")
    assert apt_kernels.selected(**given).name == "reference"
    assert apt_kernels.selected(**given, implementation="cpu").name == "cpu"
    meta = {name: tensor.to("meta") for name, tensor in given.items()}
    with pytest.raises(ImplementationError, match=r"'cpu' cannot serve this call: .*meta"):
        apt_kernels.attention(**meta, implementation="cpu")


def test_the_automatic_choice_says_why():
    choice = apt_kernels.selected(**{name: tensor.to("meta") for name, tensor in operands().items()})
    assert choice.name == "reference"
    assert "cpu: " in choice.reason


def test_info_names_every_implementation():
    info = apt_kernels.info()
    assert info["versions"]["torch"] == torch.__version__
    assert info["implementations"]["cpu"] == info["implementations"]["reference"] == "usable"


def test_the_same_numbers_whatever_form_the_arguments_take():
    given = operands()
    expected = apt_kernels.attention(**given, layer_scale=1.5, mask=Mask(causal=True, query_offset=1))
    for scale in (torch.tensor(1.5), torch.tensor([1.5])):
        for offset in (torch.tensor(1), torch.tensor([1]), torch.tensor([1, 1])):
            mask = Mask(causal=True, query_offset=offset)
            torch.testing.assert_close(apt_kernels.attention(**given, layer_scale=scale, mask=mask), expected)
    by_query = given["gate"][:, None].expand(2, 5, 3)
    torch.testing.assert_close(
        apt_kernels.attention(**{**given, "gate": by_query}, layer_scale=1.5, mask=Mask(causal=True)), expected
    )


def test_dropout_follows_its_seed():
    given = operands()
    one, again, other = (apt_kernels.attention(**given, dropout_p=0.5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    tensor = apt_kernels.attention(**given, dropout_p=0.5, seed=torch.tensor(1))
    assert torch.equal(one, tensor)
    torch.manual_seed(0)
    drawn = apt_kernels.attention(**given, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(drawn, apt_kernels.attention(**given, dropout_p=0.5))


def test_autocast_casts_activations_and_keeps_the_prefix():
    given = operands()
    given["prefix_key"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apt_kernels.attention(**given)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert given["prefix_key"].grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["plain", "causal", "dropout"])
def test_only_the_output_or_only_the_logsumexp_may_be_used(name):
    x = replace(CASES[name], dtype=torch.float64).inputs()

    def grads(pick, implementation):
        key = x.prefix_key.detach().requires_grad_()
        found = torch.ops.apt_kernels.attention(*replace(x, prefix_key=key).flat(), implementation)[:2]
        return torch.autograd.grad(found[pick].square().sum(), key)[0]

    for pick in (0, 1):
        torch.testing.assert_close(grads(pick, "cpu"), grads(pick, "reference"))
