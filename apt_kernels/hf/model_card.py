"""The model card of an adapter: ``README.md`` with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..config import AptConfig

# The ending of a model class's name, and the hub's name of its task.
_TASKS = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
}
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def card(settings: Mapping[str, Any], repo_id: str, subfolder: str | None, metrics: Mapping[str, float] | None) -> str:
    """The text of the card. It names no licence, which the user chooses, and no local path of the base model."""
    record = settings.get("base") or {}
    base = _on_the_hub(record.get("name_or_path"))
    config = AptConfig.from_json(dict(settings))
    place = f'"{repo_id}"' if subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
    kind = _auto_class(settings["model"])
    lines = [
        *_metadata(settings["model"], base, metrics),
        f"# {(subfolder or repo_id).split('/')[-1]}",
        "",
        f"An adapter of Adaptive Prefix Tuning for {base or record.get('model_type') or 'a transformers model'}.",
        "",
        "## Load",
        "",
        "```python",
        "import apt_kernels",
        f"from transformers import {kind}",
        "",
        f'model = {kind}.from_pretrained("{base or "..."}"{_revision(record)})',
        f"apt_kernels.load(model, {place})",
        "```",
        "",
        "## Adapter",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {base or 'not recorded'} |",
        f"| its revision | {record.get('revision') or 'not recorded'} |",
        f"| model class | {settings['model']} |",
        f"| gate | {config.gate} |",
        f"| layer scale | {'yes' if config.layer_scale else 'no'} |",
        f"| prefix lengths | {_lengths(settings['lengths'])} |",
        f"| trained beside the prefix | {', '.join(settings['trained']) or 'nothing'} |",
    ]
    if metrics:
        lines += ["", "## Metrics", "", "| metric | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(lines) + "\n"


def _metadata(model: str, base: str | None, metrics: Mapping[str, float] | None) -> list[str]:
    """YAML between lines of three dashes; every value is JSON, which YAML contains."""
    task = next((task for end, task in _TASKS.items() if model.endswith(end)), None)
    found: dict[str, Any] = {"library_name": "apt-kernels", "tags": ["apt-kernels", "prefix-tuning"]}
    if base is not None:
        found |= {"base_model": base, "base_model_relation": "adapter"}
    if task is not None:
        found["pipeline_tag"] = task
    if metrics:
        found["metrics"] = list(metrics)
    return ["---", *(f"{name}: {json.dumps(value)}" for name, value in found.items()), "---", ""]


def _on_the_hub(name) -> str | None:
    """The base model's name if it has the form of a name on the hub."""
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) and name[0] != "." else None


def _auto_class(model: str) -> str:
    end = next((end for end in _TASKS if model.endswith(end)), None)
    return model if end is None else f"AutoModel{end}"


def _revision(record: Mapping[str, Any]) -> str:
    return f', revision="{record["revision"]}"' if record.get("revision") else ""


def _lengths(lengths: Mapping[str, int]) -> str:
    given = list(lengths.values())
    if len(set(given)) == 1:
        return f"{given[0]} in each of {len(given)} attention modules"
    return f"{', '.join(map(str, given))} in {len(given)} attention modules"
