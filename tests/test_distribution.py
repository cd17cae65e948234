"""The source distribution and the wheel, with and without a CUDA compiler; compilers are played by a script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = "apt_kernels/impl/cuda/libapt_kernels_cuda.so"
_COMPILER = """#!/bin/sh
case "$*" in *--list-gpu-code*) echo sm_75 sm_90; exit ;; esac
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo object > "$2"; fi; shift; done
"""


def run(folder: Path, code: str, **environment: str) -> tuple[str, str]:
    """The last line that Python code printed, run in a folder, and all that it said beside."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TORCH_CUDA_ARCH_LIST")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=kept | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1], done.stderr


def build(folder: Path, kind: str, **environment: str) -> tuple[Path, str]:
    """A distribution as pip and build have it made, and what was said."""
    name, said = run(folder, f"import setuptools.build_meta as b; print(b.build_{kind}('dist'))", **environment)
    return folder / "dist" / name, said


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution of this tree."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    for name in ("apt_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    made, said = build(tree, "sdist", APT_KERNELS_NO_CUDA="1")
    assert "apt-kernels: the CUDA library is not built: APT_KERNELS_NO_CUDA=1 is set" in said
    return made


@pytest.fixture
def tree(source, tmp_path) -> Path:
    """The source distribution, unpacked: what a wheel is made from."""
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    return next(tmp_path.iterdir())


@pytest.fixture
def compiler(tmp_path_factory) -> Path:
    """CUDA's folder with a compiler in it that writes what it was asked."""
    home = tmp_path_factory.mktemp("cuda")
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").write_text(_COMPILER)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def test_the_source_distribution_has_every_source(tree):
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    wanted = [path for name in ("apt_kernels", "csrc") for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in wanted if path.suffix not in (".pyc", ".so")}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= found
    assert not [name for name in found if name.startswith("tests")]


@pytest.mark.parametrize(
    ("home", "no_cuda", "why"),
    [
        ("nowhere", "0", "CUDA_HOME is nowhere, and there is no bin/nvcc in it"),
        ("compiler", "1", "APT_KERNELS_NO_CUDA=1 is set"),
    ],
)
def test_a_wheel_without_the_library(tree, compiler, home, no_cuda, why, tmp_path_factory):
    home = str(compiler) if home == "compiler" else home
    wheel, said = build(tree, "wheel", CUDA_HOME=home, APT_KERNELS_NO_CUDA=no_cuda)
    assert f"apt-kernels: the CUDA library is not built: {why}" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not (compiler / "bin" / "nvcc.log").exists()
    empty = tmp_path_factory.mktemp("empty")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(empty / "installed")
    code = "import apt_kernels; print(apt_kernels.__file__, apt_kernels.info()['implementations']['cuda'])"
    printed, _ = run(empty, code, PYTHONPATH=str(empty / "installed"))
    assert printed.startswith(str(empty))
    assert "its library is not built" in printed


def test_a_wheel_with_the_library(tree, compiler):
    nvcc = compiler / "bin" / "nvcc"
    wheel, said = build(tree, "wheel", CUDA_HOME=str(compiler), CXX=str(nvcc), APT_KERNELS_NO_CUDA="0")
    assert "not built" not in said
    assert re.fullmatch(r"apt_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [LIBRARY]
    asked = nvcc.with_suffix(".log").read_text().splitlines()
    compiled = [line for line in asked if "instance.cu" in line]
    assert len(compiled) == 9
    assert all("code=sm_75" in line and "code=sm_90" in line for line in compiled)
    assert sum("-shared" in line for line in asked) == 1


def test_a_build_that_fails_says_how_to_go_without(tree, compiler):
    nvcc = compiler / "bin" / "nvcc"
    nvcc.write_text(_COMPILER + "echo no such flag; exit 3\n")
    with pytest.raises(AssertionError, match=r"failed to build; APT_KERNELS_NO_CUDA=1 goes without it: (?s:.*)no such"):
        build(tree, "wheel", CUDA_HOME=str(compiler), CXX=str(nvcc), APT_KERNELS_NO_CUDA="0")
