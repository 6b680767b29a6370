"""Turns results into Markdown tables and a plot."""

from __future__ import annotations

import itertools
import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from tests.benchmarks.plan import PARTS, WORKLOADS

__all__ = ["markdown", "plot", "speeds"]

Result = dict[str, Any]
_COLORS = (
    "#7a8ca3", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#ff7f0e",
    "#393b79", "#637939", "#8c6d31", "#843c39",
)  # fmt: skip
#: The sections that have all tracers, `none` first.
_BESIDE_EACH_OTHER = ("calls", "paced", "threads", "total")
#: What pltrace is compared with: the least of a callback tracer, and the least of one with a store.
FLOORS = ("no-op", "prototype")


class Results:
    """What all processes measured, joined.

    Args:
        results: As the workers printed them.
    """

    def __init__(self, results: Iterable[Result]) -> None:
        self.all = list(results)
        #: What the same piece of work took, in the middle.
        self.yardstick = statistics.median(_yardsticks(self.all) or [1.0])
        #: The tracers, in the order they were measured, `none` first.
        self.tracers = list(dict.fromkeys(r["tracer"] for r in self.all if r["section"] in _BESIDE_EACH_OTHER))

    def of(self, section: str, workload: str, tracer: str) -> list[tuple[Result, Result]]:
        """Return, for each process that measured it, the samples of a tracer and those of nobody beside it.

        What all processes measure is of pltrace's, if there are any: its ratios are to what was measured beside it.
        """
        found = [r for r in self.all if r["section"] == section and r.get("workload", "") == workload]
        if tracer in ("none", *FLOORS):
            found = [result for result in found if result["process"] == "pltrace"] or found
        pairs = []
        beside: Result = {}
        for result in found:
            if result["tracer"] == "none":
                beside = result
            if result["tracer"] == tracer:
                pairs.append((result, beside))
        return pairs

    def added(self, section: str, workload: str, tracer: str, what: str = "cpu") -> float | None:
        """Return what a tracer adds to an operation, in microseconds: the median over the processes.

        Of each round its own, with the machine's speed of the moment taken out: what makes it faster or slower for a
        while does it to all that is measured then. Of the rounds the mean without the tenth at each end: it leaves out
        what disturbed one alone, and not Python's garbage collector, which comes in many.
        """
        pairs = self.of(section, workload, tracer)
        if not pairs:
            return None
        return statistics.median(
            _middle(list(map(operator.sub, self._rounds(own, what), self._rounds(beside, what))))
            for own, beside in pairs
        )  # fmt: skip

    def bare(self, section: str, workload: str, what: str) -> float:
        """Return what an operation takes with no tracer, in microseconds."""
        return statistics.median(_middle(self._rounds(one, what)) for one, _ in self.of(section, workload, "none"))

    def walls(self, section: str, workload: str, tracer: str) -> list[float]:
        """Return all wall times of a tracer."""
        return [wall for own, _ in self.of(section, workload, tracer) for wall in own["wall"]]

    def _rounds(self, result: Result, what: str) -> list[float]:
        """Return what was measured round by round: the caller's CPU is, of the wall time each call."""
        values: list[float] = result[what]
        calls = len(values) // len(result["cpu"])
        medians = [statistics.median(values[start : start + calls]) for start in range(0, len(values), calls)]
        if what == "wall" and result["section"] == "slow-server":  # It is the server that takes the time.
            return medians
        return [median * self.yardstick / took for median, took in zip(medians, result["yardstick"], strict=True)]


def _yardsticks(results: Iterable[Result]) -> list[float]:
    return [speed for result in results for speed in result.get("yardstick", ())]


def speeds(results: Iterable[Result]) -> str:
    """Say how much the machine's speed changed."""
    found = _yardsticks(results) or [0.0]
    least, middle, most = (quantile(found, share) for share in (0.05, 0.5, 0.95))
    return (
        f"The same piece of work took {middle:.0f} µs at the median, {least:.0f} to {most:.0f} in nine of ten batches."
    )


