"""A pytest plugin: which capability each test marked `proves` showed for which model family, as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--capabilities", metavar="FILE", help="write what the tests marked `proves` showed")


def pytest_collection_modifyitems(items):
    for item in items:
        marker = item.get_closest_marker("proves")
        if marker:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            family = marker.kwargs.get("family") or params.get("family")
            if not family:
                raise pytest.UsageError(f"{item.nodeid} is marked `proves` and names no model family")
            shown = {"capabilities": list(marker.args), "family": family, "refused": marker.kwargs.get("refused")}
            item.user_properties.append(("proves", {**shown, "test": item.originalname}))


class Collector:
    """Gathers the reports of this process, or of all workers."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        note = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else None
        for name, shown in report.user_properties:
            if name == "proves":
                row = {
                    "family": shown["family"],
                    "test": f"{report.location[0]}::{shown['test']}",
                    "outcome": report.outcome,
                    "note": note or shown["refused"],
                }
                self.rows += [{"capability": each, **row} for each in shown["capabilities"]]

    def pytest_sessionfinish(self):
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")


def pytest_configure(config):
    path = config.getoption("--capabilities")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(Path(path)))
