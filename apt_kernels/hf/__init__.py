"""Support for Hugging Face models. Nothing outside this folder imports transformers."""

from . import compat

compat.require("patch", "hooks", "interrupts")  # before anything here imports from transformers

from . import integrations  # noqa: E402, F401 - each subscribes to changes of the prefixes
