"""The trained parameters of one attention layer, and the gate's logits from hidden states."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..errors import ConfigError

HIDDEN_GATES = ("first", "mean", "token")


class AdaptivePrefix(nn.Module):
    """Prefix, gate and layer scale of one attention module; it hangs there as ``module.apt``.

    Plain parameters, in float32 beside a model of any dtype:

    - ``key [Hkv, M, D]`` and ``value [Hkv, M, Dv]``;
    - ``gate_weight [M, d]`` for the gates ``first``, ``mean`` and ``token`` (``W_i`` of the paper, transposed), or
      ``gate_logits [M]`` for ``static``; None where it does not apply;
    - ``layer_scale [1]`` (``lambda_i``), or None.

    With a gate, the start ``gate_weight = 0, layer_scale = 2`` makes every weight exactly 1: training begins as plain
    prefix tuning. ``.to(dtype)`` casts these parameters like any others; the gate's logits stay float32 at least.

    With ``reparameterisation=W``, key and value are None while training; ``mlp`` makes them (`Reparameterisation`)
    until `fold` puts its result in their place. `tokens` gives both either way.

    The module is called like any other (`forward`), so that whatever holds parameters elsewhere between the calls
    (DeepSpeed ZeRO-3, offloading) brings them here in time. With tensor parallelism its parameters are distributed
    tensors (sharding.py), of whose heads every process attends with its own.
    """

    def __init__(
        self,
        length: int,
        num_key_value_heads: int,
        head_dim: int,
        value_head_dim: int,
        hidden_size: int,
        gate: str = "token",
        layer_scale: bool = True,
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        reparameterisation: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if gate not in (*HIDDEN_GATES, "static", "none"):
            raise ConfigError(f"gate is {gate!r}; it needs one of {', '.join(map(repr, HIDDEN_GATES))}, static, none")
        self.gate = gate
        self.name, self.cross, self.implementation = "", False, "auto"
        self.adapter, self.enabled = "default", True
        self.mesh = None  # over which the heads are sharded
        # Known without the parameters, of which a process may hold a part or nothing.
        self.length, self.heads, self.head_dim = length, num_key_value_heads, head_dim

        def draw(*shape: int) -> nn.Parameter:
            # Drawn on the CPU, so that a seed gives the same prefix on every device.
            return nn.Parameter((torch.randn(shape, generator=generator) * init_std).to(device))

        self.dropout, self.key, self.value, self.mlp = dropout, None, None, None
        if reparameterisation is None:
            self.key = draw(num_key_value_heads, length, head_dim)
            self.value = draw(num_key_value_heads, length, value_head_dim)
        else:
            widths = reparameterisation, num_key_value_heads, head_dim, value_head_dim
            self.mlp = Reparameterisation(length, *widths, init_std, generator).to(device)
        self.gate_weight = self.gate_logits = self.layer_scale = None
        if gate in HIDDEN_GATES:
            self.gate_weight = nn.Parameter(torch.zeros(length, hidden_size, device=device))
        elif gate == "static":
            self.gate_logits = nn.Parameter(torch.zeros(length, device=device))
        if layer_scale:
            self.layer_scale = nn.Parameter(torch.full((1,), 1.0 if gate == "none" else 2.0, device=device))
        # The inputs of the running forward, and whether its attention went through the op (hf/route.py).
        self.running = Running()

    def extra_repr(self) -> str:
        return f"length={self.length}, heads={self.heads}, head_dim={self.head_dim}, gate={self.gate}"

    def forward(
        self, hidden_states: Tensor | None, real_tokens: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Key, value, gate logits and layer scale, as `apt_kernels.attention` takes them.

        Arguments as for `logits`; without hidden states there are no logits that depend on them.
        """
        waits = hidden_states is None and self.gate in HIDDEN_GATES
        gate = None if waits else self.logits(hidden_states, real_tokens, segments)
        scale = None if self.layer_scale is None else self._here(self.layer_scale)
        if self.mesh is not None:
            from .sharding import sum_gradient

            gate, scale = (None if part is None else sum_gradient(part, self.mesh) for part in (gate, scale))
        return *self.tokens(), gate, scale

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Key ``[Hkv, M, D]`` and value ``[Hkv, M, Dv]`` of this forward; in training with the prefix's dropout."""
        key, value = (self.key, self.value) if self.mlp is None else self.mlp()
        if self.mesh is not None:
            from .sharding import by_heads

            key, value = by_heads(key).to_local(), by_heads(value).to_local()
        if self.dropout and self.training:
            key, value = (torch.nn.functional.dropout(part, self.dropout) for part in (key, value))
        return key, value

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the reparameterisation by its result; without one, nothing changes."""
        if self.mlp is not None:
            (key, value), self.mlp = self.mlp(), None
            if self.mesh is not None:
                from .sharding import by_heads

                key, value = by_heads(key), by_heads(value)
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def _here(self, parameter: nn.Parameter) -> Tensor:
        """A parameter that no process holds a part of."""
        return parameter if self.mesh is None else parameter.to_local()

    def logits(
        self, hidden_states: Tensor | None, real_tokens: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor | None:
        """Gate logits of this layer: ``[B, T, M]`` (token), ``[B, M]`` (first, mean), ``[M]`` (static) or None.

        Args:
            hidden_states: ``[B, T, d]``, what enters the attention module.
            real_tokens: ``[B, T]`` bool, False at padding; None: every token is real.
            segments: ``[B, T]`` integers, equal within a packed document; with ``first`` and ``mean``, each document
                then has the gate of its own first token or mean, and the logits are ``[B, T, M]``.
        """
        if self.gate == "none":
            return None
        if self.gate == "static":
            return self._here(self.gate_logits)
        if self.gate == "first" and segments is not None:
            hidden_states = _first_of_segment(hidden_states, segments)
        elif self.gate == "first":
            hidden_states = _first(hidden_states, real_tokens)
        elif self.gate == "mean" and segments is not None:
            hidden_states = _mean_of_segment(hidden_states, real_tokens, segments)
        elif self.gate == "mean":
            hidden_states = _mean(hidden_states, real_tokens)
        return gate_product(hidden_states, self._here(self.gate_weight))

    def __getstate__(self):
        # A copy or a pickle taken in the middle of a forward must not drag the activations along.
        return {**self.__dict__, "running": Running()}


class Running:
    """A forward that is under way. Not of the module itself, whose attributes are slow to set."""

    def __init__(self):
        self.pending, self.served = None, False


class Reparameterisation(nn.Module):
    """Key and value from a small embedding through an MLP: ``W_out tanh(W_in e + b_in) + b_out`` (Li & Liang 2021).

    Theirs is one MLP for all layers; each layer has its own here, so that lengths may differ. Plain parameters:
    ``embedding [M, W]``, ``weight_in [W, W]``, ``bias_in [W]``, ``weight_out [Hkv (D + Dv), W]``,
    ``bias_out [Hkv (D + Dv)]``. ``weight_out`` is scaled so that the first prefix has the standard deviation ``std``.
    """

    def __init__(self, length: int, width: int, heads: int, head_dim: int, value_head_dim: int, std: float, generator):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        outputs = heads * (head_dim + value_head_dim)

        def draw(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale)

        self.embedding = draw(length, width, scale=1.0)
        self.weight_in, self.bias_in = draw(width, width, scale=width**-0.5), nn.Parameter(torch.zeros(width))
        self.weight_out, self.bias_out = draw(outputs, width, scale=1.0), nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            self.weight_out *= std / torch.cat([part.flatten() for part in self()]).std().clamp(min=1e-12)

    def forward(self) -> tuple[Tensor, Tensor]:
        linear = torch.nn.functional.linear
        hidden = torch.tanh(linear(self.embedding, self.weight_in, self.bias_in))
        made = linear(hidden, self.weight_out, self.bias_out).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        key, value = made.split((self.head_dim, made.shape[2] - self.head_dim), dim=2)
        return key.contiguous(), value.contiguous()


def gate_product(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """``h W^T`` with the operands in the hidden states' dtype, accumulated and returned in float32 (or float64).

    For its backward it keeps the hidden states as they are, not a copy in float32.
    """
    kind = hidden_states.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        logits = _GateProduct.apply(hidden_states.flatten(0, -2), weight)
        return logits.reshape(*hidden_states.shape[:-1], weight.shape[0])


class _GateProduct(torch.autograd.Function):
    """``rows [N, d]`` times ``weight [M, d]``, transposed: ``[N, M]``."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype, weight = weight.dtype, weight.to(rows.dtype)
        ctx.save_for_backward(rows, weight)
        return _wide_product(rows, weight.mT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows = of_weight = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                of_rows = _product_of_wide(grad, weight).to(rows.dtype)
            if ctx.needs_input_grad[1]:
                of_weight = _product_of_wide(grad.mT, rows).to(ctx.dtype)
        return of_rows, of_weight


def _on_matrix_units(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.version.hip is None and tensor.dtype in (torch.bfloat16, torch.float16)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, summed and returned in float32 at least."""
    if _on_matrix_units(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)


def _product_of_wide(a: Tensor, b: Tensor) -> Tensor:
    """`_wide_product` where ``a`` is wide already: for the matrix units as the sum of two bfloat16 parts."""
    if b.dtype == torch.bfloat16 and _on_matrix_units(b):
        high = a.to(b.dtype)
        return _wide_product(high, b) + _wide_product((a - high).to(b.dtype), b)
    return a @ b.to(a.dtype)


def _first(hidden_states: Tensor, real_tokens: Tensor | None) -> Tensor:
    if real_tokens is None:
        return hidden_states[:, 0]
    index = real_tokens.to(torch.uint8).argmax(dim=1)
    # Not by indexing, the gradient of which sorts.
    return hidden_states.gather(1, index[:, None, None].expand(-1, 1, hidden_states.shape[2])).squeeze(1)


def _begins(segments: Tensor) -> Tensor:
    """``[B, T]`` bool: the first token of each document."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins


def document_starts(segments: Tensor) -> Tensor:
    """``[B, T]``: where each token's document begins in its row, from ``segments``, equal within a document."""
    position = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return torch.where(_begins(segments), position, 0).cummax(dim=1).values


def _first_of_segment(hidden_states: Tensor, segments: Tensor) -> Tensor:
    start = document_starts(segments)
    return hidden_states.gather(1, start[..., None].expand_as(hidden_states))


def _mean_of_segment(hidden_states: Tensor, real_tokens: Tensor | None, segments: Tensor) -> Tensor:
    number = _begins(segments).cumsum(dim=1) - 1
    number = number[..., None].expand_as(hidden_states)
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    real = torch.ones_like(wide) if real_tokens is None else real_tokens[..., None].to(wide.dtype).expand_as(wide)
    total, count = (torch.zeros_like(wide).scatter_add(1, number, part) for part in (wide * real, real))
    return (total / count.clamp(min=1)).gather(1, number).to(hidden_states.dtype)


def _mean(hidden_states: Tensor, real_tokens: Tensor | None) -> Tensor:
    if real_tokens is None:
        return hidden_states.mean(dim=1)
    real = real_tokens[..., None].to(torch.promote_types(hidden_states.dtype, torch.float32))
    total = (hidden_states * real).sum(dim=1)
    return (total / real.sum(dim=1).clamp(min=1)).to(hidden_states.dtype)
