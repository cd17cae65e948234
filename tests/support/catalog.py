"""The capabilities in the table's order, and the families to which one does not apply, with the reason."""

from __future__ import annotations

from helpers import models

_NO_TEXT = dict.fromkeys(models.ENCODERS, "an encoder does not generate")
_DECODERS_ONLY = {**_NO_TEXT, **dict.fromkeys(models.SEQ2SEQ, "transformers does this with decoder-only models alone")}
_NO_WINDOW = dict.fromkeys(
    (f for f in models.FAMILIES if f not in ("mistral", "gemma2", "gemma3", "phi3")), "it has no sliding window"
)
_NO_HEAD = "transformers has no such head for it"
_NOT_CAUSAL = dict.fromkeys(models.ENCODERS, "an encoder sees both sides; see masked language model")
_SEQ2SEQ_HEAD = dict.fromkeys(models.SEQ2SEQ, "see sequence to sequence")
_QUANTISED = {
    **_NO_TEXT,
    **dict.fromkeys(("mistral", "gemma2", "gemma3", "phi3"), "transformers quantises no sliding-window layers' cache"),
    **dict.fromkeys(models.SEQ2SEQ, "transformers has no quantised cache for encoder-decoders"),
}
_NO_POSITIONS = {
    **dict.fromkeys(models.SEQ2SEQ, "it takes no position ids, or packs no documents by them"),
    **dict.fromkeys(models.ENCODERS, "position ids that begin again are no documents to an encoder; cu_seq_lens are"),
}

# Capability -> families to which it does not apply, with the reason. Marked capabilities not listed here come last.
SECTIONS: dict[str, dict[str, dict[str, str]]] = {
    "Forward and backward": {
        "outputs and gradients, padding on either side": {},
        "unpatch, bit for bit": {},
        "sliding window: every query sees the whole prefix": _NO_WINDOW,
        "packed documents by position ids": _NO_POSITIONS,
        "packed documents by cu_seq_lens": {},
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
        "quantised cache": _QUANTISED,
        "offloaded cache": _NO_TEXT,
        "generation from inputs_embeds": _NO_TEXT,
        "chunked prefill": _NO_TEXT,
        "continuing from a returned cache": _DECODERS_ONLY,
        "interleaved generations": _DECODERS_ONLY,
        "continuous batching": _DECODERS_ONLY,
        "compiled decoding": _NO_TEXT,
    },
    "Task heads": {
        "causal language model": {**_NOT_CAUSAL, **_SEQ2SEQ_HEAD},
        "masked language model": dict.fromkeys(models.DECODERS + models.SEQ2SEQ, "it has no masked language model"),
        "sequence to sequence": dict.fromkeys(models.ENCODERS + models.DECODERS, "it has one side only"),
        "sequence classification": {},
        "reward (one number a sequence)": dict.fromkeys(models.ENCODERS, "as sequence classification"),
        "token classification": dict.fromkeys(("opt", "gemma3", "bart"), _NO_HEAD),
        "question answering": dict.fromkeys(("gemma2", "gemma3", "phi3"), _NO_HEAD),
        "multiple choice": dict.fromkeys(models.DECODERS + models.SEQ2SEQ, _NO_HEAD),
        "embeddings (bare model)": {},
    },
    "Training": {
        "gradient checkpointing, both kinds, switched on before or after the patch": {},
        "Trainer: checkpoint without base weights, resume with equal losses, best model": {},
        "Trainer: predictions": {},
        "Trainer: a reparameterised prefix, resumed and loaded": {},
        "gradient checkpointing under Trainer, bfloat16 base under autocast": {},
        "mixed precision: bfloat16 base, float32 prefix, with autocast and without": {},
        "generation between training steps, as reinforcement learning does it": _NO_TEXT,
        "Accelerate": {},
        "DDP, two processes: losses, gradients, a step, saved adapters": {},
        "FSDP2, two processes: losses, gradients, a step, saved adapters": {},
        "FSDP (FullyShardedDataParallel), two processes: losses, gradients, a step, saved adapters": {},
        "tensor parallel by transformers' plan, two processes: heads of the prefix sharded, as above": dict.fromkeys(
            (f for f in models.FAMILIES if f not in "llama mistral qwen2 qwen3 gemma2 gemma3 phi3".split()),
            "transformers has no plan for it",
        ),
        "DeepSpeed ZeRO-3, two processes: losses, gradients, a step, saved adapters": {},
        "torch.compile, dynamic lengths": {},
        "torch.compile of training steps, dynamic lengths, no recompilation per length": {},
        "CUDA graphs": {},
        "quantised base": {},
        "Trainer with a base that from_pretrained quantised by bitsandbytes": {},
        "LoRA and other PEFT methods on the same model, patched before or after, merged and unmerged": {},
    },
    "Comfort": {
        "which layers, by name, index or kind; a length each": {},
        "summary of what trains": {},
        "prefix off and on by a context manager": {},
        "several named adapters": {},
        "a batch with an adapter for each row (adapter_names), or none": {},
        "generation with an adapter for each row, two kinds of caches and none": _NO_TEXT,
        "several adapters that train together, each on its rows": {},
        "one adapter out of several, their prefixes one behind the other": {},
        "save and load": {},
        "save to and load from a hub repository": {},
    },
}


def listed() -> dict[str, dict[str, str]]:
    return {name: absent for section in SECTIONS.values() for name, absent in section.items()}
