"""The store keeps what was recorded: on disk soon, private, through the death of processes, and shared by many."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel

import pltrace
import pltrace.testing
from pltrace import traced
from pltrace._encoding import Encoder
from pltrace._promptlayer import PromptLayerExporter
from pltrace._record import row_of
from pltrace._rows import ReadSpan, Row, Rows
from pltrace._store import Asked, Store
from tests.support.http_double import STORE_THEN_HANG, on
from tests.support.programs import deliveries, ended, rows, run, start, stored
from tests.support.promptlayer_server import PromptLayerServer

#: A program that records spans named by its arguments 2 to 4, and does then what the test adds.
RECORDS = """
import os, signal, sys
import pltrace
from pltrace import traced

def record(prefix, count):
    for number in range(count):
        with traced(f"{prefix}-{number:04}"):
            pass

def wait():
    print("ready", flush=True)
    sys.stdin.readline()
"""


def record(*names: str) -> None:
    """Records a trace of one span for each name."""
    for name in names:
        with traced(name):
            pass


def soon(holds: Callable[[], Any], timeout: float = 10.0) -> None:
    """Looks until something holds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"not so within {timeout} s"
        time.sleep(0.005)


def ready(process: subprocess.Popen[str]) -> None:
    """Waits until a program says so."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", line + (process.communicate()[1] if process.poll() is not None else "")


def ids(server: PromptLayerServer) -> list[str]:
    """Gives the ids of all spans that PromptLayer took, as often as it took them."""
    return [span_id for post in server.posts if post.handled for span_id in post.span_ids]


# On disk.


def test_recorded_is_readable_by_others_soon(local: Path) -> None:
    """What was recorded can be read by another connection a moment later, with nobody flushing."""
    record("first")
    soon(lambda: stored(local) == ["first"])
    record("second")
    soon(lambda: stored(local) == ["first", "second"], timeout=1.0)


def test_everything_is_kept(local: Path) -> None:
    """Thousands of spans in one go are all in the file after a flush, in the order they ended, and it is sound."""
    names = [f"span-{number:04}" for number in range(3000)]
    record(*names)
    assert pltrace.flush(30.0)
    assert stored(local) == names
    assert rows(local, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]


def test_private(tmp_path: Path) -> None:
    """The file and its companions can be read by their owner alone, whatever the umask, and the folder too."""
    path = tmp_path / "new" / "traces.db"
    ended = run(
        RECORDS
        + """
os.umask(0)
modes = set()
def watch(event, arguments):
    if event == "sqlite3.connect" and os.fsdecode(arguments[0]).endswith("traces.db"):
        modes.add(oct(os.stat(arguments[0]).st_mode & 0o777))
sys.addaudithook(watch)
pltrace.configure(store=sys.argv[1])
record("span", 3)
pltrace.flush()
folder = os.path.dirname(sys.argv[1])
modes.update(oct(os.stat(os.path.join(folder, name)).st_mode & 0o777) for name in os.listdir(folder))
print(len(os.listdir(folder)), sorted(modes), oct(os.stat(folder).st_mode & 0o777))
""",
        tmp_path,
        path,
    )
    assert (ended.out, ended.err) == ("4 ['0o600'] 0o700\n", "")


def test_default_place(tmp_path: Path) -> None:
    """With nothing said, the store is `~/.pltrace/traces.db`."""
    run("import pltrace\npltrace.configure()\nwith pltrace.traced('here'): pass", tmp_path)
    assert stored(tmp_path / ".pltrace" / "traces.db") == ["here"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_ids_grow(local: Path) -> None:
    """Ids of spans and traces grow, so that they are added at the end of a store's indexes, also in a forked child."""
    began = int(time.time())
    record(*["parent"] * 6)
    if not (child := os.fork()):
        record(*["child"] * 6)
        pltrace.flush()
        os._exit(0)
    os.waitpid(child, 0)
    record("parent")
    assert pltrace.flush()
    found = rows(local, "SELECT * FROM spans")
    ids = {
        name: sorted(int(row["span_id"], 16) for row in found if row["name"] == name) for name in ("parent", "child")
    }
    assert [max(some) - min(some) for some in ids.values()] == [6, 5]
    assert abs(ids["parent"][0] - ids["child"][0]) > 2**32
    seconds = [int(row["trace_id"][:8], 16) for row in found]
    assert began <= min(seconds) <= max(seconds) <= time.time()
    assert len({row["trace_id"] for row in found}) == 13


