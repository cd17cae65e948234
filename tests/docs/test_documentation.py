"""The documentation is right: its code runs, its links resolve, the messages it quotes exist."""

import inspect
import logging
import re

import matplotlib
import pytest
import torch

import apt_kernels
from bench.compiled import rates
from helpers import documentation
from helpers.documentation import PAGES, ROOT

WITH_CODE = [page for page in PAGES if documentation.python_blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=documentation.name)
def test_the_code_runs(page, substitutions, tmp_path, monkeypatch, request, caplog):
    """All blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    if page.name == "trl.md":
        pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
        monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    # One process replaces those that torchrun starts.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    matplotlib.use("agg")
    torch.manual_seed(0)
    logger = logging.getLogger("apt_kernels")  # a page may set its level
    request.addfinalizer(lambda level=logger.level: logger.setLevel(level))
    namespace = {"__name__": "__main__"}
    for line, code in documentation.python_blocks(page):
        for written, replacement in substitutions:
            code = code.replace(written, replacement)
        # Errors name the page's own lines.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    if page.name == "long-prefixes.md":
        assert "has the lowest of the losses" in caplog.text, "the page's logging settings do not show the losses"
    if page.name in ("README.md", "quickstart.md"):
        assert namespace["loss"].item() < 0.35, "the learning rate that the page shows does not train"


def test_the_readme_fits_a_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_instructions_of_the_librarys_loops_are_those_counted():
    counted, shown = rates.budgets(), {}
    text = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    for first, last, dim, *cells in re.findall(
        r"^\| .*\((\S+?)(?: to (\S+))?\), (\d+) \| (.+) \| (.+) \| (.+) \|$", text, re.M
    ):
        for name, cell in zip(("forward", "query_gradient", "key_gradient"), cells, strict=True):
            for chip in filter(None, (first, last)):
                shown[f"sm_{chip.replace('.', '')} D{dim} plain plain_{name} tokens"] = cell
    assert len(shown) == 18
    for loop, cell in shown.items():
        assert cell == (f"{counted[loop]['nvcc']:.1f}" if loop in counted else "general loop"), loop


@pytest.mark.parametrize("page", PAGES, ids=documentation.name)
def test_links_and_anchors_resolve(page):
    broken = []
    for link in documentation.links(page):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in documentation.anchors(path)):
            broken.append(link)
    assert not broken


def test_quoted_messages_exist():
    sources = list(documentation.messages())
    found = documentation.quoted(ROOT / "docs" / "troubleshooting.md")
    assert len(found) > 20
    missing = [message for message in found if not any(documentation.quotes(message, source) for source in sources)]
    # Not a message of this package but a description of the user's action.
    assert not [message for message in missing if " " in message]


def test_a_wrong_quotation_is_noticed():
    source = "the model is a \0; patch needs a transformers.PreTrainedModel"
    assert documentation.quotes("the model is a ...; patch needs a transformers.PreTrainedModel", source)
    assert not documentation.quotes("the model is ...; patch needs a transformers.PreTrainedModel.", source)
    assert not documentation.quotes("the model is a ...", "the model is the")


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = {line.split(".")[-1] for line in text.splitlines() if line.startswith("::: ")}
    assert listed == set(apt_kernels.__all__)


def test_documented_parameters_exist():
    """The docstrings' Args name parameters of the signature, each at most once."""
    for name in apt_kernels.__all__:
        public = getattr(apt_kernels, name)
        arguments = re.search(
            r"^ *Args:\n(.*?)(?=^ *\n|\Z)", inspect.cleandoc(public.__doc__ or ""), re.DOTALL | re.MULTILINE
        )
        if arguments is None:
            continue
        listed = [
            one for names in re.findall(r"^    (\w[\w, *]*):", arguments[1], re.MULTILINE) for one in names.split(", ")
        ]
        assert listed
        assert len(listed) == len(set(listed)), name
        parameters = set(inspect.signature(public).parameters)
        assert set(listed) <= parameters, f"{name}: {set(listed) - parameters}"


def test_every_substitution_is_used(substitutions):
    code = "\n".join(block for page in WITH_CODE for _, block in documentation.python_blocks(page))
    assert not [written for written, _ in substitutions if written not in code]
