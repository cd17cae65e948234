"""Builds the source distribution and the wheel as pip does, and installs a wheel into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

from .documentation import ROOT

_FOLDERS = ("apt_kernels", "csrc", "tests")
_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff")
_NOT_KEPT = ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST", "APT_KERNELS_CUDA")


def copy(to: Path) -> Path:
    """The files that distributions are made from, in a folder of their own."""
    for name in _FOLDERS:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in _FILES:
        shutil.copy(ROOT / name, to / name)
    return to


def run(folder: Path, code: str, python: str | Path = sys.executable, **environment: str) -> tuple[str, str]:
    """The last line that Python code prints to standard output, run in a folder, and its standard error."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_KEPT}
    done = subprocess.run([str(python), "-c", code], cwd=folder, capture_output=True, text=True, env=kept | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout.strip().splitlines() or [""])[-1], done.stderr


def build(folder: Path, kind: str, **environment: str) -> Path:
    """A ``"wheel"`` or ``"sdist"`` of a folder, by the functions that pip and build call."""
    name, _ = run(folder, f"import setuptools.build_meta as b; print(b.build_{kind}('dist'))", **environment)
    return folder / "dist" / name


def unpack(source: Path, to: Path) -> Path:
    """A source distribution, unpacked: what a wheel is made from."""
    with tarfile.open(source) as archive:
        archive.extractall(to, filter="data")
    return next(to.iterdir())


def install(wheel: Path, to: Path) -> Path:
    """An environment with the wheel installed by pip and nothing else; returns its Python.

    The packages that this Python has can be imported there too, in place of a download of torch and transformers. An
    editable installation of this tree cannot: it is a ``.pth`` file, which only a site folder's own are read.
    """
    venv.create(to, with_pip=False)
    python = to / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    packages = run(to, "import sysconfig; print(sysconfig.get_path('purelib'))", python)[0]
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    Path(packages, "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    return python
