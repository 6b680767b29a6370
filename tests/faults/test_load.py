"""However much comes at once or over time: nothing is lost, memory and disk stay within their limits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pltrace._callbacks import CallbackRunner
from pltrace._health import counts
from pltrace._request import MOST_WAITING, Request
from pltrace._scope import Callback
from tests.faults.support import PRELUDE, Measured, balance, measure_worst, told
from tests.support.counting_server import CountingProcess
from tests.support.programs import module, rows, run

#: Of the soak: `PLTRACE_SOAK=1000000` for all of it.
REQUESTS = int(os.environ.get("PLTRACE_SOAK", "30000"))

WATCH = """
peak = [0.0]

def watch():
    while True:
        peak[0] = max(peak[0], rss_mib())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
"""


@pytest.fixture
def counting(store: Path) -> Iterator[tuple[CountingProcess, dict[str, object]]]:
    """Run a PromptLayer that only counts; give it, and the settings of a program that delivers to it."""
    with CountingProcess() as server:
        yield (
            server,
            {"PROMPTLAYER_API_KEY": "pl_counting", "PROMPTLAYER_BASE_URL": server.url, "PLTRACE_STORE": store},
        )


def test_callbacks_that_do_not_keep_up(caplog: pytest.LogCaptureFixture) -> None:
    """Of `on_request` calls that wait for a slow one, a bounded number is kept; the oldest are given up and counted."""
    go_on = threading.Event()
    called: list[object] = []

    def slow(request: Request) -> None:
        called.append(request)
        assert go_on.wait(60.0)

    runner = CallbackRunner()
    callbacks = (Callback(slow, None),)
    requests: list[Any] = list(range(MOST_WAITING + 50))
    for request in requests:
        runner.submit(callbacks, request)
    assert counts["callbacks_given_up"] in (49, 50)  # One of them may be running.
    assert "take longer than requests come" in caplog.text
    go_on.set()
    assert runner.wait(None)
    assert len(called) == len(requests) - counts["callbacks_given_up"]
    assert called[-1] == requests[-1]
    runner.stop()


@pytest.mark.slow
def test_many_at_the_same_time(tmp_path: Path, store: Path) -> None:
    """Of 8 threads with 1,000 nested calls each and 1,000 tasks, every span is kept, below the right one."""
    source = """
import asyncio
pltrace.configure(store=sys.argv[1])

def nested(name):
    with traced(f"outer {name}"), traced(f"inner {name}"):
        pass

async def task(number):
    async with traced(f"outer task {number}"):
        await asyncio.sleep(0.001 * (number % 7))
        async with traced(f"inner task {number}"):
            await asyncio.sleep(0)

async def tasks():
    await asyncio.gather(*(task(number) for number in range(1000)))

def work(thread):
    for number in range(1000):
        nested(f"thread {thread}.{number}")

threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
for thread in threads:
    thread.start()
asyncio.run(tasks())
for thread in threads:
    thread.join()
"""
    assert run(PRELUDE + source, tmp_path, store).code == 0
    pairs = """
        SELECT count(*) AS count FROM spans AS inner_ JOIN spans AS outer_ ON inner_.parent_id = outer_.span_id
        WHERE inner_.name LIKE 'inner %' AND substr(inner_.name, 7) = substr(outer_.name, 7)
            AND inner_.trace_id = outer_.trace_id AND outer_.parent_id IS NULL
    """
    assert rows(store, pairs) == [{"count": 9000}]
    assert rows(store, "SELECT count(*) AS count FROM spans") == [{"count": 18_000}]


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(600)
def test_a_burst_at_a_slow_promptlayer(
    tmp_path: Path, counting: tuple[CountingProcess, dict[str, object]], store: Path, measured: Measured
) -> None:
    """100,000 spans at once and a PromptLayer that answers after two seconds: none is lost, memory hardly grows."""
    server, settings = counting
    server.delay(2.0)
    source = """
warm()
timed(ask, 500)
time.sleep(1.0)
before = rss_mib()
timed.forget()
gc.collect()  # To import LangChain leaves a full collection due.
collections[:] = [0, 0, 0]
timed(ask, 50_000)
timed.report(grown_mib=max(0.0, peak[0] - before), collections=collections)
"""
    program = run(PRELUDE + WATCH + source, tmp_path, timeout=400.0, **settings)
    report = told(program)
    found = balance(store, 101_000)
    assert (found.stored, found.dropped, found.quarantined) == (101_000, 0, 0)
    assert found.pending > 50_000
    server.delay(0.0)
    began = time.monotonic()
    assert module("sync", timeout=410.0, **settings).code == 0
    measured("delivered at once", found.pending / (time.monotonic() - began), "spans a second")
    found = balance(store, 101_000)
    assert (found.delivered, found.pending) == (101_000, 0)
    assert server.state() | {"posts": 0} == {"spans": 101_000, "request_logs": 50_500, "posts": 0, "again": 0}
    assert report["grown_mib"] <= 64.0
    measured("memory grew by", report["grown_mib"], "MiB")
    measured("full collections", report["collections"][2], "of Python's garbage collector")
    measured("median call", report["p50_us"] / 1e3, "ms")
    measured("p99 of calls", report["p99_us"] / 1e3, "ms")
    measure_worst(measured, report)
    untraced = run(PRELUDE + WATCH + source, tmp_path, timeout=400.0, **settings, PLTRACE_ENABLED=0)
    measure_worst(measured, told(untraced), what="worst call, untraced")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sync_goes_on_as_long_as_it_delivers(
    tmp_path: Path, counting: tuple[CountingProcess, dict[str, object]], store: Path
) -> None:
    """What takes longer than a minute to deliver, as PromptLayer is slow, is delivered by one `pltrace sync`."""
    server, settings = counting
    server.delay(2.0)
    run(PRELUDE + "pltrace.configure()\nfor number in range(8_000):\n    span(number)", tmp_path, **settings)
    began = time.monotonic()
    assert module("sync", timeout=250.0, **settings).code == 0
    assert time.monotonic() - began > 61.0
    assert server.state()["spans"] == 8_000


def test_flush_beside_others_that_record_without_a_pause(tmp_path: Path, store: Path) -> None:
    """`flush` waits for what was recorded before it, and not for what others go on to record."""
    source = """
