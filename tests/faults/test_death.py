"""A process may be killed at any moment: what it recorded is on disk, and arrives once."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import pytest

from pltrace._backpressure import MOST_QUEUED
from tests.faults.support import PRELUDE, Measured, all_delivered, deliver_rest, taken, told
from tests.support.http_double import CLOSE, Fault, Request
from tests.support.programs import Ended, ended, rows, run, start, stored
from tests.support.promptlayer_server import PromptLayerServer

#: What was recorded so long before a kill has to be on disk. The promise is 10 ms, which is measured and printed; a
#: machine that does other things as well can stop a thread for longer.
LONG_AGO_S = 1.0

#: Kills processes that record, four at a time, each at its own moment, and notes when it did. Each of them has one to
#: four threads, which write down what they have recorded where a kill doesn't erase it.
KILLS = (
    PRELUDE
    + """
import random
waves, folder = int(sys.argv[1]), sys.argv[2]

def keep_recording(name, told):
    number = 0
    while True:
        with traced(f"{name}-{number:05}"):
            pass
        os.write(told, f"{name}-{number:05} {time.monotonic_ns()}\\n".encode())
        number += 1
        time.sleep(random.uniform(0, 0.01))

def die_recording(name):
    random.seed()
    told = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    threads = [
        threading.Thread(target=keep_recording, args=(f"{name}.{number}", told))
        for number in range(random.randint(1, 4))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

pltrace.configure()
span(0, "parent")
assert pltrace.flush(10)
killed = {}
for wave in range(waves):
    children = {}
    for number in range(4):
        name = f"{wave}.{number}"
        child = os.fork()
        if child == 0:
            die_recording(name)
            os._exit(1)
        children[child] = name
    for child, name in children.items():
        time.sleep(random.uniform(0, 0.15))
        killed[name] = time.monotonic_ns()
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
print(json.dumps(killed))
"""
)


@pytest.mark.parametrize(
    "waves", [4, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timed, pytest.mark.timeout(300)])]
)
def test_killed_at_random_moments(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    waves: int,
) -> None:
    """What was recorded a moment before a `kill -9` is on disk, and the next process delivers it, each span once.

    What a kill takes is the end of what each thread recorded, and nothing from the middle. The store's own counts are
    of just what is in it.
    """
    folder = tmp_path / "recorded"
    folder.mkdir()
    killed = told(run(KILLS, tmp_path, waves, folder, timeout=200.0, **settings))
    names = set(stored(store))
    recorded, lost, oldest = 0, 0, []
    for told_by in folder.iterdir():
        ages = [0.0]
        threads: defaultdict[str, list[bool]] = defaultdict(list)
        for line in told_by.read_text().splitlines():
            name, at = line.split()
            threads[name.partition("-")[0]].append(name in names)
            if name not in names:
                ages.append((killed[told_by.name] - int(at)) / 1e9)
        for kept in threads.values():
            assert kept == sorted(kept, reverse=True)
            recorded += len(kept)
        lost += len(ages) - 1
        oldest.append(max(ages))
    assert len(killed) == 4 * waves
    assert max(oldest) < LONG_AGO_S
    measured("kills", len(killed), "processes")
    measured("lost, of all that was recorded", lost, f"of {recorded} spans")
    measured("kills that took what was older than 10 ms", sum(age > 0.01 for age in oldest), f"of {len(killed)}")
    measured("oldest that a kill took, median of all kills", 1000 * median(oldest), "ms")
    measured("oldest that a kill took, worst of all kills", 1000 * max(oldest), "ms")
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, len(names))
    counted = {row["reason"]: row["count"] for row in rows(store, "SELECT reason, count FROM counters")}
    assert counted == {"recorded": len(names), "delivered": len(names)}


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.timeout(200)
def test_killed_while_more_comes_than_can_be_written(tmp_path: Path, store: Path, measured: Measured) -> None:
    """Of a program that records without a pause a `kill -9` takes a moment, not all that would have room in memory."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    source = """
told = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
pltrace.configure()
for number in range(10**9):
    span(number)
    if number % 10 == 0:
        os.write(told, f"{number}\\n".encode())
    if number == 40_000:
        print("going", flush=True)
"""
    waiting = []
    for number in range(5):
        process = start(PRELUDE + source, tmp_path, folder / str(number), PLTRACE_STORE=store)
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        threading.Event().wait(random.uniform(0.5, 1.0))
        process.kill()
        ended(process)
        recorded = int((folder / str(number)).read_text().splitlines()[-1]) + 1
        waiting.append(recorded - len(rows(store, "SELECT 1 FROM spans")))
        store.unlink()
    measured("a kill takes, in the median", median(waiting), "spans")
    assert median(waiting) < MOST_QUEUED * 0.95  # Of a quick machine: in 20 ms it encodes 2,500.


class _Killer:
    """Kills the process whose batch PromptLayer is about to answer, soon before or after the answer goes out."""

    def __init__(self) -> None:
        self.process = 0

    def __call__(self, request: Request) -> Fault | None:
        """Goes as a rule of the server's."""
        if self.process and request.path == "/spans-bulk":
            process, self.process = self.process, 0
            threading.Timer(random.uniform(0, 0.008), os.kill, (process, signal.SIGKILL)).start()
        return None


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_around_the_answer(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, measured: Measured
) -> None:
    """A process that dies between PromptLayer's answer and writing it down has nothing logged twice by the next."""
    killer = _Killer()
    promptlayer.faults.append(killer)
    source = PRELUDE + "warm()\nsys.stdin.readline()\ntimed(lambda n: ask(n, sys.argv[1]), 20)\ntime.sleep(60)"
    rounds = 15
    for number in range(rounds):
        process = start(source, tmp_path, f"round{number:02}", **settings)
        killer.process = process.pid
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        assert ended(process).code == -signal.SIGKILL
    uncertain = rows(store, "SELECT count(*) AS count FROM deliveries WHERE state = 0 AND uncertain = 1")
    measured("spans in doubt after the last kill", uncertain[0]["count"], "spans")
    # The batch may be of what the process before left, and come before this one has recorded all of its own.
    recorded = len(stored(store))
    assert recorded > 20 * rounds
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, recorded)
    assert set(taken(promptlayer).values()) == {1}


