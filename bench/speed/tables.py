"""Results as rows, one for each case and pass: ours against every peer that ran in the same process."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.common import machine
from bench.common.markdown import markdown, milliseconds, number

from .registry import STAGES

# The pass that represents a case in the tables.
MAIN = {"both", "step", "token", "graph", "first"}
ORDER = ("naive", "concat_flash", "concat_efficient", "flex", "peft", "cartridge", "in_cache", "float32")


def statistics_of(samples: list[float]) -> dict:
    """What a result file holds of the times of one peer and pass, in seconds to six digits."""
    low, _, high = (samples * 3)[:3] if len(samples) < 2 else statistics.quantiles(samples, n=4)
    found = {"median": statistics.median(samples), "q1": low, "q3": high, "min": min(samples), "max": max(samples)}
    return {**{name: float(f"{value:.6g}") for name, value in found.items()}, "rounds": len(samples)}


def compact(text: str) -> str:
    """The same JSON with one line for each entry of its lists."""
    parts = []
    for name, value in json.loads(text).items():
        if isinstance(value, list) and value:
            body = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        else:
            body = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@dataclass(frozen=True)
class Entry:
    """The times of one peer in one pass: median and quartiles in seconds, and the number of rounds."""

    median: float
    q1: float
    q3: float
    rounds: int
    info: dict

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        return (self.q3 - self.q1) / 2 / self.median


@dataclass
class Row:
    """One case and pass. Times in seconds."""

    stage: str
    case: str
    which: str
    peers: dict[str, Entry] = field(default_factory=dict)

    @property
    def shape(self) -> dict:
        return next(iter(self.peers.values())).info["shape"]

    @property
    def ours(self) -> Entry | None:
        """Ours; for the op, the implementation that it chooses by itself."""
        if "ours" in self.peers:
            return self.peers["ours"]
        return next((entry for entry in self.peers.values() if entry.info.get("automatic")), None)

    @property
    def no_prefix(self) -> Entry | None:
        """The fastest attention without a prefix."""
        found = [entry for name, entry in self.peers.items() if name.split(":")[0] == "no_prefix"]
        return min(found, key=lambda entry: entry.median, default=None)

    def against(self, peer: str) -> float | None:
        """A peer's time by ours: above 1, ours is faster."""
        if self.ours is None or peer not in self.peers:
            return None
        return self.peers[peer].median / self.ours.median

    def ratio(self, peer: str) -> tuple[float, float, float] | None:
        """A peer's time by ours: of the medians, and the least and the most that the quartiles allow."""
        ours, other = self.ours, self.peers.get(peer)
        if ours is None or other is None:
            return None
        return other.median / ours.median, other.q1 / ours.q3, other.q3 / ours.q1

    def memory_against(self, peer: str) -> float | None:
        """Our peak memory by a peer's."""
        if self.ours is None or peer not in self.peers or not self.peers[peer].info.get("peak_bytes"):
            return None
        return self.ours.info["peak_bytes"] / self.peers[peer].info["peak_bytes"]

    @property
    def over_no_prefix(self) -> float | None:
        """Our time by that without a prefix."""
        return None if self.ours is None or self.no_prefix is None else self.ours.median / self.no_prefix.median

    @property
    def flop_overhead(self) -> float | None:
        """FLOP overhead: the arithmetic that the prefix adds, gate product included, by that without a prefix."""
        return None if self.ours is None else self.ours.info.get("flop_overhead")

    @property
    def relative_rate(self) -> float | None:
        """Relative FLOP/s: our arithmetic per second by that without a prefix."""
        if self.over_no_prefix is None or self.flop_overhead is None:
            return None
        return (1 + self.flop_overhead) / self.over_no_prefix


@dataclass
class Results:
    """The stages of one machine at one commit."""

    machine: dict
    commit: dict
    settings: dict
    rows: list[Row]
    skipped: list[dict]
    taken: tuple[str, ...] = ()  # the commits, and the settings of the environment, where stages differ

    @property
    def cuda(self) -> bool:
        return "cuda" in self.machine


def load(source: str | Path) -> Results:
    """From a JSON file, a folder of them, or ``REVISION:folder`` as committed in git."""
    texts = list(_texts(source))
    if not texts:
        raise FileNotFoundError(f"{source} has no results; it needs a JSON file, a folder of them, or REVISION:folder")
    files = [json.loads(text) for text in texts]
    order = {stage: i for i, stage in enumerate(STAGES)}
    rows: dict[tuple, Row] = {}
    for given in files:
        for entry in given["benchmarks"]:
            info = entry["extra_info"]
            key = info["stage"], info["case"], info["which"]
            row = rows.setdefault(key, Row(*key))
            row.peers[info["peer"]] = Entry(*(entry["stats"][name] for name in ("median", "q1", "q3", "rounds")), info)
    first = files[0]
    ordered = sorted(rows.values(), key=lambda row: order.get(row.stage, len(order)))
    skipped = [entry for given in files for entry in given["skipped"]]
    taken = tuple(sorted({_taken(given) for given in files}))
    return Results(first["machine_info"], first["commit_info"], first["settings"], ordered, skipped, taken)


def _taken(given: dict) -> str:
    """The commit of one file, and what of the environment was set."""
    commit, environment = given["commit_info"], given["machine_info"].get("environment", {})
    settings = [f"{name}={value}" for name, value in environment.items()]
    return ", ".join([commit["id"][:12] + (" with changes" if commit["dirty"] else ""), *settings])


