"""Processes end in every way that there is, with LLM calls under way: what is recorded is kept, and nobody waits."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.faults.support import PRELUDE, Measured, all_delivered, balance, deliver_rest
from tests.support.http_double import HANG, slow
from tests.support.programs import run
from tests.support.promptlayer_server import PromptLayerServer

#: Ends of a program that has made 20 calls: source, exit code, and how many spans more there are at least and at most.
_ENDS = {
    "return": ("", 0, 0),
    "sys.exit": ("sys.exit(3)", 3, 0),
    "exception": ("raise ValueError('the program failed')", 1, 0),
    "os._exit": ("time.sleep(0.5); os._exit(4)", 4, 0),
    "os.abort": ("time.sleep(0.5); os.abort()", -signal.SIGABRT, 0),
    "SIGTERM": ("time.sleep(0.5); os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", -signal.SIGTERM, 0),
    "calls in atexit": ("import atexit; atexit.register(timed, ask, 5, start=100)", 0, 10),
    "calls in an atexit that came first": ("timed(ask, 5, start=100)", 0, 20),
    "another thread": ("threading.Thread(target=lambda: (time.sleep(0.3), timed(ask, 5, start=100))).start()", 0, 10),
    "futures still running": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "pool = ThreadPoolExecutor(2)\n"
        "for number in range(5): pool.submit(lambda number: (time.sleep(0.1), ask(number)), 100 + number)",
        0,
        10,
    ),
    "asyncio.run": (
        "import asyncio\n"
        "async def main():\n"
        "    with traced('around'): await asyncio.gather(*(model().ainvoke('Hi!') for _ in range(5)))\n"
        "asyncio.run(main())",
        0,
        6,
    ),
    "loop closed early": (
        "import asyncio\n"
        "async def main():\n"
        "    with traced('around'):\n"
        "        await model().ainvoke('Hi!')\n"
        "        await asyncio.sleep(30)\n"
        "loop = asyncio.new_event_loop()\n"
        "task = loop.create_task(main())\n"
        "loop.call_later(0.3, loop.stop)\n"
        "loop.run_forever()\n"
        "task.cancel()\n"
        "loop.run_until_complete(asyncio.gather(task, return_exceptions=True))\n"
        "loop.close()",
        0,
        2,
    ),
    "sys.exit in a thread's finalizer": (
        "class Leaves:\n"
        "    def __del__(self):\n"
        "        ask(100)\n"
        "kept = threading.local(); kept.it = Leaves(); del kept",
        0,
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", _ENDS)
def test_ends(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, end: str
) -> None:
    """However a program ends, its exit code is its own, and all its calls arrive, at the latest with the next."""
    source, code, more = _ENDS[end]
    first = ""
    if end == "calls in an atexit that came first":
        # Registered before ours, so called after it.
        first = "import atexit\natexit.register(lambda: timed(ask, 5, start=200))\n"
    program = run(first + PRELUDE + "warm()\ntimed(ask, 20)\n" + source, tmp_path, **settings)
    assert program.code == code, program.err
    assert "pltrace" not in program.err.replace(str(tmp_path), ""), program.err
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 40 + more)


@pytest.mark.parametrize("keeps", ["memory", "off"])
def test_memory_ends_with_the_process(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], keeps: str
) -> None:
    """What is kept in memory alone and can't be delivered by the end of the process is told, with its number."""
    delivered = run(PRELUDE + "timed(span, 10)", tmp_path, **settings | {"PLTRACE_STORE": keeps})
    assert (delivered.code, delivered.err) == (0, "")
    promptlayer.stop()
    program = run(PRELUDE + "timed(span, 10)", tmp_path, **settings | {"PLTRACE_STORE": keeps})
    promptlayer.start()
    assert program.code == 0
    assert "ends with 10 spans in memory" in program.err


ENDS_IN_TIME = (
    PRELUDE
    + "warm()\ntimed(ask, int(sys.argv[1]))\n"
    + "time.sleep(float(sys.argv[2]))\nprint(time.monotonic(), flush=True)"
)

#: What PromptLayer does, how long the program goes on after its calls, and the budget in seconds.
_BACKENDS = {
    "healthy": (0.0, 0.3),
    "slow": (0.0, 2.3),
    "refused": (0.0, 0.3),
    "refused for long": (2.0, 0.3),
    "hangs": (0.0, 2.3),
    "hangs for long": (2.0, 2.3),
}


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", _BACKENDS)
def test_exit_delay(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    backend: str,
) -> None:
    """The end of a program takes hardly longer than without us, and never more than the two seconds of its budget."""
    goes_on_s, budget_s = _BACKENDS[backend]
    if backend.startswith("refused"):
        promptlayer.stop()
    promptlayer.fault = HANG if backend.startswith("hangs") else slow(0.2) if backend == "slow" else None

    def exit_s(**more: object) -> float:
        program = run(ENDS_IN_TIME, tmp_path, 100, goes_on_s, **settings, **more)
        gone_at = time.monotonic()
        assert program.code == 0
        return gone_at - float(program.out)

    rounds = 2
    untraced = min(exit_s(PLTRACE_ENABLED=0) for _ in range(rounds))
    took = [exit_s() - untraced for _ in range(rounds)]
    assert min(took) < budget_s + 6.0
    balance(store, 200 * rounds)
    measured(f"exit over an untraced one, best of {rounds} (promised {budget_s})", min(took), "s")
    measured(f"exit over an untraced one, worst of {rounds}", max(took), "s")
