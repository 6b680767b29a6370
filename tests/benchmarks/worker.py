"""Measures one tracer beside nobody and the no-op handler, in a process of its own; prints JSON lines.

`python -m tests.benchmarks.worker TRACER SINK FOLDER SECTIONS SCALE`, by a Python that has the tracer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks import timing
from tests.benchmarks.plan import CALLS_AT_ONCE, WORKLOADS
from tests.benchmarks.prototype import Prototype
from tests.benchmarks.timing import Samples
from tests.benchmarks.tracers import Nobody, Noop, Pltrace, Tracer

Result = dict[str, Any]
#: Of pltrace, beside the handler that does nothing, and the prototype.
_MORE_ROUNDS = 5


def _tracer(name: str, sink: str, folder: Path) -> Tracer:
    if name == Pltrace.name:
        return Pltrace(sink, folder)
    from tests.benchmarks import peers

    return peers.PEERS[name](sink, folder)


def _versions(name: str) -> Result:
    """Return the versions of a tracer's distributions, also where it can't be imported."""
    from tests.benchmarks import peers

    of_it = ("pltrace",) if name == Pltrace.name else peers.PEERS[name].packages
    found = {}
    for package in (*(package.partition("[")[0] for package in of_it), "langchain-core"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {"section": "versions", "packages": found}


def _results(section: str, samples: Mapping[str, Samples], workload: str = "") -> Iterator[Result]:
    for tracer, sample in samples.items():
        yield {"section": section, "workload": workload, "tracer": tracer, **vars(sample)}


def _calls(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    loop = timing.new_loop()
    rounds = _rounds(tracers, 30, scale)
    for usual in WORKLOADS:
        # Fewer rounds first; smaller batches only where next to nothing is asked for.
        workload = replace(usual, calls=_times(usual.calls, min(1.0, 10 * scale)))
        yield from _results("calls", timing.in_turns(workload, tracers, rounds, loop), workload.name)
    loop.close()


def _paced(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    yield from _results("paced", timing.paced(tracers, _times(5, scale), _times(100, scale)))


def _threads(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    yield from _results("threads", timing.in_threads(tracers, _times(10, scale), _times(30, scale)))


def _total(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    yield from _results("total", timing.total_cpu(tracers, _rounds(tracers, 10, scale), _times(300, scale)))


def _volume(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    from tests.benchmarks import volume

    tracer = tracers[-1]
    if not isinstance(tracer, Pltrace):
        return
    kinds = {
        "decorated call": (CALLS_AT_ONCE, 100_000),
        "LLM call": (1, 5_000),
        "chain of 5 runs": (1, 4_000),
    }
    for name, (at_once, spans) in kinds.items():
        spans = _times(spans // at_once, scale) * at_once
        each = 5 if name.startswith("chain") else at_once
        for deliver in (False, True):
            rate = volume.throughput(tracer, name, each, spans // (5 if deliver else 1) // each * each, deliver=deliver)
            yield {"section": "throughput", "workload": name, "to": "a server" if deliver else "disk", "rate": rate}
        yield {
            "section": "bytes",
            "workload": name,
            "bytes": volume.stored_bytes(tracer, name, at_once, _times(1_000 // at_once, scale) * at_once),
        }
    yield from _flatness(tracer, "decorated call", _times(1_000, scale) * CALLS_AT_ONCE * 2, deliver=False)


def _million(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    if isinstance(tracers[-1], Pltrace):
        yield from _flatness(tracers[-1], "decorated call", _times(1_000_000, scale), deliver=False)


def _million_llm(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    if isinstance(tracers[-1], Pltrace):
        yield from _flatness(tracers[-1], "LLM call", _times(1_000_000, scale), deliver=True)


def _flatness(tracer: Pltrace, workload: str, spans: int, *, deliver: bool) -> Iterator[Result]:
    from tests.benchmarks import volume

    for part in volume.flatness(tracer, workload, spans, deliver=deliver):
        yield {"section": "flatness", "workload": workload, **part}


_MEASURES = {
    "calls": _calls, "paced": _paced, "threads": _threads, "total": _total, "volume": _volume,
    "million": _million, "million-llm": _million_llm,
}  # fmt: skip


def _rounds(tracers: list[Tracer], count: int, scale: float) -> int:
    """Return how many rounds are measured: others differ from the handler that does nothing by far more."""
    return _times(_MORE_ROUNDS * count if isinstance(tracers[-1], Pltrace) else count, scale)


def _times(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def main() -> None:
    """Measure what the command line asks for."""
    name, sink, folder, sections, scale = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What peers print is no result.
    logging.disable(logging.WARNING)  # Peers have much to say about a server that isn't theirs.
    where = Path(folder)
    print(json.dumps(_versions(name)), file=out, flush=True)
    tracers: list[Tracer] = [Nobody(sink, where), Noop(sink, where), _tracer(name, sink, where)]
    if name == Pltrace.name:
        tracers.insert(2, Prototype(sink, where))
    for section in sections.split(","):
        for result in _MEASURES[section](tracers, float(scale)):
            print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # The error is the last that is said: peers say more as the process ends, or keep it from that.
