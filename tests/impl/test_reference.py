"""The specification: its derivatives, and its results where they are known by other means."""

import pytest
import torch
import torch.nn.functional as F

import apt_kernels
from apt_kernels.impl import reference
from apt_kernels.impl.inputs import Inputs
from helpers import accuracy
from helpers.cases import CASES, Case, small


@pytest.mark.parametrize("name", sorted(CASES))
def test_gradcheck(name):
    x = small(name).inputs()
    names = accuracy.differentiable(x)

    def function(*tensors):
        out, logsumexp = reference.attend(Inputs(**{**x.__dict__, **dict(zip(names, tensors))}))
        return out, logsumexp.nan_to_num(neginf=0.0)  # a difference of infinities is NaN

    assert torch.autograd.gradcheck(function, [getattr(x, n).detach().requires_grad_() for n in names])


@pytest.mark.parametrize("gate", ["none", "static", "row"])
def test_equals_attention_over_the_scaled_prefix_in_front_of_the_keys(gate):
    x = Case(dtype=torch.float64, gate=gate, layer_scale=None if gate == "none" else 1.5).inputs()
    weights = x.weights()
    column = 1.0 if weights is None else weights.mT[:, None]
    group = x.query.shape[1] // x.key.shape[1]
    key, value = (
        torch.cat([(p * column).expand(2, -1, -1, -1), t], 2).repeat_interleave(group, 1)
        for p, t in ((x.prefix_key[None], x.key), (x.prefix_value[None], x.value))
    )
    out, logsumexp = reference.attend(x)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(x.query, key, value))
    torch.testing.assert_close(logsumexp, (x.query @ key.mT * x.scale).logsumexp(-1))


def test_a_row_that_sees_no_token_sees_the_prefix():
    x = CASES["all_padding"].inputs()
    hidden = ~x.key_padding.any(1)
    assert hidden.any()
    out, _ = reference.attend(x)
    alone = apt_kernels.attention(
        x.query, x.key, x.value, x.prefix_key, x.prefix_value, x.gate[:, 0], x.layer_scale,
        mask=apt_kernels.Mask(dense=torch.zeros(1, dtype=torch.bool)), scale=x.scale,
    )  # fmt: skip
    torch.testing.assert_close(out[hidden], alone[hidden])
    assert out.isfinite().all()


def test_a_closed_gate_still_takes_its_share_of_the_softmax():
    x = Case(gate="static", layer_scale=None, length=1).inputs()
    closed = Inputs(**{**x.__dict__, "gate": torch.full_like(x.gate, -1e4)})
    out, logsumexp = reference.attend(closed)
    tokens = (x.query @ x.key.repeat_interleave(2, 1).mT) * x.scale
    torch.testing.assert_close(logsumexp, torch.logsumexp(F.pad(tokens, (1, 0)), -1))
    assert out.isfinite().all()
