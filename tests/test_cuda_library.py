"""What builds the CUDA library, what it was built for, and which calls it is then chosen for. Compiles nothing."""

from __future__ import annotations

import re

import cuda_host
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import apt_kernels
from apt_kernels.impl.cuda import library
from bench import cuda_report

build = cuda_host.build
KNOWN = "sm_75\nsm_80\nsm_86\nsm_90\nsm_90a\n"


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that says which chips it knows."""
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


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen", "why"),
    [
        ((7, 5), torch.float16, "cuda", "triton: .*8.0"),
        ((7, 5), torch.float32, "cuda", "triton: .*8.0"),
        (
            (7, 5),
            torch.bfloat16,
            "reference",
            "cuda: query has dtype torch.bfloat16; that needs .*8.0",
        ),
        ((7, 5), torch.float64, "reference", "cuda: query has dtype torch.float64"),
        ((7, 0), torch.float16, "reference", r"cuda: the device has compute capability 7.0; .* built for 7.5 8.0"),
        ((8, 0), torch.float16, "triton", "cpu: "),
    ],
)
def test_the_automatic_choice_on_a_device(capability, dtype, chosen, why, monkeypatch):
    """By what a device would say of itself; no device is touched."""
    monkeypatch.setattr(library, "host", None)
    monkeypatch.setattr(library, "_load", lambda: (object(), None))
    monkeypatch.setattr(library, "architectures", lambda: ["7.5", "8.0"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        q, p = torch.empty(1, 2, 3, 16, dtype=dtype, device="cuda"), torch.empty(2, 4, 16, dtype=dtype, device="cuda")
        choice = apt_kernels.selected(q, q, q, p, p)
    assert choice.name == chosen
    assert re.search(why, choice.reason), choice.reason


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


@pytest.mark.parametrize(("stack", "shared", "faults"), [(0, 64, 0), (8, 64, 1), (0, 65, 1), (0, 100, 2)])
def test_the_report_finds_spills_and_too_much_shared_memory(stack, shared, faults):
    results = cuda_report.parse(_SAID.format(stack=stack), lambda *kernel: shared * 1024)
    assert [(r.chip, r.kernel, r.dtype, r.width, r.registers) for r in results] == [
        (75, "attention_forward", "float32", 64, 168),
        (86, "key_gradient (prefix)", "float16", 128, 232),
    ]
    assert sum(bool(result.faults) for result in results) == faults
