"""What is measured in a process of its own: calls of what is switched off, and memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.plan import WORKLOADS
from tests.benchmarks.timing import Samples, in_turns, made, new_loop
from tests.benchmarks.tracers import Nobody, Pltrace, Tracer
from tests.benchmarks.volume import rss_mb
from tests.benchmarks.workloads import make

__all__ = ["memory", "switched_off"]

#: Calls of what is off are short: more of them make a batch.
_WORKLOAD = replace(next(workload for workload in WORKLOADS if workload.name == "decorated call"), calls=100)


class _Off(Tracer):
    """A tracer that is switched off: its decorator is all that is left of it."""

    def __init__(self, name: str, decorator: Callable[..., Any]) -> None:
        self.name = name
        self._decorator = decorator

    def decorate(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which would be traced."""
        decorated: Callable[..., Any] = self._decorator(function)
        return decorated


def switched_off(name: str, sink: str, folder: Path, rounds: int) -> Iterator[tuple[str, dict[str, Samples]]]:
    """Call a decorated function while the tracer is off, in turns with the bare one; say also what it is off by."""
    loop = new_loop()
    for how, off in _off(name, sink, folder):
        yield how, in_turns(_WORKLOAD, [Nobody(sink, folder), off], rounds, loop)
    loop.close()


def _off(name: str, sink: str, folder: Path) -> Iterator[tuple[str, Tracer]]:
    if name != Pltrace.name:
        how, off = peers.OFF[name]
        yield how, _Off(name, off(sink))
        return
    import pltrace

    yield "never switched on", _Off("pltrace, never on", pltrace.traced)
    tracer = Pltrace(sink, folder)
    call: Any = make(_WORKLOAD.name, None, tracer)
    with tracer.on():
        call()
    tracer.stop()
    yield "configure(enabled=False), after it was on", _Off(name, pltrace.traced)


def memory(tracer: Tracer, calls: int) -> dict[str, float]:
    """Return what the process takes with a tracer at work, after one LLM call, and what many more add to it."""
    run = made(tracer, "LLM call")
    found = []
    for count in (1, calls):
        with tracer.on():
            for _ in range(count):
                run()
        tracer.settle()
        gc.collect()
        found.append(rss_mb())
    return {"calls": calls, "set_up_mb": found[0], "grown_mb": found[1] - found[0]}
