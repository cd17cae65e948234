"""Builds the CUDA library: ``python csrc/build.py`` puts it into the source tree; `setup.py` calls it for a wheel.

The same kernels also build for the host (`build_host`), where the tests run them. Needs torch's headers, and nvcc for
the device. Environment: ``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST``, ``MAX_JOBS``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARY = Path("apt_kernels/impl/cuda/libapt_kernels_cuda.so")
# Chips whose code no earlier entry runs; 8.9 runs 8.6's.
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0+PTX")
INSTANCES = tuple((t, width) for width in (256, 128, 64) for t in ("float", "half_t", "bfloat_t"))

_COMMON = ("-std=c++20", "-fPIC", f"-I{CSRC}")
_HOST = ("-ffp-contract=off", "-DAPT_LIBRARY=apt_kernels_cuda_host")
# The first torch whose stable ABI is asked for; later ones keep it.
_FIRST_TORCH = (2, 11)
_TORCH = f"-DTORCH_TARGET_VERSION=0x{_FIRST_TORCH[0]:02x}{_FIRST_TORCH[1]:02x}000000000000"


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why."""


def find_nvcc() -> str:
    """The CUDA compiler: of ``CUDA_HOME`` where that is set, else of the path, else of ``/usr/local/cuda``."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if not found:
            raise BuildError(f"CUDA_HOME is {home}, and there is no bin/nvcc in it")
        return found
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise BuildError("there is no CUDA compiler: neither CUDA_HOME is set nor nvcc on the path")
    return found


def find_cxx() -> str:
    """The host's C++ compiler: ``CXX`` where that is set, else g++ or c++."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise BuildError("there is no C++ compiler: neither CXX is set nor g++ on the path")
    return found


def find_torch() -> Path:
    """torch's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch, whose headers it needs, is not installed here (pip: use --no-build-isolation)")
    root = Path(spec.submodule_search_locations[0])
    version = re.search(r"(\d+)\.(\d+)", (root / "version.py").read_text())
    if tuple(map(int, version.groups())) < _FIRST_TORCH:
        raise BuildError(f"torch is {version[0]}; it needs {'.'.join(map(str, _FIRST_TORCH))} or newer")
    return root


def architectures(nvcc: str) -> list[str]:
    """``TORCH_CUDA_ARCH_LIST``, or what this compiler knows of `DEFAULT_ARCHITECTURES`: ``"8.0"``, ``"9.0+PTX"`` ..."""
    known = set(re.findall(r"sm_(\d+)\b", _output(nvcc, "--list-gpu-code")))
    asked = re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        return [name for name in DEFAULT_ARCHITECTURES if _chip(name) in known]
    for name in asked:
        if not re.fullmatch(r"\d+\.\d(\+PTX)?", name) or _chip(name) not in known or int(_chip(name)) < 75:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {name!r}; it needs numbers from 7.5 that {nvcc} knows, as 8.0 or 9.0+PTX"
            )
    return asked


def _chip(name: str) -> str:
    return name.removesuffix("+PTX").replace(".", "")


def _targets(names: Sequence[str]) -> list[str]:
    flags = []
    for name in names:
        chip = _chip(name)
        flags += ["-gencode", f"arch=compute_{chip},code=sm_{chip}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{chip},code=compute_{chip}"]
    return flags


def build_device(out: Path, names: Sequence[str] | None = None, options: Sequence[str] = ()) -> str:
    """Build the library for CUDA devices of the architectures ``names``; returns what the compilers printed."""
    nvcc, torch = find_nvcc(), find_torch()
    names = architectures(nvcc) if names is None else names
    binding = _binding(torch, " ".join(names))
    common = [f if f != "-fPIC" else "-Xcompiler=-fPIC" for f in _COMMON]
    return _build(
        out,
        [nvcc, *common, "-O3", *_targets(names), *options],
        {"binding": [find_cxx(), *_COMMON, "-O2", *binding]},
        [nvcc, "-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-ltorch_cpu", "-Xlinker", "-s"],
    )


def build_host(out: Path, options: Sequence[str] = ("-O1",), threads: bool = False) -> str:
    """Build the same kernels for the host, a block's threads as fibers or as threads of the system."""
    torch = find_torch()
    compiler = [find_cxx(), *_COMMON, *_HOST, f"-isystem{torch / 'include'}", *options]
    block = CSRC / "host" / ("threads.cpp" if threads else "fibers.cpp")
    return _build(
        out,
        [*compiler, "-x", "c++"],
        {"binding": [*compiler, *_binding(torch, "host")], "block": [*compiler, "-c", str(block)]},
        [find_cxx(), "-shared", *options, f"-L{torch / 'lib'}", "-ltorch_cpu", "-pthread"],
    )


def _binding(torch: Path, built_for: str) -> list[str]:
    include = f"-isystem{torch / 'include'}"
    return [_TORCH, include, f'-DAPT_ARCHITECTURES="{built_for}"', "-c", str(CSRC / "binding.cpp")]


def _build(out: Path, kernels: list[str], others: dict[str, list[str]], link: list[str]) -> str:
    """Compile every instance of the kernels and the other objects, in parallel, and link them."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = {f"{name}.o": command for name, command in others.items()}
        for kind, width in INSTANCES:
            command = [*kernels, f"-DAPT_TYPE={kind}", f"-DAPT_WIDTH={width}", "-c", str(CSRC / "instance.cu")]
            jobs[f"{kind}_{width}.o"] = command
        objects = [os.path.join(folder, name) for name in jobs]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            said = list(pool.map(lambda o, c: _output(*c, "-o", o), objects, jobs.values()))
        linked = os.path.join(folder, out.name)
        # The objects come before the libraries that they need.
        said.append(_output(link[0], *objects, *link[1:], "-o", linked))
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(linked, out.with_suffix(".new"))
        os.replace(out.with_suffix(".new"), out)
    return "".join(said)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def main() -> int:
    """Build the library into the source tree."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    try:
        print(build_device(CSRC.parent / LIBRARY), end="")
    except BuildError as error:
        print(f"apt-kernels: the CUDA library is not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
