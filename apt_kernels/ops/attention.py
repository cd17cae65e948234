"""The op: validate, choose an implementation, run it as one registered torch operator with its own backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..impl.backend import Backend, Plan, Result
from ..impl.inputs import DIFFERENTIABLE, Inputs, heads_last, heads_last_empty
from ..mask import Mask
from . import choose

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, Tensor? gate, "
    "Tensor? layer_scale, Tensor? sinks, Tensor? bias, Tensor? gate_index, Tensor? dense, Tensor? key_padding, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? query_offset, Tensor? seed, SymInt offset, bool causal, "
    "int window_left, int window_right, float scale, float softcap, float dropout_p, bool gate_by_query, "
    "str implementation"
)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_logsumexp: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a gated, scaled prefix and the keys: ``softmax(scale q [P'_k ; k]^T) [P'_v ; v]``.

    ``P' = layer_scale * sigmoid(gate) * [prefix_key, prefix_value]`` (Adaptive Prefix Tuning, Zhang et al., ACL 2023).
    Every query sees the whole prefix. Differentiable once in every floating-point tensor.

    Args:
        query: ``[B, Hq, T, D]``, float32, float64, bfloat16 or float16; any strides.
        key, value: ``[B, Hkv, S, D]`` and ``[B, Hkv, S, Dv]``, the query's dtype; ``Hq`` is a multiple of ``Hkv``.
        prefix_key, prefix_value: ``[Hkv, M, D]`` and ``[Hkv, M, Dv]``, shared by the batch; float32 or query's dtype.
        gate: logits: ``[M]``, ``[B, M]``, ``[B, T, M]``, or ``[G, M]`` with ``gate_index``; None: no gate.
        layer_scale: lambda, a float or a tensor of one element; None: 1.
        mask: a `Mask`; None: every query sees every key.
        gate_index: integer ``[B]`` or ``[B, T]``, the row of ``gate`` for each batch row or query, in ``0..G-1``
            (not checked on an accelerator, where that would wait for the device).
        scale: softmax scale; default ``1 / sqrt(D)``.
        softcap: logits become ``softcap * tanh(logits / softcap)``, prefix columns included; None or 0: off.
        sinks: ``[Hq]``, the logit of one extra column per head that has no value (never soft-capped).
        dropout_p: probability of dropping a column of the probabilities, in ``[0, 1)``.
        seed: int or one-element int64 tensor that fixes the dropout; None: drawn from torch's generator.
        return_logsumexp: return ``(out, logsumexp)``; the log-sum-exp ``[B, Hq, T]`` is over prefix, sink and token
            columns, in float32 (float64 for float64), and differentiable.
        implementation: ``"auto"`` or the name of one, which is then obeyed or raises; see `apt_kernels.info`. The
            environment variable ``APT_KERNELS_IMPLEMENTATION`` does the same where the argument is ``"auto"``.

    Returns:
        ``[B, Hq, T, Dv]`` in the query's dtype, stored as ``[B, T, Hq, Dv]``.

    Raises:
        ArgumentError: an argument has a wrong shape, dtype or device.
        ImplementationError: the implementation asked for by name cannot run here or on these inputs.
    """
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
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=seed,
    )
    plan, tensors = choose.choose(x, implementation), x.tensors()
    if _is_plain(tensors):
        # The same result as the registered operator's, without its 20 microseconds of dispatch.
        recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        found = _Attention.apply(*x.flat(), plan.text) if recorded else choose.load(plan.name).forward(x, plan)
    else:
        found = torch.ops.apt_kernels.attention.default(*x.flat(), plan.text)
    return (found[0], found[1]) if return_logsumexp else found[0]


