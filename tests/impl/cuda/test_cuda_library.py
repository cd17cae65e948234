"""The build of the CUDA library, its architectures, and the calls that it computes. Compiles nothing."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import apt_kernels
from apt_kernels.errors import ImplementationError
from apt_kernels.impl.cuda import library
from bench.compiled import cuda_report
from helpers import cuda_host

build = cuda_host.build
KNOWN = "sm_75\nsm_80\nsm_86\nsm_90\nsm_90a\n"


@pytest.fixture
def compiler(monkeypatch):
    """A fake compiler that lists the chips it supports."""
    monkeypatch.setattr(build, "_output", lambda *command: KNOWN)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return monkeypatch


def test_default_architectures_are_those_that_the_compiler_knows(compiler):
    assert build.architectures("nvcc") == ["7.5", "8.0", "8.6", "9.0"]


@pytest.mark.parametrize("asked", ["7.5;9.0+PTX", "7.5 9.0+PTX", "7.5, 9.0+PTX"])
def test_architectures_asked_for(compiler, asked):
    compiler.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert build.architectures("nvcc") == ["7.5", "9.0+PTX"]
    assert [flag for flag in build._targets(["9.0+PTX"]) if flag != "-gencode"] == [
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]


@pytest.mark.parametrize("asked", ["7.0", "12.0", "Turing", "9.0a"])
def test_other_architectures_are_refused_by_name(compiler, asked):
    compiler.setenv("TORCH_CUDA_ARCH_LIST", f"8.0 {asked}")
    with pytest.raises(build.BuildError, match=f"TORCH_CUDA_ARCH_LIST has '{asked}'; it needs"):
        build.architectures("nvcc")


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="there is no bin/nvcc in it"):
        build.find_nvcc()


def test_without_a_library_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "PATH", tmp_path / "none.so")
    library._load.cache_clear()
    try:
        assert library.device() is None
        assert "not built" in library.obstacle()
        library._load.cache_clear()
        (tmp_path / "none.so").write_bytes(b"no library")
        assert "does not load" in library.obstacle()
    finally:
        library._load.cache_clear()


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("7.5 8.0", (7, 5), True),
        ("7.5 8.0", (8, 9), True),
        ("7.5 8.6", (8, 0), False),
        ("7.5 8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("10.0", (12, 0), False),
        ("12.0+PTX", (12, 1), True),
    ],
)
def test_which_devices_a_library_runs_on(built, capability, runs, monkeypatch):
    monkeypatch.setattr(library, "architectures", built.split)
    assert library.runs_on(capability) is runs


@pytest.fixture
def device(monkeypatch):
    """A fake device with a compute capability, and a library built for 7.5 and 8.0."""
    said = {"capability": (7, 5), "head_dim": 16, "value_dim": 16, "dtype": torch.float16}
    monkeypatch.setattr(library, "host", None)
    monkeypatch.setattr(library, "_load", lambda: (object(), None))
    monkeypatch.setattr(library, "architectures", lambda: ["7.5", "8.0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: said["capability"])

    def selected(implementation: str = "auto", **change):
        said.update(change)
        with FakeTensorMode():
            dims = [said["head_dim"], said["head_dim"], said["value_dim"]]
            given = [torch.empty(1, 2, 3, dim, dtype=said["dtype"], device="cuda") for dim in dims]
            prefix = [torch.empty(2, 4, dim, dtype=said["dtype"], device="cuda") for dim in dims[1:]]
            return apt_kernels.selected(*given, *prefix, implementation=implementation)

    return selected


@pytest.mark.parametrize("change", [{}, {"dtype": torch.float32}, {"head_dim": 256}, {"value_dim": 1}], ids=str)
def test_turing_takes_the_library(device, change):
    choice = device(**change)
    assert choice.name == "cuda"
    assert re.search(r"triton: .*8\.0", choice.reason), choice.reason
    assert device("cuda", **change).reason == "asked for by name"


def test_what_triton_serves_is_left_to_it(device):
    assert device(capability=(8, 0)).name == "triton"
    assert device("cuda", capability=(8, 0)).name == "cuda"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.bfloat16}, "query has dtype torch.bfloat16; that needs compute capability 8.0"),
        ({"dtype": torch.float64}, "query has dtype torch.float64; it takes float32, float16 and bfloat16"),
        ({"head_dim": 264}, "head sizes are 264 and 16; it takes up to 256"),
        ({"value_dim": 257}, "head sizes are 16 and 257; it takes up to 256"),
        ({"capability": (7, 0)}, "the device has compute capability 7.0; the library is built for 7.5 8.0"),
        ({"capability": (6, 1), "dtype": torch.float32}, "compute capability 6.1; the library is built for 7.5 8.0"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_refused_by_name_and_passed_over(device, change, why):
    with pytest.raises(ImplementationError, match=f"implementation 'cuda' cannot serve this call: .*{re.escape(why)}"):
        device("cuda", **change)
    choice = device(**change)
    assert choice.name == "reference"
    assert re.search(f"triton: .*; cuda: .*{re.escape(why)}", choice.reason), choice.reason


def test_a_missing_library_is_refused_by_name_and_passed_over(device, monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: (None, "its library is not built"))
    with pytest.raises(ImplementationError, match="implementation 'cuda' cannot serve this call: its library is not"):
        device("cuda")
    choice = device()
    assert choice.name == "reference"
    assert "cuda: its library is not built" in choice.reason
    assert apt_kernels.info()["implementations"]["cuda"] == "its library is not built"


def test_info_names_the_architectures(device):
    assert apt_kernels.info()["implementations"]["cuda"] == "usable (built for 7.5 8.0)"


_SAID = """
ptxas info    : Compiling entry function '_ZN3apt17attention_forwardIfLi64EEEvNS_7ProblemE' for 'sm_75'
ptxas info    : Function properties for _ZN3apt17attention_forwardIfLi64EEEvNS_7ProblemE
    {stack} bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN3apt12key_gradientINS_6half_tELi128ELb1EEEvNS_7ProblemE' for 'sm_86'
