"""The disk fills up, the file can't be written, is damaged or deleted: no program notices, and little is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

import pltrace
from pltrace import traced
from tests.faults.support import (
    PRELUDE,
    Measured,
    all_delivered,
    ask,
    balance,
    deliver_rest,
    measure_worst,
    taken,
    told,
)
from tests.faults.test_processes import go, ready
from tests.support.http_double import Fault
from tests.support.programs import ended, module, rows, run, start, stored
from tests.support.promptlayer_server import PromptLayerServer

#: A hang is told from none by this; the figures themselves are printed.
MOST_MS = 5000.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting takes root: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def remount(disk: Path, options: str) -> None:
    """Change a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True, capture_output=True)


FILLS = (
    PRELUDE
    + """
pltrace.configure()
print("ready", flush=True)
sys.stdin.readline()
timed(large, int(sys.argv[1]), rate=500)
full = pltrace.flush(0)
print("ready", flush=True)
sys.stdin.readline()
timed(large, 10, start=90_000)
flushed = pltrace.flush(30)
timed.report(full=full, flushed=flushed, rss_mib=rss_mib())
"""
)


@pytest.mark.slow
def test_disk_is_full_for_a_while(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], measured: Measured
) -> None:
    """On a full disk nobody waits, what is recorded waits in memory, and when there is room again all is delivered."""
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    promptlayer.stop()
    program = start(FILLS, tmp_path, 400, **settings)
    ready(program)
    go(program)
    ready(program)
    remount(small_disk, "size=200m")
    promptlayer.start()
    go(program)
    end = ended(program)
    report = told(end)
    assert (report["full"], report["flushed"]) == (False, True)
    assert report["worst_ms"] < MOST_MS
    assert "disk has room" in end.err
    all_delivered(promptlayer, store, 410)
    measure_worst(measured, report, what="worst call on a full disk")
    # One for the full disk, one for PromptLayer.
    assert len(end.err.splitlines()) <= 2, end.err


def fill(disk: Path) -> None:
    """Write until a disk is full."""
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(descriptor, bytes(4096)):
            pass
    os.close(descriptor)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["this process", "the next"])
def test_a_full_disk_keeps_nothing_from_delivery(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], by: str
) -> None:
    """What is stored is delivered while the disk is full, and what isn't when the process ends; the log stays small."""
    remount(small_disk, "size=10m")
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    promptlayer.stop()
    program = start(FILLS.partition("timed(large, 10")[0], tmp_path, 900, **settings)
    ready(program)
    go(program)
    ready(program)
    fill(small_disk)
    in_store = len(stored(store))
    assert 300 < in_store < 800
    assert (small_disk / "traces.db-wal").stat().st_size < 10 * 2**20 / 4
    if by == "this process":
        promptlayer.start()
        promptlayer.wait_for(lambda: len(promptlayer.spans) >= in_store, 20.0)
        go(program)
        end = ended(program)
        assert "lost" not in end.err
        assert len(promptlayer.spans) == 900
    else:
        go(program)
        end = ended(program)
        in_store = len(stored(store))  # The log may have had room for some more.
        assert f"ends with {900 - in_store} spans in memory" in end.err
        promptlayer.start()
        deliver_rest(tmp_path, **settings)
        assert len(promptlayer.spans) == in_store
        assert balance(store, 900).dropped == 900 - in_store
    assert set(taken(promptlayer).values()) == {1}


@pytest.mark.slow
def test_disk_stays_full(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], measured: Measured
) -> None:
    """On a disk that stays full memory is bounded, what has no place is dropped and counted, and nobody waits."""
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    program = start(FILLS.replace("rate=500", "rate=2000"), tmp_path, 12_000, **settings)
    ready(program)
    promptlayer.stop()
    go(program)
    ready(program)
    remount(small_disk, "size=500m")
    promptlayer.start()
    go(program)
    end = ended(program, timeout=110.0)
    report = told(end)
    assert report["worst_ms"] < MOST_MS
    deliver_rest(tmp_path, **settings)
    found = balance(store, 12_010)
    assert found.dropped > 0
    assert found.pending == 0
    assert report["rss_mib"] < 500
    measure_worst(measured, report, what="worst call on a full disk")
    measured("memory of the process", report["rss_mib"], "MiB")
    measured("dropped and counted", found.dropped, "of 12,010 spans")


