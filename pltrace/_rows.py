"""Knows the rows of the store's tables: states, the record that a span's row holds, and what goes with a span."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = [
    "ASKED", "COLUMNS", "DONE", "FIELDS", "LOCAL", "REFUSED", "Row",
    "body_of", "delete", "head_of", "record_from", "record_of", "size",
]  # fmt: skip

#: States of operations.
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: Between the lines of a body; in compact JSON there is none.
_LINE = "\n"
#: So many operations on requests of others are kept after they are done.
_MOST_STRAY = 10_000


class Row(NamedTuple):
    """A span on its way to the store: what has a column of its own, and the rest as text.

    Attributes:
        body: A JSON object, and after it, a line of JSON each, the values that `FIELDS` names, as many as there are: so
            they can be put into another JSON text as they are.
    """

    span_id: str
    trace_id: str
    parent_id: str | None
    name: str
    kind: str
    status: str | None
    started_at_ns: int
    ended_at_ns: int | None
    input_tokens: int | None
    output_tokens: int | None
    body: str


COLUMNS = Row._fields[:-1]
#: The lines of a body; LLM calls have all of them.
FIELDS = ("tags", "metadata", "input", "output", "parameters", "request_tags", "request_metadata")


def record_of(row: Row) -> dict[str, Any]:
    """Return the record that a row holds."""
    return {**dict(zip(COLUMNS, row, strict=False)), **body_of(row.body)}


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of the table `spans` holds."""
    record = {column: row[column] for column in ("request_id", *COLUMNS)}
    record.update(body_of(row["body"]))
    return record


def body_of(body: str) -> dict[str, Any]:
    """Return what a body holds."""
    head, *values = json.loads(f"[{body.replace(_LINE, ',')}]")
    return {**head, **dict(zip(FIELDS, values, strict=False))}


def head_of(body: str) -> dict[str, Any]:
    """Return what a body holds beside its `FIELDS`."""
    head: dict[str, Any] = json.loads(body.partition(_LINE)[0])
    return head


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
