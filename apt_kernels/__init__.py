"""Adaptive Prefix Tuning fused into attention: exact, complete, and fast. See README.md."""

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from .config import AptConfig
from .errors import AdapterError, ArgumentError, ConfigError, ImplementationError, PatchError
from .mask import Mask
from .onnx import OnnxFunctions
from .ops.attention import attention, selected
from .ops.choose import info
from .prefix.adaptive import AdaptivePrefix
from .wrapping import when_loaded as _when_loaded
from .wrapping import wrap as _wrap

if TYPE_CHECKING:
    from .hf.adapters import adapters, add_adapter, delete_adapter, set_adapter
    from .hf.attention.cache_export import register_cache_for_export
    from .hf.checkpoint import load, save
    from .hf.composing import compose
    from .hf.export import as_past_key_values, export
    from .hf.folding import fold
    from .hf.initialise import patch_from_peft, patch_from_text
    from .hf.integrations.gate_callback import GateCallback
    from .hf.optimizer import parameter_groups
    from .hf.patching import patch, unpatch
    from .hf.probing import LayerProbe, Probe, probe, prune
    from .hf.reference import reference_model
    from .hf.state import prefixes
    from .hf.summary import summary
    from .hf.toggle import disabled

# These need transformers, which is imported with the first of them.
_HUGGING_FACE = {
    "patch": ".hf.patching",
    "unpatch": ".hf.patching",
    "prefixes": ".hf.state",
    "disabled": ".hf.toggle",
    "summary": ".hf.summary",
    "parameter_groups": ".hf.optimizer",
    "adapters": ".hf.adapters",
    "add_adapter": ".hf.adapters",
    "set_adapter": ".hf.adapters",
    "delete_adapter": ".hf.adapters",
    "compose": ".hf.composing",
    "save": ".hf.checkpoint",
    "load": ".hf.checkpoint",
    "probe": ".hf.probing",
    "prune": ".hf.probing",
    "LayerProbe": ".hf.probing",
    "Probe": ".hf.probing",
    "reference_model": ".hf.reference",
    "GateCallback": ".hf.integrations.gate_callback",
    "fold": ".hf.folding",
    "export": ".hf.export",
    "as_past_key_values": ".hf.export",
    "register_cache_for_export": ".hf.attention.cache_export",
    "patch_from_text": ".hf.initialise",
    "patch_from_peft": ".hf.initialise",
}

__all__ = [
    "AdapterError",
    "AdaptivePrefix",
    "AptConfig",
    "ArgumentError",
    "ConfigError",
    "GateCallback",
    "ImplementationError",
    "LayerProbe",
    "Mask",
    "OnnxFunctions",
    "PatchError",
    "Probe",
    "adapters",
    "add_adapter",
    "as_past_key_values",
    "attention",
    "compose",
    "delete_adapter",
    "disabled",
    "export",
    "fold",
    "info",
    "load",
    "parameter_groups",
    "patch",
    "patch_from_peft",
    "patch_from_text",
    "prefixes",
    "probe",
    "prune",
    "reference_model",
    "register_cache_for_export",
    "save",
    "selected",
    "set_adapter",
    "summary",
    "unpatch",
]
__version__ = "0.1.0"


if not TYPE_CHECKING:  # to a type checker, other names are mistakes

    def __getattr__(name: str):
        if name in _HUGGING_FACE:
            return getattr(_import_module(_HUGGING_FACE[name], __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# These libraries read a folder that may hold a prefix before any function of this package is called. What joins them is
# imported when their class is first used, not at their own import: other libraries may be half imported then.
def _join_at_first_use(module: str, owner: str, integration: str) -> None:
    def created(original, *args, **kwargs):
        getattr(_import_module(f".hf.integrations.{integration}", __name__), f"join_{integration}")()
        return original(*args, **kwargs)

    def loaded() -> None:
        if hasattr(_sys.modules[module], owner):
            _wrap(getattr(_sys.modules[module], owner), "__init__", created)

    _when_loaded(module, loaded)


_join_at_first_use("peft", "PeftModel", "peft")
_join_at_first_use("sentence_transformers.base.modules.transformer", "Transformer", "sentence_transformers")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
