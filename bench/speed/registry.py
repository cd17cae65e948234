"""What each stage measures on each kind of machine.

``gpu``; ``small_gpu``, of less than 40 GiB; ``cpu``, a laptop; ``tiny``, the dry run of the tests; ``predicted``, the
cases of `bench.compiled.predict`, on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .compilation import Lengths
from .generation import Decoding
from .models import ModelShape
from .shapes import REGISTRIES

# Bytes of a GPU from which on the cases of ``gpu`` fit.
LARGE = 40 << 30
# `default_dtype` in words.
DTYPES = "default: on CUDA bfloat16, or float16 before compute capability 8.0; float32 elsewhere"
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
    "small_gpu": {
        "training": [
            ModelShape("llama-1b", 1, 1024, 64, "none"),
            ModelShape("llama-1b", 1, 1024, 64),
            ModelShape("bert-large", 16, 128, 16, "none"),
            ModelShape("bert-large", 16, 128, 128),
        ],
        "compiled": [ModelShape("llama-1b", 1, 1024, 64, "none", compiled=True, layers=2)],
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
    "small_gpu": {"generation": [Decoding("llama-1b", 1, 1024, 64), Decoding("llama-1b", 8, 1024, 64, "none")]},
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
    "small_gpu": {"compilation": [Lengths(32, 8, 64, 64, _MANY)]},
    "cpu": {"compilation": [Lengths(8, 4, 64, 16, _MANY)]},
    "tiny": {"compilation": [Lengths(2, 1, 16, 4, (8, 12))]},
}


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark with a JSON file of its own: its file in bench/speed/suite, and seconds of timing.

    Checks and compilation take time beyond these seconds.
    """

    file: str
    gpu: int
    cpu: int


# All stages in the order in which they run; bench/gpu.sh, the runner and the reports take them from here.
STAGES = {
    "encoder": Stage("test_op.py", gpu=40, cpu=60),
    "causal": Stage("test_op.py", gpu=75, cpu=65),
    "query": Stage("test_op.py", gpu=20, cpu=30),
    "long": Stage("test_op.py", gpu=30, cpu=35),
    "decode": Stage("test_op.py", gpu=25, cpu=15),
    "training": Stage("test_training.py", gpu=90, cpu=45),
    "compiled": Stage("test_training.py", gpu=60, cpu=50),
    "generation": Stage("test_generation.py", gpu=30, cpu=20),
    "compilation": Stage("test_compilation.py", gpu=40, cpu=50),
    # In bfloat16, where the others are in float32. Last: on a chip without such instructions it takes long.
    "half": Stage("test_op.py", gpu=0, cpu=25),
}
SECONDS = {
    **{kind: {name: stage.gpu for name, stage in STAGES.items()} for kind in ("gpu", "small_gpu")},
    "cpu": {name: stage.cpu for name, stage in STAGES.items()},
    "tiny": dict.fromkeys(STAGES, 0),
    "predicted": {name: 120 if name in ("encoder", "causal") else 0 for name in STAGES},
}


def cases(registry: str) -> dict[str, list]:
    """Every stage's cases."""
    found = dict(REGISTRIES[registry])
    for stages in (TRAINING, GENERATION, COMPILATION):
        found |= stages.get(registry) or {name: [] for name in stages["gpu"]}
    return found


def default_registry(device: torch.device) -> str:
    """The cases for a device: of a GPU by its memory."""
    if device.type != "cuda":
        return "cpu"
    return "gpu" if torch.cuda.get_device_properties(device).total_memory >= LARGE else "small_gpu"


def default_dtype(device: torch.device) -> str:
    """What models are trained in on a device: GPUs before compute capability 8.0 have no products of bfloat16."""
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_properties(device).major >= 8 else "float16"
