"""The private APIs of transformers, PEFT and torch that each feature uses, checked per feature.

A name that a release lacks disables only the features that need it. `missing` lists the missing names, `require` raises
a `PatchError` with them, `available` warns once and returns False, so that the caller continues without the feature.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache as memoise
from importlib.metadata import version

from ..errors import PatchError

_MADE_FOR = {
    "accelerate": "accelerate 1.15",
    "peft": "peft 0.21",
    "sentence-transformers": "sentence-transformers 6.2",
    "torch": "torch 2.11 to 2.13",
    "transformers": "transformers 5.17 to 5.23",
}


@dataclass(frozen=True)
class Feature:
    """A feature, and what it needs.

    Attributes:
        what: the feature, as a message names it.
        package: whose names it needs.
        names: module -> names in it, with attributes after a dot.
        instances: module -> attributes that its classes set on their instances: they have to occur in its source.
        check: yields what else is missing.
        without: the consequence of a missing name, for the warning of `available`.
    """

    what: str
    package: str
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    instances: dict[str, tuple[str, ...]] = field(default_factory=dict)
    check: Callable[[], Iterator[str]] = lambda: iter(())
    without: str = ""


# The closure variables of transformers' mask functions, which hf/attention/masks.py reads.
_CLOSURES = {
    "and_masks": "mask_functions",
    "packed_sequence_mask_function": "packed_sequence_mask",
    "sliding_window_bidirectional_overlay": "sliding_window",
    "sliding_window_overlay": "sliding_window",
}


def _other_closures() -> Iterator[str]:
    masking = importlib.import_module("transformers.masking_utils")
    for factory, variable in _CLOSURES.items():
        if not hasattr(masking, factory):
            continue  # already listed as missing
        made = getattr(masking, factory)(masking.causal_mask_function if factory == "and_masks" else 3)
        code = getattr(made, "__code__", None)
        if code is None or variable not in code.co_freevars or not made.__qualname__.startswith(f"{factory}."):
            yield f"transformers.masking_utils.{factory} (a function that closes over {variable})"


FEATURES = {
    # Required for every patch: checked before anything in hf is imported.
    "patch": Feature(
        "apt_kernels.patch",
        "transformers",
        {
            "transformers": (
                "AttentionInterface.register",
                "AttentionMaskInterface.register",
                "PreTrainedConfig._attn_implementation",
                "PreTrainedModel._supports_sdpa",
                "PreTrainedModel.base_model",
            ),
            "transformers.masking_utils": (
                "ALL_MASK_ATTENTION_FUNCTIONS",
                "bidirectional_mask_function",
                "causal_mask_function",
                "prepare_padding_mask",
                "sdpa_mask",
            ),
            "transformers.modeling_utils": ("ALL_ATTENTION_FUNCTIONS",),
        },
        {"transformers.configuration_utils": ("_attn_implementation_internal",)},
    ),
    "hooks": Feature(
        "apt_kernels.patch",
        "torch",
        instances={
            "torch.nn.modules.module": (
                "_buffers",
                "_forward_hooks",
                "_forward_hooks_always_called",
                "_forward_hooks_with_kwargs",
                "_forward_pre_hooks",
                "_forward_pre_hooks_with_kwargs",
                "_modules",
                "_parameters",
            )
        },
    ),
    "interrupts": Feature(
        "apt_kernels.patch",
        "torch",
        {
            "torch": (
                "_C._get_torch_function_state",
                "_C._len_torch_function_stack",
                "_C._pop_torch_function_stack",
                "_C._set_torch_function_state",
            )
        },
    ),
    "masks": Feature(
        "masks without a [T, S] tensor",
        "transformers",
        {"transformers.masking_utils": tuple(_CLOSURES)},
        check=_other_closures,
        without="Masks with windows or packed documents are built as [T, S] tensors: exact, but slower",
    ),
    "inline attention": Feature(
        "models that compute attention inline",
        "torch",
        {"torch": ("_C.DisableTorchFunction", "Tensor._version"), "torch.nn.functional": ("has_torch_function",)},
        without="Models whose attention does not go through transformers' attention interface cannot be patched",
    ),
    "gate cache": Feature(
        "gate='first' in a decoder",
        "transformers",
        {
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
            )
        },
    ),
    "patch_from_peft": Feature("patch_from_peft", "transformers", {"transformers": ("DynamicCache",)}),
    "exported caches": Feature(
        "apt_kernels.register_cache_for_export",
        "transformers",
        {
            "transformers": ("DynamicCache",),
            "transformers.integrations.executorch": ("register_dynamic_cache_export_support",),
        },
    ),
    "exported pytrees": Feature(
        "apt_kernels.register_cache_for_export",
        "torch",
        {
            "torch.fx._pytree": ("register_pytree_flatten_spec",),
            "torch.utils._pytree": ("MappingKey", "register_pytree_node"),
        },
    ),
    "export": Feature("apt_kernels.export", "transformers", {"transformers": ("DynamicCache",)}),
    "gradient checkpointing": Feature(
        "gradient checkpointing of a patched model",
        "transformers",
        {"transformers.modeling_layers": ("GradientCheckpointingLayer.gradient_checkpointing",)},
        {"transformers.modeling_layers": ("_gradient_checkpointing_func",)},
    ),
    "trainer": Feature(
        "resuming from a checkpoint with transformers' Trainer",
        "transformers",
        {"transformers": ("PreTrainedModel._keys_to_ignore_on_save",)},
        without="Trainer may report the frozen weights as missing when it resumes",
    ),
    "trainer, quantised": Feature(
        "training a quantised model with transformers' Trainer",
        "transformers",
        {"transformers": ("PreTrainedModel._hf_peft_config_loaded",)},
        without="Trainer may refuse to train the quantised model",
    ),
    "continuous batching": Feature(
        "continuous batching of a patched model",
        "transformers",
        {
            "transformers": ("GenerationMixin.init_continuous_batching",),
            "transformers.generation.continuous_batching.continuous_api": ("ContinuousBatchingManager.destroy",),
        },
        {"transformers.generation.continuous_batching.continuous_api": ("_cached_continuous_batching_manager",)},
    ),
    "peft": Feature(
        "a PEFT adapter beside prefixes",
        "peft",
        {
            "peft.peft_model": ("PeftModel._setup_prompt_encoder",),
            "peft.tuners.tuners_utils": ("BaseTuner.inject_adapter", "BaseTunerLayer"),
            "peft.utils.other": ("AuxiliaryTrainingWrapper", "prepare_model_for_kbit_training"),
        },
        without="Models that have both a PEFT adapter and prefixes are refused",
    ),
    "peft, saving": Feature(
        "saving and loading prefixes through PEFT",
        "peft",
        {"peft.peft_model": ("PeftModel.load_adapter", "PeftModel.save_pretrained")},
        without="PEFT saves and loads its own adapter without the prefixes: call apt_kernels.save and load as well",
    ),
    "base record": Feature(
        "recording the revision of an adapter's base model",
        "transformers",
        instances={"transformers.configuration_utils": ("_commit_hash",)},
        without="Saved adapters do not record the revision of their base model",
    ),
    "peft, merging": Feature(
        "saving weights into which PEFT merged an adapter",
        "peft",
        {"peft.tuners.tuners_utils": ("BaseTuner.merge_and_unload", "BaseTuner.unload")},
        without="After merge_and_unload, save the base model as well: apt_kernels.unpatch(model).save_pretrained(...)",
    ),
    "peft, names": Feature(
        "switching prefixes with PEFT's adapters",
        "peft",
        {"peft.peft_model": ("PeftModel.delete_adapter", "PeftModel.set_adapter")},
        without="PEFT switches and deletes its own adapter alone: call apt_kernels.set_adapter, delete_adapter as well",
    ),
    "sentence-transformers": Feature(
        "reading an adapter by SentenceTransformer(folder)",
        "sentence-transformers",
        {"sentence_transformers.base.modules.transformer": ("Transformer._load_config", "Transformer._load_model")},
        without="Load the base model, and the adapter into the transformers model inside with apt_kernels.load",
    ),
    "compiled models": Feature(
        "models that torch.compile wraps", "torch", instances={"torch._dynamo.eval_frame": ("_orig_mod",)}
    ),
    "checkpointed modules": Feature(
        "modules that PyTorch's activation checkpointing wraps",
        "torch",
        instances={"torch.distributed.algorithms._checkpoint.checkpoint_wrapper": ("_checkpoint_wrapped_module",)},
    ),
    "offloading": Feature(
        "a model that accelerate offloads",
        "accelerate",
        {"accelerate.hooks": ("AlignDevicesHook", "SequentialHook")},
        {
            "accelerate.hooks": (
                "_hf_hook",
                "_old_forward",
                "self.execution_device",
                "self.hooks",
                "self.offload",
                "self.offload_buffers",
                "self.place_submodules",
                "self.weights_map",
            ),
            "accelerate.utils.offload": ("self.dataset", "self.prefix", "self.state_dict"),
        },
    ),
    "fsdp": Feature(
        "FullyShardedDataParallel",
        "torch",
        instances={"torch.distributed.fsdp._common_utils": ("_fsdp_flattened", "_fsdp_wrapped_module")},
    ),
    "missing ranks": Feature(
        "the error that names the ranks which do not call save",
        "torch",
        {"torch.distributed.distributed_c10d": ("_get_default_store",)},
        without="A rank that saves alone waits until the collective's own timeout",
    ),
}


@memoise
def missing(feature: str) -> tuple[str, ...]:
    """The names that ``feature`` needs and the installed release lacks."""
    needs = FEATURES[feature]
    found = (*_missing(needs.names), *_missing_in_source(needs.instances))
    return found or tuple(needs.check())


def message(feature: str) -> str:
    """The message that names what is missing for ``feature``, and what to install."""
    needs = FEATURES[feature]
    return (
        f"{needs.package} {version(needs.package)} lacks {', '.join(missing(feature))}, which {needs.what} needs. "
        f"Install {_MADE_FOR[needs.package]}, or a newer apt_kernels"
    )


def require(*features: str) -> None:
    """Raise one `PatchError` that names all that is missing for ``features``."""
    lacking = [message(feature) for feature in features if missing(feature)]
    if lacking:
        raise PatchError("; ".join(lacking))


_warned: set[str] = set()


def available(feature: str) -> bool:
    """Whether nothing is missing for ``feature``; otherwise one warning names what is."""
    if not missing(feature):
        return True
    if feature not in _warned:
        _warned.add(feature)
        warnings.warn(f"{message(feature)}. {FEATURES[feature].without}", stacklevel=2)
    return False


def _missing(wanted: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for module, names in wanted.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            yield module
            continue
        for name in names:
            owner: object = found
            for part in name.split("."):
                owner = getattr(owner, part, _NOTHING)
            if owner is _NOTHING:
                yield f"{module}.{name}"


class _Nothing:
    """An object without attributes."""

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
