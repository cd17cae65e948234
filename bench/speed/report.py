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

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_EXPLAINED = (
    "Times are medians ± half the interquartile range. All peers are timed in turn in one process, after a check of "
    "output and gradients against the specification in float64. `no prefix` is the fastest stock attention without a "
    "prefix. `FLOPs / no prefix` is the arithmetic with the prefix, gate product included, divided by that without. "
    "`relative FLOP/s` is our arithmetic per second divided by that of `no prefix`. Ratios `peer / ours` above 1: ours "
    "is faster. Memory: peak bytes allocated during the pass, inputs excluded."
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
    """`bench/results/README.md`: targets, then every machine's table and details."""
    counted = json.loads((machine.RESULTS / "launches.json").read_text(encoding="utf-8"))
    parts = [
        "# Results",
        "Generated: `python -m bench report --update`.",
        "## Targets",
        targets.table(list(found.values()), counted),
        _COUNTED.format(machine.named(counted["versions"])),
        _EXPLAINED,
    ]
    for name, results in found.items():
        parts += [f"## {name}", heading(results), table(results), "### Every peer", details(results)]
    return "\n\n".join(parts) + "\n"


def section(found: dict[str, Results]) -> str:
    """The section of docs/performance.md: a short table and a figure for every machine, and what is not measured."""
    parts = []
    for name, results in found.items():
        parts += [heading(results), _short(results), f"![Times, memory and ratios on {name}](bench-{name}.png)"]
    if not any(results.cuda for results in found.values()):
        parts.append("On a GPU: not measured.")
    parts.append(_EXPLAINED)
    return "\n\n".join(parts)


def _short(results: Results) -> str:
    lines = []
    for row in main_rows(results):
        cells = [row.case, row.which, milliseconds(row.ours.median), number(row.over_no_prefix)]
        cells += [
            number(row.flop_overhead and 1 + row.flop_overhead),
            number(row.against("naive")),
            number(row.against("peft")),
        ]
        lines.append([*cells, number(row.memory_against("naive"))])
    header = [
        "case",
        "pass",
        "ours, ms",
        "time / no prefix",
        "FLOPs / no prefix",
        "naive / ours",
        "peft / ours",
        "memory / naive",
    ]
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
        plots.draw(results, machine.ROOT / "docs" / f"bench-{name}.png", machine.line(results.machine))
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
            plots.draw(results, options.out / "report.png", machine.line(results.machine))
    if not (options.sources or options.compare or options.update):
        parser.print_usage()
        return 2
    return 0
