"""The attention of a patched model: the registered function, masks, packing and caches."""
