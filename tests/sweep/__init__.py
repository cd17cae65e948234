"""Every attention model of the installed transformers as a tiny random model: patched and compared with an oracle."""
