"""Case names and verdicts in words."""

from __future__ import annotations

from .tables import Row

PEERS = {
    "ours": "apt-kernels",
    "naive": "naive (prefix concatenated)",
    "peft": "PEFT",
    "concat_flash": "concatenated, flash kernel",
    "concat_efficient": "concatenated, memory-efficient kernel",
    "flex": "FlexAttention",
    "in_cache": "prefix in the KV cache",
    "float32": "apt-kernels in float32",
    "no_prefix": "no prefix",
}
# Fewer rounds have no quartiles worth a verdict.
LEAST_ROUNDS = 3
_MODELS = {"bert": "BERT", "roberta": "RoBERTa", "llama": "Llama"}
_GATES = {"none": "no gate", "static": "static gate", "row": "a gate per sequence", "query": "a gate per token"}
_KINDS = {"encoder": "Encoder", "causal": "Causal", "decode": "Decoding"}


def case_in_words(row: Row) -> str:
    """Such as ``"Train Llama (4 layers), 1 x 1,024 tokens, prefix 64, gates"``."""
    subject, prefix = setting_in_words(row)
    return f"{subject}, {_problem(row)}, {prefix}"


def setting_in_words(row: Row) -> tuple[str, str]:
    """What does not depend on batch and length: the model or kind of attention, and the prefix."""
    shape = row.shape
    if "size" in shape:
        family, _, rest = shape["size"].partition("-")
        layers = f"{shape['layers']} layers" if shape.get("layers") else rest.replace("-", " ")
        subject = f"{'Decode' if row.stage == 'generation' else 'Train'} {_MODELS.get(family, family)} ({layers})"
        options = [name for name in ("checkpointing", "compiled") if shape.get(name)]
        return subject, ", ".join([_prefix(shape, "no gates" if shape["gate"] == "none" else "gates"), *options])
    heads = (
        f"{shape['heads']} heads"
        if shape["heads"] == shape["kv_heads"]
        else f"{shape['heads']}/{shape['kv_heads']} heads"
    )
    subject = f"{_KINDS.get(shape.get('kind'), 'Causal')}, {heads} of {shape['dim']}"
    more = [_GATES[shape["gate"]]] if "gate" in shape else []
    options = [*(["padded"] if shape.get("padded") else []), *([shape["dtype"]] if shape.get("dtype") else [])]
    return subject, ", ".join([_prefix(shape, *more), *options])


def _prefix(shape: dict, *more: str) -> str:
    return ", ".join([f"prefix {shape['length']:,}", *more])


def _problem(row: Row) -> str:
    shape = row.shape
    if isinstance(shape["tokens"], tuple | list):
        return f"{len(shape['tokens'])} lengths, {'first call' if row.which == 'first' else 'later calls'}"
    if row.stage in ("decode", "generation"):
        return f"{shape['batch']} x 1 token, {shape.get('keys', shape['tokens']):,} cached"
    return f"{shape['batch']} x {shape['tokens']:,} tokens"


def ratio_in_words(row: Row, peer: str) -> str:
    """A peer's time by ours with the range of its quartiles, and a verdict only if that range excludes 1."""
    found = row.ratio(peer)
    if found is None:
        return "-"
    middle, low, high = found
    if min(row.ours.rounds, row.peers[peer].rounds) < LEAST_ROUNDS:
        return f"{middle:.2f}"
    verdict = "faster" if low > 1 else "slower" if high < 1 else "within the spread"
    return f"{middle:.2f} ({low:.2f} to {high:.2f}): {verdict}"
