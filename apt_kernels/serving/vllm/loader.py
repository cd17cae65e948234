"""vLLM's load format ``apt_kernels``: loads the base model with another format and adds the adapter's prefixes."""

from __future__ import annotations

import copy

from torch import nn
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ...errors import ConfigError
from . import adapter as adapters
from . import first_gate, refusals
from .attach import attach

LOAD_FORMAT = "apt_kernels"
# Keys of ``model_loader_extra_config`` that are ours; the others belong to the base model's load format.
_ADAPTER, _BASE = "adapter", "load_format"


def register() -> None:
    """Add the load format, once in a process."""
    from vllm.model_executor import model_loader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not PrefixModelLoader:
        register_model_loader(LOAD_FORMAT)(PrefixModelLoader)


class PrefixModelLoader(BaseModelLoader):
    """Loads the base model, and then the adapter that ``model_loader_extra_config`` names.

    Its keys: ``"adapter"``, a folder that `apt_kernels.save` wrote or a repository of the Hugging Face hub;
    ``"load_format"``, that of the base model, default ``"auto"``; any other is passed to that load format.

    Raises:
        ConfigError: ``"adapter"`` is missing, or the engine's settings or the model cannot be served.
        AdapterError: the adapter is missing, damaged, or of another base model.
    """

    def __init__(self, load_config):
        super().__init__(load_config)
        options = dict(load_config.model_loader_extra_config or {})
        self._source = options.pop(_ADAPTER, None)
        if self._source is None:
            raise ConfigError(
                f"model_loader_extra_config is {load_config.model_loader_extra_config!r}; load_format "
                f"{LOAD_FORMAT!r} needs {{'{_ADAPTER}': FOLDER}}"
            )
        base = copy.copy(load_config)
        base.load_format, base.model_loader_extra_config = options.pop(_BASE, "auto"), options
        if base.load_format == LOAD_FORMAT:
            raise ConfigError(f"model_loader_extra_config has the {_BASE} {LOAD_FORMAT!r}; it needs the base model's")
        self._base = get_model_loader(base)

    def get_external_weight_memory(self, vllm_config) -> int:
        return self._base.get_external_weight_memory(vllm_config)

    def download_model(self, model_config) -> None:
        self._base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config) -> None:
        self._base.load_weights(model, model_config)

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        # Checked before the base model is loaded, which may take minutes.
        refusals.check_engine(vllm_config)
        adapter = adapters.read(self._source, model_config.hf_config)
        model = self._base.load_model(vllm_config, model_config, prefix)
        attach(model, adapter)
        _split_at(vllm_config.compilation_config, first_gate.OPERATOR)
        # vLLM caches compiled graphs by its settings. Graphs of one adapter cannot be used with another one.
        vllm_config.additional_config = {**vllm_config.additional_config, LOAD_FORMAT: adapter.digest}
        return model


def _split_at(config, operator: str) -> None:
    """Exclude an operator from captured CUDA graphs, like vLLM's attention: it reads the step's metadata."""
    if config.splitting_ops and operator not in config.splitting_ops:
        config.splitting_ops = [*config.splitting_ops, operator]
