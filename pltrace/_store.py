"""Keeps spans, their delivery and what is asked of requests in SQLite: the local product, and the outbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pltrace._database import MANY_VALUES, Database
from pltrace._deliveries import DELIVERED, PENDING, QUARANTINED, RENEWED, Delivery, change
from pltrace._errors import StoreError
from pltrace._lease import Lease
from pltrace._outbox import Outbox
from pltrace._retention import Retention
from pltrace._rows import ASKED, LOCAL, SPANS, WIDTH, Row, Rows, lineage_of, record_from
from pltrace._trouble import CONFLICT, STORE_TROUBLE

__all__ = ["Asked", "Store"]

#: So many rows go into one statement, one of them for what goes with them; a power of two.
_MOST_AT_ONCE = 512 if MANY_VALUES else 64
#: Where in a row's values they are.
_SPAN_ID, _TRACE_ID = 1 + Row._fields.index("span_id"), 1 + Row._fields.index("trace_id")
#: The last number; which of some spans are there already; whether something is asked of whole subtrees of some traces.
_LOOKING = """
SELECT (SELECT coalesce(max(seq), 0) FROM spans),
    (SELECT group_concat(span_id) FROM spans WHERE span_id IN (SELECT value FROM json_each(?))),
    EXISTS (SELECT 1 FROM operations WHERE subtree = 1 AND trace_id IN (SELECT value FROM json_each(?)))
