"""The commands of ``python -m bench compiled``; without a command, `report`."""

from __future__ import annotations

import importlib
import sys

# The module that implements a command: its ``main`` takes the arguments and returns the exit status.
COMMANDS = {
    "report": "bench.compiled.report",
    "library": "bench.compiled.cuda_report",
    "cuda-rates": "bench.compiled.cuda_rates",
    "flash4": "bench.compiled.flash4",
    "launches": "bench.compiled.launches",
    "overhead": "bench.compiled.launch_overhead",
    "predict": "bench.compiled.predict",
    "rates": "bench.compiled.rates",
    "schedule": "bench.compiled.schedule",
    "tune": "bench.compiled.tune",
}


def main(given: list[str] | None = None) -> int:
    """Run one command; the exit status is that of the command."""
    given = sys.argv[1:] if given is None else given
    name, rest = (given[0], given[1:]) if given and given[0] in COMMANDS else ("report", given)
    return importlib.import_module(COMMANDS[name]).main(rest)
