"""Which modules of a model attend, and with what shapes: asked of the model itself in one short forward pass."""

from __future__ import annotations

import inspect
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ..errors import PatchError
from . import inline, inputs, route
from .deferred import Deferring
from .masks import AttentionMask, describe, trust_tracing_only_where_it_agrees

RECORDER = "apt_kernels_record"


@dataclass(frozen=True)
class Site:
    """One attention module: where it stands, its shapes, and what its queries may see."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    hidden_size: int | None  # of the hidden states that a gate can read; None: the module is handed none
    cross: bool
    causal: bool
    device: torch.device
    inline: inline.Inline | None = None  # None: it attends through transformers' attention interface
    mesh: object | None = None  # of a module that tensor parallelism spreads over processes
    sharded: bool = False  # every process attends with a part of the heads; `heads` and `kv_heads` count them all

    @property
    def kind(self) -> str:
        return "cross-attention" if self.cross else "causal self-attention" if self.causal else "self-attention"


_HEADS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")
_PREFIX_SHAPE = ("kv_heads", "head_dim", "value_head_dim")


class _Recorder:
    """Takes the place of the attention function for one pass."""

    def __init__(self, model):
        self.calls: dict[nn.Module, dict] = {}
        self.inputs: dict[nn.Module, Tensor] = {}
        self.running: list[nn.Module] = []
        self.results: list[tuple[nn.Module, Tensor]] = []
        self.watch = inline.Watch(lambda: tuple(self.running))
        self.handles = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        for module, result in self.results:
            if result._version:
                self.calls[module]["inline"] = self.calls[module]["inline"]._replace(changed=True)

    def enter(self, module, args, kwargs):
        self.running.append(module)
        tensor = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            self.inputs[module] = tensor

    def leave(self, module, args, output):
        if self.running and self.running[-1] is module:
            self.running.pop()

    def attend(self, module, query, key, value, attention_mask, is_causal=None, **kwargs):
        unknown = _unknown_tensors(module, kwargs)
        if unknown:
            raise PatchError(f"attention takes {unknown[0]!r}, which is not known")
        batch, heads, queries, head_dim = query.shape
        if isinstance(attention_mask, AttentionMask):
            if attention_mask.shape[3] != key.shape[2] and not attention_mask.hides_nothing:
                raise PatchError(f"a mask for {attention_mask.shape[3]} keys meets {key.shape[2]}")
            causal = attention_mask.mask.causal
            if attention_mask.mask.dense is not None:
                causal = _hides_the_future(attention_mask.mask.dense)
        elif isinstance(attention_mask, Tensor):
            causal = _hides_the_future(attention_mask == 0 if attention_mask.is_floating_point() else attention_mask)
        else:
            causal = bool(is_causal if is_causal is not None else route.causal_without_mask(module))
        found = {
            "heads": heads,
            "kv_heads": key.shape[1],
            "head_dim": head_dim,
            "value_head_dim": value.shape[3],
            "hidden_size": self.hidden_size(module, batch, queries),
            "cross": queries != key.shape[2],
            "causal": causal,
            "device": query.device,
        }
        self.note(module, found)
        return query.new_zeros(batch, queries, heads, value.shape[3]), None

    def attend_inline(self, probabilities, value):
        """The same of an attention that was computed inline: it belongs to the innermost module around it."""
        scores = probabilities.scores
        factor, there = scores.note
        module = [a for a, b in zip(there, self.running) if a is b][-1]
        declared = [getattr(module, n) for n in _HEADS if isinstance(getattr(module, n, None), int)]
        if len(scores.raw_lead) > 2 and declared and scores.raw_lead[-1] not in declared:
            raise PatchError(f"its scores have leading sizes {list(scores.raw_lead)}, of which the last are not heads")
        hidden_states, queries = self.inputs.get(module), scores.query.shape[-2]
        time_major = (
            hidden_states is not None
            and hidden_states.ndim == 3
            and hidden_states.shape[0] == queries != hidden_states.shape[1]
        )
        batch = inline.rows_of(scores, hidden_states, time_major)
        laid = inline.lay_out(probabilities, value, batch)
        seen = laid.seen()
        if any(bool((part.to(torch.bool) & seen).any()) for part in inline.zeroed(probabilities, batch)):
            raise PatchError("its attention probabilities are set to zero where the scores were not hidden")
        found = {
            "heads": laid.query.shape[1],
            "kv_heads": laid.key.shape[1],
            "head_dim": laid.query.shape[3],
            "value_head_dim": laid.value.shape[3],
            "hidden_size": self.hidden_size(module, batch, queries, time_major),
            "cross": queries != laid.key.shape[2],
            "causal": queries > 1 and _hides_the_future(seen),
            "device": laid.query.device,
            "inline": inline.Inline(time_major, factor, from_end=laid.counts_from_end()),
        }
        self.note(module, found)
        self.results.append((module, laid.query.new_zeros(*probabilities.lead, queries, laid.value.shape[3])))
        return self.results[-1][1]

    def note(self, module, found: dict) -> None:
        """A module may attend more than once in a forward, with one prefix."""
        before = self.calls.setdefault(module, found)
        if any(before[name] != found[name] for name in _PREFIX_SHAPE):
            raise PatchError("it attends more than once in one module, with keys and values of different shapes")
        before["causal"] &= found["causal"]
        before["cross"] |= found["cross"]
        if before["hidden_size"] != found["hidden_size"]:
            before["hidden_size"] = None

    def drop_where_unlike(self, other: _Recorder) -> None:
        """Forget what attends over something else than tokens: its heads or their size follow the input's length."""
        for module, call in list(self.calls.items()):
            again = other.calls.get(module)
            if "inline" in call and (again is None or any(again[name] != call[name] for name in _PREFIX_SHAPE)):
                del self.calls[module]

    def hidden_size(self, module, batch: int, queries: int, time_major: bool = False) -> int | None:
        """Width of the module's input, if it has one row for every query."""
        hidden_states = self.inputs.get(module)
        if hidden_states is None or hidden_states.ndim not in (2, 3):
            return None
        rows = tuple(hidden_states.shape[:-1])
        fits = rows == ((queries, batch) if time_major else (batch, queries)) or rows == (batch * queries,)
        return hidden_states.shape[-1] if fits else None


