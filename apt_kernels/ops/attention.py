"""The op: validate, choose an implementation, run it as one registered torch operator with its own backward."""

from __future__ import annotations

import sys
from typing import Literal, overload

import torch
from torch import Tensor

from .. import transforms
from ..errors import ImplementationError
from ..impl.backend import Backend, Plan, Result
from ..impl.inputs import DIFFERENTIABLE, Inputs, heads_last, heads_last_empty
from ..mask import Mask
from . import choose
from .validation import make_inputs, refuse
from .values import check_flag, is_real

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? gate, "
    "Tensor? layer_scale, Tensor? sinks, Tensor? bias, Tensor? gate_index, Tensor? dense, Tensor? key_padding, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? query_offset, Tensor? seed, Tensor? prefix_index, "
    "Tensor? prefix_lengths, SymInt offset, bool causal, int window_left, int window_right, float scale, "
    "float softcap, float dropout_p, str implementation"
)


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor | None = ...,
    layer_scale: Tensor | float | None = ...,
    *,
    mask: Mask | None = ...,
    gate_index: Tensor | None = ...,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_logsumexp: Literal[False] = ...,
    implementation: str = ...,
) -> Tensor: ...
@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor | None = ...,
    layer_scale: Tensor | float | None = ...,
    *,
    mask: Mask | None = ...,
    gate_index: Tensor | None = ...,
    prefix_index: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    seed: int | Tensor | None = ...,
    return_logsumexp: Literal[True],
    implementation: str = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    gate: Tensor | None = None,
    layer_scale: Tensor | float | None = None,
    *,
    mask: Mask | None = None,
    gate_index: Tensor | None = None,
    prefix_index: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_logsumexp: bool = False,
    implementation: str = "auto",
    **others,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a gated, scaled prefix and the keys: ``softmax(scale q [P'_k ; k]^T) [P'_v ; v]``.

    ``P' = layer_scale * sigmoid(gate) * [prefix_key, prefix_value]`` (Adaptive Prefix Tuning, Zhang et al., ACL 2023).
    Every query sees the whole prefix. Differentiable once in every floating-point tensor. With ``prefix_index``, each
    row has a prefix of its own or none, and ``P'`` is that of the row.

    Args:
        query: ``[B, Hq, T, D]``, float32, float64, bfloat16 or float16; any strides.
        key, value: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, the query's dtype; ``Hq`` is a multiple of ``Hkv``.
        prefix_key, prefix_value: ``[Hkv, M, D]`` and ``[Hkv, M, Dv]``, shared by the batch; float32 or query's dtype.
            With ``prefix_index``, those of A adapters: ``[A, Hkv, M, D]`` and ``[A, Hkv, M, Dv]``.
        gate: logits: ``[M]``, ``[B, M]``, ``[B, T, M]``, or ``[G, M]`` with ``gate_index``; None: no gate.
            A logit of +inf is a gate of exactly 1. Static gates of A adapters are ``[A, M]`` with ``gate_index``.
        layer_scale: lambda, a float or a tensor of one element; ``[A]`` with ``prefix_index``; None: 1.
        mask: a `Mask`; None: every query sees every key.
        gate_index: integer ``[B]`` or ``[B, T]``, the row of ``gate`` for each batch row or query, in ``0..G-1``
            (not checked on an accelerator, where that would wait for the device).
        prefix_index: integer ``[B]``, the adapter of each batch row, in ``0..A-1``, or -1: the row has no prefix, and
            its gate and its ``gate_index`` are ignored (the range is checked as for ``gate_index``). A row without a
            prefix that sees no key has the output 0 and the log-sum-exp -inf. ``[B, T]``: the same for each query, such
            as those of packed documents (only in `reference`, which the automatic choice then uses). None: one prefix
            for all rows.
        prefix_lengths: integer ``[A]``, in ``0..M``, the length of each adapter; the columns beyond it are ignored, in
            prefix and gate. Only with ``prefix_index``; None: M for each.
        scale: softmax scale; default ``1 / sqrt(D)``.
        softcap: logits become ``softcap * tanh(logits / softcap)``, prefix columns included; None or 0: off.
        sinks: ``[Hq]``, the logit of one extra column per head that has no value (never soft-capped).
        dropout_p: probability of dropping a column of the probabilities, in ``[0, 1)``.
        seed: int or one-element int64 tensor that fixes the dropout; None: drawn from torch's generator.
        return_logsumexp: return ``(out, logsumexp)``; the log-sum-exp ``[B, Hq, T]`` is over prefix, sink and token
            columns, in float32 (float64 for float64), and differentiable.
        implementation: ``"auto"`` or the name of one, which is then used or raises; see `apt_kernels.info`. The
            environment variable ``APT_KERNELS_IMPLEMENTATION`` sets it where the argument is ``"auto"``.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype, stored as ``[B, T, Hq, Dv]``.

    Raises:
        ArgumentError: an argument has a wrong type, shape, dtype or device.
        ImplementationError: the implementation requested by name cannot run on this machine or on these inputs.

    Examples:
        >>> query, key, value = torch.randn(3, 2, 8, 128, 64)
        >>> prefix_key, prefix_value = torch.randn(2, 8, 16, 64)
        >>> gate = torch.zeros(2, 16)  # a weight of sigmoid(0) = 0.5, times layer_scale
        >>> mask = apt_kernels.Mask(causal=True)
        >>> out = apt_kernels.attention(query, key, value, prefix_key, prefix_value, gate, 2.0, mask=mask)
        >>> out.shape
        torch.Size([2, 8, 128, 64])

        A prefix for each row, of three adapters of different lengths; the second row has none:

        >>> prefix_key, prefix_value = torch.randn(2, 3, 8, 16, 64)
        >>> rows = {"prefix_index": torch.tensor([2, -1]), "prefix_lengths": torch.tensor([16, 8, 4])}
        >>> apt_kernels.attention(query, key, value, prefix_key, prefix_value, mask=mask, **rows).shape
        torch.Size([2, 8, 128, 64])
    """
    if others:
        refuse(others)
    check_flag("return_logsumexp", return_logsumexp)
    x = make_inputs(
        query,
        key,
        value,
        prefix_key,
        prefix_value,
        gate,
        layer_scale,
        mask=mask,
        gate_index=gate_index,
        prefix_index=prefix_index,
        prefix_lengths=prefix_lengths,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
    )
    plan, tensors = choose.choose(x, implementation), x.tensors()
    results: tuple
    if transforms.active():
        results = choose.load(plan.name).attend(x)
    elif _decomposes(plan):
        results = COMPOSITE(*x.flat()) if _exports_to_onnx() else choose.load(plan.name).attend(x)
    elif _is_plain(tensors):
        # Fast path: the same result as the registered operator's without about 20 us of dispatch.
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            results = _Attention.apply(*x.flat(), plan.text)
        elif return_logsumexp:
            results = choose.load(plan.name).forward(x, plan)
        else:
            return choose.load(plan.name).output(x, plan)
    else:
        results = _FORWARD(*x.flat(), plan.text)
    return (results[0], results[1]) if return_logsumexp else results[0]


def _decomposes(plan: Plan) -> bool:
    """Whether `torch.export` records torch's own operators, which every runtime has, in place of the registered one."""
    return torch.compiler.is_exporting() and choose.load(plan.name).composite


def _exports_to_onnx() -> bool:
    return "torch.onnx" in sys.modules and sys.modules["torch.onnx"].is_in_onnx_export()


def _is_plain(tensors: list[Tensor]) -> bool:
    """Whether a call needs no dispatch but autograd's: no compiler, tracer, transform, mode, profiler, subclass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all([is_real(tensor) for tensor in tensors])


def selected(*arguments, implementation: str = "auto", return_logsumexp: bool = False, **keywords) -> Plan:
    """The plan of `attention` for these arguments: ``name`` and ``strategy`` of the implementation, and the ``reason``
    of the choice: what excludes the implementations before it in the automatic choice.

    Examples:
        >>> query, key, value = torch.randn(3, 2, 8, 128, 64)
        >>> prefix_key, prefix_value = torch.randn(2, 8, 16, 64)
        >>> apt_kernels.selected(query, key, value, prefix_key, prefix_value).name
        'cpu'
    """
    check_flag("return_logsumexp", return_logsumexp)
    return choose.choose(make_inputs(*arguments, **keywords), implementation)


# Registration: one forward and one backward operator; the last argument is the text of the plan. The forward returns
# the output, the log-sum-exp, and the two buffers that an implementation keeps for its backward in place of key and
# value, or two empty tensors.

# The package's own name: another copy of it, under another name, registers operators of its own.
_NAMESPACE = __name__.partition(".")[0]

torch.library.define(f"{_NAMESPACE}::attention", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    f"{_NAMESPACE}::attention_backward",
    "(Tensor grad_out, Tensor? grad_logsumexp, Tensor out, Tensor logsumexp, Tensor? kept_key, Tensor? kept_value, "
    f"bool[] needs, {_ARGUMENTS}) -> Tensor[]",
)
_FORWARD = getattr(torch.ops, _NAMESPACE).attention.default
_BACKWARD = getattr(torch.ops, _NAMESPACE).attention_backward.default


# The same in torch's own operators. An ONNX exporter decomposes it, or translates it as a whole.
torch.library.define(f"{_NAMESPACE}::composite_attention", f"({_ARGUMENTS.rpartition(',')[0]}) -> (Tensor, Tensor)")
COMPOSITE = getattr(torch.ops, _NAMESPACE).composite_attention.default


@torch.library.impl(f"{_NAMESPACE}::composite_attention", "CompositeImplicitAutograd")
def _composite(*arguments):
    return choose.load("reference").attend(Inputs(*arguments))


@torch.library.impl(f"{_NAMESPACE}::attention", "default")
def _forward(*arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    return _four(x, *backend.forward(x, plan))


@torch.library.register_fake(f"{_NAMESPACE}::attention")
def _fake_forward(*arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    return _four(x, out, logsumexp, backend.empty_kept(x, plan))


def _four(x: Inputs, out: Tensor, logsumexp: Tensor, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    return (out, logsumexp, *kept) if kept else (out, logsumexp, x.query.new_empty(0), x.query.new_empty(0))


@torch.library.impl(f"{_NAMESPACE}::attention_backward", "default")
def _backward(grad_out, grad_logsumexp, out, logsumexp, kept_key, kept_value, needs, *arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    result = Result(out, logsumexp, None if kept_key is None else (kept_key, kept_value))
    grads = backend.backward(x, plan, result, grad_out, grad_logsumexp, list(needs))
    return [_as_declared(x, name, grad, backend) for name, grad in zip(DIFFERENTIABLE, grads)]


def _as_declared(x: Inputs, name: str, grad: Tensor | None, backend: Backend) -> Tensor:
    """The gradient in the shape, dtype and layout that `_fake_backward` declares; empty where there is none."""
    if grad is None:
        return x.query.new_empty(0)
    grad = grad.to(getattr(x, name).dtype)
    if name in backend.own_layouts:
        return grad
    return heads_last(grad) if name in ("query", "key", "value") else grad.contiguous()


@torch.library.register_fake(f"{_NAMESPACE}::attention_backward")
def _fake_backward(grad_out, grad_logsumexp, out, logsumexp, kept_key, kept_value, needs, *arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    given = grad_logsumexp is not None, list(needs)
    return [
        backend.empty_gradient(x, plan, name, *given) if need else x.query.new_empty(0)
        for name, need in zip(DIFFERENTIABLE, needs)
    ]


class _Attention(torch.autograd.Function):
    """The autograd of the forward operator. torch.library's helper would read the whole schema at every call."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = _FORWARD(*inputs)
        ctx.set_materialize_grads(False)
        *flat, ctx.plan = inputs
        out, logsumexp, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.keys = flat[1].shape[2] if kept[0].numel() else 0
        if ctx.keys:
            # The kept buffers hold the tokens, in the implementation's order: the inputs need not be saved.
            flat[1] = flat[2] = None
        ctx.rest = [None if isinstance(part, Tensor) else part for part in flat]
        ctx.is_tensor = [isinstance(part, Tensor) for part in flat]
        ctx.save_for_backward(*[part for part in flat if isinstance(part, Tensor)], out, logsumexp, *kept)
        return output

    @staticmethod
    def backward(ctx, grad_out, grad_logsumexp, *_):
        nothing = (None,) * (len(ctx.rest) + 1 - len(DIFFERENTIABLE))
        if grad_out is None and grad_logsumexp is None:
            return (None,) * len(DIFFERENTIABLE) + nothing
        *tensors, out, logsumexp, kept_key, kept_value = ctx.saved_tensors
        given = iter(tensors)
        flat = [next(given) if yes else part for yes, part in zip(ctx.is_tensor, ctx.rest)]
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        backend = choose.load(Plan.parse(ctx.plan).name)
        if torch.is_grad_enabled() and backend.composite:
            return (*_composite_gradients(backend, Inputs(*flat), grad_out, grad_logsumexp, needs), *nothing)
        kept = (None, None)
        if ctx.keys:
            kept = kept_key, kept_value
            flat[1], flat[2] = (part[:, :, part.shape[2] - ctx.keys :] for part in kept)
        with torch.no_grad():
            results = _BACKWARD(
                torch.zeros_like(out) if grad_out is None else grad_out,
                *(grad_logsumexp, out, logsumexp, *kept, needs, *flat, ctx.plan),
            )
        grads = [grad if need else None for need, grad in zip(needs, results)]
        if torch.is_grad_enabled():
            grads = _refuse_second_derivatives(backend.name, grads, [*tensors, grad_out, grad_logsumexp])
        return (*grads, *nothing)


def _composite_gradients(
    backend: Backend, x: Inputs, grad_out: Tensor | None, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The gradients with their own graph (``create_graph=True``), by autograd through torch's operators."""
    wanted = [name for name, need in zip(DIFFERENTIABLE, needs) if need]
    pairs = [(part, grad) for part, grad in zip(backend.attend(x), (grad_out, grad_logsumexp)) if grad is not None]
    outputs, grads = zip(*[(part, grad) for part, grad in pairs if part.requires_grad]) if pairs else ((), ())
    inputs = [getattr(x, name) for name in wanted]
    results = torch.autograd.grad(outputs, inputs, grads, create_graph=True, materialize_grads=True, allow_unused=True)
    by_name = dict(zip(wanted, results))
    return [by_name.get(name) for name in DIFFERENTIABLE]


def _refuse_second_derivatives(
    name: str, grads: list[Tensor | None], depends_on: list[Tensor | None]
) -> list[Tensor | None]:
    """The same gradients, which raise where they are differentiated (``create_graph=True``)."""
    # Key and value may not have been saved, so another tensor has to require a gradient.
    anchor = torch.zeros((), requires_grad=True, device="cpu")
    parts = [part for part in depends_on if part is not None and part.requires_grad]
    present = [grad for grad in grads if grad is not None]
    marked = iter(_OnceDifferentiable.apply(name, len(present), *present, anchor, *parts))
    return [None if grad is None else next(marked) for grad in grads]


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, count: int, *tensors: Tensor):
        ctx.name = name
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise ImplementationError(
            f"implementation {ctx.name!r} has no second derivatives; attend with implementation='reference' where a "
            "gradient is differentiated again (create_graph=True)"
        )


@torch.library.impl(f"{_NAMESPACE}::attention", "Autograd")
def _autograd(*arguments):
    if transforms.active():
        raise ImplementationError(
            "the registered operator supports neither torch.func nor forward-mode differentiation; call "
            "apt_kernels.attention, which supports both"
        )
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments):
        *flat, text = arguments
        return _Attention.apply(*flat, choose.planned(text, Inputs(*flat))[1].text)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*arguments)
