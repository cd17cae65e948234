"""Attention over a trained prefix alone, as the marker needs it: output and log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...prefix import gates


class ServedPrefix(nn.Module):
    """The prefix of one attention layer, on the heads of this process.

    Its tensors are float32 buffers, not parameters: vLLM expects every parameter in the base model's checkpoint.

    Args:
        gate: the gate's name: ``"none"``, ``"static"``, ``"token"`` or ``"first"``.
        tensors: the adapter's tensors of the layer by field: ``key [Hkv, M, D]``, ``value``, and where they apply
            ``gate_weight [M, d]``, ``gate_logits [M]`` and ``layer_scale [1]``.
        heads: the slice of ``Hkv`` that this process has.
        scale: the factor by which the model multiplies ``query . key``.
    """

    key: Tensor
    value: Tensor
    weights: Tensor
    gate_weight: Tensor | None

    def __init__(self, gate: str, tensors: Mapping[str, Tensor], heads: slice, scale: float):
        super().__init__()
        self.scale, self.entry = scale, gates.find(gate)
        key, value = (tensors[name][heads].float() for name in ("key", "value"))
        weights = torch.ones(key.shape[1])  # the factor of the gate's sigmoid; without a sigmoid, the weights
        if "layer_scale" in tensors:
            weights = weights * tensors["layer_scale"].float()
        if self.entry.parameter == "gate_logits":
            weights = weights * torch.sigmoid(tensors["gate_logits"].float())
        weight = tensors["gate_weight"].float() if self.entry.reads_hidden_states else None
        for name, tensor in {"key": key, "value": value, "weights": weights, "gate_weight": weight}.items():
            self.register_buffer(name, tensor, persistent=False)

    def logits(self, hidden_states: Tensor | None) -> Tensor | None:
        """The gate's logits ``[N, M]``, float32, for hidden states ``[N, d]``; None if the gate reads none."""
        if hidden_states is None or self.gate_weight is None:
            return None
        # The operands in the model's dtype, the sum in float32, as in training.
        return hidden_states.float() @ self.gate_weight.to(hidden_states.dtype).float().T

    def forward(self, query: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention over the prefix.

        Args:
            query: ``[N, Hq, D]``, positions (rotary embedding) applied.
            logits: ``[N, M]``, from `logits`: for each query, those of the token that determines its gate.

        Returns:
            The output ``[N, Hq, D]`` and the log-sum-exp of the logits ``[N, Hq]``, float32.
        """
        weights = self.weights if logits is None else self.weights * torch.sigmoid(logits)
        weights = weights.view(-1, 1, 1, self.key.shape[1])
        tokens, heads, head_dim = query.shape
        rows = query.float().view(tokens, self.key.shape[0], -1, head_dim)
        # In place: memory traffic, not arithmetic, is what a long prefix costs.
        scores = torch.einsum("nkgd,kmd->nkgm", rows, self.key).mul_(weights * self.scale)
        largest = scores.amax(dim=-1, keepdim=True)
        exponentials = scores.sub_(largest).exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        out = torch.einsum("nkgm,kmd->nkgd", exponentials.mul_(weights), self.value) / total
        return out.reshape(tokens, heads, -1), (largest + total.log()).reshape(tokens, heads)
