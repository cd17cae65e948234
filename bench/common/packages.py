"""Packages that a benchmark needs beside the environment's own, in folders of the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def installed(name: str, *requirements: str) -> Path:
    """A folder of the user's cache with ``requirements`` (arguments of pip) and none of their dependencies.

    Installed once for each ``name``; an interrupted installation leaves nothing behind.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apt_kernels"
    folder, begun = cache / name, cache / f"{name}.{os.getpid()}"
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(begun)]
        try:
            subprocess.run([*pip, *requirements], check=True)
            begun.rename(folder)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    return folder
