"""How a Hugging Face model is recorded, patched and routed. Nothing outside this folder knows transformers."""
