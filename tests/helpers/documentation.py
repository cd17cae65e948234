"""README.md and docs/ as data: their pages, code blocks, headings, links, and the messages that they quote."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def script(path: str) -> ModuleType:
    """A Python file of the repository that is in no package, imported anew."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Each fenced python block with the line number of its first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in found]


def notebook_cells(path: Path, kind: str) -> list[tuple[int, str]]:
    """The ``"code"`` or ``"markdown"`` cells of a notebook with their numbers, from 1."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [(i, "".join(cell["source"])) for i, cell in enumerate(cells, 1) if cell["cell_type"] == kind]


def prose(page: Path) -> str:
    """The page without its fenced blocks and code spans, in which links are not rendered."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def messages() -> Iterator[str]:
    """Every string of the package's sources, with ``\\0`` for what is filled in at run time."""
    for path in sorted((ROOT / "apt_kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)


def quoted(page: Path) -> list[str]:
    """The messages that a page's headings quote."""
    text = page.read_text(encoding="utf-8")
    return [heading for heading in re.findall(r"^### `(.+)`$", text, re.MULTILINE)]


def quotes(message: str, source: str) -> bool:
    """Whether ``message``, in which ``...`` leaves something out, is what ``source`` says."""
    parts = [re.escape(part) for part in re.split(r"\.\.\.", message)]
    return re.fullmatch(".*".join(parts), source, re.DOTALL) is not None


if __name__ == "__main__":  # `python -m helpers.documentation README.md` prints the code of a page
    print("".join(code for _, code in python_blocks(ROOT / sys.argv[1])))
