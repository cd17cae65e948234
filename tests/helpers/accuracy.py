"""The one error rule of the tests: how far an implementation may be from the truth.

For the output, the log-sum-exp and every gradient, element by element,

    |ours - truth|  <=  2 * max |eager - truth|  +  CONSTANT * eps * terms

``truth`` is the reference in float64 on the same (upcast) inputs, ``eager`` the reference in the inputs' own dtype,
``eps`` that of the query's dtype, or of the result's where that is coarser. The second term is needed because eager's
rounding error may be close to zero by chance, in particular if a tensor has few elements.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator

import pytest
import torch
from torch import Tensor

from apt_kernels.impl import reference
from apt_kernels.impl.dropout import keep_mask
from apt_kernels.impl.inputs import DIFFERENTIABLE, Inputs

# Over 1,200 random cases a correct float32, float64 or bfloat16 implementation (stock attention on concatenated keys)
# needs up to 0.8, and torch's own float32 product, which sums 64 terms in one chain, 1.02 in one of some 30,000 (an
# example of `test_cpu.test_any_inputs`); `test_accuracy` shows that planted faults fail.
CONSTANT = 1.25


def check(
    x: Inputs,
    implementation: str,
    *,
    wanted: Collection[str] | None = None,
    logsumexp_gradient: bool = True,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Run an implementation through the op, forward and backward, and check every result by the error rule.

    Uninitialised memory is NaN while it runs. ``wanted`` names the inputs to differentiate (empty: forward only);
    by default all there are, the bias only where it requires a gradient. ``generator`` (a CPU one; default: seeded
    with 0) draws the output gradients. Returns each tensor's worst error as a share of what is allowed, at most 1.
    """
    wanted = differentiable(x) if wanted is None else [name for name in DIFFERENTIABLE if name in wanted]
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    grads = _output_gradients(x, logsumexp_gradient and bool(wanted), generator)

    def op(leaves: Inputs) -> tuple[Tensor, Tensor]:
        return torch.ops.apt_kernels.attention(*leaves.flat(), implementation)[:2]

    with poisoned_memory():
        ours = evaluate(op, x, wanted, *grads)
    shares = compare(ours, x, wanted, *grads)
    _check_form(x, ours)
    return shares


def compare(
    ours: dict[str, Tensor], x: Inputs, wanted: Collection[str], grad_out: Tensor, grad_logsumexp: Tensor | None
) -> dict[str, float]:
    """Check results, named as by `evaluate`, by the error rule; return the ratio of each error to the allowed one."""
    allowances, truth = allowed_errors(x, wanted, grad_out, grad_logsumexp)
    shares = {}
    for name, allowed in allowances.items():
        error = _distance(ours[name], truth[name])
        share = torch.where(error == 0, 0.0, error / allowed).max().item()
        assert share <= 1, f"{name} is off by {error.max():.3g}: {share:.3g} of what is allowed"
        shares[name] = share
    return shares


