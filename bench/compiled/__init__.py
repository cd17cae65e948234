"""Measurements of compiled kernels without a GPU: registers, spills, instructions, launches, host time."""