def _middle(values: Sequence[float]) -> float:
    """Return the mean without the tenth at each end."""
    ordered = sorted(values)
    tenth = len(ordered) // 10
    return statistics.fmean(ordered[tenth : len(ordered) - tenth])


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the others is not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def markdown(results: Iterable[Result], circumstances: Sequence[str], missing: Mapping[str, str]) -> str:
    """Return the report: a section for each thing that was measured.

    Args:
        results: As the workers printed them.
        circumstances: What is said before.
        missing: The tracers that could not be measured, or not to the end, and why.
    """
    joined = Results(results)
    parts = ["# What tracing costs", *circumstances]
    parts += [f"**Not measured, or not to the end: {name}: {why}**" for name, why in missing.items()]
    tracers = joined.tracers[1:]
    totals = [(name, joined.added("total", "", name)) for name in tracers]
    tables = {
        "Versions": _versions(joined),
        "Added to one operation, µs of the calling thread's CPU": _added_table(joined, tracers, "cpu"),
        "Added to one operation, µs of wall time": _added_table(joined, tracers, "wall"),
        "Wall time of one call, µs: p50 / p99 / worst": _wall_table(joined),
        "CPU of the whole process for 1,000 LLM calls, background included, ms above none": _table(
            ["tracer", "ms"], [[name, _number(added)] for name, added in totals if added is not None]
        ),
        "A decorated call while the tracer is switched off, µs of the caller's CPU over the bare one": _off(joined),
        "log_request with a server that answers after 50 ms: added to one operation, µs": _slow_server(joined),
        "Memory of a process with each tracer, MB": _memory(joined),
        **_volume(joined),
        "pltrace: what its parts add to one operation, µs of the caller's CPU": _parts(joined, "cpu"),
        "pltrace: what its parts add to one operation, µs of wall time": _parts(joined, "wall"),
        "The slowest of calls without a pause, and what was in them, means of a call in µs": _tails(joined),
        "CPU of 1,000 LLM calls by thread, ms": _by_thread(joined),
    }
    parts += [f"## {title}\n\n{table}" for title, table in tables.items() if table]
    return "\n\n".join(parts) + "\n"


def _versions(joined: Results) -> str:
    rows = {
        result["process"]: ", ".join(f"{package} {version}" for package, version in result["packages"].items())
        for result in joined.all
        if result["section"] == "versions"
    }
    return _table(["tracer", "installed"], rows.items())


def _added_table(joined: Results, tracers: Sequence[str], what: str) -> str:
    places = [("calls", workload.name, workload.name) for workload in WORKLOADS]
    places += [("off", "decorated call", "decorated call, switched off"), ("threads", "", "chain, from 4 threads")]
    rows = []
    for section, workload, title in places:
        added = [joined.added(section, workload, name, what) for name in tracers]
        if any(value is not None for value in added):
            bare = joined.bare(section, workload, what)
            ratios = [_ratio(tracers, added, floor) for floor in FLOORS]
            rows.append([title, _number(bare), *map(_number, added), *ratios])
    return _table(["", "none takes", *tracers, *(f"pltrace / {floor}" for floor in FLOORS)], rows)


def _ratio(tracers: Sequence[str], added: Sequence[float | None], floor: str) -> str:
    by_name = dict(zip(tracers, added, strict=True))
    ours, least = by_name.get("pltrace"), by_name.get(floor)
    return "" if ours is None or not least or least <= 0 else f"{ours / least:.2f}"


def _wall_table(joined: Results) -> str:
    places = [("calls", workload.name, workload.name) for workload in WORKLOADS if workload.kind == "langchain"]
    places += [("paced", "", "chain, 100 a second"), ("threads", "", "chain, from 4 threads")]
    rows = []
    for section, workload, title in places:
        cells = []
        for tracer in joined.tracers:
            walls = joined.walls(section, workload, tracer)
            cells.append(
                f"{quantile(walls, 0.5):,.0f} / {quantile(walls, 0.99):,.0f} / {max(walls):,.0f}" if walls else ""
            )
        if any(cells):
            rows.append([title, *cells])
    return _table(["", *joined.tracers], rows)


def _off(joined: Results) -> str:
    how = {r["tracer"]: r["how"] for r in joined.all if r["section"] == "off" and r["tracer"] != "none"}
    rows = [[name, said, _number(joined.added("off", "decorated call", name))] for name, said in how.items()]
    return _table(["tracer", "switched off by", "µs"], rows)


def _slow_server(joined: Results) -> str:
    rows = []
    for name in dict.fromkeys(r["workload"] for r in joined.all if r["section"] == "slow-server"):
        added = [joined.added("slow-server", name, "log_request", what) for what in ("wall", "cpu")]
        rows.append([name, *map(_number, added)])
    return _table(["", "wall time", "the caller's CPU"], rows)


def _memory(joined: Results) -> str:
    found = [r for r in joined.all if r["section"] == "memory"]
    rows = [[r["tracer"], f"{r['set_up_mb']:.1f}", f"{r['grown_mb']:+.1f}"] for r in found]
    calls = f"{found[0]['calls']:,}" if found else ""
    return _table(["tracer", "set up, after one LLM call", f"grown by {calls} more"], rows)


def _parts(joined: Results, what: str) -> str:
    """Return a table of pltrace with more and more of it at work, and of what each step adds."""
    rows = []
    for workload in WORKLOADS:
        added = [joined.added("parts", workload.name, name, what) for name in PARTS]
        if None not in added:
            steps = [later - sooner for sooner, later in itertools.pairwise((0.0, *added))]
            noop = joined.added("parts", workload.name, "no-op", what)
            rows.append([workload.name, *map(_number, (noop, *added, *steps))])
    columns = [f"spans {name}" for name in PARTS]
    return _table(["", "no-op", *columns, "so: handler", "waiting objects", "writer", "delivery"], rows)