def allowed_errors(
    x: Inputs, wanted: Collection[str], grad_out: Tensor, grad_logsumexp: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The error allowed in every element of every result, and the truth."""
    exact = upcast(x)
    wide_grads = (grad_out.double(), None if grad_logsumexp is None else grad_logsumexp.double())
    truth = evaluate(reference.attend, exact, wanted, *wide_grads)
    eager = evaluate(reference.attend, x, wanted, grad_out, grad_logsumexp)
    with torch.no_grad():
        terms = absolute_terms(exact, truth["out"], truth["logsumexp"], *wide_grads)
    allowed = {name: allowance(x, exact_result, eager[name], terms[name]) for name, exact_result in truth.items()}
    return allowed, truth


def allowance(x: Inputs, truth: Tensor, eager: Tensor, terms: Tensor) -> Tensor:
    """The error rule: how far each element of a result may be from the truth."""
    eps = max(torch.finfo(x.query.dtype).eps, torch.finfo(eager.dtype).eps)
    if eps == torch.finfo(torch.float64).eps:
        eps *= 2  # the truth has then been rounded as often as ours
    worst = _distance(eager, truth).max()
    return 2 * worst + CONSTANT * eps * terms.reshape(truth.shape)


def _distance(found: Tensor, truth: Tensor) -> Tensor:
    """The absolute difference; none between two log-sum-exps over nothing, both -inf."""
    return torch.where(found == truth, 0.0, (found.double() - truth).abs())


def evaluate(
    function, x: Inputs, wanted: Collection[str], grad_out: Tensor, grad_logsumexp: Tensor | None
) -> dict[str, Tensor]:
    """``out``, ``logsumexp`` and the wanted gradients, by autograd through ``function(Inputs)``."""
    values = {name: t.detach() if isinstance(t, Tensor) else t for name, t in x.__dict__.items()}
    for name in wanted:
        values[name].requires_grad_()
    out, logsumexp = function(Inputs(**values))
    found = {"out": out.detach(), "logsumexp": logsumexp.detach()}
    if wanted:
        outputs, seeds = [out], [grad_out]
        # The log-sum-exp of eager attention depends on neither value.
        if grad_logsumexp is not None and logsumexp.requires_grad:
            outputs, seeds = [out, logsumexp], [grad_out, grad_logsumexp]
        found.update(zip(wanted, torch.autograd.grad(outputs, [values[name] for name in wanted], seeds)))
    return found


def differentiable(x: Inputs) -> list[str]:
    """The inputs to differentiate by default: all there are, the bias only where it requires a gradient."""
    present = [name for name in DIFFERENTIABLE if getattr(x, name) is not None]
    return [name for name in present if name != "bias" or x.bias.requires_grad]


def upcast(x: Inputs) -> Inputs:
    """The same inputs with every floating-point tensor in float64."""
    return Inputs(
        **{
            name: part.double() if isinstance(part, Tensor) and part.is_floating_point() else part
            for name, part in x.__dict__.items()
        }
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill the results of ``torch.empty`` and similar functions with NaN (integers: their maximum) to detect reads."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(math.nan)
            return made if made.dtype == torch.bool else made.fill_(torch.iinfo(made.dtype).max)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def absolute_terms(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None
) -> dict[str, Tensor]:
    """The sum of absolute terms behind every element of every result, in closed form on float64 inputs.

    An error of one eps relative in each term moves a result by at most eps times this. With ``|.|`` term by term:
      logits        A_s = c sum |q||k|;  A_z = g A_s (+ |z| for a soft-cap, + |bias|): the absolute error of z
      log-sum-exp   A_L = sum p A_z + |L| + 1
      probability   relative error E = A_z + A_L + 1; with its own rounding A_p = p (E + 1)
      output        A_O = sum A_p g |v|
      delta         A_delta = sum |dO| A_O + |dL|
      dz            A_dz = p (g sum |dO||v| + A_delta) + |dz| (E + 1); a soft-cap's slope adds 3 |dz|
      dq, dk, dv    c sum A_dz g |k|,  c sum A_dz g |q|,  sum A_p g |dO|   (the prefix's likewise)
      dg            sum A_dz |s| + |dz| A_s + A_p |dO.v| + p sum |dO||v|; times lambda sigmoid' or sigmoid
      dsink         sum p A_delta + p E |delta|
    """
    batch, heads, kv_heads, queries, keys, length, _, _ = x.sizes
    group, c = heads // kv_heads, abs(x.scale)

    def joined(prefix: Tensor, tokens: Tensor) -> Tensor:
        rows = prefix.expand(batch, *prefix.shape) if x.prefix_index is None else x.prefix_rows(prefix)
        return torch.cat([rows, tokens], dim=2).repeat_interleave(group, dim=1)

    def grouped(terms: Tensor) -> Tensor:
        return terms.unflatten(1, (kv_heads, group)).sum(2)

    key, value = joined(x.prefix_key, x.key), joined(x.prefix_value, x.value)
    g = torch.ones(batch, 1, queries, length + keys, dtype=torch.float64, device=x.query.device)
    if x.weights() is not None:
        g[..., :length] = x.weights()[:, None]
    s, a_s = x.scale * (x.query @ key.mT), c * (x.query.abs() @ key.abs().mT)
    z, a_z, slope = g * s, g.abs() * a_s, None
    if x.softcap:
        slope = 1 - torch.tanh(z / x.softcap).square()
        z = x.softcap * torch.tanh(z / x.softcap)
        a_z = a_z * slope + z.abs()
    z, a_z = _tokens_masked(x, z, a_z)
    logsumexp = logsumexp.masked_fill(torch.isneginf(logsumexp), 0.0)  # of a row that sees nothing
    p = torch.exp(z - logsumexp[..., None])
    a_z = torch.where(p > 0, a_z, 0.0)
    a_l = (p * a_z).sum(-1) + logsumexp.abs() + 1
    if x.sinks is not None:
        sink = x.sinks.view(1, heads, 1)
        p_sink = torch.exp(sink - logsumexp)
        a_l = a_l + p_sink * sink.abs()
    relative = a_z + a_l[..., None] + 1
    keep = 1.0
    if x.dropout_p:
        keep = keep_mask(x.seed, x.dropout_p, batch, heads, 0, queries, 0, length + keys) / (1 - x.dropout_p)
    a_p = p * keep * (relative + 1)
    a_out = (a_p * g.abs()) @ value.abs()
    terms = {"out": a_out, "logsumexp": a_l}

    d_l = torch.zeros_like(logsumexp) if grad_logsumexp is None else grad_logsumexp
    delta = (grad_out * out).sum(-1) - d_l
    a_delta = (grad_out.abs() * a_out).sum(-1) + d_l.abs()
    r, a_r = grad_out @ value.mT, grad_out.abs() @ value.abs().mT
    dz = p * (keep * g * r - delta[..., None])
    a_dz = p * (keep * g.abs() * a_r + a_delta[..., None]) + dz.abs() * (relative + 1)
    if x.bias is not None:
        terms["bias"] = a_dz[..., length:].sum_to_size(x.bias.shape)
    if slope is not None:
        a_dz, dz = slope * a_dz + 3 * dz.abs(), slope * dz
    a_ds = c * a_dz * g.abs()
    terms["query"] = a_ds @ key.abs()
    d_key, d_value = grouped(a_ds.mT @ x.query.abs()), grouped((a_p * g.abs()).mT @ grad_out.abs())
    terms["key"], terms["value"] = d_key[:, :, length:], d_value[:, :, length:]
    for name, rows in (("prefix_key", d_key[:, :, :length]), ("prefix_value", d_value[:, :, :length])):
        terms[name] = rows.sum(0) if x.prefix_index is None else _by_adapter(x, rows)
    a_dg = (a_dz * s.abs() + dz.abs() * a_s + a_p * r.abs() + p * keep * a_r)[..., :length].sum(1)
    terms.update(_gate_terms(x, a_dg))
    if x.sinks is not None:
        terms["sinks"] = (p_sink * (a_delta + delta.abs() * (sink.abs() + a_l + 1))).sum((0, 2))
    return terms


def _tokens_masked(x: Inputs, z: Tensor, a_z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and their absolute terms with the bias added and hidden tokens at -inf."""
    length, visible = x.prefix_key.shape[-2], x.visible()
    tokens, a_tokens = z[..., length:], a_z[..., length:]
    if x.bias is not None:
        tokens, a_tokens = tokens + x.bias, a_tokens + x.bias.abs()
    if visible is not None:
        tokens = tokens.masked_fill(~visible, -torch.inf)
    prefix = z[..., :length]
    if x.prefix_index is not None:
        prefix = prefix.masked_fill(~x.prefix_seen()[:, None, None], -torch.inf)
    return torch.cat([prefix, tokens], -1), torch.cat([a_z[..., :length], a_tokens], -1)


def _by_adapter(x: Inputs, rows: Tensor) -> Tensor:
    """``[A, ...]``: the rows ``[B, ...]`` summed by their prefix."""
    used = x.prefix_index >= 0
    whole = rows.new_zeros(len(x.prefix_key), *rows.shape[1:])
    return whole.index_add_(0, x.prefix_index[used], rows[used])


def _gate_terms(x: Inputs, a_dg: Tensor) -> dict[str, Tensor]:
    """Terms of the gate and the layer scale from those of ``dg``, ``[B, T, M]``."""
    terms, sigmoid = {}, 1.0
    if x.gate is not None:
        sigmoid = torch.sigmoid(x.gate_rows())
        factor = sigmoid * (1 - sigmoid) * (1.0 if x.layer_scale is None else x.scale_rows().abs())
        if x.gate_index is None:
            terms["gate"] = (a_dg * factor).sum_to_size(x.gate.shape)
        else:
            rows = (a_dg * factor).flatten(0, 1)
            index = x.gate_index.expand(a_dg.shape[:2]).flatten()
            terms["gate"] = torch.zeros_like(x.gate).index_add_(0, index, rows)
    if x.layer_scale is not None:
        rows = a_dg * sigmoid
        terms["layer_scale"] = rows.sum() if len(x.layer_scale) == 1 else _by_adapter(x, rows.sum((1, 2)))
    return terms


def _output_gradients(x: Inputs, logsumexp: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    grad_out = torch.randn(batch, heads, queries, value_dim, generator=generator).to(x.query)
    if not logsumexp:
        return grad_out, None
    return grad_out, torch.randn(batch, heads, queries, generator=generator).to(x.query.device, x.compute_dtype)


def _check_form(x: Inputs, ours: dict[str, Tensor]) -> None:
    """Check the shapes, dtypes and memory layouts that the op declares."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    for name, tensor in ours.items():
        if name == "out":
            shape, dtype = (batch, heads, queries, value_dim), x.query.dtype
        elif name == "logsumexp":
            shape, dtype = (batch, heads, queries), x.compute_dtype
        else:
            shape, dtype = getattr(x, name).shape, getattr(x, name).dtype
        assert tuple(tensor.shape) == tuple(shape), f"{name} has shape {list(tensor.shape)}; promised {list(shape)}"
        assert tensor.dtype == dtype, f"{name} has dtype {tensor.dtype}; promised {dtype}"
        heads_last = name in ("out", "query", "key", "value")
        stored = tensor.transpose(1, 2) if heads_last else tensor
        # Batch rows of dk and dv may be strided: the gradient of a concatenation is returned without a copy.
        stored = stored[0] if name in ("key", "value") else stored
        assert stored.is_contiguous(), f"{name} has strides {tensor.stride()}; heads last: {heads_last}"
