"""The short validation of ordinary calls accepts what the checks of every argument accept, with the same result."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given

import apt_kernels
from apt_kernels import Mask
from apt_kernels.errors import ArgumentError
from apt_kernels.impl.inputs import Inputs
from apt_kernels.ops import validation
from helpers.cases import cases, examples


def one_by_one(make):
    """What ``make`` returns without the short validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_ordinary", lambda *_: None)
        return make()


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        a, b = a.to_dense(), b.to_dense()
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    return type(a) is type(b) and a == b


@examples(150)
@given(cases(dropout=(0.0,), softcap=(0.0,), sinks=(False,), dtype=(torch.float32, torch.float64, torch.bfloat16)))
def test_the_same_inputs(case):
    short, long = case.inputs(), one_by_one(case.inputs)
    for field in fields(Inputs):
        assert same(getattr(short, field.name), getattr(long, field.name)), field.name


def arguments() -> dict:
    torch.manual_seed(0)
    return {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 2, 5, 8),
        "value": torch.randn(2, 2, 5, 8),
        "prefix_key": torch.randn(2, 6, 8),
        "prefix_value": torch.randn(2, 6, 8),
        "gate": torch.randn(2, 6),
        "layer_scale": torch.ones(1),
        "mask": Mask(causal=True),
    }


def test_an_ordinary_call_takes_it(monkeypatch):
    monkeypatch.setattr(validation, "_cast", lambda *_: pytest.fail("the checks of every argument run"))
    apt_kernels.attention(**arguments())


# What replaces a tensor, and what replaces another argument.
TENSORS = (
    lambda t: None,
    lambda t: t.tolist(),
    lambda t: t[0],
    lambda t: t[None],
    lambda t: t[:0],
    lambda t: t[..., :-1],
    lambda t: torch.cat([t, t]),
    lambda t: torch.cat([t, t], -1),
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.to(torch.complex64),
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.expand(3, *t.shape),
    lambda t: t.new_zeros(()),
)
OTHERS = {
    "scale": (0, 1, True, float("inf"), float("nan"), "1"),
    "dropout_p": (False, 0, -0.0, -1.0, 1.0, None),
    "mask": (
        torch.ones(3, 5),
        Mask(window=(1,)),
        Mask(query_offset=1.0),
        Mask(causal=2),
        Mask(key_padding=torch.ones(2, 4) > 0),
        Mask(query_offset=torch.tensor([1, 2, 3])),
        Mask(bias=torch.ones(5)),
        Mask(dense=torch.ones(4, 3, 5) > 0),
        Mask(query_segments=torch.ones(2, 3)),
        Mask(window=(2, None), query_offset=True),
    ),
}
CHANGES = [(name, change) for name in ("query", "key", "value", "prefix_key", "prefix_value") for change in TENSORS]
CHANGES += [(name, change) for name in ("gate", "layer_scale") for change in TENSORS]
CHANGES += [(name, lambda _, value=value: value) for name, values in OTHERS.items() for value in values]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda each: each if isinstance(each, str) else "")
def test_what_is_wrong_is_refused_with_the_same_words(name, change):
    given = arguments()
    given[name] = change(given.get(name))

    def result():
        try:
            return validation.make_inputs(**given)
        except Exception as error:  # every error has to be the same
            return type(error), str(error)

    short, long = result(), one_by_one(result)
    if isinstance(long, tuple):
        assert short == long
        assert long[0] in (ArgumentError, TypeError, RuntimeError, AttributeError)
    else:
        assert all(same(getattr(short, field.name), getattr(long, field.name)) for field in fields(Inputs))
