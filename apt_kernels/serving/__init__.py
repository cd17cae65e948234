"""Trained adapters in inference servers. One folder for each server; nothing here is imported without it."""
