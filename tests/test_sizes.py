"""Sizes of the source: parameters of functions, lines of functions and of files."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Parameters, lines of a function without its signature and docstring, lines of a file.
PARAMETERS, FUNCTION, FILE = 15, 60, 600
# What may be larger, how large, and why.
_KERNEL = "a kernel: its three scalars need a float64 annotation, which members of a tuple cannot have"
ALLOWED = {
    "apt_kernels/ops/attention.py::attention": (19, "the public operator"),
    "apt_kernels/ops/validation.py::make_inputs": (17, "the arguments of the public operator"),
    "apt_kernels/impl/triton/attend.py::attention_forward": (18, _KERNEL),
    "apt_kernels/impl/triton/columns.py::column_gradients": (19, _KERNEL),
    "apt_kernels/impl/triton/columns.py::prefix_column_gradients": (16, _KERNEL),
    "apt_kernels/impl/triton/gradients.py::query_gradient": (20, _KERNEL),
}
LONG = {
    "apt_kernels/impl/triton/columns.py::_prefix": (64, "one loop of a kernel, whose registers depend on its order"),
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def files() -> list[str]:
    """The source files of the repository; in a copy without git, those of its folders."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    found = (
        listed.stdout.split()
        if listed.returncode == 0
        else [
            path.relative_to(ROOT).as_posix()
            for folder in ("apt_kernels", "bench", "csrc", "docs", "examples", "tests")
            for path in (ROOT / folder).rglob("*")
        ]
    )
    endings = (".py", ".cu", ".cuh", ".cpp", ".h")
    return [name for name in found if name.endswith(endings) and (ROOT / name).exists()]


def parameters(function) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls")) + bool(given.vararg) + bool(given.kwarg)


def body(function) -> int:
    """Lines from the first statement after the docstring to the end."""
    rest = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return function.end_lineno - rest[0].lineno + 1


def too_large(name: str, source: str) -> list[str]:
    faults, lines = [], len(source.splitlines())
    if lines > FILE:
        faults.append(f"{name} has {lines} lines")
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, FUNCTIONS):
                where = f"{name}::{node.name}"
                if parameters(node) > ALLOWED.get(where, (PARAMETERS,))[0]:
                    faults.append(f"{where} has {parameters(node)} parameters")
                if body(node) > LONG.get(where, (FUNCTION,))[0]:
                    faults.append(f"{where} has {body(node)} lines")
    return faults


def test_files_and_functions_are_small():
    assert [fault for name in files() for fault in too_large(name, (ROOT / name).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("def f(" + ", ".join(f"a{i}" for i in range(15)) + ", *, b): pass\n", "x.py::f has 16 parameters"),
        ("async def f():\n    '''One\n    sentence.'''\n" + "    pass\n" * 61, "x.py::f has 61 lines"),
        ("pass\n" * 601, "x.py has 601 lines"),
    ],
    ids=["parameters", "function", "file"],
)
def test_larger_ones_are_noticed(source, fault):
    assert too_large("x.py", source) == [fault]


def test_every_exception_is_needed():
    for allowed, size, limit in ((ALLOWED, parameters, PARAMETERS), (LONG, body, FUNCTION)):
        for where, (most, _) in allowed.items():
            name, function = where.split("::")
            nodes = ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))
            found = [node for node in nodes if isinstance(node, FUNCTIONS) and node.name == function]
            assert max(map(size, found)) == most > limit, where
