"""Times runs: the caller's CPU and the wall, batch by batch, tracer by tracer in turns."""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tests.benchmarks.plan import Workload
from tests.benchmarks.tracers import Tracer
from tests.benchmarks.workloads import make

__all__ = ["Samples", "drawn", "in_threads", "in_turns", "made", "new_loop", "paced", "total_cpu", "yardstick"]

#: How many chains a second paced load makes.
PACE_HZ = 100
THREADS = 4
#: No batch takes longer, but for the first one: of a slow tracer fewer calls make one.
_MOST_S = 0.25


@dataclass
class Samples:
    """What was measured of one workload under one tracer, in microseconds of one operation.

    Attributes:
        cpu: The calling thread's CPU, a mean for each batch.
        wall: The wall time of each call, or of each group of decorated calls, as many in each round.
        yardstick: What the same piece of work took right before and after each batch, a mean of both.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)


Run = Callable[[], Any]


def in_turns(workload: Workload, tracers: Sequence[Tracer], rounds: int, loop: Any) -> dict[str, Samples]:
    """Run batches of a workload, one tracer after the other, round after round; the first round warms up."""
    runs: dict[Tracer, Run] = {}
    for tracer in tracers:
        config = None if tracer.callbacks is None else {"callbacks": tracer.callbacks}
        run = make(workload.name, config, tracer)
        if run is not None:
            runs[tracer] = run
    samples = {tracer.name: Samples() for tracer in runs}
    workloads = dict.fromkeys(runs, workload)
    for number in range(rounds + 1):
        for tracer in drawn(runs, number):
            run, batch = runs[tracer], workloads[tracer]
            before = yardstick()
            with tracer.on():
                cpu, walls = _abatch(run, batch, loop) if batch.is_async else _batch(run, batch)
            tracer.settle()
            if not number:
                most = int(_MOST_S * 1e6 / batch.at_once / statistics.median(walls))
                workloads[tracer] = replace(batch, calls=max(1, min(batch.calls, most)))
            else:
                samples[tracer.name].cpu.append(cpu)
                samples[tracer.name].wall += walls
                samples[tracer.name].yardstick.append((before + yardstick()) / 2)
    return samples


def drawn(tracers: Iterable[Tracer], number: int) -> list[Tracer]:
    """Return the tracers in an order that is drawn anew for each round.

    In a fixed one Python's garbage collector, which runs after so many objects, comes to run in the batches of one
    tracer again and again.
    """
    every = list(tracers)
    return random.Random(number).sample(every, len(every))


def yardstick() -> float:
    """Return the CPU, in microseconds, of a piece of work that is always the same: a machine's speed changes.

    Other people's machines share its processors: here the same work took 209 µs in one second, and 420 in another.
    """
    found = []
    for _ in range(5):
        began = time.thread_time_ns()
        json.loads(json.dumps([{"number": number, "text": str(number)} for number in range(200)]))
        found.append((time.thread_time_ns() - began) / 1e3)
    return statistics.median(found)


def _batch(run: Run, workload: Workload) -> tuple[float, list[float]]:
    calls, clock = workload.calls, time.perf_counter_ns
    walls = [0] * calls
    cpu = time.thread_time_ns()
    for number in range(calls):
        began = clock()
        run()
        walls[number] = clock() - began
    cpu = time.thread_time_ns() - cpu
    return _per_operation(cpu, walls, workload.at_once)


def _abatch(run: Run, workload: Workload, loop: Any) -> tuple[float, list[float]]:
    async def batch() -> tuple[float, list[float]]:
        calls, clock = workload.calls, time.perf_counter_ns
        walls = [0] * calls
        cpu = time.thread_time_ns()
        for number in range(calls):
            began = clock()
            await run()
            walls[number] = clock() - began
        cpu = time.thread_time_ns() - cpu
        return _per_operation(cpu, walls, workload.at_once)

    found: tuple[float, list[float]] = loop.run_until_complete(batch())
    return found


def _per_operation(cpu: int, walls: list[int], at_once: int) -> tuple[float, list[float]]:
    return cpu / 1e3 / len(walls) / at_once, [wall / 1e3 / at_once for wall in walls]


def paced(tracers: Sequence[Tracer], rounds: int, calls: int) -> dict[str, Samples]:
    """Run chains at a steady pace, as a service does, so that the background works beside each of them."""
    samples = {tracer.name: Samples() for tracer in tracers}
    runs = {tracer: _warm(tracer, "chain of 5 runs") for tracer in tracers}
    for number in range(rounds):
        for tracer in drawn(tracers, number):
            with tracer.on():
                samples[tracer.name].wall += _paced(runs[tracer], calls)
            tracer.settle()
    return samples


def _warm(tracer: Tracer, name: str) -> Run:
    """Return what runs a workload of LangChain's, once it has."""
    run = made(tracer, name)
    with tracer.on():
        run()
    tracer.settle()
    return run


def made(tracer: Tracer, name: str) -> Run:
    """Return what runs a workload of LangChain's once."""
    run = make(name, None if tracer.callbacks is None else {"callbacks": tracer.callbacks}, tracer)
    assert run is not None
    return run


def _paced(run: Run, calls: int) -> list[float]:
    walls = []
    due = time.perf_counter()
    for _ in range(calls):
        time.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter_ns()
        run()
        walls.append((time.perf_counter_ns() - began) / 1e3)
        due += 1 / PACE_HZ
    return walls


def in_threads(tracers: Sequence[Tracer], rounds: int, calls: int) -> dict[str, Samples]:
    """Run chains from several threads at once; CPU is that of the calling threads, a mean of them."""
    samples = {tracer.name: Samples() for tracer in tracers}
    runs = {tracer: _warm(tracer, "chain of 5 runs") for tracer in tracers}
    workload = Workload("", "", calls)
    for number in range(rounds):
        for tracer in drawn(tracers, number):
            done: list[tuple[float, list[float]]] = []

            def work(run: Run = runs[tracer], done: list[tuple[float, list[float]]] = done) -> None:
                done.append(_batch(run, workload))

            before = yardstick()
            with tracer.on():
                threads = [
                    threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(THREADS)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            tracer.settle()
            sample = samples[tracer.name]
            sample.cpu.append(statistics.fmean(cpu for cpu, _ in done))
            sample.wall += [wall for _, walls in done for wall in walls]
            sample.yardstick.append((before + yardstick()) / 2)
    return samples


def total_cpu(tracers: Sequence[Tracer], rounds: int, calls: int) -> dict[str, Samples]:
    """Return the CPU of the whole process for LLM calls, until the background has done its work."""
    samples = {tracer.name: Samples() for tracer in tracers}
    for number in range(rounds + 1):
        for tracer in drawn(tracers, number):
            run = made(tracer, "LLM call")
            tracer.settle()
            before = yardstick()
            began = time.process_time_ns()
            with tracer.on():
                for _ in range(calls):
                    run()
            tracer.settle()
            cpu = (time.process_time_ns() - began) / 1e3 / calls
            if number:  # The first warms up.
                samples[tracer.name].cpu.append(cpu)
                samples[tracer.name].yardstick.append((before + yardstick()) / 2)
    return samples


def new_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop that async workloads run on."""
    return asyncio.new_event_loop()
