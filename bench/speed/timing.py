"""Time runners in turn, in one process, with the device's own clock; and the memory that a call needs."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

MiB = 1 << 20
# More sets of inputs have no effect: by then the first has been evicted from the cache.
_MOST_SETS, _MOST_BYTES = 8, 1 << 30


class Clock:
    """Seconds between marks: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    @property
    def name(self) -> str:
        return "CUDA events" if self.cuda else "wall clock"

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin, end) -> float:
        if not self.cuda:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@contextmanager
def steady(device: torch.device):
    """No garbage collection within it, and no pending work before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def in_turn(
    runners: dict[str, Callable[[int], dict[str, float]]],
    device: torch.device,
    deadline: float,
    warm_up: int = 2,
    least: int = 5,
    most: int = 200,
) -> dict[str, dict[str, list[float]]]:
    """Samples in seconds by runner and pass. Each round runs every runner once on the same inputs, in rotated order.

    ``runners``: functions of the round's number that return seconds by pass. Rounds go on until ``deadline`` (of
    ``time.perf_counter``), but are at least ``least`` and at most ``most`` after ``warm_up`` that are not counted.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    names, round_ = list(runners), 0
    with steady(device):
        while names and round_ < most + warm_up:
            if round_ >= warm_up + least and time.perf_counter() > deadline:
                break
            first = round_ % len(names)
            for name in names[first:] + names[:first]:
                taken = runners[name](round_)
                if round_ >= warm_up:
                    for which, seconds in taken.items():
                        found[name].setdefault(which, []).append(seconds)
            round_ += 1
    return found


def input_sets(one: int, device: torch.device) -> int:
    """How many sets of inputs of ``one`` bytes to take in turn, so that none is found in the last cache."""
    return max(1, min(_MOST_SETS, _MOST_BYTES // max(one, 1), 2 * last_cache(device) // max(one, 1) + 1))


def last_cache(device: torch.device) -> int:
    """Bytes of the device's last cache, as the system reports it; 32 MiB if it does not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().rstrip("K")) * 1024
    except (OSError, ValueError):
        return 32 * MiB


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during a call, above those alive before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
