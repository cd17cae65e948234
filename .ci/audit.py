"""What the CUDA library in a wheel asks of a machine: `python .ci/audit.py WHEEL`. Exit status 1: there is a fault.

Needs `nm` of the binutils. `.ci/wheel` calls it after auditwheel, which checks the versions of the C library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBRARY = "apt_kernels/impl/cuda/libapt_kernels_cuda.so"
MOST_MEBIBYTES = 40
# What torch 2.11's libtorch_cpu.so exports of the C functions behind the stable ABI, as far as it is used here.
_STABLE_IN_2_11 = {
    "aoti_torch_": """
        abi_version delete_library_object delete_tensor_object get_data_ptr get_dim get_dtype
        get_size get_stride library_def library_init_def library_init_impl
    """,
    "aoti_torch_dtype_": """
        bfloat16 bool complex128 complex32 complex64 element_size float16 float32 float64
        float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz int16 int32 int64 int8 uint16
        uint32 uint64 uint8
    """,
    "torch_": """
        delete_list library_impl list_get_item list_push_back list_size new_list_reserve_size
        new_string_handle
    """,
    "torch_dtype_": "float4_e2m1fn_x2 float8_e8m0fnu",
}
_ALLOWED = {prefix + name for prefix, names in _STABLE_IN_2_11.items() for name in names.split()}


def undefined(library: Path) -> list[str]:
    """The names that a shared library expects others to define."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines()]


def faults(names: list[str]) -> list[str]:
    """What a library must not expect, in sentences: one binary serves every Python and every torch from 2.11 on."""
    refused = {
        "of torch, what is not in the stable interface of 2.11": [
            name for name in names if re.search("torch|c10|2at", name) and name not in _ALLOWED
        ],
        "Python's interface": [name for name in names if re.match("_?Py", name)],
        "a CUDA library, which is to be linked statically": [name for name in names if re.match("cuda|cu[A-Z]", name)],
    }
    found = [f"the library uses {what}: {', '.join(which)}" for what, which in refused.items() if which]
    if "aoti_torch_library_def" not in names:
        found.append("the library does not register its operators by torch's stable interface")
    return found


def main(wheel: Path) -> int:
    """Print what is wrong with a wheel, or that nothing is."""
    size = wheel.stat().st_size / 2**20
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if LIBRARY in archive.namelist():
            found = faults(undefined(Path(archive.extract(LIBRARY, folder))))
        else:
            found = [f"there is no {LIBRARY} in it"]
    if size > MOST_MEBIBYTES:
        found.append(f"it has {size:.1f} MiB; at most {MOST_MEBIBYTES} are allowed")
    for line in found or [f"{size:.1f} MiB, nothing found"]:
        print(f"{wheel.name}: {line}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
