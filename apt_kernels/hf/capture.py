"""The inputs of a model's attention modules for some tokens, and keys rotated to other positions.

In a patched model the prefix has no positions, and tokens start at position 0. A prefix in a key/value cache has the
positions 0 to M - 1, and tokens start at M. A rotary embedding depends on position differences only, so rotating the
keys by M positions converts one into the other.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import PatchError
from . import calls
from .attention import function
from .attention.implementations import implementations, restore_implementations, set_implementation
from .attention.masks import AttentionMask, describe
from .discovery.recording import evaluating
from .state import is_patched, named_modules, state_of

_CAPTURE = "apt_kernels_capture"
# A larger difference of outputs, relative to the prefix's influence, is not rounding, not even in bfloat16.
SAME = 0.05
# Tokens for which reading in chunks is compared with reading at once.
_TRIED = 7
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Captured(NamedTuple):
    """The inputs of an attention module: key ``[B, Hkv, S, D]``, value ``[B, Hkv, S, Dv]``, mask, rotary embedding (cos
    and sin), query ``[B, Hq, T, D]``, and the factor of the logits."""

    key: Tensor
    value: Tensor
    mask: object
    rotary: tuple[Tensor, Tensor] | None
    query: Tensor
    scaling: float


def refuse_no_decoder(model, instead: str = "") -> None:
    """Raise `PatchError` unless the model is a causal language model that takes position ids.

    ``instead``, here and below, is the end of the message: what to do instead.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise PatchError(
            f"{type(model).__name__} is an encoder-decoder model; keys and values of a text or checkpoint fit "
            f"decoders alone{instead}"
        )
    if model.get_output_embeddings() is None or "position_ids" not in inspect.signature(model.forward).parameters:
        raise PatchError(
            f"{type(model).__name__} is not a causal language model whose forward takes position_ids{instead}"
        )


def refuse_lengths(model, instead: str = "") -> None:
    """Raise `PatchError` if the rotary frequencies depend on the length."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")] + [part.get("rope_type") for part in rope.values() if isinstance(part, dict)]
    found = next((kind for kind in kinds if kind in _LENGTH_DEPENDENT), None)
    if found:
        raise PatchError(
            f"{type(model).__name__} has rotary frequencies that depend on the length ({found!r}); copied keys would "
            f"be wrong at other lengths{instead}"
        )


def at_positions(
    model, ids: Tensor, position: int, instead: str = ""
) -> tuple[dict[str, Captured], dict[str, Captured]]:
    """Inputs for single tokens at position 0 and at ``position``; `PatchError` if values depend on the position."""
    ids = ids.reshape(-1, 1)[:4]
    here, near = (capture(model, ids, torch.full_like(ids, at)) for at in (0, 1))
    apart = sees_positions(here, near)
    if apart:
        raise PatchError(
            f"{type(model).__name__} has learned absolute positions: the keys or values of {apart} depend on them, so "
            f"a copy at another position cannot be exact{instead}"
        )
    return here, capture(model, ids, torch.full_like(ids, position))


def sees_positions(here: dict[str, Captured], near: dict[str, Captured]) -> str | None:
    """The first attention module whose values differ for the same single tokens at two positions: its model has
    learned absolute positions. None: no value depends on the position."""
    return next((n for n in here if not torch.allclose(here[n].value, near[n].value, rtol=1e-3, atol=1e-4)), None)


class _Capture:
    def __init__(self):
        self.found: dict[nn.Module, Captured] = {}
        self.rotary: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.thread = threading.get_ident()

    def note(self, module, args, kwargs):
        if isinstance(kwargs.get("position_embeddings"), tuple) and threading.get_ident() == self.thread:
            self.rotary[module] = kwargs["position_embeddings"]


class _Active(threading.local):
    capture: _Capture


_active = _Active()


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **given):
    active = _active.capture
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    active.found[module] = Captured(key, value, attention_mask, active.rotary.get(module), query, factor)
    given = {"softcap": None, "s_aux": None, **given}
    return function.attend_without_prefix(module, query, key, value, attention_mask, dropout, scaling, given)


AttentionInterface.register(_CAPTURE, _attend)
AttentionMaskInterface.register(_CAPTURE, describe)


@contextmanager
def _capturing(model) -> Iterator[None]:
    """Within this context `_attend` computes attention, without a prefix; of a patched model, in this thread only."""
    if is_patched(model):
        with calls.disabling(state_of(model).token, _CAPTURE):
            yield
        return
    before = implementations(model)
    try:
        set_implementation(model, _CAPTURE)
        yield
    finally:
        restore_implementations(model, before)


def capture(model, ids: Tensor, positions: Tensor) -> dict[str, Captured]:
    """The inputs for ``ids`` at ``positions``, without a prefix, by the attention modules' names, in model order."""
    return capture_forward(model, model, input_ids=ids, position_ids=positions, use_cache=False)


def capture_forward(model, part: nn.Module, **inputs) -> dict[str, Captured]:
    """`capture` for any ``inputs`` of ``part``, a module of ``model``."""
    return _captured(model, lambda: part(**inputs))


