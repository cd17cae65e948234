"""Every attention model of the installed transformers as a tiny random model: patched, and held to an oracle."""
