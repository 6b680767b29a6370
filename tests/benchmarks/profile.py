"""Where pltrace's cost comes from: `python -m tests.benchmarks --sections profile --no-inert`.

`parts` measures pltrace with more and more of it at work, in turns; what each adds over the one before is its share.
`tails` looks at the slowest calls, made without a pause: at Python's garbage collections in them, and at the CPU that
other threads took meanwhile. `by_thread` says which threads the CPU of LLM calls is spent by, where there is /proc.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.plan import PARTS, WORKLOADS, Workload
from tests.benchmarks.timing import Samples, drawn, in_turns, made
from tests.benchmarks.tracers import Nobody, Noop, Pltrace, Tracer

__all__ = ["by_thread", "parts", "tails"]

_PARTS_OF = (
    "LLM call", "chain of 5 runs", "agent of 61 runs", "async chain of 5 runs", "decorated call", "with block",
)  # fmt: skip
_TAILS_OF = ("LLM call", "chain of 5 runs", "stream of 200 chunks", "async LLM call", "async chain of 5 runs")


class _Part(Tracer):
    """A part of pltrace at work.

    Args:
        name: As in the tables.
        whole: pltrace, whose settings are changed for it.
        record: What takes an ended span in place of the recorder's queue; None: all goes its usual way.
        deliver: Whether it is delivered.
    """

    def __init__(
        self, name: str, whole: Pltrace, record: Callable[[Any], None] | None = None, *, deliver: bool = False
    ) -> None:
        super().__init__(whole.sink, whole.folder)
        self.name, self.block = name, whole.block
        self._whole, self._record, self._deliver = whole, record, deliver

    @contextmanager
    def on(self) -> Iterator[None]:
        """Have just this part at work inside a block."""
        from pltrace import _runtime

        self._whole.store = self.folder / ("delivered.db" if self._deliver else "stored.db")
        self._whole.start(deliver=self._deliver)  # Nothing, where it is so already.
        tracing = _runtime.active()
        assert tracing is not None
        recorder: Any = tracing.recorder
        if self._record is None:
            with self._whole.on():
                pass  # The threads are there before anything is timed.
            self.settle()
        else:
            # In place of the method, which puts it where the writer finds it: no way that pltrace has or needs.
            recorder.record = self._record
        try:
            with self._whole.on():
                yield
        finally:
            vars(recorder).pop("record", None)

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, traced."""
        return self._whole.decorate(function)

    def settle(self) -> None:
        """Wait until all is stored and delivered, and let go of what is kept."""
        self._whole.settle()
        if isinstance(kept := getattr(self._record, "__self__", None), list):
            kept.clear()


def parts(sink: str, folder: Path, rounds: int, batch: float, loop: Any) -> Iterator[tuple[str, dict[str, Samples]]]:
    """Measure workloads with nobody, the no-op handler, and more and more of pltrace at work."""
    whole = Pltrace(sink, folder)
    kept: list[Any] = []
    dropped, in_list, stored, delivered = PARTS
    tracers = [
        Nobody(sink, folder),
        Noop(sink, folder),
        _Part(dropped, whole, lambda span: None),
        _Part(in_list, whole, kept.append),
        _Part(stored, whole),
        _Part(delivered, whole, deliver=True),
    ]
    for workload in _scaled(_PARTS_OF, batch):
        yield workload.name, in_turns(workload, tracers, rounds, loop)
    whole.stop()


def _scaled(names: Sequence[str], batch: float) -> list[Workload]:
    return [replace(w, calls=max(1, round(w.calls * batch))) for w in WORKLOADS if w.name in names]


@dataclass
class _Call:
    """What was seen of one call: times in microseconds, and Python's collections in it."""

    wall: float = 0.0
    own: float = 0.0
    others: float = 0.0
    collections: list[tuple[int, float]] = field(default_factory=list)


