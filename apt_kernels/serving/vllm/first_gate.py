"""Gate ``first``: all tokens of a request use the gate of its first token, in whichever step they are computed.

The logits are stored per block of the key/value cache, for the block that contains the request's first token. Like the
block's keys, they depend on that token only. Requests that share the block (prefix caching) therefore have the same
logits, and whenever the block is computed again (preemption, reuse by another request), so are the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import get_attention_context

OPERATOR = "apt_kernels_vllm::first_gate"


class Memory:
    """The logits of one layer by cache block, ``[blocks, M]``; NaN in blocks with which no request has begun."""

    def __init__(self) -> None:
        self.logits = torch.empty(0, 0)

    def of_requests(
        self, logits: Tensor, starts: Tensor, lengths: Tensor, computed: Tensor, blocks: Tensor, total: int
    ) -> Tensor:
        """Store the logits of the requests that begin in this step; return the logits of every request.

        Args:
            logits: ``[N, M]``, for the tokens of this step.
            starts: ``[R]``, the first row of each request.
            lengths: ``[R]``, its number of rows; 0 for padding of the batch.
            computed: ``[R]``, how many of its tokens were computed in earlier steps or found in the cache.
            blocks: ``[R]``, the block of its first token.
            total: number of blocks of the cache.

        Returns:
            ``[R, M]``.
        """
        if self.logits.shape != (total, logits.shape[1]):
            self.logits = logits.new_full((total, logits.shape[1]), float("nan"))
        begins = (lengths > 0) & (computed == 0)
        mine = logits[starts.clamp(max=logits.shape[0] - 1)]
        found = torch.where(begins[:, None], mine, self.logits[blocks])
        # Padding rows write back the stored value of their block.
        self.logits[blocks] = torch.where((lengths > 0)[:, None], found, self.logits[blocks])
        return found


# The metadata of a step is not an argument of the model. It is read in an operator, which torch.compile does not trace.
@torch.library.custom_op(OPERATOR, mutates_args=())
def first_gate(logits: Tensor, layer_name: str) -> Tensor:
    """Each token's logits ``[N, M]`` replaced by those of its request's first token."""
    metadata, layer, kv_cache, _ = get_attention_context(layer_name)
    if metadata is None:  # a run that only measures memory
        return logits.clone()
    return of_each_token(logits, metadata, layer, layer.apt_first, kv_cache)


def of_each_token(
    logits: Tensor, metadata, layer, memory: Memory, kv_cache: Tensor, mine: Tensor | None = None
) -> Tensor:
    """`first_gate` with the step's metadata and one adapter's memory; ``mine [R]``: the requests of this adapter."""
    starts = metadata.query_start_loc.long()
    lengths = starts[1:] - starts[:-1]
    # The marker's block is in front of each request's blocks.
    computed = metadata.seq_lens.long() - layer.apt_block_size - lengths
    blocks = metadata.block_table[: lengths.shape[0], 1].long()
    own = lengths if mine is None else lengths * mine
    found = memory.of_requests(logits, starts[:-1], own, computed, blocks, kv_cache.shape[0])
    rows = torch.arange(logits.shape[0], device=logits.device)
    request = torch.searchsorted(starts[1:], rows, right=True)
    inside = request < lengths.shape[0]  # rows after the last request are padding
    return torch.where(inside[:, None], found[request.clamp(max=lengths.shape[0] - 1)], logits)


@first_gate.register_fake
def _(logits: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(logits)
