"""Hands out what is pending, and takes note of what became of it: spans for each exporter, operations on requests."""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pltrace._clock import monotonic
from pltrace._database import Database
from pltrace._deliveries import DELIVERED, PENDING, QUARANTINED, RENEWED, SENT, Delivery, change, pending
from pltrace._exporter import Operation
from pltrace._health import counts, warn_sometimes
from pltrace._lease import Lease
from pltrace._rows import DONE, REFUSED, ReadSpan, Rows, let_stray, read_spans
from pltrace._trouble import STORE_TROUBLE, TOO_LARGE

__all__ = ["COUNTED_HERE", "Outbox"]

#: So many spans that were written last are kept in memory for each exporter, and so many characters of them.
_MOST_RECENT, _MOST_CHARACTERS = 4_000, 2**24


#: Just as it ends, a call is neither open nor on its way to the store: it is looked at again after so long.
_MISSING_AFTER_S = 1.0

#: The count of spans that were lost with a file.
LOST = "dropped_with_file"
#: Counts that are written together with what they count; others go with the next commit of spans.
COUNTED_HERE = frozenset({"delivered", "quarantined"})


class _Recent(NamedTuple):
    """What one commit has written.

    Attributes:
        file: Which of the files it is in that this process has used.
        first: The number of the first span, the others follow.
        last: That of the last.
        rows: The spans.
    """

    file: int
    first: int
    last: int
    rows: Rows


