"""What is compared: the methods, their settings for `apt_kernels.patch`, and the settings of a training."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import nn

import apt_kernels

# Settings of `apt_kernels.patch`; None: the model is not patched.
METHODS: dict[str, dict | None] = {
    "apt": {"gate": "auto", "layer_scale": True},
    "apt-no-gate": {"gate": "none", "layer_scale": True},
    "apt-no-scale": {"gate": "auto", "layer_scale": False},
    "apt-no-hidden": {"gate": "static", "layer_scale": True},
    "prefix": {"gate": "none", "layer_scale": False},
    "prefix-same-budget": {"gate": "none", "layer_scale": False},
    "full": None,
    "head": None,
}
NAMES = {
    "apt": "APT",
    "apt-no-gate": "APT without α",
    "apt-no-scale": "APT without λ",
    "apt-no-hidden": "APT without h",
    "prefix": "prefix tuning, same length",
    "prefix-same-budget": "prefix tuning, same parameters",
    "full": "full fine-tuning",
    "head": "head only",
}
ABLATION = ("apt", "apt-no-gate", "apt-no-scale", "apt-no-hidden", "prefix")


@dataclass(frozen=True)
class Settings:
    """One training, but for its task, its method and its seed."""

    model: str
    batch_size: int = 16
    epochs: int = 20
    max_length: int = 128
    prefix_length: int | tuple[int, ...] = 16
    learning_rate: float = 1e-2
    gate_learning_rate: float = 1e-3
    full_learning_rate: float = 5e-5
    head_learning_rate: float = 5e-3
    schedule: str = "linear"
    dropout: float | None = None
    attention_dropout: float | None = None
    train_examples: int | None = None
    dev_examples: int | None = None
    test_examples: int | None = None
    hold_out: int | None = None
    precision: str = "fp32"
    patch: dict = field(default_factory=dict)

    def rate_of(self, method: str) -> float:
        return {"full": self.full_learning_rate, "head": self.head_learning_rate}.get(method, self.learning_rate)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Settings:
        known = {f.name for f in fields(cls)}
        length = data.get("prefix_length")
        given = {name: value for name, value in data.items() if name in known}
        return cls(**given | ({"prefix_length": tuple(length)} if isinstance(length, list) else {}))


def _published(table: str) -> dict[str, dict]:
    """Rows of ``task batch/rate/length/epochs``, and what differs from 128 tokens."""
    found = {}
    for line in table.strip().splitlines():
        task, numbers, *more = line.split()
        batch, rate, length, epochs = numbers.split("/")
        found[task] = {
            "batch_size": int(batch),
            "learning_rate": float(rate),
            "prefix_length": int(length),
            "epochs": int(epochs),
        } | dict(_option(entry) for entry in more)
    return found


def _option(entry: str) -> tuple[str, object]:
    name, value = entry.split("=")
    return name, float(value) if "." in value else int(value)


# Published settings of P-tuning v2 (THUDM/P-tuning-v2) and, for BERT-base, of potter-Zhang/Selective-Prefix-Tuning.
RECIPES = {
    "bert-large": _published("""
        boolq 32/5e-3/40/100
        copa 16/1e-2/16/80
        rte 32/1e-2/20/60
        wic 16/1e-4/20/80
        wsc 16/5e-3/20/80
        conll04 32/2e-2/128/40 dropout=0.2
        ontonotes 16/1e-2/16/30
    """),
    "roberta-large": _published("""
        boolq 32/7e-3/8/100
        copa 16/9e-3/8/120
        rte 32/5e-3/128/100
        wic 32/1e-2/8/50
        wsc 16/1e-2/8/10
        conll03 16/3e-2/11/30 max_length=152
        conll04 32/6e-2/144/80
        ontonotes 16/7e-3/48/60
    """),
    "bert-base": _published("""
        boolq 32/5e-3/40/100
        copa 16/1e-2/20/50
        rte 32/1e-2/8/50
        wic 16/7e-3/20/80
        wsc 16/5e-4/20/50
        conll03 16/3e-2/11/60
        conll04 32/2e-2/128/40
    """),
    # The packaged MiniLM on two cores: small subsets and few epochs, rates chosen on seeds that no table uses.
    "minilm": {
        task: {
            "batch_size": 16,
            "epochs": 2,
            "prefix_length": 8,
            "learning_rate": 3e-2,
            "gate_learning_rate": 1e-3,
            "full_learning_rate": 5e-4,
            "head_learning_rate": 2e-2,
            "precision": "bf16",
            **more,
        }
        for task, more in {
            "copa": {"max_length": 40, "train_examples": 96},
            "rte": {"max_length": 72, "train_examples": 96, "dev_examples": 100},
            "wsc": {"max_length": 56, "train_examples": 96},
            "wnut17": {"max_length": 48, "train_examples": 192, "dev_examples": 80, "test_examples": 160},
        }.items()
    },
}
_TAGGED = ("conll03", "conll04", "ontonotes", "wnut17")


def recipe(name: str, task: str) -> dict:
    """Settings published for a model and a task; empty where none were. Tags decay by 0.95 an epoch."""
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; it needs one of {', '.join(RECIPES)}")
    found = RECIPES[name].get(task, {})
    published = found and name != "minilm" and task in _TAGGED
    return {**found, "schedule": "exponential"} if published else found


def prepare(model: nn.Module, method: str, settings: Settings, seed: int) -> nn.Module:
    """Freeze or patch a fresh model for the method; its new head trains always."""
    if method == "full":
        return model
    if method == "head":
        inside = {id(parameter) for parameter in model.base_model.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) not in inside)
        return model
    length = settings.prefix_length
    if method == "prefix-same-budget":
        length = same_budget(model, settings)
    # The start of P-tuning v2, with which the committed figures were made.
    start = {"init": "normal", "init_seed": seed}
    return apt_kernels.patch(model, prefix_length=length, **{**start, **patch_settings(method, settings)})


def patch_settings(method: str, settings: Settings) -> dict:
    """A method's settings with those of ``settings.patch``.

    A gate in it replaces "auto"; a method with another gate, or with none, keeps its own.
    """
    options = METHODS[method] or {}
    given = {k: v for k, v in settings.patch.items() if k != "gate" or options.get("gate") == "auto"}
    return {**options, **given}


def same_budget(model: nn.Module, settings: Settings) -> tuple[int, ...]:
    """Lengths of a plain prefix with as many parameters as APT's of ``prefix_length``, or just fewer."""
    apt_kernels.patch(model, prefix_length=settings.prefix_length, **patch_settings("apt", settings))
    try:
        found = apt_kernels.prefixes(model)
        if isinstance(settings.prefix_length, int):
            given = [settings.prefix_length] * len(found)
        else:
            given = list(settings.prefix_length)
        sizes = iter(found.values())
        return tuple(_longer(next(sizes)) if length else 0 for length in given)
    finally:
        apt_kernels.unpatch(model)


