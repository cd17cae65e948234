"""A library's kernels ("stock kernels") on the tokens, for the strategies that merge the prefix into their result.

They return the log-sum-exp, and their backward uses the output and the log-sum-exp that it is given: those of the whole
softmax give the exact gradients of a part of its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...inputs import Inputs
from . import cudnn, flash4


class Kernel(NamedTuple):
    """A stock kernel.

    ``obstacle``: why it cannot compute the tokens of these inputs; None: it can. ``forward``: output and log-sum-exp
    over the tokens, and over the sinks if ``takes_sinks``. ``backward``: the gradients of query, key and value through
    the tokens, from the inputs, the output and the log-sum-exp of the whole softmax, the output's gradient, and the
    log-sum-exp's, which is None unless ``takes_logsumexp_gradient``.
    """

    obstacle: Callable[[Inputs], str | None]
    forward: Callable[[Inputs], tuple[Tensor, Tensor]]
    backward: Callable[[Inputs, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    takes_sinks: bool = False
    takes_logsumexp_gradient: bool = False


KERNELS = {
    "merge": Kernel(cudnn.obstacle, cudnn.forward, cudnn.backward),
    "merge_flash4": Kernel(
        flash4.obstacle, flash4.forward, flash4.backward, takes_sinks=True, takes_logsumexp_gradient=True
    ),
}
