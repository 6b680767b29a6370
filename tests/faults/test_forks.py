"""Processes fork in the middle of recording and sending: no child hangs, nothing is lost, nothing is sent twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.support import PRELUDE, Measured, all_delivered, balance, deliver_rest, taken, told
from tests.support.programs import rows, run
from tests.support.promptlayer_server import PromptLayerServer

#: A hang is told from none by this; the figures themselves are printed.
MOST_MS = 5000.0

#: Forks while threads record; each child records two spans and ends, one in four at once.
STORM = (
    PRELUDE
    + """
forks, threads, stop = int(sys.argv[1]), int(sys.argv[2]), threading.Event()
pltrace.configure()
recorded = [0] * threads

def keep_recording(number):
    while not stop.is_set():
        with traced(f"thread{number}-{recorded[number]:06}"):
            pass
        recorded[number] += 1
        time.sleep(0.02)

recording = [threading.Thread(target=keep_recording, args=(number,)) for number in range(threads)]
for thread in recording:
    thread.start()
took, hung = [], 0
for number in range(forks):
    began = time.perf_counter_ns()
    child = os.fork()
    if child == 0:
        span(number, "child-a")
        span(number, "child-b")
        if number % 4:
            sys.stdout = open(os.devnull, "w")
            os._exit(0 if pltrace.flush(60) else 1)
        time.sleep(1.0)
        os._exit(0)
    took.append((time.perf_counter_ns() - began) / 1e6)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hung += 1
            break
        time.sleep(0.001)
stop.set()
for thread in recording:
    thread.join()