def _longer(prefix) -> int:
    token = (prefix.key.numel() + prefix.value.numel()) // prefix.length
    return sum(p.numel() for p in prefix.parameters()) // token


def groups(model: nn.Module, method: str, settings: Settings) -> list[dict]:
    """Optimizer groups: a step moves a gate's logit by up to rate times width, so gates take a rate of their own."""
    trained = [(re.search(r"\.gate_weight$", name), p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {"params": [p for is_gate, p in trained if not is_gate], "lr": settings.rate_of(method)}
    gates = {"params": [p for is_gate, p in trained if is_gate], "lr": settings.gate_learning_rate}
    return [plain, gates] if gates["params"] else [plain]


def counts(model: nn.Module) -> dict[str, int]:
    """Trained parameters: all of them, and those of prefixes, gates and scales."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return {"trained": sum(n for _, n in trained), "prefix": sum(n for name, n in trained if ".apt." in name)}


def set_dropout(config, everywhere: float | None, attention: float | None) -> None:
    """Dropout probabilities of a model's config, and those of attention weights; None: as the model has them."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            chosen = attention if re.search("att(entio)?n", name) and attention is not None else everywhere
            setattr(config, name, value if chosen is None else chosen)


def optimizer(model: nn.Module, method: str, settings: Settings, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW over the trained parameters, in the groups of `groups`."""
    return torch.optim.AdamW(groups(model, method, settings), weight_decay=weight_decay)
