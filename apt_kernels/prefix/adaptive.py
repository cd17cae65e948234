"""The trained parameters of one attention layer, and the gate's logits from hidden states."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from . import gates
from .reparameterisation import Reparameterisation


class AdaptivePrefix(nn.Module):
    """Prefix, gate and layer scale of one attention module, registered on it as ``module.apt``.

    Plain parameters, in float32 beside a model of any dtype:

    - ``key [Hkv, M, D]`` and ``value [Hkv, M, Dv]``;
    - ``gate_weight [M, d]`` for the gates ``first``, ``mean`` and ``token`` (``W_i`` of the paper, transposed), or
      ``gate_logits [M]`` for ``static``; None where it does not apply;
    - ``layer_scale [1]`` (``lambda_i``), or None;
    - with ``num_frozen_tokens=F``, ``frozen_key [Hkv, F, D]`` and ``frozen_value [Hkv, F, Dv]``, the first F tokens;
      ``key`` and ``value`` are then those of the other ``M - F``. Frozen tokens get no gradient, so no optimizer
      changes them, not by weight decay or momentum either. Their gates train like the others.

    With a gate, the start ``gate_weight = 0, layer_scale = 2`` makes every weight exactly 1: training begins as plain
    prefix tuning. ``.to(dtype)`` casts these parameters like any others; the gate's logits stay float32 at least.

    With ``reparameterisation=W``, ``key`` and ``value`` are None while training: ``mlp`` (`Reparameterisation`)
    computes them, until `fold` replaces it by its result. `tokens` returns both in either case.

    Attention reads the parameters through ``__call__`` alone, so that the module hooks of DeepSpeed ZeRO-3 and of
    offloading gather them before use. With tensor parallelism the parameters are distributed tensors, and each process
    uses its own heads (sharding.py).

    Examples:
        >>> prefix = next(iter(apt_kernels.prefixes(model).values()))
        >>> key, value = prefix.tokens()
        >>> key.shape[1]
        16
        >>> prefix.layer_scale.item()
        2.0
    """

    key: nn.Parameter | None
    value: nn.Parameter | None
    frozen_key: nn.Parameter | None
    frozen_value: nn.Parameter | None
    start: dict[str, Tensor]  # samples of the initial values, see `hf.state.remember_start`
    saved: dict[str, Tensor]  # the same of the values that were last saved or loaded

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
        num_frozen_tokens: int = 0,
    ):
        super().__init__()
        self.gate = gates.find(gate).name
        self.name, self.cross, self.implementation = "", False, "auto"
        self.adapter = "default"
        self.mesh = None  # the device mesh over which the heads are sharded
        # Stored apart from the parameters, of which a process may hold a part or nothing.
        self.length, self.heads, self.head_dim = length, num_key_value_heads, head_dim
        self.frozen = min(num_frozen_tokens, length)

        def draw(*shape: int) -> nn.Parameter:
            # Drawn on the CPU, so that a seed gives the same prefix on every device.
            drawn = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            return nn.Parameter((drawn * init_std).to(device))

        def full(*shape: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value, device=device, dtype=torch.float32))

        self.dropout, self.key, self.value, self.mlp = dropout, None, None, None
        self.frozen_key = self.frozen_value = None
        if reparameterisation is None:
            key, value = (draw(num_key_value_heads, length, width) for width in (head_dim, value_head_dim))
            self.store(key.detach(), value.detach())
        else:
            widths = reparameterisation, num_key_value_heads, head_dim, value_head_dim
            self.mlp = Reparameterisation(length, *widths, init_std, generator).to(device)
        self.gate_weight = self.gate_logits = self.layer_scale = None
        if self.gate_entry.parameter == "gate_weight":
            self.gate_weight = full(length, hidden_size, value=0.0)
        elif self.gate_entry.parameter == "gate_logits":
            self.gate_logits = full(length, value=0.0)
        if layer_scale:
            self.layer_scale = full(1, value=2.0 if self.gate_entry.parameter else 1.0)

    @property
    def gate_entry(self) -> gates.Gate:
        """The entry of its gate in gates.py."""
        return gates.find(self.gate)

    def extra_repr(self) -> str:
        return f"length={self.length}, heads={self.heads}, head_dim={self.head_dim}, gate={self.gate}"

    def forward(
        self, hidden_states: Tensor | None, real_tokens: Tensor | None = None, segments: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Key, value, gate logits and layer scale, as `apt_kernels.attention` takes them.

        Arguments as for `logits`. Without hidden states, the logits of a gate that reads them are None.
        """
        available = hidden_states is not None or not self.gate_entry.reads_hidden_states
        gate = self.logits(hidden_states, real_tokens, segments) if available else None
        scale = None if self.layer_scale is None else self._local(self.layer_scale)
        if self.mesh is not None:
            from .sharding import sum_gradient

            gate, scale = (None if part is None else sum_gradient(part, self.mesh) for part in (gate, scale))
        return *self.tokens(), gate, scale

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Key ``[Hkv, M, D]`` and value ``[Hkv, M, Dv]`` of this forward; in training with the prefix's dropout."""
        parts = [cast("tuple[Tensor, Tensor]", (self.key, self.value)) if self.mlp is None else self.mlp()]
        if self.frozen_key is not None and self.frozen_value is not None:
            # Detached, so that no gradient arrives if someone sets requires_grad on all parameters.
            parts.insert(0, (self.frozen_key.detach(), self.frozen_value.detach()))
        if self.mesh is not None:
            from .sharding import by_heads

            parts = [(by_heads(key).to_local(), by_heads(value).to_local()) for key, value in parts]
        key, value = parts[0] if len(parts) == 1 else (torch.cat(part, dim=1) for part in zip(*parts))
        if self.dropout and self.training:
            key, value = (torch.nn.functional.dropout(part, self.dropout) for part in (key, value))
        return key, value

    def store(self, key: Tensor, value: Tensor) -> None:
        """New parameters with copies of these M tokens, the first `frozen` of them frozen."""
        for part, tokens in (("key", key), ("value", value)):
            first, rest = (each.clone() for each in tokens.detach().tensor_split([self.frozen], dim=1))
            setattr(self, f"frozen_{part}", nn.Parameter(first, requires_grad=False) if self.frozen else None)
            setattr(self, part, nn.Parameter(rest))

    @torch.no_grad()
    def copy_(self, key: Tensor, value: Tensor) -> None:
        """Write key ``[Hkv, M, D]`` and value ``[Hkv, M, Dv]`` into its parameters."""
        for part, tokens in (("key", key), ("value", value)):
            for name, given in zip((f"frozen_{part}", part), tokens.tensor_split([self.frozen], dim=1)):
                if getattr(self, name) is not None:
                    getattr(self, name).copy_(given)

    @torch.no_grad()
    def fold(self) -> None:
        """Replace the reparameterisation by its result; without one, nothing changes."""
        if self.mlp is not None:
            with torch.autocast(self.mlp.embedding.device.type, enabled=False):
                (key, value), self.mlp = self.mlp(), None
            if self.mesh is not None:
                from .sharding import by_heads

                key, value = by_heads(key), by_heads(value)
            self.key, self.value = nn.Parameter(key), nn.Parameter(value)

    def _local(self, parameter: nn.Parameter) -> Tensor:
        """A parameter that is replicated, as a plain tensor."""
        return parameter if self.mesh is None else parameter.to_local()

    def logits(
        self, hidden_states: Tensor | None, real_tokens: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor | None:
        """The logits of this layer's gate; see `gates.Gate.logits`. None without a gate."""
        entry = self.gate_entry
        parameter = None if entry.parameter is None else self._local(getattr(self, entry.parameter))
        return entry.logits(parameter, hidden_states, real_tokens, segments)
