"""Packed documents: which tokens of a row belong together, from ``cu_seq_lens`` or from position ids.

`DataCollatorWithFlattening` concatenates documents in one row. Flash attention gets their boundaries as
``cu_seq_lens_q`` and ``cu_seq_lens_k``; transformers' masks use position ids, but only without a cache and not in every
model. `Packed` reads both before the model's forward, and the mask function (masks.py) calls `documents`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...errors import PatchError
from ...prefix import gates
from ...prefix.segments import document_starts
from .. import calls
from . import subclass
from .places import Places


class Documents:
    """The documents of a running forward."""

    def __init__(self, segments: Tensor, causal_only: bool):
        self.segments = segments  # [B, T], equal within a document
        self.causal_only = causal_only  # position ids separate documents in causal attention only
        self.used = False


class Running:
    """A running forward of a patched model or of its body."""

    __slots__ = ("documents", "ids", "module", "token")

    def __init__(self, module, token: calls.Token, documents: Documents | None, ids: Tensor | None):
        self.module, self.token, self.documents, self.ids = module, token, documents, ids

    def is_around(self, module, token: calls.Token, ids: Tensor | None) -> bool:
        """Whether this forward passes its tokens to the body ``module``; no, if a hook calls the body with others."""
        same = self.ids is None or ids is None or self.ids is ids
        return self.token is token and self.module is not module and same


def documents(token: calls.Token | None, causal: bool, batch: int, queries: int, keys: int) -> Tensor | None:
    """``[B, T]`` integers, equal within a document, for the current mask; None: the row is one document.

    ``token``: the patched model's, for which the mask is made.
    """
    running = calls.local.documents
    found = None if running is None or token is None or running.token.number != token.number else running.documents
    if found is None or (found.causal_only and not causal):
        return None
    if found.segments.shape[1] != queries or (not torch.compiler.is_compiling() and queries != keys):
        raise PatchError(
            f"{queries} queries and {keys} keys are to be attended, but the packed documents have "
            f"{found.segments.shape[1]} tokens; packed documents need a forward without earlier tokens in a cache"
        )
    found.used = True
    return found.segments.expand(batch, -1)


class Packed(subclass.Mixin):
    """Added to the class of a patched model and of its body: its forward reads the documents of its inputs."""

    apt_token = apt_held = apt_documents = None

    def forward(self, *args, **kwargs):
        if self.apt_held is not None:  # a replica, in a thread of nn.DataParallel
            return calls.applied(self.apt_held, _forward, self, super().forward, args, kwargs)
        return _forward(self, super().forward, args, kwargs)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica.apt_held = calls.hold()
        return replica


def _forward(module, forward, args, kwargs):
    read, local, outer = module.apt_documents, calls.local, calls.local.documents
    if read is None:
        return forward(*args, **kwargs)
    if not torch.compiler.is_compiling():
        read.places.check()
    found, ids = None, kwargs.get("input_ids", args[0] if args else None)
    if not local.disabled or calls.disabling_of(module.apt_token) is None:
        # The model that contains this body has read them already.
        inside = outer is not None and outer.is_around(module, module.apt_token, ids)
        if not module.apt_token.warned:
            _warn_of_weights(module, kwargs)
        found, args, kwargs = read(outer.documents if inside else None, args, kwargs)
    try:
        local.documents = Running(module, module.apt_token, found, ids)
        output = forward(*args, **kwargs)
    finally:
        local.documents = outer
    last = found is not None and (outer is None or outer.documents is not found)
    if last and not found.causal_only and not found.used:
        raise PatchError(
            f"cu_seq_lens_q is given, but {type(module).__name__} made no mask that separates the documents"
        )
    return output


def _warn_of_weights(module, kwargs: dict) -> None:
    """Warn once per model if its attention weights are requested."""
    if torch.compiler.is_compiling():
        return
    asked, read = kwargs.get("output_attentions"), module.apt_documents
    if asked is None:
        # transformers accepts a config that requests them with eager attention, as models with inline attention have.
        asked = read.asks_for_weights or (read.inline is not None and module.config.output_attentions)
    if asked:
        module.apt_token.warned = True
        warnings.warn(
            "output_attentions=True: attention with a prefix is fused and computes no attention weights; those outputs "
            "are empty. Within apt_kernels.disabled(model) an eager model returns its own",
            stacklevel=4,
        )


class ReadDocuments:
    """The inputs of a forward that `Packed` reads."""

    def __init__(self, places: Places, sites, prefixes, encoder_decoder: bool, asks_for_weights: bool):
        self.places, self.asks_for_weights = places, asks_for_weights
        self.inline = next((site.name for site in sites if site.inline is not None), None)
        self.causal = any(site.causal and not site.cross for site in sites)
        self.gated = any(prefix.gate_entry.per_sequence for prefix in prefixes)
        self.encoder_decoder = encoder_decoder

    def __call__(self, found: Documents | None, args, kwargs):
        """The documents (``found``, if they are known), and the inputs changed as the model needs them."""
        boundaries, changed = kwargs.get("cu_seq_lens_q"), None
        if kwargs.get("cache") is not None:
            found = None  # continuous batching makes its own masks
        elif found is None and isinstance(boundaries, Tensor):
            found = self.by_boundaries(boundaries, args, kwargs)
            changed = self.without_cache(kwargs)
            if self.causal and kwargs.get("position_ids") is None:
                # With rotary embeddings, positions within each document have to start at 0, as they do without packing.
                changed = {**(changed or kwargs), "position_ids": _positions(found.segments)}
        elif found is None:
            found = self.by_positions(kwargs)
            changed = None if found is None else self.without_cache(kwargs)
        return found, args, kwargs if changed is None else changed

    def without_cache(self, kwargs) -> dict | None:
        """The keywords for a forward without a cache: generation cannot continue several documents."""
        if kwargs.get("use_cache") and not torch.compiler.is_compiling():
            raise PatchError(
                "use_cache is True, and the row holds packed documents, which share no cache that could be continued; "
                "pass use_cache=False"
            )
        return {**kwargs, "use_cache": False} if self.causal and kwargs.get("use_cache") is None else None

    def by_boundaries(self, boundaries: Tensor, args, kwargs) -> Documents:
        if self.encoder_decoder:
            raise PatchError(
                "cu_seq_lens_q is given to an encoder-decoder, whose two sides have documents of different lengths; "
                "use padded batches"
            )
        if self.inline is not None:
            raise PatchError(
                f"cu_seq_lens_q is given, but {self.inline} computes attention inline and does not read it; use padded "
                "batches"
            )
        tokens = next(
            (kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None),
            args[0] if args else None,
        )
        if not isinstance(tokens, Tensor) or tokens.shape[0] != 1:
            has = "no tokens" if not isinstance(tokens, Tensor) else f"{tokens.shape[0]} rows"
            raise PatchError(f"cu_seq_lens_q is given with {has}; it needs one row that holds all documents")
        _check(boundaries, kwargs.get("cu_seq_lens_k"), tokens.shape[1])
        begins = torch.zeros(tokens.shape[1] + 1, dtype=torch.long, device=tokens.device)
        begins = begins.index_fill(0, boundaries.to(tokens.device, torch.long), 1)
        return Documents(begins[None, :-1].cumsum(dim=1), causal_only=False)

    def by_positions(self, kwargs) -> Documents | None:
        positions = kwargs.get("position_ids")
        if not self.causal or not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
            return None
        if any(kwargs.get(name) is not None for name in ("attention_mask", "past_key_values")):
            return None
        steps = positions.diff(dim=1)
        if not torch.compiler.is_compiling():
            if positions.device.type == "meta" or not bool((steps <= 0).any()):
                return None
            self.refuse_gates_inline()
        segments = torch.nn.functional.pad((steps != 1).cumsum(dim=1), (1, 0))
        return Documents(segments, causal_only=True)

    def refuse_gates_inline(self) -> None:
        rows = calls.local.rows  # the adapters of a batch in which each row names its own
        if self.inline is not None and (self.gated if rows is None else rows.per_sequence):
            raise PatchError(
                f"position_ids begin again within a row, and {self.inline} computes its attention inline, where gates "
                f"{gates.choice(lambda gate: gate.per_sequence, 'and')} do not see documents; use "
                f"gate={gates.choice(lambda gate: not gate.per_sequence)}, or padded batches"
            )


def _positions(segments: Tensor) -> Tensor:
    """``[1, T]``: positions that start at 0 in every document."""
    return torch.arange(segments.shape[1], device=segments.device) - document_starts(segments)


def _check(boundaries: Tensor, keys, tokens: int) -> None:
    if boundaries.ndim != 1 or boundaries.is_floating_point():
        raise PatchError(
            f"cu_seq_lens_q has shape {list(boundaries.shape)} and dtype {boundaries.dtype}; it needs a row of integers"
        )
    if torch.compiler.is_compiling():
        return
    ends = boundaries.tolist()
    if ends[:1] != [0] or ends[-1] != tokens or ends != sorted(ends):
        raise PatchError(f"cu_seq_lens_q is {ends}; it needs to rise from 0 to the row's {tokens} tokens")
    if isinstance(keys, Tensor) and keys.tolist() != ends:
        raise PatchError(f"cu_seq_lens_k is {keys.tolist()}, cu_seq_lens_q {ends}; self-attention needs them equal")


def install(model, token: calls.Token, sites, prefixes) -> None:
    """Let the patched ``model`` and its body read documents; again: by the gates of the adapter's ``prefixes``."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    asks_for_weights = bool(getattr(model.config, "output_attentions", False))
    read = ReadDocuments(Places(model), sites, prefixes, encoder_decoder, asks_for_weights)
    for module in _readers(model):
        module.apt_documents, module.apt_token = read, token
        subclass.add(module, Packed)


def _readers(model) -> list[Any]:
    body = getattr(model, "base_model", model)
    return [model] if body is model else [model, body]


def remove(model) -> None:
    """Undo `install`."""
    for module in _readers(model):
        subclass.remove(module, Packed)
        for name in ("apt_documents", "apt_token"):
            module.__dict__.pop(name, None)