def test_disk_is_full_at_first(small_disk: Path, tmp_path: Path) -> None:
    """A program that begins while the disk is full records into the store when there is room."""
    store = small_disk / "traces.db"
    fill(small_disk)
    program = start(
        PRELUDE
        + """
pltrace.configure(store=sys.argv[1])
timed(span, 20)
full = pltrace.flush(0)
print("ready", flush=True)
sys.stdin.readline()
timed.report(flushed=[full, pltrace.flush(30)])
""",
        tmp_path,
        store,
    )
    ready(program)
    (small_disk / "filler").unlink()
    go(program)
    assert told(ended(program))["flushed"] == [False, True]
    assert len(stored(store)) == 20


@pytest.mark.parametrize("end", ["", "\nassert pltrace.shutdown(20)"], ids=["", "shut down"])
def test_disk_is_full_and_backend_works(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], end: str
) -> None:
    """What can't be written because the disk is full is delivered from memory at the end of process or tracing."""
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    first = run(PRELUDE + "timed(span, 1000)\nassert pltrace.flush(30)", tmp_path, **settings)
    assert (first.code, first.err) == (0, "")
    fill(small_disk)
    second = run(PRELUDE + "timed(large, 200)" + end, tmp_path, **settings)
    assert second.code == 0
    assert "lost" not in second.err
    assert len(promptlayer.spans) == 1200
    (small_disk / "filler").unlink()
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.mark.slow
def test_what_is_delivered_makes_room_on_a_small_disk(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]
) -> None:
    """On a small disk the oldest delivered spans go, all are stored and delivered, and the program has room as well."""
    remount(small_disk, "size=16m")
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    source = """
timed(lambda number: large(number, 5_000), 6_000, rate=500)
assert pltrace.flush(30)
timed(span, 50, rate=50)
with open(sys.argv[1], "wb", buffering=0) as own:
    timed.report(flushed=pltrace.flush(30), written=own.write(bytes(2_000_000)))
"""
    program = run(PRELUDE + source, tmp_path, small_disk / "own", **settings)
    report = told(program)
    assert (report["flushed"], report["written"], program.err) == (True, 2_000_000, "")
    assert report["worst_ms"] < MOST_MS
    assert len(promptlayer.spans) == 6_050
    assert (_counted(store, "recorded"), _counted(store, "delivered")) == (6_050, 6_050)
    left = stored(store)
    assert left[-50:] == [f"call-{number:06}" for number in range(50)]
    assert left[:-50] == [f"large-{number:06}" for number in range(6_050 - len(left), 6_000)]


@pytest.mark.slow
def test_a_disk_is_found_full(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]
) -> None:
    """On a disk that is found full what was delivered makes room for what is recorded, and what wasn't delivered stays.

    `doctor` says that it is full.
    """
    remount(small_disk, "size=16m")
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    run(PRELUDE + "timed(large, 450, rate=200)\nassert pltrace.flush(30)", tmp_path, **settings)
    assert len(promptlayer.spans) == 450
    promptlayer.stop()
    run(PRELUDE + "timed(lambda n: span(n, 'waiting'), 50)", tmp_path, **settings)
    fill(small_disk)
    assert "disk is nearly full: 0.0 MB are left" in module("doctor", **settings).out
    program = run(PRELUDE + "timed(lambda n: span(n, 'late'), 200, rate=200)\npltrace.flush(20)", tmp_path, **settings)
    assert program.code == 0
    left = stored(store)
    assert left[-250:] == [f"{what}-{n:06}" for what, most in (("waiting", 50), ("late", 200)) for n in range(most)]
    assert 0 < len(left) - 250 < 450
    promptlayer.start()
    deliver_rest(tmp_path, **settings)
    assert set(taken(promptlayer).values()) == {1}
    assert len(promptlayer.spans) == 700
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]


@pytest.mark.slow
def test_more_comes_at_once_than_a_small_disk_holds(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]
) -> None:
    """A burst that a small disk has no room for is delivered all the same, bit by bit: the log leaves the file room."""
    remount(small_disk, "size=16m")
    settings["PLTRACE_STORE"] = small_disk / "traces.db"
    program = run(PRELUDE + "timed(large, 2_000, rate=2_000)\nassert pltrace.flush(50)", tmp_path, **settings)
    assert program.code == 0, program.err
    assert len(promptlayer.spans) == 2_000


