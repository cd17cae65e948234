"""An adapter as a server needs it: read and checked without the Hugging Face model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import AptConfig
from ...errors import AdapterError, ConfigError
from ...hf import base_record, hub
from ...hf.adapter_file import CONFIG, WEIGHTS, open_adapter
from ...prefix import gates

# Not "mean": it needs later tokens, which a causal model has not computed yet.
GATES = ("first", "token", "static", "none")


@dataclass(frozen=True)
class Adapter:
    """A checked adapter.

    Attributes:
        path: its ``adapter.safetensors``.
        config: its settings.
        layers: its tensors, by the name of the attention module in the Hugging Face model and then by field; modules
            without a prefix are left out.
        digest: a hash of its settings and weights.
    """

    path: Path
    config: AptConfig
    layers: dict[str, dict[str, Tensor]]
    digest: str

    def gate(self, site: str) -> str:
        """The name of the gate of an attention module, with ``"auto"`` resolved."""
        if self.config.gate != "auto":
            return self.config.gate
        return "token" if "gate_weight" in self.layers[site] else "static"


def read(source: Any, config) -> Adapter:
    """The adapter in ``source``, for a base model with a transformers ``config``.

    Args:
        source: a folder that `apt_kernels.save` wrote, or a repository of the Hugging Face hub, ``owner/name`` or
            ``owner/name@revision``.
        config: the base model's transformers config.

    Raises:
        AdapterError: there is no adapter, or it is damaged, of another base model, or contains more than prefixes.
        ConfigError: ``source`` is not a string, or the adapter's gate cannot be served.
    """
    if not isinstance(source, str) or not source:
        raise ConfigError(f"adapter is {source!r}; it needs a folder that apt_kernels.save wrote, or 'owner/name'")
    folder = hub.fetch(source, [WEIGHTS, CONFIG], None) if hub.is_repository(source) else Path(source)
    with open_adapter(folder) as file:
        base_record.refuse_other_config(config, file.settings.get("base"), file.path)
        tensors, settings, path = file.tensors(), file.settings, file.path
        made = file.config
    if made.gate != "auto" and made.gate not in GATES:
        served = gates.choice(lambda gate: gate.name in GATES)
        raise ConfigError(f"{path} has the gate {made.gate!r}; vLLM serves {served}")
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        site, found, field = name.partition(".apt.")
        if not found:
            raise AdapterError(
                f"{path} holds {name}, which was trained beside the prefixes; vLLM serves the base model's weights. "
                "Write it into the base model and save an adapter of prefixes alone"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{path}: {name} has values that are not finite")
        layers.setdefault(site, {})[field] = tensor
    layers = {site: fields for site, fields in layers.items() if fields["key"].shape[1]}
    return Adapter(path, made, layers, _digest(settings, tensors))


def _digest(settings: dict, tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
