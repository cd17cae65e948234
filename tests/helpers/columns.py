"""An oracle for any model: the model's own eager code, with the prefix's columns computed beside its scores.

While a module with prefix parameters runs, every product with its query is also computed with the prefix's keys. The
model's operations on the scores (scaling, soft-cap, casts, views) are applied to these columns, those for tokens alone
(biases and masks) are not; the columns are part of the softmax and weight the prefix's values. It shares nothing with
the patch: no op, no `Mask`, no recording; everything is materialised.
"""

from __future__ import annotations

import copy
import inspect
import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from helpers import oracle

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "__matmul__"}
_SCALE = {"mul", "multiply", "div", "divide", "true_divide", "truediv", "imul", "itruediv", "rmul"}
_SHIFT = {"add", "sub", "subtract", "iadd", "isub", "radd"}
_TOKENS_ONLY = {"masked_fill", "where", "max", "maximum", "clamp", "cat", "getitem", "setitem"}
_MOVED = {"transpose", "permute", "view", "reshape", "unsqueeze", "squeeze", "expand", "swapaxes"}
_COPIED = {"to", "float", "double", "type_as", "clone", "contiguous", "dropout", "type", "nan_to_num"}


class _Site:
    """One running attention module: its parameters and the gate of its current input."""

    def __init__(self, module, hidden: Tensor):
        self.params, self.module, self.hidden = module.oracle_params, module, hidden
        self.key, self.value = self.params["key"], self.params["value"]

    def rows(self, tensor: Tensor) -> int:
        """The batch of a tensor ``[*lead, T, .]``, given the product of batch and heads."""
        queries = tensor.shape[-2]
        if self.hidden is None or self.hidden.ndim != 3:
            return tensor.shape[0] if tensor.ndim == 4 else tensor[..., 0, 0].numel() // self.params["heads"]
        time_major = self.hidden.shape[0] == queries and self.hidden.shape[1] != queries
        return self.hidden.shape[1 if time_major else 0]

    def gate(self, queries: int, batch: int) -> Tensor:
        """``[B | 1, 1, T | 1, M]``."""
        module, hidden, real = self.module, self.hidden, self.module.oracle_real
        if self.params["gate"] in ("none", "static"):
            gate = oracle._gate(module, self.params, queries)
            return gate.expand(self.key.shape[1]).view(1, 1, 1, -1)
        if hidden.ndim == 3 and hidden.shape[:2] == (queries, batch) and queries != batch:
            hidden = hidden.transpose(0, 1)
        module.oracle_hidden = hidden.reshape(batch, queries, -1)
        if real is not None and real.shape != (batch, queries):
            module.oracle_real = None
        try:
            return oracle._gate(module, self.params, queries)
        finally:
            module.oracle_real = real


