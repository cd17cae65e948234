"""Checks for what cannot be served: an error when the engine starts, instead of output without the prefix."""

from __future__ import annotations

from ...errors import ConfigError

SEVERAL = "several adapters"


def not_served(reason: str, what: str = "this adapter") -> ConfigError:
    return ConfigError(f"vLLM cannot serve {what}: {reason}")


def check_engine(vllm_config) -> None:
    """Raise `ConfigError` for settings of the engine with which the prefix would be wrong or is not tested."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model = vllm_config.model_config
    reasons = {
        "pipeline_parallel_size is above 1; use tensor_parallel_size": parallel.pipeline_parallel_size > 1,
        "decode_context_parallel_size or prefill_context_parallel_size is above 1": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1,
        "microbatches (enable_dbo, ubatch_size) run two forwards at a time": getattr(parallel, "use_ubatching", False),
        "speculative_config is set; speculative decoding is not tested": vllm_config.speculative_config is not None,
        "kv_transfer_config is set; the marker is in this engine's cache alone": vllm_config.kv_transfer_config
        is not None,
        f"the key/value cache is quantised (kv_cache_dtype={cache.cache_dtype!r}), which rounds the marker; use "
        "kv_cache_dtype='auto'": _quantised(cache.cache_dtype),
        "additional_config is not a dict": not isinstance(vllm_config.additional_config, dict),
        "the base model is an encoder-decoder model": bool(model.is_encoder_decoder),
        "the base model is not run as a decoder that generates (runner)": model.runner_type != "generate",
        "enable_sleep_mode is set; waking up empties the marker's block": bool(
            getattr(model, "enable_sleep_mode", False)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise not_served(reason)


def check_several(vllm_config, rust_frontend: bool) -> None:
    """Raise `ConfigError` for settings of the engine with which a request's choice of adapter would be lost."""
    reasons = {
        "enable_lora is set; LoRA and named adapters cannot be used together": vllm_config.lora_config is not None,
        "model runner V2 is not supported; set VLLM_USE_V2_MODEL_RUNNER=0": vllm_config.use_v2_model_runner,
        "VLLM_USE_RUST_FRONTEND is set; it does not load the plugin that checks the adapter's name": rust_frontend,
    }
    for reason, applies in reasons.items():
        if applies:
            raise not_served(reason, SEVERAL)


def check_layer(layer, site: str) -> None:
    """Raise `ConfigError` for an attention layer whose kernel would hide or change the marker."""
    impl = layer.impl
    reasons = {
        "uses a sliding window, which would hide the marker": layer.sliding_window is not None,
        "caps its logits (soft-cap), which would change the marker's": bool(getattr(impl, "logits_soft_cap", None)),
        "adds ALiBi biases, which would change the marker's logit": getattr(impl, "alibi_slopes", None) is not None,
        "has attention sinks": bool(getattr(layer, "has_sink", False)),
        "is not causal self-attention": layer.attn_type != "decoder",
        "shares the key/value cache of another layer": layer.kv_sharing_target_layer_name is not None,
        "has values of another head size than its keys": layer.head_size_v != layer.head_size,
        "has a quantised key/value cache": _quantised(layer.kv_cache_dtype),
    }
    for reason, applies in reasons.items():
        if applies:
            raise not_served(f"{site} {reason}")
    if not hasattr(impl, "do_kv_cache_update"):
        raise not_served(f"{layer.attn_backend.get_name()} does not write the key/value cache in a step of its own")


def _quantised(dtype: str) -> bool:
    return dtype not in ("auto", "float16", "bfloat16", "half", "float", "float32")
