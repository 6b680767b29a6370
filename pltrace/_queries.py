"""Reads traces from a store's file for people and programs: read-only, in short reads, beside whoever writes."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pltrace._errors import StoreError
from pltrace._rows import SPANS, record_from
from pltrace._store_file import check_ours

__all__ = ["TraceSummary", "check_place", "latest_traces", "matching_traces", "store_state", "trace_records"]


class TraceSummary(NamedTuple):
    """One trace in a list."""

    trace_id: str
    name: str
    status: str | None
    started_at_ns: int
    ended_at_ns: int
    spans: int
    requests: int
    input_tokens: int
    output_tokens: int
    pending: int
    quarantined: int


_SUMMARIES = """
SELECT trace_id,
    coalesce((SELECT name FROM spans AS root WHERE root.trace_id = spans.trace_id
              ORDER BY root.parent_id IS NOT NULL, root.started_at_ns LIMIT 1), '') AS name,
    max(CASE WHEN status IN ('error', 'cancelled') THEN status WHEN parent_id IS NULL THEN status END) AS status,
    min(started_at_ns), max(coalesce(ended_at_ns, started_at_ns)), count(*), sum(kind = 'llm'),
    coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0),
    coalesce(sum((SELECT count(*) FROM deliveries WHERE deliveries.seq = spans.seq AND state = 0)), 0),
    coalesce(sum((SELECT count(*) FROM deliveries WHERE deliveries.seq = spans.seq AND state = 2)), 0)
FROM spans WHERE trace_id IN (SELECT DISTINCT trace_id FROM spans ORDER BY seq DESC LIMIT ?)
GROUP BY trace_id ORDER BY max(seq) DESC LIMIT ?
"""


def check_place(path: Path) -> bool:
    """Return whether there is a file, without opening it: SQLite would wait for who writes into a pipe.

    Raises:
        StoreError: Something else is there, or nothing can be.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        reason = error.strerror
    else:
        if stat.S_ISREG(mode):
            return True
        reason = "it is not a regular file"
    raise StoreError(f"Can't use the store {str(path)!r}: {reason}; set another path with PLTRACE_STORE")


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    nothing = f"There is no store {str(path)!r}: nothing has been traced into it yet"
    if not check_place(path):
        raise StoreError(nothing)
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            connection.row_factory = sqlite3.Row
            if check_ours(connection) == 0:
                raise StoreError(nothing)
            yield connection
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"Can't read the store {str(path)!r}: {error}") from error


def latest_traces(path: Path, most: int) -> list[TraceSummary]:
    """Return the traces that were written to last, at most `most`, the latest first."""
    with _reading(path) as connection:
        # Spans of one trace are many: enough of the latest are looked at to find `most` traces among them.
        return [TraceSummary(*row) for row in connection.execute(_SUMMARIES, (most, most))]


def matching_traces(path: Path, beginning: str) -> list[str]:
    """Return the ids of the traces whose id begins so; `latest` stands for the one written to last."""
    with _reading(path) as connection:
        if beginning == "latest":
            rows = connection.execute("SELECT trace_id FROM spans ORDER BY seq DESC LIMIT 1").fetchall()
        else:
            rows = connection.execute(
                "SELECT DISTINCT trace_id FROM spans WHERE substr(trace_id, 1, ?) = ?", (len(beginning), beginning)
            ).fetchall()
    return [row[0] for row in rows]


def trace_records(path: Path, trace_id: str) -> list[dict[str, Any]]:
    """Return the records of a trace in the order they started, each with `operations` and `delivery`."""
    with _reading(path) as connection:
        rows = connection.execute(
            f"SELECT * FROM {SPANS} WHERE trace_id = ? ORDER BY started_at_ns, seq", (trace_id,)
        ).fetchall()
        records = []
        for row in rows:
            record = record_from(row)
            record["delivery"] = {
                exporter: {"state": ("pending", "delivered", "quarantined")[state], "error": error}
                for exporter, state, error in connection.execute(
                    "SELECT exporter, state, error FROM deliveries WHERE seq = ?", (row["seq"],)
                )
            }
            record["operations"] = [
                dict(operation)
                for operation in connection.execute(
                    "SELECT kind, arguments, state, error FROM operations"
                    " WHERE span_id = ? AND subtree = 0 ORDER BY id",
                    (row["span_id"],),
                )
            ]
            records.append(record)
    return records


def store_state(path: Path, account: str) -> dict[str, Any]:
    """Return how much the store holds, what waits, what is in quarantine or refused, and what was counted.

    Args:
        path: The file.
        account: What waits for others than this one is also told apart.
    """
    of_others = "state = 0 AND instr(owner, '@') AND substr(owner, instr(owner, '@') + 1) <> ?"
    with _reading(path) as connection:
        spans, traces = connection.execute("SELECT count(*), count(DISTINCT trace_id) FROM spans").fetchone()
        pending = connection.execute(
            "SELECT exporter, sum(last - first + 1) FROM delivery_ranges WHERE state = 0 GROUP BY exporter"
        ).fetchall()
        failing = connection.execute(
            "SELECT exporter, error, sum(last - first + 1) AS spans FROM delivery_ranges"
            " WHERE state = 0 AND error IS NOT NULL GROUP BY exporter, error ORDER BY spans DESC LIMIT 5"
        ).fetchall()
        (operations,) = connection.execute("SELECT count(*) FROM operations WHERE state = 0").fetchone()
        (elsewhere,) = connection.execute(
            "SELECT coalesce(sum(last - first + 1), 0) FROM delivery_ranges"
            f" WHERE exporter = 'promptlayer' AND {of_others}",
            (account,),
        ).fetchone()
        (operations_elsewhere,) = connection.execute(
            f"SELECT count(*) FROM operations WHERE {of_others}", (account,)
        ).fetchone()
        quarantine = connection.execute(
            "SELECT span_id, name, exporter, error FROM delivery_ranges JOIN spans ON seq BETWEEN first AND last"
            " WHERE state = 2"
            " ORDER BY seq DESC LIMIT 20"
        ).fetchall()
        refused = connection.execute(
            "SELECT operations.kind, coalesce(operations.request_id, requests.request_id) AS request_id, span_id, error"
            " FROM operations LEFT JOIN spans USING (span_id) LEFT JOIN requests USING (seq)"
            " WHERE state = 2 ORDER BY id DESC LIMIT 20"
        ).fetchall()
        counted = connection.execute("SELECT reason, count FROM counters").fetchall()
    return {
        "spans": spans,
        "traces": traces,
        "bytes": sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*") if part.is_file()),
        "pending": {row[0]: row[1] for row in pending},
        "failing": [dict(row) for row in failing],
        "operations_pending": operations,
        "pending_for_other_keys": {"spans": elsewhere, "operations": operations_elsewhere},
        "quarantine": [dict(row) for row in quarantine],
        "refused": [dict(row) for row in refused],
        "counts": {row[0]: row[1] for row in counted},
    }
