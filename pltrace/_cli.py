"""The command `pltrace`: shows what the store holds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from pltrace import _config, _queries
from pltrace._errors import PltraceError, StoreError
from pltrace._tree import duration, tree

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, or 1 after an error that was printed.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except PltraceError as error:
        print(f"pltrace: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `pltrace ls | head`: who reads has had enough. Python would complain once more when it closes the stream.
        sys.stderr.close()
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pltrace", description="Shows the traces in the local store.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--store", help="the store's file; else PLTRACE_STORE, else ~/.pltrace/traces.db")
    shared.add_argument("--json", action="store_true", help="print JSON, for programs")

    ls = commands.add_parser("ls", parents=[shared], help="list the latest traces")
    ls.add_argument("-n", "--number", type=_positive, default=20, metavar="N", help="at most so many (default: 20)")
    ls.set_defaults(run=_ls)

    show = commands.add_parser("show", parents=[shared], help="show one trace as a tree")
    show.add_argument("trace", metavar="TRACE", help="a trace id, its first characters, or `latest`")
    show.set_defaults(run=_show)
    return parser


def _positive(text: str) -> int:
    number = int(text)
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
                trace.name,
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)))


def _show(options: argparse.Namespace) -> None:
    path = _path(options)
    found = _queries.matching_traces(path, options.trace)
    if not found:
        raise StoreError(
            f"There is no trace {options.trace!r} in {str(path)!r}; `pltrace ls` lists those that there are"
        )
    if len(found) > 1:
        raise StoreError(f"{len(found)} traces begin with {options.trace!r}; give more of the id")
    records = _queries.trace_records(path, found[0])
    if options.json:
        print(json.dumps({"trace_id": found[0], "spans": records}, indent=2, ensure_ascii=False))
    else:
        print(f"trace {found[0]}")
        print(tree(records))


def _path(options: argparse.Namespace) -> Path:
    store = _config.load(store=options.store).store
    if isinstance(store, str):
        raise StoreError(f"The store is set to {store!r}: nothing is kept that could be shown")
    return store
