"""The interface of an implementation of the op, and the plan that is made once for each call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar, NamedTuple

from torch import Tensor

from .inputs import Inputs, heads_last_empty


class Plan(NamedTuple):
    """The implementation and the strategy that compute a call, and why those preferred to them do not.

    `choose.choose` makes it once; forward and backward receive it. ``text`` carries it through the registered
    operator, whose arguments are tensors, numbers and strings.
    """

    name: str
    strategy: str
    reason: str = ""

    @property
    def text(self) -> str:
        """``"name/strategy"``; `parse` reads it."""
        return f"{self.name}/{self.strategy}"

    @staticmethod
    @cache
    def parse(text: str) -> Plan:
        """The plan of a `text`; its strategy is empty where the text names an implementation alone."""
        name, _, strategy = text.partition("/")
        return Plan(name, strategy)


class Result(NamedTuple):
    """What a forward returns.

    ``out``: ``[B, Hq, T, Dv]`` stored heads last, in the query's dtype. ``logsumexp``: ``[B, Hq, T]``, contiguous, in
    `Inputs.compute_dtype`. ``kept``: two buffers that are saved for the backward in place of key and value, see
    `Backend.empty_kept`.
    """

    out: Tensor
    logsumexp: Tensor
    kept: tuple[Tensor, Tensor] | None = None


class Backend(ABC):
    """An implementation of the op. A module of ``impl/`` defines one instance of a subclass, ``BACKEND``.

    `strategy`, `forward` and `backward` are required; everything else has a default. ``tests/impl/test_backends.py``
    tests every implementation: the error rule, the declared dtypes and layouts, the same bits in every run.
    """

    name: ClassVar[str]
    # The inputs whose gradients it returns in its own layout, that of `empty_gradient`. The op converts every other
    # gradient to the default layout.
    own_layouts: ClassVar[frozenset[str]] = frozenset()
    # Whether it can also compute a call by torch's own differentiable operators (`attend`), and so supports torch.func,
    # forward-mode differentiation and second derivatives.
    composite: ClassVar[bool] = False

    def obstacle(self) -> str | None:
        """Why it cannot run on this machine; None: it can."""
        return None

    def obstacle_for(self, x: Inputs) -> str | None:
        """Why it cannot compute these inputs; None: it can."""
        return None

    def reserved(self, x: Inputs) -> str | None:
        """Why it computes these inputs only if requested by name; None: the automatic choice may use it, too."""
        return None

    def details(self) -> str:
        """What `apt_kernels.info` adds where it is usable; empty: nothing."""
        return ""

    @abstractmethod
    def strategy(self, x: Inputs) -> str:
        """The name of the strategy that is best for these inputs, one word."""

    def plan(self, x: Inputs, reason: str = "") -> Plan:
        """The plan for these inputs, by `strategy`; ``reason``: why the call uses this implementation."""
        return Plan(self.name, self.strategy(x), reason)

    @abstractmethod
    def forward(self, x: Inputs, plan: Plan) -> Result:
        """Output and log-sum-exp, without autograd."""

    def output(self, x: Inputs, plan: Plan) -> Tensor:
        """The output alone, without autograd: override it where the log-sum-exp costs extra."""
        return self.forward(x, plan).out

    @abstractmethod
    def backward(
        self,
        x: Inputs,
        plan: Plan,
        result: Result,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        needs: list[bool],
    ) -> list[Tensor | None]:
        """Gradients of the inputs named in `inputs.DIFFERENTIABLE`, None where ``needs`` is False.

        ``result`` is what `forward` returned. Where it has ``kept``, ``x.key`` and ``x.value`` are the last S rows of
        the two buffers.
        """

    def attend(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp by torch's own operators, if it is `composite`."""
        raise NotImplementedError

    def empty_kept(self, x: Inputs, plan: Plan) -> tuple[Tensor, Tensor] | None:
        """Uninitialised tensors of the shapes, dtypes and strides of what `forward` keeps; None: it keeps nothing.

        Kept are ``[B, Hkv, any + S, D]`` and ``[B, Hkv, any + S, Dv]``: anything else, then the keys and values.
        """
        return None

    def empty_gradient(self, x: Inputs, plan: Plan, name: str, of_logsumexp: bool, needs: list[bool]) -> Tensor:
        """An uninitialised gradient of the input ``name`` in the layout that the op returns it in.

        ``of_logsumexp``: whether the log-sum-exp has a gradient. Override it for the names in `own_layouts` alone.
        """
        like = getattr(x, name)
        return heads_last_empty(like, *like.shape) if name in ("query", "key", "value") else like.new_empty(like.shape)