def _is_plain(tensors: list[Tensor]) -> bool:
    """Whether nothing but autograd watches a call: no compiler, tracer, transform, mode, profiler or subclass."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(_is_real(tensor) for tensor in tensors)


def selected(*arguments, implementation: str = "auto", **keywords) -> Plan:
    """The plan of `attention` for these arguments: ``name`` and ``strategy`` of the implementation, and the ``reason``
    for which those before it in the automatic choice do not serve."""
    return choose.choose(make_inputs(*arguments, **keywords), implementation)


def make_inputs(
    query,
    key,
    value,
    prefix_key,
    prefix_value,
    gate=None,
    layer_scale=None,
    *,
    mask=None,
    gate_index=None,
    scale=None,
    softcap=None,
    sinks=None,
    dropout_p=0.0,
    seed=None,
) -> Inputs:
    """Validate `attention`'s arguments and bring them to the form that implementations take."""
    named = {"query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name} is a {type(tensor).__name__}; it needs a torch.Tensor")
    query, key, value = _autocast(query, key, value)
    _check_core(query, key, value, prefix_key, prefix_value)
    batch, heads, queries, head_dim = query.shape
    keys, length, device = key.shape[2], prefix_key.shape[1], query.device
    mask = Mask() if mask is None else mask
    if not isinstance(mask, Mask):
        raise ArgumentError(f"mask is a {type(mask).__name__}; it needs an apt_kernels.Mask or None")
    mask.check(batch, heads, queries, keys, device)
    given = gate if gate_index is None else gate_index
    gate, gate_index = _gate(gate, gate_index, batch, queries, length, device)
    if sinks is not None:
        _check_float("sinks", sinks, (heads,), device)
    offset, offset_tensor = _offset(mask, keys - queries)
    window_left, window_right = mask.window_sizes
    return Inputs(
        query=query,
        key=key,
        value=value,
        prefix_key=prefix_key,
        prefix_value=prefix_value,
        gate=gate,
        layer_scale=_layer_scale(layer_scale, device),
        sinks=sinks,
        bias=_four_d(mask.bias),
        gate_index=gate_index,
        dense=_four_d(mask.dense),
        key_padding=mask.key_padding,
        query_segments=mask.query_segments,
        key_segments=mask.key_segments,
        query_offset=offset_tensor,
        seed=_seed(dropout_p, seed, device),
        offset=offset,
        causal=bool(mask.causal),
        window_left=window_left,
        window_right=window_right,
        scale=head_dim**-0.5 if scale is None else _finite("scale", scale),
        softcap=_softcap(softcap),
        dropout_p=float(dropout_p),
        gate_by_query=given is not None and given.ndim == (3 if gate_index is None else 2),
    )


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, activations take its dtype, as in ``scaled_dot_product_attention``."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return list(tensors)
    if any(t.dtype == torch.float64 for t in tensors):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) for t in tensors]


