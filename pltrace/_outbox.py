"""Hands out what is pending, and takes note of what became of it: spans for each exporter, operations on requests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from pltrace._database import Database
from pltrace._exporter import Operation, StoredSpan
from pltrace._lease import Lease
from pltrace._rows import DONE, REFUSED, delete, record_from
from pltrace._slices import Slices

__all__ = ["Outbox"]


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

    def claim(self, exporter: str, most: int, most_bytes: int) -> list[StoredSpan]:
        """Return the oldest pending spans of this process, at most `most` and about `most_bytes` of them."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT spans.*, deliveries.uncertain FROM deliveries JOIN spans USING (seq)"
                # By this column, whose order the index has: else all that is pending is read and sorted.
                " WHERE exporter = ? AND owner = ? AND state = 0 ORDER BY deliveries.seq LIMIT ?",
                (exporter, self.lease.owner, most),
            ).fetchall()
        batch: list[StoredSpan] = []
        slices = Slices()
        for row in rows:
            slices.between()
            most_bytes -= len(row["body"])
            if batch and most_bytes < 0:
                break
            batch.append(StoredSpan(row["seq"], record_from(row), bool(row["uncertain"])))
        return batch

    def newest(self, exporter: str, beyond: int) -> StoredSpan | None:
        """Return the newest pending span of this process whose number is beyond another's, or None."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT spans.*, deliveries.uncertain FROM deliveries JOIN spans USING (seq)"
                " WHERE exporter = ? AND owner = ? AND state = 0 AND deliveries.seq > ?"
                " ORDER BY deliveries.seq DESC LIMIT 1",
                (exporter, self.lease.owner, beyond),
            ).fetchone()
        return None if row is None else StoredSpan(row["seq"], record_from(row), bool(row["uncertain"]))

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

    def sending(self, exporter: str, batch: Sequence[StoredSpan]) -> list[StoredSpan]:
        """Note, before a batch goes out, that it may arrive: a process that dies now can't tell.

        Returns:
            What of it is still this process's to send: one that was stopped for long may have lost its lease.
        """
        with self._database.writing() as connection:
            self._sent_from[exporter] = self._database.files
            rows = connection.execute(
                "SELECT seq, span_id FROM deliveries JOIN spans USING (seq) WHERE exporter = ? AND owner = ?"
                " AND state = 0 AND seq IN (SELECT value FROM json_each(?))",
                (exporter, self.lease.owner, json.dumps([span.seq for span in batch])),
            )
            # By its id too: in a file that took the place of another, the number is another span's.
            known = {row["seq"]: row["span_id"] for row in rows}
            ours = {span.seq for span in batch if known.get(span.seq) == span.record["span_id"]}
            connection.executemany(
                "UPDATE deliveries SET uncertain = 1, tries = tries + 1 WHERE exporter = ? AND seq = ?",
                [(exporter, seq) for seq in ours],
            )
        return [span for span in batch if span.seq in ours]

    def not_taken(self, exporter: str, batch: Iterable[StoredSpan]) -> None:
        """Note that a batch surely didn't arrive."""
        with self._database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            connection.executemany(
                "UPDATE deliveries SET uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.lease.owner) for span in batch],
            )

    def delivered(self, exporter: str, batch: Iterable[StoredSpan], request_ids: Mapping[str, int]) -> None:
        """Note that a batch arrived, and the ids that its requests got."""
        batch = list(batch)
        with self._database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            for span in batch:
                request_id = request_ids.get(span.record["span_id"])
                if request_id is not None:
                    connection.execute("UPDATE spans SET request_id = ? WHERE seq = ?", (request_id, span.seq))
            connection.executemany(
                "UPDATE deliveries SET state = 1, uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.lease.owner) for span in batch],
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
