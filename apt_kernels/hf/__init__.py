"""Hugging Face models: how they are recorded, patched, saved. Nothing outside this folder imports transformers."""

from .compat import check_transformers

check_transformers()  # before anything here imports from transformers

from . import integrations  # noqa: E402, F401 - each subscribes to changes of the prefixes
