"""vLLM's load format ``apt_kernels``: loads the base model with another format and adds the adapter's prefixes."""

from __future__ import annotations

import copy

from torch import nn
from vllm import envs
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ...errors import AdapterError, ConfigError
from . import adapter as adapters
from . import first_gate, refusals, requests, settings, several
from .attach import attach
from .settings import LOAD_FORMAT


def register() -> None:
    """Add the load format, once in a process."""
    from vllm.model_executor import model_loader

    if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not PrefixModelLoader:
        register_model_loader(LOAD_FORMAT)(PrefixModelLoader)
    requests.register()


class PrefixModelLoader(BaseModelLoader):
    """Loads the base model, and then the adapters that ``model_loader_extra_config`` names.

    Its keys: ``"adapter"``, a folder that `apt_kernels.save` wrote or a repository of the Hugging Face hub, for every
    request, or ``"adapters"``, such sources by name, of which each request may name one; ``"load_format"``, that of
    the base model, default ``"auto"``; any other is passed to that load format.

    Raises:
        ConfigError: no adapter is named, or the engine's settings or the model cannot be served.
        AdapterError: an adapter is missing, damaged, or of another base model.
    """

    def __init__(self, load_config):
        super().__init__(load_config)
        options = dict(load_config.model_loader_extra_config or {})
        self._sources = settings.take(options)
        base = copy.copy(load_config)
        base.load_format, base.model_loader_extra_config = options.pop(settings.BASE, "auto"), options
        if base.load_format == LOAD_FORMAT:
            raise ConfigError(
                f"model_loader_extra_config has the {settings.BASE} {LOAD_FORMAT!r}; it needs the base model's"
            )
        self._base = get_model_loader(base)

    def get_external_weight_memory(self, vllm_config) -> int:
        return self._base.get_external_weight_memory(vllm_config)

    def download_model(self, model_config) -> None:
        self._base.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config) -> None:
        self._base.load_weights(model, model_config)

    def load_model(self, vllm_config, model_config, prefix: str = "") -> nn.Module:
        # Checked before the base model is loaded, which may take minutes.
        named = None not in self._sources
        refusals.check_engine(vllm_config)
        if named:
            refusals.check_several(vllm_config, envs.VLLM_USE_RUST_FRONTEND)
        read = [_read(name, source, model_config.hf_config) for name, source in self._sources.items()]
        model = self._base.load_model(vllm_config, model_config, prefix)
        attach(model, read, several.Batch() if named else None)
        if named:
            several.follow_runners()
        for operator in (first_gate.OPERATOR, several.OPERATOR):
            _split_at(vllm_config.compilation_config, operator)
        # vLLM caches compiled graphs by its settings. Graphs of one adapter cannot be used with another one.
        digest = " ".join(adapter.digest for adapter in read)
        vllm_config.additional_config = {**vllm_config.additional_config, LOAD_FORMAT: digest}
        return model


def _read(name: str | None, source, config) -> adapters.Adapter:
    """One adapter; an error names it."""
    try:
        return adapters.read(source, config)
    except (AdapterError, ConfigError) as error:
        if name is None:
            raise
        raise type(error)(f"adapter {name!r}: {error}") from error


def _split_at(config, operator: str) -> None:
    """Exclude an operator from captured CUDA graphs, like vLLM's attention: it reads the step's metadata."""
    if config.splitting_ops and operator not in config.splitting_ops:
        config.splitting_ops = [*config.splitting_ops, operator]
