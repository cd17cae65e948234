"""A tiny config of any architecture: every field that looks like a size becomes small."""

from __future__ import annotations

import re
from dataclasses import fields

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY, POSITIONS = 32, 4, 8, 40, 99, 64
_MOST_LAYERS = 8

# The first pattern that matches a field's whole name gives its small value; a function receives the default.
_RULES: list[tuple[str, object]] = [
    (r"chunk_size_feed_forward|pretraining_tp|seed|num_labels|num_channels|in_channels|num_logits_to_keep", None),
    (r"(num_)?(key_value|kv)_heads|.*num_(key_value|kv)_heads|num_query_groups", "kv_heads"),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads|linear_num_heads|index_n_heads|mamba_num_heads|index_head_count", 4),
    (r"num_attention_heads_per_layer", None),
    (r"(.*_)?(n_heads?|num_heads|attention_heads|num_.*attention_heads|n_head)", HEADS),
    (r"qk_rope_head_dim|qk_nope_head_dim|index_head_dim|linear_.*head_dim|rotary_dim", HEAD_DIM),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"v_head_dim", HEAD_DIM + 4),
    (r"kv_lora_rank|q_lora_rank|.*lora_rank|.*_rank|hc_lowrank", lambda old: min(old, 16)),
    (r"query_pre_attn_scalar", 12),
    (r"(.*_)?(head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_dim|attention_head_size)", HEAD_DIM),
    (r"mamba_d_head|mamba_headdim|mamba_head_dim", HEAD_DIM),
    (r"(mamba_)?(d_state|state_size|ssm_state_size)", 8),
    (r"mamba_n_groups|mamba_ngroups|n_groups", 1),
    (r"(.*_)?chunk_size", lambda old: min(old, 8)),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|.*_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|num_experts_per_.*", lambda old: min(old, 2)),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*vocab_size.*", "vocabulary"),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|.*max_position_embeddings|"
        r"max_source_positions|max_target_positions|context_length|max_2d_position_embeddings|max_relative_positions",
        lambda old: min(old, POSITIONS) if old > 0 else old,
    ),
    (r"type_vocab_size", None),
    (r"vision_feature_layer", lambda old: -1),
    (r"mm_tokens_per_image|vision_soft_tokens_per_image", 4),
    (r"sliding_window|sliding_window_size|local_attention|attention_window_size", lambda old: min(old, 5)),
    (r"attention_chunk_size", lambda old: min(old, 6)),
    (r"relative_attention_num_buckets|position_bias_num_buckets|num_buckets", 8),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|feed_forward_size|n_inner|d_inner).*",
        lambda old: FEED_FORWARD if old else old,
    ),
    (r"image_size", "image_size"),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|emb_dim|embed_dim|embedding_size|embedding_dim|embed_proj_dim|hidden_dim|dim|"
        r"mid_dim|lru_width|projection_dim|adapter_input_size|out_hidden_size|d_latents)(_.*)?",
        lambda old: WIDTH if old > WIDTH else old,
    ),
    (r"(.*_)?(num_hidden_layers|n_layers?|num_layers|layers|num_.*_layers|depth)", "layers"),
]
_RULES = [(re.compile(pattern), rule) for pattern, rule in _RULES]
_TOKEN = re.compile(r".*(token_id|token_index|_index|token)$")


def tiny(model_type: str, overrides: dict | None = None) -> PreTrainedConfig:
    """A tiny config of the architecture; ``overrides`` (nested by sub-config) win over the rules.

    ``_start`` among them holds arguments without which the default config itself cannot be made.
    """
    return _tiny(CONFIG_MAPPING[model_type], overrides or {})


def _tiny(config_class: type, overrides: dict) -> PreTrainedConfig:
    default = config_class(**overrides.pop("_start", {}))
    own = {f.name for f in fields(config_class)}
    given = {}
    layers = _layers(default, own)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = _tiny(type(value), dict(overrides.pop(name, {})))
        elif name in own and not name.startswith("_"):
            small = _small(name, value, default, layers)
            if small is not None:
                given[name] = small
    _spread_token_ids(default, own, given)
    given.update(overrides)
    return config_class(**given)


def _small(name: str, value, default, layers: int):
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
        return 0.0
    if name in ("initializer_range", "init_std"):
        return 0.2
    if isinstance(value, (list, tuple)):
        full = vars(default).get("num_hidden_layers")
        if isinstance(full, int) and len(value) == full and full > layers:
            return type(value)(value[:layers])
        return None
    if not isinstance(value, int):
        return None
    for pattern, rule in _RULES:
        if pattern.fullmatch(name):
            return _apply(rule, name, value, default, layers)
    return None


def _apply(rule, name: str, value: int, default, layers: int):
    if rule is None:
        return None
    if callable(rule):
        return rule(value)
    if isinstance(rule, int):
        return min(rule, value)
    if rule == "kv_heads":
        heads = next(
            (vars(default)[n] for n in ("num_attention_heads", "n_head", "num_heads") if n in vars(default)), None
        )
        return min(value, 1 if value == 1 else HEADS if value == heads else 2)
    if rule == "vocabulary":
        return min(value, VOCABULARY)
    if rule == "image_size":
        patch = vars(default).get("patch_size")
        return min(value, 4 * patch) if isinstance(patch, int) else min(value, 64)
    return min(value, layers)


def _layers(default, own: set[str]) -> int:
    """The least number of layers, at least two, that includes every kind of layer."""
    full = vars(default).get("num_hidden_layers", 2)
    kinds = [
        list(v)
        for n, v in vars(default).items()
        if isinstance(v, (list, tuple)) and len(v) == full and all(isinstance(x, (str, int, bool)) for x in v)
    ]
    if not kinds:
        return 2
    rows = list(zip(*kinds))
    need = 1 + max(rows.index(row) for row in set(rows))
    return min(max(2, need), _MOST_LAYERS, full)


def _spread_token_ids(default, own: set[str], given: dict) -> None:
    """Special tokens get ids of their own at the end of the vocabulary; padding stays where it is if it can."""
    free = VOCABULARY - 1
    for name in sorted(own):
        value = vars(default).get(name)
        if not _TOKEN.fullmatch(name) or isinstance(value, bool) or name in given:
            continue
        if isinstance(value, int) and value >= 5:
            given[name], free = free, free - 1
        elif isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
            given[name], free = [free], free - 1


def perturb(model, seed: int = 0) -> None:
    """Perturb every parameter: zero-initialised gates and biases would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * draw.to(parameter.dtype))
