"""Figures as text: Markdown tables, numbers, milliseconds."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], aligned: bool = True) -> str:
    """A Markdown table; ``aligned``: cells of a column are padded to the same width."""
    rows = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in rows) if aligned else 0 for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * max(3, width + 2) for width in widths) + "|", *lines[1:]])


def number(value: float | None, form: str = ".2f") -> str:
    """A number, or ``-`` where there is none."""
    return "-" if value is None else format(value, form)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three or four digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
