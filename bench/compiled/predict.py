"""Predict the times of the kernels from their counted instructions, with no GPU and no compiler.

    python -m bench compiled predict                                      print the tables
    python -m bench compiled predict --chip H100 T4                       some chips
    python -m bench compiled predict --write bench/results/predictions    write README.md and predictions.jsonl

Predictions of a model (`bench.compiled.issue_model`), not measured. To measure the same cases and put the times beside
the predictions, with the entries for the choice of `apt_kernels.impl.triton.tiles` that follow:

    APT_REGISTRY=predicted APT_MINUTES=20 APT_STAGES="library machine encoder causal" \\
        APT_PEERS=ours,concat_efficient bash bench/gpu.sh
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from bench.common.machine import RESULTS
from bench.common.markdown import markdown
from bench.speed import counts
from bench.speed.shapes import PREDICTED, Shape

from . import issue_model, library_model, predicted_measured, triton_model
from .issue_model import CHIPS, NotCountedError, Predicted
from .predicted_measured import Measured

FOLDER = RESULTS / "predictions"
MARK = "Predictions of a model, not measured"
NOT_COUNTED, NOT_MEASURED = "not counted", "not measured"
UNDECIDED, NO_CALL = "undecided", "does not apply"
# The chips of the CUDA library's table; the other table has those on which Triton runs.
LIBRARY_CHIPS = ("T4", "A10", "RTX 4090")
PASSES = {"forward": ("forward",), "both": ("forward", "backward")}
# The strategies of each table, and what computes their work.
TABLES: dict[str, dict[str, Callable]] = {
    "triton": {"triton": triton_model.triton, "merge_flash4": triton_model.merge_flash4},
    "cuda": {"cuda": library_model.library, "concatenation": library_model.concatenated},
}


def seconds(works: Callable, shape: Shape, name: str, passes: tuple[str, ...]) -> Predicted | str:
    """The predicted time of some passes, one after another; a text: the count that is missing."""
    found, chip = [], issue_model.chip(name)
    try:
        for which in passes:
            found.append(issue_model.predict(works(shape, chip, which), chip))
    except NotCountedError as missing:
        return str(missing)
    return sum(found[1:], found[0])


def favoured(times: dict[str, Predicted | str], is_bound: bool) -> str:
    """The one of two strategies that is faster with and without overlap.

    ``is_bound``: of the second one only a bound from below is known, which can only show that the first is faster.
    """
    (name, one), (other, two) = times.items()
    if isinstance(one, str) or isinstance(two, str):
        return "-"
    if is_bound:
        return name if one.most < two.least else UNDECIDED
    if one.least < two.least and one.most < two.most:
        return name
    return other if two.least < one.least and two.most < one.most else UNDECIDED


def _figures(found: Predicted | str, shape: Shape, chip: str, which: str) -> dict:
    if isinstance(found, str):
        return {NOT_COUNTED: found}
    flops = counts.attention_flops(shape, counts.visible(shape) + shape.length, which)
    return {
        "least_ms": round(found.least * 1e3, 4),
        "most_ms": round(found.most * 1e3, 4),
        "bound": found.bound,
        "share_of_peak": [round(share, 3) for share in found.share(flops, CHIPS[chip])],
    }


def row(table: str, shape: Shape, chip: str) -> dict:
    """A case as data: milliseconds of each strategy and pass, or the count that is missing."""
    found = {
        "table": table, "chip": chip, "case": shape.name, "head_dim": shape.dim, "tokens": shape.tokens,
        "mask": "causal" if shape.causal else "full", "gate": shape.gate, "predicted": {}, "favoured": {},
        "measured": None,
    }  # fmt: skip
    strategies = dict(TABLES[table])
    if shape.gate_per_query:
        strategies.pop("concatenation", None)  # every query would need keys of its own
    for which, passes in PASSES.items():
        times = {name: seconds(works, shape, chip, passes) for name, works in strategies.items()}
        found["predicted"][which] = {name: _figures(time, shape, chip, which) for name, time in times.items()}
        found["favoured"][which] = favoured(times, table == "cuda") if len(times) == 2 else "-"
    return found


@cache
def rows(table: str, chip: str) -> tuple[dict, ...]:
    """The cases of a table on a chip, by head size and gate."""
    shapes = [shape for kind in PREDICTED[table].values() for shape in kind]
    shapes.sort(key=lambda shape: (shape.dim, ("none", "row", "query").index(shape.gate), shape.tokens))
    return tuple(row(table, shape, chip) for shape in shapes)


def chips_of(table: str, chips: Iterable[str]) -> list[str]:
    """Those of the chips that a table has."""
    return [name for name in chips if (name in LIBRARY_CHIPS if table == "cuda" else CHIPS[name].triton)]


# --- as text


def _range(found: dict | None, is_bound: bool) -> str:
    if found is None:
        return NO_CALL
    if NOT_COUNTED in found:
        return NOT_COUNTED
    return f"{found['least_ms']:.3f}" + ("" if is_bound else f" to {found['most_ms']:.3f}")


def _cells(found: dict, which: str) -> list[str]:
    """A pass of a case: our time, its share of the peak and its bound, the other's time, and the faster one."""
    names = list(TABLES[found["table"]])
    ours, peer = (found["predicted"][which].get(name) for name in names)
    share = "-" if NOT_COUNTED in ours else "{:.2f} to {:.2f}".format(*ours["share_of_peak"])
    peers = _range(peer, is_bound=found["table"] == "cuda")
    return [_range(ours, False), share, ours.get("bound", "-"), peers, found["favoured"][which]]