def test_killed_while_the_answer_is_cut(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """A process killed in the middle of retrying what got no answer leaves nothing that is sent twice."""
    promptlayer.fault = CLOSE
    process = start(PRELUDE + "warm()\ntimed(ask, 20)\ntime.sleep(60)", tmp_path, **settings)
    promptlayer.wait_for(lambda: len(promptlayer.requests) == 2, 30.0)
    process.kill()
    ended(process)
    promptlayer.fault = None
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 40)
    assert set(taken(promptlayer).values()) == {1}


def test_killed_while_taking_over(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """What a process left is taken over by another, and when that is killed too, by a third: each span arrives once."""
    promptlayer.stop()
    first = run(PRELUDE + "timed(span, 1000)\ntimed.report()", tmp_path, **settings)
    assert told(first)["calls"] == 1000
    promptlayer.start()
    killer = _Killer()
    promptlayer.faults.append(killer)
    for _ in range(3):
        process = start(PRELUDE + "pltrace.configure()\nsys.stdin.readline()\npltrace.flush(60)", tmp_path, **settings)
        killer.process = process.pid
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        _died(ended(process))
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 1000)
    assert set(taken(promptlayer).values()) == {1}
    owners = Counter(row["owner"] for row in rows(store, "SELECT owner FROM deliveries"))
    assert sum(owners.values()) == 1000


def _died(program: Ended) -> None:
    # The killer may come too late for a quick process.
    assert program.code in (-signal.SIGKILL, 0)
