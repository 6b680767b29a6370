"""Keeps the store within its age and size: deletes what is delivered, and gives the space back."""

from __future__ import annotations

import math

from pltrace._clock import monotonic
from pltrace._database import Database
from pltrace._deliveries import kept_up_to
from pltrace._rows import delete, size, unneeded
from pltrace._trouble import STORE_TROUBLE

__all__ = ["Retention"]

#: The most spans that one transaction deletes: others wait meanwhile; and how few it may be, where the disk has no room
#: for what the log takes meanwhile.
_MOST_PRUNED, _FEWEST_PRUNED = 200, 3
#: What is recorded meanwhile waits for it, and so does the end of the process.
_LONGEST_PRUNING_S, _PRUNING_PATIENCE_S = 0.02, 0.1
#: For each span that one transaction may delete.
_PAGES_GIVEN_BACK = 5


class Retention:
    """What makes room in a database; called again and again.

    Attributes:
        left: How many bytes were left at the last look; below 0 there was too much.
        is_stuck: Whether there was too much and nothing of it may go yet: the next look may be late.
    """

    def __init__(self, database: Database) -> None:
        self.left, self.is_stuck = math.inf, False
        self._database = database
        self._at_once = _MOST_PRUNED
        self._is_given_back = True  # Whether no page is left that holds nothing.
        self._pruned_to = 0  # Where the last pruning stopped,
        self._has_found = False  # and whether there was anything up to there.

    @property
    def is_through(self) -> bool:
        """Whether the last pruning came to the end of what may go."""
        return not self._pruned_to and self._is_given_back

    def prune(self, oldest_ns: int, most_bytes: int, *, is_full: bool = False) -> int:
        """Delete, oldest first, what is delivered or was only ever local: what ended before a time, or has no room.

        It takes little time: called again, it goes on.

        Args:
            oldest_ns: What ended before goes.
            most_bytes: Beyond so many in the file, or what leaves others some room on its disk, the oldest go.
            is_full: The file couldn't be written to for want of room.

        Returns:
            How many spans were deleted.
        """
        try:
            deleted = self._prune(oldest_ns, self._database.most_bytes(most_bytes, is_full=is_full))
            self._give_back(monotonic() + _LONGEST_PRUNING_S)
        except STORE_TROUBLE:  # On a full disk it may have been too much at once.
            self._at_once = max(self._at_once // 4, _FEWEST_PRUNED)
            raise
        self._at_once = min(self._at_once * 2, _MOST_PRUNED)
        return deleted

    def _prune(self, oldest_ns: int, most_bytes: int) -> int:
        deleted = 0
        give_up_at = monotonic() + _LONGEST_PRUNING_S
        while monotonic() < give_up_at:
            with self._database.reading(_PRUNING_PATIENCE_S) as connection:
                taken = size(connection)
                # A million spans that wait are a few ranges.
                while (kept := kept_up_to(connection, self._pruned_to + 1)) and monotonic() < give_up_at:
                    self._pruned_to = kept
                rows = connection.execute(
                    # The last stays: the numbers of those to come follow it.
                    "SELECT seq, ended_at_ns FROM spans WHERE seq > ? AND seq < (SELECT max(seq) FROM spans)"
                    " ORDER BY seq LIMIT ?",
                    (self._pruned_to, self._at_once),
                ).fetchall()
                self.left = most_bytes - taken
                too_large = self.left < 0
                going = [row["seq"] for row in rows if too_large or (row["ended_at_ns"] or 0) < oldest_ns]
                found = bool(unneeded(connection, going, "state <> 1"))
            self._has_found = self._has_found or found
            if not going:
                self.is_stuck = too_large and not self._has_found
                self._pruned_to, self._has_found = 0, False
                break
            if found:
                self.is_stuck = False
                with self._database.writing(_PRUNING_PATIENCE_S) as connection:
                    deleted += delete(connection, going, "state <> 1")
            self._pruned_to = rows[-1]["seq"]
        return deleted

    def _give_back(self, give_up_at: float) -> None:
        """Make the file smaller by the pages that hold nothing any more, in steps."""
        self._is_given_back = False
        while not self._is_given_back and monotonic() < give_up_at:
            self._is_given_back = not self._database.shrink(_PAGES_GIVEN_BACK * self._at_once, _PRUNING_PATIENCE_S)

    def drop(self, most_bytes: int) -> int:
        """Give up the oldest spans, whatever they wait for, while there are more than so many bytes; return how many.

        It takes little time: called again, it goes on.
        """
        dropped = 0
        give_up_at = monotonic() + _LONGEST_PRUNING_S
        while monotonic() < give_up_at:
            with self._database.writing() as connection:
                if size(connection) <= most_bytes:
                    break
                oldest = connection.execute("SELECT seq FROM spans ORDER BY seq LIMIT ?", (_MOST_PRUNED,)).fetchall()
                connection.execute(
                    "DELETE FROM operations WHERE span_id IN (SELECT span_id FROM spans WHERE seq <= ?)",
                    (oldest[-1]["seq"] if oldest else 0,),
                )
                dropped += delete(connection, [row["seq"] for row in oldest], "0")
        return dropped
