"""The pretrained models that come as packages, for tests: one that needs a missing package is skipped."""

from __future__ import annotations

import functools

import pytest

from bench.quality import packaged
from bench.quality.packaged import HELD_OUT, long_docstrings, next_token_loss, windows
from bench.quality.sources import DataError

__all__ = [
    "HELD_OUT",
    "long_docstrings",
    "minilm",
    "minilm_task",
    "next_token_loss",
    "smollm2",
    "smollm2_task",
    "windows",
]


def _or_skip(load):
    @functools.wraps(load)
    def call(*args, **options):
        try:
            return load(*args, **options)
        except DataError as error:
            pytest.skip(str(error))

    return call


minilm, smollm2 = _or_skip(packaged.minilm), _or_skip(packaged.smollm2)
minilm_task, smollm2_task = _or_skip(packaged.minilm_task), _or_skip(packaged.smollm2_task)
