"""Methods of fine-tuning a decoder, compared on small tasks."""
