"""lm-evaluation-harness: the model type ``apt``, a base model with an adapter, and the harness's command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import ArgumentError
from .checkpoint import load

MODEL = "apt"


def register() -> None:
    """Register the model type ``apt`` with lm_eval; a second time changes nothing.

    Its arguments are those of the type ``hf``, and ``adapter``: a folder, or ``owner/name`` on the Hugging Face hub.
    Raises `ModuleNotFoundError` if lm_eval is not installed.
    """
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.models.huggingface import HFLM

    if MODEL in MODEL_REGISTRY:
        return

    @register_model(MODEL)
    class Adapted(HFLM):
        """A model of transformers with an adapter."""

        def __init__(self, *args, adapter: str | None = None, **options):
            if adapter is None:
                raise ArgumentError(f"model_args has no adapter; the model type {MODEL!r} needs adapter=FOLDER")
            self._adapter = adapter
            super().__init__(*args, **options)

        def _create_model(self, *args, **options) -> None:
            super()._create_model(*args, **options)
            load(self._model, self._adapter)


def run(arguments: Sequence[str]) -> int:
    """lm_eval's command line with the model type ``apt`` as the default; returns the exit code."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ArgumentError(f"lm-eval needs lm-evaluation-harness: pip install lm_eval ({error})") from error
    own, sys.argv = sys.argv, ["lm-eval", *_with_model(arguments)]  # it reads no other arguments
    try:
        cli_evaluate()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = own
    return 0


def _with_model(arguments: Sequence[str]) -> list[str]:
    """The arguments of a run, with ``--model apt`` if they name no model; those of other commands as they are."""
    given = list(arguments)
    runs = bool(given) and (given[0] == "run" or given[0].startswith("-"))
    named = any(each.partition("=")[0] in ("--model", "-M", "--config", "-C", "-h", "--help") for each in given)
    if not runs or named:
        return given
    at = int(given[0] == "run")
    return [*given[:at], "--model", MODEL, *given[at:]]