class _Look:
    """Looks at calls, one by one: each is inside a block of it."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self._collections: list[tuple[int, float]] = []
        self._collecting = 0

    def __enter__(self) -> None:
        self._collections = []
        self._began = time.process_time_ns(), time.thread_time_ns(), time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        wall, own, process = time.perf_counter_ns(), time.thread_time_ns(), time.process_time_ns()
        process, own, wall = process - self._began[0], own - self._began[1], wall - self._began[2]
        self.calls.append(_Call(wall / 1e3, own / 1e3, max(0, process - own) / 1e3, self._collections))

    def collecting(self, phase: str, info: dict[str, int]) -> None:
        """Note a collection, whichever thread it is in: no other runs meanwhile."""
        if phase == "start":
            self._collecting = time.perf_counter_ns()
        else:
            self._collections.append((info["generation"], (time.perf_counter_ns() - self._collecting) / 1e3))


def tails(sink: str, folder: Path, rounds: int, batch: float, loop: Any) -> Iterator[dict[str, Any]]:
    """Say what was in the slowest hundredth of calls, and in all, with nobody, the no-op handler and pltrace."""
    tracers = [Nobody(sink, folder), Noop(sink, folder), Pltrace(sink, folder)]
    for workload in _scaled(_TAILS_OF, batch):
        looks = {tracer: _Look() for tracer in tracers}
        runs = {tracer: made(tracer, workload.name) for tracer in tracers}
        for number in range(rounds + 1):
            for tracer in drawn(tracers, number):
                look = looks[tracer] if number else _Look()  # The first round warms up.
                gc.callbacks.append(look.collecting)
                with tracer.on():
                    if workload.is_async:
                        loop.run_until_complete(_alook(look, runs[tracer], workload.calls))
                    else:
                        for _ in range(workload.calls):
                            with look:
                                runs[tracer]()
                gc.callbacks.remove(look.collecting)
                tracer.settle()
        for tracer, look in looks.items():
            calls = sorted(look.calls, key=lambda call: call.wall)
            slowest = calls[-max(1, len(calls) // 100) :]
            for which, some in (("all", calls), ("slowest 1 %", slowest)):
                yield {"workload": workload.name, "tracer": tracer.name, "which": which, **_seen(some)}
    tracers[-1].settle()


async def _alook(look: _Look, run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        with look:
            await run()


def _seen(calls: Sequence[_Call]) -> dict[str, Any]:
    """Return means of calls; of each generation, how many of them had it collected, and how long that took them."""
    generations = {}
    for generation in range(3):
        took = [sum(us for g, us in call.collections if g == generation) for call in calls]
        hit = [us for us in took if us]
        generations[generation] = (len(hit), statistics.fmean(hit) if hit else 0.0)
    means = {what: statistics.fmean(getattr(call, what) for call in calls) for what in ("wall", "own", "others")}
    walls = [call.wall for call in calls]
    return {"calls": len(calls), "least": min(walls), "most": max(walls), **means, "collected": generations}


def by_thread(sink: str, folder: Path, rounds: int, calls: int) -> Iterator[dict[str, Any]]:
    """Say how much CPU each thread takes for LLM calls, in microseconds of one, until the background has done its work.

    Of threads that ended meanwhile, and such as aren't Python's, it is `others`.
    """
    tracers = [Nobody(sink, folder), Noop(sink, folder), Pltrace(sink, folder)]
    if not _threads():
        return
    took: dict[Tracer, Counter[str]] = {tracer: Counter() for tracer in tracers}
    for number in range(rounds + 1):
        for tracer in drawn(tracers, number):
            run = made(tracer, "LLM call")
            before, began = _threads(), time.process_time_ns()
            with tracer.on():
                for _ in range(calls):
                    run()
            tracer.settle()
            whole, after = time.process_time_ns() - began, _threads()
            if number:
                named = Counter({name: ns - before[name] for name, ns in after.items()})
                took[tracer] += Counter(others=whole - named.total()) + named
    for tracer, threads in took.items():
        us = {name: ns / 1e3 / rounds / calls for name, ns in threads.items()}
        yield {"tracer": tracer.name, "threads": us}


def _threads() -> Counter[str]:
    """Return the nanoseconds of CPU of the threads of Python's that are alive, by name."""
    found: Counter[str] = Counter()
    for thread in threading.enumerate():
        try:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
        except OSError:
            continue  # It has ended, or there is no such thing here.
        found["caller" if thread is threading.main_thread() else thread.name] += int(text.split()[0])
    return found
