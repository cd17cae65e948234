"""What mkdocs needs beyond mkdocs.yml: pages outside docs/, and links that work on the site and in the repository.

Pages link to each other by paths in the repository. The pages of OUTSIDE become pages of the site; a link to any other
file outside docs/ becomes its path as text, until the project has an address to link to.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Repository path: page of the site.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
    "bench/results/README.md": "results.md",
    "bench/NOTES.md": "benchmark-notes.md",
    "examples/encoder.ipynb": "notebooks/encoder.md",
    "examples/decoder.ipynb": "notebooks/decoder.md",
    "examples/library.ipynb": "notebooks/library.md",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_files(files, config):
    for source, page in OUTSIDE.items():
        if page not in files.src_uris:
            content = (ROOT / source).read_text(encoding="utf-8")
            files.append(
                File.generated(config, page, content=notebook(content) if source.endswith(".ipynb") else content)
            )
    return files


def notebook(text: str) -> str:
    """A notebook as a page: the text of its cells, and their code as blocks."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page, config, files) -> str:
    here = next((source for source, uri in OUTSIDE.items() if uri == page.file.src_uri), None)
    source = here if here and page.file.src_uri != "index.md" else f"docs/{page.file.src_uri}"

    def rewrite(link: re.Match) -> str:
        image, text, target = link.groups()
        path, _, anchor = target.partition("#")
        if "://" in path or not path:
            return link[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = OUTSIDE.get(wanted) or (wanted.removeprefix("docs/") if wanted.startswith("docs/") else None)
        if uri is None or (uri not in files.src_uris and not (ROOT / "docs" / uri).exists()):
            if not (ROOT / wanted).exists():
                return link[0]  # broken: mkdocs reports it
            return text if wanted in text else f"{text} (`{wanted}`)"
        relative = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```$|`[^`\n]+`(?!\]))", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else _LINK.sub(rewrite, part) for i, part in enumerate(parts))
