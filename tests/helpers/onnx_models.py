"""ONNX models in onnxruntime."""

import pytest
import torch


def require() -> None:
    """Skip the test where the packages are missing: pyproject.toml installs them from Python 3.11 on."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed, as on Python 3.10")


def runner(path):
    """``run(**given)``, the first output of the model; arguments that it does not take are ignored."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    return lambda **given: torch.from_numpy(session.run(None, {name: given[name].numpy() for name in names})[0])
