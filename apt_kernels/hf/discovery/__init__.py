"""Which modules of a model attend, and with what shapes: recorded in one short forward pass."""
