"""Run stages of the benchmark, each in a process of its own, its JSON written as it ends, and print the table.

    python -m bench.speed.run                                   # every stage, as `make bench`
    python -m bench.speed.run --keep                            # into bench/results/<machine>, and README.md made anew
    python -m bench.speed.run --stage causal --only t1024       # some shapes of one stage
    python -m bench.speed.run --stage encoder --peers naive,ours --seconds 10   # a quick ratio, nothing kept

Results go to --out (default: bench-output/<machine>; a temporary folder where --only or --peers leave some out).
What follows ``--`` is handed to pytest.
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

from bench.machine import RESULTS, ROOT, slug
from bench.speed import report

from .registry import FILES, SECONDS, STAGES, cases


def arguments(given: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--registry", choices=tuple(SECONDS), default="gpu" if cuda else "cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--peers", default="", help="peers, separated by commas")
    parser.add_argument("--seconds", type=float, help="for each stage; default: the registry's")
    parser.add_argument("--within", type=float, help="seconds that are left for the stages and those of --then")
    parser.add_argument("--then", nargs="+", choices=STAGES, default=(), help="stages that --within is shared with")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--out", type=Path, help="folder of the JSON files")
    parser.add_argument("--keep", action="store_true", help="as committed results")
    parser.add_argument("--details", action="store_true", help="print every peer's times too")
    own, more = parser.parse_known_args(given)
    return own, [argument for argument in more if argument != "--"]


def seconds_of(options: argparse.Namespace, stage: str) -> float:
    """How long a stage times: as asked, or the registry's time, or its share of what is left if that is less."""
    times = SECONDS[options.registry]
    if options.seconds is not None or options.within is None:
        return times[stage] if options.seconds is None else options.seconds
    # A third is left for setting up, compiling and checking.
    together = sum(times[name] for name in {*options.stage, *options.then})
    return min(times[stage], options.within * 2 / 3 * times[stage] / max(together, 1))


def command(options: argparse.Namespace, stage: str, out: Path) -> list[str]:
    """The pytest call of one stage."""
    found = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "speed" / "suite" / FILES[stage]), "-q", "-rs"]
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
        if any(out.glob("*.json")):
            more = ["--details"] if options.details else []
            report.main([str(out), "--out", str(out), *more, *(["--update"] if options.keep else [])])
            print(f"{out}/: JSON, report.md, report.png" if not partial or options.out else "not kept")
    return worst


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    sys.exit(main())
