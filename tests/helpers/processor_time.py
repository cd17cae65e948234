"""Bounds on the work of a call, which hold however busy the machine is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """The block uses at most this much processor time of its thread."""
    start = time.thread_time()
    yield
    used = time.thread_time() - start
    assert used < seconds, f"{used:.2f} s of processor time; at most {seconds} s are expected"
