"""What the fault tests share: programs that record, the balance of a store, and figures of the caller's path."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.language_models.fake_chat_models import FakeListChatModel

from pltrace import traced
from tests.support.programs import Ended, rows, run
from tests.support.promptlayer_server import PromptLayerServer

#: Notes a figure that was measured: what it is, the value, the unit. Printed at the end of the run.
Measured = Callable[[str, float, str], None]

#: Begins a program that records. It works with `Timed`, which measures every call on the caller's path.
PRELUDE = """
import gc, json, os, signal, sys, threading, time
import pltrace
from pltrace import traced

collected_ns = 0
collections = [0, 0, 0]

def _collects(phase, info):
    global collected_ns
    collected_ns += time.perf_counter_ns() if phase == "stop" else -time.perf_counter_ns()
    collections[info["generation"]] += phase == "stop"

gc.callbacks.append(_collects)

class Timed:
    '''Calls `work(number)` so many times, so many a second (0: without a pause), and keeps how long each took.

    Of the worst it keeps how long the thread was ready and had no processor, and how long Python's garbage collector
    was at work.
    '''

    def __init__(self):
        self.took_ns = []
        self.forget()

    def forget(self):
        self.took_ns.clear()
        self.worst_ns = (0, 0, 0)

    def __call__(self, work, count, rate=0, start=0):
        schedule = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        without_processor = lambda: int(os.pread(schedule, 100, 0).split()[1])
        began = time.monotonic()
        for number in range(start, start + count):
            if rate:
                time.sleep(max(0.0, began + (number - start) / rate - time.monotonic()))
            waited, collected = without_processor(), collected_ns
            before = time.perf_counter_ns()
            work(number)
            took = time.perf_counter_ns() - before
            self.took_ns.append(took)
            if took > self.worst_ns[0]:
                self.worst_ns = (took, without_processor() - waited, collected_ns - collected)
        os.close(schedule)

    def report(self, **more):
        took = sorted(self.took_ns)
        print(json.dumps({
            "calls": len(took),
            "p50_us": took[len(took) // 2] / 1e3,
            "p99_us": took[len(took) * 99 // 100] / 1e3,
            "worst_ms": took[-1] / 1e6,
            "worst_waited_ms": self.worst_ns[1] / 1e6,
            "worst_collected_ms": self.worst_ns[2] / 1e6,
            **more,
        }), flush=True)

timed = Timed()

def span(number, name="call"):
    with traced(f"{name}-{number:06}"):
        pass

def large(number, size=20_000):
    with traced(f"large-{number:06}") as span:
        span.update(output="x" * size)

def child_records(number, name="child"):
    '''Forks a child that records a call; returns whether that was stored and, where there is an exporter, delivered.'''
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        span(number, name)
        os._exit(0 if pltrace.flush(50) else 1)
    return os.waitpid(child, 0)[1] == 0

_model = None

def model():
    global _model
    if _model is None:
        from langchain_core.language_models.fake_chat_models import FakeListChatModel
        _model = FakeListChatModel(responses=["Hello."])
    return _model

def warm():
    '''Switches tracing on and imports LangChain, so that no timed call does.'''
    pltrace.configure()
    model().invoke("Hi!")

def ask(number, name="ask"):
    with traced(f"{name}-{number:06}"):
        model().invoke(f"Say hello, {number}!")

def rss_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024
"""


def ask(name: str = "ask", **arguments: Any) -> Any:
    """Makes one LLM call in a block and gives its request."""
    with traced(name, **arguments) as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    (request,) = span.requests
    return request


@dataclass(frozen=True)
class Balance:
    """What became of the spans that a store was given, for one exporter.

    `dropped` are those that it says it dropped, by the counts that every process leaves in it.
    """

    stored: int
    delivered: int
    pending: int
    quarantined: int
    dropped: int

    @property
    def explained(self) -> int:
        """The spans of which is known where they are."""
        return self.delivered + self.pending + self.quarantined + self.dropped


def balance(store: Path, recorded: int, exporter: str = "promptlayer") -> Balance:
    """Gives what became of the spans of a store, which is sound and explains all that were recorded.

    Args:
        store: The file.
        recorded: How many spans ended in the programs that recorded into it.
        exporter: Whom they are for.
    """
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    states = Counter(row["state"] for row in rows(store, "SELECT state FROM deliveries WHERE exporter = ?", exporter))
    (stored,) = rows(store, "SELECT count(*) AS count FROM spans")
    dropped = sum(row["count"] for row in rows(store, "SELECT * FROM counters WHERE reason LIKE 'dropped_%'"))
    found = Balance(stored["count"], states[1], states[0], states[2], dropped)
    assert found.explained == recorded, f"of {recorded} recorded spans {found.explained} are explained: {found}"
    return found


def taken(server: PromptLayerServer) -> Counter[str]:
    """Counts how often each span was taken, by its id."""
    return Counter(span_id for post in server.posts if post.handled for span_id in post.span_ids)


def all_delivered(server: PromptLayerServer, store: Path, recorded: int) -> Balance:
    """Checks that every recorded span was taken, each LLM call was logged once, and the store knows it."""
    found = balance(store, recorded)
    assert (found.delivered, found.pending, found.quarantined, found.dropped) == (recorded, 0, 0, 0), found
    assert len(server.spans) == recorded
    assert server.duplicate_request_logs == 0
    logs = Counter(log["span_id"] for log in server.request_logs)
    calls = rows(store, "SELECT span_id, request_id FROM spans LEFT JOIN requests USING (seq) WHERE kind = 'llm'")
    assert logs == Counter(row["span_id"] for row in calls)
    assert {log["id"] for log in server.request_logs} == {row["request_id"] for row in calls}
    return found


def told(program: Ended, code: int = 0) -> dict[str, Any]:
    """Gives what a program reported in its last line, which ended as it would without us."""
    assert program.code == code, program.err
    assert "Traceback" not in program.err, program.err
    report: dict[str, Any] = json.loads(program.out.splitlines()[-1])
    return report


def measure_worst(measured: Measured, *reports: dict[str, Any], what: str = "worst call") -> None:
    """Notes the worst call of some programs, and what of it is the machine's or Python's."""
    worst = max(reports, key=lambda report: float(report["worst_ms"]))
    measured(what, worst["worst_ms"], "ms")
    measured(f"{what}: ready, without a processor", worst["worst_waited_ms"], "ms")
    measured(f"{what}: in Python's garbage collector", worst["worst_collected_ms"], "ms")


def deliver_rest(folder: Path, **settings: object) -> Ended:
    """Has another process deliver what is left in the store."""
    program = run("import pltrace\npltrace.configure()\nassert pltrace.flush(60)", folder, timeout=90.0, **settings)
    assert program.code == 0, program.err
    return program