def _cases(table: str, chip: str) -> list[dict]:
    """The cases of a table on a chip; a head size and gate of which nothing is counted is one, for ``"all"``."""
    found, seen = [], set()
    for one in rows(table, chip):
        group = one["head_dim"], one["gate"]
        if all(NOT_COUNTED in times for which in PASSES for times in one["predicted"][which].values()):
            one = {**one, "case": "all", "tokens": "all", "mask": "all"}
        if one["case"] != "all" or group not in seen:
            found.append(one)
        seen.add(group)
    return found


def table_of(table: str, chips: Iterable[str], measured: Measured | None = None) -> str:
    """A table as Markdown."""
    ours, peer = TABLES[table]
    other = f"`{peer}`" if table == "triton" else f"{peer}, at least"
    header = ["chip", "head_dim", "tokens", "mask", "gate"]
    for which in ("forward", "forward + backward"):
        header += [f"`{ours}`, {which}, ms", "share of peak", "bound", f"{other}, {which}, ms", "favoured"]
    lines = []
    for one in (one for chip in chips_of(table, chips) for one in _cases(table, chip)):
        gate = "none, static or row" if (table, one["gate"]) == ("cuda", "none") else one["gate"]
        tokens = f"{one['tokens']:,}" if one["tokens"] != "all" else "all"
        cells = [one["chip"], str(one["head_dim"]), tokens, one["mask"], gate]
        cells += [*_cells(one, "forward"), *_cells(one, "both"), *([NOT_COUNTED] if table == "triton" else [])]
        lines.append([*cells, (measured and measured.text(one)) or NOT_MEASURED])
    header += ["`merge` (cuDNN)"] if table == "triton" else []
    return markdown([*header, "measured"], lines, aligned=False)


def chip_table(chips: Iterable[str]) -> str:
    """The figures of the chips, and where they are from."""
    header = ["chip", "compute capability", "multiprocessors", "clock, GHz", "multiply-adds a cycle", "peak, TFLOP/s"]
    lines = []
    for name in chips:
        chip = CHIPS[name]
        cells = [name, chip.capability, chip.processors, f"{chip.clock / 1e9:.3f}", chip.multiply_adds]
        lines.append([*cells, f"{chip.peak / 1e12:.0f}", f"{chip.bandwidth / 1e9:.0f}", chip.source])
    return markdown([*header, "bandwidth, GB/s", "source"], lines, aligned=False)


