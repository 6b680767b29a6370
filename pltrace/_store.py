"""Keeps spans, their delivery and what is asked of requests in SQLite: the local product, and the outbox."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from pltrace._database import Database
from pltrace._exporter import Operation, StoredSpan
from pltrace._slices import Slices

__all__ = ["Asked", "Store", "Written"]

PENDING, DELIVERED, QUARANTINED = 0, 1, 2
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: An owner that hasn't been seen for so long has lost its lease, even if its process is still there (stopped, hung).
LEASE_S = 60.0
#: So many operations on requests of others are kept after they are done.
_MOST_STRAY = 10_000

#: The most rows that one transaction takes over, and that one deletes: others wait meanwhile.
_MOST_IN_STEP = 2_000
_MOST_PRUNED = 200
_LEAVING_PATIENCE_S = 1.0
_LONGEST_PRUNING_S, _PRUNING_PATIENCE_S = 0.1, 0.5
_MOST_PAGES_GIVEN_BACK = 1_000
#: The owners of what is pending, found by leaps through the index: there can be a hundred thousand rows of each.
_OWNERS = """
WITH RECURSIVE found (owner) AS (
    SELECT min(owner) FROM {table} WHERE state = 0{only}
    UNION ALL
    SELECT (SELECT min({table}.owner) FROM {table} WHERE state = 0{only} AND {table}.owner > found.owner)
    FROM found WHERE found.owner IS NOT NULL
) SELECT owner FROM found WHERE owner IS NOT NULL
"""

_COLUMNS = (
    "span_id", "trace_id", "parent_id", "name", "kind", "status", "started_at_ns", "ended_at_ns",
    "input_tokens", "output_tokens",
)  # fmt: skip


class Asked(NamedTuple):
    """An operation on its way to the store."""

    kind: str
    trace_id: str
    span_id: str
    arguments: str
    subtree: bool
    request_id: int | None = None  # Given instead of the span.


class Written(NamedTuple):
    """An LLM call that a commit put into the store with its local id."""

    span_id: str
    request_id: int


class Store:
    """The spans of this process, and of all that share the file.

    Args:
        place: The file, or a database that is open already; None keeps everything in memory.
        exporters: Names of the exporters that every span is for.
        local_ids: Requests get the store's own ids, because no exporter gives them any.
        keep: Delivered spans stay for reading.

    Raises:
        StoreError: The file can't be used.
    """

    def __init__(
        self, place: Path | Database | None, exporters: Sequence[str] = (), *, local_ids: bool = True, keep: bool = True
    ) -> None:
        self.database = place if isinstance(place, Database) else Database(place)
        self.exporters = tuple(exporters)
        self._local_ids = local_ids
        self._keep = keep
        #: How large the spans are that were written of late.
        self.span_bytes = 1_000.0
        self._pruned_to = 0  # Where the last pruning stopped.
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork: a new owner."""
        self.owner = new_owner()
        self._seen_at = 0.0  # When this process last renewed its lease,
        self._seen_in = 0  # and at which opening of the file.
        self._sent_from: dict[str, int] = {}  # By exporter: which file the batch is from that is on its way.

    # Writing: the writer thread.

    def write(
        self,
        records: Sequence[dict[str, Any]],
        operations: Sequence[Asked],
        counts: Mapping[str, int] | None = None,
        patience_s: float = 30.0,
    ) -> list[Written]:
        """Commit ended spans and operations together.

        Args:
            records: As made by `record_of`; one that is known already replaces it.
            operations: In the order they were asked.
            counts: What happened since the last commit, by reason; added to what is known.
            patience_s: The longest wait for other processes.

        Returns:
            The LLM calls that got a local id.

        Raises:
            sqlite3.Error: Nothing was written.
        """
        # Encoded before the transaction: other processes wait while it is open.
        slices, bodies = Slices(), []
        for record in records:
            slices.between()
            bodies.append(_encoded(record))
        if bodies:
            self.span_bytes += (sum(map(len, bodies)) / len(bodies) - self.span_bytes) / 2
        with self.database.writing(patience_s) as connection:
            self._stay(connection)
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM spans").fetchone()
            known = self._known(connection, [record["span_id"] for record in records])
            rows: list[tuple[Any, ...]] = []
            written: list[Written] = []
            for record, body in zip(records, bodies, strict=True):
                if record["span_id"] in known:
                    self._rewrite(connection, record, body)
                    continue
                known.add(record["span_id"])
                last += 1
                request_id = last if self._local_ids and record["kind"] == "llm" else None
                if request_id is not None:
                    written.append(Written(record["span_id"], request_id))
                rows.append((last, *(record.get(column) for column in _COLUMNS), request_id, body))
            connection.executemany(f"INSERT INTO spans VALUES ({', '.join('?' * (len(_COLUMNS) + 3))})", rows)
            for exporter in self.exporters:
                connection.executemany(
                    "INSERT INTO deliveries (exporter, seq, state, owner) VALUES (?, ?, 0, ?)",
                    [(exporter, row[0], self.owner) for row in rows],
                )
            self._spread_known(connection, records)
            for asked in operations:
                self._ask(connection, asked)
            for reason, count in (counts or {}).items():
                connection.execute(
                    "INSERT INTO counters VALUES (?, ?)"
                    " ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
                    (reason, count),
                )
        return written

    def _known(self, connection: Any, span_ids: list[str]) -> set[str]:
        rows = connection.execute(
            "SELECT span_id FROM spans WHERE span_id IN (SELECT value FROM json_each(?))",
            (json.dumps(span_ids),),
        )
        return {row[0] for row in rows}

    def _rewrite(self, connection: Any, record: Mapping[str, Any], body: str) -> None:
        """Replace a span that was updated after it had ended, and deliver it again: backends upsert by span id."""
        changes = ", ".join(f"{column} = ?" for column in _COLUMNS)
        connection.execute(
            f"UPDATE spans SET {changes}, body = ? WHERE span_id = ?",
            (*(record.get(column) for column in _COLUMNS), body, record["span_id"]),
        )
        if record["kind"] != "llm":  # An LLM call that is sent again would be logged again.
            connection.execute(
                "UPDATE deliveries SET state = 0, owner = ? WHERE state = 1 AND seq ="
                " (SELECT seq FROM spans WHERE span_id = ?)",
                (self.owner, record["span_id"]),
            )

    def _ask(self, connection: Any, asked: Asked) -> None:
        """Store an operation; one on a subtree also as one operation on each request that is there already."""
        state = LOCAL if self._local_ids else ASKED
        if asked.request_id is not None:
            asked = self._of_request(connection, asked)
        cursor = connection.execute(
            "INSERT INTO operations (span_id, trace_id, request_id, subtree, kind, arguments, state, owner)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (asked.span_id, asked.trace_id, asked.request_id, asked.subtree, asked.kind, asked.arguments,
             LOCAL if asked.subtree else state, self.owner),
        )  # fmt: skip
        if asked.subtree:
            for row in connection.execute(
                "SELECT span_id, body FROM spans WHERE trace_id = ? AND kind = 'llm' ORDER BY seq",
                (asked.trace_id,),
            ).fetchall():
                if asked.span_id in json.loads(row["body"])["lineage"]:
                    self._spread(connection, cursor.lastrowid, row["span_id"])

    def _of_request(self, connection: Any, asked: Asked) -> Asked:
        """Return what was asked by id with the request's span, if this store has it; else with none."""
        row = connection.execute(
            "SELECT span_id, trace_id FROM spans WHERE request_id = ? ORDER BY seq DESC LIMIT 1", (asked.request_id,)
        ).fetchone()
        span_id, trace_id = ("", "") if row is None else row
        return asked._replace(span_id=span_id, trace_id=trace_id)

    def _spread_known(self, connection: Any, records: Sequence[Mapping[str, Any]]) -> None:
        """Make what was asked of whole subtrees hold for the LLM calls that this commit adds to them."""
        calls = [record for record in records if record["kind"] == "llm" and record["lineage"]]
        if not calls:
            return
        traces = json.dumps(list({record["trace_id"] for record in calls}))
        for row in connection.execute(
            "SELECT id, span_id FROM operations WHERE subtree = 1 AND trace_id IN (SELECT value FROM json_each(?))"
            " ORDER BY id",
            (traces,),
        ).fetchall():
            for record in calls:
                if row["span_id"] in record["lineage"]:
                    self._spread(connection, row["id"], record["span_id"])

    def _spread(self, connection: Any, source: int, span_id: str) -> None:
        connection.execute(
            "INSERT OR IGNORE INTO operations (span_id, trace_id, subtree, source, kind, arguments, state, owner)"
            " SELECT ?, trace_id, 0, id, kind, arguments, ?, ? FROM operations WHERE id = ?",
            (span_id, LOCAL if self._local_ids else ASKED, self.owner, source),
        )

    # Delivering: one thread an exporter.

    def claim(self, exporter: str, most: int, most_bytes: int) -> list[StoredSpan]:
        """Return the oldest pending spans of this process, at most `most` and about `most_bytes` of them."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT spans.*, deliveries.uncertain FROM deliveries JOIN spans USING (seq)"
                # By this column, whose order the index has: else all that is pending is read and sorted.
                " WHERE exporter = ? AND owner = ? AND state = 0 ORDER BY deliveries.seq LIMIT ?",
                (exporter, self.owner, most),
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
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT spans.*, deliveries.uncertain FROM deliveries JOIN spans USING (seq)"
                " WHERE exporter = ? AND owner = ? AND state = 0 AND deliveries.seq > ?"
                " ORDER BY deliveries.seq DESC LIMIT 1",
                (exporter, self.owner, beyond),
            ).fetchone()
        return None if row is None else StoredSpan(row["seq"], record_from(row), bool(row["uncertain"]))

    def is_pending(self, exporter: str, up_to: int) -> bool:
        """Return whether a span of this process is pending, up to a number."""
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT 1 FROM deliveries WHERE exporter = ? AND owner = ? AND state = 0 AND seq <= ? LIMIT 1",
                (exporter, self.owner, up_to),
            ).fetchone()
        return row is not None

    def last(self) -> int:
        """Return the number of the span that was stored last."""
        with self.database.reading() as connection:
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM spans").fetchone()
        return int(last)

    def sending(self, exporter: str, batch: Sequence[StoredSpan]) -> list[StoredSpan]:
        """Note, before a batch goes out, that it may arrive: a process that dies now can't tell.

        Returns:
            What of it is still this process's to send: one that was stopped for long may have lost its lease.
        """
        with self.database.writing() as connection:
            self._sent_from[exporter] = self.database.files
            rows = connection.execute(
                "SELECT seq, span_id FROM deliveries JOIN spans USING (seq) WHERE exporter = ? AND owner = ?"
                " AND state = 0 AND seq IN (SELECT value FROM json_each(?))",
                (exporter, self.owner, json.dumps([span.seq for span in batch])),
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
        with self.database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            connection.executemany(
                "UPDATE deliveries SET uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.owner) for span in batch],
            )

    def delivered(self, exporter: str, batch: Iterable[StoredSpan], request_ids: Mapping[str, int]) -> None:
        """Note that a batch arrived, and the ids that its requests got."""
        batch = list(batch)
        with self.database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            for span in batch:
                request_id = request_ids.get(span.record["span_id"])
                if request_id is not None:
                    connection.execute("UPDATE spans SET request_id = ? WHERE seq = ?", (request_id, span.seq))
            connection.executemany(
                "UPDATE deliveries SET state = 1, uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.owner) for span in batch],
            )
            if not self._keep:
                self._delete(connection, [span.seq for span in batch], "state = 0")

    def quarantine(self, exporter: str, reasons: Mapping[int, str]) -> None:
        """Set spans aside that the backend refuses for what is in them: number → reason."""
        with self.database.writing() as connection:
            if self._is_from_elsewhere(exporter):
                return
            connection.executemany(
                "UPDATE deliveries SET state = 2, uncertain = 0, error = ?"
                " WHERE exporter = ? AND seq = ? AND owner = ?",
                [(reason, exporter, seq, self.owner) for seq, reason in reasons.items()],
            )

    def _is_from_elsewhere(self, exporter: str) -> bool:
        """Return whether the batch on its way is from a file that was replaced meanwhile: its numbers mean nothing."""
        return self._sent_from.get(exporter, self.database.files) != self.database.files

    def due_operations(self, most: int) -> list[Operation]:
        """Return this process's oldest operations whose request has its id."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT operations.id, operations.kind, arguments,"
                " coalesce(operations.request_id, spans.request_id) AS known_id"
                " FROM operations LEFT JOIN spans USING (span_id)"
                " WHERE operations.state = 0 AND owner = ? AND known_id IS NOT NULL ORDER BY operations.id LIMIT ?",
                (self.owner, most),
            ).fetchall()
        return [Operation(row[0], row[1], row[3], json.loads(row[2])) for row in rows]

    def hopeless_operations(self, most: int) -> list[tuple[int, str, str]]:
        """Return number, kind and span of this process's oldest operations whose request will never have an id."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT operations.id, operations.kind, span_id FROM operations JOIN spans USING (span_id)"
                " WHERE operations.state = 0 AND owner = ? AND operations.request_id IS NULL"
                " AND spans.request_id IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = spans.seq AND deliveries.state = 0)"
                " ORDER BY operations.id LIMIT ?",
                (self.owner, most),
            ).fetchall()
        return [(row[0], row[1], row[2]) for row in rows]

    def operated(self, number: int, error: str | None = None) -> None:
        """Note that an operation was taken, or, with an error, refused."""
        with self.database.writing() as connection:
            connection.execute(
                "UPDATE operations SET state = ?, error = ? WHERE id = ?",
                (DONE if error is None else REFUSED, error, number),
            )
            if not self._keep:
                rows = connection.execute(
                    "SELECT seq FROM spans JOIN operations USING (span_id) WHERE operations.id = ?", (number,)
                ).fetchall()
                self._delete(connection, [row["seq"] for row in rows], "state = 0")

    # Owning: which process delivers what.

    def stay(self) -> None:
        """Renew this process's lease on what it has to deliver."""
        if self._lease_is_old():
            with self.database.writing() as connection:
                self._stay(connection)

    def _stay(self, connection: Any) -> None:
        if self.exporters and self._lease_is_old():
            connection.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?)",
                (self.owner, _host(), os.getpid(), time.monotonic_ns()),
            )
            self._seen_at, self._seen_in = time.monotonic(), self.database.openings

    def _lease_is_old(self) -> bool:
        elsewhere = self._seen_in != self.database.openings
        return not self._seen_at or elsewhere or time.monotonic() - self._seen_at > LEASE_S / 4

    def adopt(self) -> int:
        """Take over what processes left that ended or lost their lease; return how many spans and operations."""
        with self.database.reading() as connection:
            gone = self._gone(connection)
        return sum(self._adopt_from(owner) for owner in gone)

    def _gone(self, connection: Any) -> list[str]:
        """Return the owners of something that is pending here whose processes have ended or lost their lease."""
        known = {row["owner"]: self._is_gone(row) for row in connection.execute("SELECT * FROM owners")}
        owners = {
            row[0]
            for table, only in (
                *(("deliveries", exporter) for exporter in self.exporters),
                ("operations", None),
            )
            for row in connection.execute(
                _OWNERS.format(table=table, only="" if only is None else " AND exporter = :only"),
                {"only": only},
            )
        }
        pending = [owner for owner in owners if owner != self.owner and known.get(owner, True)]
        return pending + [owner for owner, is_gone in known.items() if is_gone and owner not in owners]

    def _adopt_from(self, owner: str) -> int:
        """Take over a process's spans and operations, in steps: nobody should wait for a large backlog."""
        adopted = 0
        for table, key, only in (
            *(("deliveries", "seq", exporter) for exporter in self.exporters),
            ("operations", "id", None),
        ):
            where = "owner = :gone AND state = 0" + ("" if only is None else " AND exporter = :only")
            parameters = {"ours": self.owner, "gone": owner, "only": only}
            taken = _MOST_IN_STEP
            while taken == _MOST_IN_STEP:
                with self.database.writing() as connection:
                    taken = connection.execute(
                        f"UPDATE {table} SET owner = :ours WHERE {where} AND {key} IN"
                        f" (SELECT {key} FROM {table} WHERE {where} ORDER BY {key} LIMIT {_MOST_IN_STEP})",
                        parameters,
                    ).rowcount
                adopted += taken
        with self.database.writing() as connection:
            connection.execute(
                "DELETE FROM owners WHERE owner = :gone"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE owner = :gone AND state = 0)",
                {"gone": owner},
            )
        return adopted

    def _is_gone(self, row: Any) -> bool:
        if row["owner"] == self.owner:
            return False
        age_s = (time.monotonic_ns() - row["seen_at_ns"]) / 1e9
        if not -LEASE_S <= age_s <= LEASE_S:  # A lease from the future is from before the machine started.
            return True
        return row["host"] == _host() and not _is_alive(row["pid"])

    def leave(self) -> None:
        """Give up the lease: the next process takes over what is left, at once."""
        self._seen_at = 0.0
        with self.database.writing(_LEAVING_PATIENCE_S) as connection:
            connection.execute("DELETE FROM owners WHERE owner = ?", (self.owner,))

    # Reading back.

    def record(self, span_id: str) -> dict[str, Any] | None:
        """Return the record of a span with its `request_id`, or None."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT * FROM spans WHERE span_id = ?", (span_id,)).fetchone()
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
                " FROM spans WHERE span_id = ?",
                (span_id,),
            ).fetchone()
        return (None, True) if row is None else (row[0], bool(row[1]))

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Return the records of a trace in the order they started."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT * FROM spans WHERE trace_id = ? ORDER BY started_at_ns, seq", (trace_id,)
            ).fetchall()
        return [record_from(row) for row in rows]

    def prune(self, oldest_ns: int, most_bytes: int) -> int:
        """Delete, oldest first, what is delivered or was only ever local: what ended before a time, or has no room.

        It takes little time: called again, it goes on.

        Args:
            oldest_ns: What ended before goes.
            most_bytes: Beyond so many in the file, the oldest go.

        Returns:
            How many spans were deleted.
        """
        deleted = 0
        give_up_at = time.monotonic() + _LONGEST_PRUNING_S
        while time.monotonic() < give_up_at:
            with self.database.reading() as connection:
                too_large = _size(connection) > most_bytes
                rows = connection.execute(
                    # The last stays: the numbers of those to come follow it.
                    "SELECT seq, ended_at_ns FROM spans WHERE seq > ? AND seq < (SELECT max(seq) FROM spans)"
                    " ORDER BY seq LIMIT ?",
                    (self._pruned_to, _MOST_PRUNED),
                ).fetchall()
            going = [row["seq"] for row in rows if too_large or (row["ended_at_ns"] or 0) < oldest_ns]
            if not going:
                self._pruned_to = 0
                break
            self._pruned_to = rows[-1]["seq"]
            with self.database.writing(_PRUNING_PATIENCE_S) as connection:
                deleted += self._delete(connection, going, "state <> 1")
        self._give_back(give_up_at + _LONGEST_PRUNING_S)
        return deleted

    def _give_back(self, give_up_at: float) -> None:
        """Make the file smaller by the pages that hold nothing any more, in steps."""
        while time.monotonic() < give_up_at:
            with self.database.reading() as connection:
                if not connection.execute("PRAGMA freelist_count").fetchone()[0]:
                    return
                # As a script: `execute` stops after the first page.
                connection.executescript(f"PRAGMA incremental_vacuum({_MOST_PAGES_GIVEN_BACK})")

    def drop(self, most_bytes: int) -> int:
        """Give up the oldest spans, whatever they wait for, while there are more than so many bytes; return how many.

        It takes little time: called again, it goes on.
        """
        dropped = 0
        give_up_at = time.monotonic() + _LONGEST_PRUNING_S
        while time.monotonic() < give_up_at:
            with self.database.writing() as connection:
                if _size(connection) <= most_bytes:
                    break
                oldest = connection.execute("SELECT seq FROM spans ORDER BY seq LIMIT ?", (_MOST_PRUNED,)).fetchall()
                connection.execute(
                    "DELETE FROM operations WHERE span_id IN (SELECT span_id FROM spans WHERE seq <= ?)",
                    (oldest[-1]["seq"] if oldest else 0,),
                )
                dropped += self._delete(connection, [row["seq"] for row in oldest], "0")
        return dropped

    def _delete(self, connection: Any, seqs: Sequence[int], kept: str) -> int:
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

    def close(self) -> None:
        """Close the file; it opens again if something comes yet."""
        self.database.close()


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of `spans` holds."""
    record = {column: row[column] for column in ("request_id", *_COLUMNS)}
    record.update(json.loads(row["body"]))
    return record


def _size(connection: Any) -> int:
    (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return int((pages - free) * page_size)


def new_owner() -> str:
    """Return a name for this process that no other has had."""
    return uuid4().hex


def _encoded(record: Mapping[str, Any]) -> str:
    return _json({key: value for key, value in record.items() if key not in _COLUMNS})


#: Records are made here and are trees: no time for a look at whether they are.
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode


def _host() -> str:
    """Return what a process id is unique in: the machine, and the container if there is one."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{os.uname().nodename if hasattr(os, 'uname') else os.environ.get('COMPUTERNAME', '')} {namespace}"


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # Only the lease tells.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    try:
        # Killed, and nobody has asked for its exit code yet; in a container maybe nobody ever does.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (OSError, IndexError):
        return True
