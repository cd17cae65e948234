"""The capabilities in the table's order, and the families to which one does not apply, with the reason."""

from __future__ import annotations

import models

_NO_TEXT = dict.fromkeys(models.ENCODERS, "an encoder does not generate")
_DECODERS_ONLY = {**_NO_TEXT, **dict.fromkeys(models.SEQ2SEQ, "transformers does this with decoder-only models alone")}
_NO_WINDOW = dict.fromkeys(
    (f for f in models.FAMILIES if f not in ("mistral", "gemma2", "gemma3", "phi3")), "it has no sliding window"
)
_ENCODERS_ONLY = dict.fromkeys(models.DECODERS + models.SEQ2SEQ, "the family has no such head in transformers")
_NOT_PACKED = {
    **dict.fromkeys(models.SEQ2SEQ, "one set of boundaries does not fit the encoder's and the decoder's tokens"),
}
_NO_POSITIONS = {
    **_NOT_PACKED,
    **dict.fromkeys(models.ENCODERS, "position ids that begin again are no documents to an encoder; cu_seq_lens are"),
}

# Capability -> families to which it does not apply, and why. What is marked `proves` and not listed comes last.
SECTIONS: dict[str, dict[str, dict[str, str]]] = {
    "Forward and backward": {
        "outputs and gradients, padding on either side": {},
        "unpatch, bit for bit": {},
        "sliding window: every query sees the whole prefix": _NO_WINDOW,
        "packed documents by position ids": _NO_POSITIONS,
        "packed documents by cu_seq_lens": _NOT_PACKED,
    },
    "Generation": {
        "greedy and beam search, left padding": _NO_TEXT,
        "a row alone and padded in a batch": _NO_TEXT,
        "seeded sampling": _NO_TEXT,
        "prompt-lookup decoding": _NO_TEXT,
        "assisted decoding": _NO_TEXT,
        "no cache (use_cache=False)": _NO_TEXT,
        "static cache": _NO_TEXT,
        "sliding-window cache": _NO_TEXT,
        "quantised cache": _NO_TEXT,
        "offloaded cache": _NO_TEXT,
        "generation from inputs_embeds": _NO_TEXT,
        "chunked prefill": _NO_TEXT,
        "continuing from a returned cache": _DECODERS_ONLY,
        "interleaved generations": _DECODERS_ONLY,
        "continuous batching": _DECODERS_ONLY,
        "compiled decoding": _NO_TEXT,
    },
    "Task heads": {},
    "Training": {},
    "Comfort": {},
}


def listed() -> dict[str, dict[str, str]]:
    return {name: absent for section in SECTIONS.values() for name, absent in section.items()}
