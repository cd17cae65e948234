"""Triton's interpreter for the tests: switched on where there is no CUDA device, and made fast enough for them."""

from __future__ import annotations

import importlib.util
import os

import torch


def use() -> None:
    """Interpret kernels when no CUDA device can run them. Call before anything imports Triton."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    _quicken()


def _quicken() -> None:
    """Patch the language once a launch instead of once a nested call; leave out the debug checks of integer sums."""
    from triton import language
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def launch_patched_once(self, *args, **kwargs):
        scopes = {}

        def patch_once(fn):
            languages = tuple(
                any(part is known for part in fn.__globals__.values()) for known in (language, language.core)
            )
            if languages not in scopes:
                scopes[languages] = patch(fn)
            return scopes[languages]

        interpreter._patch_lang = patch_once
        try:
            return launch(self, *args, **kwargs)
        finally:
            interpreter._patch_lang = patch

    interpreter.GridExecutor.__call__ = launch_patched_once
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
