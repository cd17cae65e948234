"""The notebooks run, on tiny models in place of those that they name."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch

from bench.speed import registry
from helpers import documentation
from helpers.documentation import NOTEBOOKS, ROOT


def run(path, substitutions) -> dict:
    """The namespace after all code cells of a notebook."""
    namespace = {"__name__": "__main__"}
    for number, code in documentation.notebook_cells(path, "code"):
        for written, replacement in substitutions:
            code = code.replace(written, replacement)
        exec(compile(code, f"{path.name}, cell {number}", "exec"), namespace)
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    torch.manual_seed(0)


def test_the_encoder_learns_and_loads(folder, substitutions):
    found = run(ROOT / "examples" / "encoder.ipynb", substitutions)
    # 0.61 of it and 11 of 12 texts at the notebook's rate; 0.98 and half of them at Trainer's default rate of 5e-5.
    assert found["after"]["eval_loss"] < 0.75 * found["before"]["eval_loss"]
    assert found["after"]["eval_accuracy"] > 0.8
    assert found["difference"] == 0


def test_the_decoder_starts_as_the_text_learns_and_loads(folder, substitutions):
    found = run(ROOT / "examples" / "decoder.ipynb", substitutions)
    # Two sums in another order, in float32.
    assert found["difference"] < 1e-5
    # The head is frozen and random: 0.5 at the rates of the notebook, 0.01 at Trainer's default of 5e-5.
    assert found["losses"][0] - found["losses"][-1] > 0.3
    assert sum(found["lengths"]) == found["budget"]
    assert torch.equal(found["tokens"], found["again"])


def test_the_library_is_measured_on_a_gpu(folder, monkeypatch):
    """On the CPU: nothing is installed or built, and of the benchmark one case of tiny shapes is measured."""
    for name, value in {
        "APT_DEVICE": "cpu",
        "APT_REGISTRY": "tiny",
        "APT_PEERS": "ours:cpu",
        "APT_SECONDS": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = ROOT / "examples" / "library.ipynb"
    cells = dict(documentation.notebook_cells(path, "code"))
    install = next(number for number, code in cells.items() if '"pip"' in code)
    stages = re.search(r'stages = "(.+)"', "".join(cells.values()))[1]
    known = {"machine", "tests", "table", *registry.STAGES}
    assert set(stages.split()) <= known
    found = run(
        path, [('Path("apt_kernels")', f"Path({str(ROOT)!r})"), (cells[install], ""), (stages, "machine decode table")]
    )
    assert found["stages"] == "machine decode table"
    assert "decode-b2" in (found["OUT"] / "table.txt").read_text()
    assert Path("results.zip").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_output(path):
    """An output would show other figures than a run does; nothing compares them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells) > 5
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_every_notebook_is_a_page_of_the_site():
    pages = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [path.stem for path in NOTEBOOKS] == ["decoder", "encoder", "library"]
    for path in NOTEBOOKS:
        assert f"notebooks/{path.stem}.md" in pages
