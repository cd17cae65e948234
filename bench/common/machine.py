"""The machine of a measurement: processor or GPU, threads, versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import apt_kernels

from . import sharing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("numpy", "peft", "pytest-benchmark")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that may affect a result; None: not installed."""
    found = {name: version for name, version in apt_kernels.info()["versions"].items() if version}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine(device: torch.device) -> dict:
    """The properties of the machine that may affect a result; not the host's name."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "APT_"))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "processor": processor(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "last_cache": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def slug(device: torch.device) -> str:
    """The folder of this machine's results."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}-{os.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*$", "", name.lower())).strip("-")


def line(found: dict) -> str:
    """A machine in one line."""
    return f"{found['device']}, {found['threads']} threads; {named(found['versions'])}"


def short(found: dict) -> str:
    """A machine without versions, for titles."""
    return f"{found['device']}, {found['threads']} threads"


def described(device: torch.device) -> str:
    """This machine and the versions in one line, this package's included."""
    return f"{line(machine(device))}, apt-kernels {apt_kernels.__version__}"


def named(found: dict[str, str | None]) -> str:
    """Versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def commit() -> dict:
    """The commit of the code, and whether files were changed since; without git, ``APT_COMMIT`` is the commit."""
    if os.environ.get("APT_COMMIT"):
        return {"id": os.environ["APT_COMMIT"], "dirty": None}

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        identity = git("rev-parse", "HEAD")
    except OSError:
        identity = None
    if identity is None:
        return {"id": "unknown", "dirty": None}
    return {
        "id": identity,
        "dirty": bool(git("status", "--porcelain", "--", "apt_kernels", "bench", "csrc", ":(exclude)bench/results")),
    }


def conditions(settings: str) -> str:
    """A line under a table of CPU times: the machine, the settings, the commit, and whether the machine was idle."""
    code, busy = commit(), sharing.busy_cores()
    changed = " with changes" if code["dirty"] else ""
    others = "" if busy is None or busy < sharing.BUSY else f"; not idle, other processes used {busy:.1f} cores"
    return f"{line(machine(torch.device('cpu')))}; {settings}, commit {code['id'][:12]}{changed}{others}"