def capture_text(model, ids: Tensor, first: int, chunk_size: int | None = None) -> dict[str, Captured]:
    """`capture` for a text ``[1, M]`` from position ``first`` on, read at once or by `read_in_chunks`.

    Keys and values are those of the whole text; in chunks, the other inputs are those for the last chunk.
    """
    length = ids.shape[1]
    if chunk_size is None:
        return capture(model, ids, torch.arange(first, first + length, device=ids.device)[None])
    found = _captured(model, lambda: read_in_chunks(model, ids, first, chunk_size))
    for name, own in found.items():
        if own.key.shape[2] != length:
            raise PatchError(
                f"{name} got the keys of {own.key.shape[2]} of {length} tokens from the cache of "
                f"{type(model).__name__}, which does not keep all; use chunk_size=None"
            )
    return found


def read_in_chunks(model, ids: Tensor, first: int, chunk_size: int) -> Any:
    """Run the model's body over a text ``[1, M]`` from position ``first`` on, ``chunk_size`` tokens at a time. Returns
    the cache that it made, by which each chunk attends to the ones before."""
    body, cache = getattr(model, "base_model", model), None
    if not {"past_key_values", "kwargs"} & inspect.signature(body.forward).parameters.keys():
        raise PatchError(
            f"{type(model).__name__} takes no cache, so it cannot read a text in chunks; use chunk_size=None"
        )
    for at in range(0, ids.shape[1], chunk_size):
        chunk = ids[:, at : at + chunk_size]
        positions = torch.arange(first + at, first + at + chunk.shape[1], device=ids.device)[None]
        given: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        out = body(input_ids=chunk, position_ids=positions, use_cache=True, **given)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise PatchError(
                f"{type(model).__name__} returns no cache, so it cannot read a text in chunks; use chunk_size=None"
            )
    return cache


def refuse_chunks(model, ids: Tensor) -> None:
    """Raise `PatchError` unless the model reads the first tokens of a text in chunks as it reads them at once."""
    few = ids[:, :_TRIED]
    whole, parts = (capture_text(model, few, 0, size) for size in (None, max(1, few.shape[1] // 2)))
    for name, own in whole.items():
        for expected, found in zip(own[:2], parts[name][:2]):
            if not torch.allclose(found, expected, rtol=SAME, atol=SAME * float(expected.std())):
                raise PatchError(
                    f"{name} has other keys or values where {type(model).__name__} reads a text in chunks by its "
                    "cache; use chunk_size=None"
                )


def _captured(model, run: Callable[[], Any]) -> dict[str, Captured]:
    """The inputs of each attention module's last call while ``run`` runs the model."""
    active = _Capture()
    handles = []
    try:
        handles += [m.register_forward_pre_hook(active.note, with_kwargs=True) for m in model.modules()]
        _active.capture = active
        with _capturing(model), evaluating(model), torch.no_grad():
            run()
    except IndexError as error:
        raise PatchError(
            f"{type(model).__name__} has learned absolute positions, and none before position 0 ({error})"
        ) from error
    finally:
        _active.__dict__.pop("capture", None)
        for handle in handles:
            handle.remove()
    if not active.found:
        raise PatchError(f"{type(model).__name__} attends inline; its keys and values cannot be read")
    return {name: active.found[module] for name, module in named_modules(model).items() if module in active.found}


def window_of(name: str, mask) -> int | None:
    """To how many tokens a query of a causal module attends, with its own; None: all. `PatchError` if not causal."""
    plain = isinstance(mask, AttentionMask) and mask.mask.dense is None and mask.mask.causal
    if not plain:
        raise PatchError(f"{name} is not causal: the keys and values of a text would depend on the tokens after it")
    left = mask.mask.window[0] if mask.mask.window is not None else None
    return None if left is None else left + 1


def rotated(module: nn.Module, name: str, key: Tensor, here: Captured, there: Captured) -> Tensor:
    """``key [Hkv, M, D]`` rotated by what turns ``here``'s keys (position 0) into ``there``'s (another position)."""
    if torch.allclose(here.key, there.key, rtol=1e-3, atol=1e-4):
        return key  # a layer without positions
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is not None and there.rotary is not None:
        # The source's keys already include the scaling factor of YaRN and similar embeddings.
        size = (there.rotary[0][:1].square() + there.rotary[1][:1].square()).sqrt()
        cos, sin = (part[:1] / size for part in there.rotary)
        for turn in (_whole, _part):
            turned = turn(apply, here.key, cos, sin)
            if turned is not None and torch.allclose(turned, there.key, rtol=2e-2, atol=2e-2 * float(there.key.std())):
                return turn(apply, key[None], cos, sin)[0]
    raise PatchError(
        f"{name}: its keys cannot be rotated, because {type(module).__name__} has an unknown rotary embedding"
    )


def _whole(apply, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    try:
        return apply(key, key, cos, sin)[1].to(key.dtype)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it takes other arguments
        return None


def _part(apply, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    width = cos.shape[-1]
    turned = _whole(apply, key[..., :width], cos, sin)
    return None if turned is None else torch.cat([turned, key[..., width:]], dim=-1)
