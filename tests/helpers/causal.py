"""Tiny causal models whose prefix may be held by a key/value cache: rotary positions of every kind, or none."""

import torch

from . import models

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
WIDE = {"sliding_window": 64}
EXACT = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", WIDE),
    "mistral": ("mistral", WIDE),
    "gemma2": ("gemma2", WIDE),
    "gemma3": ("gemma3", WIDE),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "gpt_neox": ("gpt_neox", {}),
    "glm": ("glm", {}),
    "cohere": ("cohere", {}),
    "smollm3": ("smollm3", {}),
}


def build(case, **overrides):
    family, given = EXACT[case]
    if family in models.FAMILIES:
        model = models.build(family, **given, **overrides).double()
        model.set_attn_implementation("eager")  # by sdpa, transformers 5.17 drops Gemma 2's soft-cap
        return model
    import transformers as t

    common = {**models._DECODER, "hidden_size": 32}
    made = {
        "gpt_neox": lambda: t.GPTNeoXConfig(**models._COMMON, initializer_range=0.2),
        "glm": lambda: t.GlmConfig(**common, head_dim=8, initializer_range=0.2),
        "cohere": lambda: t.CohereConfig(**common, initializer_range=0.2),
        "smollm3": lambda: t.SmolLM3Config(**common, initializer_range=0.2, no_rope_layers=[1, 0]),
    }[family]()
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(made).eval().double()


def close(found, expected, bare):
    assert (expected - bare).abs().max() > 1e-2, "the prefix has no influence, the comparison proves little"
    # Both sides are float64, but for the rotary embedding's float32 angles and the float32 prefix.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