def test_local_ids(local: Path) -> None:
    """With no PromptLayer, requests get ids of the store's own, which `on_request` and handles see as ever."""
    told: list[int] = []
    spans = []
    for _ in range(2):
        with traced("ask", on_request=lambda request: told.append(int(request))) as span:
            FakeListChatModel(responses=["Hello."]).invoke("Hi!")
        spans.append(span)
    found = [request.wait(10.0) for span in spans for request in span.requests]
    assert pltrace.flush(10.0)
    assert found == told
    assert len(set(found)) == 2
    kept = rows(local, "SELECT request_id FROM requests ORDER BY seq")
    assert [row["request_id"] for row in kept] == found


def test_scores_are_kept_without_promptlayer(local: Path) -> None:
    """With no PromptLayer, what is asked of requests is kept in the store."""
    with traced("ask") as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    span.requests[0].score(80, "tone")
    span.score(60)
    assert pltrace.flush(10.0)
    kept = rows(local, "SELECT kind, arguments FROM operations WHERE subtree = 0 ORDER BY id")
    assert [row["kind"] for row in kept] == ["score", "score"]
    assert '"tone"' in kept[0]["arguments"]


# When it can't be used.


def test_a_file_of_another_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A path that names somebody's file by mistake leaves it alone: memory, and one clear warning."""
    notes = tmp_path / "notes.txt"
    notes.write_text("Somebody's notes, which are no database, and longer than the header of one." * 20)
    kept = notes.read_bytes()
    pltrace.configure(store=notes)
    with traced("recorded"):
        pass
    assert pltrace.flush(5.0)
    assert notes.read_bytes() == kept
    assert list(tmp_path.glob("notes*")) == [notes]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "pltrace"]
    assert "notes.txt" in warning
    assert "a file of another kind" in warning


def test_damaged_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is no store any more is renamed aside with a warning that says where to, and a new one begun."""
    path = tmp_path / "traces.db"
    rubbish = os.urandom(20_000)
    path.write_bytes(rubbish)
    pltrace.configure(store=path)
    record("after")
    assert pltrace.flush(10.0)
    assert stored(path) == ["after"]
    (aside,) = tmp_path.glob("traces.db.corrupt-*")
    assert aside.read_bytes() == rubbish
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.name == "pltrace"]
    assert str(aside) in warning
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("kept", [0.5, 0.1])
def test_truncated_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: float) -> None:
    """A store that lost its end doesn't keep the program from recording."""
    path = tmp_path / "traces.db"
    run(RECORDS + "pltrace.configure(store=sys.argv[1])\nrecord('before', 500)", tmp_path, path)
    assert len(stored(path)) == 500
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, int(path.stat().st_size * kept))
    pltrace.configure(store=path)
    record("after")
    assert pltrace.flush(10.0)
    assert stored(path) == ["after"]
    assert "damaged" in caplog.text


def _newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE future (x); INSERT INTO future VALUES (42); PRAGMA user_version = 99;"
            " PRAGMA application_id = 0x706C7472"
        )


def _of_another_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE customers (x); INSERT INTO customers VALUES (42)")


def _of_another_versioned_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE customers (x); PRAGMA user_version = 1; PRAGMA application_id = 7")


@pytest.mark.parametrize("make", [_newer, _of_another_program, _of_another_versioned_program])
def test_somebody_elses_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[Path], None]) -> None:
    """A store of a newer version, or another program's database, is left as it is: memory, and one clear warning."""
    path = tmp_path / "traces.db"
    make(path)
    before = path.read_bytes()
    pltrace.configure(store=path)
    with traced("ask") as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    assert span.requests[0].wait(10.0) is not None
    assert pltrace.flush(10.0)
    assert path.read_bytes() == before
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.name == "pltrace"]
    assert str(path) in warning
    assert "PLTRACE_STORE" in warning
    assert "memory" in warning


