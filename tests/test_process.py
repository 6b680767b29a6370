"""However a process ends or multiplies, what it recorded is kept, delivered once, and nobody is kept waiting."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.http_double import HANG, Fault
from tests.support.programs import Ended, deliveries, ended, module, rows, run, start, stored
from tests.support.promptlayer_server import PromptLayerServer

RECORDS = """
import multiprocessing, os, signal, sys, threading, time
import pltrace
from pltrace import traced

@traced("call")
def call(number):
    return number

def record(count=20, name="call"):
    for number in range(count):
        with traced(f"{name}-{number:04}"):
            pass
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The file that programs record into."""
    return tmp_path / "store" / "traces.db"


@pytest.fixture
def settings(promptlayer: PromptLayerServer, store: Path) -> dict[str, object]:
    """Environment that switches tracing on in a program, with delivery to the test's PromptLayer."""
    return {
        "PROMPTLAYER_API_KEY": promptlayer.api_key,
        "PROMPTLAYER_BASE_URL": promptlayer.url,
        "PLTRACE_STORE": store,
        # Python 3.12 and newer warn of any fork of a process that has threads.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }


def arrived(server: PromptLayerServer) -> Counter[str]:
    """Counts by name how often each span was taken."""
    names = {span_id: span["name"] for span_id, span in server.spans.items()}
    return Counter(names[span_id] for post in server.posts if post.handled for span_id in post.span_ids)


def once(*prefixes: str, count: int = 20) -> Counter[str]:
    """Gives the names that `record` makes, each once."""
    return Counter(f"{prefix}-{number:04}" for prefix in prefixes for number in range(count))


# Ways to end.

_ENDS = {
    "return": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "exception": ("raise ValueError('the program failed')", 1, "the program failed"),
    # A shell has what it runs in the background ignore the signal, and children inherit that.
    "interrupt": (
        "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(30)",
        -signal.SIGINT,
        "KeyboardInterrupt",
    ),
    "SIGTERM handled": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)",
        7,
        "",
    ),
    "thread goes on": ("threading.Thread(target=lambda: (time.sleep(0.3), record(name='late'))).start()", 0, ""),
    "executor goes on": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.3), record(name='late')))",
        0,
        "",
    ),
    "atexit": ("import atexit; atexit.register(record, name='late')", 0, ""),
    "daemon goes on": (
        "threading.Thread(target=lambda: [record(1, 'daemon') for _ in iter(int, 1)], daemon=True).start()",
        0,
        "",
    ),
    "asyncio": ("import asyncio\nasync def main(): record(name='late')\nasyncio.run(main())", 0, ""),
}


@pytest.mark.parametrize("end", _ENDS)
def test_ends(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, end: str
) -> None:
    """At any ordinary end all that was recorded is delivered; exit code and stderr are what they are without us."""
    source, code, message = _ENDS[end]
    program = run(RECORDS + "record()\n" + source, tmp_path, **settings)
    assert (program.code, program.out) == (code, "")
    assert message in program.err
    assert "pltrace" not in program.err.replace("/pltrace-", "")
    assert message or not program.err
    late = "late" in source
    taken = arrived(promptlayer)
    for name in [name for name in taken if name.startswith("daemon")]:
        del taken[name]
    if not late:
        assert taken == once("call")
        return
    # What comes after the main thread's end is at least on disk; delivery had its time before.
    assert set(stored(store)) == set(once("call", "late"))
    assert taken == once("call") or taken == once("call", "late")


def test_begins_at_the_end(tmp_path: Path, settings: dict[str, object], store: Path) -> None:
    """What a function of `atexit` records is on disk, also where nothing was recorded before and it is the last one."""
    program = run("import atexit\natexit.register(lambda: record(name='late'))\n" + RECORDS, tmp_path, **settings)
    assert (program.code, program.err) == (0, "")
    assert Counter(stored(store)) == once("late")


