"""The settings of a patched model: validation, and conversion to and from JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypedDict, get_args

from .errors import ConfigError, its_type
from .prefix import gates

GATES = ("auto", *gates.names())
Init = Literal["auto", "normal", "zero", "vocabulary"]
INITS: tuple[str, ...] = get_args(Init)
# What `to_json` writes. Format 1 had no base, save id or names of trained weights in its files.
FORMAT = 2
# Keys that `apt_kernels.save` writes beside the settings: what is saved, and for which model.
RECORD = ("model", "lengths", "save_id", "adapter", "trained", "base")


class Settings(TypedDict, total=False):
    """The fields of `AptConfig` as keywords, for type checkers."""

    prefix_length: int | Sequence[int]
    gate: gates.GateName
    layer_scale: bool
    init_std: float
    init_seed: int | None
    reparameterisation: int | None
    prefix_dropout: float
    trainable: str | Sequence[str] | None
    implementation: str
    layers: int | str | Sequence[int | str] | None
    init: Init
    num_frozen_tokens: int | None


@dataclass(frozen=True)
class AptConfig:
    """Settings of Adaptive Prefix Tuning (Zhang et al., ACL 2023).

    Args:
        prefix_length: prefix tokens per attention layer: one int, or one int per attention module in model order
            (0: that module gets no prefix).
        layers: which attention modules get a prefix. An index in model order (negative: from the end), ``"self"``,
            ``"cross"``, ``"encoder"``, ``"decoder"``, the part of the model (``"text"``, ``"vision"``, ``"audio"``), a
            regular expression that the module's name matches (``re.search``), or a list of these, which selects the
            modules that any entry selects. None: all.
        gate: where the gate's logits come from. ``"auto"``: ``"token"`` for causal and for cross-attention,
            ``"first"`` otherwise (``"static"`` where hidden states cannot be read). ``"first"``: the first real token's
            hidden state, one gate for each sequence; ``"mean"``: the mean hidden state of the real tokens, one gate for
            each sequence (refused where a token would see later ones through it); ``"token"``: every query's own hidden
            state; ``"static"``: learned logits, the same for all inputs; ``"none"``: no gate.
        layer_scale: learn the layer's scale lambda; False: lambda is 1.
        init: the prefix's initial keys and values. ``"vocabulary"``: those of random tokens of the model's vocabulary,
            read by the model as one text before position 0, with logits lowered so that a long prefix takes the
            softmax mass of about one token; the patched model starts close to the base model. ``"normal"``: drawn from
            a normal distribution with mean 0 and standard deviation ``init_std``. ``"zero"``: keys drawn as with
            "normal", values of zero. ``"auto"``: ``"vocabulary"`` for each attention module where it is possible,
            ``"normal"`` for the others (named by a warning in the log where they read text) and for all of them where
            ``init_std`` is not its default or ``reparameterisation`` is set. A loaded adapter overwrites any initial
            values.
        num_frozen_tokens: how many tokens at the beginning of each prefix keep their initial key and value; their gates
            train. Queries give the first token the softmax mass that they need for nothing else (an attention sink), so
            that changing it affects every output. A shorter prefix is frozen entirely. None: 1 for `patch_from_text`
            with a text of two tokens or more, a CARTRIDGE's own number for `patch_from_peft`, 0 otherwise.
        init_std: standard deviation of the normal initialisation.
        init_seed: seed of every initialisation; None: torch's global generator.
        reparameterisation: width of a two-layer tanh MLP that computes key and value from an embedding while training;
            `save` writes its result, so that a loaded adapter has none. None: key and value are trained directly.
        prefix_dropout: probability of zeroing an element of the prefix's key and value in training (the others are
            divided by the probability of keeping one); drawn once per forward for all rows of the batch.
        trainable: regular expressions; exactly the parameters whose name one of them matches (``re.search``) stay
            trainable beside the prefix. None: the parameters of new task heads.
        implementation: the implementation of the op; see `apt_kernels.attention`.

    Raises:
        ConfigError: a value is out of range; the message names it.

    Examples:
        >>> config = apt_kernels.AptConfig(prefix_length=16, gate="token", trainable=("classifier",))
        >>> apt_kernels.AptConfig.from_json(config.to_json()) == config
        True
    """

    prefix_length: int | Sequence[int] = 16
    gate: gates.GateName = "auto"
    layer_scale: bool = True
    init_std: float = 0.02
    init_seed: int | None = None
    reparameterisation: int | None = None
    prefix_dropout: float = 0.0
    trainable: str | Sequence[str] | None = None
    implementation: str = "auto"
    layers: int | str | Sequence[int | str] | None = None
    init: Init = "auto"
    num_frozen_tokens: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "prefix_length", _lengths(self.prefix_length))
        if self.gate != "auto" and self.gate not in gates.names():
            raise ConfigError(
                f"gate is {self.gate!r}; it needs one of {', '.join(map(repr, ('auto', *gates.names())))}"
            )
        if not isinstance(self.layer_scale, bool):
            raise ConfigError(f"layer_scale is {self.layer_scale!r}; it needs True or False")
        std, seed = self.init_std, self.init_seed
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not 0 <= std < float("inf"):
            raise ConfigError(f"init_std is {std!r}; it needs a finite number >= 0")
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
            raise ConfigError(f"init_seed is {seed!r}; it needs an int of 64 bits or None")
        width = self.reparameterisation
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 1):
            raise ConfigError(f"reparameterisation is {width!r}; it needs an int >= 1 or None")
        if self.init not in INITS:
            raise ConfigError(f"init is {self.init!r}; it needs one of {', '.join(map(repr, INITS))}")
        if self.init in ("zero", "vocabulary") and width is not None:
            raise ConfigError(
                f"init is {self.init!r}; with reparameterisation, whose MLP makes the prefix, it needs 'normal'"
            )
        self._check_frozen()
        rate = self.prefix_dropout
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ConfigError(f"prefix_dropout is {rate!r}; it needs a number from 0 to below 1")
        object.__setattr__(self, "trainable", _patterns(self.trainable))
        object.__setattr__(self, "layers", _layers(self.layers))
        if not isinstance(self.implementation, str):
            raise ConfigError(f"implementation is {self.implementation!r}; it needs a string")

    def _check_frozen(self) -> None:
        frozen, lengths = self.num_frozen_tokens, self.prefix_length
        longest = lengths if isinstance(lengths, int) else max(lengths)
        if frozen is not None and (isinstance(frozen, bool) or not isinstance(frozen, int) or frozen < 0):
            raise ConfigError(f"num_frozen_tokens is {frozen!r}; it needs an int >= 0 or None")
        if frozen and frozen > longest:
            raise ConfigError(
                f"num_frozen_tokens is {frozen}; the longest prefix has {longest} tokens, it needs at most {longest}"
            )
        if frozen and self.reparameterisation is not None:
            raise ConfigError(
                f"num_frozen_tokens is {frozen}; with reparameterisation, whose MLP makes all tokens, it needs 0"
            )

    @property
    def may_read_vocabulary(self) -> bool:
        """Whether prefixes start as tokens of the vocabulary where that is possible."""
        drawn = self.init_std != AptConfig.init_std or self.reparameterisation is not None
        return self.init == "vocabulary" or (self.init == "auto" and not drawn)

    def length_of(self, index: int, count: int) -> int:
        """Prefix length of attention module ``index`` of ``count``."""
        if isinstance(self.prefix_length, int):
            return self.prefix_length
        if len(self.prefix_length) != count:
            raise ConfigError(
                f"prefix_length has {len(self.prefix_length)} entries; the model has {count} attention modules"
            )
        return self.prefix_length[index]

    def to_json(self) -> dict:
        """A JSON-ready dict, with the format number."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict) -> AptConfig:
        """The inverse of `to_json`; reads the ``apt_config.json`` that `apt_kernels.save` wrote, too.

        Raises:
            ConfigError: a newer format, an unknown key, or a value out of range.
        """
        if not isinstance(data, dict):
            raise ConfigError(f"the config is {its_type(data)}; it needs a JSON object")
        data = {name: value for name, value in data.items() if name not in RECORD}
        number = data.pop("format", None)
        if type(number) is not int or not 1 <= number <= FORMAT:
            newer = type(number) is int and number > FORMAT
            hint = "; it was written by a newer apt_kernels" if newer else ""
            raise ConfigError(f"the config's format is {number!r}; this version reads 1 to {FORMAT}{hint}")
        unknown = sorted(set(data) - {f.name for f in fields(cls)}, key=str)
        if unknown:
            raise ConfigError(f"the config has an unknown key {unknown[0]!r}")
        for name in ("prefix_length", "trainable", "layers"):
            if isinstance(data.get(name), list):
                data[name] = tuple(data[name])
        return cls(**data)


