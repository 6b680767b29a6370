"""What pltrace does with very many spans: throughput to disk and to a server, bytes, memory, flatness of cost."""

from __future__ import annotations

import gc
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.plan import CALLS_AT_ONCE
from tests.benchmarks.timing import yardstick
from tests.benchmarks.tracers import Pltrace
from tests.benchmarks.workloads import make

__all__ = ["flatness", "rss_mb", "stored_bytes", "throughput"]

_SHARE = 20  # Flatness is looked at in so many parts.
_AT_ONCE = {"decorated call": CALLS_AT_ONCE}
_PACES_HZ = {"decorated call": 15_000, "LLM call": 4_000}


def throughput(tracer: Pltrace, name: str, spans_each: int, spans: int, *, deliver: bool) -> float:
    """Return how many spans a second are stored, or delivered, while one thread records as fast as it may."""
    with _fresh(tracer, deliver=deliver), tracer.on():
        run = _run(name, tracer)
        began = time.perf_counter()
        for _ in range(spans // spans_each):
            run()
        tracer.settle()
        return spans / (time.perf_counter() - began)


def stored_bytes(tracer: Pltrace, name: str, calls_each: int, calls: int) -> float:
    """Return how many bytes the file grows by for each call."""
    with _fresh(tracer, deliver=True):
        run = _run(name, tracer)
        with tracer.on():
            run()
        tracer.settle()
        before = _size(tracer.store)
        with tracer.on():
            for _ in range(calls // calls_each):
                run()
        tracer.settle()
        return (_size(tracer.store) - before) / calls


def _size(store: Path) -> int:
    """Return the size of a file, with what SQLite's log still holds of it."""
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store.stat().st_size


def flatness(tracer: Pltrace, name: str, spans: int, *, deliver: bool) -> Iterator[dict[str, float]]:
    """Record very many spans, and say after each part what one cost and how large process and file are.

    No faster than the background: what is looked for is not how it presses back.
    """
    with _fresh(tracer, deliver=deliver), tracer.on():
        run = _run(name, tracer)
        each = CALLS_AT_ONCE // _AT_ONCE.get(name, 1)
        for part in range(_SHARE):
            cpu = wall = 0
            process = time.process_time_ns()
            for _ in range(spans // _SHARE // CALLS_AT_ONCE):
                began, cpu_began = time.perf_counter_ns(), time.thread_time_ns()
                for _ in range(each):
                    run()
                cpu += time.thread_time_ns() - cpu_began
                wall += time.perf_counter_ns() - began
                time.sleep(CALLS_AT_ONCE / _PACES_HZ[name])
            process = time.process_time_ns() - process
            speed = yardstick()
            count = 1e3 * (spans // _SHARE)
            gc.collect()
            yield {
                "spans": (part + 1) * (spans // _SHARE),
                "cpu_us": cpu / count,
                "wall_us": wall / count,
                "total_us": process / count,
                "yardstick_us": speed,
                "rss_mb": rss_mb(),
                "file_mb": tracer.store.stat().st_size / 1e6,
            }


@contextmanager
def _fresh(tracer: Pltrace, *, deliver: bool) -> Iterator[None]:
    """Record into a file of its own."""
    tracer.stop()
    usual, tracer.store = tracer.store, _unused(tracer.folder)
    tracer.start(deliver=deliver)
    try:
        yield
    finally:
        tracer.stop()
        tracer.store.unlink(missing_ok=True)
        tracer.store = usual
        tracer.start()


def _unused(folder: Path) -> Path:
    return next(path for number in range(10**6) if not (path := folder / f"volume-{number}.db").exists())


def _run(name: str, tracer: Pltrace) -> Callable[[], Any]:
    run = make(name, None, tracer)
    assert run is not None
    return run


def rss_mb() -> float:
    """Return how much memory the process takes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