class Outbox:
    """What this process has to deliver; one thread an exporter uses it.

    Args:
        database: Where it is kept.
        lease: Says what is this process's.
        exporters: Names of those that spans are for.

    Attributes:
        is_missing: Says of a span that isn't in the store, by its id, whether it isn't on its way there either.
    """

    def __init__(self, database: Database, lease: Lease, exporters: Sequence[str]) -> None:
        self.is_missing: Callable[[str], bool] = lambda span_id: False
        self._database = database
        self.lease = lease
        self._exporters = exporters
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        self._sent_from: dict[str, int] = {}  # By exporter: which file the batch is from that is on its way.
        #: By exporter: what was written of late, in the order of the numbers.
        self._recent: dict[str, deque[_Recent]] = {exporter: deque() for exporter in self._exporters}
        #: By exporter: what was replaced since the batch was claimed that is on its way.
        self._replaced: dict[str, set[int]] = {exporter: set() for exporter in self._exporters}
        #: By exporter, as far as it is known without a look: how many spans are pending, and how many of them are on
        #: their way. Nothing but that is known of them when the file is lost.
        self._waiting, self._underway = Counter[str](), Counter[str]()
        self._files, self._losses = self._database.files, self._database.losses
        self._written = (0, 0)  # The first number of the last commit, and how many spans it had.
        self._missing_since: dict[int, float] = {}  # By operation, whose span is missing.

    @property
    def where(self) -> str:
        """Where what is pending is kept, for people."""
        memory = "memory, as long as the process lives and there is room,"
        return memory if self._database.path is None else "the store"

    def _see_losses(self) -> None:
        """Count what was lost with a file, if one was since the last look; with the lock on the database."""
        if self._files == self._database.files:
            return
        if self._losses == self._database.losses:  # It was given up for memory: what is in it stays there for others.
            self._underway.clear()
            lost = 0
        else:
            lost = max((self._waiting - self._underway).values(), default=0)
        self._files, self._losses, self._written = self._database.files, self._database.losses, (0, 0)
        self._waiting.clear()
        if lost:
            counts[LOST] += lost
            warn_sometimes(
                "lost_with_file",
                "The store %r was deleted, replaced or damaged: %d spans in it, not delivered yet, are lost. `pltrace "
                "doctor` counts them.",
                str(self._database.place),
                lost,
            )

    def written(self, rows: Rows, first: int) -> None:
        """Keep spans that are being written, so that they needn't be read: the oldest, which are claimed first.

        Before anybody else can claim them; and what their numbers meant earlier is forgotten.
        """
        self._see_losses()
        self.forget_from(first)
        self._written = first, len(rows)
        for exporter in self._exporters:
            self._waiting[exporter] += len(rows)
        written = _Recent(self._database.files, first, first + len(rows) - 1, rows)
        for recent in self._recent.values():
            spans = sum([len(one.rows) for one in recent], len(rows))
            characters = sum([one.rows.characters for one in recent], rows.characters)
            if rows and spans <= _MOST_RECENT and characters <= _MOST_CHARACTERS:
                recent.append(written)

    def forget_from(self, first: int) -> None:
        """Read spans from a number on anew: others get the numbers."""
        if self._written[0] == first:  # That commit has failed.
            self._waiting.subtract(dict.fromkeys(self._exporters, self._written[1]))
            self._written = (0, 0)
        for recent in self._recent.values():
            while recent and recent[-1].last >= first:
                recent.pop()

    def forget(self, seqs: Iterable[int]) -> None:
        """Read these spans anew, and send them anew if they are on their way: they are not what they were."""
        for seq in seqs:
            for exporter, recent in self._recent.items():
                for one in [one for one in recent if one.first <= seq <= one.last]:
                    recent.remove(one)
                self._replaced[exporter].add(seq)

    def claim(self, exporter: str, most: int, most_bytes: int, *, unsent: bool = False) -> list[ReadSpan]:
        """Return the oldest pending spans of this process, at most `most` and about `most_bytes` of them.

        With `unsent`, only those that weren't sent as they are.
        """
        with self._database.reading() as connection:
            self._see_losses()
            self._replaced[exporter].clear()
            self._underway[exporter] = 0
            waiting = pending(connection, exporter, self.lease.owner, most, unsent=unsent)
            is_all = len(waiting) < most and not unsent
            self._waiting[exporter] = len(waiting) if is_all else max(len(waiting), self._waiting[exporter])
            if not waiting:
                return []
            spans = self._from_memory(exporter, waiting) or self._read(connection, waiting)
        for number, span in enumerate(spans):
            most_bytes -= len(span.row.body)
            if number and most_bytes < 0:
                return spans[:number]
        return spans

    def _from_memory(self, exporter: str, waiting: Mapping[int, int]) -> list[ReadSpan]:
        """Return spans that were written of late, or none if some weren't."""
        recent, file = self._recent[exporter], self._database.files
        spans: list[ReadSpan] = []
        for seq, uncertain in waiting.items():
            while recent and recent[0].last < seq:  # Those before have been claimed.
                recent.popleft()
            if not recent or recent[0].first > seq or recent[0].file != file:
                return []
            row = recent[0].rows[seq - recent[0].first]
            spans.append(ReadSpan.read(seq, row, uncertain=uncertain, file=file))
        return spans

    def _read(self, connection: Any, waiting: Mapping[int, int]) -> list[ReadSpan]:
        try:
            return read_spans(connection, waiting, self._database.files)
        except TOO_LARGE:  # Together they are more than SQLite takes for one text, a billion bytes.
            return read_spans(connection, dict(list(waiting.items())[:1]), self._database.files)

    def newest(self, exporter: str, beyond: int) -> ReadSpan | None:
        """Return the newest pending span of this process whose number is beyond another's, or None."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT last, uncertain FROM delivery_ranges WHERE exporter = ? AND owner = ? AND state = 0"
                " AND last > ? ORDER BY first DESC LIMIT 1",
                (exporter, self.lease.owner, beyond),
            ).fetchone()
            found = [] if row is None else read_spans(connection, {row[0]: row[1]}, self._database.files)
        return found[0] if found else None

    def another(self, exporter: str, beyond: int, most: int, doubtful: Collection[int]) -> ReadSpan | None:
        """Return any of the `most` oldest pending spans of this process with a number beyond another's, or None.

        One of the doubtful, beside which so many are looked at, only if there are no others.
        """
        with self._database.reading() as connection:
            waiting = pending(connection, exporter, self.lease.owner, most + len(doubtful))
            others = [seq for seq in waiting if seq > beyond]
            if not others:
                return None
            seq = random.choice([seq for seq in others if seq not in doubtful] or others)
            found = read_spans(connection, {seq: waiting[seq]}, self._database.files)
        return found[0] if found else None

    def is_pending(self, exporter: str, up_to: int) -> bool:
        """Return whether a span of this process is pending, up to a number."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT 1 FROM delivery_ranges WHERE exporter = ? AND owner = ? AND state = 0 AND first <= ? LIMIT 1",
                (exporter, self.lease.owner, up_to),
            ).fetchone()
        return row is not None

    def count_pending(self) -> tuple[int, int]:
        """Return how many spans of this process are pending for an exporter, and how many of them may be there."""
        with self._database.reading() as connection:
            counts = connection.execute(
                "SELECT sum(last - first + 1), sum((last - first + 1) * (uncertain > 0)) FROM delivery_ranges"
                " WHERE owner = ? AND state = 0 GROUP BY exporter",
                (self.lease.owner,),
            ).fetchall()
        return max(map(tuple, counts), default=(0, 0))

    def last(self) -> int:
        """Return the number of the span that was stored last."""
        with self._database.reading() as connection:
            self._see_losses()  # Nobody else may look before the program ends.
            (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM spans").fetchone()
        return int(last)

    def sending(self, exporter: str, batch: Sequence[ReadSpan]) -> list[ReadSpan]:
        """Note, before a batch goes out, that it may arrive: a process that dies now can't tell.

        Returns:
            What of it is still this process's to send: one that was stopped for long may have lost its lease.
        """
        with self._database.writing() as connection:
            self._see_losses()
            file = self._sent_from[exporter] = self._database.files
            # In a file that took the place of another, the number is another span's.
            known = [span for span in batch if span.file == file]
            if not known:
                counts[LOST] += self._underway[exporter]  # Of the whole batch, of which this may be a part.
            ours: set[int] = set()
            for uncertain in (SENT, RENEWED):
                some = [span for span in known if span.is_renewed == (uncertain == RENEWED)]
                ours |= self._note(connection, exporter, some, Delivery(PENDING, self.lease.owner, uncertain))
            self._underway[exporter] = len(known)  # Only now: the file may have turned out to be damaged.
        return [span for span in known if span.seq in ours]

    def not_taken(self, exporter: str, batch: Sequence[ReadSpan], why: str, *, surely: bool) -> None:
        """Note that a batch wasn't taken, and why; surely, or as far as anybody knows."""
        with self._database.writing() as connection:
            self._see_losses()
            if self._is_from_elsewhere(exporter):
                return  # They are counted when they would be sent again.
            if surely:
                self._underway[exporter] = 0
            parts: dict[int, list[ReadSpan]] = {}
            for span in batch:
                uncertain = SENT if span.uncertain or not surely else 0
                parts.setdefault(RENEWED if span.is_renewed else uncertain, []).append(span)
            for uncertain, some in parts.items():
                self._note(connection, exporter, some, Delivery(PENDING, self.lease.owner, uncertain, why))

    def delivered(self, exporter: str, batch: Sequence[ReadSpan], request_ids: Mapping[str, int]) -> None:
        """Note that a batch arrived, and the ids that its requests got."""
        got = {span.seq: request_ids[span.span_id] for span in batch if span.span_id in request_ids}
        try:
            with self._database.writing() as connection:
                self._see_losses()
                number = len(batch)
                if not self._is_from_elsewhere(exporter):
                    number = self._note_delivered(connection, exporter, batch, got)
                _count(connection, "delivered", number)
                self._underway[exporter] = 0  # Only now: the file may have turned out to be damaged.
        except STORE_TROUBLE:
            if not self._is_from_elsewhere(exporter):
                raise
            # What was noted of them is lost with the file; they have arrived.

    def _note_delivered(
        self, connection: Any, exporter: str, batch: Sequence[ReadSpan], request_ids: Mapping[int, int]
    ) -> int:
        """Return how many of them it was this process's to deliver: others may have taken them over meanwhile."""
        if request_ids:
            connection.execute(
                "INSERT OR REPLACE INTO requests SELECT CAST(key AS INTEGER), value FROM json_each(?)",
                (json.dumps(request_ids),),
            )
        # Not of an LLM call: one that is sent again would be logged again.
        again = [one for one in batch if one.seq in self._replaced[exporter] and one.row.kind != "llm"]
        arrived = [one for one in batch if one not in again]
        delivered = len(self._note(connection, exporter, arrived, Delivery(DELIVERED)))
        self._waiting[exporter] -= delivered
        return delivered + len(self._note(connection, exporter, again, Delivery(PENDING, self.lease.owner, RENEWED)))

    def quarantine(self, exporter: str, reasons: Mapping[int, str]) -> Mapping[int, str]:
        """Set spans aside that the backend refuses for what is in them: number → reason.

        Returns:
            Those that are refused for good: of one that was replaced meanwhile, what it is now has not been sent yet.
        """
        with self._database.writing() as connection:
            reasons = {seq: reason for seq, reason in reasons.items() if seq not in self._replaced[exporter]}
            number = len(reasons)
            if not self._is_from_elsewhere(exporter):
                held = Delivery(PENDING, self.lease.owner)
                number = sum(
                    len(change(connection, exporter, [seq], held, Delivery(QUARANTINED, error=reason)))
                    for seq, reason in reasons.items()
                )
                self._waiting[exporter] -= number
            _count(connection, "quarantined", number)
        return reasons

    def _note(self, connection: Any, exporter: str, batch: Iterable[ReadSpan], delivery: Delivery) -> set[int]:
        """Note what became of what is this process's to deliver; return the numbers of those that are."""
        held = Delivery(PENDING, self.lease.owner)
        return change(connection, exporter, [span.seq for span in batch], held, delivery)

    def _is_from_elsewhere(self, exporter: str) -> bool:
        """Return whether the batch on its way is from a file that was replaced meanwhile: its numbers mean nothing."""
        return self._sent_from.get(exporter, self._database.files) != self._database.files

    def due_operations(self, most: int, without: Iterable[int] = ()) -> list[Operation]:
        """Return this process's oldest operations whose request has its id, without those of some requests."""
        with self._database.reading() as connection:
            rows = connection.execute(
                "SELECT operations.id, operations.kind, arguments,"
                " coalesce(operations.request_id, requests.request_id) AS known_id"
                " FROM operations LEFT JOIN spans USING (span_id) LEFT JOIN requests USING (seq)"
                " WHERE operations.state = 0 AND owner = ? AND known_id IS NOT NULL"
                " AND known_id NOT IN (SELECT value FROM json_each(?)) ORDER BY operations.id LIMIT ?",
                (self.lease.owner, json.dumps([*without]), most),
            ).fetchall()
        return [Operation(row[0], row[1], row[3], json.loads(row[2])) for row in rows]

    def hopeless_operations(self, most: int) -> list[tuple[int, str, str, str]]:
        """Return this process's oldest operations whose request will never have an id, or none that is known.

        Returns:
            Number, kind and span of each, and why it is so.
        """
        with self._database.reading() as connection:
            without_id = connection.execute(
                "SELECT operations.id, operations.kind, span_id FROM operations JOIN spans USING (span_id)"
                " LEFT JOIN requests USING (seq)"
                " WHERE operations.state = 0 AND owner = ? AND operations.request_id IS NULL"
                " AND requests.request_id IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.seq = spans.seq AND deliveries.state = 0)"
                " ORDER BY operations.id LIMIT ?",
                (self.lease.owner, most),
            ).fetchall()
            without_span = connection.execute(
                "SELECT id, kind, span_id FROM operations WHERE state = 0 AND owner = ? AND request_id IS NULL"
                " AND NOT EXISTS (SELECT 1 FROM spans WHERE spans.span_id = operations.span_id) ORDER BY id",
                (self.lease.owner,),
            ).fetchall()
        missing = self._missing([(row[0], row[2]) for row in without_span])
        return [
            *((row[0], row[1], row[2], "it got no id") for row in without_id),
            *(
                (row[0], row[1], row[2], f"span {row[2]} isn't in the store")
                for row in without_span
                if row[0] in missing
            ),
        ]

    def _missing(self, operations: Iterable[tuple[int, str]]) -> set[int]:
        """Return which of operations on spans that aren't stored are on some that never will be, or aren't any more."""
        now = monotonic()
        missing = [number for number, span_id in operations if self.is_missing(span_id)]
        self._missing_since = {number: self._missing_since.get(number, now) for number in missing}
        return {number for number in missing if now - self._missing_since[number] >= _MISSING_AFTER_S}

    def operated(self, number: int, error: str | None = None) -> None:
        """Note that an operation was taken, or, with an error, refused."""
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE operations SET state = ?, error = ? WHERE id = ?",
                (DONE if error is None else REFUSED, error, number),
            )
            let_stray(connection, number)


def _count(connection: Any, reason: str, number: int) -> None:
    connection.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET count = count + excluded.count",
        (reason, number),
    )