"""


class Asked(NamedTuple):
    """An operation on its way to the store.

    Attributes:
        request_id: If it is known; of what is asked by id there is no span.
        requests: Of a subtree: its requests as far as they are known here, by their spans' ids → id if that is known.
    """

    kind: str
    trace_id: str
    span_id: str
    arguments: str
    subtree: bool
    request_id: int | None = None
    requests: Mapping[str, int | None] = MappingProxyType({})


class Store:
    """The spans of this process, and of all that share the file.

    Args:
        place: The file, or a database that is open already; None keeps everything in memory.
        exporters: Names of the exporters that every span is for.
        local_ids: Requests get the store's own ids, because no exporter gives them any.
        account: Tells PromptLayer's account from others; empty without one.

    Raises:
        StoreError: The file can't be used.
    """

    def __init__(
        self,
        place: Path | Database | None,
        exporters: Sequence[str] = (),
        *,
        local_ids: bool = True,
        account: str = "",
    ) -> None:
        self.database = place if isinstance(place, Database) else Database(place)
        self.exporters = tuple(exporters)
        self.lease = Lease(self.database, self.exporters, account)
        self.outbox = Outbox(self.database, self.lease, self.exporters)
        self.retention = Retention(self.database)
        self._local_ids = local_ids
        #: The number of the span that was written last, and whether it was that of all processes.
        self._last, self._is_alone = 0, False
        #: Whether this process may have operations to send; until then nobody has to look for them.
        self.asks = False

    def forked(self) -> None:
        """Start afresh, as in the child of a fork: a new owner."""
        self.lease.forked()
        self.outbox.forked()

    # Writing: the writer thread.

    def open(self, patience_s: float) -> None:
        """Open the file if it isn't open; where it can't be, who uses it next says why.

        Args:
            patience_s: The longest wait for other processes.
        """
        with suppress(STORE_TROUBLE, OSError, StoreError), self.database.reading(patience_s):
            pass

    def write(
        self,
        rows: Rows,
        operations: Sequence[Asked] = (),
        counts: Mapping[str, int] | None = None,
        patience_s: float = 30.0,
    ) -> Mapping[int, int]:
        """Commit ended spans and operations together.

        Args:
            rows: One of a span that is known already replaces it.
            operations: In the order they were asked.
            counts: What happened since the last commit, by reason; added to what is known.
            patience_s: The longest wait for other processes.

        Returns:
            The local ids of the LLM calls by their spans' ids, if it gives any.

        Raises:
            sqlite3.Error: Nothing was written.
        """
        if self._is_alone and 0 < len(rows) < _MOST_AT_ONCE and not operations and not self.lease.is_old:
            try:
                return self._write_at_once(rows, counts or {}, patience_s)
            except CONFLICT:
                pass  # Others have written, or some are known already, or something is asked of them.
        return self._write_in_steps(rows, operations, counts or {}, patience_s)

    def _write_at_once(self, rows: Rows, counts: Mapping[str, int], patience_s: float) -> Mapping[int, int]:
        """Write what is new with one statement, as long as nobody else has written.

        Raises:
            sqlite3.IntegrityError: It isn't so.
        """
        self._is_alone = False  # Until that is known again.
        first = self._last + 1
        rows.number(first)
        statement, values = self._of_commit(rows, 0, first, _traces(rows), counts)
        with self.database.written(statement, values, rows.characters, patience_s):
            self.outbox.written(rows, first)
        self._last += len(rows)
        self._is_alone = True
        return self._local_ids_of(rows)

    def _write_in_steps(
        self, rows: Rows, operations: Sequence[Asked], counts: Mapping[str, int], patience_s: float
    ) -> Mapping[int, int]:
        first = None
        try:
            with self.database.writing(patience_s, grows=rows.characters) as connection:
                self.lease.renew_in(connection)
                last, new = self._new(connection, rows)
                first = last + 1
                new.number(first)
                for start in range(0, len(new), _MOST_AT_ONCE - 1) or (0,):
                    connection.execute(*self._of_commit(new, start, first, (), {} if start else counts))
                for asked in operations:
                    self._ask(connection, asked)
                self.outbox.written(new, first)
        except BaseException:
            if first is not None:
                self.outbox.forget_from(first)  # The numbers are given to others.
            raise
        self._is_alone, self._last = last == self._last, last + len(new)
        return self._local_ids_of(new)

    def _new(self, connection: Any, rows: Rows) -> tuple[int, Rows]:
        """Return the last number, and the spans that are new, after replacing those that aren't."""
        span_ids, traces = rows.column("span_id"), json.dumps(_traces(rows))
        last, found, asks = connection.execute(_LOOKING, [json.dumps(span_ids), traces]).fetchone()
        known = set(found.split(",")) if found else set()
        if asks:
            self._spread_known(connection, [rows[place] for place in rows.calls], traces)
        if not known and len(set(span_ids)) == len(span_ids):
            return last, rows
        new: dict[str, Row] = {}
        for row in rows:
            if row.span_id in known:
                self._rewrite(connection, row)
            else:
                new[row.span_id] = row
        return last, Rows(new.values())

    def _of_commit(
        self, rows: Rows, start: int, first: int, traces: Sequence[str], counts: Mapping[str, int]
    ) -> tuple[str, list[Any]]:
        """Return the statement that commits some rows with all that goes with them, and its values.

        Args:
            rows: Numbered.
            start: The place of the first of them; as many follow as go into one statement.
            first: The first number of all of them.
            traces: Those of which nothing may be asked yet.
            counts: Added to what is known.
        """
        values = rows.values[start * WIDTH : (start + _MOST_AT_ONCE - 1) * WIDTH]
        number = len(values) // WIDTH
        values += [None] * (WIDTH - 1)
        values.append(
            json.dumps({
                "first": first + start,
                "last": first + start + number - 1,
                "exporters": self.exporters if number else (),
                "owner": self.lease.owner,
                "local_ids": self._local_ids,
                "traces": traces,
                "counts": counts,
            })
        )  # fmt: skip
        # Filled up to a power of two, so that there are few statements to keep prepared.
        places = 1 << number.bit_length()
        values += [None] * ((places - number - 1) * WIDTH)
        return _committing(places), values

    def _local_ids_of(self, rows: Rows) -> Mapping[int, int]:
        if not self._local_ids:
            return {}
        values = rows.values
        return {int(values[place * WIDTH + _SPAN_ID], 16): values[place * WIDTH] for place in rows.calls}

    def _rewrite(self, connection: Any, row: Row) -> None:
        """Replace a span that was updated after it had ended, and deliver it again: backends upsert by span id."""
        (seq,) = connection.execute("SELECT seq FROM spans WHERE span_id = ?", (row.span_id,)).fetchone()
        changes = ", ".join(f"{field} = ?" for field in Row._fields)
        connection.execute(f"UPDATE spans SET {changes} WHERE seq = ?", (*row, seq))
        self.outbox.forget([seq])
        if row.kind != "llm":  # An LLM call that is sent again would be logged again.
            # What was sent is no longer what it is: it is sent again whatever is known there.
            pending = Delivery(PENDING, self.lease.owner, RENEWED)
            for exporter in self.exporters:
                for held in (Delivery(DELIVERED), Delivery(QUARANTINED), pending):
                    change(connection, exporter, [seq], held, pending)

    def _ask(self, connection: Any, asked: Asked) -> None:
        """Store an operation; one on a subtree also as one operation on each request that is there already."""
        self.asks = True
        state = LOCAL if self._local_ids else ASKED
        if asked.request_id is not None:
            asked = self._of_request(connection, asked)
        cursor = connection.execute(
            "INSERT INTO operations (span_id, trace_id, request_id, subtree, kind, arguments, state, owner)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (asked.span_id, asked.trace_id, asked.request_id, asked.subtree, asked.kind, asked.arguments,
             LOCAL if asked.subtree else state, self.lease.owner),
        )  # fmt: skip
        if asked.subtree:
            for span_id, request_id in self._under(connection, asked).items():
                self._spread(connection, cursor.lastrowid, span_id, request_id)

    def _under(self, connection: Any, asked: Asked) -> dict[str, int | None]:
        """Return the requests that what is asked of a subtree holds for, but for those that nothing is known of yet."""
        rows = connection.execute(
            "SELECT span_id, body FROM spans WHERE trace_id = ? AND kind = 'llm' ORDER BY seq", (asked.trace_id,)
        ).fetchall()
        under = dict.fromkeys(row["span_id"] for row in rows if asked.span_id in lineage_of(row["body"]))
        others = {span_id: number for span_id, number in asked.requests.items() if span_id not in under}
        if others and self._local_ids:  # There it is said of what is in the store, or comes into it.
            (found,) = connection.execute(
                "SELECT json_group_array(span_id) FROM spans WHERE span_id IN (SELECT value FROM json_each(?))",
                (json.dumps(list(others)),),
            ).fetchone()
            others = dict.fromkeys(json.loads(found))
        # They are in other traces, on their way here, or not there any more; of these it is told.
        return {**under, **others}

    def _of_request(self, connection: Any, asked: Asked) -> Asked:
        """Return what was asked of a request with an id with its span, if this store has it; else with none."""
        row = connection.execute(
            "SELECT span_id, trace_id FROM requests JOIN spans USING (seq) WHERE request_id = ?"
            " ORDER BY span_id = ? DESC, seq DESC LIMIT 1",
            (asked.request_id, asked.span_id),
        ).fetchone()
        span_id, trace_id = ("", "") if row is None else row
        return asked._replace(span_id=span_id, trace_id=trace_id)

    def _spread_known(self, connection: Any, calls: Sequence[Row], traces: str) -> None:
        """Make what was asked of whole subtrees hold for the LLM calls that this commit adds to them."""
        lineages = [(row.span_id, lineage_of(row.body)) for row in calls]
        for source, above in connection.execute(
            "SELECT id, span_id FROM operations WHERE subtree = 1 AND trace_id IN (SELECT value FROM json_each(?))"
            " ORDER BY id",
            (traces,),
        ).fetchall():
            for span_id, lineage in lineages:
                if above in lineage:
                    self._spread(connection, source, span_id)

    def _spread(self, connection: Any, source: int, span_id: str, request_id: int | None = None) -> None:
        self.asks = True
        state = LOCAL if self._local_ids else ASKED
        connection.execute(
            "INSERT OR IGNORE INTO operations"
            " (span_id, trace_id, request_id, subtree, source, kind, arguments, state, owner)"
            " SELECT ?, trace_id, ?, 0, id, kind, arguments, ?, ? FROM operations WHERE id = ?",
            (span_id, request_id, state, self.lease.owner, source),
        )

    # Reading back.

    def record(self, span_id: str) -> dict[str, Any] | None:
        """Return the record of a span with its `request_id`, or None."""
        with self.database.reading() as connection:
            row = connection.execute(f"SELECT * FROM {SPANS} WHERE span_id = ?", (span_id,)).fetchone()
        return None if row is None else record_from(row)

    def operations_of(self, span_id: str) -> list[dict[str, Any]]:
        """Return what was asked of a request, in order: its `kind`, and its arguments."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT kind, arguments FROM operations WHERE span_id = ? AND subtree = 0 ORDER BY id", (span_id,)
            ).fetchall()
        return [{"kind": row["kind"], **json.loads(row["arguments"])} for row in rows]

    def request_of(self, span_id: str) -> tuple[int | None, bool]:
        """Return the id that an LLM call's request got, or None, and whether one can still come."""
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT request_id, EXISTS (SELECT 1 FROM deliveries WHERE seq = spans.seq AND state = 0)"
                f" FROM {SPANS} WHERE span_id = ?",
                (span_id,),
            ).fetchone()
        return (None, True) if row is None else (row[0], bool(row[1]))

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Return the records of a trace in the order they started."""
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT * FROM {SPANS} WHERE trace_id = ? ORDER BY started_at_ns, seq", (trace_id,)
            ).fetchall()
        return [record_from(row) for row in rows]

    def close(self) -> None:
        """Close the file; it opens again if something comes yet."""
        self.database.close()


def _traces(rows: Rows) -> list[str]:
    """Return the traces that LLM calls are in, or blocks around them."""
    return list({*rows.joined, *[rows.values[place * WIDTH + _TRACE_ID] for place in rows.calls]})


@cache
def _committing(places: int) -> str:
    """Return the statement that commits so many rows; empty ones have no effect."""
    row = f"({', '.join('?' * WIDTH)})"
    return f"INSERT INTO commits VALUES {', '.join([row] * places)}"
