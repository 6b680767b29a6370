"""Knows the rows of the store's tables: states, the record that a span's row holds, and what goes with a span."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pltrace._deliveries import RENEWED, SENT, cut
from pltrace._exporter import StoredSpan

__all__ = [
    "ASKED", "COLUMNS", "DONE", "FIELDS", "LINE", "LOCAL", "REFUSED", "SPANS", "WIDTH", "ReadSpan", "Row",
    "Rows", "delete", "let_stray", "lineage_of", "read_spans", "record_from", "record_of", "size",
    "unneeded",
]  # fmt: skip

#: States of operations.
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: The table of spans with their requests' ids.
SPANS = "spans LEFT JOIN requests USING (seq)"
#: Between the lines of a body; in compact JSON there is none.
LINE = "\n"
_SPAN = "\x1e"
#: So many operations on requests whose spans aren't here are kept after they are done.
_MOST_STRAY = 10_000


class Row(NamedTuple):
    """A span on its way to the store: what has a column of its own, and the rest as text.

    Attributes:
        body: Lines of JSON: an object of what is alike for many spans, one of what else there is to say, and the values
            that `FIELDS` names, as many as there are. So they can be put into another JSON text as they are.
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


class Rows:
    """Rows on their way to the store, without an object for each: hundreds wait, and Python's collector goes over them.

    Attributes:
        values: For each row its number, None at first, and its columns.
        calls: The places of those that are LLM calls.
        joined: Traces that these are not in, but blocks around them are.
        characters: Of all bodies together.
    """

    __slots__ = ("calls", "characters", "joined", "values")

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self.values: list[Any] = []
        self.calls: list[int] = []
        self.joined: set[str] = set()
        self.characters = 0
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self.values) // WIDTH

    def __getitem__(self, place: int) -> Row:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return Row._make(self.values[place * WIDTH + 1 : (place + 1) * WIDTH])

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def add(self, row: Row) -> None:
        """Add one."""
        if row.kind == "llm":
            self.calls.append(len(self))
        self.values.append(None)
        self.values += row
        self.characters += len(row.body)

    def number(self, first: int) -> None:
        """Give them their numbers."""
        self.values[::WIDTH] = range(first, first + len(self))

    def column(self, name: str) -> list[Any]:
        """Return the values of one column."""
        return self.values[1 + Row._fields.index(name) :: WIDTH]


#: Values of a row, with its number.
WIDTH = len(Row._fields) + 1
COLUMNS = Row._fields[:-1]
#: The lines of a body after its two objects; LLM calls have all of them.
FIELDS = ("lineage", "input", "output", "parameters", "request_metadata")
_LINEAGE = 2
#: What the second object of a body says only where there is something to say; of an LLM call more.
_UNSAID: dict[str, Any] = {"error": None}
_UNSAID_OF_CALLS: dict[str, Any] = {
    **_UNSAID,
    **dict.fromkeys(
        ("first_token_at_ns", "cached_input_tokens", "cache_creation_input_tokens", "reasoning_tokens", "error_type")
    ),
}


class ReadSpan(StoredSpan):
    """A span as it is in the store; its record is put together when somebody asks for it.

    Attributes:
        row: What is stored of it.
        request_id: That of an LLM call that has one.
        is_renewed: An earlier version was sent: it has to be sent whatever the backend has of it.
        file: Which of the files it is in that this process has used.
    """

    row: Row
    request_id: int | None
    is_renewed: bool
    file: int

    @classmethod
    def read(cls, seq: int, row: Row, *, uncertain: int, request_id: int | None = None, file: int = 0) -> ReadSpan:
        """Return the span of a row."""
        span = object.__new__(cls)
        span.__dict__.update(
            seq=seq, row=row, uncertain=uncertain == SENT, is_renewed=uncertain == RENEWED, request_id=request_id,
            file=file,
        )  # fmt: skip
        return span

    def __getattr__(self, name: str) -> Any:
        """Return what isn't there yet: the record."""
        if name != "record" or "row" not in self.__dict__:
            raise AttributeError(name)
        record = self.__dict__["record"] = {"request_id": self.request_id, **record_of(self.row)}
        return record

    @property
    def span_id(self) -> str:
        """The span's id."""
        return self.row.span_id

    def as_uncertain(self) -> ReadSpan:
        """Return the span as one that the backend may have."""
        if self.is_renewed:
            return self
        return self.read(self.seq, self.row, uncertain=SENT, request_id=self.request_id, file=self.file)