pltrace.configure(store=sys.argv[1])
over = threading.Event()

def work():
    while not over.is_set():
        span(0, "others")

threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
flushed = []
for number in range(3):
    span(number, "ours")
    flushed.append(pltrace.flush(20))
    with open(sys.argv[2], "a") as told:
        told.write(f"{flushed[-1]}\\n")
over.set()
for thread in threads:
    thread.join()
"""
    told_in = tmp_path / "told"
    assert run(PRELUDE + source, tmp_path, store, told_in).code == 0
    assert told_in.read_text().split() == ["True"] * 3


def test_small_spans_behind_large_ones(tmp_path: Path, store: Path) -> None:
    """How large spans were of late keeps no small one from the room that it needs, while the file is waited for."""
    source = """
import sqlite3
pltrace.configure(store=sys.argv[1])
timed(lambda number: large(number, 1_000_000), 8)
assert pltrace.flush(30)
other = sqlite3.connect(sys.argv[1], isolation_level=None)
other.execute("BEGIN IMMEDIATE")
timed(span, 1000)
other.execute("ROLLBACK")
other.close()
timed.report()
"""
    assert told(run(PRELUDE + source, tmp_path, store))["calls"] == 1008
    assert rows(store, "SELECT count(*) AS count FROM spans") == [{"count": 1008}]


@pytest.mark.slow
@pytest.mark.timed
def test_large_values_at_once(tmp_path: Path, store: Path, measured: Measured) -> None:
    """Of calls that are given a megabyte each, as the one before, only so many wait in memory as there is room for."""
    source = """
pltrace.configure(store=sys.argv[1])

@traced
def take(text):
    pass

def most_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

take("0" * 1_000_000)  # How large they are is known when one is encoded.
assert pltrace.flush(10)
before = most_mib()
timed(lambda number: take(str(number % 10) * 1_000_000), 500)
timed.report(grown_mib=most_mib() - before)
"""
    report = told(run(PRELUDE + source, tmp_path, store))
    measured("memory grew by", report["grown_mib"], "MiB")
    measure_worst(measured, report)
    assert report["grown_mib"] <= 400.0
    assert rows(store, "SELECT count(*) AS count FROM spans") == [{"count": 501}]


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(7200)
def test_soak(
    tmp_path: Path, counting: tuple[CountingProcess, dict[str, object]], store: Path, measured: Measured
) -> None:
    """Request after request, a million with `PLTRACE_SOAK=1000000`: memory stays flat, the store within its limit."""
    server, settings = counting
    source = """
warm()
timed(ask, 2_000)
pltrace.flush(60)
size = lambda: sum(os.path.getsize(os.environ["PLTRACE_STORE"] + end) for end in ("", "-wal") )
before, largest, rounds = rss_mib(), 0, int(sys.argv[1]) // 2_000
timed.forget()
halfway = before
began = time.monotonic()
for round_ in range(rounds):
    timed.took_ns.clear()
    timed(ask, 2_000, start=round_ * 2_000)
    largest = max(largest, size())
    if round_ % 5 == 4:
        pltrace.flush(600)  # It records faster than one thread delivers, and what isn't delivered isn't pruned.
    if round_ == rounds // 2:
        halfway = rss_mib()
delivered = pltrace.flush(3_000)
timed.report(
    before_mib=before, halfway_mib=halfway, after_mib=rss_mib(), peak_mib=peak[0], largest_mib=largest / 2**20,
    seconds=time.monotonic() - began, delivered=delivered, worst_ms=timed.worst_ns[0] / 1e6,
)
"""
    report = told(run(PRELUDE + WATCH + source, tmp_path, REQUESTS, timeout=7000.0, **settings))
    recorded = 2 * (REQUESTS // 2_000 * 2_000 + 2_000)
    measured("requests", recorded / 2, "")
    measured("requests a second", recorded / 2 / report["seconds"], "")
    measured("memory before", report["before_mib"], "MiB")
    measured("memory halfway", report["halfway_mib"], "MiB")
    measured("memory after", report["after_mib"], "MiB")
    measured("memory at most", report["peak_mib"], "MiB")
    measured("store at most", report["largest_mib"], "MiB")
    measure_worst(measured, report, what="slowest of all calls")
    assert report["delivered"]
    state = server.state()
    assert (state["spans"], state["request_logs"], state["again"]) == (recorded, recorded // 2, 0)
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert rows(store, "SELECT count(*) AS count FROM deliveries WHERE state <> 1") == [{"count": 0}]
    assert not rows(store, "SELECT * FROM counters WHERE reason LIKE 'dropped_%'")
    assert report["peak_mib"] - report["before_mib"] <= 64.0
    assert report["largest_mib"] <= 1024.0 * 1.1
