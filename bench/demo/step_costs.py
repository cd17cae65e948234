"""Time and memory of a training step of a pretrained decoder: ours, naive attention, PEFT, and no prefix.

Outputs and gradients are compared before anything is timed. The contenders are those of the benchmark
(`bench.speed.models`), with the weights of the given model.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.common.markdown import markdown
from bench.speed.models import TRAINING_PEERS, Contender, ModelShape, obstacle
from bench.speed.timing import peak_bytes, steady

_ROUNDS = 2
# Relative difference in float32 through all layers of a real model: above rounding, and far below a wrong result.
_TOLERANCE = 5e-3
_NAMES = {"no_prefix": "no prefix", "ours": "apt_kernels", "naive": "concatenation", "peft": "PEFT"}
_METHODS = {"": ("no_prefix",), "prefix": ("ours", "naive", "peft"), "APT": ("ours", "naive")}


def measure(base: nn.Module, tokens: int, length: int, failures: list[str]) -> list[dict]:
    """One row for each contender, or none if ``tokens`` is 0. Differences from ours are added to ``failures``."""
    if not tokens:
        return []
    given = _batch(base, tokens)
    rows = [_row(base, method, peer, tokens, length) for method, peers in _METHODS.items() for peer in peers]
    with tqdm(
        total=len(rows) * (1 + _ROUNDS), desc=f"steps of {tokens} tokens", unit="step", dynamic_ncols=True
    ) as bar:
        for row in rows:
            if row["obstacle"] is None:
                row["found"] = _checked_step(row, given)
            bar.update()
        for method in ("prefix", "APT"):
            failures += _differences([row for row in rows if row["method"] == method and row["obstacle"] is None])
        with steady(base.device):
            for round_ in range(_ROUNDS):
                for row in rows if round_ % 2 else rows[::-1]:
                    if row["obstacle"] is None:
                        row["seconds"].append(_step(row["contender"], given))
                    bar.update()
    for row in rows:
        del row["contender"]
        row.pop("found", None)
        row["seconds"] = statistics.median(row["seconds"]) if row["seconds"] else None
    return rows


def _row(base: nn.Module, method: str, peer: str, tokens: int, length: int) -> dict:
    shape = ModelShape("llama-1b", 1, tokens, length, gate="auto" if method == "APT" else "none")
    why = obstacle(peer, shape)
    if why is None and peer == "peft" and not hasattr(getattr(base, "model", None), "rotary_emb"):
        why = "not compared: the keys of this model are not rotated as Llama's"
    contender = TRAINING_PEERS[peer](base, shape) if why is None else None
    return {"method": method, "peer": peer, "obstacle": why, "contender": contender, "seconds": [], "bytes": None}


def _batch(base: nn.Module, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, base.config.vocab_size, (1, tokens), generator=generator).to(base.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _loss(contender: Contender, given: dict[str, Tensor]):
    # PEFT passes its prefix as a cache, and raises without one.
    return contender.forward({**given, "use_cache": contender.turned > 0})


def _checked_step(row: dict, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one step; measures its memory."""
    contender, found = row["contender"], {}

    def step() -> None:
        output = _loss(contender, given)
        contender.backward(output.loss)
        found["logits"] = output.logits.detach()[:, -given["input_ids"].shape[1] :]

    row["bytes"] = peak_bytes(given["input_ids"].device, step)
    gradients = {name: part.clone() for name, part in contender.gradients().items()}
    contender.model.zero_grad(set_to_none=True)
    return found["logits"], gradients


def _step(contender: Contender, given: dict[str, Tensor]) -> float:
    began = time.perf_counter()
    contender.backward(_loss(contender, given).loss)
    if given["input_ids"].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    contender.model.zero_grad(set_to_none=True)
    return seconds


def _differences(rows: list[dict]) -> list[str]:
    ours, *others = rows
    logits, gradients = ours["found"]
    failures = []
    for row in others:
        theirs = {"logits": row["found"][0], **row["found"][1]}
        for name, right in {"logits": logits, **gradients}.items():
            if name in theirs:
                apart = float((theirs[name] - right).norm() / right.norm())
                if not apart <= _TOLERANCE:
                    failures.append(f"{_NAMES[row['peer']]}: {name} differ by {apart:.2g} (at most {_TOLERANCE})")
    return failures


def table(rows: list[dict]) -> str:
    """Markdown: seconds and peak memory of a step, absolute and divided by ours."""
    own = {row["method"]: row for row in rows if row["peer"] == "ours"}
    lines = []
    for row in rows:
        name = f"{row['method']}, {_NAMES[row['peer']]}" if row["method"] else _NAMES[row["peer"]]
        if row["obstacle"] is not None:
            lines.append((name, row["obstacle"], "", ""))
            continue
        ours = own[row["method"] or "prefix"]
        ratio = "" if row is ours else f"{row['seconds'] / ours['seconds']:.2f} / {row['bytes'] / ours['bytes']:.2f}"
        lines.append((name, f"{row['seconds']:.2f} s", f"{row['bytes'] / 2**20:.0f} MiB", ratio))
    return markdown(("Training step", "Time", "Peak memory", "Time / memory by ours"), lines)
