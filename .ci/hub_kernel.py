"""`attention` as a kernel for the package `kernels`: `python .ci/hub_kernel.py FOLDER` writes FOLDER/build.

`kernels.get_local_kernel(FOLDER, trust_remote_code=True)` loads it, and so does `get_kernel` from a repository of the
Hugging Face hub with this content. It is the part of the package that needs torch alone, with relative imports; its
operators are registered under the name of the build, so that several builds can be loaded in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "apt_kernels"
NAME = "apt-attention"
# The parts that `attention` needs, and what the kernel offers from them.
PARTS = ("errors.py", "mask.py", "transforms.py", "impl", "ops")
BACKENDS = ("cpu", "cuda", "rocm")
_INIT = '''"""Attention over a gated, scaled prefix and the keys, and its gradients: `attention`, `Mask`."""

from .errors import ArgumentError, ImplementationError
from .mask import Mask
from .ops.attention import attention, selected
from .ops.choose import info

__all__ = ["ArgumentError", "ImplementationError", "Mask", "attention", "info", "selected"]
'''


def sources() -> dict[str, str]:
    """The files of a build by their path in it."""
    found = {"__init__.py": _INIT}
    for part in PARTS:
        path = PACKAGE / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found[file.relative_to(PACKAGE).as_posix()] = file.read_text(encoding="utf-8")
    return found


def build(folder: Path, version: int = 1) -> list[Path]:
    """Write a build for each backend; returns their folders. A build that is there already is replaced."""
    files = sources()
    digest = hashlib.sha256(json.dumps([version, files], sort_keys=True).encode()).hexdigest()[:12]
    written = []
    for backend in BACKENDS:
        out = folder / "build" / f"torch-{backend}"
        shutil.rmtree(out, ignore_errors=True)
        for name, text in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
        metadata = {
            "id": f"apt_attention_{backend}_{digest}",
            "name": NAME,
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (out / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        written.append(out)
    return written


def main(given: list[str] | None = None) -> int:
    """Write the builds and print their folders."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="a folder, which becomes the kernel's repository")
    parser.add_argument("--version", type=int, default=1, help="the kernel's version on the hub")
    options = parser.parse_args(given)
    for out in build(options.folder, options.version):
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