def _lengths(value) -> int | tuple[int, ...]:
    single = isinstance(value, int)
    if not single and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ConfigError(f"prefix_length is {value!r}; it needs an int or one int per attention module")
    entries = (value,) if single else tuple(value)
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, int) or entry < 0:
            raise ConfigError(f"prefix_length is {value!r}; each entry needs an int >= 0")
    if not any(entries):
        raise ConfigError(f"prefix_length is {value!r}; at least one entry needs to be above 0")
    return value if single else entries


def _patterns(value) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (str, Sequence, Set)) or isinstance(value, (bytes, bytearray)):
        raise ConfigError(f"trainable is {value!r}; it needs regular expressions, or None")
    patterns = (value,) if isinstance(value, str) else tuple(value)
    for pattern in patterns:
        _check_pattern("trainable", "a regular expression", pattern)
    return tuple(dict.fromkeys(patterns))


def _check_pattern(name: str, needed: str, pattern) -> None:
    if not isinstance(pattern, str):
        raise ConfigError(f"{name} has {pattern!r}; it needs {needed}")
    if not pattern:
        raise ConfigError(f"{name} has '', which matches every name; it needs {needed} ('.' for every name)")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name} has {pattern!r}; it needs {needed} ({error})") from None


def _layers(value) -> tuple[int | str, ...] | None:
    if value is None:
        return None
    entries = (value,) if isinstance(value, (int, str)) else value
    if not isinstance(entries, Sequence) or not entries or isinstance(entries, (bytes, bytearray)):
        raise ConfigError(f"layers is {value!r}; it needs an index, a name's pattern, a kind, or several of them")
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, str)):
            raise ConfigError(f"layers has {entry!r}; each entry needs an int or a string")
        if isinstance(entry, str):
            _check_pattern("layers", "a kind or a regular expression", entry)
    return tuple(dict.fromkeys(entries))
