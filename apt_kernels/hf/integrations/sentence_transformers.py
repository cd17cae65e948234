"""sentence-transformers: folders that hold an adapter in the place of the transformers model.

`SentenceTransformer.save_pretrained` calls ``save_pretrained`` of the transformers model inside, which writes the
adapter. When sentence-transformers reads such a folder, the base model is loaded from the name or path in the adapter's
record, as PEFT does it, and the adapter is loaded into it. This package has to be imported
(``import apt_kernels``); without it, transformers refuses the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ...errors import AdapterError
from ...wrapping import when_loaded, wrap
from .. import compat, events
from ..adapter_file import WEIGHTS, open_adapter
from ..checkpoint import load
from ..state import state_of
from ..untrusted import read_json_file, shown

# The config.json beside an adapter. With a model's config, from_pretrained would create a model with random weights.
# transformers quotes the type where it refuses the folder, and where it reads a tokenizer from it.
_TYPE = "apt_kernels adapter"
NO_MODEL = {
    "model_type": f"{_TYPE} (prefixes without a model: apt_kernels.load loads them into one, as does "
    "SentenceTransformer(folder) after `import apt_kernels`)",
    "transformers_weights": "an apt_kernels adapter holds no model, apt_kernels.load loads it into one.safetensors",
}
_MODULE = "sentence_transformers.base.modules.transformer"
_INSTEAD = (
    "Call apt_kernels.save(model, folder) with the transformers model inside, and load it into the base model with "
    "apt_kernels.load; give its trainer save_strategy='no'"
)


def is_ours(config) -> bool:
    """Whether ``config``, the contents of a config.json, is `NO_MODEL` of this or an earlier version."""
    return isinstance(config, dict) and str(config.get("model_type")).startswith(_TYPE)


def join_sentence_transformers() -> None:
    """Wrap the two methods by which its Transformer module reads a folder. Once per process, or at its import."""
    when_loaded("sentence_transformers", _join)


def _join() -> None:
    if compat.available("sentence-transformers"):
        module = sys.modules[_MODULE].Transformer
        wrap(module, "_load_config", _load_config)
        wrap(module, "_load_model", _load_model)


def refuse(model, folder: Path) -> None:
    """Raise `AdapterError` if sentence-transformers saves to ``folder`` and could not read back what is written."""
    reason = None
    if not (folder / "config_sentence_transformers.json").exists():
        return
    if not model.config.name_or_path:
        reason = "the base model has no name or path (config.name_or_path) to load it from again"
    elif events.added_parameters(model):
        reason = "sentence-transformers would read the weights that PEFT added without the prefix"
    elif any(prefix.mlp is not None for prefix in state_of(model).prefixes.values()):
        reason = "an adapter holds no reparameterisation, so that training could not go on from it"
    elif _MODULE in sys.modules and compat.missing("sentence-transformers"):
        reason = compat.message("sentence-transformers")
    if reason is not None:
        raise AdapterError(f"sentence-transformers could not load the prefix back from {folder}: {reason}. {_INSTEAD}")


def _load_config(original, self, model_name_or_path, backend, config_kwargs):
    found = _base_of(model_name_or_path, config_kwargs)
    if found is None:
        return original(self, model_name_or_path, backend, config_kwargs)
    return original(self, found[0], backend, _of_the_base(config_kwargs))


def _load_model(original, self, model_name_or_path, *args, **kwargs):
    found = _base_of(model_name_or_path, kwargs)
    if found is None:
        return original(self, model_name_or_path, *args, **kwargs)
    base, folder, adapter = found
    return load(original(self, base, *args, **_of_the_base(kwargs)), folder, adapter=adapter)


def _of_the_base(kwargs: dict) -> dict:
    """``kwargs`` without what says where in the hub the adapter is."""
    return {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}


def _base_of(source, kwargs: dict) -> tuple[str, Path, str | None] | None:
    """The base model's name or path, the folder, and the adapter's name; None: the folder holds no adapter of ours."""
    folder = Path(source, kwargs.get("subfolder") or "")
    if not (folder / WEIGHTS).is_file() or not (folder / "config.json").is_file():
        return None
    found = read_json_file(folder / "config.json")
    if not is_ours(found):
        return None
    with open_adapter(folder) as file:
        record = file.settings.get("base")
        base = record.get("name_or_path") if isinstance(record, dict) else None
        adapter = file.settings.get("adapter")
        if not isinstance(base, str) or not base or not isinstance(adapter, (str, type(None))):
            raise AdapterError(
                f"{file.path} does not name the base model ({shown(base)}): load that with sentence-transformers, and "
                "the adapter into the transformers model inside with apt_kernels.load(model, folder)"
            )
    return base, folder, adapter
