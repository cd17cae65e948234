"""The trained parameters of an attention layer, and the gate that scales them."""