def _unknown_tensors(module, given: dict) -> list[str]:
    """Tensors among the keywords of the attention interface that the model's eager attention reads and we do not."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    read = () if eager is None else inspect.signature(eager).parameters
    tensors = [name for name, value in given.items() if isinstance(value, Tensor) and name in read]
    return [name for name in tensors if name not in inspect.signature(route.attention_forward).parameters]


def _hides_the_future(seen: Tensor) -> bool:
    return not bool(seen.expand(*seen.shape[:-2], *seen.shape[-2:]).triu(1).any())


_active: list[_Recorder] = []


def _attend(module, query, key, value, attention_mask, **kwargs):
    return _active[-1].attend(module, query, key, value, attention_mask, **kwargs)


def _describe(*args, mask_function=causal_mask_function, config=None, **kwargs):
    trust_tracing_only_where_it_agrees(mask_function, config, kwargs)
    return describe(*args, mask_function=mask_function, config=config, **kwargs)


AttentionInterface.register(RECORDER, _attend)
AttentionMaskInterface.register(RECORDER, _describe)


def record(model, set_implementation, example_inputs: dict | None = None) -> tuple[list[Site], bool]:
    """Every attention module of ``model`` in module order, and whether the model takes masks as descriptions; if not,
    it needs those of eager attention. The model is left as it was.

    ``set_implementation(name)`` switches the model's attention; ``example_inputs`` are keyword arguments of the
    model's forward, for models that do not take token ids alone.
    """
    name, first, again, recorder = type(model).__name__, None, None, None
    with evaluating(model), torch.no_grad():
        for tried, (body, given) in enumerate(_tries(model, example_inputs)):  # noqa: B007 - used after the loop
            described, again = True, None
            recorder, failure = _pass(model, body, given, lambda: set_implementation(RECORDER))
            if failure is None and recorder.calls:
                break
            # Models that compute attention inline may need the masks of eager attention.
            second, again = _pass(model, body, given, lambda: set_implementation("eager"))
            if again is None and set(recorder.calls) <= set(second.calls):
                recorder, failure, described = second, None, False
                break
            first = first or (failure, again)
        else:
            said = "" if first is None else ": " + "; with eager masks: ".join(map(_said, first))
            raise PatchError(
                f"{name}: the recording pass failed{said}. "
                "Give patch(model, example_inputs={...}), the keyword arguments of one small forward"
            ) from first and first[0]
        if not example_inputs and any("inline" in call for call in recorder.calls.values()):
            body, longer = list(_tries(model, None, 1))[tried]
            other, _ = _pass(model, body, longer, lambda: set_implementation(RECORDER if described else "eager"))
            recorder.drop_where_unlike(other)
    if not recorder.calls:
        raise PatchError(
            f"{name} has no attention that can be patched: neither through transformers' attention interface nor as a "
            "softmax over a product of queries and keys, weighing values"
        )
    calls = recorder.calls
    if recorder.watch.lost:
        where = next(n for n, module in model.named_modules() if module is recorder.watch.lost[0][-1])
        raise PatchError(f"{name} cannot be patched: {where} attends in a way that cannot be followed")
    return [Site(name=name, **calls[module]) for name, module in model.named_modules() if module in calls], described


def _said(error: Exception | None) -> str:
    return "there is no attention" if error is None else f"{type(error).__name__}: {error}"


def _pass(model, body, given: dict, prepare) -> tuple[_Recorder, Exception | None]:
    """One recorded forward, and the error that ended it."""
    recorder = _Recorder(model)
    _active.append(recorder)
    try:
        prepare()
        with Deferring(recorder.attend_inline, recorder.watch):
            body(**given)
    except Exception as error:
        return recorder, error
    finally:
        _active.pop()
        recorder.close()
    return recorder, None


def _tries(model, example_inputs: dict | None, more: int = 0):
    """What to call with what, until one works: the model without its head, then the whole."""
    if example_inputs:
        yield model, example_inputs
        return
    for part in dict.fromkeys((_body(model), model)):
        for given in inputs.candidates(part, more):
            yield part, given


def _body(model):
    """The model without its head: heads may ask for inputs of their own."""
    return getattr(model, "base_model", model)


@contextmanager
def evaluating(model):
    """Evaluation mode for a while, so that no random number is drawn and no layer is dropped."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
