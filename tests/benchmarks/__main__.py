"""What tracing costs, measured side by side: `python -m tests.benchmarks [--peers all] [--scale 1] [--out FOLDER]`.

Measures no tracer, a callback handler that does nothing, a prototype that stores what it is told and no more, and
pltrace with everything on (scope, tags, metadata, capture, a store on disk, delivery to a local server in another
process), in turns within one process, batch by batch; several such processes one after the other, and with `--peers`
other tracers, each in an environment of its own, in between. The model answers at once, so that what is left is
LangChain and who listens. Memory, what is switched off, and what pltrace's parts take, are measured in processes of
their own. Writes `report.md`, `added.svg` and the raw `results.json`. A tracer that fails is named in the report, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.benchmarks import inert, peers, report
from tests.benchmarks.plan import ALONE, LONG, OF_ONE, SECTIONS

ROOT = Path(__file__).resolve().parents[2]


class _WorkerError(Exception):
    """A worker failed; it may have measured something before."""


def main() -> int:
    """Measure, and write the report; return 1 if a tracer could not be measured, or not to the end."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    missing: dict[str, str] = {}  # Why, by tracer.
    interpreters = {"pltrace": sys.executable, **_peers(options, missing)}
    began, load = time.time(), os.getloadavg()[0]
    results: list[dict[str, Any]] = []
    with (
        _sink() as sink,
        tempfile.TemporaryDirectory() as folder,
        (options.out / "results.json").open("w") as kept,  # As they come: a run takes minutes.
    ):
        for title, name, sections in _processes(options, list(interpreters)):
            interpreter, where = interpreters.get(name, sys.executable), Path(tempfile.mkdtemp(dir=folder))
            try:
                for result in _measured(interpreter, name, sink, where, sections, options.scale, title):
                    result["process"] = name
                    results.append(result)
                    print(json.dumps(result), file=kept, flush=True)
            except _WorkerError as error:
                missing[name] = str(error)
    circumstances = [
        _method(options),
        f"Python {platform.python_version()}, langchain-core {metadata.version('langchain-core')}, "
        f"{os.cpu_count()} CPUs ({_cpu()}), load {load:.1f} before and {os.getloadavg()[0]:.1f} after, "
        f"{time.time() - began:.0f} s. {report.speeds(results)}",
    ]
    text = report.markdown(results, circumstances, missing)
    if options.inert:
        _say("import and inert calls")
        text += "\n## While nobody switches it on\n\n" + inert.markdown(options.scale)
    (options.out / "report.md").write_text(text)
    (options.out / "added.svg").write_text(report.plot(results))
    print(text)
    _say(f"written to {options.out}", end="\n")
    for name, why in missing.items():
        _say(f"not measured: {name}: {why}", end="\n")
    return int(bool(missing))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=(__doc__ or "").partition("\n")[0],
    )  # fmt: skip
    parser.add_argument("--scale", type=float, default=1.0, help="how much of everything (default 1)")
    parser.add_argument("--processes", type=int, default=3, help="how often all is measured anew (default 3)")
    parser.add_argument("--peers", metavar="NAMES", help="other tracers, separated by commas, or `all`")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"of %(default)s; {', '.join(LONG)}")
    parser.add_argument("--no-inert", dest="inert", action="store_false", help="without import and inert calls")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "pltrace-benchmarks")
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    unknown = set(options.sections) - {*SECTIONS, *LONG}
    if unknown:
        parser.error(f"--sections: there is no {', '.join(sorted(unknown))}")
    options.peers = list(peers.PEERS) if options.peers == "all" else options.peers.split(",") if options.peers else []
    unknown = set(options.peers) - set(peers.PEERS)
    if unknown:
        parser.error(f"--peers: there is no {', '.join(sorted(unknown))}; there are {', '.join(peers.PEERS)}")
    return options


def _peers(options: argparse.Namespace, missing: dict[str, str]) -> dict[str, str]:
    """Return the Pythons of the peers that are asked for; of those that can't be installed note why."""
    found = {}
    for name in options.peers:
        _say(f"environment of {name}")
        try:
            found[name] = peers.interpreter(name, options.out / "peers")
        except (OSError, subprocess.CalledProcessError) as error:
            missing[name] = f"can't be installed: {error}"
            _say(f"{name} {missing[name]}", end="\n")
    return found


def _processes(options: argparse.Namespace, names: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Give each process's title, tracer and sections."""
    for number in range(options.processes):
        for name in names:
            sections = [s for s in options.sections
                        if s not in ALONE and (s not in OF_ONE or (number == 0 and name == OF_ONE[s]))]  # fmt: skip
            if sections:
                yield f"process {number + 1} of {options.processes}, {name}", name, sections
    alone = {
        "off": [name for name in names if name == "pltrace" or name in peers.OFF],
        "memory": ["none", "no-op", "prototype", *names],
        "profile": ["pltrace"],
    }
    for section in options.sections:
        yield from ((f"a process of its own, {name}", name, [section]) for name in alone.get(section, ()))


@contextlib.contextmanager
def _sink() -> Iterator[str]:
    """Give the address of the local server that all tracers send to."""
    command = [sys.executable, "-m", "tests.benchmarks.sink"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


def _measured(
    interpreter: str, name: str, sink: str, folder: Path, sections: list[str], scale: float, title: str
) -> Iterator[dict[str, Any]]:
    """Run a worker and give what it prints, with progress shown.

    Raises:
        _WorkerError: It ended otherwise than it should; the message is the last line of what it said.
    """
    command = [interpreter, "-m", "tests.benchmarks.worker", name, sink, str(folder), ",".join(sections), str(scale)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PLTRACE_", "PROMPTLAYER_"))}
    said = folder / "said"
    with (
        said.open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            result = json.loads(line)
            _say(" · ".join(filter(None, (title, result["section"], result.get("workload"), result.get("tracer")))))
            yield result
    if process.returncode:
        lines = said.read_text(errors="replace").strip().splitlines()
        _say("\n".join([*lines, f"{title}: the worker failed with {process.returncode}"]), end="\n")
        raise _WorkerError(lines[-1].strip() if lines else f"ended with {process.returncode}")


def _say(text: str, end: str = "") -> None:
    """Show what is being done, on one line where that is a terminal."""
    tty = sys.stderr.isatty()
    sys.stderr.write(f"\r\x1b[K{text}{end}" if tty else f"{text}\n")
    sys.stderr.flush()


def _method(options: argparse.Namespace) -> str:
    return (
        "Each process measures no tracer, the no-op handler and one tracer in turns, batch by batch; the numbers are "
        "differences within a round, averaged without the tenth at each end, and the median of "
        f"{options.processes} processes; those of the no-op handler and the prototype are of pltrace's processes. Each "
        "batch's time is set right by what the same piece of work took right before and after it, as the speed of a "
        "shared machine changes. The background works while the next calls are timed, and is waited for after each "
        "batch. A batch of a slow tracer has as few calls as take a quarter of a second. Percentiles and worst are of "
        "all calls, as they were. What is switched off, memory and the parts of pltrace's cost are measured in "
        "processes of their own, once."
    )


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
