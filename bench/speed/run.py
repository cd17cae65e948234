"""Run the benchmark stage by stage, each in its own process, and print the table.

    python -m bench speed                                   # every stage, as `make bench`
    python -m bench speed --keep                            # store in bench/results/MACHINE and update docs/
    python -m bench speed --stage causal --only t1024       # some cases of one stage
    python -m bench speed --stage encoder --peers naive,ours --seconds 10   # a quick ratio, nothing stored

Each stage writes one JSON file to --out (default: bench-output/MACHINE; a temporary folder with --only or --peers).
Arguments after ``--`` are passed to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.common.machine import RESULTS, ROOT, slug
from bench.speed import report

from .registry import SECONDS, STAGES, cases
from .tables import compact


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m bench speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    names = ", ".join(STAGES)
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=tuple(STAGES), metavar="STAGE", help=f"default: all: {names}"
    )
    parser.add_argument(
        "--registry", choices=tuple(SECONDS), default="gpu" if cuda else "cpu", help="set of cases (default: by device)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this text")
    parser.add_argument("--peers", default="", metavar="NAMES", help="peers, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, help="timing per stage (default: see bench/speed/registry.py)")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="share this time among --stage and --then")
    parser.add_argument(
        "--then", nargs="+", choices=STAGES, default=(), metavar="STAGE", help="later stages that --within has to cover"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the JSON files and the report are written")
    parser.add_argument("--keep", action="store_true", help="write to bench/results/MACHINE and update docs/")
    parser.add_argument("--details", action="store_true", help="print the times of every peer")
    parser.add_argument("--list-stages", action="store_true", help="print the names of the stages and exit")
    own, more = parser.parse_known_args(given)
    return own, [argument for argument in more if argument != "--"]


def seconds_of(options: argparse.Namespace, stage: str) -> float:
    """Seconds of timing: as given, or the registry's, or the stage's part of --within if that is less."""
    times = SECONDS[options.registry]
    if options.seconds is not None or options.within is None:
        return times[stage] if options.seconds is None else options.seconds
    # One third is reserved for setup, compilation and checks.
    together = sum(times[name] for name in {*options.stage, *options.then})
    return min(times[stage], options.within * 2 / 3 * times[stage] / max(together, 1))


def command(options: argparse.Namespace, stage: str, out: Path) -> list[str]:
    """The pytest call of one stage."""
    found = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "speed" / "suite" / STAGES[stage].file), "-q", "-rs"]
    found += ["-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-columns=median,iqr,rounds"]
    given = {"benchmark-json": out / f"{stage}.json", "stage": stage, "registry": options.registry}
    given |= {
        "device": options.device,
        "seconds": seconds_of(options, stage),
        "only": options.only,
        "peers": options.peers,
    }
    given |= {"dtype": options.dtype} if options.dtype else {}
    # With "=": pytest would look for tests under an option's value, and an empty one is the whole repository.
    return found + [f"--{name}={value}" for name, value in given.items()]


def main(given: list[str] | None = None) -> int:
    options, more = arguments(given)
    if options.list_stages:
        print(*STAGES)
        return 0
    partial, folder = bool(options.only or options.peers), slug(torch.device(options.device))
    with tempfile.TemporaryDirectory() as temporary:
        default = RESULTS / folder if options.keep else ROOT / "bench-output" / folder
        out = options.out or (Path(temporary) if partial else default)
        out.mkdir(parents=True, exist_ok=True)
        worst = 0
        for stage in options.stage:
            if not any(options.only in case.name for case in cases(options.registry)[stage]):
                continue
            begin = time.perf_counter()
            done = subprocess.run(
                [*command(options, stage, out), *more], cwd=ROOT, env={**os.environ, "PYTHONPATH": _path()}, text=True,
                **({} if options.details else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}),
            )  # fmt: skip
            print(f"{stage}: {time.perf_counter() - begin:.0f} s, exit status {done.returncode}", flush=True)
            if done.returncode:
                print(done.stdout or "", flush=True)
            worst = max(worst, done.returncode)
            written = out / f"{stage}.json"
            if written.exists():
                written.write_text(compact(written.read_text(encoding="utf-8")), encoding="utf-8")
        if any(out.glob("*.json")):
            more = ["--details"] if options.details else []
            report.main([str(out), "--out", str(out), *more, *(["--update"] if options.keep else [])])
            print(f"{out}/: JSON, report.md, report.png" if not partial or options.out else "not kept")
    return worst


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
