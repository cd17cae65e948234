"""Records of trainings in one JSON-lines file, each appended when its training ends."""

from __future__ import annotations

import json
from pathlib import Path

from bench.quality import pretrained

from .methods import Settings


def key_of(task: str, method: str, seed: int, settings: Settings) -> dict:
    """The fields that identify a training."""
    named = {**settings.to_json(), "model": pretrained.title(settings.model)}
    return json.loads(json.dumps({"task": task, "method": method, "seed": seed, "settings": named}))


class Store:
    """Records in ``path``, each ``{task, method, seed, settings, machine, dev, test, ...}``."""

    def __init__(self, path: Path):
        self.path = path
        self.records: list[dict] = []
        if path.exists():
            self.records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def find(self, key: dict) -> dict | None:
        return next((r for r in self.records if all(r.get(name) == part for name, part in key.items())), None)

    def add(self, record: dict) -> None:
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
