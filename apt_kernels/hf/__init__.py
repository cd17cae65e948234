"""How a Hugging Face model is recorded, patched and routed. Nothing outside this folder knows transformers."""

from .compat import check_transformers

check_transformers()  # before anything here imports from transformers
