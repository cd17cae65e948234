"""The implementations of the op. They share `inputs` and `dropout` and never import one another."""