def _texts(source: str | Path) -> Iterable[str]:
    path = Path(source)
    if path.is_dir():
        return [file.read_text(encoding="utf-8") for file in sorted(path.glob("*.json"))]
    if path.is_file():
        return [path.read_text(encoding="utf-8")]
    revision, colon, folder = str(source).partition(":")
    if not colon:
        return []

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=machine.ROOT)
        if done.returncode:
            raise FileNotFoundError(f"{source}: {done.stderr.strip()}")
        return done.stdout

    names = git("ls-tree", "--name-only", revision, "--", f"{folder.rstrip('/')}/").split()
    return [git("show", f"{revision}:{name}") for name in sorted(names) if name.endswith(".json")]


def main_rows(results: Results) -> list[Row]:
    """One row for each case; a CUDA graph where one was captured."""
    graphed = {row.case for row in results.rows if row.which == "graph" and row.ours}
    chosen = MAIN | ({"forward"} if results.rows else set())
    found = []
    for row in results.rows:
        decoding = row.stage in ("decode", "generation")
        if row.which == "forward" and row.stage != "decode":
            continue
        if decoding and row.case in graphed and row.which != "graph":
            continue
        if row.which in chosen and row.ours is not None:
            found.append(row)
    return found


def table(results: Results) -> str:
    """One row a case: our time, the arithmetic, the time without a prefix, every peer's time by ours, memory."""
    rows = main_rows(results)
    present = [peer for peer in ORDER if any(peer in row.peers for row in rows)]
    header = [
        "stage",
        "case",
        "pass",
        "ours, ms",
        "strategy",
        "TFLOP/s",
        "time / no prefix",
        "FLOPs / no prefix",
        "relative FLOP/s",
    ]
    header += [f"{peer} / ours" for peer in present] + ["memory, MiB", "memory / naive"]
    lines = []
    for row in rows:
        ours = row.ours
        flops = ours.info.get("flops")
        cells = [row.stage, row.case, row.which, f"{milliseconds(ours.median)} ±{ours.spread:.0%}"]
        cells += [ours.info.get("note", ""), number(flops and flops / ours.median / 1e12, ".3g")]
        cells += [
            number(row.over_no_prefix),
            number(row.flop_overhead and 1 + row.flop_overhead),
            number(row.relative_rate, ".0%"),
        ]
        cells += [number(row.against(peer)) for peer in present]
        peak = ours.info.get("peak_bytes")
        cells += [number(peak and peak / 2**20, ".1f"), number(row.memory_against("naive"))]
        lines.append(cells)
    return markdown(header, lines)


def details(results: Results) -> str:
    """Every peer of every case and pass, and why the others are missing."""
    header = ["case", "pass", "peer", "median, ms", "spread", "rounds", "peak, MiB", "error / allowed", "note"]
    lines = []
    for row in results.rows:
        for peer, entry in row.peers.items():
            peak = entry.info.get("peak_bytes")
            cells = [
                row.case,
                row.which,
                peer,
                milliseconds(entry.median),
                f"{entry.spread:.0%}",
                str(entry.rounds),
            ]
            cells += [number(peak and peak / 2**20, ".1f"), number(entry.info.get("error")), entry.info.get("note", "")]
            lines.append(cells)
    reasons: dict[tuple[str, str], int] = {}
    for entry in results.skipped:
        reasons[entry["peer"], entry["reason"]] = reasons.get((entry["peer"], entry["reason"]), 0) + 1
    missing = markdown(
        ["peer", "not measured because", "cases"], [[*key, str(count)] for key, count in sorted(reasons.items())]
    )
    return f"{markdown(header, lines)}\n\n{missing}"


def left_out(skipped: list[dict]) -> list[str]:
    """What was not measured, a line for each reason; reasons that differ in numbers only are one."""
    found: dict[str, tuple[str, set, set]] = {}
    for entry in skipped:
        key = re.sub(r"[\d,.]*\d", "#", entry["reason"])
        _, peers, cases = found.setdefault(key, (entry["reason"], set(), set()))
        peers.add(entry["peer"])
        cases.add(entry["case"])
    return [
        f"{', '.join(sorted(peers))} ({len(cases)} case{'s' * (len(cases) > 1)}): {reason}"
        for reason, peers, cases in sorted(found.values(), key=lambda group: (sorted(group[1]), group[0]))
    ]


def comparison(before: Results, after: Results) -> str:
    """Two commits, row by row. Each ratio was taken within one run; times of different runs are only shown."""
    known = {(row.stage, row.case, row.which): row for row in before.rows}
    header = ["case", "pass", "before, ms", "after, ms", "before / no prefix", "after / no prefix", "speed-up"]
    header += ["naive / before", "naive / after"]
    lines = []
    for row in after.rows:
        old = known.get((row.stage, row.case, row.which))
        if old is None or old.ours is None or row.ours is None:
            continue
        cells = [row.case, row.which, milliseconds(old.ours.median), milliseconds(row.ours.median)]
        cells += [number(old.over_no_prefix), number(row.over_no_prefix)]
        gain = None if not (old.over_no_prefix and row.over_no_prefix) else old.over_no_prefix / row.over_no_prefix
        cells += [number(gain), number(old.against("naive")), number(row.against("naive"))]
        lines.append(cells)
    heads = [
        f"{name}: commit {r.commit['id'][:12]}, {machine.line(r.machine)}"
        for name, r in (("before", before), ("after", after))
    ]
    return "\n".join(
        [*heads, "", markdown(header, lines), "", "Speed-up: of the time by that without a prefix in the same run."]
    )
