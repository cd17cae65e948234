"""Lazy attention scores, recorded and computed on demand: how inline attention becomes a call of the op.

Models that do not use transformers' attention interface compute attention inline: a product of query and key,
arithmetic on the scores (scale, masks, biases, soft-cap), softmax, dropout, a product with the value. While such a
module runs, `Deferring` returns a `Scores` object for a product of two activations, which records the arithmetic; its
softmax is a `Probabilities` object, and their product with a value is one call of the op, prefix included. Any other
use of a product computes it, by the calls that the model made.
"""

from __future__ import annotations

import math
import types

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...errors import PatchError

# A score at or below this hides a key: beside the prefix, its probability is zero in every dtype.
HIDDEN = -1e4
_PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
    torch.einsum,
}
_ATTEND = torch.nn.functional.scaled_dot_product_attention
_WHOLE = torch.nn.functional.multi_head_attention_forward
# The same function without its first lines, which would dispatch to the mode: each of its products then does so.
_IN_PARTS = types.FunctionType(
    _WHOLE.__code__,
    {**_WHOLE.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=_WHOLE.__defaults__,
)


class Deferring(TorchFunctionMode):
    """Products of activations become `Scores`; ``attend`` is called with (`Probabilities`, value) for each attention.

    ``attend(probabilities, value)`` returns ``[*lead, T, Dv]``.
    """

    def __init__(self, attend, watch=None):
        super().__init__()
        self.attend, self.watch = attend, watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _PRODUCTS:
            found = _product(self, function, args, kwargs)
            if found is not None:
                return found
        elif function is _ATTEND:
            return _stock(self, *args, **kwargs)
        elif function is _WHOLE and (args[0] if args else kwargs["query"]).shape[0] > 1:
            with self:  # one query for a whole sequence is pooling
                return _IN_PARTS(*args, **kwargs)
        operand = _first_deferred(args, kwargs)
        if operand is not None:
            return operand.apply(function, function.__name__, args, kwargs)
        out = function(*args, **kwargs)
        if self.watch is not None:
            self.watch.note(function.__name__, args, out)
        return out


def _first_deferred(args, kwargs):
    for operand in (*args, *kwargs.values()):
        if isinstance(operand, Deferred):
            return operand
        if isinstance(operand, (list, tuple)):
            for part in operand:
                if isinstance(part, Deferred):
                    return part
    return None


def computed(tree):
    """``tree`` with every deferred tensor computed."""
    if isinstance(tree, Deferred):
        return tree.compute()
    if isinstance(tree, (list, tuple)) and _first_deferred(tree, {}) is not None:
        return type(tree)(computed(part) for part in tree)
    return tree


def _taken(args, kwargs, *names: str) -> list:
    """The first arguments of a call, given by position or by name."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _product(mode: Deferring, function, args, kwargs):
    added = None
    if function is torch.einsum:
        return _einsum(mode, args)
    if function in (torch.baddbmm, Tensor.baddbmm):
        added, left, right = _taken(args, kwargs, "input", "batch1", "batch2")
    else:
        left, right = _taken(args, kwargs, "input", "mat2" if "bmm" in function.__name__ else "other")
    if isinstance(left, Probabilities):
        return left.weigh(computed(right)) if added is None else None
    left, right = computed(left), computed(right)
    if not _may_be_scores(left, right):
        return None
    scores = Scores(mode, lambda: function(*computed(args), **kwargs), left, _swapped(mode, right))
    if added is not None:
        scores.scale = float(kwargs.get("alpha", 1.0))
        beta = kwargs.get("beta", 1.0)
        if beta:
            scores.biases = [(added if beta == 1 else added * beta, scores.lead)]
    return scores


def _swapped(mode: Deferring, key: Tensor) -> Tensor:
    swapped = key.transpose(-1, -2)
    if mode.watch is not None:
        mode.watch.note("transpose", (key,), swapped)
    return swapped


def _may_be_scores(left, right) -> bool:
    return (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.ndim >= 3
        and right.ndim == left.ndim
        and left.is_floating_point()
        and not isinstance(right, torch.nn.Parameter)
    )


def _einsum(mode: Deferring, args):
    """``einsum`` of two operands, as scores ``[*lead, T, S]`` or as their product with a value, where it is either."""
    equation = args[0]
    operands = args[1:] if len(args) > 2 or not isinstance(args[1], (list, tuple)) else tuple(args[1])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation or "." in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if isinstance(operands[0], Probabilities):
        lead, query, keys = left[:-2], left[-2], left[-1]
        (last,) = set(right) - set(left)
        out = operands[0].weigh(torch.einsum(f"{right}->{lead}{keys}{last}", computed(operands[1])))
        return torch.einsum(f"{lead}{query}{last}->{result}", out)
    a, b = computed(operands[0]), computed(operands[1])
    summed = (set(left) & set(right)) - set(result)
    if len(result) < 4 or len(summed) != 1 or not _may_be_scores(a, b):
        return None
    lead, query, keys = result[:-2], result[-2], result[-1]
    if query in right and keys in left:
        a, b, left, right = b, a, right, left
    (dim,) = summed
    if set(left) != {*lead, query, dim} or set(right) != {*lead, keys, dim}:
        return None
    query_side, key_side = (
        torch.einsum(f"{left}->{lead}{query}{dim}", a),
        torch.einsum(f"{right}->{lead}{keys}{dim}", b),
    )
    return Scores(mode, lambda: torch.einsum(equation, *computed(operands)), query_side, key_side)


def _stock(mode, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """``scaled_dot_product_attention`` called inline."""
    query, key, value = computed(query), computed(key), computed(value)
    scores = Scores(mode, None, query, key)
    scores.scale = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        scores.causal = True
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores.hidden = [(~attn_mask, scores.lead)]
        else:
            scores.biases = [(attn_mask, scores.lead)]
    probabilities = Probabilities(scores, None)
    probabilities.dropout_p = dropout_p
    return probabilities.weigh(value)


class Deferred:
    """A tensor that has not been computed yet."""

    def __init__(self, mode: Deferring, thunk, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.mode, self.thunk, self.value = mode, thunk, None
        self.shape, self.dtype, self.device = torch.Size(shape), dtype, device

    def compute(self) -> Tensor:
        """The tensor itself, by the calls that the model made."""
        if self.value is None:
            with torch._C.DisableTorchFunction():
                self.value = self.thunk()
            if self.mode.watch is not None:
                self.mode.watch.computed(self.value)
        return self.value

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _first_deferred(args, kwargs).apply(function, function.__name__, args, kwargs)

    def apply(self, function, name: str, args, kwargs):
        """``function(*args, **kwargs)`` with this operand among the arguments."""
        if function in _PRODUCTS:
            found = _product(self.mode, function, args, kwargs)
            return self.otherwise(function, name, args, kwargs) if found is None else found
        handler = getattr(self, f"_on_{_PLAIN.get(name, name)}", None)
        found = None if handler is None else handler(function, args, kwargs)
        if found is None:
            return self.otherwise(function, name, args, kwargs)
        if name.endswith("_") and not name.endswith("__") and args[0] is self:
            self.__dict__ = found.__dict__  # in place
            return self
        return found

    def otherwise(self, function, name, args, kwargs):
        args = computed(args)
        out = function(*args, **{key: computed(value) for key, value in kwargs.items()})
        if self.mode.watch is not None:
            self.mode.watch.note(name, args, out)
        return out

    def __getattr__(self, name: str):
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if not callable(attribute):
            return getattr(self.compute(), name)
        return lambda *args, **kwargs: self.apply(attribute, name, (self, *args), kwargs)

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index):
        return self.apply(Tensor.__getitem__, "__getitem__", (self, index), {})

    def __len__(self) -> int:
        return self.shape[0]


# Names of one operation: functions, methods, operators and their in-place forms.
_PLAIN = {
    name: plain
    for plain, names in {
        "add": "add add_ __add__ __radd__ __iadd__",
        "sub": "sub sub_ subtract __sub__ __isub__",
        "mul": "mul mul_ multiply __mul__ __rmul__ __imul__",
        "div": "div div_ divide true_divide __truediv__ __itruediv__",
        "masked_fill": "masked_fill masked_fill_",
        "cast": "to float double half bfloat16 type type_as",
        "reshape": "view reshape",
        "same": "contiguous clone",
        "softmax": "softmax _softmax",
        "dropout": "dropout dropout_",
    }.items()
    for name in names.split()
}


def _operator(name: str):
    return lambda self, other: self.apply(getattr(Tensor, name), name, (self, other), {})


for (
    _name
) in "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __matmul__ __pow__ __gt__ __lt__ __ge__".split():
    setattr(Deferred, _name, _operator(_name))


class Scores(Deferred):
    """``query @ key^T`` and the recorded operations on it.

    The value is ``softcap * tanh(scale * query key^T / softcap) + biases``, minus infinity where hidden; without the
    product if ``key`` was dropped, since the biases then are the scores.
    """

    def __init__(self, mode: Deferring, thunk, query: Tensor, key: Tensor):
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        super().__init__(mode, thunk, (*lead, query.shape[-2], key.shape[-2]), query.dtype, query.device)
        self.query, self.key, self.keys, self.raw_lead = query, key, key.shape[-2], lead
        self.note = None if mode.watch is None else mode.watch.at_product(key)
        self.scale, self.softcap, self.causal, self.attended = 1.0, None, False, False
        self.sinks: tuple[Tensor, tuple[int, ...]] | None = None  # one more column of the softmax, without a value
        self.biases: list[tuple[Tensor, tuple[int, ...]]] = []  # each with the leading sizes it was added under
        self.hidden: list[tuple[Tensor, tuple[int, ...]]] = []

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.shape[:-2])

    def _then(self, function, args, kwargs, **changes) -> Scores:
        """A copy that records the operation from which it results."""
        before = self.__dict__.copy()
        found = object.__new__(Scores)
        found.__dict__.update(before)
        origin = object.__new__(Scores)
        origin.__dict__ = before
        given = [origin if operand is self else operand for operand in args]
        found.value = None
        found.thunk = lambda: function(*computed(given), **kwargs)
        found.__dict__.update(changes)
        return found

    def _is_column(self, operand) -> bool:
        """A number, or a tensor that is the same for every key."""
        return not isinstance(operand, Tensor) or operand.ndim == 0 or operand.shape[-1] == 1 != self.shape[-1]

    def _on_add(self, function, args, kwargs):
        return self._add(function, args, kwargs, 1)

    def _on_sub(self, function, args, kwargs):
        return self._add(function, args, kwargs, -1) if args[0] is self else None

    def _add(self, function, args, kwargs, sign: int):
        other = args[1] if args[0] is self else args[0]
        if isinstance(other, Scores) and args[0] is not self:
            return None
        other = computed(other)
        if isinstance(other, (int, float)) and not kwargs:
            if other == 0:
                return self._then(function, args, kwargs)
            other = self.query.new_full((), other)
        if not isinstance(other, Tensor) or kwargs:
            return None
        if torch.broadcast_shapes(other.shape, self.shape) != self.shape:
            return None
        if other.ndim and other.shape[-1] == 1 != self.shape[-1]:
            return self._then(function, args, kwargs)  # a softmax is invariant to a constant per row
        if not other.is_floating_point() or self.sinks is not None:
            return None
        return self._then(function, args, kwargs, biases=[*self.biases, (other if sign > 0 else -other, self.lead)])

    def _on_mul(self, function, args, kwargs):
        other = args[1] if args[0] is self else args[0]
        if isinstance(other, Deferred):
            return None
        return self._scaled(function, args, kwargs, other)

    def _on_div(self, function, args, kwargs):
        if args[0] is not self or isinstance(args[1], Deferred):
            return None
        other = args[1]
        if kwargs:
            return None
        return self._scaled(function, args, kwargs, 1 / other)

    def _scaled(self, function, args, kwargs, factor):
        if not isinstance(factor, Tensor):
            factor = float(factor)
        elif factor.ndim and not (factor.shape[-1] == 1 and factor.ndim <= self.ndim):
            return self._explicit(function, args, kwargs)
        if self.softcap is not None and isinstance(factor, Tensor):
            return self._explicit(function, args, kwargs)
        if isinstance(factor, Tensor) and (self.lead != tuple(self.query.shape[:-2])):
            return self._explicit(function, args, kwargs)
        changes = {"biases": [(bias * factor, lead) for bias, lead in self.biases]}
        if isinstance(factor, Tensor):
            changes["query"] = self.query * factor.to(self.query.dtype)
        elif self.softcap is None:
            changes["scale"] = self.scale * factor
        else:
            changes.update(softcap=self.softcap * factor, scale=self.scale * factor)
        return self._then(function, args, kwargs, **changes)

    def _on_tanh(self, function, args, kwargs):
        if self.biases or self.hidden or self.softcap is not None or self.key is None:
            return None
        return self._then(function, args, kwargs, softcap=1.0)

    def _on_masked_fill(self, function, args, kwargs):
        mask = args[1] if len(args) > 1 else kwargs["mask"]
        value = args[2] if len(args) > 2 else kwargs["value"]
        if args[0] is not self:
            return None
        if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu":
            value = float(value)
        if isinstance(value, Tensor) or value > HIDDEN:
            return self._explicit(function, args, kwargs)
        return self._then(function, args, kwargs, hidden=[*self.hidden, (mask, self.lead)])

    def _on_where(self, function, args, kwargs):
        if len(args) == 3 and (args[1] is self or args[2] is self):
            return self._explicit(function, args, kwargs)
        return None

    def _on_max(self, function, args, kwargs):
        other = args[1] if len(args) > 1 else kwargs.get("other")
        return self._explicit(function, args, kwargs) if isinstance(other, Tensor) else None

    _on_maximum = _on_max

    def _on_clamp(self, function, args, kwargs):
        return self._explicit(function, args, kwargs)

    def _explicit(self, function, args, kwargs):
        """Replace the product by the computed scores; the prefix still needs the query."""
        found = self._then(function, args, kwargs, key=None, hidden=[])
        value = found.compute()
        if value.shape != self.shape:
            return value
        found.biases = [(value, self.lead)]
        return found

    def _on_cast(self, function, args, kwargs):
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        with torch._C.DisableTorchFunction():
            probe = function(probe, *computed(args[1:]), **kwargs)
        if isinstance(probe, str) or probe.device != self.device:
            return None
        return self._then(function, args, kwargs, dtype=probe.dtype)

    def _on_same(self, function, args, kwargs):
        return self._then(function, args, kwargs)

    def _on_reshape(self, function, args, kwargs):
        shape = args[1:] if not isinstance(args[1], (tuple, list, torch.Size)) else tuple(args[1])
        if kwargs or any(isinstance(size, torch.dtype) for size in shape):
            return None
        shape = _whole_shape(shape, math.prod(self.shape))
        if len(shape) < 3 or tuple(shape[-2:]) != tuple(self.shape[-2:]):
            return None
        return self._then(function, args, kwargs, shape=torch.Size(shape))

    def _on_cat(self, function, args, kwargs):
        """A sink: one more column, which has no value."""
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        sink = args[0][1] if len(args[0]) == 2 and args[0][0] is self else None
        if not isinstance(sink, Tensor) or dim not in (-1, self.ndim - 1) or self.sinks is not None:
            return None
        if tuple(sink.shape) != (*self.shape[:-1], 1):
            return None
        shape = torch.Size((*self.shape[:-1], self.shape[-1] + 1))
        return self._then(function, args, kwargs, sinks=(sink, self.lead), shape=shape)

    def _on_softmax(self, function, args, kwargs):
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim not in (-1, self.ndim - 1):
            return None
        dtype = kwargs.get("dtype") or self.dtype
        return Probabilities(self, dtype)


def _whole_shape(shape, count: int) -> tuple[int, ...]:
    known = math.prod(size for size in shape if size != -1)
    return tuple(count // known if size == -1 else size for size in shape)


class Probabilities(Deferred):
    """The softmax of `Scores`, followed by nothing but dropout, casts and views."""

    zeroed: tuple = ()
    has_sink = False

    def __init__(self, scores: Scores, dtype: torch.dtype | None):
        super().__init__(scores.mode, self._refuse, scores.shape, dtype or scores.dtype, scores.device)
        self.scores, self.dropout_p, self.has_sink = scores, 0.0, scores.sinks is not None

    def _refuse(self):
        raise PatchError("its attention probabilities are used otherwise than in a product with the value")

    def otherwise(self, function, name, args, kwargs):
        if self.scores.attended:
            return self  # on their way to the module's outputs, as attention weights
        raise PatchError(f"its attention probabilities go through {name}, which the prefix cannot follow")

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.shape[:-2])

    def _then(self, function, args, kwargs, **changes) -> Probabilities:
        found = object.__new__(Probabilities)
        found.__dict__.update(self.__dict__, **changes)
        return found

    def weigh(self, value: Tensor) -> Tensor:
        """``probabilities @ value``: the attention itself."""
        if self.has_sink:
            self._refuse()
        self.scores.attended = True
        out = self.mode.attend(self, value)
        return out if out.dtype == value.dtype else out.to(value.dtype)

    def _on_dropout(self, function, args, kwargs):
        probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        training = args[2] if len(args) > 2 else kwargs.get("training", True)
        if not training or not probability:
            return self
        return self._then(function, args, kwargs, dropout_p=1 - (1 - self.dropout_p) * (1 - probability))

    def _on___getitem__(self, function, args, kwargs):
        if not self.has_sink or args[1] != (..., slice(None, -1)):
            return None
        shape = torch.Size((*self.shape[:-1], self.shape[-1] - 1))
        return self._then(function, args, kwargs, shape=shape, has_sink=False)

    def _on_masked_fill(self, function, args, kwargs):
        """Zeros where the scores were hidden already: some models set them a second time."""
        mask = args[1] if len(args) > 1 else kwargs["mask"]
        if (args[2] if len(args) > 2 else kwargs["value"]) != 0 or args[0] is not self:
            return None
        return self._then(function, args, kwargs, zeroed=[*self.zeroed, (mask, self.lead)])

    _on_cast = Scores._on_cast
    _on_reshape = Scores._on_reshape

    def _on_same(self, function, args, kwargs):
        return self