def test_a_patient_flush_waits_for_the_store(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path
) -> None:
    """A store that can't be used for a moment fails no flush that has time."""

    def rename(name: str, new: str) -> None:
        with closing(sqlite3.connect(store, timeout=20.0)) as connection:
            connection.execute(f"ALTER TABLE {name} RENAME TO {new}")

    deliver()
    with traced("first"):
        pass
    assert pltrace.flush(20.0)
    rename("requests", "elsewhere")
    with traced("second"):
        pass
    assert not pltrace.flush(0.0)
    back = threading.Timer(0.5, rename, ("elsewhere", "requests"))
    back.start()
    assert pltrace.flush(20.0)
    back.join()
    all_delivered(promptlayer, store, 2)


def test_too_many_files_are_open(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A process that has too many files open as it goes on after a fork keeps its store, and delivers from there."""
    source = """
import logging, resource

class Told(logging.Handler):
    def emit(self, record):
        if "too many files open" in record.getMessage():
            told.set()

told = threading.Event()
logging.getLogger("pltrace").addHandler(Told())
timed(span, 20)
assert not pltrace.flush()
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
opened = []
try:
    while True:
        opened.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
timed(span, 5, start=20)
assert told.wait(30)
for descriptor in opened:
    os.close(descriptor)
print("ready", flush=True)
sys.stdin.readline()
timed(span, 5, start=25)
assert pltrace.flush(30)
"""
    promptlayer.fault = Fault(status=503)
    program = start(PRELUDE + source, tmp_path, **settings)
    ready(program)
    promptlayer.fault = None
    go(program)
    assert ended(program).code == 0
    all_delivered(promptlayer, store, 30)


def test_disk_is_read_only(
    small_disk: Path, tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]
) -> None:
    """Where the disk can only be read, what is recorded is delivered from memory."""
    store = small_disk / "traces.db"
    settings["PLTRACE_STORE"] = store
    assert run(PRELUDE + "span(0)", tmp_path, **settings).code == 0
    remount(small_disk, "ro")
    program = run(PRELUDE + "timed(span, 20)\nassert pltrace.flush(30)", tmp_path, **settings)
    assert program.code == 0, program.err
    assert "kept in memory" in program.err
    assert len(promptlayer.spans) == 21
    remount(small_disk, "rw")


def test_files_cannot_be_locked(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """On a file system without locks, where SQLite takes the file for one that others keep, memory is used, as told."""
    fails = """
import errno, fcntl
def flock(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""
    store.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:  # For SQLite it is the same.
        other.execute("BEGIN EXCLUSIVE")
        program = run(fails + PRELUDE + "timed(span, 20)\nassert pltrace.flush(20)", tmp_path, **settings)
    assert program.code == 0, program.err
    assert "it can't be locked" in program.err
    assert len(promptlayer.spans) == 20


@pytest.fixture
def failing_locks(tmp_path: Path) -> Path:
    """A library to load before a program, whose locks fail while a file is there."""
    library = tmp_path / "failing_locks.so"
    source = Path(__file__).parents[1] / "support" / "failing_locks.c"
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("to let the system's locks fail takes Linux and a C compiler")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("error", ["ENOLCK", "EIO"])
def test_locks_fail_later(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    failing_locks: Path,
    error: str,
) -> None:
    """Where no lock is given any more, memory is used, as told once; what was pending in the file is sent later."""
    source = """
timed(span, 20)
assert pltrace.flush(30)
timed(span, 20, start=20)
for fails in (True, False):
    print("ready", flush=True)
    sys.stdin.readline()
    timed(span, 10, start=40 if fails else 50)
assert pltrace.flush(60)
timed.report(counts=pltrace._health.counts)
"""
    fails = tmp_path / error
    program = start(PRELUDE + source, tmp_path, LD_PRELOAD=failing_locks, FAILING_LOCKS=fails, **settings)
    promptlayer.wait_for(lambda: len(promptlayer.spans) == 20, 60.0)
    promptlayer.fault = Fault(hang=True)
    ready(program)
    promptlayer.wait_for(lambda: any(not post.handled for post in promptlayer.posts), 60.0)
    fails.touch()
    go(program)
    ready(program)
    promptlayer.fault = None
    promptlayer.release()  # What is on its way fails, and stays in the file.
    go(program)
    done = ended(program, timeout=90.0)
    counts = told(done)["counts"]
    assert (counts["recorded"], sum(counts[reason] for reason in counts if reason.startswith("dropped"))) == (60, 0)
    assert done.err.count("it can't be locked any more") == 1, done.err
    assert "the store None" not in done.err
    fails.unlink()
    deliver_rest(tmp_path, **settings)
    assert set(taken(promptlayer).values()) == {1}
    assert len(promptlayer.spans) == 60
    found = balance(store, 40)
    assert (found.delivered, found.dropped) == (40, 0)


def test_no_home(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """With no home folder, as in some containers, a program runs and its spans arrive."""
    del settings["PLTRACE_STORE"]
    # As for a user whom the system doesn't know: else it would name the home of whoever runs the tests.
    unknown = "import os, pwd\nos.environ.pop('HOME', None)\npwd.getpwuid = {}.__getitem__\n"
    program = run(unknown + PRELUDE + "span(0)\nassert pltrace.flush(20)", tmp_path, **settings)
    assert program.code == 0, program.err
    assert "set HOME, or PLTRACE_STORE" in program.err
    program = run(PRELUDE + "span(0)\nassert pltrace.flush(20)", tmp_path, **{**settings, "HOME": "/proc/nowhere"})
    assert program.code == 0, program.err
    assert "kept in memory" in program.err
    assert len(promptlayer.spans) == 2


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user takes root")
@pytest.mark.parametrize("when", ["before", "after a fork"])
def test_another_users_file(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, when: str
) -> None:
    """A server that gives up its rights can't use root's file any more: its spans still arrive, from memory."""
    drop = "os.setgid(65534); os.setuid(65534)"
    source = PRELUDE + (
        f"{drop}\nspan(0)\nassert pltrace.flush(20)"
        if when == "before"
        else f"span(0, 'root')\nassert pltrace.flush(20)\nchild = os.fork()\nif child == 0:\n    {drop}\n    span(0)\n"
        "    os._exit(not pltrace.flush(20))\nassert os.waitpid(child, 0)[1] == 0"
    )
    store.parent.mkdir(mode=0o700)
    # Importing has to go on working; the folders of the test are root's alone.
    source = "import encodings.idna, logging.handlers, pltrace._tracing, pltrace._promptlayer, uuid\n" + source
    program = run(source, tmp_path, **settings)
    assert program.code == 0, program.err
    assert "kept in memory" in program.err
    assert len(promptlayer.spans) == (1 if when == "before" else 2)


# Damage.


def _deleted(store: Path) -> None:
    store.unlink()


def _all_deleted(store: Path) -> None:
    for part in store.parent.glob("traces.db*"):
        part.unlink()


def _folder_renamed(store: Path) -> None:
    store.parent.rename(store.parent.with_name("renamed"))


def _overwritten(store: Path) -> None:
    with store.open("r+b") as file:
        file.write(os.urandom(min(store.stat().st_size, 200_000)))
    log = store.with_name(store.name + "-wal")
    with contextlib.suppress(FileNotFoundError), log.open("r+b") as file:  # Its owner may have seen the damage by now.
        file.write(os.urandom(os.fstat(file.fileno()).st_size))


def _pages_overwritten(store: Path) -> None:
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("INSERT INTO counters VALUES ('something', 1)")  # So that others read anew.
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    with store.open("r+b") as file:  # All but the first page: it is read without trouble before a commit fails.
        file.seek(page_size)
        file.write(os.urandom(store.stat().st_size - page_size))


def _truncated(store: Path) -> None:
    os.truncate(store, 5000)


@pytest.mark.parametrize(
    ("what", "is_damage"),
    [
        (_deleted, False),
        (_overwritten, True),
        pytest.param(_all_deleted, False, marks=pytest.mark.slow),
        pytest.param(_folder_renamed, False, marks=pytest.mark.slow),
        pytest.param(_truncated, True, marks=pytest.mark.slow),
    ],
)
def test_file_is_lost_while_in_use(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    what: Callable[[Path], None],
    is_damage: bool,
) -> None:
    """A store that is deleted or damaged under three processes is replaced by one that all of them go on with.

    Of what they record from then on nothing is lost. Damage isn't seen before somebody reads it: what was written until
    then is with the old file.
    """
    source = (
        PRELUDE
        + """
def round_(name):
    timed(lambda n: span(n, f"{name}.{sys.argv[1]}"), 20)
    pltrace.flush(30)
    print("ready", flush=True)
    sys.stdin.readline()

pltrace.configure()
timed(lambda n: span(n, sys.argv[1]), 300)
round_("before")
round_("first")
round_("after")
assert pltrace.flush(30)
timed.report()
"""
    )
    processes = [start(source, tmp_path, f"process{number}", **settings) for number in range(3)]
    ready(*processes)
    assert len(promptlayer.spans) == 960
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    what(store)
    for _ in range(2):
        go(*processes)
        ready(*processes)
    go(*processes)
    reports = [told(ended(process)) for process in processes]
    assert max(report["worst_ms"] for report in reports) < MOST_MS
    measure_worst(measured, *reports)
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    for names in (stored(store), [span["name"] for span in promptlayer.spans.values()]):
        count = Counter(name.partition(".")[0] for name in names)
        assert count["after"] == 60
        assert is_damage or count["first"] == 60


@pytest.mark.parametrize("underway", [False, True], ids=["waiting", "on their way"])
@pytest.mark.parametrize(
    "what",
    [_deleted, *(pytest.param(what, marks=pytest.mark.slow) for what in (_all_deleted, _overwritten, _truncated))],
)
def test_what_is_lost_with_a_file_is_counted(
    deliver: Callable[..., None],
    promptlayer: PromptLayerServer,
    store: Path,
    caplog: pytest.LogCaptureFixture,
    what: Callable[[Path], None],
    underway: bool,
) -> None:
    """What was not delivered when the store's file was deleted or damaged is counted, and a warning says how much."""
    deliver()
    for number in range(150):
        ask(f"first-{number}")
    assert pltrace.flush(10.0)

    def lose(request: object = None) -> None:
        if not lost.is_set():
            lost.set()
            with closing(sqlite3.connect(store)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            what(store)

    lost = threading.Event()
    if underway:
        promptlayer.faults.append(lose)
    else:
        promptlayer.stop()
    for number in range(150):
        ask(f"second-{number}")
    if underway:
        assert lost.wait(10.0)
    else:
        assert not pltrace.flush()
        lose()
        promptlayer.start()
    for number in range(50):
        ask(f"third-{number}")
    assert pltrace.flush(20.0)
    assert pltrace.shutdown(20.0)
    counted = _counted(store, "dropped_with_file")
    assert len(promptlayer.spans) + counted == 700
    assert (f"{counted} spans in it, not delivered yet, are lost" in caplog.text) is (counted > 0)
    assert counted or underway


def test_a_request_is_lost_with_the_file(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path
) -> None:
    """Who waits for the id of a request that was lost is let go, and what is asked of it is refused and counted."""
    promptlayer.fault = Fault(status=503)
    deliver()
    request = ask()
    assert not pltrace.flush()
    store.unlink()
    promptlayer.fault = None
    began = time.monotonic()
    assert request.wait(60) is None
    assert time.monotonic() - began < 30
    request.score(10)
    give_up_at = time.monotonic() + 30
    while not (refused := rows(store, "SELECT error FROM operations WHERE state = 2")):
        assert time.monotonic() < give_up_at
        assert pltrace.flush(10)
    assert refused == [{"error": f"span {request.span_id} isn't in the store"}]
    assert promptlayer.operations == []


def test_what_is_lost_right_before_the_end_is_counted(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path
) -> None:
    """Nothing needs to be recorded any more for what was lost with the store's file to be counted."""
    deliver()
    _leave_waiting(promptlayer)
    store.unlink()
    pltrace.shutdown(0.0)
    assert _counted(store, "dropped_with_file") == 20


@pytest.mark.parametrize("what", [_deleted, _pages_overwritten])
def test_what_arrives_while_the_file_is_lost_is_not_counted_as_lost(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path, what: Callable[[Path], None]
) -> None:
    """A batch that is on its way when the file is lost counts as delivered once it has arrived, and as nothing else."""
    deliver()

    def lose(request: object) -> None:
        promptlayer.faults.remove(lose)
        what(store)

    with traced("around"):
        for number in range(10):
            ask(f"call-{number}")
        assert pltrace.flush(10.0)  # What comes next is one batch.
        promptlayer.faults.append(lose)
    assert pltrace.flush(10.0)
    assert pltrace.shutdown(10.0)
    assert len(promptlayer.spans) == 21
    assert _counted(store, "dropped_with_file") == 0


def test_the_log_is_deleted(deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path) -> None:
    """Of a log that is deleted while one process uses it nothing is lost: it has what was in it."""
    deliver()
    _leave_waiting(promptlayer)
    store.with_name(store.name + "-wal").unlink()
    for number in range(10):
        ask(f"after-{number}")
    promptlayer.start()
    assert pltrace.flush(20.0)
    all_delivered(promptlayer, store, 40)


def test_the_file_is_emptied(deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path) -> None:
    """Of a file that is emptied what was in it is counted as lost, and what comes then is kept."""
    deliver()
    _leave_waiting(promptlayer)
    os.truncate(store, 0)
    promptlayer.start()
    for number in range(10):
        ask(f"after-{number}")
    assert pltrace.flush(20.0)
    pltrace.shutdown(10.0)
    assert _counted(store, "dropped_with_file") == 20
    assert len(promptlayer.spans) >= 20


def _leave_waiting(promptlayer: PromptLayerServer) -> None:
    """Stop PromptLayer, and store ten calls, of two spans each, that wait for it."""
    promptlayer.stop()
    for number in range(10):
        ask(f"waiting-{number}")
    assert not pltrace.flush()


def _counted(store: Path, reason: str) -> int:
    return sum(row["count"] for row in rows(store, "SELECT * FROM counters WHERE reason = ?", reason))


@pytest.mark.parametrize("status", [503, 429])
@pytest.mark.parametrize("underway", [True, False], ids=["while it is answered", "after it"])
def test_the_file_is_lost_with_a_batch_that_failed(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, store: Path, status: int, underway: bool
) -> None:
    """All of a batch that PromptLayer didn't take is counted when the store's file is deleted before the next try."""
    lost = threading.Event()

    def record(*names: str) -> None:
        for name in names:
            with traced(name):
                pass

    def lose() -> None:
        lost.set()
        store.unlink()
        record("last")

    def fail(request: object) -> Fault | None:
        if lost.is_set():
            return None
        if underway:
            lose()
            pltrace.flush(timeout=0.2)  # The post can't end before; but that the file is another is known.
        return Fault(status=status)

    promptlayer.faults.append(fail)
    deliver()
    record(*(f"span-{number}" for number in range(60)))
    assert not pltrace.flush()
    if not underway:
        lose()
    assert pltrace.flush(20.0)
    assert pltrace.shutdown(20.0)
    counted = _counted(store, "dropped_with_file")
    assert len(promptlayer.spans) + counted == 61


@pytest.mark.slow
def test_long_reader(tmp_path: Path, store: Path, measured: Measured) -> None:
    """After somebody read for long, the database's log is cut back to its bound."""
    source = (
        PRELUDE
        + """
pltrace.configure(store=sys.argv[1])
span(0)
assert pltrace.flush(10)
print("ready", flush=True)
sys.stdin.readline()
timed(lambda number: large(number, 5000), 8000)
assert pltrace.flush(30)
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.2)
timed(large, 100)
assert pltrace.flush(30)
print("ready", flush=True)
sys.stdin.readline()
timed.report()
"""
    )
    program = start(source, tmp_path, store)
    ready(program)
    log = store.with_name("traces.db-wal")
    with closing(sqlite3.connect(store, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert len(reader.execute("SELECT * FROM spans").fetchall()) == 1
        go(program)
        ready(program)
        meanwhile = log.stat().st_size
        reader.execute("ROLLBACK")
    go(program)
    ready(program)
    afterwards = log.stat().st_size
    go(program)
    told(ended(program))
    measured("log while somebody reads", meanwhile / 2**20, "MiB")
    measured("log afterwards", afterwards / 2**20, "MiB")
    assert meanwhile > 2**24 > afterwards


def test_log_is_bounded(tmp_path: Path, store: Path) -> None:
    """However much a process writes, the database's log stays within its bound, nearly, and so does the next's."""
    source = (
        PRELUDE
        + """
pltrace.configure(store=sys.argv[1])
timed(large, 3000)
assert pltrace.flush(30)
print(os.path.getsize(sys.argv[1] + "-wal"))
"""
    )
    for _ in range(2):
        program = run(source, tmp_path, store)
        assert program.code == 0, program.err
        assert int(program.out) < 2.5 * 2**24
    assert len(stored(store)) == 6000


def test_space_is_given_back(tmp_path: Path, local: Path) -> None:
    """What is pruned makes the file smaller."""
    from pltrace._rows import Rows
    from pltrace._store import Store
    from tests.test_store import _a_row

    store = Store(tmp_path / "pruned.db")
    store.write(Rows(_a_row(number) for number in range(2000)))
    store.close()
    before = (tmp_path / "pruned.db").stat().st_size
    while store.retention.prune(2 * 10**18, 2**30):
        pass
    store.close()
    assert len(stored(tmp_path / "pruned.db")) == 1
    assert (tmp_path / "pruned.db").stat().st_size < before / 2
