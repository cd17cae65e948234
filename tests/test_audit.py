"""`.ci/audit.py`, which the release runs on the wheel with the CUDA library."""

import subprocess
import sys
import zipfile

import pytest

from helpers import cuda_host
from helpers.documentation import ROOT, script

audit = script(".ci/audit.py")


def test_one_binary_for_every_torch_from_2_11():
    """The host build has the binding of the CUDA library: it uses torch's stable C functions alone."""
    assert audit.faults(audit.undefined(cuda_host.library())) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_ZN2at4_ops5empty4callEv", "of torch, what is not in the stable interface of 2.11"),
        ("_ZN3c106detail14torchCheckFailEPKcS2_jS2_", "of torch, what is not in the stable interface of 2.11"),
        ("aoti_torch_new_in_a_later_release", "of torch, what is not in the stable interface of 2.11"),
        ("PyList_New", "Python's interface"),
        ("_PyObject_New", "Python's interface"),
        ("cudaLaunchKernel", "a CUDA library, which is to be linked statically"),
        ("cuLaunchKernel", "a CUDA library, which is to be linked statically"),
    ],
)
def test_a_name_that_it_must_not_use(name, message):
    assert audit.faults(["aoti_torch_library_def", "malloc", name]) == [f"the library uses {message}: {name}"]


def test_a_library_without_operators():
    assert audit.faults(["malloc"]) == ["the library does not register its operators by torch's stable interface"]


@pytest.mark.parametrize(("limit", "status", "said"), [(40, 0, "nothing found"), (0, 1, "at most 0 are allowed")])
def test_a_wheel(tmp_path, monkeypatch, capsys, limit, status, said):
    wheel = tmp_path / "apt_kernels-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(cuda_host.library(), audit.LIBRARY)
    monkeypatch.setattr(audit, "MOST_MEBIBYTES", limit)
    assert audit.main(wheel) == status
    assert said in capsys.readouterr().out


def test_a_wheel_without_the_library(tmp_path):
    wheel = tmp_path / "apt_kernels-0-py3-none-any.whl"
    zipfile.ZipFile(wheel, "w").close()
    command = [sys.executable, ROOT / ".ci" / "audit.py", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"there is no {audit.LIBRARY} in it" in done.stdout
