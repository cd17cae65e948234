"""What the patch leans on in transformers and PEFT beyond their documented interface, checked before it is used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib.metadata import version

from ..errors import PatchError

# Module -> names in it, with attributes after a dot.
TRANSFORMERS = {
    "transformers": (
        "AttentionInterface.register",
        "AttentionMaskInterface.register",
        "DynamicCache",
        "PreTrainedConfig._attn_implementation",
        "PreTrainedModel._hf_peft_config_loaded",
        "PreTrainedModel._keys_to_ignore_on_save",
        "PreTrainedModel._supports_sdpa",
        "PreTrainedModel.base_model",
        "GenerationMixin.destroy_cached_continuous_batching_manager",
        "GenerationMixin.init_continuous_batching",
    ),
    "transformers.cache_utils": tuple(
        f"Cache.{name}"
        for name in (
            "batch_repeat_interleave",
            "batch_select_indices",
            "crop",
            "get_seq_length",
            "reorder_cache",
            "reset",
        )
    ),
    "transformers.masking_utils": (
        "and_masks",
        "bidirectional_mask_function",
        "causal_mask_function",
        "packed_sequence_mask_function",
        "prepare_padding_mask",
        "sdpa_mask",
        "sliding_window_bidirectional_overlay",
        "sliding_window_overlay",
    ),
    "transformers.modeling_layers": ("GradientCheckpointingLayer.gradient_checkpointing",),
    "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
}
# Module -> attributes that its classes give to their instances: they have to occur in its source.
TRANSFORMERS_INSTANCES = {
    "transformers.configuration_utils": ("_attn_implementation_internal",),
    "transformers.modeling_layers": ("_gradient_checkpointing_func",),
    "transformers.generation.continuous_batching.continuous_api": ("_cached_continuous_batching_manager",),
}
# What a mask function made by transformers closes over: hf/masks.py reads it there.
_CLOSURES = {
    "and_masks": "mask_functions",
    "packed_sequence_mask_function": "packed_sequence_mask",
    "sliding_window_bidirectional_overlay": "sliding_window",
    "sliding_window_overlay": "sliding_window",
}
PEFT = {
    "peft.peft_model": ("PeftModel.load_adapter", "PeftModel.save_pretrained"),
    "peft.tuners.tuners_utils": ("BaseTuner.inject_adapter", "BaseTunerLayer"),
    "peft.utils.other": ("AuxiliaryTrainingWrapper",),
}


def check_transformers() -> None:
    """Raise one `PatchError` that names transformers' release and all that is missing in it."""
    missing = [*_missing(TRANSFORMERS), *_missing_in_source(TRANSFORMERS_INSTANCES)]
    _refuse("transformers", missing or list(_other_closures()))


def check_peft() -> None:
    """The same for PEFT."""
    _refuse("peft", list(_missing(PEFT)))


def _refuse(package: str, missing: list[str]) -> None:
    if missing:
        raise PatchError(
            f"{package} {version(package)} lacks {', '.join(missing)}, on which the patch relies. It was made for "
            f"{_NEEDS[package]}; install one of those, or a newer apt_kernels"
        )


_NEEDS = {"transformers": "transformers 5.17 to 5.23", "peft": "peft 0.21"}


def _missing(wanted: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for module, names in wanted.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            yield module
            continue
        for name in names:
            owner = found
            for part in name.split("."):
                owner = getattr(owner, part, _NOTHING)
            if owner is _NOTHING:
                yield f"{module}.{name}"


class _Nothing:
    """Has no attribute that could be mistaken for a wanted one."""

    def __getattr__(self, name: str):
        raise AttributeError(name)


_NOTHING = _Nothing()


def _missing_in_source(wanted: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for module, names in wanted.items():
        try:
            source = inspect.getsource(importlib.import_module(module))
        except (ImportError, OSError):
            yield module
            continue
        yield from (f"{module}: {name}" for name in names if name not in source)


def _other_closures() -> Iterator[str]:
    masking = importlib.import_module("transformers.masking_utils")
    for factory, variable in _CLOSURES.items():
        made = getattr(masking, factory)(masking.causal_mask_function if factory == "and_masks" else 3)
        code = getattr(made, "__code__", None)
        if code is None or variable not in code.co_freevars or not made.__qualname__.startswith(f"{factory}."):
            yield f"transformers.masking_utils.{factory} (a function that closes over {variable})"
