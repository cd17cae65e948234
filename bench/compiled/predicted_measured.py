"""Measured times of the cases that `bench.compiled.predict` predicts, to stand beside the predictions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from bench.common import machine
from bench.speed import tables

from .issue_model import CHIPS

# The strategies of the tables by the names of the benchmark's peers.
_PEERS = {
    "ours:triton:fused": "triton",
    "ours:triton:merge": "merge",
    "ours:triton:merge_flash4": "merge_flash4",
    "ours:cuda": "cuda",
    "concat_efficient": "concatenation",
}
# The strategies among which ``tiles._MERGED`` chooses.
_OURS = ("triton", "merge", "merge_flash4")


@dataclass(frozen=True)
class Measured:
    """Times of one machine: seconds by case, strategy and pass. ``said``: the machine and the commit."""

    chip: str
    said: str
    seconds: dict[str, dict[str, dict[str, float]]]

    def times(self, row: dict) -> dict[str, dict[str, float]] | None:
        """Milliseconds of a predicted case by strategy and pass; None: not measured."""
        found = self.seconds.get(row["case"]) if row["chip"] == self.chip else None
        if not found:
            return None
        return {name: {which: round(t * 1e3, 4) for which, t in passes.items()} for name, passes in found.items()}

    def text(self, row: dict) -> str | None:
        """The same as text: forward / forward + backward in milliseconds, the fastest first; None: not measured."""
        found = self.times(row)
        if not found:
            return None
        ordered = sorted(found.items(), key=lambda one: one[1].get("both", float("inf")))
        cells = (f"{name} {_text(times, 'forward')} / {_text(times, 'both')}" for name, times in ordered)
        return "; ".join(cells)

    def dispatch(self) -> str:
        """The entries of ``tiles._MERGED`` that follow: from which length on one library's kernel wins every case."""
        found = {dim: self._entry(dim) for dim in (64, 128)}
        lines = [f'    ("{CHIPS[self.chip].triton}", {dim}): ({json.dumps(e)[1:-1]}),' for dim, e in found.items() if e]
        if not lines:
            return (
                "apt_kernels/impl/triton/tiles.py: _MERGED stays as it is; no library's kernel wins all longest cases"
            )
        return "\n".join(["apt_kernels/impl/triton/tiles.py, for _MERGED:", *lines])

    def _entry(self, dim: int) -> tuple[str, int] | None:
        """A library's kernel and the length from which it wins every case of a head size; None: there is none."""
        winners: dict[int, set[str]] = {}
        for case, times in self.seconds.items():
            both = {name: passes["both"] for name, passes in times.items() if "both" in passes and name in _OURS}
            if f"-d{dim}-" in case and "triton" in both:
                tokens = int(re.search(r"-t(\d+)-", case)[1])
                winners.setdefault(tokens, set()).add(min(both, key=both.__getitem__))
        found = None
        for tokens in sorted(winners, reverse=True):
            if len(winners[tokens]) > 1 or winners[tokens] != winners[max(winners)]:
                break
            found = min(winners[tokens]), tokens
        return None if found is None or found[0] == "triton" else found


def _text(times: dict[str, float], which: str) -> str:
    return f"{times[which]:.3f}" if which in times else "-"


def load(folder: Path) -> Measured:
    """The results of a run of the registry ``predicted``.

    Raises:
        ValueError: they are of a machine that is not in `CHIPS`.
    """
    results = tables.load(folder)
    device = results.machine["device"]
    chip = next((name for name in CHIPS if re.search(rf"\b{name}\b", device)), None)
    if chip is None:
        raise ValueError(f"the results are of {device!r}; predictions need one of {', '.join(CHIPS)}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in results.rows:
        for peer, entry in row.peers.items():
            # By itself the implementation takes a strategy that it names.
            own = f"{peer}:{entry.info.get('note') or 'fused'}" if peer == "ours:triton" else peer
            if own in _PEERS:
                found.setdefault(row.case, {}).setdefault(_PEERS[own], {})[row.which] = entry.median
    return Measured(chip, f"Measured: {machine.line(results.machine)}; commit {'; '.join(results.taken)}.", found)
