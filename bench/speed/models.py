"""Whole models with random weights, and the contenders that train a prefix on them. All share the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import apt_kernels
from bench.common.naive import naive

# Layers, width, heads, key heads, inner width, vocabulary of the published models; random weights of these sizes.
SIZES = {
    "bert-large": ("bert", 24, 1024, 16, 16, 4096, 30522),
    "roberta-large": ("roberta", 24, 1024, 16, 16, 4096, 50265),
    "llama-1b": ("llama", 16, 2048, 32, 8, 8192, 128256),
    "llama-8b": ("llama", 32, 4096, 32, 8, 14336, 128256),
    "bert-4-layers": ("bert", 4, 768, 12, 12, 3072, 8192),
    "llama-4-layers": ("llama", 4, 512, 8, 4, 1536, 8192),
    "bert-tiny": ("bert", 2, 32, 2, 2, 48, 64),
    "llama-tiny": ("llama", 2, 32, 4, 2, 48, 64),
}
_CHECKED_LAYERS, _CHECKED_ROWS = 2, 2


@dataclass(frozen=True)
class ModelShape:
    """A training step. ``gate``: ``"auto"`` for APT, ``"none"`` for plain prefix tuning (no scale either)."""

    size: str
    batch: int
    tokens: int
    length: int
    gate: str = "auto"
    checkpointing: bool = False
    compiled: bool = False
    layers: int = 0

    @property
    def name(self) -> str:
        more = ("-checkpointing" if self.checkpointing else "") + ("-compiled" if self.compiled else "")
        kind = "apt" if self.gate == "auto" else "prefix"
        return f"{self.size}-b{self.batch}-t{self.tokens}-m{self.length}-{kind}{more}"

    @property
    def family(self) -> str:
        return SIZES[self.size][0]

    @property
    def decoder(self) -> bool:
        return self.family == "llama"

    def small(self) -> ModelShape:
        """The smaller problem that is checked in float64: the same widths and tokens, fewer layers and rows."""
        rows = min(self.batch, _CHECKED_ROWS)
        return replace(self, layers=min(SIZES[self.size][1], _CHECKED_LAYERS), batch=rows)

    def settings(self) -> dict:
        """`apt_kernels.patch`'s settings."""
        # `patched` draws all values anew: a start that reads the vocabulary would cost a forward for nothing.
        start = {"init": "normal", "init_seed": 0}
        return {"prefix_length": self.length, "gate": self.gate, "layer_scale": self.gate != "none", **start}


def build(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, initialised on the device, without dropout."""
    import transformers

    family, layers, width, heads, kv_heads, inner, vocabulary = SIZES[shape.size]
    common = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": shape.layers or layers,
        "num_attention_heads": heads,
        "max_position_embeddings": max(512, shape.tokens + shape.length) + 2,
        "use_cache": False,
    }
    if family == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=kv_heads, tie_word_embeddings=True)
        auto = transformers.AutoModelForCausalLM
    else:
        kind = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[family]
        config = kind(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2)
        auto = transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).train()


def batch(shape: ModelShape, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Random tokens; an encoder's rows are padded on the right, from none to half."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SIZES[shape.size][-1], (shape.batch, shape.tokens), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if shape.decoder:
        given["labels"] = ids
    else:
        real = torch.linspace(shape.tokens, shape.tokens // 2, shape.batch).long()
        given["attention_mask"] = (torch.arange(shape.tokens)[None] < real[:, None]).long()
        pad = 1 if shape.family == "roberta" else 0
        given["input_ids"] = torch.where(given["attention_mask"].bool(), ids, pad)
        given["labels"] = torch.randint(2, (shape.batch,), generator=generator)
    return {name: tensor.to(device) for name, tensor in given.items()}


def with_same_weights(model: nn.Module) -> nn.Module:
    """A copy with modules and hooks of its own and the very parameters of ``model``."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass
class Contender:
    """A model that trains. ``gradients()`` are those of the last backward, named and laid out as ours."""

    model: nn.Module
    gradients: Callable[[], dict[str, Tensor]]
    around: Callable[[], AbstractContextManager] = nullcontext
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda given: given
    turned: int = 0  # the largest position where PEFT shifts positions; its rotary angle is rounded in float32

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self, given: dict[str, Tensor]):
        with self.around():
            return self.model(**self.inputs(given))

    def backward(self, loss: Tensor) -> None:
        with self.around():
            loss.backward()


def patched(base: nn.Module, shape: ModelShape, implementation: str = "auto") -> nn.Module:
    """``base`` with prefixes of random content: gates, scales and prefixes that change the result."""
    model = apt_kernels.patch(with_same_weights(base), implementation=implementation, **shape.settings())
    generator = torch.Generator().manual_seed(1)
    for prefix in apt_kernels.prefixes(model).values():
        for parameter, spread in ((prefix.key, 0.5), (prefix.value, 0.5), (prefix.gate_weight, 0.1)):
            if parameter is not None:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        if prefix.layer_scale is not None:
            prefix.layer_scale.data.fill_(1.5)
    return model


