"""Packed documents: which tokens of a row belong together, from ``cu_seq_lens`` or from position ids.

`DataCollatorWithFlattening` joins documents in one row. Flash attention is told where they begin by ``cu_seq_lens_q``
and ``cu_seq_lens_k``; transformers' masks look at position ids, but only where there is no cache, and not in every
model. Hooks around the model's forward read both, and the mask function (hf/masks.py) asks for them here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...errors import PatchError
from ...prefix import gates
from ...prefix.segments import document_starts


class Documents:
    """The documents of a running forward."""

    def __init__(self, segments: Tensor, causal_only: bool):
        self.segments = segments  # [B, T], equal within a document
        self.causal_only = causal_only  # position ids tell documents to causal attention alone
        self.used = False


_running: list[Documents | None] = []


def documents(causal: bool, batch: int, queries: int, keys: int) -> Tensor | None:
    """``[B, T]`` integers, equal within a document, for a mask that is being made; None: the row is one document."""
    found = _running[-1] if _running else None
    if found is None or (found.causal_only and not causal):
        return None
    if found.segments.shape[1] != queries or (not torch.compiler.is_compiling() and queries != keys):
        raise PatchError(
            f"{queries} queries and {keys} keys are to be attended, but the packed documents have "
            f"{found.segments.shape[1]} tokens; packed documents need a forward without earlier tokens in a cache"
        )
    found.used = True
    return found.segments.expand(batch, -1)


class ReadDocuments:
    """Forward pre-hook of the model and of its body."""

    def __init__(self, sites, prefixes, encoder_decoder: bool):
        self.inline = next((site.name for site in sites if site.inline is not None), None)
        self.causal = any(site.causal and not site.cross for site in sites)
        self.gated = any(prefix.gate_entry.per_sequence for prefix in prefixes)
        self.encoder_decoder = encoder_decoder

    def __call__(self, module, args, kwargs):
        found, changed = _running[-1] if _running else None, None
        boundaries = kwargs.get("cu_seq_lens_q")
        if kwargs.get("cache") is not None:
            found = None  # continuous batching has masks of its own
        elif found is None and isinstance(boundaries, Tensor):
            found = self.by_boundaries(boundaries, args, kwargs)
            changed = self.without_cache(kwargs)
            if self.causal and kwargs.get("position_ids") is None:
                # A rotary query meets the prefix under its own position: a document's first has to be 0.
                changed = {**(changed or kwargs), "position_ids": _positions(found.segments)}
        elif found is None:
            found = self.by_positions(kwargs)
            changed = None if found is None else self.without_cache(kwargs)
        _running.append(found)
        return None if changed is None else (args, changed)

    def without_cache(self, kwargs) -> dict | None:
        """The keywords, for a forward that makes no cache: kept keys of several documents cannot be continued."""
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
                f"cu_seq_lens_q is given, but {self.inline} writes its attention out and does not read it; use padded "
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
        if self.inline is not None and self.gated:
            raise PatchError(
                f"position_ids begin again within a row, and {self.inline} computes its attention inline, where gates "
                f"{gates.choice(lambda gate: gate.per_sequence, 'and')} do not see documents; use "
                f"gate={gates.choice(lambda gate: not gate.per_sequence)}, or padded batches"
            )


def _positions(segments: Tensor) -> Tensor:
    """``[1, T]``: positions that begin again at 0 with every document."""
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


def forget_documents(module, args, output) -> None:
    """Forward hook of the model and of its body."""
    found = _running.pop() if _running else None
    last = found is not None and (not _running or _running[-1] is not found)
    if last and not found.causal_only and not found.used:
        raise PatchError(f"cu_seq_lens_q is given, but {type(module).__name__} made no mask that could tell documents")


def install(model, sites, prefixes) -> None:
    """Hook the patched ``model`` and its body; called again, the hooks are those of the adapter's ``prefixes``."""
    remove(model)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    read = ReadDocuments(sites, prefixes, encoder_decoder)
    for module in _hooked(model):
        module.register_forward_pre_hook(read, with_kwargs=True)
        module.register_forward_hook(forget_documents, always_call=True)


def _hooked(model) -> list[nn.Module]:
    body = getattr(model, "base_model", model)
    return [model] if body is model else [model, body]


def remove(model) -> None:
    """Undo `install`."""
    for module in _hooked(model):
        for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, ReadDocuments)]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [k for k, hook in module._forward_hooks.items() if hook is forget_documents]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
