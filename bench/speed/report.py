"""Turn benchmark results into tables and plots, and compare two commits.

    python -m bench report bench/results/MACHINE [--out FOLDER] [--details]
    python -m bench report --compare HEAD~1:bench/results/MACHINE bench/results/MACHINE
    python -m bench report --update        # docs/ and bench/results/README.md from the committed JSON

A source is a JSON file, a folder of them, or ``REVISION:folder`` as committed in git.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.common import machine
from bench.common.markdown import markdown, milliseconds, number
from bench.speed import plots, targets

from .tables import Results, comparison, details, load, main_rows, table
from .words import case_in_words, ratio_in_words

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_EXPLAINED = (
    "Times are medians ± half the interquartile range. All peers are timed in turn in one process, after a check of "
    "output and gradients against the specification in float64. `no prefix` is the fastest stock attention without a "
    "prefix. `FLOPs / no prefix` is the arithmetic with the prefix, gate product included, divided by that without. "
    "`relative FLOP/s` is our arithmetic per second divided by that of `no prefix`. Ratios `peer / ours` above 1: ours "
    "is faster; a verdict is given only if the range of the quartiles excludes 1. Memory: peak bytes allocated during "
    "the pass, inputs excluded."
)
_COUNTED = (
    "Launches are counted, not timed: the Triton kernels interpreted with that chip's tiles, PyTorch's own kernels "
    "included ([launches.json](launches.json), `python -m bench compiled launches --update`; {}). Reasons for the "
    "missed targets: a float32 prefix of 512 columns or more is cast to the dtype of the keys first, key and value in "
    "one kernel each; decoding splits the keys among programs and merges their results in a second kernel."
)


def machines() -> dict[str, Path]:
    """Folders of committed results, by name."""
    return {path.name: path for path in sorted(machine.RESULTS.glob("*/")) if any(path.glob("*.json"))}


def heading(results: Results) -> str:
    """The machine line and what the figures were taken with."""
    return f"{machine.line(results.machine)}; {results.settings['dtype']}; commit {'; '.join(results.taken)}."


def everything(found: dict[str, Results]) -> str:
    """`bench/results/README.md`: targets, then a summary and the data of every machine."""
    counted = json.loads((machine.RESULTS / "launches.json").read_text(encoding="utf-8"))
    parts = [
        "# Results",
        "Generated: `python -m bench report --update`.",
        "## Targets",
        targets.table(list(found.values()), counted),
        "Undecided: the quartiles include values on both sides of the target. "
        + _COUNTED.format(machine.named(counted["versions"])),
        _EXPLAINED,
    ]
    for name, results in found.items():
        files = ", ".join(f"[{path.stem}]({name}/{path.name})" for path in sorted(machines()[name].glob("*.json")))
        parts += [f"## {name}", *_summary(name, results, "../../docs/"), f"Medians, quartiles and settings: {files}."]
        parts.append(f"Every peer and pass: `python -m bench report bench/results/{name} --details`.")
    parts.append(
        "## Other results\n\nCompiled Triton kernels: [compile/](compile/). Times on GPUs that a model predicts from "
        "counted instructions, not measured: [predictions/](predictions/README.md). Comparisons on labelled data: "
        "[quality/](quality/), explained in [docs/reproducing.md](../../docs/reproducing.md)."
    )
    return "\n\n".join(parts) + "\n"


def section(found: dict[str, Results]) -> str:
    """The section of docs/performance.md: the summary of every machine, and what is not measured."""
    parts = [part for name, results in found.items() for part in _summary(name, results, "")]
    if not any(results.cuda for results in found.values()):
        parts.append("On a GPU: not measured.")
    return "\n\n".join([*parts, _EXPLAINED])


def _summary(name: str, results: Results, folder: str) -> list[str]:
    """The machine, ours against PEFT, every case in one table, and the figures in ``folder``."""
    images = [f"![{plots.FIGURES[kind]}]({folder}bench-{name}-{kind}.png)" for kind in plots.FIGURES]
    parts = ["Whole models against PEFT:", _peft(results), "All cases:", _cases(results)]
    parts += ["Targets, each with its worst case:", targets.measured(results)]
    return [heading(results), *parts, *images]


def _peft(results: Results) -> str:
    reasons = {(entry["case"], entry["peer"]): entry["reason"] for entry in results.skipped}
    lines = []
    for row in main_rows(results):
        if row.stage not in ("training", "compiled"):
            continue
        time, memory = ratio_in_words(row, "peft"), number(row.memory_against("peft"))
        if row.ratio("peft") is None:
            time = f"not measured: {reasons.get((row.case, 'peft'), 'not asked for')}"
        lines.append([case_in_words(row), time, memory])
    return markdown(["case", "time, PEFT / ours (quartiles)", "memory, ours / PEFT"], lines)


def _cases(results: Results) -> str:
    lines = []
    for row in main_rows(results):
        cells = [case_in_words(row), milliseconds(row.ours.median), number(row.over_no_prefix)]
        cells += [number(row.flop_overhead and 1 + row.flop_overhead), ratio_in_words(row, "naive")]
        lines.append([*cells, number(row.memory_against("naive"))])
    header = ["case", "ours, ms", "time / no prefix", "FLOPs / no prefix", "naive / ours (quartiles)", "memory / naive"]
    return markdown(header, lines)


def generated(root: Path = machine.ROOT) -> dict[Path, str]:
    """Every generated text by its file."""
    found = {name: load(path) for name, path in machines().items()}
    page = root / "docs" / "performance.md"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RuntimeError(f"{page.name} has no section between {BEGIN} and {END}")
    return {
        page: f"{before}{begin}\n{section(found)}\n{end}{after}",
        root / "bench" / "results" / "README.md": everything(found),
    }


def update() -> None:
    """Write every generated text and picture."""
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, folder in machines().items():
        results = load(folder)
        for kind in plots.FIGURES:
            plots.draw(
                results, machine.ROOT / "docs" / f"bench-{name}-{kind}.png", machine.short(results.machine), (kind,)
            )
        plots.draw_models(results, machine.ROOT / "docs" / f"models-{name}.png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", help="results of one machine")
    parser.add_argument("--out", type=Path, help="also write report.md and report.png here")
    parser.add_argument("--details", action="store_true", help="the times of every peer, and why others are missing")
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--update", action="store_true", help="regenerate docs/ and bench/results/README.md")
    options = parser.parse_args(arguments)
    if options.update:
        update()
    if options.compare:
        print(comparison(*map(load, options.compare)))
    for source in options.sources:
        results = load(source)
        text = f"{heading(results)}\n\n{table(results)}\n\n{_EXPLAINED}\n"
        print(text + (f"\n{details(results)}\n" if options.details else ""))
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            rest = f"\n{targets.table([results])}\n\n{details(results)}\n"
            (options.out / "report.md").write_text(text + rest, encoding="utf-8")
            plots.draw(results, options.out / "report.png", machine.short(results.machine))
    if not (options.sources or options.compare or options.update):
        parser.print_usage()
        return 2
    return 0
