"""Until the application opts in, pltrace does nothing that anyone could notice; when it does, all of it works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import run, stored

#: Uses `traced` in every way.
USES = """
import sys

@pltrace.traced
def function(): return 1

@pltrace.traced("named", tags=["a"], metadata={"k": 1}, user="u", session="s", capture="inputs", sample=1.0,
                on_request=print)
def named(a, b=2): return a + b

class Class:
    @pltrace.traced
    def method(self): return 3

    @pltrace.traced
    @classmethod
    def of_class(cls): return 4

    @staticmethod
    @pltrace.traced
    def static(): return 5

@pltrace.traced
def generator():
    yield 6
    yield 7

@pltrace.traced
async def coroutine(): return 8

@pltrace.traced
async def stream():
    yield 9

def finish(awaitable):
    try:
        awaitable.send(None)
    except StopIteration as end:
        return end.value

def use():
    instance = Class()
    with pltrace.traced("block") as span:
        span.update(metadata={"x": 1}, output=5)
        span.score(5)
        assert not span and span.id == "" and not pltrace.current_span()
        values = [function(), named(1), instance.method(), Class.of_class(), Class.static(), *generator()]
    values.append(finish(coroutine()))
    values.append(finish(stream().__anext__()))
    async def block():
        async with pltrace.traced():
            return 10
    values.append(finish(block()))
    assert values == [1, 3, 3, 4, 5, 6, 7, 8, 9, 10], values
    pltrace.inject({})
    assert pltrace.flush() and pltrace.shutdown()
