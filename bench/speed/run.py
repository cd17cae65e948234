"""Run the benchmark stage by stage, each in its own process, and print the table.

    python -m bench speed                                   # every stage, as `make bench`
    python -m bench speed --keep                            # store in bench/results/MACHINE and update docs/
    python -m bench speed --stage causal --only t1024       # some cases of one stage
    python -m bench speed --stage encoder --peers naive,ours --seconds 10   # a quick ratio, nothing stored

Each stage writes one JSON file to --out (default: bench-output/MACHINE; a temporary folder with --only or --peers).
A run is made for --minutes: where earlier stages took longer, later ones get less time. What was not measured, and why,
is listed at the end.
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

from .harness import PROGRESS
from .registry import DTYPES, SECONDS, STAGES, cases, default_registry
from .tables import compact, left_out, load


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m bench speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    names = ", ".join(STAGES)
    parser.add_argument(
        "--stage", nargs="+", choices=STAGES, default=tuple(STAGES), metavar="STAGE", help=f"default: all: {names}"
    )
    parser.add_argument("--registry", choices=tuple(SECONDS), help="set of cases (default: by device and its memory)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this text")
    parser.add_argument("--peers", default="", metavar="NAMES", help="peers, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, help="timing per stage (default: see bench/speed/registry.py)")
    parser.add_argument("--minutes", type=float, default=10, help="of the whole run, unless --within is given (10)")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="share this time among --stage and --then")
    parser.add_argument(
        "--then", nargs="+", choices=STAGES, default=(), metavar="STAGE", help="later stages that --within has to cover"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", help=DTYPES)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the JSON files and the report are written")
    parser.add_argument("--keep", action="store_true", help="write to bench/results/MACHINE and update docs/")
    parser.add_argument("--details", action="store_true", help="print the times of every peer")
    parser.add_argument("--list-stages", action="store_true", help="print the names of the stages and exit")
    own, more = parser.parse_known_args(given)
    own.registry = own.registry or default_registry(torch.device(own.device))
    return own, [argument for argument in more if argument != "--"]


def shared(options: argparse.Namespace, stage: str, left: float) -> tuple[argparse.Namespace, float | None]:
    """The options of one stage of a run that has ``left`` seconds, and after how many of them no case begins.

    --within and --then are the caller's own way to share the time, and --seconds asks for a certain one.
    """
    if options.within is not None or options.seconds is not None:
        return options, None
    later = options.stage[options.stage.index(stage) + 1 :]
    own, rest = (sum(SECONDS[options.registry][name] for name in names) for names in ([stage], later))
    # What later stages do not need for their timing; if all are late, this one's share.
    limit = max(left - rest, left * own / max(own + rest, 1))
    return argparse.Namespace(**{**vars(options), "stage": [stage], "then": later, "within": left}), limit


def seconds_of(options: argparse.Namespace, stage: str) -> float:
    """Seconds of timing: as given, or the registry's, or the stage's part of --within if that is less."""
    times = SECONDS[options.registry]
    if options.seconds is not None or options.within is None:
        return times[stage] if options.seconds is None else options.seconds
    # One third is reserved for setup, compilation and checks.
    together = sum(times[name] for name in {*options.stage, *options.then})
    return min(times[stage], options.within * 2 / 3 * times[stage] / max(together, 1))


def command(options: argparse.Namespace, stage: str, out: Path, limit: float | None = None) -> list[str]:
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
    given |= {"limit": limit} if limit is not None else {}
    # With "=": pytest would look for tests under an option's value, and an empty one is the whole repository.
    return found + [f"--{name}={value}" for name, value in given.items()]


def measure(options: argparse.Namespace, stage: str, out: Path, left: float, more: list[str]) -> int:
    """Run one stage in a process of its own, print its progress, and return its exit status."""
    if left <= 0:
        print(f"{stage}: no time was left", flush=True)
        return 0
    own, limit = shared(options, stage, left)
    begin, said, written = time.perf_counter(), [], out / f"{stage}.json"
    with subprocess.Popen(
        [*command(own, stage, out, limit), *more], cwd=ROOT, env={**os.environ, "PYTHONPATH": _path()}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            said.append(line)
            if options.details or line.startswith(f"{PROGRESS} "):
                print(f"{stage}: {line}" if line.startswith(f"{PROGRESS} ") else line, end="", flush=True)
    print(f"{stage}: {time.perf_counter() - begin:.0f} s, exit status {process.returncode}", flush=True)
    if process.returncode and not options.details:
        print("".join(said), flush=True)
    if written.exists():
        written.write_text(compact(written.read_text(encoding="utf-8")), encoding="utf-8")
    return process.returncode


def main(given: list[str] | None = None) -> int:
    options, more = arguments(given)
    if options.list_stages:
        print(*STAGES)
        return 0
    partial, folder = bool(options.only or options.peers), slug(torch.device(options.device))
    options.stage = [
        stage for stage in options.stage if any(options.only in case.name for case in cases(options.registry)[stage])
    ]
    with tempfile.TemporaryDirectory() as temporary:
        default = RESULTS / folder if options.keep else ROOT / "bench-output" / folder
        out = options.out or (Path(temporary) if partial else default)
        out.mkdir(parents=True, exist_ok=True)
        for stage in options.stage:  # of an earlier run
            (out / f"{stage}.json").unlink(missing_ok=True)
        end = time.perf_counter() + 60 * options.minutes
        worst = [measure(options, stage, out, end - time.perf_counter(), more) for stage in options.stage]
        missing = [f"{stage}: no case was measured" for stage in options.stage if not (out / f"{stage}.json").exists()]
        if any(out.glob("*.json")):
            more = ["--details"] if options.details else []
            report.main([str(out), "--out", str(out), *more, *(["--update"] if options.keep else [])])
            missing += left_out(load(out).skipped)
        print("Not measured:", *missing or ["nothing"], sep="\n- ")
        if any(out.glob("*.json")):
            print(f"{out}/: JSON, report.md, report.png" if not partial or options.out else "not kept")
    return max(map(abs, worst), default=0)


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
