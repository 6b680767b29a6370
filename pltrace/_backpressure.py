"""Bounds how much waits to be written: says how many ended spans may, and holds up who records past that."""

from __future__ import annotations

import time
from collections.abc import Sized
from typing import Any

from pltrace._clock import monotonic
from pltrace._greenlets import is_ours
from pltrace._snapshot import PLAIN
from pltrace._span import Span

__all__ = ["MOST_QUEUED", "Backpressure"]

#: Past so many ended spans in memory, or so many bytes, whoever records waits for the writer: a moment for each span,
#: so that no call is held up by much and a stall of the disk costs none; past `_FULL` times as many, up to a second,
#: and then the span is given up. Not more: Python's garbage collector goes over all of them, in whoever's call it runs.
MOST_QUEUED = 4_000
_MOST_BYTES = 2**25
_FULL = 5
_MOMENT_S, _LONGEST_WAIT_S, _LOOK_EVERY_S = 0.02, 1.0, 0.002
#: Once somebody was held up, more comes in than can be written, and a long queue does no more than delay what is in it.
#: Until nobody has been held up for so long, it is what is encoded in so much time: what waits there is too short-lived
#: to bring the garbage collector's full collections nearer, and a `kill -9` takes the less. Not what is written: where
#: the file is waited for, shorter queues would make smaller commits, and these shorter queues.
_CALM_AFTER_S, _MOST_BEHIND_S, _FEWEST = 1.0, 0.02, 100
#: When the writer can't write for so long, or is at one commit for so long, it isn't merely slow: nobody waits for it.
_FAILS_AFTER_S, _HANGS_AFTER_S = 1.0, 10.0
#: So long spans count for the size of late as soon as they are encoded; a text that is no longer is a small one.
_LONG, _SMALL = 2**15, 1_000


class Backpressure:
    """The bound of one queue, which follows what is in it and what its writer can do.

    Attributes:
        most: How many items may wait. Who has put one more into the queue calls `hold_up`.
        wrote_at: When the last commit was done; monotonic.
        is_lifted: Whether nobody is held up, nor writes what he records: it is drained together afterwards.
    """

    def __init__(self) -> None:
        self.most = MOST_QUEUED
        self.wrote_at = monotonic()
        self.is_lifted = False
        self._began_at = 0.0  # When the commit began that isn't done yet; 0 between commits.
        self._fails = False
        self._held_up_at = -_CALM_AFTER_S
        # How large spans were of late, and how long one took to be encoded.
        self._span_bytes, self._span_s = 1_000.0, 0.0

    # The caller's.

    def hold_up(self, queue: Sized, item: object) -> bool:
        """Wait until the writer has caught up, for a moment; while it can't write at all, not at all.

        Args:
            queue: What waits, `item` included.
            item: What was put there last.

        Returns:
            Whether there is no room for it even so.
        """
        if self.is_lifted or is_ours():
            return False
        began = monotonic()
        if began > self._held_up_at + _CALM_AFTER_S:  # There may have been no commit since.
            self.most = self._room()
        full = _FULL * (MOST_QUEUED if _is_small(item) else self._room())
        while (queued := len(queue)) > self.most:
            now = monotonic()
            is_full = queued > full
            fails = self._fails and now > self.wrote_at + _FAILS_AFTER_S
            hangs = self._began_at and now > self._began_at + _HANGS_AFTER_S
            if fails or hangs or now > began + (_LONGEST_WAIT_S if is_full else _MOMENT_S):
                return is_full
            self._held_up_at = now
            time.sleep(_LOOK_EVERY_S)
        return False

    # The writer's.

    def began(self) -> None:
        """Take note that a commit is begun."""
        self._began_at = monotonic()

    def encoded_one(self, characters: int) -> None:
        """Take note of how large an item is, in the midst of a commit: a long one counts at once."""
        if characters > _LONG:
            self._span_bytes += (characters - self._span_bytes) / 2
            self.most = min(self.most, self._room())

    def encoded(self, items: int, characters: int) -> None:
        """Take note that all items of the commit are encoded."""
        self._span_s += ((monotonic() - self._began_at) / max(items, 1) - self._span_s) / 8
        if items:
            self._span_bytes += (characters / items - self._span_bytes) / 2

    def wrote(self, spans: int) -> None:
        """Take note that the commit is done, with so many spans."""
        self.wrote_at = monotonic()
        self._began_at, self._fails = 0.0, False
        self.most = self._most_after(spans)

    def failed(self) -> None:
        """Take note that the commit couldn't be done; it is tried again."""
        self._began_at, self._fails = 0.0, True
        self.most = self._room()

    def _room(self) -> int:
        """Return how many spans of the size of late may wait in memory."""
        return max(min(MOST_QUEUED, int(_MOST_BYTES / self._span_bytes)), _FEWEST)

    def _most_after(self, written: int) -> int:
        most = self._room()
        if self.wrote_at > self._held_up_at + _CALM_AFTER_S:
            return most
        enough = max(int(_MOST_BEHIND_S / max(self._span_s, 1e-6)), _FEWEST)
        # Step by step: half of what is written makes room for others meanwhile.
        return min(most, max(enough, self.most - written // 2))


def _is_small(item: Any) -> bool:
    """Return whether an item surely takes little room: a block, say, or a call with a number and a short text."""
    if not isinstance(item, Span):
        return True  # Something that is asked of a request.
    _, args, kwargs = item.arguments or (None, (), {})
    return all(
        type(value) in PLAIN and (not isinstance(value, (str, bytes)) or len(value) <= _SMALL)
        for value in (item.raw_input, item.raw_output, *args, *kwargs.values())
    )
