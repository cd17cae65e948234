"""A tiny Llama over characters with random weights, and its tokenizer: for examples that download nothing."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

NAME = "tiny"


def load(name: str):
    """The model and the tokenizer of a hub name or folder, or the tiny ones."""
    set_seed(0)
    if name != NAME:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    special = ["[PAD]", "[EOS]", "[UNK]"]
    tokens = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *string.printable])}, "[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    names = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = {"vocab_size": len(special) + len(string.printable), "initializer_range": 0.2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**shape, **size, eos_token_id=1)), tokenizer
