"""Run the tests marked `proves` and PEFT's probes; write docs/support.json and docs/support.md from them."""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from . import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS, DOCUMENT = ROOT / "docs" / "support.json", ROOT / "docs" / "support.md"


def marked() -> set[tuple[str, str]]:
    """(capability, test) of every test marked `proves`, read from the sources."""
    found = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.proves":
                    test = f"{path.relative_to(ROOT).as_posix()}::{node.name}"
                    found |= {(ast.literal_eval(argument), test) for argument in decorator.args}
    return found


def recorded(results: dict) -> set[tuple[str, str]]:
    """The same of a table's results."""
    return {(capability, test) for capability, tests in results["shown"].items() for test in tests}


def run_tests(arguments: list[str]) -> list[dict]:
    """What the tests marked `proves` showed, for every family."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "capabilities.json"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "proves", f"--capabilities={path}", *arguments]
        done = subprocess.run(command, cwd=ROOT, check=False, env={**os.environ, "APT_TEST_EVERY_FAMILY": "1"})
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}; nothing was written")
        return json.loads(path.read_text())


def merged(before: dict, after: dict) -> dict:
    """``after`` in the place of the same tests' results in ``before``; tests that are no more are dropped."""
    if before.get("versions") != after["versions"]:
        raise SystemExit("the versions are not those of docs/support.json; run everything: python -m support")
    there = marked()
    shown: dict = {}
    for results in (before, after):
        for capability, tests in results["shown"].items():
            kept = {test: cells for test, cells in tests.items() if (capability, test) in there}
            if kept:
                shown.setdefault(capability, {}).update(kept)
    return {**after, "shown": shown, "peft": {**before["peft"], **after["peft"]}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m support", description=__doc__)
    parser.add_argument("--only", action="store_true", help="replace the results of these tests, keep the others")
    peft = "PEFT's probes alone, of the capabilities whose name has this in it; keep the tests' results"
    parser.add_argument("--peft", nargs="?", const="", metavar="CAPABILITY", help=peft)
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest")
    options = parser.parse_args(argv)
    packages = ("transformers", "torch", "peft")
    versions = {**{name: version(name) for name in packages}, "python": platform.python_version()}
    after = {"versions": versions, "shown": {}, "peft": {}}
    if options.peft is None:
        after["shown"] = table.gather(run_tests(options.pytest))
    if options.peft is not None or not options.only:
        from . import peft_probes

        after["peft"] = peft_probes.run(options.peft)
    if (options.peft is not None or options.only) and RESULTS.exists():
        after = merged(json.loads(RESULTS.read_text()), after)
    RESULTS.write_text(json.dumps(after, indent=0, sort_keys=True) + "\n")
    DOCUMENT.write_text(table.render(after))
    failed = [f"{c}: {test} ({family})" for c, test, family in failures(after)]
    print("\n".join(["these fail:", *failed]) if failed else f"wrote {DOCUMENT}")
    return bool(failed)


def failures(results: dict) -> list[tuple[str, str, str]]:
    return [
        (capability, test, family)
        for capability, tests in results["shown"].items()
        for test, cells in tests.items()
        for family, (word, _) in cells.items()
        if word == "FAILS"
    ]
