"""Config fields, by model type, for which the shrinking rules fail: they depend on one another or have no default."""

_DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "max_relative_positions": 8,
    "type_vocab_size": 0,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_d_ssm": None}
_TWO_HEAD_SIZES = {
    "global_head_dim": 16,
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
}
_HEADS = {"head_dim": 8, "num_key_value_heads": 2}
_GEMMA3N = {
    "num_hidden_layers": 5,
    "layer_types": _TWO_HEAD_SIZES["layer_types"],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": [40] * 5,
    "activation_sparsity_pattern": [0.0] * 5,
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
OVERRIDES: dict[str, dict] = {
    "bailing_hybrid": {**_FEW_EXPERTS, "n_group": 1, "topk_group": 1},
    "kimi_linear": _FEW_EXPERTS,
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "qwen4_exp": {"text_config": _INDEXED},
    "gemma4_unified_assistant": {"text_config": {**_TWO_HEAD_SIZES, "num_kv_shared_layers": 0}},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "kolibri1": _FEW_EXPERTS,
    "shieldgemma2": {"yes_token_index": 90, "no_token_index": 91},
    "mobilevitv2": {"image_size": 128},
    "vision-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "speech-encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deberta": _DISENTANGLED,
    "deberta-v2": {**_DISENTANGLED, "position_buckets": 4, "share_att_key": True},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 98, "token_dropout": False},
    "esmc": {"vocab_size": 99},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _TWO_HEAD_SIZES,
    "gemma4_unified_text": _TWO_HEAD_SIZES,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "mamba2": {"num_heads": 8},
    "ministral": _HEADS,
    "mllama": {
        "text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
        "vision_config": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "num_global_layers": 1},
    },
    "llama4": {
        "vision_config": {
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128,
        },
    },
    "mobilebert": {"normalization_type": "layer_norm"},
    "mpnet": {"relative_attention_num_buckets": 32},
    "nemotron": _HEADS,
    "neomme": {"head_dim": 16},
    "qwen4_exp_text": _INDEXED,
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 16], "attn_layers": ["local", "lsh"], "num_buckets": 4,
    },
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid", "mamba"],
    },
}  # fmt: skip
# Multimodal rotary sections add up to half the head.
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
for _name in ("qwen2_vl", "qwen2_5_vl", "paddleocr_vl", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga"):
    OVERRIDES[_name] = {"text_config": {"rope_parameters": dict(_SECTIONS)}}
for _name in ("swin", "swinv2", "donut-swin"):
    OVERRIDES[_name] = {
        "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 24, "patch_size": 2,
    }  # fmt: skip

for _name in ("blip-2", "instructblip"):
    OVERRIDES[_name] = {"image_token_index": 98}
for _name in ("llava_next", "llava_next_video", "llava_onevision"):
    OVERRIDES[_name] = {"image_grid_pinpoints": [[256, 128], [128, 256]]}

_OMNI = {
    "vision_start_token_id": 95, "vision_end_token_id": 94, "audio_start_token_id": 93, "audio_end_token_id": 92,
}  # fmt: skip
_FEW_BLOCKS = {
    "base_channels": 32, "latent_channels": 8, "channel_multiplier": [1, 1], "num_res_blocks": 1, "resolution": 64,
}  # fmt: skip
OVERRIDES |= {
    "chameleon": {"vocabulary_map": {"<image>": 98, "IMGIMGAZ": 97}, "vq_config": _FEW_BLOCKS},
    "emu3": {
        "vocabulary_map": {"<image>": 98, "<|extra_200|>": 97, "<|visual token 000001|>": 96},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1},
    },
    "cohere_compass": {"text_config": OVERRIDES["cohere_compass_text"]},
    "cosmos3_edge": {"text_config": {"rope_parameters": dict(_SECTIONS)}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 2]}}},
    "florence2": {
        "vision_config": {
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "depths": [1] * 4,
        },
    },
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS, "partial_rotary_factor": 1.0}}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 8}},
    "hunyuan_vl": {
        "text_config": {"head_dim": 8, "rope_parameters": {**_SECTIONS, "mrope_section": [1, 1, 1, 1]}},
    },
    "align": {"vision_config": {"hidden_dim": 640}},
    "udop": {"max_2d_position_embeddings": 1024},
    "instructblipvideo": {"video_token_index": 98},
    "janus": {"vq_config": _FEW_BLOCKS},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "muse_spark": {"vision_config": {"hidden_sizes": [16, 16, 32, 32], "depths": [1] * 4, "patch_sizes": [4, 2, 2, 2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen2_5_omni_thinker": {**_OMNI, "text_config": {"rope_parameters": dict(_SECTIONS)}},
    "qwen3_omni_moe_thinker": _OMNI,
    "step3p7": {"text_config": {"sliding_window": 5}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "wav2vec2-bert": {"vocab_size": 99},
    "wav2vec2-conformer": {"vocab_size": 99},
}

# Models whose position bias is relative to the last key.
FROM_END = {"mpt"}


def of(model_type: str, kind: str) -> dict:
    """Overrides of one architecture."""
    found = dict(OVERRIDES.get(model_type, {}))
    if kind == "causal" and model_type == "reformer":
        found["is_decoder"] = True
    if kind == "causal" and model_type == "xlm":
        found["causal"] = True
    return found
