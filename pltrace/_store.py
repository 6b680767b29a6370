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

__all__ = ["Asked", "Store", "Written"]

PENDING, DELIVERED, QUARANTINED = 0, 1, 2
ASKED, DONE, REFUSED, LOCAL = 0, 1, 2, 3

#: An owner that hasn't been seen for so long has lost its lease, even if its process is still there (stopped, hung).
LEASE_S = 60.0
#: So many operations on requests of others are kept after they are done.
_MOST_STRAY = 10_000

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
        self.owner = new_owner()
        self._seen_at = 0.0  # Monotonic: when this process last renewed its lease.

    def forked(self) -> None:
        """Start afresh in the child of a fork: a new connection, a new owner."""
        self.database.forked()
        self.owner = new_owner()
        self._seen_at = 0.0

    # Writing: the writer thread.

    def write(
        self,
        records: Sequence[dict[str, Any]],
        operations: Sequence[Asked],
        counts: Mapping[str, int] | None = None,
    ) -> list[Written]:
        """Commit ended spans and operations together.

        Args:
            records: As made by `record_of`; one that is known already replaces it.
            operations: In the order they were asked.
            counts: What happened since the last commit, by reason; added to what is known.

        Returns:
            The LLM calls that got a local id.

        Raises:
            sqlite3.Error: Nothing was written.
        """
        # Encoded before the transaction: other processes wait while it is open.
        bodies = [_encoded(record) for record in records]
        with self.database.writing() as connection:
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
                " WHERE exporter = ? AND owner = ? AND state = 0 ORDER BY seq LIMIT ?",
                (exporter, self.owner, most),
            ).fetchall()
        batch: list[StoredSpan] = []
        for row in rows:
            most_bytes -= len(row["body"])
            if batch and most_bytes < 0:
                break
            batch.append(StoredSpan(row["seq"], record_from(row), bool(row["uncertain"])))
        return batch

    def pending(self, exporter: str, up_to: int | None = None) -> int:
        """Return how many spans of this process are pending, of those up to a number if one is given."""
        with self.database.reading() as connection:
            (count,) = connection.execute(
                "SELECT count(*) FROM deliveries WHERE exporter = ? AND owner = ? AND state = 0 AND seq <= ?",
                (exporter, self.owner, 2**62 if up_to is None else up_to),
            ).fetchone()
        return int(count)

    def last(self) -> int:
        """Return the number of the span that was stored last."""
        with self.database.reading() as connection:
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM spans").fetchone()
        return int(last)

    def sending(self, exporter: str, batch: Iterable[StoredSpan]) -> None:
        """Note, before a batch goes out, that it may arrive: a process that dies now can't tell."""
        with self.database.writing() as connection:
            connection.executemany(
                "UPDATE deliveries SET uncertain = 1, tries = tries + 1 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.owner) for span in batch],
            )

    def not_taken(self, exporter: str, batch: Iterable[StoredSpan]) -> None:
        """Note that a batch surely didn't arrive."""
        with self.database.writing() as connection:
            connection.executemany(
                "UPDATE deliveries SET uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.owner) for span in batch],
            )

    def delivered(self, exporter: str, batch: Iterable[StoredSpan], request_ids: Mapping[str, int]) -> None:
        """Note that a batch arrived, and the ids that its requests got."""
        batch = list(batch)
        with self.database.writing() as connection:
            for span in batch:
                request_id = request_ids.get(span.record["span_id"])
                if request_id is not None:
                    connection.execute("UPDATE spans SET request_id = ? WHERE seq = ?", (request_id, span.seq))
            connection.executemany(
                "UPDATE deliveries SET state = 1, uncertain = 0 WHERE exporter = ? AND seq = ? AND owner = ?",
                [(exporter, span.seq, self.owner) for span in batch],
            )
            if not self._keep:
                connection.execute(
                    "DELETE FROM spans WHERE seq NOT IN (SELECT seq FROM deliveries WHERE state = 0)"
                    " AND span_id NOT IN (SELECT span_id FROM operations WHERE state = 0)"
                )
                connection.execute("DELETE FROM deliveries WHERE seq NOT IN (SELECT seq FROM spans)")

    def quarantine(self, exporter: str, reasons: Mapping[int, str]) -> None:
        """Set spans aside that the backend refuses for what is in them: number → reason."""
        with self.database.writing() as connection:
            connection.executemany(
                "UPDATE deliveries SET state = 2, uncertain = 0, error = ? WHERE exporter = ? AND seq = ?",
                [(reason, exporter, seq) for seq, reason in reasons.items()],
            )

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

    def operated(self, number: int, error: str | None = None) -> None:
        """Note that an operation was taken, or, with an error, refused."""
        with self.database.writing() as connection:
            connection.execute(
                "UPDATE operations SET state = ?, error = ? WHERE id = ?",
                (DONE if error is None else REFUSED, error, number),
            )

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
                (self.owner, _host(), os.getpid(), time.time_ns()),
            )
            self._seen_at = time.monotonic()

    def _lease_is_old(self) -> bool:
        return not self._seen_at or time.monotonic() - self._seen_at > LEASE_S / 4

    def adopt(self) -> int:
        """Take over what processes left that ended or lost their lease; return how many spans and operations."""
        with self.database.writing() as connection:
            gone = [row["owner"] for row in connection.execute("SELECT * FROM owners") if self._is_gone(row)]
            gone += [
                row[0]
                for row in connection.execute(
                    "SELECT DISTINCT owner FROM deliveries WHERE state = 0 UNION"
                    " SELECT DISTINCT owner FROM operations WHERE state = 0 EXCEPT SELECT owner FROM owners"
                )
                if row[0] != self.owner
            ]
            adopted = 0
            for owner in gone:
                for exporter in self.exporters:
                    adopted += connection.execute(
                        "UPDATE deliveries SET owner = ? WHERE exporter = ? AND owner = ? AND state = 0",
                        (self.owner, exporter, owner),
                    ).rowcount
                adopted += connection.execute(
                    "UPDATE operations SET owner = ? WHERE owner = ? AND state = 0", (self.owner, owner)
                ).rowcount
                if not connection.execute(
                    "SELECT 1 FROM deliveries WHERE owner = ? AND state = 0 LIMIT 1", (owner,)
                ).fetchone():
                    connection.execute("DELETE FROM owners WHERE owner = ?", (owner,))
        return adopted

    def _is_gone(self, row: Any) -> bool:
        if row["owner"] == self.owner:
            return False
        age_s = (time.time_ns() - row["seen_at_ns"]) / 1e9
        if not -LEASE_S <= age_s <= LEASE_S:  # Also a lease from far in the future: the clock has jumped.
            return True
        return row["host"] == _host() and not _is_alive(row["pid"])

    def leave(self) -> None:
        """Give up the lease: the next process takes over what is left, at once."""
        self._seen_at = 0.0
        with self.database.writing() as connection:
            connection.execute("DELETE FROM owners WHERE owner = ?", (self.owner,))

    # Reading back.

    def record(self, span_id: str) -> dict[str, Any] | None:
        """Return the record of a span with its `request_id`, or None."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT * FROM spans WHERE span_id = ?", (span_id,)).fetchone()
        return None if row is None else record_from(row)

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
        """Delete what is delivered, or was only ever local, older than `oldest_ns` and beyond `most_bytes`."""
        deleted = 0
        with self.database.writing() as connection:
            deleted += self._delete(connection, "spans.ended_at_ns < ?", (oldest_ns,))
            (page_size,) = connection.execute("PRAGMA page_size").fetchone()
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            (count,) = connection.execute("SELECT count(*) FROM spans").fetchone()
            size = (pages - free) * page_size
            if size > most_bytes and count:
                surplus = int(count * (size - most_bytes) / size) + 1
                deleted += self._delete(
                    connection,
                    "seq <= (SELECT seq FROM spans ORDER BY seq LIMIT 1 OFFSET ?)",
                    (min(surplus, count - 1),),
                )
        if deleted:
            with self.database.reading() as connection:
                connection.execute("PRAGMA incremental_vacuum")
        return deleted

    def _delete(self, connection: Any, where: str, parameters: tuple[int, ...]) -> int:
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS pruned AS SELECT seq, span_id FROM spans WHERE 0")
        connection.execute("DELETE FROM pruned")
        connection.execute(
            f"INSERT INTO pruned SELECT seq, span_id FROM spans WHERE {where}"
            " AND seq NOT IN (SELECT seq FROM deliveries WHERE state <> 1)"
            " AND span_id NOT IN (SELECT span_id FROM operations WHERE state = 0)",
            parameters,
        )
        connection.execute("DELETE FROM operations WHERE span_id IN (SELECT span_id FROM pruned)")
        connection.execute("DELETE FROM deliveries WHERE seq IN (SELECT seq FROM pruned)")
        connection.execute(
            "DELETE FROM operations WHERE span_id = '' AND state <> 0 AND id <= (SELECT max(id) FROM operations) - ?",
            (_MOST_STRAY,),
        )
        return int(connection.execute("DELETE FROM spans WHERE seq IN (SELECT seq FROM pruned)").rowcount)

    def close(self) -> None:
        """Close the file; it opens again if something comes yet."""
        self.database.close()


def record_from(row: Any) -> dict[str, Any]:
    """Return the record that a row of `spans` holds."""
    record = {column: row[column] for column in ("request_id", *_COLUMNS)}
    record.update(json.loads(row["body"]))
    return record


def new_owner() -> str:
    """Return a name for this process that no other has had."""
    return uuid4().hex


def _encoded(record: Mapping[str, Any]) -> str:
    return json.dumps(
        {key: value for key, value in record.items() if key not in _COLUMNS},
        ensure_ascii=False, allow_nan=False, separators=(",", ":"),
    )  # fmt: skip


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
    return True
