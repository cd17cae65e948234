"""The texts that `patch_from_text` accepts, as token ids: ids, a string, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, its_type

_NEEDS = "it needs the token ids of one text, [M] or [1, M]"


def token_ids(model, given: Any, tokenizer: Any = None, name: str = "input_ids") -> Tensor:
    """``given`` as ``[1, M]``: token ids, or with a tokenizer a string or the messages of a chat.

    Raises `ArgumentError`, which calls the text ``name``.
    """
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "apply_chat_template")):
        raise ArgumentError(f"tokenizer is {its_type(tokenizer)}; it needs the tokenizer of the model")
    if isinstance(given, str) and tokenizer is not None:
        given = _tokenized(name, lambda: tokenizer(given))
    elif isinstance(given, (list, tuple)) and any(isinstance(each, Mapping) for each in given):
        _check_messages(given, name)
        if tokenizer is None:
            raise ArgumentError(
                f"{name} is a list of messages; it needs tokenizer=, whose chat template makes the text"
            )
        messages = list(given)
        given = _tokenized(name, lambda: tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True))
    return _checked(model, given, name)


def refuse_several(given: Any, tokenizer: Any) -> None:
    """Raise `ArgumentError` for a list of texts where one text is needed."""
    if not isinstance(given, (list, tuple)) or any(isinstance(each, Mapping) for each in given):
        return
    if any(_is_text(each, tokenizer, alone=len(given) == 1) for each in given):
        raise ArgumentError(
            "input_ids is a list of texts; it needs one text, such as input_ids[0]. To choose the best of several "
            "texts, pass batches= as well"
        )


def _is_text(entry: Any, tokenizer: Any, alone: bool) -> bool:
    """Whether an entry of a list is a text. A list of ids that is ``alone`` in its list is a row of ``[1, M]``."""
    if isinstance(entry, (list, tuple)):
        return not alone or any(isinstance(each, Mapping) for each in entry)
    return (isinstance(entry, str) and tokenizer is not None) or (isinstance(entry, Tensor) and entry.ndim > 0)


def _check_messages(given: Sequence[Any], name: str) -> None:
    """Raise `ArgumentError` for an entry that is no message of a chat."""
    needs = "'role' and 'content' (or instead of 'content' what the chat template reads, such as 'tool_calls')"
    for number, each in enumerate(given):
        if not isinstance(each, Mapping):
            raise ArgumentError(
                f"{name}[{number}] is {its_type(each)}, not a message; a list of messages needs dicts alone, "
                f"each with {needs}"
            )
        if "role" not in each or len(each) < 2:
            keys = ", ".join(repr(key) for key in each)
            missing = "content" if "role" in each else "role"
            raise ArgumentError(
                f"{name}[{number}] has no '{missing}'{', but ' + keys if keys else ''}; a message needs {needs}"
            )


def _tokenized(name: str, call: Callable[[], Mapping[str, Any]]) -> Any:
    try:
        ids = call()["input_ids"]
        empty = not len(ids)
    except Exception as error:  # a chat template may raise any error for messages that it does not expect
        raise ArgumentError(f"the tokenizer cannot read {name}: {error}") from error
    if empty:
        raise ArgumentError(f"the text is empty: the tokenizer makes no tokens of {name}; it needs at least one")
    return ids


def _checked(model, given: Any, name: str) -> Tensor:
    """Token ids as ``[1, M]``, all of them in the model's vocabulary."""
    if isinstance(given, (str, bytes)):
        raise ArgumentError(
            f"{name} is {its_type(given)}; {_NEEDS}: tokenizer(text).input_ids, or the text with tokenizer="
        )
    if isinstance(given, Mapping):
        raise ArgumentError(f"{name} is {its_type(given)}; {_NEEDS}: its ['input_ids']")
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} is {its_type(given)}; {_NEEDS} ({error})") from None
    if not ids.numel():  # before the dtype: torch makes an empty list float32
        raise ArgumentError(f"the text is empty: {name} has no tokens; it needs at least one")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ArgumentError(f"{name} is {ids.dtype}; {_NEEDS}")
    if not (ids.ndim == 1 or (ids.ndim == 2 and ids.shape[0] == 1)):
        raise ArgumentError(f"{name} has the shape {list(ids.shape)}; {_NEEDS}")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    count = getattr(getattr(embeddings, "weight", None), "shape", [None])[0]
    if count is not None and not 0 <= int(ids.min()) <= int(ids.max()) < count:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ArgumentError(f"{name} has {wrong}; the model has tokens from 0 to {count - 1}")
    return ids.reshape(1, -1)


def candidates(given: Any) -> Sequence[Any]:
    """The texts of which `patch_from_text` chooses one; `ArgumentError` where it is one text."""
    one = isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence) or not given
    if one or any(isinstance(each, (int, Mapping)) for each in given):
        found = "a list of messages" if not one and isinstance(given[0], Mapping) else its_type(given)
        raise ArgumentError(f"input_ids is {found}; with batches, it needs a list of texts of which one is chosen")
    return given
