"""The attention modules of a model and their shapes, recorded in one short forward pass of the model itself."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ...errors import PatchError
from .. import compat
from ..attention import function, inline
from ..attention.lazy_scores import Deferring
from ..attention.masks import AttentionMask, describe, trust_tracing_only_where_it_agrees
from ..site import Inline, Site
from ..state import own_name
from . import dummy_inputs

RECORDER = "apt_kernels_record"


_HEADS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")
_PREFIX_SHAPE = ("kv_heads", "head_dim", "value_head_dim")


class _Recorder:
    """Replaces the attention function during one pass."""

    def __init__(self):
        self.calls: dict[nn.Module, dict] = {}
        self.inputs: dict[nn.Module, Tensor] = {}
        self.running: list[nn.Module] = []
        self.ran: set[nn.Module] = set()
        self.results: list[tuple[nn.Module, Tensor]] = []
        self.watch = inline.Watch(lambda: tuple(self.running))
        self.handles = []

    def open(self, model) -> None:
        """Track which modules of ``model`` are running, until `close`."""
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
        self.ran.add(module)
        tensor = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            self.inputs[module] = tensor

    def leave(self, module, args, output):
        if self.running and self.running[-1] is module:
            self.running.pop()

    def attend(self, module, query, key, value, attention_mask, is_causal=None, **kwargs):
        unknown = _unknown_tensors(module, kwargs)
        if unknown:
            raise PatchError(f"attention is called with the unknown argument {unknown[0]!r}")
        batch, heads, queries, head_dim = query.shape
        if isinstance(attention_mask, AttentionMask):
            if attention_mask.shape[3] != key.shape[2] and not attention_mask.hides_nothing:
                raise PatchError(f"the mask is for {attention_mask.shape[3]} keys; the layer has {key.shape[2]}")
            causal = attention_mask.mask.causal
            if attention_mask.mask.dense is not None:
                causal = _hides_the_future(attention_mask.mask.dense)
        elif isinstance(attention_mask, Tensor):
            causal = _hides_the_future(attention_mask == 0 if attention_mask.is_floating_point() else attention_mask)
        else:
            causal = bool(is_causal if is_causal is not None else function.causal_without_mask(module))
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
        """Record an inline attention, which belongs to the innermost running module."""
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
            "inline": Inline(time_major, factor, from_end=laid.counts_from_end()),
        }
        self.note(module, found)
        self.results.append((module, laid.query.new_zeros(*probabilities.lead, queries, laid.value.shape[3])))
        return self.results[-1][1]

    def note(self, module, found: dict) -> None:
        """A module may attend more than once in a forward, with one prefix."""
        found["repeated"] = module in self.calls
        before = self.calls.setdefault(module, found)
        before["repeated"] |= found["repeated"]
        if any(before[name] != found[name] for name in _PREFIX_SHAPE):
            raise PatchError("it attends more than once in one module, with keys and values of different shapes")
        before["causal"] &= found["causal"]
        before["cross"] |= found["cross"]
        if before["hidden_size"] != found["hidden_size"]:
            before["hidden_size"] = None

    def drop_where_unlike(self, other: _Recorder) -> None:
        """Remove attention that is not over tokens: its heads or their size depend on the input's length."""
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
    """Tensor keywords of the attention interface that the model's eager attention uses and the op does not support."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    read = () if eager is None else inspect.signature(eager).parameters
    tensors = [name for name, value in given.items() if isinstance(value, Tensor) and name in read]
    return [name for name in tensors if name not in inspect.signature(function.attention_forward).parameters]


def _hides_the_future(seen: Tensor) -> bool:
    return not bool(seen.expand(*seen.shape[:-2], *seen.shape[-2:]).triu(1).any())


class _Running(threading.local):
    def __init__(self):
        self.recorder: _Recorder | None = None


_running = _Running()


def _attend(module, query, key, value, attention_mask, **kwargs):
    if _running.recorder is None:
        raise PatchError("another thread is patching the model; call it when patch has returned")
    return _running.recorder.attend(module, query, key, value, attention_mask, **kwargs)


def _describe(*args, mask_function=causal_mask_function, config=None, **kwargs):
    trust_tracing_only_where_it_agrees(mask_function, config, kwargs)
    return describe(*args, mask_function=mask_function, config=config, **kwargs)


AttentionInterface.register(RECORDER, _attend)
AttentionMaskInterface.register(RECORDER, _describe)


def record(model, set_implementation, example_inputs: dict | None = None) -> tuple[list[Site], dict[str, str]]:
    """Every attention module of ``model`` in module order, and the attention implementation to set for each part of the
    model, by the part's name (``""``, the whole, first). The model is not changed.

    Vision and audio parts that a pass over token ids does not run are recorded separately; one that cannot be recorded
    gets no prefix, with a warning. ``set_implementation(module, name)`` switches attention. With ``example_inputs``,
    keyword arguments of the model's forward, only what that forward runs is recorded.
    """
    with evaluating(model), torch.no_grad():
        recorder, implementation = _recorded(model, set_implementation, example_inputs)
        if not recorder.calls:
            raise PatchError(
                f"{type(model).__name__} has no attention that can be patched: neither through transformers' attention "
                "interface nor as a softmax over a product of queries and keys, weighing values"
            )
        found = [(model, recorder, implementation)]
        if not example_inputs:
            _extend(recorder, model, lambda: set_implementation(model, _recording(implementation)))
        for part in () if example_inputs else _not_run(model, recorder.ran):
            parts, error = _recorded_part(part, set_implementation)
            found += parts
            if error is not None:
                name = next(name for name, module in model.named_modules() if module is part)
                warnings.warn(f"{name} stays without a prefix. {error}", stacklevel=2)
    # After all passes, since some models replace a module depending on the length of the text.
    names = {module: own_name(name) for name, module in model.named_modules()}
    calls = {module: call for _, recorder, _ in found for module, call in recorder.calls.items()}
    senses = _senses(model)
    sites = [Site(names[module], **calls[module], senses=senses[module]) for module in names if module in calls]
    return sites, {names[part]: implementation for part, _, implementation in found}


def _extend(recorder: _Recorder, model, prepare) -> None:
    """Add the modules that run only for images or audio together with text."""
    for given in dummy_inputs.multimodal(model):
        other, failure = _pass(model, model, given, prepare)
        if failure is None and not other.watch.lost:
            # Modules that ran before without attention over tokens still have none.
            recorder.calls.update((m, call) for m, call in other.calls.items() if m not in recorder.ran)
            recorder.ran |= other.ran
            return


def _recording(implementation: str) -> str:
    """The implementation during recording, which decides the one after the patch."""
    return RECORDER if implementation == function.NAME else implementation


def _recorded_part(part, set_implementation) -> tuple[list[tuple], PatchError | None]:
    """The records of ``part``, or of the models inside it if it cannot run separately; if there are none, the error of
    ``part``, or None where it has no attention."""
    failure = None
    try:
        recorded = _recorded(part, set_implementation, None)
        if recorded[0].calls:
            return [(part, *recorded)], None
    except PatchError as error:
        failure = error
    inside = [_recorded_part(each, set_implementation)[0] for each in _not_run(part, set())]
    parts = [each for parts in inside for each in parts]
    return parts, None if parts else failure


def _not_run(model, ran: set[nn.Module]) -> Iterator[PreTrainedModel]:
    """The outermost models inside ``model`` with other inputs than text that are not among ``ran``."""
    for child in model.children():
        if isinstance(child, PreTrainedModel) and child not in ran and "text" not in _modalities(child):
            yield child
        else:
            yield from _not_run(child, ran)


def _modalities(model: PreTrainedModel) -> frozenset[str]:
    said = model.input_modalities
    return frozenset((said,) if isinstance(said, str) else said)


def _senses(model) -> dict[nn.Module, frozenset[str]]:
    """The input modalities of the innermost model that contains each module."""
    found: dict[nn.Module, frozenset[str]] = {}

    def visit(module, around):
        around = _modalities(module) if isinstance(module, PreTrainedModel) else around
        found.setdefault(module, around)
        for child in module.children():
            visit(child, around)

    visit(model, frozenset(("text",)))
    return found


def _recorded(model, set_implementation, example_inputs: dict | None) -> tuple[_Recorder, str]:
    """The successful pass, and the attention implementation of the patched model: ours if it accepts `AttentionMask`,
    "eager" if it computes attention inline and needs tensors as masks."""
    name, first, again, recorder = type(model).__name__, None, None, None
    for tried, (body, given) in enumerate(_tries(model, example_inputs)):  # noqa: B007 - used after the loop
        implementation, again = function.NAME, None
        recorder, failure = _pass(model, body, given, lambda: set_implementation(model, RECORDER))
        if failure is None and recorder.calls:
            break
        # Models with inline attention may need the masks of eager attention.
        second, again = _pass(model, body, given, lambda: set_implementation(model, "eager"))
        if again is None and set(recorder.calls) <= set(second.calls):
            recorder, failure, implementation = second, None, "eager"
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
        other, _ = _pass(model, body, longer, lambda: set_implementation(model, _recording(implementation)))
        recorder.drop_where_unlike(other)
    if recorder.calls and recorder.watch.lost:
        where = next(n for n, module in model.named_modules() if module is recorder.watch.lost[0][-1])
        raise PatchError(f"{name} cannot be patched: {where} attends in a way that apt_kernels does not support")
    return recorder, implementation


def _said(error: Exception | None) -> str:
    return "there is no attention" if error is None else f"{type(error).__name__}: {error}"


def _pass(model, body, given: dict, prepare) -> tuple[_Recorder, Exception | None]:
    """One recorded forward, and the error that ended it."""
    recorder, outer = _Recorder(), _running.recorder
    inline_too = compat.available("inline attention")
    deferring = Deferring(recorder.attend_inline, recorder.watch) if inline_too else nullcontext()
    try:
        recorder.open(model)
        _running.recorder = recorder
        prepare()
        with deferring:
            body(**given)
    except Exception as error:  # the model may raise any error for these inputs: others are tried, or it is reported
        return recorder, error
    finally:
        _running.recorder = outer
        recorder.close()
    return recorder, None


def _tries(model, example_inputs: dict | None, more: int = 0):
    """The models and inputs to try, until one works: the model without its head first, then the whole."""
    if example_inputs:
        yield model, example_inputs
        return
    for part in dict.fromkeys((_body(model), model)):
        for given in dummy_inputs.candidates(part, more):
            yield part, given


def _body(model):
    """The model without its head, since heads may need additional inputs."""
    return getattr(model, "base_model", model)


@contextmanager
def evaluating(model):
    """Evaluation mode within the context, so that no random number is drawn and no layer is dropped."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        # bitsandbytes' four-bit layers repack their weights in evaluation on a CPU, and have no gradient from then on.
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