def _tails(joined: Results) -> str:
    rows = []
    for r in joined.all:
        if r["section"] == "tails":
            collected = [
                f"{count} ({took / 1e3:.1f} ms)" if count else "0"
                for _, (count, took) in sorted(r["collected"].items(), reverse=True)
            ]
            walls = f"{r['least']:,.0f} / {r['wall']:,.0f} / {r['most']:,.0f}"
            cpu = (f"{r[what]:,.0f}" for what in ("own", "others"))
            rows.append([r["workload"], r["tracer"], r["which"], f"{r['calls']:,}", walls, *cpu, *collected])
    seen = ["wall, µs: least / mean / worst", "caller's CPU", "other threads' CPU meanwhile"]
    generations = ["with a full collection", "with a middle one", "with a young one"]
    return _table(["", "tracer", "which", "calls", *seen, *generations], rows)


def _by_thread(joined: Results) -> str:
    found = {r["tracer"]: r["threads"] for r in joined.all if r["section"] == "by thread"}
    threads = dict.fromkeys(name for by_name in found.values() for name in by_name)
    rows = [[name, *(_number(by_name.get(name)) for by_name in found.values())] for name in threads]
    rows += [["all", *(_number(sum(by_name.values())) for by_name in found.values())]] if rows else []
    return _table(["thread", *found], rows)


def _volume(joined: Results) -> dict[str, str]:
    rates = [r for r in joined.all if r["section"] == "throughput"]
    sizes = [r for r in joined.all if r["section"] == "bytes"]
    flat = [r for r in joined.all if r["section"] == "flatness"]
    rate_rows = {
        (r["workload"], r["to"]): statistics.median(
            other["rate"] for other in rates if (other["workload"], other["to"]) == (r["workload"], r["to"])
        )
        for r in rates
    }
    size_rows = {r["workload"]: statistics.median(o["bytes"] for o in sizes if o["workload"] == r["workload"])
                 for r in sizes}  # fmt: skip
    found = {
        "pltrace: spans a second from one process, sustained": _table(
            ["recorded by", "to", "spans/s"], [[*key, f"{rate:,.0f}"] for key, rate in rate_rows.items()]
        ),
        "pltrace: bytes on disk": _table(
            ["one", "bytes"], [[name, f"{size:,.0f}"] for name, size in size_rows.items()]
        ),
    }
    for name in dict.fromkeys(r["workload"] for r in flat):
        columns = [
            "spans",
            "µs of the caller's CPU",
            "µs of wall",
            "µs of CPU in all",
            "always the same work, µs",
            "process, MB",
            "file, MB",
        ]
        rows = [
            [f"{r['spans']:,}", *(f"{r[key]:.2f}" for key in ("cpu_us", "wall_us", "total_us", "yardstick_us")),
             *(f"{r[key]:.0f}" for key in ("rss_mb", "file_mb"))]
            for r in flat if r["workload"] == name
        ]  # fmt: skip
        found[f"pltrace: cost of one {name}, after so many spans in one process"] = _table(columns, rows)
    return found


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table, or nothing if nothing of it was measured."""
    rows = list(rows)
    if not rows:
        return ""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The plot: bars on a logarithmic scale, drawn by hand so that nothing has to be installed.

_WIDTH, _LEFT, _BAR, _GAP = 760, 190, 14, 14


def plot(results: Iterable[Result]) -> str:
    """Return an SVG picture of the CPU that each tracer adds to the calling thread."""
    joined = Results(results)
    tracers = joined.tracers[1:]
    groups = []
    for workload in WORKLOADS:
        bars = [(name, joined.added("calls", workload.name, name)) for name in tracers]
        known = [(name, value) for name, value in bars if value is not None and value > 0]
        if known:
            groups.append((workload.name, known))
    values = [value for _, bars in groups for _, value in bars] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 0.01)

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - 70)

    shapes: list[str] = []
    y = 60.0
    for title, bars in groups:
        shapes.append(_text(_LEFT - 8, y + len(bars) * _BAR / 2 + 4, title, "end"))
        for name, value in bars:
            color = _COLORS[tracers.index(name) % len(_COLORS)]
            shapes.append(
                f'<rect x="{_LEFT}" y="{y:.0f}" width="{max(1.0, x(value) - _LEFT):.1f}" height="{_BAR - 2}"'
                f' fill="{color}"><title>{escape(f"{name}: {value:.2f} µs")}</title></rect>'
            )
            shapes.append(_text(x(value) + 4, y + 10, f"{name} {_number(value)}", "start"))
            y += _BAR
        y += _GAP
    grid = [
        f'<line x1="{x(10**power):.0f}" x2="{x(10**power):.0f}" y1="45" y2="{y:.0f}" stroke="#ddd"/>'
        + _text(x(10**power), 40, f"{10**power:g} µs", "middle")
        for power in range(low, high + 1)
    ]
    title = _text(10, 20, "CPU that a tracer adds to the calling thread, per operation (logarithmic)", "start")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 10:.0f}" font-family="sans-serif"'
        f' font-size="11"><rect width="100%" height="100%" fill="white"/>{title}{"".join(grid + shapes)}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
