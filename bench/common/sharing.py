"""Whether other processes use this machine's cores. Imports no torch, whose OpenMP reads its settings when loaded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

# Threads of OpenMP that wait actively keep their core; one core that another process uses then delays every operation.
# An idle desktop or server uses less than this, in cores.
BUSY = 0.25
_POLICY = "OMP_WAIT_POLICY"


def busy_cores(seconds: float = 0.3, source: Path = Path("/proc/stat")) -> float | None:
    """How many cores are in use while this process sleeps for ``seconds``; None: the system does not say."""
    try:
        before = _jiffies(source)
        time.sleep(seconds)
        after = _jiffies(source)
    except (OSError, ValueError, IndexError):  # not Linux
        return None
    used, total = (after[i] - before[i] for i in range(2))
    return (os.cpu_count() or 1) * used / total if total > 0 else None


def _jiffies(source: Path) -> tuple[int, int]:
    """Of all cores together: in use, and elapsed."""
    found = [int(number) for number in source.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(found) - found[3] - found[4], sum(found)  # idle, and waiting for a disk


def wait_passively(environment: MutableMapping[str, str] = os.environ, busy: float | None = None) -> None:
    """Set ``OMP_WAIT_POLICY=PASSIVE`` where other processes use the cores and the user has not chosen.

    An idle machine keeps OpenMP's default, which is what its users run with.
    """
    if _POLICY in environment:
        return
    busy = busy_cores() if busy is None else busy
    if busy is None or busy < BUSY:
        return
    environment[_POLICY] = "PASSIVE"
    print(
        f"Other processes use {busy:.1f} of {os.cpu_count()} cores. Figures will vary, and waiting threads give up "
        f"their core ({_POLICY}=PASSIVE).",
        file=sys.stderr,
    )
