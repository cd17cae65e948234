"""The attention modules of a model and their shapes, recorded in one short forward pass."""