"""

#: Notes what the import and the use of pltrace does to the process.
WATCHES = """
import json, os, sys, threading
events = []
def watch(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        # Importing reads modules.
        if not str(path).endswith((".py", ".pyc")):
            events.append([event, str(path)])
    elif event.startswith(("socket.", "sqlite3.", "subprocess.", "os.fork", "os.mkdir", "os.putenv", "signal.")):
        events.append([event, str(arguments)])
modules, descriptors = set(sys.modules), sorted(os.listdir("/proc/self/fd"))
sys.addaudithook(watch)
import pltrace
"""
REPORTS = """
seen = list(events)
print(json.dumps({
    "threads": [thread.name for thread in threading.enumerate()],
    "tasks": len(os.listdir("/proc/self/task")),
    "descriptors": len(os.listdir("/proc/self/fd")) - len(descriptors),
    "events": seen,
    "modules": sorted(set(sys.modules) - modules),
}))
"""
#: A library that is decorated in a thousand places, and used.
LIBRARY = (
    "".join(
        f"""
@pltrace.traced("place {number}", tags=["library"])
{"async " * (number % 4 == 3)}def place{number}(value):
    {"yield" if number % 4 == 2 else "return"} value
"""
        for number in range(1_000)
    )
    + """
for number in range(1_000):
    result = globals()[f"place{number}"](number)
    assert number == (list(result)[0] if number % 4 == 2 else finish(result) if number % 4 == 3 else result)
"""
)
HEAVY = ("langchain_core", "promptlayer", "opentelemetry", "sqlite3", "http.client", "requests", "httpx", "pydantic")
#: Newer versions of wrapt import it themselves.
HEAVY_BESIDE_WRAPT = ("asyncio", "socket", "ssl", "urllib.request", "logging.config")


@pytest.mark.parametrize(
    "uses", ["", USES + "use()\n", USES + LIBRARY], ids=["imported", "used", "a library with a thousand places"]
)
@pytest.mark.parametrize("environment", [{}, {"PLTRACE_ENABLED": 0, "PROMPTLAYER_API_KEY": "pl_key"}], ids=["", "off"])
def test_inert(tmp_path: Path, uses: str, environment: dict[str, object]) -> None:
    """Without an opt-in, importing and using it starts no thread, opens nothing, prints nothing, imports no giant."""
    program = run(WATCHES + uses + REPORTS, tmp_path, **environment)
    assert (program.code, program.err) == (0, "")
    told = json.loads(program.out)
    assert told["threads"] == ["MainThread"]
    assert told["tasks"] == 1
    assert told["descriptors"] == 0
    assert told["events"] == []
    assert [name for name in told["modules"] if name in HEAVY] == []
    of_wrapt = run("import json, sys, wrapt\nprint(json.dumps(sorted(sys.modules)))", tmp_path)
    beside_wrapt = set(told["modules"]) - set(json.loads(of_wrapt.out))
    assert [name for name in HEAVY_BESIDE_WRAPT if name in beside_wrapt] == []
    assert not (tmp_path / ".pltrace").exists()


def test_inert_beside_langchain(tmp_path: Path) -> None:
    """Without an opt-in, a program that uses LangChain inside traced blocks gets no handler of ours."""
    program = run(
        WATCHES
        + """
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.callbacks import CallbackManager
del events[:]
with pltrace.traced("block"):
    assert FakeListChatModel(responses=["x"]).invoke("Hi").content == "x"
    assert CallbackManager.configure().handlers == []
"""
        + REPORTS,
        tmp_path,
    )
    assert (program.code, program.err) == (0, "")
    told = json.loads(program.out)
    assert not [name for name in told["threads"] if "pltrace" in name]
    assert not [name for name in told["modules"] if name.startswith("promptlayer")]
    assert not (tmp_path / ".pltrace").exists()


def test_inert_where_all_that_modules_have_is_looked_at(tmp_path: Path) -> None:
    """freezegun, which looks for clocks in every module, doesn't make us load LangChain while time stands still."""
    program = run(
        """
import sys
import pltrace
from freezegun import freeze_time
with freeze_time("2012-01-14"):
    print("langchain_core" in sys.modules, "pltrace.track" in sys.modules)
import langchain_core
print("PromptLayerCallbackHandler" in dir(pltrace))
""",
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "False True\nTrue\n", "")


def test_a_library_changes_nothing_for_who_uses_it(tmp_path: Path) -> None:
    """Functions that a library decorated keep name, signature and identity as before, while nothing is on."""
    program = run(
        """
import inspect, pickle
import pltrace
def plain(a: int, *, b: str = "x") -> float:
    "What it does."
decorated = pltrace.traced(plain)
assert inspect.signature(decorated) == inspect.signature(plain)
assert (decorated.__name__, decorated.__doc__, decorated.__module__) == ("plain", "What it does.", "__main__")
assert inspect.isfunction(decorated) and inspect.unwrap(decorated) is plain
""",
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "", "")


def test_a_first_call_at_the_very_end(tmp_path: Path) -> None:
    """A process whose first traced call or block comes from a finalizer, as Python shuts down, prints nothing."""
    (tmp_path / "library.py").write_text(
        """
import pltrace
class Client:
    @pltrace.traced
    def close(self):
        with pltrace.traced("block"):
            print("closed")
    def __del__(self): self.close()
"""
    )
    for environment in ({}, {"PLTRACE_ENABLED": 1, "PLTRACE_STORE": tmp_path / "traces.db"}):
        program = run("import library\nlibrary.client = library.Client()", tmp_path, **environment)
        assert (program.code, program.out, program.err) == (0, "closed\n", "")
    assert not (tmp_path / "traces.db").exists()


# Switching on.


@pytest.mark.parametrize(
    "environment",
    [{"PLTRACE_ENABLED": 1}, {"PROMPTLAYER_API_KEY": "pl_key", "PROMPTLAYER_BASE_URL": "http://127.0.0.1:9"}],
    ids=["enabled", "key"],
)
def test_environment_alone(tmp_path: Path, environment: dict[str, object]) -> None:
    """`PLTRACE_ENABLED=1`, or a PromptLayer key, is enough to switch tracing on, with no line of code."""
    store = tmp_path / "traces.db"
    program = run(
        "import pltrace\n@pltrace.traced\ndef work(): pass\nwork()\nwith pltrace.traced('block'): pass",
        tmp_path, PLTRACE_STORE=store, **environment,
    )  # fmt: skip
    assert program.code == 0
    assert stored(store) == ["work", "block"]


@pytest.mark.parametrize(
    ("configure", "on"),
    [
        ("", False),
        ("pltrace.configure()", False),
        ("pltrace.configure(api_key='pl_key', store=sys.argv[1])", False),
        ("pltrace.configure(store=sys.argv[1], tags=['a'])", False),
        ("pltrace.configure(enabled=None, store=sys.argv[1])", False),
        ("pltrace.configure(enabled=True, store=sys.argv[1])", True),
    ],
)
def test_off_wins(tmp_path: Path, configure: str, on: bool) -> None:
    """`PLTRACE_ENABLED=0` keeps tracing off against a key and against any `configure` but `enabled=True`."""
    store = tmp_path / "traces.db"
    program = run(
        f"import sys, pltrace\n{configure}\nwith pltrace.traced('block') as span: print(bool(span))",
        tmp_path, store, PLTRACE_ENABLED=0, PLTRACE_STORE=store,
        **({} if on else {"PROMPTLAYER_API_KEY": "pl_key"}),
    )  # fmt: skip
    assert (program.code, program.out, program.err) == (0, f"{on}\n", "")
    assert store.exists() == on


def test_configure_can_switch_off(tmp_path: Path) -> None:
    """`configure(enabled=False)` wins over the environment that switches on."""
    store = tmp_path / "traces.db"
    program = run(
        "import pltrace\npltrace.configure(enabled=False)\nwith pltrace.traced('block') as span: print(bool(span))",
        tmp_path, PLTRACE_ENABLED=1, PLTRACE_STORE=store,
    )  # fmt: skip
    assert (program.code, program.out, program.err) == (0, "False\n", "")
    assert not store.exists()


def test_switched_on_later(tmp_path: Path) -> None:
    """Switching on reaches everything that was decorated, bound or even called before, and switching off too."""
    store = tmp_path / "traces.db"
    program = run(
        "import pltrace\n"
        + USES
        + """
instance = Class()
before = [function, lambda: named(1), instance.method, Class.of_class, Class.static, lambda: list(generator()),
          lambda: finish(coroutine())]
block = pltrace.traced("block")
for call in before:
    call()
with block: pass
pltrace.configure(store=sys.argv[1])
for call in before:
    call()
with block: pass
pltrace.shutdown()
for call in before:
    call()
with block as span: assert not span
pltrace.configure(store=sys.argv[1])
instance.method()
""",
        tmp_path,
        store,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    assert stored(store) == [
        "function", "named", "Class.method", "Class.of_class", "Class.static", "generator", "coroutine", "block",
        "Class.method",
    ]  # fmt: skip


def test_switched_on_inside_a_block(tmp_path: Path) -> None:
    """Switching on or off while blocks are open harms nobody."""
    store = tmp_path / "traces.db"
    program = run(
        """
import sys, pltrace
with pltrace.traced("entered while off") as outer:
    pltrace.configure(store=sys.argv[1])
    with pltrace.traced("on"):
        pass
    with pltrace.traced("left while off") as span:
        pltrace.shutdown()
        with pltrace.traced("off"):
            pass
assert not pltrace.current_span()
""",
        tmp_path,
        store,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    assert stored(store)[0] == "on"
    assert "off" not in stored(store)


# A mistake in the environment.

BAD = {
    "PLTRACE_ENABLED": ("yes", "0 or 1"),
    "PLTRACE_CAPTURE": ("some", "true, false, inputs or outputs"),
    "PLTRACE_SAMPLE": ("2", "a number from 0.0 to 1.0"),
    "PROMPTLAYER_BASE_URL": ("api.promptlayer.com", "http:// or https://"),
    "PLTRACE_STORE": ("/", "a file path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_environment_at_configure(tmp_path: Path, name: str) -> None:
    """A bad value in the environment raises at `configure`, with the variable, the value and what is allowed."""
    value, allowed = BAD[name]
    program = run(
        "import pltrace\ntry:\n    pltrace.configure()\nexcept pltrace.ConfigError as error:\n    print(error)",
        tmp_path, **{name: value},
    )  # fmt: skip
    assert (program.code, program.err) == (0, "")
    assert name in program.out
    assert repr(value) in program.out
    assert allowed in program.out


@pytest.mark.parametrize("name", BAD)
def test_bad_environment_alone(tmp_path: Path, name: str) -> None:
    """With no `configure`, a bad value in the environment leaves the program alone: one logged error, no tracing."""
    value, allowed = BAD[name]
    program = run(
        "import pltrace\n"
        "for _ in range(3):\n    with pltrace.traced('block') as span: print(bool(span))\n"
        "pltrace.traced(lambda: None)()",
        tmp_path,
        **{"PLTRACE_ENABLED": 1, name: value},
    )
    assert (program.code, program.out) == (0, "False\n" * 3)
    (line,) = program.err.splitlines()
    assert name in line
    assert repr(value) in line
    assert allowed in line


def test_logging_that_raises(tmp_path: Path) -> None:
    """Where the program's logging raises, what pltrace has to say is lost, and nothing else."""
    program = run(
        """
        import logging, pltrace
        class Fussy(logging.Filter):
            def filter(self, record): raise ValueError("not this")
        logging.getLogger("pltrace").addFilter(Fussy())
        with pltrace.traced("block") as span: print(bool(span))
        """,
        tmp_path,
        PLTRACE_ENABLED="yes",
    )
    assert (program.code, program.out, program.err) == (0, "False\n", "")


def test_the_benchmark() -> None:
    """`python -m tests.benchmarks.inert` prints what pltrace adds, beside what it may; here with too few rounds."""
    printed = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.inert", "--imports", "1", "--calls", "1"],
        cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    for line in ("import, over wrapt's own", "call of a function", "call of a method"):
        assert re.search(rf"^{line} +[+-]\d+\.\d (ms|ns)  of \d+", printed, re.MULTILINE), printed


@pytest.mark.parametrize(
    "first",
    [
        "langchain_core.callbacks.manager", "langchain_core.tracers.context", "langchain_core.runnables",
        "langchain_core.language_models", "langchain_core.callbacks",
    ],
)  # fmt: skip
def test_langchain_comes_later(tmp_path: Path, first: str) -> None:
    """Whichever part of LangChain is imported first after tracing is on, the import works and its runs are recorded."""
    program = run(
        f"""
        import pltrace
        pltrace.configure(store="memory")
        import {first}
        from langchain_core.language_models.fake_chat_models import FakeListChatModel
        with pltrace.traced() as span:
            FakeListChatModel(responses=["Hello."]).invoke("Hi!")
        print(span.usage.requests)
        """,
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "1\n", "")
