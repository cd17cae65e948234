"""Trained adapters in inference servers. One folder for each server; the rest of the package imports none of them."""
