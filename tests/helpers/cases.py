"""Inputs of the op for tests: a `Case` describes them, and a seed determines the data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from apt_kernels import Mask
from apt_kernels.impl.inputs import Inputs
from apt_kernels.ops.validation import make_inputs

GATES = ("none", "static", "row", "query", "indexed", "indexed_query")


@dataclass(frozen=True)
class Case:
    """One set of inputs. ``dense`` and ``bias`` are shapes by letter (``"B1TS"``, ``"TS"``), "" for none.

    ``gate``: one of `GATES`. ``layer_scale``: its value, as a tensor, or None. ``offset``: None (``S - T``), an int,
    ``"one"`` (a tensor ``[1]``) or ``"row"`` (``[B]``). ``padding``: ``""``, ``"left"``, ``"right"``, ``"random"`` or
    ``"all"`` (at least one row has every key padded). ``bias_fill``: put -inf or the dtype's minimum into some entries.
    ``adapters``: the length of each of several prefixes, at most ``length``; ``rows``: the adapter of each row (-1:
    none); what is beyond a length is NaN, and ``layer_scale`` one for each. ``gate_inf``: put +inf into some logits.
    ``heads_last``: query, key and value are transposed views of ``[B, T, H, D]``. ``spread`` scales the queries.
    """

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    queries: int = 17
    keys: int = 17
    length: int = 5
    head_dim: int = 24
    value_dim: int = 24
    gate: str = "row"
    layer_scale: float | None = 1.5
    dtype: torch.dtype = torch.float32
    prefix_dtype: torch.dtype | None = None
    heads_last: bool = True
    spread: float = 1.0
    scale: float | None = None
    softcap: float = 0.0
    sinks: bool = False
    dropout: float = 0.0
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    offset: int | str | None = None
    padding: str = ""
    segments: bool = False
    dense: str = ""
    bias: str = ""
    bias_grad: bool = False
    bias_fill: str = ""
    adapters: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    gate_inf: bool = False
    seed: int = 0

    def inputs(self, device: str = "cpu") -> Inputs:
        """The data, drawn on the CPU with the case's seed, validated by the op."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = self.kv_heads * self.group
        sizes = {"B": self.batch, "H": heads, "T": self.queries, "S": self.keys, "1": 1}

        side_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

        def draw(*shape: int, dtype=side_dtype) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        def activation(count: int, length: int, dim: int) -> Tensor:
            if self.heads_last:
                return draw(self.batch, length, count, dim, dtype=self.dtype).transpose(1, 2)
            return draw(self.batch, count, length, dim, dtype=self.dtype)

        prefix_dtype = self.prefix_dtype or self.dtype
        gate, index = self._gate(draw, generator)
        bias = self._bias(draw(*(sizes[c] for c in self.bias)), generator) if self.bias else None
        lead = (len(self.adapters),) if self.adapters else ()
        scale = None if self.layer_scale is None else torch.tensor([self.layer_scale], dtype=side_dtype, device=device)
        if scale is not None and self.adapters:
            scale = scale * torch.linspace(1.0, 0.5, len(self.adapters), dtype=side_dtype, device=device)
        mask = Mask(
            causal=self.causal,
            window=self.window,
            query_offset=self._offset(generator, device),
            key_padding=_to(self._padding(generator), device),
            query_segments=_to(self._segments(self.queries, generator), device),
            key_segments=_to(self._segments(self.keys, generator), device),
            dense=_to(self._dense(sizes, generator), device),
            bias=None if bias is None else bias.requires_grad_(self.bias_grad),
        )
        return make_inputs(
            activation(heads, self.queries, self.head_dim) * self.spread,
            activation(self.kv_heads, self.keys, self.head_dim),
            activation(self.kv_heads, self.keys, self.value_dim),
            self._cut(draw(*lead, self.kv_heads, self.length, self.head_dim, dtype=prefix_dtype)),
            self._cut(draw(*lead, self.kv_heads, self.length, self.value_dim, dtype=prefix_dtype)),
            gate,
            scale,
            mask=mask,
            gate_index=_to(index, device),
            scale=self.scale,
            softcap=self.softcap,
            sinks=draw(heads) if self.sinks else None,
            dropout_p=self.dropout,
            seed=self.seed if self.dropout else None,
            prefix_index=torch.tensor(self.rows, device=device) if self.adapters else None,
            prefix_lengths=torch.tensor(self.adapters, device=device) if self.adapters else None,
        )

    def _cut(self, prefix: Tensor) -> Tensor:
        for adapter, length in zip(prefix, self.adapters):
            adapter[:, length:] = torch.nan
        return prefix

    def _gate(self, draw, generator) -> tuple[Tensor | None, Tensor | None]:
        count = len(self.adapters) or 3
        shapes = {
            "none": None,
            "static": (self.length,),
            "row": (self.batch, self.length),
            "query": (self.batch, self.queries, self.length),
            "indexed": (count, self.length),
            "indexed_query": (count, self.length),
        }
        shape = shapes[self.gate]
        index_shapes = {"indexed": (self.batch,), "indexed_query": (self.batch, self.queries)}
        index = None
        if self.gate in index_shapes:
            index = torch.randint(0, count, index_shapes[self.gate], generator=generator)
        gate = None if shape is None else draw(*shape)
        if gate is not None and self.gate_inf:
            gate = gate.masked_fill((torch.rand(shape, generator=generator) < 0.3).to(gate.device), torch.inf)
        return gate, index

    def _offset(self, generator, device) -> int | Tensor | None:
        if not isinstance(self.offset, str):
            return self.offset
        count = self.batch if self.offset == "row" else 1
        return torch.randint(-2, max(self.keys, 1), (count,), generator=generator).to(device)

    def _padding(self, generator) -> Tensor | None:
        if not self.padding:
            return None
        if self.padding == "random":
            return torch.rand(self.batch, self.keys, generator=generator) < 0.7
        real = torch.randint(1, self.keys + 1, (self.batch, 1), generator=generator)
        if self.padding == "all":
            real[torch.randint(0, self.batch, (1,), generator=generator)] = 0
        position = torch.arange(self.keys)
        return position >= self.keys - real if self.padding == "left" else position < real

    def _segments(self, length: int, generator) -> Tensor | None:
        if not self.segments:
            return None
        return torch.randint(0, 3, (self.batch, length), generator=generator).sort(dim=1).values

    def _dense(self, sizes, generator) -> Tensor | None:
        if not self.dense:
            return None
        return torch.rand([sizes[c] for c in self.dense], generator=generator) < 0.6

    def _bias(self, bias: Tensor, generator) -> Tensor:
        if not self.bias_fill:
            return bias
        fill = -torch.inf if self.bias_fill == "inf" else torch.finfo(bias.dtype).min
        hidden = torch.rand(bias.shape, generator=generator) < 0.3
        return bias.masked_fill(hidden.to(bias.device), fill)


