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
from .masks import AttentionMask, describe, trust_tracing_only_where_it_agrees

RECORDER = "apt_kernels_record"
# Different lengths on the two sides tell cross-attention from self-attention.
_QUERIES, _ENCODER_TOKENS = 3, 4


@dataclass(frozen=True)
class Site:
    """One attention module: where it stands, its shapes, and what its queries may see."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    hidden_size: int
    cross: bool
    causal: bool
    device: torch.device

    @property
    def kind(self) -> str:
        return "cross-attention" if self.cross else "causal self-attention" if self.causal else "self-attention"


_INLINE = (
    "{} has no attention that goes through transformers' attention interface (it attends inline, or not at all); "
    "it cannot be patched"
)


class _Recorder:
    """Takes the place of the attention function for one pass."""

    def __init__(self):
        self.calls: dict[nn.Module, dict] = {}
        self.inputs: dict[nn.Module, Tensor] = {}

    def note_input(self, module, args, kwargs):
        tensor = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            self.inputs[module] = tensor

    def attend(self, module, query, key, value, attention_mask, is_causal=None, **kwargs):
        batch, heads, queries, head_dim = query.shape
        if isinstance(attention_mask, AttentionMask):
            causal = attention_mask.mask.causal
            if attention_mask.mask.dense is not None:
                causal = _hides_the_future(attention_mask.mask.dense)
        elif isinstance(attention_mask, Tensor):
            causal = _hides_the_future(attention_mask == 0 if attention_mask.is_floating_point() else attention_mask)
        else:
            causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
        self.calls[module] = {
            "heads": heads,
            "kv_heads": key.shape[1],
            "head_dim": head_dim,
            "value_head_dim": value.shape[3],
            "cross": queries != key.shape[2],
            "causal": causal,
            "device": query.device,
        }
        return query.new_zeros(batch, queries, heads, value.shape[3]), None


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


def record(model, set_implementation, example_inputs: dict | None = None) -> list[Site]:
    """Every attention module of ``model`` in module order. The model is left as it was.

    ``set_implementation(name)`` switches the model's attention; ``example_inputs`` are keyword arguments of the
    model's forward, for models that do not take token ids alone.
    """
    recorder = _Recorder()
    handles = [
        module.register_forward_pre_hook(recorder.note_input, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, nn.ModuleList)
    ]
    _active.append(recorder)
    try:
        with _evaluating(model), torch.no_grad():
            set_implementation(RECORDER)
            body, inputs = (model, example_inputs) if example_inputs else (_body(model), _token_inputs(model))
            try:
                body(**inputs)
            except Exception as error:
                if not recorder.calls and not _uses_the_interface(model):
                    raise PatchError(_INLINE.format(type(model).__name__)) from error
                raise PatchError(
                    f"{type(model).__name__}: the recording pass failed ({type(error).__name__}: {error}). "
                    "Give patch(model, example_inputs={...}), the keyword arguments of one small forward"
                ) from error
    finally:
        _active.pop()
        for handle in handles:
            handle.remove()
    if not recorder.calls:
        raise PatchError(_INLINE.format(type(model).__name__))
    return [
        Site(name=name, hidden_size=recorder.inputs[module].shape[-1], **recorder.calls[module])
        for name, module in model.named_modules()
        if module in recorder.calls and module in recorder.inputs
    ]


def _uses_the_interface(model) -> bool:
    """Whether the model's source looks up its attention function in transformers' attention interface."""
    source = sys.modules[type(_body(model)).__module__]
    return hasattr(source, "ALL_ATTENTION_FUNCTIONS")


def _body(model):
    """The model without its head: heads may ask for inputs of their own."""
    return getattr(model, "base_model", model)


def _token_inputs(model) -> dict:
    config = _body(model).config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    token = 1 if pad == 0 else 0
    device = _device(model)
    inputs = {"input_ids": torch.full((1, _ENCODER_TOKENS), token, device=device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.full((1, _QUERIES), token, device=device)
    if "attention_mask" in inspect.signature(_body(model).forward).parameters:
        # With a padding mask, transformers does not look for packed documents: meta tensors could not say.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _device(model) -> torch.device:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return weight.device if isinstance(weight, Tensor) else next(model.parameters()).device


@contextmanager
def _evaluating(model):
    """Evaluation mode for a while, so that no random number is drawn and no layer is dropped."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