took.sort()
print(json.dumps({
    "hung": hung, "recorded": sum(recorded) + 2 * forks,
    "p50": took[len(took) // 2], "worst": took[-1], "flushed": pltrace.flush(60),
}))
"""
)


@pytest.mark.parametrize(
    "forks", [8, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timed, pytest.mark.timeout(600)])]
)
def test_fork_storm(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    forks: int,
) -> None:
    """While eight threads record, a process forks again and again: none hangs, and each span arrives once."""
    report = told(run(STORM, tmp_path, forks, 8, timeout=280.0, **settings))
    assert (report["hung"], report["flushed"]) == (0, True)
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, report["recorded"])
    assert set(taken(promptlayer).values()) == {1}
    untraced = told(run(STORM, tmp_path, min(forks, 40), 8, timeout=280.0, **settings, PLTRACE_ENABLED=0))
    assert report["worst"] < MOST_MS
    for figure in ("p50", "worst"):
        measured(f"fork, {figure}", report[figure], "ms")
        measured(f"fork, {figure}, untraced", untraced[figure], "ms")


def test_fork_after_other_settings(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A process that changed its settings, and still has blocks open from before, forks as ever."""
    report = told(
        run(
            PRELUDE
            + """
elsewhere = sys.argv[1]
stop = threading.Event()
pltrace.configure(store=elsewhere)
opened = threading.Event()
def old(count=[0]):
    with traced("around"):
        opened.set()
        while not stop.is_set():
            span(count[0], "old")
            count[0] += 1
            time.sleep(0.001)
thread = threading.Thread(target=old)
thread.start()
opened.wait()
pltrace.configure()
for number in range(10):
    assert child_records(number)
stop.set()
thread.join()
assert pltrace.flush(60)
timed(span, 1)
assert pltrace.flush(60)
timed.report()
""",
            tmp_path,
            tmp_path / "elsewhere" / "traces.db",
            **settings,
        )
    )
    assert report["calls"] == 1
    children = rows(store, "SELECT name FROM spans WHERE name LIKE 'child%' ORDER BY name")
    assert [row["name"] for row in children] == [f"child-{number:06}" for number in range(10)]
    assert set(taken(promptlayer).values()) == {1}


def test_fork_while_the_log_is_moved(tmp_path: Path, store: Path) -> None:
    """A process that writes so much that SQLite's log is always being moved forks children that all work."""
    program = run(
        PRELUDE
        + """
pltrace.configure()
stop = threading.Event()
def keep_recording():
    number = 0
    while not stop.is_set():
        large(number, 50_000)
        number += 1
        time.sleep(0.0005)
    recorded.append(number)
recorded = []
thread = threading.Thread(target=keep_recording)
thread.start()
for number in range(40):
    assert child_records(number)
stop.set()
thread.join()
assert pltrace.flush(30)
print(json.dumps(recorded[0] + 40))
""",
        tmp_path,
        PLTRACE_STORE=store,
        PLTRACE_ENABLED=1,
        PYTHONWARNINGS="ignore::DeprecationWarning",
    )
    assert program.code == 0, program.err
    assert rows(store, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]
    assert len(rows(store, "SELECT seq FROM spans")) == json.loads(program.out)


def test_fork_of_a_fork(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A daemon that forks twice and forgets its parent, as daemons do, delivers what it records."""
    program = run(
        PRELUDE
        + """
span(0, "parent")
child = os.fork()
if child == 0:
    if os.fork() == 0:
        os.setsid()
        span(0, "daemon")
        os._exit(0 if pltrace.flush(30) else 1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert pltrace.flush(30)
""",
        tmp_path,
        **settings,
    )
    assert program.code == 0, program.err
    promptlayer.wait_for(lambda: len(promptlayer.spans) == 2, 30.0)


def test_fork_from_threads(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """Several threads that fork at the same time get children that all work, and go on themselves."""
    program = run(
        PRELUDE
        + """
pltrace.configure()
failed = []
def fork(name):
    for number in range(5):
        span(number, name)
        if not child_records(number, name + "-child"):
            failed.append(name)
threads = [threading.Thread(target=fork, args=(f"thread{number}",)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed
assert pltrace.flush(60)
""",
        tmp_path,
        **settings,
    )
    assert program.code == 0, program.err
    all_delivered(promptlayer, store, 40)
    assert set(taken(promptlayer).values()) == {1}


def test_signal_handlers(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, measured: Measured
) -> None:
    """A signal handler that records, flushes or forks in the middle of a flush neither hangs nor breaks it.

    Its spans are recorded, but for those that come while values are made into JSON, which are counted.
    """
    report = told(
        run(
            PRELUDE
            + """
calls, children = [0], []
def handle(number, frame):
    span(calls[0], "handler")
    calls[0] += 1
    pltrace.flush(0)
    if calls[0] % 10 == 0:
        child = os.fork()
        if child == 0:
            os._exit(0)
        children.append(child)
    signal.setitimer(signal.ITIMER_REAL, 0.005)
pltrace.configure()
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.005)
flushes = Timed()
ends = time.monotonic() + 3
number = 0
while time.monotonic() < ends:
    span(number)
    number += 1
    flushes(lambda _: pltrace.flush(1), 1)
signal.setitimer(signal.ITIMER_REAL, 0)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
assert pltrace.flush(30)
print(json.dumps({"recorded": number + calls[0], "handled": calls[0], "worst_ms": max(flushes.took_ns) / 1e6}))
""",
            tmp_path,
            **settings,
        )
    )
    assert report["handled"] > 10
    found = balance(store, report["recorded"])
    assert (found.pending, found.quarantined) == (0, 0)
    assert len(promptlayer.spans) == found.delivered > report["recorded"] - report["handled"]
    measured("spans of the handler that were counted", found.dropped, f"of {report['handled']}")
    measured("worst flush", report["worst_ms"], "ms")


POOL = """
if __name__ == "__main__":
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    context = multiprocessing.get_context(sys.argv[1])
    with traced("main"), ProcessPoolExecutor(3, mp_context=context) as pool:
        assert list(pool.map(pltrace.bind(work), range(60))) == list(range(60))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_process_pool(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, method: str
) -> None:
    """What a `ProcessPoolExecutor`'s workers record, however they are started, arrives inside the block around it."""
    source = PRELUDE + "def work(number):\n    ask(number)\n    return number\n" + POOL
    program = run(source, tmp_path, method, timeout=110.0, **settings)
    assert program.code == 0, program.err
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 121)
    assert len(rows(store, "SELECT DISTINCT trace_id FROM spans")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_children(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, method: str
) -> None:
    """Four children of `multiprocessing` that make 200 calls each and return deliver all of them."""
    source = (
        PRELUDE
        + """
def work(name):
    timed(lambda number: ask(number, name), 200)

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context(sys.argv[1])
    children = [context.Process(target=work, args=(f"child{number}",)) for number in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
"""
    )
    program = run(source, tmp_path, method, timeout=110.0, **settings)
    assert program.code == 0, program.err
    found = balance(store, 1600)
    assert found.delivered + found.pending == 1600
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 1600)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool_whose_block_is_left(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, method: str
) -> None:
    """Workers of a `Pool` that ends with its `with` block, by SIGTERM and at once, deliver all they recorded."""
    source = (
        PRELUDE
        + """
def work(number):
    ask(number)
    return number

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context(sys.argv[1])
    warm()  # What is forked has LangChain.
    for _ in range(2):
        with context.Pool(3) as pool:
            assert pool.map(work, range(20)) == list(range(20))
"""
    )
    program = run(source, tmp_path, method, timeout=110.0, **settings)
    assert (program.code, program.err) == (0, "")
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 80)


TERMINATED = (
    PRELUDE
    + """
def record_and_say(pipe):
    span(0)
    pipe.send(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

def stand_in_c(pipe):
    import ctypes
    record_and_say(pipe)
    while True:
        ctypes.CDLL(None).sleep(60)  # In C, and as deaf to signals as an extension that computes.

def stand(pipe):
    record_and_say(pipe)
    time.sleep(60)

def stand_with_a_handler(pipe):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    stand(pipe)

def stand_with_a_later_handler(pipe):
    record_and_say(pipe)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    time.sleep(60)

def fork_and_stand(pipe):
    span(0)
    child = os.fork()
    if child == 0:
        pipe.send(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        time.sleep(5)
        os._exit(1)
    time.sleep(0.1)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(60)

if __name__ == "__main__":
    import multiprocessing
    context = multiprocessing.get_context("fork")
    pltrace.configure()
    ours, theirs = context.Pipe()
    child = context.Process(target=globals()[sys.argv[1]], args=(theirs,), daemon=sys.argv[2] == "daemon")
    child.start()
    is_default = ours.recv()
    time.sleep(0.3)  # What is written a few milliseconds later is not what this is about.
    began = time.monotonic()
    child.terminate()
    child.join()
    print(json.dumps([is_default, child.exitcode, time.monotonic() - began < 5]))
"""
)


@pytest.mark.parametrize(
    ("work", "kind", "is_default", "code"),
    [
        ("stand", "daemon", False, -15),
        ("stand_in_c", "daemon", False, -15),
        ("stand", "usual", True, -15),
        ("stand_with_a_handler", "daemon", False, 7),
        ("stand_with_a_later_handler", "daemon", False, 7),
        ("fork_and_stand", "daemon", True, -15),
    ],
)
def test_terminated_child(tmp_path: Path, store: Path, work: str, kind: str, is_default: bool, code: int) -> None:
    """`terminate` ends a child as it would untraced: at once, whatever it is at, by the signal or its own handler."""
    program = run(TERMINATED, tmp_path, work, kind, PLTRACE_STORE=store, PYTHONWARNINGS="ignore")
    assert (program.code, program.err) == (0, "")
    assert json.loads(program.out) == [is_default, code, True]
    assert len(rows(store, "SELECT * FROM spans")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pool_whose_workers_record_in_threads(tmp_path: Path, store: Path, method: str) -> None:
    """Nothing is lost either where a worker's first span ends in another thread than its main one."""
    source = (
        PRELUDE
        + """
from concurrent.futures import ThreadPoolExecutor
@traced
def inside(number):
    return number

@traced
def work(number):
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(pltrace.bind(inside), number).result()

if __name__ == "__main__":
    import multiprocessing
    for _ in range(3):
        with multiprocessing.get_context(sys.argv[1]).Pool(3) as pool:
            assert pool.map(work, range(30)) == list(range(30))
"""
    )
    program = run(source, tmp_path, method, PLTRACE_ENABLED="1", PLTRACE_STORE=store, PYTHONWARNINGS="ignore")
    assert (program.code, program.err) == (0, "")
    assert len(rows(store, "SELECT * FROM spans")) == 180


@pytest.mark.parametrize("first", ["span(0)", "pltrace.configure()"])
@pytest.mark.parametrize("after_ms", [0, 5, 20, 50, 100])
def test_fork_while_tracing_is_switched_on(tmp_path: Path, store: Path, first: str, after_ms: int) -> None:
    """A child that is forked while another thread switches tracing on, by its first call or else, records as any."""
    source = (
        PRELUDE
        + f"""
first = threading.Thread(target=lambda: {first})
first.start()
time.sleep({after_ms} / 1000)
assert child_records(1)
first.join()
"""
    )
    program = run(source, tmp_path, PLTRACE_ENABLED="1", PLTRACE_STORE=store, PYTHONWARNINGS="ignore")
    assert (program.code, program.err) == (0, "")
    names = [row["name"] for row in rows(store, "SELECT name FROM spans")]
    assert names.count("child-000001") == 1


def test_processes_that_an_exporter_starts(tmp_path: Path, store: Path) -> None:
    """A process that a user's exporter or redactor starts takes signals as any other."""
    source = (
        PRELUDE
        + """
import subprocess

def starts():
    process = subprocess.Popen(["sleep", "60"])
    process.terminate()
    codes.append(process.wait(30))

class Exporter(pltrace.SpanExporter):
    name = "starts"

    def export(self, batch):
        starts()
        return pltrace.ExportResult("delivered")

    def shutdown(self):
        pass

def redact(key, value):
    starts()
    return value

codes = []
pltrace.configure(exporters=[Exporter()], redact=redact)
with traced("one") as span:
    span.update(output="text")
assert pltrace.flush(60)
assert len(codes) > 1 and set(codes) == {-signal.SIGTERM}, codes
"""
    )
    program = run(source, tmp_path, PLTRACE_STORE=store)
    assert (program.code, program.err) == (0, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_that_the_program_blocks(tmp_path: Path, store: Path, name: str) -> None:
    """A program that blocks a signal while it does something, and waits for it then, isn't ended by it before."""
    source = (
        PRELUDE
        + """
number = signal.Signals[sys.argv[1]]
span(0)
pltrace.flush(5)
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
os.kill(os.getpid(), number)
span(1)
print(signal.sigwait({number}).name)
"""
    )
    program = run(source, tmp_path, name, PLTRACE_ENABLED="1", PLTRACE_STORE=store)
    assert (program.code, program.out.strip(), program.err) == (0, name, "")