_READING = (
    "`least to most`: with all work of a kernel overlapped, and with products and the other instructions one after "
    "another. Both are too short: no wait for memory or a barrier is counted, and a plain Triton kernel has been "
    "published at 0.57 to 0.73 of the rate at the slower end (bench/NOTES.md). `share of peak`: the arithmetic of "
    "attention over the chip's dense peak. `bound`: the work that takes longest: `issue` (instructions), "
    "`exponentials`, `tensor` (matrix products) or `bytes`. `favoured`: the faster of the two at both ends of the "
    "range. `not counted`: a loop that the call runs has no count; predictions.jsonl names it."
)
_TRITON = (
    f"{MARK}: 32 query heads, 8 key heads, 8,192 tokens in a batch, prefix of 64, bfloat16, counts of Triton "
    f"{triton_model.TRITON}. `merge_flash4`: flash-attn-4 on the tokens, our kernels on the prefix. cuDNN's kernels "
    "are not counted."
)
_LIBRARY = (
    f"{MARK}: 16 heads, 16,384 tokens in a batch, prefix of 64, float16. `concatenation, at least`: the prefix "
    "concatenated to keys and values, and PyTorch's memory-efficient attention, with a dense mask where the call is "
    "causal. Its instructions are not counted and no published time is at hand, so its products run at the chip's "
    "peak: a bound from below, in which every tensor passes through memory (a cache that holds tensors between kernels "
    "would lower it). `favoured` names the library only where its time without overlap is below that bound. The "
    "general loops, which are not counted, compute the gradients of keys on 7.5, and those of the prefix for heads of "
    "128."
)


def everything(chips: Iterable[str] = tuple(CHIPS), measured: Measured | None = None) -> str:
    """The contents of README.md."""
    chips = list(chips)
    parts = [
        f"# {MARK}",
        "Generated: `python -m bench compiled predict --write bench/results/predictions`. A test holds this page to "
        "the counted instructions in `bench/compiled/budgets.json`. "
        + (measured.said if measured else "No kernel of this page was run on a GPU."),
        _READING,
    ]
    for table, title, caption in (("triton", "Triton kernels", _TRITON), ("cuda", "CUDA library", _LIBRARY)):
        if chips_of(table, chips):
            parts += [f"## {title}: predictions, not measured", caption, table_of(table, chips, measured)]
    parts += ["## Chips", "Peaks are dense, half precision with float32 sums.", chip_table(chips)]
    return "\n\n".join([*parts, "## The model", issue_model.__doc__.partition("\n\n")[2].strip()]) + "\n"


def data(chips: Iterable[str] = tuple(CHIPS), measured: Measured | None = None) -> str:
    """The contents of predictions.jsonl: a case in each line."""
    found = [one for table in TABLES for chip in chips_of(table, chips) for one in _cases(table, chip)]
    lines = [{"note": MARK, **one, "measured": measured and measured.times(one)} for one in found]
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def files(folder: Path = FOLDER, measured: Measured | None = None) -> dict[Path, str]:
    """Every generated text by its file."""
    return {
        folder / "README.md": everything(measured=measured),
        folder / "predictions.jsonl": data(measured=measured),
    }


def main(given: list[str] | None = None) -> int:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compiled predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--chip", nargs="+", choices=CHIPS, default=list(CHIPS), metavar="NAME", help=f"of {', '.join(CHIPS)}"
    )
    parser.add_argument(
        "--write", type=Path, metavar="FOLDER", help="write README.md and predictions.jsonl of all chips"
    )
    parser.add_argument("--measured", type=Path, metavar="FOLDER", help="results of these cases, to stand beside")
    options = parser.parse_args(given)
    try:
        measured = options.measured and predicted_measured.load(options.measured)
    except ValueError as error:
        parser.error(str(error))
    if options.write is None:
        print(everything(options.chip, measured))
    else:
        options.write.mkdir(parents=True, exist_ok=True)
        for path, text in files(options.write, measured).items():
            path.write_text(text, encoding="utf-8")
            print(path)
    if measured:
        print(measured.dispatch())
    return 0


if __name__ == "__main__":
    sys.exit(main())
