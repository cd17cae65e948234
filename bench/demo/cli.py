"""`python -m bench demo`: one of the two demos, chosen by ``--task``."""

from __future__ import annotations

import argparse
import importlib

TASKS = {"document": "bench.demo.document", "docstrings": "bench.demo.classification"}


def main(argv: list[str] | None = None) -> int:
    """Run the demo that ``--task`` names with the other arguments. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench demo", add_help=False, allow_abbrev=False)
    parser.add_argument("--task", choices=TASKS, default="document")
    chosen, rest = parser.parse_known_args(argv)
    return importlib.import_module(TASKS[chosen.task]).main(rest)
