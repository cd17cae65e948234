"""docs/support.md follows from its JSON, is up to date with the tests, and never shows a failure as a yes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import models
from support import catalog, peft_models, peft_probes, run, table

ROOT = Path(__file__).parent.parent
TEST = """
import pytest

@pytest.mark.proves("flying")
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_one(family):
    assert family != "llama"
    if family == "gpt2":
        pytest.skip("not available")

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.proves("landing", family="t5")
def test_two(broken):
    pass

@pytest.mark.proves("hovering", family="t5", refused="it is no bird")
def test_three():
    pass
"""


def row(outcome, test="t", family="bert", note=None):
    return {"capability": "flying", "family": family, "test": test, "outcome": outcome, "note": note}


def cell(*rows, absent=None):
    shown = table.gather(rows).get("flying", {})
    return table.ours(shown, "bert", absent or {}, table.Notes())


def test_the_committed_document_is_what_its_results_give():
    assert run.DOCUMENT.read_text() == table.render(json.loads(run.RESULTS.read_text()))


def test_the_committed_results_are_of_the_tests_that_there_are():
    """Where this fails: `make support`, or `make support ARGS='--only tests/test_x.py'` for what changed."""
    assert run.recorded(json.loads(run.RESULTS.read_text())) == run.marked()


def test_nothing_fails_in_the_committed_results():
    assert run.failures(json.loads(run.RESULTS.read_text())) == []


def test_every_cell_has_a_word():
    for line in run.DOCUMENT.read_text().splitlines():
        if line.startswith("|"):
            cells = [part.strip() for part in line.strip("|").split("|")]
            assert all(cells[2:]), line


def test_the_catalog_knows_its_capabilities_and_families():
    marked = {capability for capability, _ in run.marked()}
    assert set(catalog.listed()) <= marked
    assert set(peft_probes.PROBES) <= marked
    for absent in catalog.listed().values():
        assert set(absent) <= set(models.FAMILIES)
        assert all(absent.values())


@pytest.mark.parametrize("other", ["passed", "skipped"])
def test_one_failure_is_a_failure(other):
    for rows in ([row("failed"), row(other)], [row(other), row("failed")], [row(other, "a"), row("failed", "b")]):
        assert cell(*rows) == "FAILS"


def test_words():
    assert cell(row("passed")) == "yes"
    assert cell(row("skipped", note="no GPU")) == "not run [1]"
    assert cell(row("passed", "a"), row("skipped", "b", note="no GPU")) == "yes, but not all ran [1]"
    assert cell(row("passed", note="it leaks")) == "refused [1]"
    assert cell(row("passed", "a"), row("passed", "b", note="it leaks")) == "yes, but [1]"
    assert cell(row("passed", family="gpt2")) == "not tried"
    assert cell(row("passed", family="gpt2"), absent={"bert": "no wings"}) == "- [1]"
    assert cell(row("failed"), absent={"bert": "no wings"}) == "FAILS"


def test_what_pytest_reports_reaches_the_table(tmp_path):
    (tmp_path / "test_flying.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = proves: as in the project\n")
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "helpers.capabilities",
        f"--capabilities={out}",
        "test_flying.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    shown = table.gather(json.loads(out.read_text()))
    assert shown["flying"] == {
        "test_flying.py::test_one": {
            "bert": ["yes", None],
            "llama": ["FAILS", None],
            "gpt2": ["not run", "not available"],
        }
    }
    assert shown["landing"] == {"test_flying.py::test_two": {"t5": ["FAILS", None]}}
    assert shown["hovering"] == {"test_flying.py::test_three": {"t5": ["refused", "it is no bird"]}}


def test_a_probe_tells_right_from_wrong_and_from_errors():
    def wrong(family):
        peft_models.check(False, "two")

    def raises(family):
        raise ValueError("three\nmore")

    def excused(family):
        raise peft_models.AsUnpatched("four")

    found = [peft_probes.verdict(probe, "llama") for probe in (lambda family: None, wrong, raises, excused)]
    assert found == [["right", None], ["WRONG", "two"], ["raises", "ValueError: three"], ["as unpatched", "four"]]


@pytest.mark.parametrize(
    ("capability", "family", "word"),
    [
        ("sliding window: every query sees the whole prefix", "mistral", "WRONG"),
        ("static cache", "llama", "raises"),
        ("save and load", "llama", "right"),
    ],
)
def test_peft_does_what_the_table_says(capability, family, word):
    assert peft_probes.verdict(peft_probes.PROBES[capability], family)[0] == word
    assert json.loads(run.RESULTS.read_text())["peft"][capability][family][0] == word
