"""Many processes share one store: each goes on whatever the others do, and what one leaves, one other delivers."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

import pltrace
from pltrace import ExportResult, StoredSpan, traced
from tests.faults.support import PRELUDE, Measured, all_delivered, balance, deliver_rest, measure_worst, taken, told
from tests.support.http_double import Fault
from tests.support.programs import ended, rows, run, start, stored
from tests.support.promptlayer_server import PromptLayerServer

#: A hang is told from none by this; the figures themselves are printed.
MOST_MS = 5000.0


def go(*processes: subprocess.Popen[str]) -> None:
    """Let programs that read a line go on."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def ready(*processes: subprocess.Popen[str]) -> None:
    """Wait until programs have printed a line."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline()


@pytest.mark.slow
@pytest.mark.timed
def test_eight_processes_one_file(tmp_path: Path, store: Path, measured: Measured) -> None:
    """Eight processes that record 5,000 spans each into one file lose none, and no call waits for another process."""
    source = (
        PRELUDE
        + """
pltrace.configure(store=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
timed(lambda number: span(number, sys.argv[2]), 5000, rate=1000)
left = time.monotonic()
pltrace.flush(30)
timed.report(behind_ms=1000 * (time.monotonic() - left))
"""
    )
    processes = [start(source, tmp_path, store, f"process{number}") for number in range(8)]
    ready(*processes)
    go(*processes)
    wal = 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        path = store.with_name("traces.db-wal")
        wal = max(wal, path.stat().st_size if path.exists() else 0)
    programs = [ended(process) for process in processes]
    reports = [told(program) for program in programs]
    assert [program.err for program in programs] == [""] * 8
    assert Counter(stored(store)) == Counter(f"process{p}-{n:06}" for p in range(8) for n in range(5000))
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert max(report["worst_ms"] for report in reports) < MOST_MS
    measured("p99 of calls, the slowest process", max(report["p99_us"] for report in reports), "µs")
    measure_worst(measured, *reports)
    measured("behind at the end, the slowest process", max(report["behind_ms"] for report in reports), "ms")
    measured("largest log of the database", wal / 2**20, "MiB")


@pytest.mark.slow
@pytest.mark.timed
def test_durable_soon(tmp_path: Path, store: Path, measured: Measured) -> None:
    """While four processes write, what one of them recorded can be read from the file a moment later."""
    source = (
        PRELUDE
        + """
import sqlite3
pltrace.configure(store=sys.argv[1])
reader = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, isolation_level=None)
print("ready", flush=True)
sys.stdin.readline()
took = []
for number in range(400):
    name = f"{sys.argv[2]}-{number:04}"
    with traced(name):
        pass
    began = time.perf_counter_ns()
    # The latest of all processes: there are never more than a few after it.
    query = "SELECT 1 FROM (SELECT name FROM spans ORDER BY seq DESC LIMIT 50) WHERE name = ?"
    while reader.execute(query, (name,)).fetchone() is None:
        time.sleep(0.0002)
    took.append((time.perf_counter_ns() - began) / 1e6)
    time.sleep(0.005)
took.sort()
print(json.dumps({"p50": took[200], "p99": took[396], "worst": took[-1]}))
"""
    )
    processes = [start(source, tmp_path, store, f"process{number}") for number in range(4)]
    ready(*processes)
    go(*processes)
    reports = [told(ended(process)) for process in processes]
    assert len(stored(store)) == 1600
    assert max(report["worst"] for report in reports) < MOST_MS
    for figure in ("p50", "p99", "worst"):
        measured(f"on disk, {figure} of the slowest process", max(report[figure] for report in reports), "ms")


def _stopped_while_writing(process: subprocess.Popen[str], store: Path) -> None:
    """Stop a process that writes all the time, at a moment when it holds the file's lock."""
    with closing(sqlite3.connect(store, timeout=0.0, isolation_level=None)) as connection:
        for _ in range(5000):
            os.kill(process.pid, signal.SIGSTOP)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                time.sleep(0.02)  # A thread that was about to let go of the lock does so before it stops.
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.OperationalError:
                    return
            connection.execute("ROLLBACK")
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(0.001)
    raise AssertionError("it never was")


