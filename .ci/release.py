"""Whether this tree can be released: `python .ci/release.py v0.1.0` prints what is missing. Exit status 1: it cannot.

Needs Python 3.11 or newer and nothing else. `.github/workflows/release.yml` calls it before it builds.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
# Sentences that are true until the first release.
UNPUBLISHED = re.compile(r"not on PyPI yet|after the first release", re.IGNORECASE)


def version(root: Path) -> str:
    """``__version__`` of the package, read without importing it."""
    tree = ast.parse((root / "apt_kernels" / "__init__.py").read_text(encoding="utf-8"))
    (found,) = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and "__version__" in [getattr(target, "id", "") for target in node.targets]
    ]
    return found


def changes(root: Path, of: str) -> str | None:
    """The changelog's section of a version with a date; None: there is none."""
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(rf"^## \[{re.escape(of)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found and found[1].strip()


def missing(root: Path, tag: str) -> list[str]:
    """What a release of this tree under ``tag`` lacks."""
    found, own = [], version(root)
    if tag != f"v{own}":
        found.append(f"the tag is {tag}; apt_kernels.__version__ is {own}, so it needs to be v{own}")
    section = changes(root, own)
    if not section:
        state = "has no section" if section is None else "has an empty section"
        found.append(f"CHANGELOG.md {state} '## [{own}] - YYYY-MM-DD'")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository", "")
    if not re.fullmatch(r"https://[\w.-]+\.[a-z]+/\S+", address):
        found.append(
            f"pyproject.toml has the address {address!r}; it needs the repository's: "
            '[project.urls] with Repository = "https://..."'
        )
    for page in ("README.md", "docs/installation.md"):
        said = UNPUBLISHED.search((root / page).read_text(encoding="utf-8"))
        if said:
            found.append(f"{page} still says {said[0]!r}")
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(f"usage: python {sys.argv[0]} TAG", file=sys.stderr)
        return 2
    found = missing(ROOT, sys.argv[1])
    for line in found:
        print(f"release: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
