"""What a release needs, and the files beside the code: workflows, templates, hooks, the citation."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import apt_kernels
from helpers.documentation import ROOT, script

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = None

needs_tomllib = pytest.mark.skipif(tomllib is None, reason="tomllib comes with Python 3.11")
VERSION = apt_kernels.__version__


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture
def ready(tmp_path) -> Path:
    """The files that the check reads, with what a release needs."""
    for name in ("apt_kernels/__init__.py", "CHANGELOG.md", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/installation.md"):
        (tmp_path / name).write_text("    pip install apt-kernels\n")
    edit(tmp_path / "CHANGELOG.md", "## [Unreleased]\n", f"## [Unreleased]\n\n## [{VERSION}] - 2026-01-31\n")
    urls = '[project.urls]\nRepository = "https://host.example/owner/apt-kernels"\n\n[project.optional-dependencies]'
    edit(tmp_path / "pyproject.toml", "[project.optional-dependencies]", urls)
    return tmp_path


@needs_tomllib
def test_a_tree_that_is_ready_is_released(ready):
    assert script(".ci/release.py").missing(ready, f"v{VERSION}") == []


@needs_tomllib
@pytest.mark.parametrize(
    ("file", "old", "new", "tag", "message"),
    [
        ("README.md", "pip", "pip", "v9.9.9", f"the tag is v9.9.9; apt_kernels.__version__ is {VERSION}"),
        ("apt_kernels/__init__.py", VERSION, "0.2.0", f"v{VERSION}", "apt_kernels.__version__ is 0.2.0"),
        ("CHANGELOG.md", f"## [{VERSION}] - 2026-01-31\n", "", f"v{VERSION}", "CHANGELOG.md has no section"),
        ("CHANGELOG.md", " - 2026-01-31\n", "\n", f"v{VERSION}", "CHANGELOG.md has no section"),
        (
            "CHANGELOG.md",
            "2026-01-31\n",
            "2026-01-31\n\n## [0.0.1] - 2025-01-31\n",
            f"v{VERSION}",
            "has an empty section",
        ),
        ("pyproject.toml", "https://host.example/owner/apt-kernels", "", f"v{VERSION}", "has the address ''"),
        ("pyproject.toml", 'Repository = "https:', 'Other = "https:', f"v{VERSION}", "has the address ''"),
        ("README.md", "pip", "It is not on PyPI yet: pip", f"v{VERSION}", "README.md still says 'not on PyPI yet'"),
        (
            "docs/installation.md",
            "pip",
            "After the first release, pip",
            f"v{VERSION}",
            "docs/installation.md still says",
        ),
    ],
)
def test_what_is_missing_is_named(ready, file, old, new, tag, message):
    edit(ready / file, old, new)
    assert any(message in line for line in script(".ci/release.py").missing(ready, tag))


@needs_tomllib
def test_this_tree_has_no_address_yet_and_no_release():
    """Until the project has an address, the command of the workflow fails on it."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "release.py", f"v{VERSION}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pyproject.toml has the address ''" in done.stderr


def workflow(name: str) -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def test_a_tag_is_checked_before_it_is_built_and_only_then_published():
    jobs = workflow("release.yml")["jobs"]
    commands = [step.get("run", "") for step in jobs["build"]["steps"]]
    checked = next(i for i, command in enumerate(commands) if ".ci/release.py" in command)
    assert checked < commands.index("python -m build")
    assert jobs["library"]["needs"] == "build"
    assert jobs["install"]["needs"] == ["build", "library"]
    assert jobs["publish"]["needs"] == "install"
    # Trusted publishing: the one job that may ask for an identity, and no secret anywhere.
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()
    # YAML reads the key `on` as true.
    assert workflow("release.yml")[True]["push"] == {"tags": ["v*"]}


def test_the_oldest_versions_of_the_workflow_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = workflow("release.yml")["jobs"]["install"]["strategy"]["matrix"]["with"][0]
    wanted = (
        re.search(r'requires-python = ">=([\d.]+)"', project)[1],
        re.findall(r'"((?:torch|transformers)>=[^"]+)"', project),
    )
    assert (oldest["python"], oldest["versions"].replace("==", ">=").replace(".*", "").split()) == wanted


def test_the_gpu_workflow_starts_by_hand_alone():
    assert list(workflow("cuda.yml")[True]) == ["workflow_dispatch"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_files_that_exist(path):
    commands = [step["run"] for job in workflow(path.name)["jobs"].values() for step in job["steps"] if "run" in step]
    named = {word for command in commands for word in shlex.split(command) if word.startswith((".ci/", "tests/"))}
    assert named or path.name == "docs.yml"
    assert not [name for name in named if not (ROOT / name).exists()]


def test_issue_templates_have_what_a_host_asks_for():
    found = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(found) == 3
    for path in found:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form["name"]
        assert form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in fields}) == len(fields) > 0
        named = re.findall(r"(?:docs/)?[\w-]+\.md", path.read_text(encoding="utf-8"))
        assert not [name for name in named if not (ROOT / name).exists()]


def test_hooks_before_a_commit_are_those_of_make_lint():
    hooks = [
        hook
        for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repository["hooks"]
    ]
    entries = " ".join(hook["entry"] for hook in hooks)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for command in re.findall(r"-m (ruff \w+|mypy)", lint):
        assert f".venv/bin/python -m {command}" in entries


def test_the_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= set(found)
    assert found["license"] == re.search(r'^license = "(.+)"$', project, re.MULTILINE)[1]
    assert f'authors = [{{name = "{found["authors"][0]["name"]}"}}]' in project
    # The paper as README.md cites it.
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    paper = found["preferred-citation"]
    assert f"title     = {{{paper['title']}}}" in readme
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author    = {{{authors}}}" in readme
    assert f"year      = {{{paper['year']}}}" in readme


def test_the_version_is_in_one_place():
    assert f'__version__ = "{VERSION}"' in (ROOT / "apt_kernels" / "__init__.py").read_text(encoding="utf-8")
    elsewhere = ("pyproject.toml", "setup.py", "CITATION.cff", "README.md", "docs/installation.md")
    assert not [name for name in elsewhere if re.search(rf"\b{re.escape(VERSION)}\b", (ROOT / name).read_text())]
