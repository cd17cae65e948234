"""Several adapters in one batch: each token has the prefix of its request's adapter."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from . import first_gate, marker, refusals

OPERATOR = "apt_kernels_vllm::chosen_prefix"


@dataclass(frozen=True)
class Choice:
    """The adapters of one step. They have the numbers of `requests.carrier`; 0 is the base model.

    Attributes:
        of_request: ``[R]``, the number of each request's adapter.
        tokens: for each adapter in the batch, the rows of its tokens.
    """

    of_request: Tensor
    tokens: dict[int, Tensor]


class Batch:
    """The running batch, as the model runner knows it. Layers of one model share one object."""

    def __init__(self) -> None:
        self.runner: Any = None

    def choice(self, metadata) -> Choice:
        """The adapters of the step that ``metadata`` describes, a `CommonAttentionMetadata`."""
        lengths = metadata.query_start_loc_cpu.long().diff()
        numbers = torch.zeros_like(lengths)
        if self.runner is None:
            reason = "the model runner is no GPUModelRunner, which knows a request's adapter"
            raise refusals.not_served(reason, refusals.SEVERAL)
        rows = self.runner.input_batch
        count = min(rows.num_reqs, len(numbers))  # rows after the last request are padding
        numbers[:count] = torch.from_numpy(rows.request_lora_mapping[:count])
        of_token, device = numbers.repeat_interleave(lengths), metadata.query_start_loc.device
        found = of_token.unique().tolist()
        tokens = {number: (of_token == number).nonzero()[:, 0].to(device) for number in found if number}
        return Choice(numbers.to(device), tokens)


def follow_runners() -> None:
    """Let every model runner of this process introduce itself to its model's `Batch`, once in a process.

    vLLM passes neither the runner nor its batch to a model or to its attention layers.
    """
    plain = GPUModelRunner.initialize_kv_cache
    if plain.__module__ == __name__:
        return

    @functools.wraps(plain, assigned=("__doc__", "__name__", "__qualname__"))
    def initialize_kv_cache(self, *args, **kwargs):
        for layer in self.compilation_config.static_forward_context.values():
            if isinstance(batch := getattr(layer, "apt_batch", None), Batch):
                batch.runner = self
        return plain(self, *args, **kwargs)

    GPUModelRunner.initialize_kv_cache = initialize_kv_cache


# Which adapters are in the batch changes with every step: torch.compile does not trace it.
@torch.library.custom_op(OPERATOR, mutates_args=())
def chosen_prefix(query: Tensor, hidden_states: Tensor | None, layer_name: str) -> tuple[Tensor, Tensor]:
    """`ServedPrefix.forward` for query ``[N, Hq, D]`` and hidden states ``[N, d]``, by each token's adapter."""
    metadata, layer, kv_cache, _ = get_attention_context(layer_name)
    out = query.new_zeros(query.shape, dtype=torch.float32)
    logsumexp = out.new_full(query.shape[:2], marker.ABSENT * layer.apt_scale)
    if metadata is None:  # a run that only measures memory
        return out, logsumexp
    for number, tokens in metadata.apt_choice.tokens.items():
        if str(number) not in layer.apt:  # this adapter has no prefix in this layer
            continue
        prefix = layer.apt[str(number)]
        if prefix.entry.kept_in_cache:
            mine = metadata.apt_choice.of_request == number
            every = first_gate.of_each_token(
                prefix.logits(hidden_states), metadata, layer, layer.apt_first[number], kv_cache, mine
            )
            logits = every[tokens]
        else:
            logits = prefix.logits(None if hidden_states is None else hidden_states[tokens])
        out[tokens], logsumexp[tokens] = prefix(query[tokens], logits)
    return out, logsumexp


@chosen_prefix.register_fake
def _(query: Tensor, hidden_states: Tensor | None, layer_name: str) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, dtype=torch.float32)
    return out, out.new_empty(query.shape[:2])
