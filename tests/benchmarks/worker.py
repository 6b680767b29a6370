"""Measures one tracer, mostly beside nobody and the no-op handler, in a process of its own; prints JSON lines.

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

from tests.benchmarks import alone, peers, profile, timing
from tests.benchmarks.plan import ALONE, CALLS_AT_ONCE, WORKLOADS
from tests.benchmarks.prototype import Prototype
from tests.benchmarks.timing import Samples
from tests.benchmarks.tracers import Nobody, Noop, Pltrace, Tracer

Result = dict[str, Any]
#: Of pltrace, beside the handler that does nothing, and the prototype.
_MORE_ROUNDS = 6


_OWN: dict[str, type[Tracer]] = {tracer.name: tracer for tracer in (Nobody, Noop, Prototype, Pltrace)}


def _tracer(name: str, sink: str, folder: Path) -> Tracer:
    return (_OWN.get(name) or peers.PEERS[name])(sink, folder)


def _versions(name: str) -> Result:
    """Return the versions of a tracer's distributions, also where it can't be imported."""
    of_it = peers.PEERS[name].packages if name in peers.PEERS else ("pltrace",)
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
    rounds = _rounds(tracers, 24, scale)
    for usual in WORKLOADS:
        # Fewer rounds first; smaller batches only where next to nothing is asked for.
        workload = replace(usual, calls=_times(usual.calls, min(1.0, 10 * scale)))
        yield from _results("calls", timing.in_turns(workload, tracers, rounds, loop), workload.name)
    loop.close()


def _paced(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    # Of pltrace a thousand calls and more: of few calls the slowest is all that p99 says.
    rounds = _times(15 if isinstance(tracers[-1], Pltrace) else 7, scale)
    yield from _results("paced", timing.paced(tracers, rounds, _times(100, min(1.0, 10 * scale))))


def _threads(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    calls = _times(30, min(1.0, 10 * scale))
    yield from _results("threads", timing.in_threads(tracers, _rounds(tracers, 10, scale), calls))


def _total(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    yield from _results("total", timing.total_cpu(tracers, _rounds(tracers, 10, scale), _times(300, scale)))


def _slow_server(tracers: list[Tracer], scale: float) -> Iterator[Result]:
    """Measure what waits for its server with one that answers after 50 ms."""
    tracer = tracers[-1]
    waiting = type(tracer)(f"{tracer.sink}/slow", tracer.folder)
    loop = timing.new_loop()
    for usual in WORKLOADS:
        if usual.kind == "langchain" and not usual.is_async:
            workload = replace(usual, calls=_times(usual.calls / 10, min(1.0, 10 * scale)))
            samples = timing.in_turns(workload, [tracers[0], waiting], _times(5, scale), loop)
            yield from _results("slow-server", samples, workload.name)
    loop.close()


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
    "calls": _calls, "paced": _paced, "threads": _threads, "total": _total, "slow-server": _slow_server,
    "volume": _volume, "million": _million, "million-llm": _million_llm,
}  # fmt: skip


def _in_turns(name: str, sink: str, folder: Path, sections: list[str], scale: float) -> Iterator[Result]:
    tracers: list[Tracer] = [Nobody(sink, folder), Noop(sink, folder), _tracer(name, sink, folder)]
    if name == Pltrace.name:
        tracers.insert(2, Prototype(sink, folder))
    for section in sections:
        yield from _MEASURES[section](tracers, scale)


def _off(name: str, sink: str, folder: Path, scale: float) -> Iterator[Result]:
    for how, samples in alone.switched_off(name, sink, folder, _times(100, scale)):
        for result in _results("off", samples, "decorated call"):
            yield {**result, "how": how}


def _memory(name: str, sink: str, folder: Path, scale: float) -> Iterator[Result]:
    found = alone.memory(_tracer(name, sink, folder), _times(1_000, min(1.0, 10 * scale)))
    yield {"section": "memory", "tracer": name, **found}


def _profile(name: str, sink: str, folder: Path, scale: float) -> Iterator[Result]:
    batch, loop = min(1.0, 10 * scale), timing.new_loop()
    for workload, samples in profile.parts(sink, folder, _times(100, scale), batch, loop):
        yield from _results("parts", samples, workload)
    for tail in profile.tails(sink, folder, _times(100, scale), batch, loop):
        yield {"section": "tails", **tail}
    for threads in profile.by_thread(sink, folder, _times(50, scale), _times(300, scale)):
        yield {"section": "by thread", **threads}
    loop.close()


_MEASURES_ALONE = {"off": _off, "memory": _memory, "profile": _profile}


def _rounds(tracers: list[Tracer], count: int, scale: float) -> int:
    """Return how many rounds are measured: others differ from the handler that does nothing by far more."""
    return _times(_MORE_ROUNDS * count if isinstance(tracers[-1], Pltrace) else count, scale)


def _times(count: float, scale: float) -> int:
    return max(1, round(count * scale))


def main() -> None:
    """Measure what the command line asks for."""
    name, sink, folder, sections, scale = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What peers print is no result.
    logging.disable(logging.WARNING)  # Peers have much to say about a server that isn't theirs.
    if sections != "memory":  # Those of its own are no tracers that have any.
        print(json.dumps(_versions(name)), file=out, flush=True)
    if sections in ALONE:
        results = _MEASURES_ALONE[sections](name, sink, Path(folder), float(scale))
    else:
        results = _in_turns(name, sink, Path(folder), sections.split(","), float(scale))
    for result in results:
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # The error is the last that is said: peers say more as the process ends, or keep it from that.
