"""The table of `docs/support.md`: ``python -m bench.capabilities`` runs the tests marked `proves` and writes it."""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TABLE = Path(__file__).parent.parent / "docs" / "support.md"


def run(arguments: list[str]) -> list[dict]:
    """What the tests marked `proves` showed, for every family."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capabilities.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "proves", f"--capabilities={path}", *arguments]
        subprocess.run(command, check=False, env={**os.environ, "APT_TEST_EVERY_FAMILY": "1"})
        return json.loads(path.read_text())


def table(rows: list[dict]) -> str:
    """Capabilities down, families across; a cell is yes only where every test of it passed in this run."""
    outcomes = collections.defaultdict(list)
    tests = collections.defaultdict(set)
    for row in rows:
        outcomes[row["capability"], row["family"] or "any"].append(row["outcome"])
        tests[row["capability"]].add(row["test"])
    families = sorted({family for _, family in outcomes})
    lines = [f"| capability | {' | '.join(families)} | shown by |", "| --- " * (len(families) + 2) + "|"]
    for capability in sorted(tests):
        cells = [_cell(outcomes.get((capability, family))) for family in families]
        lines.append(
            f"| {capability} | {' | '.join(cells)} | {', '.join(f'`{t}`' for t in sorted(tests[capability]))} |"
        )
    return "\n".join(lines)


def _cell(found: list[str] | None) -> str:
    if found is None:
        return ""
    if "failed" in found:
        return "FAILS"
    return "yes" if "passed" in found else "not run here"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest")
    rows = run(parser.parse_args().pytest)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    TABLE.write_text(
        "# What is shown to work\n\nWritten by `python -m bench.capabilities` from a test run: a cell says yes where "
        "the test passed in that run with that model family, and is empty where no test asks. "
        f"Versions: {versions}.\n\n{table(rows)}\n"
    )


if __name__ == "__main__":
    main()
