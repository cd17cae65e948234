"""Results as Markdown tables: a row per capability, a column per family, PEFT's row below ours, then the reasons."""

from __future__ import annotations

from collections.abc import Iterable

from helpers import models

from . import catalog

FAMILIES = models.FAMILIES
UNTRIED = "not tried"
# Results of one test and family, the worst first: several tests together show the worst of their results.
_ORDER = ("FAILS", "not run", "refused", "yes")


def outcome(row: dict) -> tuple[str, str | None]:
    """The result of one test: a word, and its reason if it has one."""
    if row["outcome"] == "passed":
        return ("refused", row["note"]) if row["note"] else ("yes", None)
    if row["outcome"] == "skipped":
        return "not run", row["note"]
    return "FAILS", None


def gather(rows: Iterable[dict]) -> dict:
    """``capability -> test -> family -> [word, reason]``, the worst of each."""
    shown: dict = {}
    for row in rows:
        family = row["family"]
        cells = shown.setdefault(row["capability"], {}).setdefault(row["test"], {})
        found = outcome(row)
        before = cells.get(family)
        if before is None or _ORDER.index(found[0]) < _ORDER.index(before[0]):
            cells[family] = list(found)
    return shown


class Notes:
    """Reasons by number."""

    def __init__(self):
        self.numbers: dict[str, int] = {}

    def __call__(self, reason: str | None) -> str:
        if not reason:
            return ""
        return f" [{self.numbers.setdefault(' '.join(reason.split()), len(self.numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def ours(tests: dict, family: str, absent: dict[str, str], note: Notes) -> str:
    """Our cell: yes only where every test of it passed."""
    found = [cells[family] for cells in tests.values() if family in cells]
    if not found:
        return f"-{note(absent[family])}" if family in absent else UNTRIED
    word, reason = min(found, key=lambda each: _ORDER.index(each[0]))
    best = max(found, key=lambda each: _ORDER.index(each[0]))[0]
    if word == "not run" and best == "yes":
        return f"yes, but not all ran{note(reason)}"
    if word == "refused" and best == "yes":
        return f"yes, but{note(reason)}"
    return word + note(reason)


def theirs(cells: dict | None, family: str, absent: dict[str, str], note: Notes) -> str:
    if family in absent:
        return "-"
    if not cells or family not in cells:
        return UNTRIED
    word, reason = cells[family]
    return word + note(reason)


def render(results: dict) -> str:
    """The whole document."""
    note, parts = Notes(), [_HEAD.format(**results["versions"])]
    listed = catalog.listed()
    others = {name: {} for name in sorted(results["shown"]) if name not in listed}
    for title, capabilities in {**catalog.SECTIONS, "Further": others}.items():
        present = {name: absent for name, absent in capabilities.items() if name in results["shown"]}
        if present:
            parts.append(_section(title, present, results, note))
    parts.append("\n".join(["## Reasons, and what PEFT says", "", *note.lines()]))
    return "\n\n".join(parts) + "\n"


def _section(title: str, capabilities: dict, results: dict, note: Notes) -> str:
    lines = [f"## {title}", "", f"| capability | | {' | '.join(FAMILIES)} |", "| --- " * (len(FAMILIES) + 2) + "|"]
    proofs = []
    for name, absent in capabilities.items():
        tests = results["shown"][name]
        mine = [ours(tests, family, absent, note) for family in FAMILIES]
        peft = [theirs(results["peft"].get(name), family, absent, note) for family in FAMILIES]
        lines += [f"| {name} | ours | {' | '.join(mine)} |", f"| | PEFT | {' | '.join(peft)} |"]
        proofs.append(f"- {name}: {', '.join(f'`{test}`' for test in sorted(tests))}")
    return "\n".join([*lines, "", "Shown by:", "", *proofs])


_HEAD = """# What works, with which models

Written by `make support` from a run of the tests on tiny random models: transformers {transformers}, torch {torch},
PEFT {peft}, Python {python}. The row below each capability shows the behaviour of PEFT's prefix tuning in the same
situation, from the same run.

| word | meaning |
| --- | --- |
| yes | every test passed; each compares with a second computation (oracle) and checks that the prefix has an effect |
| refused | it raises an error with the reason, which a test checks |
| not run | the test was skipped on that machine, for the reason given |
| not tried | no test covers this for that family |
| FAILS | a test failed |
| - | it does not apply to the family, for the reason given |
| right, WRONG, raises | PEFT: equal to recomputation; a different result without an error; an error |"""