def _to(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


# The values of each field in drawn cases; "off" is repeated, so that most cases have few features.
_CHOICES = {
    "gate": GATES,
    "layer_scale": (1.5, -0.7, None),
    "dtype": (torch.float32,),
    "prefix_dtype": (None, None, torch.float32),
    "heads_last": (True, False),
    "spread": (1.0, 1.0, 4.0),
    "scale": (None, None, None, 0.3),
    "softcap": (0.0, 0.0, 0.0, 4.0),
    "sinks": (False, False, True),
    "dropout": (0.0, 0.0, 0.0, 0.1, 0.5),
    "causal": (False, True),
    "offset": (None, None, None, "int", "one", "row"),
    "padding": ("", "", "", "left", "right", "random", "all"),
    "segments": (False, False, False, False, True),
    "dense": ("",) * 8 + ("BHTS", "B1TS", "TS", "B11S", "1HT1", "S"),
    "bias": ("",) * 8 + ("BHTS", "1HTS", "B11S", "TS", "BHT1", "1"),
    "bias_grad": (False, True),
    "bias_fill": ("", "", "inf", "min"),
}


def examples(count: int) -> Callable:
    """Decorates a property: `make test` runs this number of examples, `make fuzz` 10,000, in parts."""

    def decorate(test: Callable) -> Callable:
        fuzzing = os.environ.get("HYPOTHESIS_PROFILE") == "fuzz"
        own = settings.default.max_examples if fuzzing else count
        return pytest.mark.usefixtures("part")(settings(max_examples=own)(test))

    return decorate


@st.composite
def cases(draw, **only: tuple) -> Case:
    """Cases with every feature. A keyword is a field of `Case` with the tuple of its possible values."""

    def number(field: str, *interesting: int, high: int, low: int = 1) -> int:
        if field in only:
            return draw(st.sampled_from(only[field]))
        return draw(st.one_of(st.sampled_from(interesting), st.integers(low, high)))

    fields = {name: draw(st.sampled_from(only.get(name, values))) for name, values in _CHOICES.items()}
    fields |= {
        "batch": number("batch", 1, 2, high=3),
        "kv_heads": number("kv_heads", 1, 2, high=3),
        "group": number("group", 1, 2, high=4),
        "queries": number("queries", 1, 16, 33, high=70),
        "length": number("length", 1, 7, 16, high=40),
        "head_dim": number("head_dim", 16, 24, 64, high=80, low=16),
    }
    fields["keys"] = number("keys", fields["queries"], fields["queries"], 1, high=70)
    fields["value_dim"] = number("value_dim", fields["head_dim"], high=80, low=16)
    side = st.none() | st.integers(0, fields["keys"])
    window = st.one_of(st.none(), st.none(), st.none(), st.tuples(side, side))
    fields["window"] = draw(st.sampled_from(only["window"]) if "window" in only else window)
    if fields["offset"] == "int":
        fields["offset"] = draw(st.integers(-3, fields["keys"]))
    return Case(**fields, seed=draw(st.integers(0, 2**31 - 1)))


@st.composite
def mixtures(draw, **only) -> Case:
    """Cases with several adapters, without dropout, whose numbers depend on a row's place in the batch."""
    case = draw(cases(**{"dropout": (0.0,), "batch": (1, 2, 3, 5), **only}))
    adapters = tuple(draw(st.lists(st.integers(0, case.length), min_size=1, max_size=4)))
    rows = tuple(draw(st.lists(st.integers(-1, len(adapters) - 1), min_size=case.batch, max_size=case.batch)))
    return replace(case, adapters=adapters, rows=rows, gate_inf=draw(st.booleans()))


def inputs(device: str = "cpu", **only: tuple) -> st.SearchStrategy[Inputs]:
    """The inputs of `cases`. Prefer `cases` in tests: a failing case is printed in one line that can be pasted."""
    return cases(**only).map(lambda case: case.inputs(device))


_PLAIN = Case()

# One case per feature, for tests parametrised by name.
CASES: dict[str, Case] = {
    "plain": _PLAIN,
    "gate_none": replace(_PLAIN, gate="none", layer_scale=None),
    "gate_none_scaled": replace(_PLAIN, gate="none"),
    "gate_static": replace(_PLAIN, gate="static"),
    "gate_query": replace(_PLAIN, gate="query"),
    "gate_indexed": replace(_PLAIN, gate="indexed"),
    "gate_indexed_query": replace(_PLAIN, gate="indexed_query"),
    "scale_none": replace(_PLAIN, layer_scale=None),
    "scale_negative": replace(_PLAIN, layer_scale=-0.7),
    "multi_head": replace(_PLAIN, kv_heads=3, group=1),
    "multi_query": replace(_PLAIN, kv_heads=1, group=4),
    "odd_sizes": replace(_PLAIN, queries=65, keys=67, length=33, head_dim=40, value_dim=40),
    "value_dim_smaller": replace(_PLAIN, value_dim=16),
    "value_dim_larger": replace(_PLAIN, value_dim=72),
    "contiguous": replace(_PLAIN, heads_last=False),
    "peaked": replace(_PLAIN, spread=6.0),
    "softmax_scale": replace(_PLAIN, scale=0.5),
    "causal": replace(_PLAIN, causal=True),
    "causal_more_keys": replace(_PLAIN, causal=True, keys=40),
    "causal_fewer_keys": replace(_PLAIN, causal=True, keys=9),
    "causal_decode": replace(_PLAIN, causal=True, queries=1, keys=40),
    "causal_gate_query": replace(_PLAIN, causal=True, gate="query"),
    "causal_gate_indexed_query": replace(_PLAIN, causal=True, gate="indexed_query"),
    "causal_offset_zero": replace(_PLAIN, causal=True, keys=40, offset=0),
    "causal_offset_int": replace(_PLAIN, causal=True, keys=40, offset=11),
    "causal_offset_negative": replace(_PLAIN, causal=True, offset=-5),
    "causal_offset_tensor": replace(_PLAIN, causal=True, keys=40, offset="one"),
    "causal_offset_row": replace(_PLAIN, causal=True, keys=40, offset="row"),
    "causal_left_padding": replace(_PLAIN, causal=True, padding="left"),
    "causal_right_padding": replace(_PLAIN, causal=True, padding="right"),
    "causal_decode_padding": replace(_PLAIN, causal=True, queries=1, keys=40, padding="left"),
    "window": replace(_PLAIN, window=(3, 2)),
    "window_left": replace(_PLAIN, causal=True, window=(6, None), queries=40, keys=40),
    # The last query that sees key 0 (and the first key of a tile) is the first of a tile.
    "window_tile": replace(_PLAIN, causal=True, window=(16, None), queries=33, keys=33),
    "window_zero": replace(_PLAIN, window=(0, 0)),
    "window_decode": replace(_PLAIN, causal=True, window=(6, None), queries=1, keys=40),
    "right_padding": replace(_PLAIN, padding="right"),
    "left_padding": replace(_PLAIN, padding="left"),
    "random_padding": replace(_PLAIN, padding="random"),
    "all_padding": replace(_PLAIN, padding="all"),
    "segments": replace(_PLAIN, segments=True),
    "segments_causal_indexed": replace(_PLAIN, segments=True, causal=True, gate="indexed_query"),
    "dense": replace(_PLAIN, dense="BHTS"),
    "dense_broadcast": replace(_PLAIN, dense="B1TS", causal=True),
    "dense_keys": replace(_PLAIN, dense="B11S"),
    "bias": replace(_PLAIN, bias="1HTS"),
    "bias_gradient": replace(_PLAIN, bias="1HTS", bias_grad=True),
    "bias_keys_gradient": replace(_PLAIN, bias="B11S", bias_grad=True),
    "bias_hides": replace(_PLAIN, bias="B1TS", bias_fill="min", causal=True),
    "bias_hides_inf": replace(_PLAIN, bias="B1TS", bias_fill="inf", bias_grad=True),
    "softcap": replace(_PLAIN, softcap=2.0, spread=3.0),
    "softcap_causal_query": replace(_PLAIN, softcap=2.0, spread=3.0, causal=True, gate="query"),
    "softcap_bias": replace(_PLAIN, softcap=2.0, bias="1HTS", bias_grad=True),
    "sinks": replace(_PLAIN, sinks=True),
    "sinks_causal_window": replace(_PLAIN, sinks=True, causal=True, window=(6, None)),
    "sinks_all_padding": replace(_PLAIN, sinks=True, padding="all"),
    "dropout": replace(_PLAIN, dropout=0.2),
    "dropout_causal_query": replace(_PLAIN, dropout=0.2, causal=True, gate="query"),
    "dropout_padding_sinks": replace(_PLAIN, dropout=0.2, padding="right", sinks=True),
    "prefix_float32": replace(_PLAIN, dtype=torch.bfloat16, prefix_dtype=torch.float32),
    "everything": replace(
        _PLAIN,
        causal=True,
        window=(20, None),
        keys=40,
        padding="left",
        segments=True,
        dense="B1TS",
        bias="1HTS",
        bias_grad=True,
        softcap=3.0,
        sinks=True,
        dropout=0.1,
        gate="query",
        value_dim=40,
    ),
}

_MIXED = replace(_PLAIN, batch=4, adapters=(5, 2, 3), rows=(1, -1, 0, 1))

# Cases with a prefix for each row.
MIXED = {
    "mixed": _MIXED,
    "mixed_alone": replace(_MIXED, rows=(1, 1, 1, 1)),
    "mixed_base_alone": replace(_MIXED, rows=(-1, -1, -1, -1)),
    "mixed_equal_lengths": replace(_MIXED, adapters=(5, 5, 5), rows=(2, 0, 1, 2)),
    "mixed_empty_adapter": replace(_MIXED, adapters=(0, 4), rows=(0, 1, 0, 1)),
    "mixed_gate_none": replace(_MIXED, gate="none", layer_scale=None),
    "mixed_gate_none_scaled": replace(_MIXED, gate="none"),
    "mixed_gate_static": replace(_MIXED, gate="static"),
    "mixed_gate_query": replace(_MIXED, gate="query"),
    "mixed_gate_indexed": replace(_MIXED, gate="indexed"),
    "mixed_gate_indexed_query": replace(_MIXED, gate="indexed_query"),
    "mixed_gate_inf": replace(_MIXED, gate_inf=True),
    "mixed_gate_query_inf": replace(_MIXED, gate="query", gate_inf=True),
    "mixed_causal": replace(_MIXED, causal=True, keys=40),
    "mixed_causal_square": replace(_MIXED, causal=True),
    "mixed_decode": replace(_MIXED, causal=True, queries=1, keys=40),
    "mixed_decode_padding": replace(_MIXED, causal=True, queries=1, keys=40, padding="left", gate="query"),
    "mixed_all_padding": replace(_MIXED, padding="all", rows=(-1, -1, 0, 1)),
    "mixed_no_keys_seen": replace(_MIXED, causal=True, offset=-5, gate="query"),
    "mixed_segments": replace(_MIXED, segments=True),
    "mixed_softcap_bias": replace(_MIXED, softcap=2.0, bias="1HTS", bias_grad=True),
    "mixed_sinks": replace(_MIXED, sinks=True, padding="all", rows=(-1, -1, 0, 1)),
    "mixed_dropout": replace(_MIXED, dropout=0.2),
    "mixed_prefix_float32": replace(_MIXED, dtype=torch.bfloat16, prefix_dtype=torch.float32),
    "mixed_everything": replace(
        CASES["everything"], batch=4, adapters=(5, 2, 3), rows=(1, -1, 0, 1), offset="row", gate_inf=True
    ),
}
# Those that implementations with one prefix for all rows compute.
ONE_PREFIX = dict(CASES)
CASES |= MIXED


SMALL = {"batch": 2, "kv_heads": 1, "group": 2, "queries": 3, "keys": 4, "length": 2, "head_dim": 3, "value_dim": 2}


def small(name: str) -> Case:
    """A named case small enough for numerical differentiation."""
    case = CASES[name]
    sizes = {**SMALL, "queries": 1 if case.queries == 1 else 3}
    if case.adapters:
        sizes |= {"batch": len(case.rows), "adapters": tuple(min(length, 2) for length in case.adapters)}
    return replace(case, **sizes, dtype=torch.float64, prefix_dtype=None, spread=1.0)
