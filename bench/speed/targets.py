"""Targets of the kernels, each with the measured figure and a verdict, or ``not measured``.

A target is met or missed only if it would be so at every value within the quartiles; otherwise it is undecided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from bench.common.markdown import markdown

from .tables import Results, Row
from .words import case_in_words

NOT_MEASURED = "not measured"
H200, CPU = "H200", "CPU"


@dataclass(frozen=True)
class Target:
    """``figure`` of the worst row among those that ``rows`` picks has to be ``limit`` or better."""

    text: str
    machine: str
    rows: Callable[[Row], bool]
    figure: Callable[[Row], float | None]
    limit: float
    at_most: bool
    subject: str = "ours"  # the peer whose time the target is about

    def worst(self, results: list[Results]) -> tuple[float, Row, int] | None:
        """The worst figure, its case, and how many cases there are."""
        found = [(value, row) for row in self._rows(results) if (value := self.figure(row)) is not None]
        return (*(max if self.at_most else min)(found, key=lambda pair: pair[0]), len(found)) if found else None

    def verdict(self, results: list[Results]) -> str:
        """``"met"``, ``"missed"``, or ``"undecided"`` where the quartiles include both."""
        rows = [row for row in self._rows(results) if self.figure(row) is not None]
        if all(self._passes(self._shifted(row, slow=True)) for row in rows):
            return "met"
        return "undecided" if all(self._passes(self._shifted(row, slow=False)) for row in rows) else "missed"

    def _rows(self, results: list[Results]) -> list[Row]:
        here = [r for r in results if (H200 in r.machine["device"] if self.machine == H200 else not r.cuda)]
        return [row for result in here for row in result.rows if row.ours is not None and self.rows(row)]

    def _passes(self, row: Row) -> bool:
        value = self.figure(row)
        return value <= self.limit if self.at_most else value >= self.limit

    def _shifted(self, row: Row, slow: bool) -> Row:
        """The row with the subject at its slow (or fast) quartile and all other peers at the opposite one."""
        subject = row.ours if self.subject == "ours" else row.peers.get(self.subject)
        peers = {
            name: replace(entry, median=entry.q3 if (entry is subject) == slow else entry.q1)
            for name, entry in row.peers.items()
        }
        return Row(row.stage, row.case, row.which, peers)


def _beyond_flops(row: Row) -> float | None:
    return None if row.over_no_prefix is None or row.flop_overhead is None else row.over_no_prefix - row.flop_overhead


def _against(*peers: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        return min((ratio for ratio in map(row.against, peers) if ratio is not None), default=None)

    return figure


def _ratio(one: str, other: str) -> Callable[[Row], float | None]:
    """One peer's time divided by another's, for any choice of the op."""

    def figure(row: Row) -> float | None:
        found = row.peers.get(one), row.peers.get(other)
        return None if None in found else found[0].median / found[1].median

    return figure


def _long(row: Row) -> bool:
    return row.stage in ("causal", "query") and row.which == "both" and row.shape["tokens"] >= 2048


def _peft(row: Row) -> bool:
    shape = row.shape
    return row.stage == "training" and (shape["size"], shape["tokens"], shape["length"]) == ("llama-1b", 2048, 64)


def _is(stage: str, which: str) -> Callable[[Row], bool]:
    return lambda row: (row.stage, row.which) == (stage, which)


def _memory(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row.memory_against(peer)


def _many_columns(row: Row) -> bool:
    return row.stage == "long" and row.which == "both" and row.shape["length"] == 4096


def _any_both(row: Row) -> bool:
    return row.which == "both"


def _main(row: Row) -> bool:
    """One row of every case, in the dtype of the run."""
    whole = row.which in ("both", "step", "token") or (row.stage, row.which) == ("decode", "forward")
    return whole and row.stage != "half"


def _from_1k(row: Row) -> bool:
    return _main(row) and row.stage in ("causal", "query") and row.shape["tokens"] >= 1024


def _causal_1k(row: Row) -> bool:
    return _from_1k(row) and row.stage == "causal"


def _from_128(row: Row) -> bool:
    return row.which == "both" and row.stage in ("encoder", "causal") and row.shape["tokens"] >= 128


def _folded(row: Row) -> bool:
    return (row.stage, row.which) == ("generation", "token") and row.shape["gate"] == "none"


def _every_shape(row: Row) -> bool:
    return row.which == "both" or (row.stage, row.which) == ("decode", "forward")


_STOCK = _against("concat_flash", "flex")
_ON_H200 = (
    (
        "causal, gates none, static, row: time / no prefix - FLOP overhead",
        _is("causal", "both"),
        _beyond_flops,
        1.05,
        True,
    ),
    ("causal, per-query gates: time / no prefix - FLOP overhead", _is("query", "both"), _beyond_flops, 1.10, True),
    ("encoder, padded: time / no prefix - FLOP overhead", _is("encoder", "both"), _beyond_flops, 1.10, True),
    ("causal, T >= 2k: naive / ours", _long, _against("naive"), 2.0, False),
    ("causal, T >= 2k: memory / naive", _long, _memory("naive"), 0.7, True),
    ("all shapes: concat_flash, flex / ours", _any_both, _STOCK, 1.0, False),
    ("encoder: concat_flash, flex / ours", _is("encoder", "both"), _STOCK, 1.15, False),
    ("M = 4096, batch 32: concat_flash / ours", _many_columns, _against("concat_flash"), 1.3, False),
    ("training step, Llama 1B, T = 2048, M = 64: peft / ours", _peft, _against("peft"), 1.5, False),
    ("the same: memory / peft", _peft, _memory("peft"), 0.7, True),
    ("decoding op, CUDA graph: time / no prefix", _is("decode", "graph"), lambda row: row.over_no_prefix, 1.05, True),
    ("decoding model: tokens a second / unpatched", _is("generation", "graph"), _against("no_prefix"), 0.98, False),
    (
        "CUDA library, every shape: naive / ours:cuda",
        _every_shape,
        _ratio("naive", "ours:cuda"),
        1.0,
        False,
        "ours:cuda",
    ),
    (
        "CUDA library, every shape: ours:triton / ours:cuda",
        _every_shape,
        _ratio("ours:triton", "ours:cuda"),
        0.33,
        False,
        "ours:cuda",
    ),
)
_ON_CPU = (
    ("all cases: naive / ours", _main, _against("naive"), 1.0, False),
    ("causal, from 1,024 tokens: naive / ours", _causal_1k, _against("naive"), 1.3, False),
    (
        "all cases: concat_flash, in_cache, peft / ours",
        _main,
        _against("concat_flash", "in_cache", "peft"),
        0.97,
        False,
    ),
    ("encoder and causal, from 128 tokens: time / no prefix - FLOP overhead", _from_128, _beyond_flops, 1.05, True),
    ("generation, no gate: time / no prefix", _folded, lambda row: row.over_no_prefix, 1.05, True),
    ("all cases: memory / naive", _main, _memory("naive"), 1.0, True),
    ("causal, from 1,024 tokens: memory / naive", _from_1k, _memory("naive"), 0.8, True),
    ("bfloat16: float32 / ours", _is("half", "both"), _against("float32"), 1.0, False),
)
TARGETS = (
    *(Target(text, H200, *rest) for text, *rest in _ON_H200),
    *(Target(text, CPU, *rest) for text, *rest in _ON_CPU),
)


# Counted by `python -m bench compiled launches`, no GPU needed: the text, the kind of case, the pass, the upper limit.
_COUNTED = (
    ("launches of a layer, forward", "training", "forward", 1),
    ("launches of a layer, backward", "training", "backward", 3),
    ("launches of a layer, forward, float32 prefix of 512 columns or more", "long", "forward", 1),
    ("launches of a layer, backward, the same", "long", "backward", 3),
    ("launches of a layer, decoding", "decoding", "forward", 1),
)


def _counted(record: dict) -> list[list[str]]:
    """The targets that are counted; launches of PyTorch's own kernels included."""
    lines = []
    for text, kind, which, limit in _COUNTED:
        found = [(row["all"], row["case"]) for row in record["passes"] if (row["kind"], row["pass"]) == (kind, which)]
        value, case = max(found)
        cells = [f"tiles of {record['tiles']}", text, f"at most {limit}", str(value)]
        lines.append([*cells, "met" if value <= limit else "missed", f"{case} (worst of {len(found)})"])
    return lines


def measured(results: Results) -> str:
    """The targets of which a machine has a figure."""
    return _table([target for target in TARGETS if target.worst([results])], [results], case_in_words)


def table(results: list[Results], counted: dict | None = None) -> str:
    """Every target with its worst measured figure; ``counted``: what `python -m bench compiled launches` recorded."""
    return _table(TARGETS, results, lambda row: row.case, _counted(counted) if counted else [])


def _table(
    targets: Iterable[Target], results: list[Results], name: Callable[[Row], str], more: Sequence[list[str]] = ()
) -> str:
    lines = []
    for target in targets:
        worst, sign = target.worst(results), "at most" if target.at_most else "at least"
        cells = [target.machine, target.text, f"{sign} {target.limit:.2f}"]
        if worst is None:
            lines.append([*cells, NOT_MEASURED, "", ""])
            continue
        value, row, count = worst
        lines.append([*cells, f"{value:.2f}", target.verdict(results), f"{name(row)} (worst of {count})"])
    return markdown(["machine", "figure", "target", "measured", "verdict", "case"], [*lines, *more])