ptxas info    : Function properties for _ZN3apt12key_gradientINS_6half_tELi128ELb1EEEvNS_7ProblemE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 232 registers, used 1 barriers
"""
# Kernels that one chip runs and the other does not.
_STAGES = """
ptxas info    : Compiling entry function '_ZN3apt20plain_query_gradientINS_6half_tELi64ELi2EEEvNS_7ProblemE' for 'sm_{}'
ptxas info    : Function properties for _ZN3apt20plain_query_gradientINS_6half_tELi64ELi2EEEvNS_7ProblemE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 235 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN3apt18plain_key_gradientINS_6half_tELi64ELb1EEEvNS_7ProblemE' for 'sm_{}'
ptxas info    : Function properties for _ZN3apt18plain_key_gradientINS_6half_tELi64ELb1EEEvNS_7ProblemE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


@pytest.mark.parametrize(("stack", "shared", "faults"), [(0, 64, 0), (8, 64, 1), (0, 65, 1), (0, 100, 2)])
def test_the_report_finds_spills_and_too_much_shared_memory(stack, shared, faults):
    results = cuda_report.parse(_SAID.format(stack=stack), lambda *kernel: (64, 64, shared * 1024))
    assert [(r.chip, r.kernel, r.dtype, r.width, r.registers) for r in results] == [
        (75, "attention_forward", "float32", 64, 168),
        (86, "key_gradient (prefix)", "float16", 128, 232),
    ]
    assert sum(bool(result.faults) for result in results) == faults


def test_the_report_passes_over_kernels_that_a_chip_does_not_run():
    said = _STAGES.format(75, 75) + _STAGES.format(86, 86)
    found = cuda_report.parse(said, lambda *kernel: (64, 64, 0, 1024, 2048 if kernel[0] == "query" else 4096))
    assert [(r.chip, r.kernel, r.width, r.shared) for r in found] == [
        (86, "plain_key_gradient (prefix)", 64, 4096),
        (86, "plain_query_gradient", 64, 2048),
    ]