def test_becomes_somebody_elses_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store that a newer version took the place of while it was in use: one warning, which says it once."""
    path = tmp_path / "traces.db"
    pltrace.configure(store=path)
    record("before")
    assert pltrace.flush(10.0)
    _newer(tmp_path / "newer.db")
    for part in tmp_path.glob("traces.db*"):
        part.unlink()
    (tmp_path / "newer.db").replace(path)
    record("after")
    assert pltrace.flush(10.0)
    (warning,) = [line for line in caplog.messages if "Can't use the store" in line]
    assert warning.startswith(f"Can't use the store {str(path)!r}: its schema version is 99 and this pltrace knows")
    assert warning.count("Can't use the store") == 1


def _unwritable(tmp_path: Path) -> Path:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o500)
    # Nothing is read-only to root but what the kernel says is.
    return folder if not os.access(folder, os.W_OK) else Path("/proc/self/fdinfo")


def _a_file_for_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


@pytest.mark.parametrize("place", [_unwritable, _a_file_for_a_folder])
def test_unusable_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture, place: Callable[[Path], Path]) -> None:
    """Where no file can be written, memory is used, and one warning names the place and the remedy."""
    path = place(tmp_path) / "deeper" / "traces.db"
    pltrace.configure(store=path)
    record("first")
    assert pltrace.flush(10.0)
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.name == "pltrace"]
    assert str(path) in warning
    assert "PLTRACE_STORE" in warning


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_no_ordinary_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    """A link or a pipe in place of the file is never followed or opened."""
    path, target = tmp_path / "traces.db", tmp_path / "target"
    if kind == "link":
        target.write_text("")
        path.symlink_to(target)
    else:
        os.mkfifo(path)
    pltrace.configure(store=path)
    record("first")
    assert pltrace.flush(10.0)
    assert "not a regular file" in caplog.text
    assert kind == "pipe" or target.read_text() == ""


def test_delivers_from_memory(
    tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a file, spans are still delivered."""
    deliver(store="/proc/self/fdinfo/traces.db")
    record("first")
    assert pltrace.flush(10.0)
    assert [span["name"] for span in promptlayer.spans.values()] == ["first"]


@pytest.mark.parametrize("place", ["memory", "off"])
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_no_file(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    deliver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    by: str,
) -> None:
    """With `memory` or `off` nothing is written to disk; spans are delivered and requests get their ids."""
    if by == "environment":
        monkeypatch.setenv("PLTRACE_STORE", place)
    deliver(store=place if by == "argument" else None)
    with traced("ask") as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    assert span.requests[0].wait(10.0) == promptlayer.request_logs[0]["id"]
    assert pltrace.flush(10.0)
    assert list(tmp_path.rglob("*.db*")) == []


@pytest.mark.parametrize("place", ["memory", "off"])
def test_asked_of_what_is_delivered(promptlayer: PromptLayerServer, deliver: Callable[..., None], place: str) -> None:
    """Without a file too, what is asked of a request that has been delivered arrives, whoever asks it."""
    deliver(store=place)
    with traced("ask", on_request=lambda request: request.score(90, "told")) as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    assert pltrace.flush(10.0)
    (request,) = span.requests
    assert request.wait(10.0) == promptlayer.request_logs[0]["id"]
    request.score(80, "handle")
    assert pltrace.flush(10.0)
    span.score(70, "block")
    assert pltrace.flush(10.0)
    assert [(it["name"], it["score"]) for it in promptlayer.operations] == [("told", 90), ("handle", 80), ("block", 70)]


# Through the death of processes.


def test_killed_right_after(tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]) -> None:
    """What a killed process had recorded is delivered by the next process that opens the store, each span once."""
    path = tmp_path / "store" / "traces.db"
    promptlayer.stop()
    process = start(
        RECORDS + "pltrace.configure(store=sys.argv[1])\nrecord('span', 250)\nwait()", tmp_path, path,
        PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url,
    )  # fmt: skip
    ready(process)
    soon(lambda: path.exists() and len(stored(path)) == 250)
    process.kill()
    ended(process)
    assert set(deliveries(path).values()) == {"pending"}
    promptlayer.start()
    deliver(store=path)
    assert pltrace.flush(20.0)
    assert sorted(span["name"] for span in promptlayer.spans.values()) == [f"span-{n:04}" for n in range(250)]
    assert len(ids(promptlayer)) == 250
    assert set(deliveries(path).values()) == {"delivered"}


