"""Knows the rows of the store's tables: states, the record that a span's row holds, and what goes with a span."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["ASKED", "COLUMNS", "DONE", "LOCAL", "REFUSED", "delete", "record_from", "size"]

#: States of operations.
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: So many operations on requests of others are kept after they are done.
_MOST_STRAY = 10_000

COLUMNS = (
    "span_id", "trace_id", "parent_id", "name", "kind", "status", "started_at_ns", "ended_at_ns",
    "input_tokens", "output_tokens",
)  # fmt: skip


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of `spans` holds."""
    record = {column: row[column] for column in ("request_id", *COLUMNS)}
    record.update(json.loads(row["body"]))
    return record


def size(connection: Any) -> int:
    """Return how many bytes of the database file are in use."""
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return int((pages - free) * page_size)


def delete(connection: Any, seqs: Sequence[int], kept: str) -> int:
    """Delete those of some spans that nobody waits for: with no operation due, and no delivery that is `kept`."""
    rows = connection.execute(
        "SELECT seq, span_id FROM spans WHERE seq IN (SELECT value FROM json_each(?))"
        f" AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = spans.seq AND {kept})"
        " AND NOT EXISTS (SELECT 1 FROM operations WHERE operations.span_id = spans.span_id AND state = 0)",
        (json.dumps(list(seqs)),),
    ).fetchall()
    going = [(row["seq"],) for row in rows]
    connection.executemany("DELETE FROM operations WHERE span_id = ?", [(row["span_id"],) for row in rows])
    connection.executemany("DELETE FROM deliveries WHERE seq = ?", going)
    connection.executemany("DELETE FROM spans WHERE seq = ?", going)
    connection.execute(
        "DELETE FROM operations WHERE span_id = '' AND state <> 0 AND id <= (SELECT max(id) FROM operations) - ?",
        (_MOST_STRAY,),
    )
    return len(going)
