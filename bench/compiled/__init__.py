"""What compiled kernels show without a GPU: registers, spills, instructions, launches, host time."""
