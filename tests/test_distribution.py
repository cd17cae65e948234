"""The source distribution and the wheel, with and without the CUDA library; a script takes the place of compilers."""

from __future__ import annotations

import re
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import apt_kernels
from helpers import distribution
from helpers.documentation import ROOT

LIBRARY = "apt_kernels/impl/cuda/libapt_kernels_cuda.so"
_COMPILER = """#!/bin/sh
case "$*" in *--list-gpu-code*) echo sm_75 sm_90; exit ;; esac
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo object > "$2"; fi; shift; done
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution of this tree."""
    return distribution.build(distribution.copy(tmp_path_factory.mktemp("source") / "tree"), "sdist")


@pytest.fixture
def tree(source, tmp_path) -> Path:
    return distribution.unpack(source, tmp_path)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """The wheel made from the source distribution without settings."""
    return distribution.build(distribution.unpack(source, tmp_path_factory.mktemp("unpacked")), "wheel")


@pytest.fixture
def compiler(tmp_path_factory) -> Path:
    """A CUDA folder whose nvcc writes its arguments to a log."""
    home = tmp_path_factory.mktemp("cuda")
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").write_text(_COMPILER)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_the_source_distribution_has_every_source(tree):
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    wanted = [path for name in ("apt_kernels", "csrc") for path in (ROOT / name).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in wanted if path.suffix not in (".pyc", ".so")}
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff"} <= found
    assert not [name for name in found if name.startswith("tests")]


def test_the_wheel_is_pure(wheel):
    assert wheel.name == f"apt_kernels-{apt_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    sources = (path for path in (ROOT / "apt_kernels").rglob("*") if path.suffix == ".py" or path.name == "py.typed")
    assert set(names) == {str(path.relative_to(ROOT)) for path in sources}


def test_the_wheel_asks_for_what_it_imports(wheel):
    """numpy is imported by the plot alone, beside matplotlib, which requires it."""
    required = [
        re.match(r"[\w-]+", line)[0] for line in metadata(wheel).get_all("Requires-Dist") if "extra" not in line
    ]
    assert sorted(required) == ["safetensors", "torch", "transformers"]
    users = [
        path.name
        for path in (ROOT / "apt_kernels").rglob("*.py")
        if re.search(r"(import|from) numpy\b", path.read_text())
    ]
    assert users == ["plot.py"]


def test_a_compiler_alone_does_not_build_the_library(tree, compiler):
    wheel = distribution.build(tree, "wheel", CUDA_HOME=str(compiler), CXX=str(compiler / "bin" / "nvcc"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not (compiler / "bin" / "nvcc.log").exists()


def test_a_wheel_with_the_library(tree, compiler):
    nvcc = compiler / "bin" / "nvcc"
    wheel = distribution.build(tree, "wheel", CUDA_HOME=str(compiler), CXX=str(nvcc), APT_KERNELS_CUDA="1")
    assert re.fullmatch(r"apt_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == [LIBRARY]
    asked = nvcc.with_suffix(".log").read_text().splitlines()
    compiled = [line for line in asked if "instance.cu" in line]
    assert len(compiled) == 9
    assert all("code=sm_75" in line and "code=sm_90" in line for line in compiled)
    assert sum("-shared" in line for line in asked) == 1


@pytest.mark.parametrize(
    ("asked", "home", "script", "message"),
    [
        ("1", "compiler", _COMPILER + "echo no such flag; exit 3\n", "without the library: (?s:.*)no such flag"),
        ("1", "nowhere", _COMPILER, "without the library: CUDA_HOME is nowhere, and there is no bin/nvcc in it"),
        ("yes", "compiler", _COMPILER, r"APT_KERNELS_CUDA is 'yes'; it needs 1 \(build the CUDA library\) or 0"),
    ],
)
def test_a_library_that_cannot_be_built_is_an_error(tree, compiler, asked, home, script, message):
    nvcc = compiler / "bin" / "nvcc"
    nvcc.write_text(script)
    home = str(compiler) if home == "compiler" else home
    with pytest.raises(AssertionError, match=message):
        distribution.build(tree, "wheel", CUDA_HOME=home, CXX=str(nvcc), APT_KERNELS_CUDA=asked)


def test_links_of_the_long_description(source, tmp_path):
    """An index has no files that a relative link could lead to."""
    tree = distribution.unpack(source, tmp_path)
    without = metadata(distribution.build(tree, "wheel")).get_payload()
    relative = [link for link in re.findall(r"\]\(([^)]+)\)", without) if "://" not in link]
    assert not relative
    assert "![" not in without
    assert "https://arxiv.org/abs/2305.15212" in without
    project = (tree / "pyproject.toml").read_text()
    address = '[project.urls]\nRepository = "https://host.example/owner/apt-kernels/"\n\n[project.optional'
    (tree / "pyproject.toml").write_text(project.replace("[project.optional", address, 1))
    linked = metadata(distribution.build(tree, "wheel")).get_payload()
    assert "[Support table](https://host.example/owner/apt-kernels/blob/HEAD/docs/support.md)" in linked
    assert re.search(r"!\[[^]]+\]\(https://host.example/owner/apt-kernels/raw/HEAD/docs/[\w-]+\.png\)", linked)
    assert not [link for link in re.findall(r"\]\(([^)]+)\)", linked) if "://" not in link]
