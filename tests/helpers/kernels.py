"""Where the Triton kernels run in the tests, and checks that every implementation made of kernels passes."""

from __future__ import annotations

import torch
from torch import Tensor

import apt_kernels
from apt_kernels import Mask
from apt_kernels.impl.dropout import keep_mask
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs
from helpers.accuracy import differentiable, evaluate, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKWARD = {"query_gradient", "column_gradients", "finish_gradients"}  # what a backward of Triton launches
SEEDS = [0, -1, 2**63 - 1, -(2**40) + 12345]
HIDDEN_BY = ["causal", "window", "padding", "segments"]


def results(implementation: str, x: Inputs) -> dict[str, Tensor]:
    """Outputs and every gradient, for fixed gradients of the outputs."""
    grad_out = torch.randn(x.query.shape[:3] + x.value.shape[3:], generator=torch.Generator().manual_seed(1))
    grad_logsumexp = torch.randn(x.query.shape[:3], generator=torch.Generator().manual_seed(2))

    def op(x: Inputs):
        return torch.ops.apt_kernels.attention(*x.flat(), implementation)[:2]

    with poisoned_memory():
        return evaluate(
            op, x, differentiable(x), grad_out.to(x.query), grad_logsumexp.to(x.query.device, x.compute_dtype)
        )


def check_same_bits_twice(implementation: str, x: Inputs) -> None:
    first, second = results(implementation, x), results(implementation, x)
    assert set(first) == {"out", "logsumexp", *differentiable(x)}
    for name in first:
        assert torch.equal(first[name], second[name]), name


def check_dropout_is_the_shared_stream(implementation: str, seed: int, device: str) -> None:
    """With identity values the output shows which columns were kept, tokens and prefix alike."""
    batch, heads, queries, keys, length = 2, 2, 17, 16, 16
    q, k = torch.randn(batch, heads, queries, 16, device=device), torch.randn(batch, heads, keys, 16, device=device)
    prefix, eye = torch.randn(heads, length, 16, device=device), torch.eye(keys, device=device)
    kept = keep_mask(torch.tensor([seed]), 0.4, batch, heads, 0, queries, 0, length + keys)

    def run(value, prefix_value):
        given = {"dropout_p": 0.4, "seed": seed, "implementation": implementation}
        return apt_kernels.attention(q, k, value, prefix, prefix_value, **given).cpu()

    tokens = run(eye.expand(batch, heads, keys, keys), torch.zeros(heads, length, keys, device=device))
    columns = run(torch.zeros(batch, heads, keys, length, device=device), eye.expand(heads, length, length))
    assert torch.equal(torch.cat([columns, tokens], dim=-1) != 0, kept)


def check_hidden_tiles_are_not_read(
    implementation: str, hidden_by: str, half: int, heads: int, queries: int, device: str
) -> None:
    """NaN in ``half`` hidden keys, whole tiles, reaches no result; every query sees the other ``half`` keys."""
    first, keys = hidden_by == "window", torch.arange(2 * half, device=device)[None]
    shown = keys >= half if first else keys < half
    mask = {
        "causal": Mask(causal=True, query_offset=half - queries),
        "window": Mask(window=(half - 1, None), query_offset=2 * half - 1),
        "padding": Mask(key_padding=shown),
        "segments": Mask(
            query_segments=torch.full((1, queries), 7, device=device), key_segments=torch.where(shown, 7, 9)
        ),
    }[hidden_by]
    q, k, v = (
        torch.randn(1, h, n, 16, device=device, requires_grad=True)
        for h, n in ((heads, queries), (1, 2 * half), (1, 2 * half))
    )
    p = torch.randn(1, 3, 16, device=device)

    def run(k, v):
        out = apt_kernels.attention(q, k, v, p, p, mask=mask, implementation=implementation)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    poisoned = [torch.where(shown[..., None], t, torch.nan).requires_grad_() for t in (k, v)]
    for clean, with_nan in zip(run(k, v), run(*poisoned)):
        assert torch.equal(clean, with_nan)


def check_query_offset_is_read_by_the_kernel(implementation: str, x: Inputs) -> None:
    """The host does not read the offset: the same inputs with another value in the same tensor differ."""
    before = torch.ops.apt_kernels.attention(*x.flat(), implementation)[0]
    x.query_offset.add_(7)
    assert not torch.equal(before, torch.ops.apt_kernels.attention(*x.flat(), implementation)[0])


def check_torch_compile(implementation: str, x: Inputs) -> None:
    """One graph, forward and backward, with the results of the eager calls."""
    tensors = [getattr(x, name).detach().requires_grad_() for name in DIFFERENTIABLE[:7]]

    def call(*tensors):
        given = {"mask": Mask(causal=True), "return_logsumexp": True, "implementation": implementation}
        return apt_kernels.attention(*tensors, **given)

    both = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out, logsumexp = function(*tensors)
        both.append([out, logsumexp, *torch.autograd.grad(out.square().sum() + logsumexp.sum(), tensors)])
    for eager, compiled in zip(*both):
        assert torch.equal(eager, compiled)
