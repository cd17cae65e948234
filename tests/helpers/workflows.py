"""The tiny models of the workflow tests, as a user builds them, and the accelerate calls around them."""

from __future__ import annotations

import torch
import transformers

import apt_kernels

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def llama(**overrides):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, **overrides})
    ).eval()


def bert(**overrides):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**{**_SIZES, "num_labels": 3, **overrides})
    ).eval()


def stir(model, seed=1):
    """Change the prefixes as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for prefix in apt_kernels.prefixes(model).values():
        for parameter in prefix.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.5
    return model


def token_ids(seed=0):
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
