"""The CPU implementation reads and writes nothing outside of its tensors: their buffers lie between guard pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# In a separate process, since a read outside of a buffer ends it with a signal.
_CODE = """
import ctypes, mmap, sys
from dataclasses import replace
import torch
from helpers import accuracy
from helpers.cases import CASES
from apt_kernels.impl.inputs import Inputs

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE


def guarded(count, at_end):
    '''Bytes that end (or begin) where the next (or last) page must not be touched.'''
    pages = -(-count // PAGE)
    region = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + (pages + 1) * PAGE):
        if libc.mprotect(ctypes.c_void_p(guard), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = (pages + 1) * PAGE - count if at_end else PAGE
    return torch.frombuffer(region, dtype=torch.uint8, offset=offset, count=count)


def placed(tensor, at_end, step):
    '''The tensor, as every ``step``-th element of a guarded buffer; 0: its first column, expanded.'''
    if step == 0 and tensor.dtype == torch.int64:
        step = 1  # another adapter of a row would read what is no value of this one
    if step == 0:
        return placed(tensor[..., :1], at_end, 1).expand_as(tensor)
    size = tensor.element_size()
    count = (tensor.numel() - 1) * step + 1 if at_end else tensor.numel() * step
    buffer = guarded(count * size, at_end).view(tensor.dtype)
    strides, stride = [], step
    for length in reversed(tensor.shape):
        strides.insert(0, stride)
        stride *= length
    view = buffer.as_strided(tensor.shape, strides)
    return view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


if sys.argv[1:] == ["fault"]:
    view = placed(torch.ones(1, 1, 1, 16), True, 0)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(view, view, view)
    sys.exit(0)
for name in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16):
        for at_end in (True, False):
            for step in (0, 1, 2):
                case = replace(CASES[name], dtype=dtype)
                single = replace(case, queries=1, batch=1, rows=case.rows[:1], heads_last=False)
                for x in (case.inputs(), single.inputs()):
                    parts = {
                        key: placed(part, at_end, step)
                        for key, part in x.__dict__.items()
                        if isinstance(part, torch.Tensor)
                    }
                    x = replace(x, **parts)
                    of_logsumexp = step == 2
                    accuracy.check(x, "cpu", logsumexp_gradient=of_logsumexp)
print("done")
"""
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "2", "PATH": ""}
    command = [sys.executable, "-c", _CODE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set with mprotect of Linux")
@pytest.mark.parametrize(
    "names",
    [
        ("plain", "causal", "causal_gate_query", "right_padding", "causal_left_padding"),
        ("gate_indexed_query", "bias_gradient", "dense_broadcast", "multi_query", "everything"),
        ("mixed_equal_lengths", "mixed_empty_adapter", "mixed_everything"),
    ],
    ids=["few", "many", "rows"],
)
def test_nothing_outside_of_the_tensors_is_touched(names):
    done = run(*names)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are set with mprotect of Linux")
def test_the_guard_pages_work():
    """The stock kernel, called with an expanded last dimension, reads past the buffer: the process ends."""
    assert run("fault").returncode < 0