def test_ends_with_a_finalizer(tmp_path: Path, store: Path) -> None:
    """What a finalizer records when the interpreter is already taken apart is on disk, and nothing is warned of."""
    program = run(
        RECORDS
        + "pltrace.configure(store=sys.argv[1])\n"
        + "class Late:\n    def __del__(self): call(1)\nkept = Late()",
        tmp_path,
        store,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    assert stored(store) == ["call"]


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("os._exit(5)", 5),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_ends_at_once(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, end: str, code: int
) -> None:
    """An end that lets nothing run any more costs nothing that is older than a moment."""
    program = run(RECORDS + f"record(200)\ntime.sleep(0.5)\n{end}", tmp_path, **settings)
    assert program.code == code
    assert Counter(stored(store)) == once("call", count=200)
    after = run("import pltrace\npltrace.configure()\nassert pltrace.flush(20)", tmp_path, **settings)
    assert (after.code, after.err) == (0, "")
    assert arrived(promptlayer) == once("call", count=200)


def test_ends_without_a_pause(tmp_path: Path, store: Path) -> None:
    """A program that records a thousand spans and returns at once loses none of them, with or without PromptLayer."""
    program = run(RECORDS + "pltrace.configure(store=sys.argv[1])\nrecord(1000)", tmp_path, store)
    assert (program.code, program.out, program.err) == (0, "", "")
    assert Counter(stored(store)) == once("call", count=1000)


def test_what_is_never_consumed_to_its_end(tmp_path: Path, store: Path) -> None:
    """A generator that a program keeps half-way, even to its end, and a coroutine in a thread, end with the process."""
    program = run(
        """
        import asyncio, sys, threading
        import pltrace
        from pltrace import traced

        pltrace.configure(store=sys.argv[1])
        started = threading.Event()

        @traced
        def pieces():
            yield 1

        @traced
        async def forever():
            started.set()
            await asyncio.Event().wait()

        threading.Thread(target=asyncio.run, args=[forever()], daemon=True).start()
        started.wait()
        kept, exhausted, untouched = pieces(), pieces(), pieces()
        next(kept), list(exhausted)
        """,
        tmp_path,
        store,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    ends = [(row["name"], row["status"]) for row in rows(store, "SELECT name, status FROM spans ORDER BY name")]
    assert ends == [("forever", "cancelled"), ("pieces", "ok"), ("pieces", "ok")]


MODELS = """
import multiprocessing, os, signal, sys, threading, time
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.outputs import GenerationChunk
from langchain_core.runnables import RunnableLambda
import pltrace
from pltrace import traced

for_ever = threading.Event()
started = threading.Semaphore(0)

def hang():
    started.release()
    for_ever.wait()

class Slow(FakeListChatModel):
    def _call(self, *args, **kwargs):
        hang()

    def _stream(self, *args, **kwargs):
        pieces = super()._stream(*args, **kwargs)
        yield next(pieces)
        hang()

class Completion(FakeListLLM):
    def _stream(self, *args, run_manager, **kwargs):
        for text in "Oh":
            piece = GenerationChunk(text=text)
            run_manager.on_llm_new_token(text, chunk=piece)
            yield piece
"""


_TEXT = re.compile(r'"text": "(.*?)"')


def test_what_is_open_at_the_end(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """What threads that nobody waits for are at when the process ends is recorded, once and with what had come."""
    program = run(
        MODELS
        + """
def call():
    with traced("outer"), traced("inner"):
        FakeListChatModel(responses=["first"]).invoke("Hi")
        RunnableLambda(Slow(responses=["late"]).invoke, name="chain").invoke("Hi")

def read(model):
    with traced("read"):
        pieces = model.stream("Hi")
        next(pieces), next(pieces)
        hang()

def wait():
    with traced("wait"):
        list(Slow(responses=["Yes"]).stream("Hi"))

@traced
def work():
    with traced("part"):
        FakeListChatModel(responses=["first"]).invoke("Hi")
    hang()

def begin(function, *args):
    threading.Thread(target=function, args=args, daemon=True).start()

with traced("left"):
    begin(pltrace.bind(work))
begin(call)
begin(wait)
begin(read, FakeListChatModel(responses=["No"], name="Chat"))
begin(read, Completion(responses=[]))
for _ in range(5):
    started.acquire()
traced("never left").__enter__()
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    spans = {span_id: (span["name"], span["parent_id"]) for span_id, span in promptlayer.spans.items()}
    statuses = {span_id: span["attributes"]["pltrace.status"] for span_id, span in promptlayer.spans.items()}
    assert sorted((spans.get(parent, ("",))[0], name, statuses[bits]) for bits, (name, parent) in spans.items()) == [
        ("", "left", "ok"),
        ("", "never left", "cancelled"),
        ("", "outer", "cancelled"),
        ("", "read", "cancelled"),
        ("", "read", "cancelled"),
        ("", "wait", "cancelled"),
        ("chain", "Slow", "cancelled"),
        ("inner", "FakeListChatModel", "ok"),
        ("inner", "chain", "cancelled"),
        ("left", "work", "cancelled"),
        ("outer", "inner", "cancelled"),
        ("part", "FakeListChatModel", "ok"),
        ("read", "Chat", "partial"),
        ("read", "Completion", "partial"),
        ("wait", "Slow", "partial"),
        ("work", "part", "ok"),
    ]
    logged = [log.get("error_message") or _TEXT.findall(json.dumps(log["output"])) for log in promptlayer.request_logs]
    assert sorted(map(str, logged)) == [
        "CancelledError: the process ended before it did", "['No']", "['O']", "['Y']", "['first']", "['first']",
    ]  # fmt: skip
    assert sum(len(post.span_ids) for post in promptlayer.posts) == len(spans)


@pytest.mark.parametrize("kept", ["atexit.register(stack.close)", "weakref.finalize(kept, stack.close)"])
def test_a_block_that_an_exit_function_leaves(
    tmp_path: Path, settings: dict[str, object], store: Path, kept: str
) -> None:
    """A block that is left by an exit function of before tracing was switched on ends as it does elsewhere."""
    program = run(
        f"""
import atexit, contextlib, weakref
stack, kept = contextlib.ExitStack(), type("Kept", (), {{}})()
{kept}
import pltrace
pltrace.configure()
stack.enter_context(pltrace.traced("session")).update(output="done")
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.err) == (0, "")
    assert [(row["name"], row["status"]) for row in rows(store, "SELECT name, status FROM spans")] == [
        ("session", "ok")
    ]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("how", ["terminated", "returns"])
def test_what_is_open_at_the_end_of_a_child(
    tmp_path: Path, settings: dict[str, object], store: Path, how: str, method: str
) -> None:
    """What a child of `multiprocessing` is at when it ends is recorded; what its parent is at, by the parent alone."""
    program = run(
        MODELS
        + """
@traced
def work():
    with traced("part"):
        FakeListChatModel(responses=["first"]).invoke("Hi")
        Slow(responses=["late"]).invoke("Hi")

def child(pipe, how):
    if how == "returns":
        threading.Thread(target=pltrace.bind(work), daemon=True).start()
    else:
        threading.Thread(target=lambda: (started.acquire(), pipe.send("started")), daemon=True).start()
        work()
    started.acquire()
    pipe.send("started")

if __name__ == "__main__":
    pltrace.configure()
    context = multiprocessing.get_context(sys.argv[2])
    with traced("parent"):
        stream = FakeListChatModel(responses=["Yes"]).stream("Hi")
        next(stream)
        ours, theirs = context.Pipe()
        process = context.Process(target=child, args=(theirs, sys.argv[1]), daemon=True)
        process.start()
        ours.recv()
        if sys.argv[1] == "terminated":
            process.terminate()
        process.join()
        list(stream)
    print(process.exitcode)
""",
        tmp_path,
        how,
        method,
        **settings,
    )
    assert (program.code, program.err) == (0, "")
    assert program.out.strip() == ("-15" if how == "terminated" else "0")
    found = rows(store, "SELECT name, status, span_id, parent_id FROM spans")
    names = {row["span_id"]: row["name"] for row in found}
    assert sorted((row["name"], row["status"], str(names.get(row["parent_id"]))) for row in found) == [
        ("FakeListChatModel", "ok", "parent"),
        ("FakeListChatModel", "ok", "part"),
        ("Slow", "cancelled", "part"),
        ("parent", "ok", "None"),
        ("part", "cancelled", "work"),
        ("work", "cancelled", "parent" if method == "fork" else "None"),
    ]


# How long the end takes.


def test_promptlayer_hangs(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A PromptLayer that doesn't answer holds the exit for two seconds, not longer, and nothing is lost."""
    promptlayer.fault = HANG
    program = run(RECORDS + "record()", tmp_path, **settings)
    assert (program.code, program.out, program.err) == (0, "", "")
    assert program.seconds < 9.0  # Less than the ten seconds that an answer is waited for.
    assert set(deliveries(store).values()) == {"pending"}


def test_promptlayer_refuses(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A PromptLayer that can't be reached doesn't hold the exit at all, and nothing is lost."""
    promptlayer.stop()
    source = RECORDS + "record()\nbegan = time.monotonic()\nimport atexit\n"
    # Registered before pltrace's, so called after it.
    first = "import atexit, time\natexit.register(lambda: print(time.monotonic() - began))\n"
    program = run(first + source, tmp_path, **settings)
    assert program.code == 0
    assert float(program.out) < 1.0
    assert set(deliveries(store).values()) == {"pending"}
    # One warning, on stderr because the program has set up no logging.
    assert program.err.count("\n") <= 1
    assert "Traceback" not in program.err


@pytest.mark.slow
def test_promptlayer_is_slow(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """With a big backlog and a slow PromptLayer the exit takes two seconds; later processes send the rest."""
    from tests.support.http_double import slow

    promptlayer.fault = slow(0.5)
    program = run(RECORDS + "record(2000)", tmp_path, **settings)
    assert program.code == 0
    assert program.seconds < 6.0
    promptlayer.fault = None
    promptlayer.wait_for(lambda: all(post.status for post in promptlayer.posts))  # It says what it has when it has it.
    assert len(promptlayer.spans) < 2000
    assert run("import pltrace\npltrace.configure()\nassert pltrace.flush(30)", tmp_path, **settings).code == 0
    assert arrived(promptlayer) == once("call", count=2000)


# Children.


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, method: str
) -> None:
    """What multiprocessing's children record is delivered, however they are started."""
    program = run(
        RECORDS
        + """
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    record(name="before")
    children = [context.Process(target=record, args=(20, f"child{number}")) for number in range(2)]
    for child in children:
        child.start()
    record(name="meanwhile")
    for child in children:
        child.join()
    print([child.exitcode for child in children])
""",
        tmp_path,
        method,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "[0, 0]\n", "")
    assert arrived(promptlayer) == once("before", "meanwhile", "child0", "child1")
    assert set(deliveries(store).values()) == {"delivered"}


def test_pool(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path) -> None:
    """What a pool's workers record is kept, also when the pool is terminated."""
    program = run(
        RECORDS
        + """
if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        assert pool.map(call, range(30)) == list(range(30))
        time.sleep(0.1)
    assert pltrace.flush(10)
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    assert stored(store) == ["call"] * 30
    after = run("import pltrace\npltrace.configure()\nassert pltrace.flush(20)", tmp_path, **settings)
    assert after.code == 0
    assert arrived(promptlayer) == Counter({"call": 30})


@pytest.mark.parametrize("end", ["sys.exit(4)", "time.sleep(1.0); os._exit(4)"])
def test_fork(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, end: str
) -> None:
    """A forked child delivers its own spans and none of its parent's, and so does the parent."""
    program = run(
        RECORDS
        + f"""
record(name="before")
with traced("around"):
    child = os.fork()
    if child == 0:
        record(name="child")
        {end}
record(name="parent")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert pltrace.flush(10)
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "4\n", "")
    assert arrived(promptlayer) == once("before", "child", "parent") + Counter(["around"])
    kept = rows(store, "SELECT name, trace_id FROM spans WHERE name = 'around' OR name LIKE 'child%'")
    assert len({row["trace_id"] for row in kept}) == 1


def test_fork_before_the_first_use(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """A server that decorates, forks its workers, and is traced only in them, loses nothing."""
    program = run(
        RECORDS
        + """
children = []
for number in range(3):
    child = os.fork()
    if child == 0:
        record(name=f"worker{number}")
        sys.exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "[0, 0, 0]\n", "")
    assert arrived(promptlayer) == once("worker0", "worker1", "worker2")


FORKS_WHILE_RECORDING = (
    RECORDS
    + """
forks, stop = int(sys.argv[1]), threading.Event()

def keep_recording(name):
    number = 0
    while not stop.is_set():
        with traced(f"{name}-{number:06}"):
            number += 1
        time.sleep(0.002)
    print(name, number)

pltrace.configure()
threads = [threading.Thread(target=keep_recording, args=(f"thread{number}",)) for number in range(3)]
for thread in threads:
    thread.start()
hung = 0
for number in range(forks):
    child = os.fork()
    if child == 0:
        record(2, f"child{number:03}")
        pltrace.flush(30)
        os._exit(0)
    deadline = time.monotonic() + 40
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            hung += 1
            break
        time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join()
assert pltrace.flush(60)
print("hung", hung)
"""
)


@pytest.mark.parametrize("forks", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_fork_while_recording(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, forks: int
) -> None:
    """Forks in the middle of recording and sending hang no child, lose nothing, and send nothing twice."""
    program = run(FORKS_WHILE_RECORDING, tmp_path, forks, timeout=110.0, **settings)
    assert (program.code, program.err) == (0, "")
    told = dict(line.split() for line in program.out.splitlines())
    assert told.pop("hung") == "0"
    expected = Counter(f"{name}-{number:06}" for name, count in told.items() for number in range(int(count)))
    expected += Counter(f"child{child:03}-{number:04}" for child in range(forks) for number in range(2))
    assert Counter(stored(store)) == expected
    assert arrived(promptlayer) == expected
    assert set(deliveries(store).values()) == {"delivered"}


@pytest.fixture
def other() -> Iterator[PromptLayerServer]:
    """Run the PromptLayer of another account."""
    with PromptLayerServer(api_key="pl_other_0123456789abcdef0123456789abcde") as server:
        yield server
        assert server.violations == []


CALLS = (
    RECORDS
    + """
from langchain_core.language_models.fake_chat_models import FakeListChatModel
with traced(sys.argv[1]) as span:
    FakeListChatModel(responses=["Hello."]).invoke("Hi!")
request = span.requests[0]
"""
)
#: Leaves a span with a score that were never sent, and a score of a request that has its id.
LEAVES = (
    CALLS
    + """
assert pltrace.flush()
print("delivered", flush=True)
sys.stdin.readline()
request.score(11, "known")
with traced("left") as span:
    FakeListChatModel(responses=["Hello."]).invoke("Hi!")
span.requests[0].score(12, "new")
assert not pltrace.flush()
"""
)


def _leave(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], other: PromptLayerServer
) -> dict[str, object]:
    """Have a program leave what `LEAVES` does; return the settings of one with the other account."""
    program = start(LEAVES, tmp_path, "first", **settings)
    assert program.stdout is not None
    assert program.stdout.readline() == "delivered\n"
    promptlayer.fault = Fault(status=503)
    assert program.communicate("go\n", timeout=30)
    assert program.returncode == 0
    promptlayer.fault = None
    return {**settings, "PROMPTLAYER_API_KEY": other.api_key, "PROMPTLAYER_BASE_URL": other.url}


def _names(server: PromptLayerServer) -> list[str]:
    return sorted(span["name"] for span in server.spans.values() if span["name"] != "FakeListChatModel")


def test_another_account(
    tmp_path: Path, promptlayer: PromptLayerServer, other: PromptLayerServer, settings: dict[str, object]
) -> None:
    """What a process leaves goes to no other account; who has another key says that it waits, once."""
    others = _leave(tmp_path, promptlayer, settings, other)
    program = run(CALLS + "assert pltrace.flush(); assert pltrace.flush()", tmp_path, "theirs", **others)
    assert program.code == 0
    assert program.err.count("2 spans in the store") == program.err.count("recorded with another API key") == 1
    assert (_names(other), other.operations) == (["theirs"], [])
    run(RECORDS + "assert pltrace.flush(); record(1)\nassert pltrace.flush()", tmp_path, **settings)
    assert _names(promptlayer) == ["call-0000", "first", "left"]
    # Of two requests, in any order: one that takes long keeps no other waiting.
    assert sorted(operation["name"] for operation in promptlayer.operations) == ["known", "new"]


def test_sync_to_another_account(
    tmp_path: Path, promptlayer: PromptLayerServer, other: PromptLayerServer, settings: dict[str, object]
) -> None:
    """`doctor` says what waits for another key; `sync` delivers it, but what it says of requests with an id there."""
    others = _leave(tmp_path, promptlayer, settings, other)
    assert "2 spans and 2 scores" in module("doctor", **others).out
    program = module("sync", **others)
    assert (program.code, program.err) == (0, "")
    assert "2 spans that were recorded with another key or address go to this key's account" in program.out
    assert "1 scores, metadata, links or groups are for requests of another key's account" in program.out
    assert _names(other) == ["left"]
    assert [operation["name"] for operation in other.operations] == ["new"]
    run("import pltrace\npltrace.configure()\nassert pltrace.flush()", tmp_path, **settings)
    assert [operation["name"] for operation in promptlayer.operations] == ["known"]


def test_another_key_of_the_same_process(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """What a process recorded under a key that is refused is delivered as soon as it is given another."""
    program = run(
        RECORDS + f"record()\nassert not pltrace.flush()\npltrace.configure(api_key={promptlayer.api_key!r})\n"
        "assert pltrace.flush()",
        tmp_path,
        **{**settings, "PROMPTLAYER_API_KEY": "pl_wrong"},
    )
    assert program.code == 0
    assert "recorded with another API key" not in program.err
    assert set(deliveries(store).values()) == {"delivered"}


def test_a_score_is_for_the_account_that_its_id_is_of(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]
) -> None:
    """What a process asked of a request by its id goes to no other account that it delivers to later: it waits."""
    program = run(
        "import pltrace\npltrace.track.score(4242, 50)\npltrace.flush(1)\n"
        f"pltrace.configure(api_key={promptlayer.api_key!r}, base_url={promptlayer.url!r})\n"
        "with pltrace.traced('theirs'): pass\nassert pltrace.flush()",
        tmp_path,
        **{**settings, "PROMPTLAYER_API_KEY": "pl_other", "PROMPTLAYER_BASE_URL": "http://127.0.0.1:9"},
    )
    assert program.code == 0
    assert (_names(promptlayer), promptlayer.operations) == (["theirs"], [])
    assert "0 spans and 1 scores" in module("doctor", **settings).out


@pytest.mark.parametrize("closes", [False, True], ids=["keeps its files", "closes its files"])
def test_daemon(tmp_path: Path, store: Path, settings: dict[str, object], closes: bool) -> None:
    """A child that outlives its parent keeps all it records, whoever else uses the store and leaves it meanwhile."""
    daemon = f"""
import subprocess
record(name="parent")
pltrace.flush()
if os.fork():
    os._exit(0)
os.setsid()
if {closes}:
    os.closerange(3, 256)
    for _ in range(20):
        os.open(os.devnull, os.O_RDWR)
time.sleep(0.2)
record(name="first")
pltrace.flush()
other = "import pltrace; pltrace.traced(lambda: 0)(); pltrace.shutdown()"
subprocess.run([sys.executable, "-c", other], check=True)
record(name="last")
assert pltrace.flush()
"""
    # Its output is read to the end: that of the child.
    program = run(
        RECORDS + daemon, tmp_path, PLTRACE_STORE=store, PLTRACE_ENABLED=1,
        PYTHONWARNINGS="ignore::DeprecationWarning",  # Python's own, about forks of a process with threads.
    )  # fmt: skip
    assert (program.code, program.err) == (0, "")
    names = Counter(name for name in stored(store) if "lambda" not in name)
    assert names == once("parent", "first", "last")


def test_subprocess_module(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """Programs started from a traced one, with code run between fork and exec, start as ever."""
    program = run(
        RECORDS
        + """
import subprocess
record()
print(subprocess.run(["echo", "hello"], preexec_fn=os.getpid, capture_output=True, text=True).stdout.strip())
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "hello\n", "")
    assert arrived(promptlayer) == once("call")


def test_prefork_server(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object]) -> None:
    """Workers of a preforking server, stopped by SIGTERM as such servers do it, lose nothing."""
    process = start(
        RECORDS
        + """
record(name="master")
children = []
for number in range(2):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        record(name=f"worker{number}")
        print("ready", flush=True)
        while True:
            time.sleep(0.05)
    children.append(child)
def stop(*_):
    for child in children:
        os.kill(child, signal.SIGTERM)
    print([os.waitpid(child, 0)[1] for child in children])
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(0.05)
""",
        tmp_path,
        **settings,
    )
    program = _terminated(process, 3)
    assert (program.code, program.out, program.err) == (0, "[0, 0]\n", "")
    assert arrived(promptlayer) == once("master", "worker0", "worker1")


def _terminated(process: subprocess.Popen[str], lines: int) -> Ended:
    assert process.stdout is not None
    for _ in range(lines):
        assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    return ended(process)


def test_threads_that_begin_together(tmp_path: Path, settings: dict[str, object], store: Path) -> None:
    """What threads record while the first of them switches tracing on is recorded too; the main one may have ended."""
    program = run(
        RECORDS
        + """
begin = threading.Barrier(8)
def work(number):
    begin.wait()
    record(1, f"thread{number}")
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads:
    thread.start()
""",
        tmp_path,
        **settings,
    )
    assert (program.code, program.err) == (0, "")
    assert Counter(stored(store)) == once(*[f"thread{number}" for number in range(8)], count=1)


def test_the_system_has_no_thread_left(tmp_path: Path, settings: dict[str, object], store: Path) -> None:
    """Where the system gives no thread at first, as at a container's limit, the writer starts when it does."""
    code = """
def writers():
    return [thread.name for thread in threading.enumerate() if thread.name == "pltrace-writer"]

threading.stack_size(1 << 46)
record(name="without")
assert not writers()
threading.stack_size(0)
deadline = time.monotonic() + 20
while not writers() and time.monotonic() < deadline:
    record(1, "again")
    time.sleep(0.05)
assert writers()
"""
    assert run(RECORDS + code, tmp_path, **settings).code == 0
    assert once("without") <= Counter(stored(store))


def test_only_the_first_process_is_python(tmp_path: Path, settings: dict[str, object], store: Path) -> None:
    """A program that replaces itself by another keeps what it had recorded."""
    program = run(
        RECORDS + f"record()\npltrace.flush(0)\nos.execv({sys.executable!r}, ['python', '-c', 'print(1)'])",
        tmp_path,
        **settings,
    )
    assert (program.code, program.out, program.err) == (0, "1\n", "")
    assert Counter(stored(store)) == once("call")


def test_a_program_that_starts_itself_anew(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """What a program has left as it replaced itself, in the same process, it delivers as any other would."""
    source = """
if len(sys.argv) == 1:
    record(name="before")
    pltrace.flush(0)
    os.execv(sys.executable, [sys.executable, *sys.argv, "again"])
print("ready", flush=True)
sys.stdin.readline()
record(name="after")
assert pltrace.flush(30)
"""
    promptlayer.fault = Fault(status=503)
    program = start(RECORDS + source, tmp_path, **settings)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    promptlayer.fault = None
    assert program.stdin is not None
    program.stdin.write("go\n")
    assert ended(program).code == 0
    assert arrived(promptlayer) == once("before", "after")
    assert set(deliveries(store).values()) == {"delivered"}


def test_a_fork_while_a_warning_is_logged(tmp_path: Path) -> None:
    """A fork waits until our threads have logged what they are at: its child inherits no lock of a stream's."""
    source = """
import logging, os, sys, threading
import pltrace
from pltrace import traced

class Slow(logging.Handler):
    def emit(self, record):
        with stream:
            writing.set()
            forks.wait(0.3)

stream, writing, forks = threading.Lock(), threading.Event(), threading.Event()
logging.getLogger("pltrace").addHandler(Slow())
pltrace.configure(store=sys.argv[1], api_key="pl_nobody", base_url="http://127.0.0.1:9")
with traced("block"):
    pass
assert writing.wait(20)  # That nobody is there is told by the thread that delivers.
child = os.fork()
if child == 0:
    os._exit(0 if stream.acquire(timeout=5) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    assert run(source, tmp_path, tmp_path / "traces.db").code == 0


def test_python_warns_of_nothing_at_the_end(tmp_path: Path) -> None:
    """Python's development mode finds no connection left open by stores that were replaced, shut, or for a test."""
    source = """
import gc, sys
import pltrace
from pltrace.testing import capture_spans

for number, store in enumerate(("memory", "memory", sys.argv[1])):
    pltrace.configure(store=store, service=str(number), enabled=True)
    with capture_spans(), pltrace.traced("block"):
        pass
    gc.collect(number)
"""
    done = run(source, tmp_path, tmp_path / "traces.db", PYTHONDEVMODE="1", PYTHONWARNINGS="error")
    assert (done.code, done.err) == (0, "")


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux",
    reason="to have such an interpreter takes Linux and a C compiler",
)
def test_a_subinterpreter_ends(tmp_path: Path) -> None:
    """An interpreter of several in a process, as mod_wsgi has them, is ended without an abort, and all is delivered."""
    inner = """
import sys
sys.path[:] = %r
import pltrace

class Exporter(pltrace.SpanExporter):
    name = "exporter"

    def export(self, batch):
        return pltrace.ExportResult("delivered")

    def shutdown(self):
        pass

pltrace.configure(store=%r, exporters=[Exporter()], enabled=True)
with pltrace.traced("block"):
    pass
"""
    source = f"""
import ctypes, sys
inner = {inner!r} % (sys.path, sys.argv[2])
assert ctypes.PyDLL(sys.argv[1]).run(inner.encode()) == 0
"""
    library, store = tmp_path / "subinterpreter.so", tmp_path / "traces.db"
    file = Path(__file__).parent / "support" / "subinterpreter.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(file)], check=True)
    done = run(source, tmp_path, library, store)
    assert (done.code, done.err) == (0, "")
    assert deliveries(store, "exporter") == {"block": "delivered"}