def _check_core(query, key, value, prefix_key, prefix_value) -> None:
    if query.ndim != 4:
        raise ArgumentError(f"query has shape {list(query.shape)}; it needs [B, Hq, T, D]")
    if query.dtype not in _DTYPES:
        raise ArgumentError(f"query has dtype {query.dtype}; it needs float32, float64, bfloat16 or float16")
    batch, heads, _, head_dim = query.shape
    if key.ndim != 4 or key.shape[0] != batch or key.shape[3] != head_dim:
        raise ArgumentError(f"key has shape {list(key.shape)}; it needs [B, Hkv, S, D] = [{batch}, Hkv, S, {head_dim}]")
    kv_heads, keys = key.shape[1], key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(f"key has {kv_heads} heads; it needs a number that divides the query's {heads}")
    if value.ndim != 4 or tuple(value.shape[:3]) != (batch, kv_heads, keys):
        raise ArgumentError(
            f"value has shape {list(value.shape)}; it needs [B, Hkv, S, Dv] = [{batch}, {kv_heads}, {keys}, Dv]"
        )
    if prefix_key.ndim != 3 or (prefix_key.shape[0], prefix_key.shape[2]) != (kv_heads, head_dim):
        raise ArgumentError(
            f"prefix_key has shape {list(prefix_key.shape)}; it needs [Hkv, M, D] = [{kv_heads}, M, {head_dim}]"
        )
    need = (kv_heads, prefix_key.shape[1], value.shape[3])
    if tuple(prefix_value.shape) != need:
        raise ArgumentError(f"prefix_value has shape {list(prefix_value.shape)}; it needs [Hkv, M, Dv] = {list(need)}")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("prefix_key", prefix_key)):
        if 0 in tensor.shape:
            raise ArgumentError(f"{name} has shape {list(tensor.shape)}; every size needs to be at least 1")
    if value.shape[3] == 0:
        raise ArgumentError(f"value has shape {list(value.shape)}; every size needs to be at least 1")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs the query's, {query.dtype}")
    for name, tensor in (("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if tensor.dtype not in (query.dtype, torch.float32):
            raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs float32 or the query's, {query.dtype}")
    for name, tensor in (("key", key), ("value", value), ("prefix_key", prefix_key), ("prefix_value", prefix_value)):
        if tensor.device != query.device:
            raise ArgumentError(f"{name} is on {tensor.device}; it needs the query's device, {query.device}")


def _check_float(name: str, tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"{name} is a {type(tensor).__name__}; it needs a torch.Tensor of shape {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise ArgumentError(f"{name} has shape {list(tensor.shape)}; it needs {list(shape)}")
    if tensor.dtype not in _DTYPES:
        raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs float32, float64, bfloat16 or float16")
    if tensor.device != device:
        raise ArgumentError(f"{name} is on {tensor.device}; it needs the query's device, {device}")


def _gate(gate, gate_index, batch: int, queries: int, length: int, device) -> tuple[Tensor | None, Tensor | None]:
    if gate is None:
        if gate_index is not None:
            raise ArgumentError("gate_index is given without gate; it needs gate [G, M]")
        return None, None
    if not isinstance(gate, Tensor):
        raise ArgumentError(f"gate is a {type(gate).__name__}; it needs a torch.Tensor of logits")
    if gate_index is not None:
        if gate.ndim != 2 or gate.shape[1] != length or gate.shape[0] == 0:
            raise ArgumentError(f"gate has shape {list(gate.shape)}; beside gate_index it needs [G, M] = [G, {length}]")
        _check_float("gate", gate, tuple(gate.shape), device)
        return gate, _gate_index(gate_index, gate.shape[0], batch, queries, device)
    shapes = {1: (length,), 2: (batch, length), 3: (batch, queries, length)}
    if tuple(gate.shape) != shapes.get(gate.ndim):
        raise ArgumentError(
            f"gate has shape {list(gate.shape)}; it needs [M] = [{length}], [B, M] = [{batch}, {length}], "
            f"[B, T, M] = [{batch}, {queries}, {length}], or [G, {length}] with gate_index"
        )
    _check_float("gate", gate, tuple(gate.shape), device)
    if gate.ndim == 3:
        return gate, None
    return (gate[None, None] if gate.ndim == 1 else gate[:, None]), None


def _gate_index(index, rows: int, batch: int, queries: int, device) -> Tensor:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        has = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise ArgumentError(f"gate_index is {has}; it needs an integer tensor")
    if tuple(index.shape) not in ((batch,), (batch, queries)):
        raise ArgumentError(
            f"gate_index has shape {list(index.shape)}; it needs [B] = [{batch}] or [B, T] = [{batch}, {queries}]"
        )
    if index.device != device:
        raise ArgumentError(f"gate_index is on {index.device}; it needs the query's device, {device}")
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and _is_real(index):
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= rows:
            raise ArgumentError(f"gate_index has values {low}..{high}; it needs 0..{rows - 1} (gate has {rows} rows)")
    index = index.to(torch.int64)
    return index[:, None] if index.ndim == 1 else index


def _is_real(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _layer_scale(layer_scale, device) -> Tensor | None:
    if layer_scale is None:
        return None
    if isinstance(layer_scale, (int, float)):
        return torch.full((1,), _finite("layer_scale", layer_scale), device=device)
    if not isinstance(layer_scale, Tensor) or layer_scale.numel() != 1:
        has = f"has shape {list(layer_scale.shape)}" if isinstance(layer_scale, Tensor) else f"is {layer_scale!r}"
        raise ArgumentError(f"layer_scale {has}; it needs a number or a tensor of one element")
    _check_float("layer_scale", layer_scale, tuple(layer_scale.shape), device)
    return layer_scale.reshape(1)


def _four_d(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape)) if tensor.ndim < 4 else tensor


def _offset(mask: Mask, default: int) -> tuple[int, Tensor | None]:
    if mask.query_offset is None:
        return default, None
    if isinstance(mask.query_offset, Tensor):
        return 0, mask.query_offset.reshape(-1).to(torch.int64)
    return mask.query_offset, None


def _seed(dropout_p, seed, device) -> Tensor | None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p < 1:
        raise ArgumentError(f"dropout_p is {dropout_p!r}; it needs a number in [0, 1)")
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ArgumentError(f"seed has shape {list(seed.shape)}, dtype {seed.dtype}; it needs one int64 element")
        if seed.device != device:
            raise ArgumentError(f"seed is on {seed.device}; it needs the query's device, {device}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed is {seed!r}; it needs a 64-bit int, a one-element int64 tensor, or None")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _softcap(softcap) -> float:
    if softcap is None:
        return 0.0
    softcap = _finite("softcap", softcap)
    if softcap < 0:
        raise ArgumentError(f"softcap is {softcap}; it needs a number >= 0 (0 or None: off)")
    return softcap


def _finite(name: str, number) -> float:
    if torch.compiler.is_compiling() and isinstance(number, (float, torch.SymFloat)):
        return number  # with dynamic shapes a float of the model is a symbol, and its value is not known yet
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ArgumentError(f"{name} is {number!r}; it needs a finite number")
    return float(number)


# Registration. One forward and one backward operator; the last argument is the text of the plan. Beside the output
# and the log-sum-exp, the forward returns what an implementation keeps for its backward in place of key and value, or
# two empty tensors.

torch.library.define("apt_kernels::attention", f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define(
    "apt_kernels::attention_backward",
    "(Tensor grad_out, Tensor? grad_logsumexp, Tensor out, Tensor logsumexp, Tensor? kept_key, Tensor? kept_value, "
    f"bool[] needs, {_ARGUMENTS}) -> Tensor[]",
)


@torch.library.impl("apt_kernels::attention", "default")
def _forward(*arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    return _four(x, *backend.forward(x, plan))


@torch.library.register_fake("apt_kernels::attention")
def _fake_forward(*arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    return _four(x, out, logsumexp, backend.empty_kept(x, plan))


def _four(x: Inputs, out: Tensor, logsumexp: Tensor, kept: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    return (out, logsumexp, *kept) if kept else (out, logsumexp, x.query.new_empty(0), x.query.new_empty(0))


@torch.library.impl("apt_kernels::attention_backward", "default")
def _backward(grad_out, grad_logsumexp, out, logsumexp, kept_key, kept_value, needs, *arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    result = Result(out, logsumexp, None if kept_key is None else (kept_key, kept_value))
    grads = backend.backward(x, plan, result, grad_out, grad_logsumexp, list(needs))
    return [_as_promised(x, name, grad, backend) for name, grad in zip(DIFFERENTIABLE, grads)]


def _as_promised(x: Inputs, name: str, grad: Tensor | None, backend: Backend) -> Tensor:
    """The gradient in the shape, dtype and layout that `_fake_backward` promises; empty where there is none."""
    if grad is None:
        return x.query.new_empty(0)
    grad = grad.to(getattr(x, name).dtype)
    if name in backend.own_layouts:
        return grad
    return heads_last(grad) if name in ("query", "key", "value") else grad.contiguous()


@torch.library.register_fake("apt_kernels::attention_backward")
def _fake_backward(grad_out, grad_logsumexp, out, logsumexp, kept_key, kept_value, needs, *arguments):
    x = Inputs(*arguments[:-1])
    backend, plan = choose.planned(arguments[-1], x)
    given = grad_logsumexp is not None, list(needs)
    return [
        backend.empty_gradient(x, plan, name, *given) if need else x.query.new_empty(0)
        for name, need in zip(DIFFERENTIABLE, needs)
    ]


class _Attention(torch.autograd.Function):
    """The autograd of the forward operator, by hand: torch's own helper reads the whole schema at every call."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.apt_kernels.attention.default(*inputs)
        ctx.set_materialize_grads(False)
        *flat, ctx.plan = inputs
        out, logsumexp, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.keys = flat[1].shape[2] if kept[0].numel() else 0
        if ctx.keys:
            # The tokens stand in what the forward kept, in an order of its choice; the inputs themselves may go.
            flat[1] = flat[2] = None
        ctx.rest = [None if isinstance(part, Tensor) else part for part in flat]
        ctx.is_tensor = [isinstance(part, Tensor) for part in flat]
        ctx.save_for_backward(*[part for part in flat if isinstance(part, Tensor)], out, logsumexp, *kept)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_logsumexp, *_):
        nothing = (None,) * (len(ctx.rest) + 1 - len(DIFFERENTIABLE))
        if grad_out is None and grad_logsumexp is None:
            return (None,) * len(DIFFERENTIABLE) + nothing
        *tensors, out, logsumexp, kept_key, kept_value = ctx.saved_tensors
        tensors = iter(tensors)
        flat = [next(tensors) if yes else part for yes, part in zip(ctx.is_tensor, ctx.rest)]
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        kept = (None, None)
        if ctx.keys:
            kept = kept_key, kept_value
            flat[1], flat[2] = (part[:, :, : ctx.keys] for part in kept)
        grads = torch.ops.apt_kernels.attention_backward.default(
            torch.zeros_like(out) if grad_out is None else grad_out,
            *(grad_logsumexp, out, logsumexp, *kept, needs, *flat, ctx.plan),
        )
        return (*[grad if need else None for need, grad in zip(needs, grads)], *nothing)


@torch.library.impl("apt_kernels::attention", "Autograd")
def _autograd(*arguments):
    if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in arguments):
        *flat, text = arguments
        return _Attention.apply(*flat, choose.planned(text, Inputs(*flat))[1].text)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.apt_kernels.attention.default(*arguments)