class Columns(TorchFunctionMode):
    """Computes the prefix's columns beside the scores of the attention modules that have parameters."""

    def __init__(self, from_end: bool = False):
        super().__init__()
        self.from_end = from_end
        self.sites: list[_Site] = []
        self.carried: dict[int, tuple[Tensor, Tensor, bool]] = {}  # id -> (tensor kept alive, columns, after softmax)
        self.factors: dict[int, tuple[Tensor, float]] = {}  # keys that are a multiple of another tensor: the factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.sites and (isinstance(out, Tensor) or func.__name__ == "multi_head_attention_forward"):
            changed = self._follow(func.__name__.strip("_"), args, kwargs, out)
            out = out if changed is None else changed
        return out

    def _stock(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        site, group = self.sites[-1], query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.repeat_interleave(group, dim=1).mT * scale
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        gate = site.gate(query.shape[2], query.shape[0])
        prefix_key, prefix_value = (
            p.repeat_interleave(query.shape[1] // len(p), dim=0) for p in (site.key, site.value)
        )
        columns = query @ prefix_key.mT * scale * gate
        joined = torch.cat([columns, scores], dim=-1).softmax(-1)
        length = columns.shape[-1]
        return (joined[..., :length] * gate) @ prefix_value + joined[..., length:] @ value.repeat_interleave(
            group, dim=1
        )

    def _whole(self, query, key, value, width, heads, *_, **given):
        """``multi_head_attention_forward`` of equal widths, time-major, written out."""
        names = list(inspect.signature(torch.nn.functional.multi_head_attention_forward).parameters)[5:]
        given = {**dict(zip(names, _)), **given}
        queries, batch = query.shape[:2]
        if given.get("use_separate_proj_weight"):
            weights = [given[f"{part}_proj_weight"] for part in "qkv"]
        else:
            weights = given["in_proj_weight"].chunk(3)
        biases = given["in_proj_bias"].chunk(3)
        projected = [x @ w.T + b for x, w, b in zip((query, key, value), weights, biases)]
        query, key, value = (x.view(len(x), batch, heads, -1).permute(1, 2, 0, 3) for x in projected)
        mask = given.get("attn_mask")
        mask = mask if mask is None or mask.ndim == 2 else mask.view(batch, heads, queries, -1)
        if given.get("key_padding_mask") is not None:
            hidden = given["key_padding_mask"][:, None, None].to(query.dtype) * -1e300
            mask = hidden if mask is None else mask + hidden
        out = self._stock(query, key, value, mask).permute(2, 0, 1, 3).reshape(queries, batch, width)
        return out @ given["out_proj_weight"].T + given["out_proj_bias"], None

    def _of(self, tensor):
        found = self.carried.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return None if found is None else found[1:]

    def _factor(self, tensor) -> float:
        return self.factors.get(id(tensor), (None, 1.0))[1]

    def _follow(self, name: str, args, kwargs, out: Tensor) -> Tensor | None:
        if name in _PRODUCTS:
            return self._product(name, args, kwargs, out)
        if name == "scaled_dot_product_attention":
            return self._stock(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return self._whole(*args, **kwargs)
        operands = [*(args[0] if name == "cat" else args), *kwargs.values()]
        scores = next((x for x in operands if self._of(x) is not None), None)
        if scores is None:
            return self._note_factor(name, args, out)
        columns, after = self._of(scores)
        if name == "softmax":
            joined = torch.cat([columns.to(scores.dtype), scores], dim=-1).softmax(-1, dtype=kwargs.get("dtype"))
            length = columns.shape[-1]
            tokens = joined[..., length:].clone()
            self.carried[id(tokens)] = (tokens, joined[..., :length], True)
            return tokens
        if name == "logsumexp" and (args[1:] or tuple(kwargs.values())) in ((-1,), (3,)):
            return torch.cat([columns, scores], dim=-1).logsumexp(-1)
        others = [x for x in operands if isinstance(x, Tensor) and x is not scores]
        of_tokens = any(x.ndim and x.shape[-1] != 1 for x in others)
        if name in _MOVED:
            columns = self._moved(name, args, kwargs, scores, out, columns)
        elif name == "tanh":
            columns = columns.tanh()
        elif name in _SCALE | _SHIFT and not of_tokens:
            operation = {"m": torch.mul, "d": torch.div, "t": torch.div, "a": torch.add, "s": torch.sub}
            kind = name.lstrip("ir") if name not in ("divide",) else name
            columns = operation[kind[0]](*[columns if x is scores else x for x in args])
        elif self.from_end and name == "add" and others[0].shape[-2:-1] == (1,):
            columns = columns + others[0].mT  # distances are relative to the token's own position
        elif name in _COPIED:
            columns = columns.to(out.dtype)
        elif name not in _SCALE | _SHIFT | _TOKENS_ONLY:
            return None
        if out.ndim and columns.shape[:-1] == out.shape[:-1]:
            self.carried[id(out)] = (out, columns, after)
        return None

    def _note_factor(self, name: str, args, out: Tensor) -> None:
        source = args[0] if args else None
        if not isinstance(source, Tensor):
            return
        factor = self._factor(source)
        if name in _SCALE and not (isinstance(args[1], Tensor) and args[1].ndim):
            factor = factor * float(args[1]) if "mul" in name else factor / float(args[1])
        elif name not in _MOVED | _COPIED:
            return
        if factor != 1:
            self.factors[id(out)] = (out, factor)

    def _moved(self, name: str, args, kwargs, scores: Tensor, out: Tensor, columns: Tensor) -> Tensor:
        if name not in ("view", "reshape", "expand"):
            return getattr(columns, name)(*args[1:], **kwargs)
        if out.shape[-1] != scores.shape[-1]:
            return columns
        shape = (*out.shape[:-1], columns.shape[-1])
        return columns.expand(shape) if name == "expand" else columns.reshape(shape)

    def _product(self, name: str, args, kwargs, out: Tensor) -> Tensor | None:
        site = self.sites[-1]
        if name == "einsum":
            return self._einsum(site, args, out)
        if name == "baddbmm":
            left, right = (kwargs["batch1"], kwargs["batch2"]) if "batch1" in kwargs else args[-2:]
        else:
            left, right = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
        probabilities = self._of(left)
        if probabilities is not None and probabilities[1]:
            columns = self._apart(site, probabilities[0])
            gate = site.gate(columns.shape[2], columns.shape[0])
            value = site.value.repeat_interleave(columns.shape[1] // site.value.shape[0], dim=0)
            return out + ((columns * gate) @ value).reshape(out.shape).to(out.dtype)
        if left.ndim < 3 or left.shape[-1] != site.key.shape[-1] or right.shape[-2] != left.shape[-1]:
            return None
        if out.shape[:-2] != left.shape[:-2]:
            left = left.expand(*out.shape[:-2], *left.shape[-2:])
        if left[..., 0, 0].numel() % site.rows(left):
            return None
        query = self._apart(site, left)
        if query.shape[1] % site.key.shape[0]:
            return None
        key = site.key.repeat_interleave(query.shape[1] // site.key.shape[0], dim=0) * self._factor(right)
        columns = query @ key.mT * kwargs.get("alpha", 1)
        try:
            columns = columns * site.gate(query.shape[2], query.shape[0])
        except RuntimeError:
            return None  # not of this module's queries
        self.carried[id(out)] = (out, columns.reshape(*out.shape[:-1], -1), False)
        return None

    def _apart(self, site: _Site, tensor: Tensor) -> Tensor:
        """``[B, H, T, .]`` from any leading sizes."""
        return tensor.reshape(site.rows(tensor), -1, *tensor.shape[-2:])

    def _einsum(self, site: _Site, args, out: Tensor) -> Tensor | None:
        """Only equations that name every size; the prefix's operand has no batch."""
        equation, operands = args[0].replace(" ", ""), args[1:]
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = operands[0]
        if len(operands) != 2 or "." in equation:
            return None
        (left, right), result = equation.split("->")[0].split(","), equation.split("->")[1]
        sizes = dict(zip(left + right, (*operands[0].shape, *operands[1].shape)))
        shared = [c for c in left if c in right and c in result]
        summed = [c for c in left if c in right and c not in result]
        if len(shared) < 2 or len(summed) != 1:
            return None
        (*batches, head), (summed,) = shared, summed
        query = next(c for c in left if c not in right)
        # With more sizes than batch and heads, only gates that are equal for every query are supported.
        order = {batches[0]: 0, head: 1, query: 2} if len(batches) == 1 else None
        probabilities = self._of(operands[0])
        if probabilities is not None and probabilities[1]:
            gate = self._in_order(site, sizes, batches[0], query, left, order)
            last = next(c for c in right if c not in left)
            value = site.value.repeat_interleave(sizes[head] // site.value.shape[0], dim=0)
            return out + torch.einsum(f"{left},{head}{summed}{last}->{result}", probabilities[0] * gate, value)
        if sizes[summed] != site.key.shape[-1] or sizes[head] % site.key.shape[0]:
            return None
        last = next(c for c in right if c not in left)
        if result[-1] != last:
            return None
        key = site.key.repeat_interleave(sizes[head] // site.key.shape[0], dim=0) * self._factor(operands[1])
        columns = torch.einsum(f"{left},{head}{last}{summed}->{result}", operands[0], key)
        gate = self._in_order(site, sizes, batches[0], query, result, order)
        self.carried[id(out)] = (out, columns * gate, False)
        return None

    def _in_order(self, site: _Site, sizes: dict, batch: str, query: str, letters: str, order) -> Tensor:
        gate = site.gate(sizes[query], sizes[batch])
        return gate[0, 0, 0] if order is None else gate.permute([order.get(c, 3) for c in letters])


def _masked_softmax(scores, mask, dim):
    return scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min).softmax(dim)


def _enter(mode: Columns):
    def hook(module, args, kwargs):
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        mode.sites.append(_Site(module, hidden))

    return hook


def _leave(mode: Columns):
    def hook(module, args, output):
        mode.sites.pop()

    return hook


def build(model, prefixes, real=lambda name: None, from_end: bool = False, attention: str = "eager"):
    """``model`` (unpatched, copied) attending by the oracle with copies of ``prefixes``; params by name; a context.

    As `oracle.build`, but the copy must be run inside ``with context():``. ``from_end``: biases count positions from
    the last key; those of the prefix's columns are zero where the token's own is. ``attention``: "eager" or "sdpa".
    """
    copied = copy.deepcopy(model)
    mode, params = Columns(from_end), {}
    for module in copied.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = attention
    for name, module in copied.named_modules():
        if name not in prefixes:
            continue
        prefix, own = prefixes[name], {}
        for field in ("key", "value", "gate_weight", "gate_logits", "layer_scale"):
            tensor = getattr(prefix, field)
            own[field] = None if tensor is None else tensor.detach().clone().requires_grad_()
            if tensor is not None:
                params[f"{name}.apt.{field}"] = own[field]
        own["gate"], own["heads"] = prefix.gate, prefix.key.shape[0]
        module.oracle_params, module.oracle_real = own, real(name)
        module.register_forward_pre_hook(_enter(mode), with_kwargs=True)
        module.register_forward_hook(_leave(mode))

    source = sys.modules[type(model).__module__]

    @contextmanager
    def context():
        with ExitStack() as stack:
            if hasattr(source, "XSoftmax"):  # its backward is written by hand, which the mode cannot trace
                stack.enter_context(mock.patch.object(source.XSoftmax, "apply", _masked_softmax))
            stack.enter_context(mode)
            yield
        mode.carried.clear()
        mode.factors.clear()

    return copied, params, context
