"""`examples.py` under mypy, with the project's own settings: transformers' types are followed, mistakes are errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="the package mypy is not installed")

ROOT = Path(__file__).parents[2]
EXAMPLES = Path(__file__).with_name("examples.py")


def found() -> dict[int, list[tuple[str, str]]]:
    """What mypy says of each line: ``("R", type)`` or ``("E", message)``. One run, with the cache of `make lint`."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(EXAMPLES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    lines: dict[int, list[tuple[str, str]]] = {}
    for line in done.stdout.splitlines():
        parts = re.fullmatch(r"(.*?):(\d+): (error|note): (.*)", line)
        assert parts, line
        path, number, kind, text = parts.groups()
        assert Path(path).name == EXAMPLES.name, f"an error outside of the examples: {line}"
        revealed = re.fullmatch(r'Revealed type is "(.*)"', text)
        if revealed:
            # Types without their modules.
            lines.setdefault(int(number), []).append(("R", re.sub(r"\b(?:\w+\.)+(?=\w)", "", revealed[1])))
        elif kind == "error":
            lines.setdefault(int(number), []).append(("E", text))
    return lines


def test_the_examples_have_the_types_and_the_errors_that_they_say():
    said, wrong = found(), []
    for number, line in enumerate(EXAMPLES.read_text().splitlines(), 1):
        expected = re.search(r"  # ([RE]): (.*)$", line)
        have = said.pop(number, [])
        if expected is None:
            wrong += [f"{number}: unexpected: {text}" for _, text in have]
        elif not any(kind == expected[1] and text.startswith(expected[2]) for kind, text in have):
            wrong.append(f"{number}: expected {expected[0].strip()}, mypy says {have}")
    assert not wrong, "\n".join(wrong)


def test_every_public_name_has_a_type():
    """The names that `__getattr__` resolves lazily are also imported for type checkers, from the same modules."""
    import apt_kernels

    source = Path(apt_kernels.__file__).read_text()
    block = source[source.index("if TYPE_CHECKING:") : source.index("# These need transformers")]
    imported = {
        name.strip(): f".hf.{module}"
        for module, names in re.findall(r"from \.hf\.([\w.]+) import (.*)", block)
        for name in names.split(",")
    }
    assert imported == apt_kernels._HUGGING_FACE
