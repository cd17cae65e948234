"""What a patched model runs in place of its attention: the registered function, masks, packing and caches."""