def test_killed_while_sending(tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]) -> None:
    """What a process sent when it was killed is asked for first: no call is logged twice, and the ids are found."""
    path = tmp_path / "store" / "traces.db"
    promptlayer.faults.append(on("/spans-bulk", STORE_THEN_HANG, 1))
    process = start(
        RECORDS
        + """
from langchain_core.language_models.fake_chat_models import FakeListChatModel
model = FakeListChatModel(responses=["Hello."])
with traced("ask") as span:
    for _ in range(5):
        model.invoke("Hi!")
span.score(70)
wait()
""",
        tmp_path, PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=path,
    )  # fmt: skip
    ready(process)
    promptlayer.wait_for(lambda: len(promptlayer.request_logs) == 5)
    process.kill()
    ended(process)
    promptlayer.release()
    deliver(store=path)
    record("of the next process")
    assert pltrace.flush(30.0)
    assert promptlayer.duplicate_request_logs == 0
    assert len(promptlayer.request_logs) == 5
    assert len(ids(promptlayer)) == 7
    kept = rows(path, "SELECT request_id FROM requests ORDER BY request_id")
    assert [row["request_id"] for row in kept] == sorted(log["id"] for log in promptlayer.request_logs)
    assert sorted(op["request_id"] for op in promptlayer.operations) == [row["request_id"] for row in kept]


def test_another_process_is_alive(tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]) -> None:
    """What a living process is about to send is its own: nobody else takes it over."""
    path = tmp_path / "store" / "traces.db"
    promptlayer.stop()
    process = start(
        RECORDS + "record('theirs', 3)\nwait()", tmp_path,
        PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=path,
    )  # fmt: skip
    ready(process)
    soon(lambda: path.exists() and len(stored(path)) == 3)
    os.kill(process.pid, signal.SIGSTOP)
    promptlayer.start()
    deliver(store=path)
    record("ours")
    assert pltrace.flush(20.0)
    assert [span["name"] for span in promptlayer.spans.values()] == ["ours"]
    os.kill(process.pid, signal.SIGCONT)
    promptlayer.wait_for(lambda: len(promptlayer.spans) == 4, 20.0)
    ended(process)
    assert len(ids(promptlayer)) == 4


