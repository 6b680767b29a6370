"""Hands out what is pending, and takes note of what became of it: spans for each exporter, operations on requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from pltrace._database import TOO_LARGE, Database
from pltrace._exporter import Operation
from pltrace._lease import Lease
from pltrace._rows import DONE, READING, REFUSED, ReadSpan, delete, spans_in

__all__ = ["Outbox"]

#: By the number that the index has the order of: else all that is pending is read and sorted.
_CLAIMING = READING.format(
    spans="""
    SELECT spans.*, uncertain FROM deliveries JOIN spans USING (seq)
    WHERE exporter = ? AND owner = ? AND state = 0 ORDER BY deliveries.seq LIMIT ?
"""
)
_NEWEST = READING.format(
    spans="""
    SELECT spans.*, uncertain FROM deliveries JOIN spans USING (seq)
    WHERE exporter = ? AND owner = ? AND state = 0 AND deliveries.seq > ? ORDER BY deliveries.seq DESC LIMIT 1
"""
)


class Outbox:
    """What this process has to deliver; one thread an exporter uses it.

    Args:
        database: Where it is kept.
        lease: Says what is this process's.
        keep: Delivered spans stay for reading.
    """

    def __init__(self, database: Database, lease: Lease, *, keep: bool) -> None:
        self._database = database
        self.lease = lease
        self._keep = keep
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        self._sent_from: dict[str, int] = {}  # By exporter: which file the batch is from that is on its way.

    def claim(self, exporter: str, most: int, most_bytes: int) -> list[ReadSpan]:
        """Return the oldest pending spans of this process, at most `most` and about `most_bytes` of them."""
        try:
            text = self._read(_CLAIMING, exporter, self.lease.owner, most)
        except TOO_LARGE:  # Together they are more than SQLite takes for one text, a billion bytes.
            text = self._read(_CLAIMING, exporter, self.lease.owner, 1)
        return spans_in(text, most_bytes)

    def newest(self, exporter: str, beyond: int) -> ReadSpan | None:
        """Return the newest pending span of this process whose number is beyond another's, or None."""
        return next(iter(spans_in(self._read(_NEWEST, exporter, self.lease.owner, beyond))), None)

    def _read(self, query: str, *parameters: object) -> str | None:
        with self._database.reading() as connection:
            text: str | None = connection.execute(query, parameters).fetchone()[0]
        return text

    def is_pending(self, exporter: str, up_to: int) -> bool:
        """Return whether a span of this process is pending, up to a number."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT 1 FROM deliveries WHERE exporter = ? AND owner = ? AND state = 0 AND seq <= ? LIMIT 1",
                (exporter, self.lease.owner, up_to),
            ).fetchone()
        return row is not None

    def last(self) -> int:
        """Return the number of the span that was stored last."""
        with self._database.reading() as connection:
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM spans").fetchone()
        return int(last)

    def sending(self, exporter: str, batch: Sequence[ReadSpan]) -> list[ReadSpan]:
        """Note, before a batch goes out, that it may arrive: a process that dies now can't tell.

        Returns:
            What of it is still this process's to send: one that was stopped for long may have lost its lease.
        """
        with self._database.writing() as connection:
            self._sent_from[exporter] = self._database.files
            (text,) = connection.execute(
                "SELECT group_concat(seq || ' ' || span_id) FROM deliveries JOIN spans USING (seq) WHERE exporter = ?"
                " AND owner = ? AND state = 0 AND seq IN (SELECT value FROM json_each(?))",
                (exporter, self.lease.owner, _numbers(batch)),
            ).fetchone()
            # By its id too: in a file that took the place of another, the number is another span's.
            known = set((text or "").split(","))
            ours = [span for span in batch if f"{span.seq} {span.span_id}" in known]
            connection.execute(
                "UPDATE deliveries SET uncertain = 1, tries = tries + 1 WHERE exporter = ?"
                " AND seq IN (SELECT value FROM json_each(?))",
                (exporter, _numbers(ours)),
            )
        return ours

    def not_taken(self, exporter: str, batch: Iterable[ReadSpan]) -> None:
        """Note that a batch surely didn't arrive."""
        with self._database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            connection.execute(
                "UPDATE deliveries SET uncertain = 0 WHERE exporter = ? AND owner = ?"
                " AND seq IN (SELECT value FROM json_each(?))",
                (exporter, self.lease.owner, _numbers(batch)),
            )

    def delivered(self, exporter: str, batch: Sequence[ReadSpan], request_ids: Mapping[str, int]) -> None:
        """Note that a batch arrived, and the ids that its requests got."""
        got = {span.seq: request_ids[span.span_id] for span in batch if span.span_id in request_ids}
        with self._database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            if got:
                connection.execute(
                    "UPDATE spans SET request_id = json_extract(:ids, '$.\"' || seq || '\"')"
                    " WHERE seq IN (SELECT CAST(key AS INTEGER) FROM json_each(:ids))",
                    {"ids": json.dumps(got)},
                )
            connection.execute(
                "UPDATE deliveries SET state = 1, uncertain = 0 WHERE exporter = ? AND owner = ?"
                " AND seq IN (SELECT value FROM json_each(?))",
                (exporter, self.lease.owner, _numbers(batch)),
            )
            if not self._keep:
                delete(connection, [span.seq for span in batch], "state = 0")

    def quarantine(self, exporter: str, reasons: Mapping[int, str]) -> None:
        """Set spans aside that the backend refuses for what is in them: number → reason."""
        with self._database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            connection.executemany(
                "UPDATE deliveries SET state = 2, uncertain = 0, error = ?"
                " WHERE exporter = ? AND seq = ? AND owner = ?",
                [(reason, exporter, seq, self.lease.owner) for seq, reason in reasons.items()],
            )

    def _is_from_elsewhere(self, exporter: str) -> bool:
        """Return whether the batch on its way is from a file that was replaced meanwhile: its numbers mean nothing."""
        return self._sent_from.get(exporter, self._database.files) != self._database.files

    def due_operations(self, most: int) -> list[Operation]:
        """Return this process's oldest operations whose request has its id."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT operations.id, operations.kind, arguments,"
                " coalesce(operations.request_id, spans.request_id) AS known_id"
                " FROM operations LEFT JOIN spans USING (span_id)"
                " WHERE operations.state = 0 AND owner = ? AND known_id IS NOT NULL ORDER BY operations.id LIMIT ?",
                (self.lease.owner, most),
            ).fetchall()
        return [Operation(row[0], row[1], row[3], json.loads(row[2])) for row in rows]

    def hopeless_operations(self, most: int) -> list[tuple[int, str, str]]:
        """Return number, kind and span of this process's oldest operations whose request will never have an id."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT operations.id, operations.kind, span_id FROM operations JOIN spans USING (span_id)"
                " WHERE operations.state = 0 AND owner = ? AND operations.request_id IS NULL"
                " AND spans.request_id IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = spans.seq AND deliveries.state = 0)"
                " ORDER BY operations.id LIMIT ?",
                (self.lease.owner, most),
            ).fetchall()
        return [(row[0], row[1], row[2]) for row in rows]

    def operated(self, number: int, error: str | None = None) -> None:
        """Note that an operation was taken, or, with an error, refused."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE operations SET state = ?, error = ? WHERE id = ?",
                (DONE if error is None else REFUSED, error, number),
            )
            if not self._keep:
                rows = connection.execute(
                    "SELECT seq FROM spans JOIN operations USING (span_id) WHERE operations.id = ?", (number,)
                ).fetchall()
                delete(connection, [row["seq"] for row in rows], "state = 0")


def _numbers(spans: Iterable[ReadSpan]) -> str:
    return json.dumps([span.seq for span in spans])
