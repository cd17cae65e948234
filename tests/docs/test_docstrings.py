"""Every public function and class has an example in its docstring, which runs and prints what it shows."""

import doctest
import inspect
import os
import shutil
from pathlib import Path

import matplotlib
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import apt_kernels

ERRORS = {name for name in apt_kernels.__all__ if inspect.isclass(getattr(apt_kernels, name)) and "Error" in name}
NAMES = sorted(set(apt_kernels.__all__) - ERRORS)


class ShownOutput(doctest.OutputChecker):
    """Compares the output that an example shows; an example that shows none may print."""

    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got, flags)


@pytest.fixture(scope="module")
def folders(substitutions, tmp_path_factory) -> Path:
    """A folder with what examples read: two adapters and a PEFT checkpoint of the tiny models."""
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root, names = tmp_path_factory.mktemp("folders"), dict(substitutions)
    for adapter in ("first", "second"):
        model = AutoModelForSequenceClassification.from_pretrained(names['"bert-base-uncased"'].strip("'"))
        apt_kernels.save(apt_kernels.patch(model, prefix_length=16), root / adapter)
    base = AutoModelForCausalLM.from_pretrained(names['"Qwen/Qwen3-0.6B"'].strip("'"))
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(base, settings).save_pretrained(root / "peft-checkpoint")
    return root


def run(text: str, name: str, names: dict) -> tuple[int, str]:
    """How many examples a docstring has, and what is wrong with them."""
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    said = []
    doctest.DocTestRunner(ShownOutput(), verbose=False).run(test, out=said.append)
    return len(test.examples), "".join(said)


@pytest.fixture
def namespace(substitutions, folders, tmp_path, monkeypatch) -> dict:
    """The names that examples use without a definition: a patched classifier, and a batch for it."""
    shutil.copytree(folders, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    matplotlib.use("agg")
    torch.manual_seed(0)
    bert = dict(substitutions)['"bert-base-uncased"'].strip("'")
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    batch = AutoTokenizer.from_pretrained(bert)(["a great film", "a waste of time"], padding=True, return_tensors="pt")
    found = {"apt_kernels": apt_kernels, "torch": torch, "os": os, "batch": batch}
    return found | {"model": apt_kernels.patch(model, prefix_length=16)}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, namespace, substitutions):
    # mkdocstrings renders the section of this name, and no other.
    _, _, text = (inspect.getdoc(getattr(apt_kernels, name)) or "").partition("\nExamples:\n")
    for written, replacement in substitutions:
        text = text.replace(written, replacement)
    count, wrong = run(text, name, namespace)
    assert count, f"{name} has no section 'Examples:'"
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (">>> 1 + 1\n2", ""),
        (">>> 1 + 1", ""),
        (">>> 1 + 1\n3", "Expected:"),
        (">>> undefined", "NameError"),
    ],
)
def test_a_wrong_example_is_noticed(text, wrong):
    count, said = run(text, "planted", {})
    assert count == 1
    assert wrong in said
    assert bool(wrong) == bool(said)
