"""Run architectures in parallel, each in its own process with a time limit."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from multiprocessing import get_context

LIMIT = 60  # CPU seconds for one architecture; the clock may run ten times as long on a busy machine


def _child(pipe, model_type: str, kind: str) -> None:
    import logging
    import warnings

    from . import check, overrides

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    check.everything_in_float64()
    pipe.send(check.check(model_type, kind, overrides.of(model_type, kind)))


def sweep(
    jobs: list[tuple[str, str]], workers: int, progress=lambda done: done, note=lambda result: None
) -> list[dict]:
    """Results in the order of ``jobs``, pairs of model type and kind; ``note`` is called with each as it comes."""
    import torch

    from . import check  # noqa: F401 - loaded once, inherited by every child

    torch.set_num_threads(1)
    context = get_context("fork")
    waiting, running, results = list(enumerate(jobs)), {}, {}
    bar = progress(len(jobs))
    while waiting or running:
        while waiting and len(running) < workers:
            index, (model_type, kind) = waiting.pop(0)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(send, model_type, kind))
            process.start()
            send.close()
            running[index] = (process, receive, time.monotonic())
        time.sleep(0.02)
        for index, (process, receive, started) in list(running.items()):
            late = time.monotonic() - started > 10 * LIMIT
            if not (receive.poll() or late or not process.is_alive()):
                continue
            results[index] = _collect(process, receive, jobs[index], late)
            del running[index]
            note(results[index])
            bar.update()
    return [results[index] for index in range(len(jobs))]


def _collect(process, receive, job: tuple[str, str], late: bool) -> dict:
    result = None
    try:
        if receive.poll():
            result = receive.recv()
    except EOFError:
        pass
    if process.is_alive():
        process.join(timeout=1)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if result is None:
        late = late or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        why = f"took longer than {LIMIT} s" if late else f"the process died ({process.exitcode})"
        result = {"type": job[0], "kind": job[1], "green": False, "stage": "run", "reason": why, "checks": []}
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 if an architecture that was green is not."""
    import argparse
    import json

    from tqdm import tqdm

    from . import check, feeds, overrides, report

    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; default: all")
    parser.add_argument("--kind", action="append", choices=list(feeds.KINDS), help="default: all")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", default="sweep.json", help="where the results go; as lines while it runs: + 'l'")
    parser.add_argument("--inside", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--update", action="store_true", help="write docs/models.md and the list of what is green")
    parser.add_argument("--lose", action="store_true", help="let --update write even where something green was lost")
    given = parser.parse_args(arguments)
    kinds = given.kind or list(feeds.KINDS)
    jobs = [(t, k) for k in kinds for t in feeds.architectures(k) if not given.types or t in given.types]
    if given.inside:
        check.everything_in_float64()
        results = [check.check(t, k, overrides.of(t, k)) for t, k in jobs]
    else:
        with open(given.json + "l", "w", buffering=1) as lines:
            results = sweep(
                jobs,
                given.workers,
                lambda count: tqdm(total=count, unit="model"),
                lambda result: lines.write(json.dumps(result) + "\n"),
            )
    with open(given.json, "w") as file:
        json.dump(results, file, indent=1)
    _print(results, given.inside)
    lost = report.lost(results)
    for result in lost:
        print(f"LOST: {result['kind']} {result['type']} worked, or had prefixes in more places")
    if given.update and (given.lose or not lost):
        report.update(results)
    return 1 if lost and not given.lose else 0


def _print(results: list[dict], tracebacks: bool) -> None:
    for result in results:
        if not result["green"]:
            print(f"{result['kind']:8} {result['type']:28} {result['stage']:14} {result['reason']}")
            if tracebacks and "traceback" in result:
                print(result["traceback"])
    print(f"{sum(result['green'] for result in results)} of {len(results)} green")


if __name__ == "__main__":
    sys.exit(main())
