"""What each stage measures on each kind of machine: ``gpu``, ``cpu`` (a laptop), ``tiny`` (the tests' dry run)."""

from __future__ import annotations

from .compilation import Lengths
from .generation import Decoding
from .models import ModelShape
from .shapes import OP_STAGES, REGISTRIES

TRAINING = {
    "gpu": {
        "training": [
            ModelShape("llama-1b", 4, 2048, 64, "none"),
            ModelShape("llama-1b", 4, 2048, 64),
            ModelShape("llama-1b", 4, 2048, 64, checkpointing=True),
            ModelShape("bert-large", 32, 128, 16, "none"),
            ModelShape("bert-large", 32, 128, 128),
            ModelShape("roberta-large", 16, 256, 16),
            ModelShape("llama-8b", 1, 2048, 64),
            ModelShape("llama-8b", 4, 2048, 64, checkpointing=True),
            ModelShape("llama-1b", 2, 1024, 4096, "none"),
        ],
        "compiled": [ModelShape("llama-1b", 4, 2048, 64, "none", compiled=True, layers=2)],
    },
    "cpu": {
        "training": [
            ModelShape("bert-4-layers", 8, 128, 16, "none"),
            ModelShape("bert-4-layers", 8, 128, 16),
            ModelShape("llama-4-layers", 1, 1024, 64, "none"),
            ModelShape("llama-4-layers", 1, 1024, 64),
            ModelShape("llama-4-layers", 1, 1024, 64, checkpointing=True),
        ],
        "compiled": [ModelShape("llama-4-layers", 1, 512, 64, "none", compiled=True, layers=2)],
    },
    "tiny": {
        "training": [
            ModelShape("bert-tiny", 2, 12, 4),
            ModelShape("llama-tiny", 2, 12, 4, "none"),
            ModelShape("llama-tiny", 2, 12, 4, checkpointing=True),
        ],
        "compiled": [],
    },
}
GENERATION = {
    "gpu": {
        "generation": [
            Decoding("llama-1b", 1, 1024, 64),
            Decoding("llama-1b", 1, 32768, 64, "none"),
            Decoding("llama-1b", 16, 8192, 64),
            Decoding("llama-1b", 64, 1024, 64, "none"),
        ]
    },
    "cpu": {
        "generation": [
            Decoding("llama-4-layers", 1, 1024, 16),
            Decoding("llama-4-layers", 1, 4096, 64, "none"),
            Decoding("llama-4-layers", 8, 1024, 64, "none"),
        ]
    },
    "tiny": {"generation": [Decoding("llama-tiny", 2, 20, 4, "none")]},
}
_MANY = (96, 128, 200, 257, 384, 512, 700, 1024)
COMPILATION = {
    "gpu": {"compilation": [Lengths(32, 8, 128, 64, _MANY)]},
    "cpu": {"compilation": [Lengths(8, 4, 64, 16, _MANY)]},
    "tiny": {"compilation": [Lengths(2, 1, 16, 4, (8, 12))]},
}
# The file of bench/suite and the seconds of each stage, without what checking takes beyond them.
FILES = {
    **dict.fromkeys(OP_STAGES, "test_op.py"),
    "training": "test_training.py",
    "compiled": "test_training.py",
    "generation": "test_generation.py",
    "compilation": "test_compilation.py",
}
STAGES = tuple(FILES)
_TIMES = {  # in the order of STAGES
    "gpu": (40, 75, 20, 30, 25, 90, 60, 30, 40),
    "cpu": (65, 70, 30, 35, 15, 45, 60, 20, 50),
    "tiny": (0,) * len(STAGES),
}
SECONDS = {name: dict(zip(STAGES, times)) for name, times in _TIMES.items()}


def cases(registry: str) -> dict[str, list]:
    """Every stage's cases."""
    found = dict(REGISTRIES[registry])
    for stages in (TRAINING, GENERATION, COMPILATION):
        found |= stages[registry]
    return found
