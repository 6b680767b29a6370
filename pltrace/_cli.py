"""The command `pltrace`: shows what the store holds, and runs programs with tracing on."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pltrace import _config, _queries
from pltrace import _doctor as _doctor_module
from pltrace._clock import monotonic
from pltrace._errors import PltraceError, StoreError
from pltrace._tree import duration, printable, tree

if TYPE_CHECKING:
    from pltrace._program import Program

__all__ = ["main"]

#: `sync` gives up when nothing was delivered for so long: the longest back-off.
_NO_PROGRESS_S = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 1 after an error that was printed.
    """
    options = _parser().parse_args(arguments)
    if options.run is not _run:
        return _reporting(options)
    try:
        program = _run(options)
    except PltraceError as error:
        return _told(error)
    program.run()  # What it raises is none of ours.
    return 0


def _reporting(options: argparse.Namespace) -> int:
    """Run one of the commands that print."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # For a terminal that can't show every character.
    try:
        code = int(options.run(options) or 0)
        sys.stdout.flush()
        return code
    except PltraceError as error:
        return _told(error)
    except BrokenPipeError:
        # `pltrace ls | head`: who reads has had enough. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _told(error: PltraceError) -> int:
    print(f"pltrace: {error}", file=sys.stderr)
    return 1


class _CommandParser(argparse.ArgumentParser):
    """Takes options in full only: an abbreviation would change its meaning when an option is added."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)


def _parser() -> argparse.ArgumentParser:
    parser = _CommandParser(prog="pltrace", description="Shows the traces in the local store.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    stored = _CommandParser(add_help=False)
    stored.add_argument("--store", help="the store's file; else PLTRACE_STORE, else ~/.pltrace/traces.db")
    shared = _CommandParser(add_help=False, parents=[stored])
    shared.add_argument("--json", action="store_true", help="print JSON, for programs")

    ls = commands.add_parser("ls", parents=[shared], help="list the latest traces")
    ls.add_argument("-n", "--number", type=_positive, default=20, metavar="N", help="at most so many (default: 20)")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", parents=[shared], help="show one trace as a tree")
    show.add_argument("trace", metavar="TRACE", help="a trace id, its first characters, or `latest`")
    show.set_defaults(run=_show)

    run = commands.add_parser("run", help="run a program with tracing on, and show what happened")
    run.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module")
    run.add_argument("program", metavar="PROGRAM", help="a Python script")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the program's own arguments")
    run.set_defaults(run=_run)

    sync = commands.add_parser("sync", parents=[stored], help="deliver now what waits in the store")
    sync.add_argument(
        "--timeout", type=float, metavar="S",
        help="take at most so many seconds (default: go on until nothing was delivered for a minute)",
    )  # fmt: skip
    sync.set_defaults(run=_sync)

    doctor = commands.add_parser("doctor", parents=[shared], help="say what is configured, waiting or wrong")
    doctor.set_defaults(run=_doctor)
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 on")
    return number


def _ls(options: argparse.Namespace) -> None:
    traces = _queries.latest_traces(_path(options), options.number)
    if options.json:
        print(json.dumps([trace._asdict() for trace in traces], indent=2))
        return
    if not traces:
        print("No traces yet.")
        return
    rows = [("TRACE", "STARTED", "DURATION", "STATUS", "SPANS", "LLM", "TOKENS", "DELIVERY", "NAME")]
    for trace in traces:
        started = datetime.fromtimestamp(trace.started_at_ns / 1e9).strftime("%Y-%m-%d %H:%M:%S")
        delivery = f"{trace.pending} pending" if trace.pending else "-"
        if trace.quarantined:
            delivery = f"{trace.quarantined} quarantined"
        rows.append(
            (
                trace.trace_id[:12], started, duration(trace.ended_at_ns - trace.started_at_ns), trace.status or "open",
                str(trace.spans), str(trace.requests), str(trace.input_tokens + trace.output_tokens), delivery,
                printable(trace.name),
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)))


def _show(options: argparse.Namespace) -> None:
    path = _path(options)
    if not options.trace:
        raise StoreError("TRACE is empty: expected a trace id, its first characters, or `latest`")
    found = _queries.matching_traces(path, options.trace)
    if not found:
        raise StoreError(
            f"There is no trace {options.trace!r} in {str(path)!r}; `pltrace ls` lists those that there are"
        )
    if len(found) > 1:
        raise StoreError(f"{len(found)} traces begin with {options.trace!r}; give more of the id")
    records = _queries.trace_records(path, found[0])
    if options.json:
        print(json.dumps({"trace_id": found[0], "spans": records}, indent=2))
    else:
        print(f"trace {found[0]}")
        print(tree(records))


def _run(options: argparse.Namespace) -> Program:
    """Prepare a program to be run."""
    from pltrace._program import Program

    return Program(options.program, options.arguments, is_module=options.module)


def _sync(options: argparse.Namespace) -> int:
    """Deliver what waits, telling how far it is."""
    from pltrace import _runtime

    path, account = _path(options), _config.load().account
    if not account:
        raise StoreError("There is nowhere to deliver to: set PROMPTLAYER_API_KEY")
    _queries.check_place(path)
    _take_from_other_keys(path, account)
    _runtime.configure(enabled=True, store=path)
    deadline, fewest = monotonic() + (_NO_PROGRESS_S if options.timeout is None else options.timeout), math.inf
    while True:
        done = _runtime.flush(timeout=min(1.0, max(deadline - monotonic(), 0.0)))
        waiting = sum(_queries.store_state(path, account)["pending"].values())
        print(f"{waiting} spans wait", flush=True)
        if done and not waiting:
            return 0
        if waiting < fewest and options.timeout is None:
            deadline, fewest = monotonic() + _NO_PROGRESS_S, waiting
        time.sleep(min(0.5, max(deadline - monotonic(), 0.0)))  # Another process may be delivering them.
        if monotonic() >= deadline:
            print("pltrace: not all was delivered in time; `pltrace doctor` says why", file=sys.stderr)
            return 1


def _take_from_other_keys(path: Path, account: str) -> None:
    """Have spans that processes with other keys have left delivered to this one's account, as it is asked for."""
    from pltrace._store import Store
    from pltrace._trouble import STORE_TROUBLE

    store = Store(path, ["promptlayer"], local_ids=False, account=account)
    before = _queries.store_state(path, account)["pending_for_other_keys"]["spans"]
    with suppress(STORE_TROUBLE):  # Others keep the file: what waits is told all the same.
        store.lease.adopt(regardless=True)
    left = _queries.store_state(path, account)["pending_for_other_keys"]
    store.close()
    if before > left["spans"]:
        print(f"{before - left['spans']} spans that were recorded with another key or address go to this key's account")
    if left["operations"]:
        print(
            f"{left['operations']} scores, metadata, links or groups are for requests of another key's account, and "
            "wait for a process with that key"
        )


def _doctor(options: argparse.Namespace) -> None:
    found = _doctor_module.diagnosis(_config.load(store=options.store))
    print(json.dumps(found, indent=2) if options.json else _doctor_module.printed(found))


def _path(options: argparse.Namespace) -> Path:
    store = _config.load(store=options.store).store
    if isinstance(store, str):
        raise StoreError(f"The store is set to {store!r}: nothing is kept that could be shown")
    return store
