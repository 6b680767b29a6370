"""Knows the rows of the store's tables: states, the record that a span's row holds, and what goes with a span."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pltrace._exporter import StoredSpan

__all__ = [
    "ASKED", "COLUMNS", "DONE", "FIELDS", "LOCAL", "READING", "REFUSED", "ReadSpan", "Row",
    "delete", "head_of", "record_from", "record_of", "short_of", "size", "spans_in",
]  # fmt: skip

#: States of operations.
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: Between the lines of a body; in compact JSON there is none.
_LINE = "\n"
_SPAN = "\x1e"
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
_READ = ("request_id", *COLUMNS)
#: The lines of a body; LLM calls have all of them.
FIELDS = ("tags", "metadata", "input", "output", "parameters", "request_tags", "request_metadata")


class ReadSpan(StoredSpan):
    """A span as it was read from the store; its record is put together when somebody asks for it.

    Attributes:
        short: Its record but for what `FIELDS` names.
        lines: That, as JSON text.
    """

    short: Mapping[str, Any]
    lines: Sequence[str]

    @classmethod
    def read(cls, seq: int, uncertain: bool, short: Mapping[str, Any], lines: Sequence[str]) -> ReadSpan:
        """Return the span of a row."""
        span = object.__new__(cls)
        span.__dict__.update(seq=seq, uncertain=uncertain, short=short, lines=lines)
        return span

    def __getattr__(self, name: str) -> Any:
        """Return what isn't there yet: the record."""
        if name != "record" or "short" not in self.__dict__:
            raise AttributeError(name)
        record = self.__dict__["record"] = {**self.short, **_fields(self.lines)}
        return record

    @property
    def span_id(self) -> str:
        """The span's id."""
        span_id: str = self.short["span_id"]
        return span_id

    def as_uncertain(self) -> ReadSpan:
        """Return the span as one that the backend may have."""
        return self.read(self.seq, True, self.short, self.lines)


def short_of(span: StoredSpan) -> Mapping[str, Any]:
    """Return the record of a span, in which some of `FIELDS` may be missing."""
    found: Mapping[str, Any] | None = getattr(span, "short", None)
    return span.record if found is None else found


def record_of(row: Row) -> dict[str, Any]:
    """Return the record that a row holds."""
    return {**dict(zip(COLUMNS, row, strict=False)), **_body(row.body)}


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of the table `spans` holds."""
    record = {column: row[column] for column in ("request_id", *COLUMNS)}
    record.update(_body(row["body"]))
    return record


def _body(body: str) -> dict[str, Any]:
    head, *lines = body.split(_LINE)
    return {**json.loads(head), **_fields(lines)}


def _fields(lines: Sequence[str]) -> dict[str, Any]:
    return dict(zip(FIELDS, json.loads(f"[{','.join(lines)}]"), strict=False))


def head_of(body: str) -> dict[str, Any]:
    """Return what a body holds beside its `FIELDS`."""
    head: dict[str, Any] = json.loads(body.partition(_LINE)[0])
    return head


#: Gives many spans as one text, in one step: for each row that SQLite returns it lets go of the interpreter, and has to
#: get it back. A line of JSON for the columns, one or more for the body: no control characters but those in between.
READING = f"""
SELECT group_concat(json_array(seq, uncertain, request_id, {", ".join(COLUMNS)}) || char(10) || body, char(30))
FROM ({{spans}})
"""


def spans_in(text: str | None, most_bytes: int = sys.maxsize) -> list[ReadSpan]:
    """Return the spans that a query like `READING` gave, the oldest first, and at most about so many bytes of them."""
    parts: list[list[str]] = []
    for part in text.split(_SPAN) if text is not None else ():
        most_bytes -= len(part)
        if parts and most_bytes < 0:
            break
        parts.append(part.split(_LINE))
    columns = json.loads(f"[{','.join([part[0] for part in parts])}]")
    heads = json.loads(f"[{','.join([part[1] for part in parts])}]")
    return [
        ReadSpan.read(row[0], bool(row[1]), {**dict(zip(_READ, row[2:], strict=True)), **head}, part[2:])
        for row, head, part in zip(columns, heads, parts, strict=True)
    ]


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