def test_many_processes_share_a_file(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """Processes that record into one file at the same time lose nothing, and no span is sent twice."""
    path = tmp_path / "store" / "traces.db"
    processes = [
        start(
            RECORDS + "wait()\nrecord(sys.argv[1], 300)\nprint(pltrace.flush(30.0))", tmp_path, f"process-{number}",
            PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=path,
        )
        for number in range(3)
    ]  # fmt: skip
    for process in processes:
        ready(process)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [(end.code, end.out, end.err) for end in map(ended, processes)] == [(0, "True\n", "")] * 3
    names = sorted(f"process-{process}-{number:04}" for process in range(3) for number in range(300))
    assert sorted(stored(path)) == names
    assert sorted(span["name"] for span in promptlayer.spans.values()) == names
    assert len(ids(promptlayer)) == 900
    assert set(deliveries(path).values()) == {"delivered"}


def test_many_processes_make_the_file(tmp_path: Path) -> None:
    """Processes that start at the same moment, with no file yet, all record into the one that one of them makes."""
    path = tmp_path / "store" / "traces.db"
    source = RECORDS + "wait()\npltrace.configure(store=sys.argv[1])\nrecord(sys.argv[2], 10)"
    processes = [start(source, tmp_path, path, f"process-{number}") for number in range(8)]
    for process in processes:
        ready(process)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [(end.code, end.err) for end in map(ended, processes)] == [(0, "")] * 8
    assert sorted(stored(path)) == sorted(f"process-{n}-{m:04}" for n in range(8) for m in range(10))


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]) -> None:
    """A process killed at any moment loses at most what is younger than a moment, and nothing is sent twice."""
    path = tmp_path / "store" / "traces.db"
    told: set[str] = set()
    for round_ in range(12):
        process = start(
            RECORDS
            + """
import time
for number in range(100000):
    with traced(f"{sys.argv[1]}-{number:06}"):
        pass
    if number == 20:
        print("ready", flush=True)
    if number % 50 == 0:
        print(number, time.time_ns(), flush=True)
        time.sleep(0.001)
""",
            tmp_path, f"round-{round_}",
            PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=path,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        ready(process)
        time.sleep(0.05 * round_)
        process.kill()
        killed_at = time.time_ns()
        lines = [line.split() for line in process.communicate()[0].splitlines() if line.count(" ") == 1]
        # Half a second is generous on a busy machine; the promise is 10 ms.
        old = [int(number) for number, at in lines if len(at) == 19 and killed_at - int(at) > 500_000_000]
        told.update(f"round-{round_}-{number:06}" for number in range(max(old, default=-1) + 1))
    assert told <= set(stored(path))
    assert rows(path, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    deliver(store=path)
    assert pltrace.flush(90.0)
    assert len(promptlayer.spans) == len(stored(path))


def test_a_backlog_makes_nothing_slower() -> None:
    """What a batch costs SQLite doesn't grow with what waits: recording would have to wait for it."""

    def steps(waiting: int) -> int:
        """Counts in hundreds what SQLite does for one batch."""
        store = Store(None, ["promptlayer"], local_ids=False)
        for first in range(0, waiting, 500):
            store.write(Rows(_a_row(number) for number in range(first, first + 500)))
        counted = 0

        def count() -> int:
            nonlocal counted
            counted += 1
            return 0

        with store.database.reading() as connection:
            connection.set_progress_handler(count, 100)
        batch = store.outbox.claim("promptlayer", 100, 10**9)
        store.outbox.sending("promptlayer", batch)
        store.outbox.delivered("promptlayer", batch, {})
        assert store.outbox.is_pending("promptlayer", 10**9)
        assert store.outbox.newest("promptlayer", batch[-1].seq) is not None
        assert not store.outbox.due_operations(1)
        assert not store.outbox.hopeless_operations(1)
        store.write(Rows([_a_row(waiting)]))
        store.lease.adopt()
        store.close()
        return counted

    assert steps(4_000) <= 1.5 * steps(500)


def test_a_flush_takes_over_until_its_time(
    tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]
) -> None:
    """A flush that has no time leaves most of a large backlog of an earlier process to the worker, and says so."""
    path = tmp_path / "store" / "traces.db"
    promptlayer.stop()
    deliver(store=path)
    record("first")
    soon(lambda: rows(path, "SELECT owner FROM owners"))
    (owner,) = rows(path, "SELECT owner FROM owners")[0].values()
    before = Store(path, ["promptlayer"], local_ids=False, account=owner.partition("@")[2])
    before.write(Rows(), [_a_score(number) for number in range(20_000)])
    before.lease.leave()
    before.close()
    assert not pltrace.flush(0.0)
    taken_over = rows(path, "SELECT count(*) AS number FROM operations WHERE owner = ?", owner)[0]["number"]
    assert 0 < taken_over < 20_000
    promptlayer.start()


@pytest.mark.parametrize("seed", range(5))
def test_each_span_has_its_state(seed: int) -> None:
    """Whatever becomes of spans of several processes, in any order, the store knows of each what became of it."""
    chance = random.Random(seed)
    first = Store(None, ["promptlayer"], local_ids=False)
    stores = [first, *(Store(first.database, ["promptlayer"], local_ids=False) for _ in range(2))]
    expected: dict[int, tuple[int, str, int]] = {}
    on_their_way: dict[str, list[ReadSpan]] = {}
    for _ in range(300):
        store = chance.choice(stores)
        owner, outbox = store.lease.owner, store.outbox
        batch = on_their_way.pop(owner, None)
        if batch is None and chance.random() < 0.5:
            new = range(len(expected) + 1, len(expected) + 1 + chance.randrange(1, 8))
            store.write(Rows(_a_row(number) for number in new))
            expected.update(dict.fromkeys(new, (0, owner, 0)))
        elif batch is None:
            batch = outbox.claim("promptlayer", chance.randrange(1, 12), 10**9)
            oldest = [seq for seq, (state, by, _) in expected.items() if (state, by) == (0, owner)]
            assert [span.seq for span in batch] == oldest[: len(batch)]
            on_their_way[owner] = batch = chance.sample(batch, chance.randrange(len(batch) + 1))
            outbox.sending("promptlayer", batch)
            expected.update(dict.fromkeys([span.seq for span in batch], (0, owner, 1)))
        elif chance.random() < 0.5:
            outbox.delivered("promptlayer", batch, {})
            expected.update(dict.fromkeys([span.seq for span in batch], (1, "", 0)))
        elif chance.random() < 0.5:
            surely = chance.random() < 0.5
            outbox.not_taken("promptlayer", batch, "is down", surely=surely)
            expected.update({span.seq: (0, owner, int(span.uncertain or not surely)) for span in batch})
        else:
            outbox.quarantine("promptlayer", {span.seq: f"because of {span.seq}" for span in batch})
            expected.update(dict.fromkeys([span.seq for span in batch], (2, "", 0)))
        with first.database.reading() as connection:
            kept = connection.execute("SELECT seq, state, owner, uncertain FROM deliveries").fetchall()
        assert {row[0]: tuple(row[1:]) for row in kept} == expected
    assert {state for state, _, _ in expected.values()} == {0, 1, 2}
    first.close()


@pytest.mark.parametrize("what", ["delivered", "quarantined"])
def test_what_others_took_over_counts_once(what: str) -> None:
    """What became of spans counts once, also when who lost them to others, as it was stopped, learns of it later."""

    def end(store: Store, batch: list[ReadSpan]) -> None:
        if what == "delivered":
            store.outbox.delivered("promptlayer", batch, {})
        else:
            store.outbox.quarantine("promptlayer", {span.seq: "refused" for span in batch})

    first = Store(None, ["promptlayer"], local_ids=False)
    second = Store(first.database, ["promptlayer"], local_ids=False)
    first.write(Rows(_a_row(number) for number in range(10)))
    batch = first.outbox.claim("promptlayer", 10, 10**9)
    first.outbox.sending("promptlayer", batch)
    first.lease.leave()
    second.lease.adopt()
    end(second, second.outbox.claim("promptlayer", 6, 10**9))
    end(first, batch)
    end(second, second.outbox.claim("promptlayer", 10, 10**9))
    with first.database.reading() as connection:
        counted = dict(map(tuple, connection.execute("SELECT reason, count FROM counters")))
    assert counted[what] == 10
    first.close()


def test_read_or_remembered(tmp_path: Path) -> None:
    """What is sent of a span is to the byte the same, whether it is sent by who recorded it or by a later process."""
    exporter = PromptLayerExporter("pl_key", "http://127.0.0.1:9")
    sent = []
    with pltrace.testing.capture_spans() as spans, traced("around", tags=["a"], metadata={"n": 1, "ä": [None]}):
        FakeListChatModel(responses=['It\'s "so".']).invoke("Be\nbrief.")
        with pytest.raises(ZeroDivisionError), traced("fails"):
            raise ZeroDivisionError("no")
    written = Rows(row_of(span, Encoder(), "service") for span in spans)
    store = Store(tmp_path / "traces.db", ["promptlayer"], local_ids=False)
    store.write(written)
    sent.append(exporter.body(store.outbox.claim("promptlayer", 100, 10**9)))
    store.outbox.forget(range(10))
    sent.append(exporter.body(store.outbox.claim("promptlayer", 100, 10**9)))
    store.close()
    assert sent[0].count(b'"parent_id"') == 3
    assert sent[0] == sent[1]


def test_numbers_begin_anew_in_a_new_file(tmp_path: Path) -> None:
    """After the file was deleted spans are numbered from 1, by whoever comes first, and all of them are pending."""
    first, second = (Store(tmp_path / "traces.db", ["somewhere"]) for _ in range(2))
    for number in range(3):
        first.write(Rows([_a_row(number)]))
    for part in tmp_path.glob("traces.db*"):
        part.unlink()
    first.write(Rows([_a_row(3)]))
    second.write(Rows([_a_row(4)]))
    second.write(Rows([_a_row(5)]))
    found = rows(tmp_path / "traces.db", "SELECT first, last, state FROM delivery_ranges ORDER BY first")
    assert [(row["first"], row["last"], row["state"]) for row in found] == [(1, 1, 0), (2, 3, 0)]
    first.close()
    second.close()


def test_what_is_remembered_is_what_is_stored() -> None:
    """A span that is updated before it is sent, or whose number another got in its place, is sent as it is stored."""
    store = Store(None, ["promptlayer"], local_ids=False)
    store.write(Rows([_a_row(1)]))
    store.write(Rows([_a_row(1)._replace(name="renamed")]))
    with pytest.raises(TypeError):
        store.write(Rows([_a_row(2)]), [], {"cannot": object()})  # type: ignore[dict-item]
    store.write(Rows([_a_row(3)]))
    batch = store.outbox.claim("promptlayer", 100, 10**9)
    assert [(span.seq, span.record["name"]) for span in batch] == [(1, "renamed"), (2, "span-003")]
    store.close()


def test_processes_take_turns(tmp_path: Path) -> None:
    """Whoever writes to a shared file, alone for a while or in turns with others, each span is there for its owner."""
    one, other = (Store(tmp_path / "traces.db", ["promptlayer"], local_ids=False) for _ in range(2))
    numbers = iter(range(1, 100))
    for store, count in (
        (one, 1),
        (one, 2),
        (other, 3),
        (one, 1),
        (one, 4),
        (one, 2),
        (other, 1),
        (one, 1),
        (other, 5),
    ):
        store.write(Rows(_a_row(next(numbers)) for _ in range(count)), [], {"recorded": count})
    waiting = [store.outbox.claim("promptlayer", 100, 10**9) for store in (one, other)]
    assert [[span.seq for span in spans] for spans in waiting] == [
        [1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 15], [4, 5, 6, 14, 16, 17, 18, 19, 20],
    ]  # fmt: skip
    assert all(span.record["name"] == f"span-{span.seq:03}" for spans in waiting for span in spans)
    with one.database.reading() as connection:
        assert tuple(connection.execute("SELECT * FROM counters").fetchone()) == ("recorded", 20)
    one.close()
    other.close()


def test_a_store_from_before_the_first_release(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file of a version that was never released is renamed, which a warning says, and a new one begun."""
    path = tmp_path / "traces.db"
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1")
    store = Store(path)
    store.write(Rows([_a_row(1)]))
    store.close()
    assert stored(path) == ["span-001"]
    assert "before the first release" in caplog.text
    assert len(list(tmp_path.glob("traces.db.corrupt-*"))) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="SQLite's limits can't be set")
def test_a_batch_larger_than_sqlite_takes() -> None:
    """Spans that together are more than SQLite takes for one value, a billion bytes, are delivered one by one."""
    store = Store(None, ["promptlayer"])
    store.write(Rows(_a_row(number) for number in range(30)))
    store.outbox.forget(range(31))  # As another process would read them.
    with store.database.reading() as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    assert [span.record["name"] for span in store.outbox.claim("promptlayer", 100, 10**9)] == ["span-000"]
    store.close()


# Retention.


def test_old_spans_go(tmp_path: Path, promptlayer: PromptLayerServer, deliver: Callable[..., None]) -> None:
    """After a month what was delivered is pruned; what wasn't stays, as does what is in quarantine."""
    path = tmp_path / "store" / "traces.db"
    promptlayer.poison(lambda name: name == "poison")
    deliver(store=path)
    record("delivered", "poison")
    assert pltrace.flush(20.0)
    promptlayer.stop()
    record("undelivered")
    assert not pltrace.flush()
    pltrace.shutdown(0.0)
    with closing(sqlite3.connect(path)) as connection:
        ago = "- 31 * 86400 * 1000000000"
        connection.execute(f"UPDATE spans SET started_at_ns = started_at_ns {ago}, ended_at_ns = ended_at_ns {ago}")
        connection.commit()
    deliver(store=path)
    record("new")
    soon(lambda: "delivered" not in stored(path))
    assert stored(path) == ["poison", "undelivered", "new"]
    promptlayer.start()


def test_size_is_bounded(tmp_path: Path) -> None:
    """Beyond the most bytes the oldest delivered spans go, and never one that is still to be delivered."""
    store = Store(tmp_path / "traces.db", ["promptlayer"])
    store.write(Rows(_a_row(number) for number in range(400)))
    batch = store.outbox.claim("promptlayer", 300, 10**9)
    store.outbox.delivered("promptlayer", batch, {})
    size = (tmp_path / "traces.db").stat().st_size + (tmp_path / "traces.db-wal").stat().st_size
    assert store.retention.prune(0, 2 * size) == 0
    assert store.retention.left > size / 2
    assert store.retention.prune(0, size) == 0
    assert 0 <= store.retention.left < size / 2
    assert store.retention.prune(0, size // 2) > 0
    left = stored(tmp_path / "traces.db")
    assert len(left) < 400
    assert left[-100:] == [f"span-{number:03}" for number in range(300, 400)]
    while store.retention.prune(0, 1):
        pass
    assert stored(tmp_path / "traces.db") == [f"span-{number:03}" for number in range(300, 400)]
    store.close()


def test_nothing_may_go(tmp_path: Path) -> None:
    """Where there is too much and all of it is still to be delivered, pruning only reads, and knows it."""
    store = Store(tmp_path / "traces.db", ["promptlayer"])
    store.write(Rows(_a_row(number) for number in range(1_000)))
    with closing(sqlite3.connect(tmp_path / "traces.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert store.retention.prune(0, 1) == 0  # It doesn't wait for the other to write.
        assert store.retention.is_through
        assert store.retention.is_stuck
        other.execute("ROLLBACK")
    store.outbox.delivered("promptlayer", store.outbox.claim("promptlayer", 500, 10**9), {})
    while store.retention.prune(0, 1):
        assert not store.retention.is_stuck
    assert stored(tmp_path / "traces.db") == [f"span-{number:03}" for number in range(500, 1_000)]
    assert store.retention.prune(0, 1) == 0
    assert store.retention.is_stuck
    assert store.retention.prune(0, 2**30) == 0
    assert not store.retention.is_stuck
    store.close()


def test_memory_is_bounded() -> None:
    """In memory alone, beyond the most bytes the oldest spans are given up, also undelivered ones, and counted."""
    store = Store(None, ["promptlayer"])
    store.write(Rows(_a_row(number) for number in range(1_000)))
    assert store.retention.drop(2**30) == 0
    assert store.retention.prune(0, 2**21) == 0
    dropped = 0
    while now := store.retention.drop(2**21):
        dropped += now
    assert 0 < dropped < 1_000
    left = [span.record["name"] for span in store.outbox.claim("promptlayer", 1_000, 10**9)]
    assert left == [f"span-{number:03}" for number in range(dropped, 1_000)]
    store.close()


def test_operations_on_what_is_not_there_are_bounded() -> None:
    """What was asked of requests that the store never had is refused, and the oldest of it goes by itself."""
    store = Store(None, ["promptlayer"], local_ids=False)
    store.write(Rows([_a_row(0)]), [_a_score(number) for number in range(10_101)])
    store.outbox.is_missing = lambda span_id: True
    soon(lambda: store.outbox.hopeless_operations(1))
    for number, _, span_id, reason in store.outbox.hopeless_operations(1):
        assert reason == f"span {span_id} isn't in the store"
        store.outbox.operated(number, reason)
    with store.database.reading() as connection:
        left = [row[0] for row in connection.execute("SELECT id FROM operations ORDER BY id")]
    assert left == [1, *range(102, 10_102)]
    store.close()


def _a_score(number: int) -> Asked:
    row = _a_row(number)
    return Asked("score", row.trace_id, row.span_id, '{"score": 1, "score_name": null}', False)


def _a_row(number: int) -> Row:
    alike = {"user": None, "session": None, "service": "", "tags": [], "metadata": {}}
    return Row(
        f"{number + 1:016x}", f"{number + 1:032x}", None, f"span-{number:03}", "block", "ok", 10**18, 10**18 + 1,
        None, None, "\n".join(map(json.dumps, (alike, {}, [], None, "x" * 5000))),
    )  # fmt: skip


@pytest.mark.parametrize("place", ["file", "memory"])
def test_a_finalizer_that_is_collected_with_it(tmp_path: Path, place: str) -> None:
    """What is collected together with a store, and records at its end, finds it usable."""
    found: list[int] = []

    class Last:
        def __init__(self, store: Store) -> None:
            self.store = store
            self.itself = self

        def __del__(self) -> None:
            self.store.write(Rows([_a_row(1)]))
            found.append(len(self.store.trace(_a_row(1).trace_id)))

    Last(Store(tmp_path / "traces.db" if place == "file" else None))
    gc.collect()
    assert found == [1]
