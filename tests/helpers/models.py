"""Tiny random models of the supported families, by name."""

import os

import torch
import transformers as t

_COMMON = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA = {**_DECODER, "head_dim": 12, "sliding_window": 5}

ENCODERS = ("bert", "roberta", "electra")
DECODERS = (
    "gpt2",
    "opt",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
)
SEQ2SEQ = ("t5", "bart")
FAMILIES = ENCODERS + DECODERS + SEQ2SEQ
# Together: learned and rotary positions, grouped heads, windows, layers that differ, soft-caps, relative biases.
EVERY = bool(os.environ.get("APT_TEST_EVERY_FAMILY"))
_TELLING = ("bert", "gpt2", "llama", "mistral", "gemma2", "t5", "bart")


def some(families: tuple[str, ...]) -> tuple[str, ...]:
    """Those of ``families`` that differ most; with `EVERY` all of them, as for the table in the documentation."""
    return tuple(f for f in families if EVERY or f in _TELLING)


def config(family: str):
    """A fresh tiny config; windows are shorter than the test sequences."""
    made = {
        "bert": lambda: t.BertConfig(**_COMMON),
        "roberta": lambda: t.RobertaConfig(**{**_COMMON, "max_position_embeddings": 42}, pad_token_id=1),
        "electra": lambda: t.ElectraConfig(**_COMMON, embedding_size=32),
        "gpt2": lambda: t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0),
        "opt": lambda: t.OPTConfig(
            vocab_size=99,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=40,
            word_embed_proj_dim=32,
            pad_token_id=0,
        ),
        "llama": lambda: t.LlamaConfig(**_DECODER),
        "mistral": lambda: t.MistralConfig(**_DECODER, sliding_window=5),
        "qwen2": lambda: t.Qwen2Config(**_DECODER),
        "qwen3": lambda: t.Qwen3Config(**_DECODER, head_dim=12),
        "gemma2": lambda: t.Gemma2Config(**_GEMMA, attn_logit_softcapping=2.0),
        "gemma3": lambda: t.Gemma3TextConfig(**_GEMMA),
        "phi3": lambda: t.Phi3Config(**_DECODER, sliding_window=5),
        "t5": lambda: t.T5Config(
            vocab_size=99,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            relative_attention_num_buckets=8,
        ),
        "bart": lambda: t.BartConfig(
            vocab_size=99,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=40,
            forced_eos_token_id=None,
        ),
    }[family]()
    for name in ("initializer_range", "init_std"):
        if hasattr(made, name):
            setattr(made, name, 0.2)  # large enough that a wrong mask shows
    return made


def build(family: str, head: str | None = None, **overrides):
    """A random model in evaluation mode, dropout off in the config; ``head`` names another auto class."""
    made = config(family)
    for name, value in overrides.items():
        setattr(made, name, value)
    for name in vars(made):
        if "dropout" in name or "pdrop" in name:
            setattr(made, name, overrides.get(name, 0.0))
    if head is None:
        auto = t.AutoModelForMaskedLM if family in ENCODERS else t.AutoModelForCausalLM
        auto = t.AutoModelForSeq2SeqLM if family in SEQ2SEQ else auto
    else:
        auto = getattr(t, head)
    torch.manual_seed(0)
    return auto.from_config(made).eval()


def widest(family: str) -> torch.dtype:
    """The dtype in which two ways through a model are compared."""
    # transformers' attention with a soft-cap takes the softmax in float32, where a float64 mask's minimum is -inf and
    # padding becomes NaN.
    return torch.float32 if family == "gemma2" else torch.float64


def rounding(family: str) -> dict:
    """How far two ways through a model of that dtype may differ: tolerances of `torch.testing.assert_close`."""
    return {"rtol": 1e-4, "atol": 1e-4} if widest(family) == torch.float32 else {"rtol": 1e-8, "atol": 1e-9}


def inputs(family: str, padding: str | None = None, batch: int = 3, length: int = 12, seed: int = 0) -> dict:
    """Random token ids; ``padding``: "left", "right" or None."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 99, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pad = {"roberta": 1, "bart": 1}.get(family, 0)
    if padding:
        for row in range(1, batch):
            hidden = slice(0, 2 * row + 1) if padding == "left" else slice(length - 2 * row - 1, length)
            given["attention_mask"][row, hidden] = 0
            ids[row, hidden] = pad
    if family in SEQ2SEQ:
        given["decoder_input_ids"] = torch.randint(5, 99, (batch, length - 3), generator=generator)
    return given
