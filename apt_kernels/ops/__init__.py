"""The attention operator: its arguments, its registration with torch, and the choice of an implementation."""
