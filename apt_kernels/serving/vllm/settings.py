"""The settings that name an engine's adapters, and the adapter that a request names. Imports nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError

LOAD_FORMAT = "apt_kernels"
# Keys of ``model_loader_extra_config`` that are ours; the others belong to the base model's load format.
ADAPTER, ADAPTERS, BASE = "adapter", "adapters", "load_format"
# The key of a request's `SamplingParams.extra_args`, and of ``vllm_xargs`` in a request to the server.
REQUEST = "apt_adapter"


def take(options: dict[str, Any]) -> dict[str | None, Any]:
    """Remove the adapters from ``options``; return the source of each by its name. A single one has the name None.

    Raises:
        ConfigError: there are none, or the names are no names.
    """
    given = dict(options)
    single, named = options.pop(ADAPTER, None), options.pop(ADAPTERS, None)
    if (single is None) == (named is None):
        raise ConfigError(
            f"model_loader_extra_config is {given!r}; load_format {LOAD_FORMAT!r} needs either "
            f"{{'{ADAPTER}': FOLDER}} or {{'{ADAPTERS}': {{NAME: FOLDER}}}}"
        )
    if named is None:
        return {None: single}
    if not isinstance(named, Mapping) or not named or not all(isinstance(name, str) and name for name in named):
        raise ConfigError(f"{ADAPTERS} is {named!r}; it needs {{NAME: FOLDER}}, with at least one name")
    return dict(named)


def named(load_config) -> dict[str, str] | None:
    """The source of each named adapter of an engine; ``{}``: it has a single adapter; None: another load format."""
    if load_config.load_format != LOAD_FORMAT:
        return None
    return dict((load_config.model_loader_extra_config or {}).get(ADAPTERS) or {})


def chosen(adapters: Mapping[str, str], extra_args: Mapping[str, Any] | None, model: str | None) -> str | None:
    """The name of a request's adapter; None: it names none.

    Args:
        adapters: the engine's, from `named`.
        extra_args: the request's `SamplingParams.extra_args`.
        model: the adapter that the request named as its model.

    Raises:
        ConfigError: the name is unknown, or the request has two names.
    """
    name = (extra_args or {}).get(REQUEST, model)
    known = f"this engine's adapters are {', '.join(map(repr, adapters))}"
    if not adapters:
        known = f"this engine has one adapter without a name, which every request has. Leave {REQUEST} out"
    if name is not None and (not isinstance(name, str) or name not in adapters):
        raise ConfigError(f"the request names the adapter {name!r}; {known}")
    if model is not None and model != name:
        raise ConfigError(f"the request names the model {model!r} and {REQUEST} {name!r}; it needs one adapter")
    return name