def _ours(base: nn.Module, shape: ModelShape, around=nullcontext, implementation: str = "auto") -> Contender:
    model = patched(base, shape, implementation)
    return Contender(model, lambda: own_gradients(model), around)


def own_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By kind, those of all layers in one tensor."""
    kinds: dict[str, list[Tensor]] = {}
    for prefix in apt_kernels.prefixes(model).values():
        for name, parameter in prefix.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            kinds.setdefault(name, []).append(gradient)
    return {name: torch.stack(found) for name, found in kinds.items()}


def _no_prefix(base: nn.Module, shape: ModelShape) -> Contender:
    """The frozen model with gradients of its embeddings: the cost of a step without a prefix."""
    model, made = with_same_weights(base).requires_grad_(False), {}

    def inputs(given: dict[str, Tensor]) -> dict[str, Tensor]:
        made["embeddings"] = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
        rest = {name: tensor for name, tensor in given.items() if name != "input_ids"}
        return {"inputs_embeds": made["embeddings"], **rest}

    return Contender(model, lambda: {"embeddings": made["embeddings"].grad}, inputs=inputs)


def _peft(base: nn.Module, shape: ModelShape, cartridge: bool = False) -> Contender:
    """PEFT's own model with our prefix, rotated to its positions."""
    import peft

    source = patched(base, shape)
    task = peft.TaskType.CAUSAL_LM if shape.decoder else peft.TaskType.SEQ_CLS
    if cartridge:
        config = peft.CartridgeConfig(task_type=task, num_virtual_tokens=shape.length, num_frozen_tokens=0)
    else:
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=shape.length)
    copied = with_same_weights(base)
    if not shape.decoder:
        _shift_positions(copied, shape.length)
    model = peft.get_peft_model(copied, config)
    encoder = model.prompt_encoder["default"]
    weight = encoder.trainable_embedding if cartridge else encoder.embedding.weight
    turn = rotation(copied, shape.length) if shape.decoder else None
    prefixes = list(apt_kernels.prefixes(source).values())
    layers = [(prefix.key.data if turn is None else turn(prefix.key.data), prefix.value.data) for prefix in prefixes]
    flat = torch.stack([part for layer in layers for part in layer])  # [2 layers, Hkv, M, D]
    with torch.no_grad():
        weight.copy_(flat.permute(2, 0, 1, 3).reshape(weight.shape))

    def gradients() -> dict[str, Tensor]:
        given = torch.zeros_like(weight) if weight.grad is None else weight.grad
        parts = given.view(shape.length, len(flat), *flat.shape[1:2], -1).permute(1, 2, 0, 3)
        keys = parts[0::2] if turn is None else turn(parts[0::2], back=True)
        return {"key": keys, "value": parts[1::2]}

    return Contender(model, gradients, turned=shape.length + shape.tokens)


def _shift_positions(model: nn.Module, by: int) -> None:
    """PEFT counts an encoder's positions from the start of the prefix, ours from the first token: shift the table."""
    table = model.base_model.embeddings.position_embeddings
    table.weight = nn.Parameter(torch.roll(table.weight.data, by, dims=0))


def rotation(model: nn.Module, by: int) -> Callable[..., Tensor]:
    """Rotary embedding at position ``by``, where PEFT's tokens start (its prefix is not rotated), or its transpose."""
    position = torch.tensor([[by]], device=model.device)
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(torch.zeros(1, device=model.device, dtype=torch.float32), position)

    def turn(tensor: Tensor, back: bool = False) -> Tensor:
        first, second = tensor.chunk(2, dim=-1)
        half = torch.cat([-second, first], dim=-1)
        return tensor * cos[0] + half * (-sin[0] if back else sin[0])

    return turn


TRAINING_PEERS: dict[str, Callable[[nn.Module, ModelShape], Contender]] = {
    "no_prefix": _no_prefix,
    "ours": _ours,
    "naive": lambda base, shape: _ours(base, shape, naive),
    "peft": _peft,
    "cartridge": lambda base, shape: _peft(base, shape, cartridge=True),
    "adapters": _peft,
}
_NO_ADAPTERS = "adapters 1.3 needs transformers 4.57: it does not install beside transformers 5"


def obstacle(peer: str, shape: ModelShape) -> str | None:
    """The reason why a peer cannot train this, or None."""
    if peer == "adapters":
        return _NO_ADAPTERS
    if peer in ("peft", "cartridge"):
        import importlib.util

        if importlib.util.find_spec("peft") is None:
            return "peft is not installed"
        if shape.gate != "none":
            return "does not apply: it has no gates"
        if peer == "cartridge" and (not shape.decoder or shape.length < 1024):
            return "for the long prefixes of decoders"
    return None
