"""Errors for engine settings, layers and adapters that cannot be served. Runs without vLLM."""

from types import SimpleNamespace

import pytest
import torch

import apt_kernels
from apt_kernels.serving.vllm import adapter as adapters
from apt_kernels.serving.vllm import refusals, settings
from helpers import models
from helpers.patched import randomise


def engine(**changes):
    """The parts of a `VllmConfig` that are read, with a change such as ``parallel__pipeline_parallel_size=2``."""
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(is_encoder_decoder=False, runner_type="generate", enable_sleep_mode=False),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        use_v2_model_runner=False,
        additional_config={},
    )
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        setattr(getattr(config, f"{part}_config") if part else config, field, value)
    return config


def layer(**changes):
    impl = SimpleNamespace(logits_soft_cap=0, alibi_slopes=None, do_kv_cache_update=None)
    found = SimpleNamespace(
        impl=impl,
        attn_backend=SimpleNamespace(get_name=lambda: "SOME_ATTN"),
        sliding_window=None,
        has_sink=False,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        head_size=32,
        head_size_v=32,
        kv_cache_dtype="auto",
    )
    for name, value in changes.items():
        setattr(impl if hasattr(impl, name) else found, name, value)
    return found


def test_plain_settings_are_served():
    refusals.check_engine(engine())
    refusals.check_layer(layer(), "model.layers.0.self_attn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel__pipeline_parallel_size": 2}, "pipeline_parallel_size"),
        ({"parallel__decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"parallel__prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"parallel__use_ubatching": True}, "enable_dbo"),
        ({"speculative_config": object()}, "speculative_config"),
        ({"kv_transfer_config": object()}, "kv_transfer_config"),
        ({"cache__cache_dtype": "fp8"}, "kv_cache_dtype='fp8'"),
        ({"model__is_encoder_decoder": True}, "encoder-decoder"),
        ({"model__runner_type": "pooling"}, "runner"),
        ({"model__enable_sleep_mode": True}, "enable_sleep_mode"),
        ({"additional_config": object()}, "additional_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_the_engine(change, message):
    with pytest.raises(apt_kernels.ConfigError, match=f"^vLLM cannot serve this adapter: .*{message}"):
        refusals.check_engine(engine(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 32}, "sliding window"),
        ({"logits_soft_cap": 30.0}, "soft-cap"),
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"has_sink": True}, "sinks"),
        ({"attn_type": "encoder_only"}, "causal"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "another layer"),
        ({"head_size_v": 16}, "head size"),
        ({"kv_cache_dtype": "fp8"}, "quantised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_of_the_model(change, message):
    with pytest.raises(apt_kernels.ConfigError, match=f"layers.0.self_attn .*{message}"):
        refusals.check_layer(layer(**change), "layers.0.self_attn")


@pytest.mark.parametrize(
    ("change", "rust", "message"),
    [
        ({"lora_config": object()}, False, "enable_lora"),
        ({"use_v2_model_runner": True}, False, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({}, True, "VLLM_USE_RUST_FRONTEND"),
    ],
    ids=["LoRA", "V2", "Rust"],
)
def test_settings_of_an_engine_with_several_adapters(change, rust, message):
    refusals.check_several(engine(), False)
    with pytest.raises(apt_kernels.ConfigError, match=f"^vLLM cannot serve several adapters: .*{message}"):
        refusals.check_several(engine(**change), rust)


def test_the_setting_that_names_adapters():
    options = {"adapters": {"sql": "a", "style": "b"}, "load_format": "dummy"}
    assert settings.take(options) == {"sql": "a", "style": "b"}
    assert options == {"load_format": "dummy"}
    assert settings.take({"adapter": "a"}) == {None: "a"}


@pytest.mark.parametrize(
    "options",
    [{}, {"adapter": "a", "adapters": {"sql": "b"}}, {"adapters": {}}, {"adapters": ["a"]}, {"adapters": {"": "a"}}],
    ids=str,
)
def test_settings_that_name_no_adapters(options):
    with pytest.raises(apt_kernels.ConfigError, match="NAME: FOLDER"):
        settings.take(options)


def load_config(load_format="apt_kernels", **extra):
    return SimpleNamespace(load_format=load_format, model_loader_extra_config=extra)


def test_the_named_adapters_of_an_engine():
    assert settings.named(load_config(adapters={"sql": "a"})) == {"sql": "a"}
    assert settings.named(load_config(adapter="a")) == {}
    assert settings.named(load_config("auto")) is None


@pytest.mark.parametrize(
    ("extra_args", "model", "name"),
    [(None, None, None), ({}, "sql", "sql"), ({"apt_adapter": "sql"}, None, "sql"), ({"apt_adapter": "b"}, "b", "b")],
)
def test_the_adapter_of_a_request(extra_args, model, name):
    assert settings.chosen({"sql": "a", "b": "c"}, extra_args, model) == name


@pytest.mark.parametrize(
    ("adapters", "extra_args", "model", "message"),
    [
        (
            {"sql": "a", "b": "c"},
            {"apt_adapter": "x"},
            None,
            "names the adapter 'x'; this engine's adapters are 'sql', 'b'",
        ),
        ({"sql": "a"}, {"apt_adapter": 1}, None, "names the adapter 1; "),
        ({"sql": "a"}, None, "x", "names the adapter 'x'; "),
        ({"sql": "a", "b": "c"}, {"apt_adapter": "sql"}, "b", "the model 'b' and apt_adapter 'sql'"),
        ({}, {"apt_adapter": "sql"}, None, "one adapter without a name"),
    ],
    ids=["unknown", "no string", "unknown model", "two", "single"],
)
def test_a_request_that_names_no_adapter_of_the_engine(adapters, extra_args, model, message):
    with pytest.raises(apt_kernels.ConfigError, match=message):
        settings.chosen(adapters, extra_args, model)


def test_a_kernel_that_writes_the_cache_itself():
    given = layer()
    del given.impl.do_kv_cache_update
    with pytest.raises(apt_kernels.ConfigError, match="SOME_ATTN"):
        refusals.check_layer(given, "layers.0.self_attn")


def saved(folder, family="llama", **settings):
    model = models.build(family)
    apt_kernels.patch(model, prefix_length=3, **settings)
    randomise(model)
    apt_kernels.save(model, folder)
    return model


def test_an_adapter_is_read_without_its_model(tmp_path):
    model = saved(tmp_path, layers=[1])
    found = adapters.read(str(tmp_path), model.config)
    (site,) = found.layers
    assert site == "model.layers.1.self_attn"
    assert found.gate(site) == "token"
    assert torch.equal(found.layers[site]["key"], apt_kernels.prefixes(model)[site].key)


def test_the_digest_is_of_the_weights_too(tmp_path):
    model = saved(tmp_path / "a")
    first = adapters.read(str(tmp_path / "a"), model.config)
    assert adapters.read(str(tmp_path / "a"), model.config).digest == first.digest
    with torch.no_grad():
        next(iter(apt_kernels.prefixes(model).values())).key.add_(1)
    apt_kernels.save(model, tmp_path / "b")
    assert adapters.read(str(tmp_path / "b"), model.config).digest != first.digest


def test_a_gate_of_the_whole_prompt_is_refused(tmp_path):
    model = saved(tmp_path, "bert", gate="mean")
    with pytest.raises(apt_kernels.ConfigError, match="has the gate 'mean'; vLLM serves 'first', 'token', 'static' or"):
        adapters.read(str(tmp_path), model.config)


def test_weights_beside_the_prefixes_are_refused(tmp_path):
    model = saved(tmp_path, trainable="lm_head")
    with pytest.raises(apt_kernels.AdapterError, match=r"holds lm_head\.weight"):
        adapters.read(str(tmp_path), model.config)


def test_another_base_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(apt_kernels.AdapterError, match="of the type 'llama'; this one is 'qwen2'"):
        adapters.read(str(tmp_path), models.config("qwen2"))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = models.build("llama")
    apt_kernels.patch(model, prefix_length=3)
    with torch.no_grad():
        next(iter(apt_kernels.prefixes(model).values())).value.fill_(float("nan"))
    with pytest.warns(UserWarning, match="not finite"):
        apt_kernels.save(model, tmp_path)
    with pytest.raises(apt_kernels.AdapterError, match="not finite"):
        adapters.read(str(tmp_path), model.config)


@pytest.mark.parametrize("source", [5, "", {"a": "b"}])
def test_what_is_no_folder(source):
    with pytest.raises(apt_kernels.ConfigError, match="it needs a folder"):
        adapters.read(source, models.config("llama"))