def record_of(row: Row) -> dict[str, Any]:
    """Return the record that a row holds."""
    alike, own, *lines = row.body.split(LINE)
    return {
        **dict(zip(COLUMNS, row, strict=False)),
        **(_UNSAID_OF_CALLS if row.kind == "llm" else _UNSAID),
        **json.loads(alike),
        **json.loads(own),
        **dict(zip(FIELDS, json.loads(f"[{','.join(lines)}]"), strict=False)),
    }


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of the table `spans` holds, with the `request_id` that was read with it."""
    return {"request_id": row["request_id"], **record_of(Row._make([row[field] for field in Row._fields]))}


def lineage_of(body: str) -> list[str]:
    """Return the ids of the spans around the one that a body is of."""
    lineage: list[str] = json.loads(body.split(LINE, _LINEAGE + 1)[_LINEAGE])
    return lineage


#: Gives many spans as one text, in one step: for each row that SQLite returns it lets go of the interpreter, and has to
#: get it back. A line of JSON for the columns, then the body's lines: no control characters but those in between.
_READING = f"""
SELECT group_concat(json_array(seq, request_id, {", ".join(COLUMNS)}) || char(10) || body, char(30)) FROM (
    SELECT * FROM {SPANS}
    WHERE seq IN (SELECT value FROM json_each(?)) ORDER BY seq
)
"""


def read_spans(connection: Any, seqs: Mapping[int, int], file: int) -> list[ReadSpan]:
    """Return spans by their numbers, the oldest first.

    Args:
        connection: Of the file.
        seqs: Number → what is uncertain about it.
        file: Which file it is.
    """
    (text,) = connection.execute(_READING, (json.dumps(list(seqs)),)).fetchone()
    parts = [part.partition(LINE) for part in text.split(_SPAN)] if text is not None else []
    columns = json.loads(f"[{','.join([part[0] for part in parts])}]")
    return [
        ReadSpan.read(seq, Row._make((*row, part[2])), uncertain=seqs[seq], request_id=request_id, file=file)
        for (seq, request_id, *row), part in zip(columns, parts, strict=True)
    ]


def size(connection: Any) -> int:
    """Return how many bytes of the database file are in use."""
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return int((pages - free) * page_size)


def unneeded(connection: Any, seqs: Sequence[int], kept: str) -> list[Any]:
    """Return those of some spans that nobody waits for: with no operation due, and no delivery that is `kept`."""
    rows: list[Any] = connection.execute(
        "SELECT seq, span_id FROM spans WHERE seq IN (SELECT value FROM json_each(?))"
        f" AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = spans.seq AND {kept})"
        " AND NOT EXISTS (SELECT 1 FROM operations WHERE operations.span_id = spans.span_id AND state = 0)",
        (json.dumps(list(seqs)),),
    ).fetchall()
    return rows


def delete(connection: Any, seqs: Sequence[int], kept: str) -> int:
    """Delete those of some spans that are `unneeded`; return how many."""
    rows = unneeded(connection, seqs, kept)
    going = [(row["seq"],) for row in rows]
    connection.executemany("DELETE FROM operations WHERE span_id = ?", [(row["span_id"],) for row in rows])
    connection.executemany("DELETE FROM requests WHERE seq = ?", going)
    connection.executemany("DELETE FROM spans WHERE seq = ?", going)
    cut(connection, [row["seq"] for row in rows])
    _forget_stray(connection)
    return len(going)


def let_stray(connection: Any, number: int) -> None:
    """Keep an operation that was done or refused, and whose span isn't here to take it along when it goes, for a while.

    Args:
        connection: Where it is stored.
        number: Its number; one whose span is here stays with it.
    """
    connection.execute(
        "UPDATE operations SET span_id = '', source = NULL WHERE id = ?"
        " AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.span_id = operations.span_id)",
        (number,),
    )
    _forget_stray(connection)


def _forget_stray(connection: Any) -> None:
    connection.execute(
        "DELETE FROM operations WHERE span_id = '' AND state <> 0 AND id <= (SELECT max(id) FROM operations) - ?",
        (_MOST_STRAY,),
    )
