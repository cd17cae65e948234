"""Shared by the demo and all measurements: the naive baseline, Markdown tables, the description of a machine."""
