"""Requests that name an adapter, in the process that receives them.

vLLM has one way to carry an adapter's name with a request: its `LoRARequest`. Block hashes contain its name and path,
so requests of different adapters share no cached blocks. The model runner knows it for each row of the batch. The
server lists it as a model. Named adapters of this package use the same way; LoRA itself is off
(`refusals.check_several`).

vLLM refuses a `LoRARequest` unless LoRA is enabled, and has no setting by which a plugin could allow it. Therefore two
of its methods are wrapped. Engines with another load format are not changed.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine.input_processor import InputProcessor

from ...errors import ConfigError
from . import settings


def register() -> None:
    """Wrap the methods, once in a process."""
    _wrap(InputProcessor, "process_inputs", _processing)
    _wrap(OpenAIServingModels, "init_static_loras", _listing)


def _wrap(owner: Any, name: str, wrapper) -> None:
    plain = getattr(owner, name)
    if getattr(plain, "__module__", None) != __name__:
        setattr(owner, name, wrapper(plain))


def carrier(adapters: dict[str, str], name: str) -> LoRARequest:
    """What carries the name of an adapter. Numbers count from 1, in the order of the setting."""
    return LoRARequest(name, 1 + list(adapters).index(name), adapters[name])


def _processing(plain):
    @functools.wraps(plain, assigned=("__doc__", "__name__", "__qualname__"))
    def process_inputs(self, request_id, prompt, params, *args, lora_request=None, **kwargs):
        adapters = settings.named(self.vllm_config.load_config)
        if adapters is None or (not adapters and lora_request is not None):
            return plain(self, request_id, prompt, params, *args, lora_request=lora_request, **kwargs)
        try:
            model = None if lora_request is None else lora_request.lora_name
            name = settings.chosen(adapters, getattr(params, "extra_args", None), model)
        except ConfigError as error:
            raise VLLMValidationError(str(error)) from error
        if lora_request is not None and lora_request.lora_path != adapters[lora_request.lora_name]:
            raise VLLMValidationError(
                f"the request's adapter {name!r} has the path {lora_request.lora_path!r}; this engine's has "
                f"{adapters[name]!r}"
            )
        made = plain(self, request_id, prompt, params, *args, lora_request=None, **kwargs)
        made.lora_request = None if name is None else carrier(adapters, name)
        return made

    return process_inputs


def _listing(plain):
    @functools.wraps(plain, assigned=("__doc__", "__name__", "__qualname__"))
    async def init_static_loras(self):
        await plain(self)
        adapters = settings.named(self.engine_client.vllm_config.load_config) or {}
        for name, path in adapters.items():
            if self.is_base_model(name):
                raise ConfigError(f"adapter {name!r} has the name of the base model; give it another")
            self.lora_requests[name] = carrier(adapters, name)
            # For the error that lists the models that exist. The list of models has adapters from `lora_requests`.
            self.base_model_paths = [*self.base_model_paths, BaseModelPath(name=name, model_path=path)]

    return init_static_loras