WRITES_ALWAYS = """
number = 0
while True:
    span(number, "stopped")
    number += 1
    if number == 100:
        print("ready", flush=True)
    if number % 20 == 0:
        time.sleep(0.001)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [10])
def test_stopped_in_a_transaction(tmp_path: Path, store: Path, measured: Measured, seconds: int) -> None:
    """A process that is stopped while it holds the file's lock delays no call of the others, and no fork of theirs."""
    configured = PRELUDE + "pltrace.configure(store=sys.argv[1])\n"
    stopped = start(configured + WRITES_ALWAYS, tmp_path, store)
    ready(stopped)
    other = start(
        configured
        + """
span(0, "before")
assert pltrace.flush(10)
print("ready", flush=True)
sys.stdin.readline()
timed(span, int(sys.argv[2]), rate=500)
forks = Timed()
def fork(number):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
forks(fork, 5)
waiting = pltrace.flush(0)
print("ready", flush=True)
assert pltrace.flush(30)
timed.report(worst_fork_ms=max(forks.took_ns) / 1e6, waiting=waiting)
""",
        tmp_path,
        store,
        500 * seconds,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    ready(other)
    _stopped_while_writing(stopped, store)
    go(other)
    ready(other)
    os.kill(stopped.pid, signal.SIGCONT)
    report = told(ended(other))
    stopped.kill()
    ended(stopped)
    assert report["waiting"] is False
    names = [name for name in stored(store) if name.startswith("call")]
    assert names == [f"call-{number:06}" for number in range(500 * seconds)]
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert report["worst_ms"] < MOST_MS
    measure_worst(measured, report)
    measured("worst fork", report["worst_fork_ms"], "ms")


@pytest.mark.slow
@pytest.mark.parametrize("keeps_from", ["writing", "reading"])
def test_ends_while_another_holds_the_lock(tmp_path: Path, store: Path, measured: Measured, keeps_from: str) -> None:
    """A process that ends while it can't write doesn't hang, and says how much it takes with it."""
    assert run(PRELUDE + "pltrace.configure(store=sys.argv[1])\nspan(0)", tmp_path, store).code == 0
    with closing(sqlite3.connect(store, isolation_level=None)) as connection:
        if keeps_from == "reading":
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("BEGIN IMMEDIATE")
        source = "pltrace.configure(store=sys.argv[1])\ntimed(span, 10)\nprint(time.monotonic())"
        program = run(PRELUDE + source, tmp_path, store)
        took_s = time.monotonic() - float(program.out)
        connection.execute("ROLLBACK")
    assert program.code == 0
    assert "ends with 10 spans in memory" in program.err
    assert "Traceback" not in program.err
    assert took_s < 8.0
    measured(f"the exit of who is kept from {keeps_from}", took_s, "s")


def test_opens_while_another_holds_the_lock(tmp_path: Path, store: Path, measured: Measured) -> None:
    """Opening the store waits for nobody who writes to it."""
    assert run(PRELUDE + "pltrace.configure(store=sys.argv[1])\nspan(0)", tmp_path, store).code == 0
    with closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        process = start(
            PRELUDE
            + """
timed(lambda number: pltrace.configure(store=sys.argv[1]), 1)
span(1)
print(json.dumps(timed.took_ns[0] / 1e6), flush=True)
sys.stdin.readline()
assert pltrace.flush(20)
""",
            tmp_path,
            store,
        )
        assert process.stdout is not None
        took_ms = float(process.stdout.readline())
        connection.execute("ROLLBACK")
        go(process)
    program = ended(process)
    assert (program.code, program.err) == (0, "")
    assert len(stored(store)) == 2
    assert took_ms < MOST_MS
    measured("opening", took_ms, "ms")


def test_a_new_store_that_another_is_making(tmp_path: Path, store: Path, measured: Measured) -> None:
    """Who switches tracing on doesn't wait for a process that is making the store, nor go on without the file."""
    store.parent.mkdir()
    with closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        process = start(
            PRELUDE
            + """
timed(lambda number: (pltrace.configure(), span(number)), 1)
timed.report(is_stored=pltrace.flush(0.1))
sys.stdin.readline()
assert pltrace.flush(20)
""",
            tmp_path,
            PLTRACE_STORE=store,
        )
        assert process.stdout is not None
        report = json.loads(process.stdout.readline())
        connection.execute("ROLLBACK")
        go(process)
    program = ended(process)
    assert (program.code, program.err) == (0, "")
    assert not report["is_stored"]
    assert stored(store) == ["call-000000"]
    measured("opening, and the first call", report["worst_ms"], "ms")


@pytest.mark.slow
@pytest.mark.parametrize("delivers", [True, False])
def test_another_holds_the_lock_at_exit(
    tmp_path: Path, settings: dict[str, object], store: Path, delivers: bool
) -> None:
    """A process that ends while another keeps the store for seconds waits for it, and says of nothing that it is lost.

    Also when there is nobody to deliver to.
    """
    ours = {**settings, "PROMPTLAYER_BASE_URL": "http://127.0.0.1:9"} if delivers else {"PLTRACE_STORE": store}
    assert run(PRELUDE + "pltrace.configure()\nspan(0)\nassert pltrace.flush(0.5) or True", tmp_path, **ours).code == 0
    with closing(sqlite3.connect(store, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        source = "pltrace.configure()\ntimed(span, 100, start=1)\nprint('ends', flush=True)"
        process = start(PRELUDE + source, tmp_path, **ours)
        ready(process)
        time.sleep(3.0)  # More than the wait for PromptLayer, and than one look for the lock.
        connection.execute("ROLLBACK")
    program = ended(process)
    assert program.code == 0
    assert "lost" not in program.err
    assert len(stored(store)) == 101
    assert rows(store, "SELECT * FROM counters WHERE reason LIKE 'dropped_%'") == []


@pytest.mark.slow
def test_a_folder_that_another_holds(tmp_path: Path, store: Path) -> None:
    """Children of a process that records store their spans while another has locked the store's folder.

    So does one that was stopped while making the store.
    """
    source = """
pltrace.configure(store=sys.argv[1])
span(0)
assert pltrace.flush(20)
print("ready", flush=True)
sys.stdin.readline()

def keep_recording():
    number = 1
    while not ends.wait(0.001):
        span(number)
        number += 1
    print(number, flush=True)

ends = threading.Event()
recording = threading.Thread(target=keep_recording)
recording.start()
children = []
for number in range(20):  # After each fork the writer opens the file again, maybe in the middle of the next.
    children.append(os.fork())
    if children[-1] == 0:
        signal.alarm(60)
        span(number, "child")
        os._exit(0 if pltrace.flush(50) else 1)
    time.sleep(0.005)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * 20
ends.set()
recording.join()
assert pltrace.flush(20)
"""
    process = start(PRELUDE + source, tmp_path, store)
    ready(process)
    folder = os.open(store.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        go(process)
        program = ended(process)
    finally:
        os.close(folder)
    assert (program.code, program.err) == (0, "")
    assert len(stored(store)) == 20 + int(program.out.split()[-1])


# Leases.


@pytest.mark.slow
def test_lease_lost_while_stopped(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """What a stopped process was about to try again is delivered by another, not by both, and both know the ids."""
    promptlayer.fault = Fault(status=503, headers={"Retry-After": "10"})  # Not before it is stopped.
    first = start(
        PRELUDE
        + """
warm()
told = threading.Semaphore(0)
with traced("all", on_request=lambda request: told.release()):
    timed(ask, 20)
print("ready", flush=True)
sys.stdin.readline()
assert pltrace.flush(30)
assert all(told.acquire(timeout=30) for _ in range(20))
""",
        tmp_path,
        **settings,
    )
    ready(first)
    promptlayer.wait_for(lambda: [post.status for post in promptlayer.posts] == [503], 30.0)
    time.sleep(0.2)  # For the answer to arrive.
    os.kill(first.pid, signal.SIGSTOP)
    promptlayer.fault = None
    deliver_rest(tmp_path, **settings)
    assert len(promptlayer.spans) == 0, "its lease holds"
    with closing(sqlite3.connect(store)) as connection:  # As if a minute had passed.
        connection.execute("UPDATE owners SET seen_at_ns = seen_at_ns - 61000000000")
        connection.commit()
    deliver_rest(tmp_path, **settings)
    assert len(promptlayer.spans) == 41
    os.kill(first.pid, signal.SIGCONT)
    go(first)
    assert ended(first).code == 0
    all_delivered(promptlayer, store, 41)
    assert set(taken(promptlayer).values()) == {1}


@pytest.mark.slow
def test_an_exporter_takes_long(tmp_path: Path, store: Path) -> None:
    """While an exporter is at one batch, an idle process keeps its lease: nobody else takes the batch over."""
    began, goes_on = threading.Event(), threading.Event()

    class Slow:
        name = "slow"

        def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
            began.set()
            assert goes_on.wait(60)
            return ExportResult("delivered")

        def shutdown(self) -> None:
            pass

    pltrace.configure(store=store, exporters=[Slow()])
    with traced("idle"):
        pass
    assert began.wait(10)
    seen = "SELECT seen_at_ns FROM owners"
    before = rows(store, seen)
    give_up_at = time.monotonic() + 50
    while rows(store, seen) == before:
        assert time.monotonic() < give_up_at
        time.sleep(0.5)
    goes_on.set()
    assert pltrace.flush(10)


def test_killed_with_a_lease(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """Of two processes that deliver, one is killed: the other, which goes on, delivers what it left."""
    promptlayer.fault = Fault(status=503)
    source = PRELUDE + "timed(lambda n: span(n, sys.argv[1]), 50)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    killed = start(source, tmp_path, "killed", **settings)
    ready(killed)
    other = start(source + "assert pltrace.flush(60)", tmp_path, "other", **settings)
    ready(other)
    promptlayer.wait_for(lambda: len({post.span_ids for post in promptlayer.posts}) == 2, 30.0)
    killed.kill()
    ended(killed)
    promptlayer.fault = None
    go(other)
    assert ended(other).code == 0
    all_delivered(promptlayer, store, 100)
    assert set(taken(promptlayer).values()) == {1}


#: Lets the program's clock be set, for everything in it that looks at the time of day.
CLOCK = """
import time as _time
_real, _offset = (_time.time, _time.time_ns), [0]
_time.time = lambda: _real[0]() + _offset[0]
_time.time_ns = lambda: _real[1]() + _offset[0] * 10**9
def jump(seconds):
    _offset[0] += seconds
"""


@pytest.mark.parametrize("seconds", [-3600, *(pytest.param(s, marks=pytest.mark.slow) for s in (3600, 86400 * 400))])
def test_clock_jumps(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, seconds: int
) -> None:
    """When the clock is set while processes share a store, nothing is stranded and nobody takes what is another's."""
    promptlayer.fault = Fault(status=503)
    source = (
        CLOCK
        + PRELUDE
        + f"""
timed(lambda n: span(n, sys.argv[1]), 50)
print("ready", flush=True)
sys.stdin.readline()
jump({seconds})
child = os.fork()
if child == 0:
    jump({-seconds})
    timed(lambda n: span(n, sys.argv[1] + "-child"), 50)
    sys.exit(0 if pltrace.flush(60) else 1)
timed(lambda n: span(n, sys.argv[1] + "-late"), 50)
assert pltrace.flush(60)
assert os.waitpid(child, 0)[1] == 0
"""
    )
    processes = [start(source, tmp_path, f"process{number}", **settings) for number in range(2)]
    ready(*processes)
    promptlayer.wait_for(lambda: len({post.span_ids for post in promptlayer.posts}) == 2, 30.0)
    promptlayer.fault = None
    go(*processes)
    assert [program.code for program in map(ended, processes)] == [0, 0]
    balance(store, 300)
    all_delivered(promptlayer, store, 300)
    assert set(taken(promptlayer).values()) == {1}


def test_clock_is_set_back_during_a_call(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A call that ends before it began, by a clock that was set back, isn't refused for it."""
    source = (
        CLOCK
        + PRELUDE
        + """
from langchain_core.language_models.fake_chat_models import FakeListChatModel

class SetsClock(FakeListChatModel):
    def _call(self, *arguments, **more):
        jump(-3600)
        return super()._call(*arguments, **more)

with traced("around"):
    SetsClock(responses=["Hello."]).invoke("Hi!")
assert pltrace.flush(30)
"""
    )
    assert run(source, tmp_path, **settings).code == 0
    all_delivered(promptlayer, store, 2)
