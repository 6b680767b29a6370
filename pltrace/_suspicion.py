"""Narrows down, try after try, which span a backend fails at every time while it takes others."""

from __future__ import annotations

from pltrace._exporter import ExportResult
from pltrace._rows import ReadSpan

__all__ = ["Suspicion"]

#: A batch that fails so often in a row may do so for what is in it.
_FAILURES_UNTIL_SUSPECTED = 3
#: A span has to fail alone so often, with another one taken after each. When a backend fails at random, at 50 to 97 %
#: of all posts, a simulation blames 170 of a million spans after three times, 20 after four, and 5 after five.
_FAILURES_UNTIL_BLAMED = 5


class Suspicion:
    """Says what is tried while a backend fails at a batch: one thing for each back-off, as without it.

    Once a batch is suspected, every other try is another span, from behind it. If that is taken, the batch is halved,
    or, when it is a single span, has failed once for what is in it. If not, the backend is in trouble, and the batch is
    kept as it is.
    """

    def __init__(self) -> None:
        #: Whether another span is to be tried next.
        self.wants_another = False
        #: Numbers of other spans that weren't taken: they may be like the batch, and are tried if there are no others.
        self.doubtful: set[int] = set()
        self._rest: list[list[ReadSpan]] = []  # What was put off when a batch was halved, the first part last.
        self._failures = self._failures_alone = 0
        self._reason = ""

    def next(self) -> list[ReadSpan]:
        """Return the next part of a batch that was halved, or none."""
        return self._rest.pop() if self._rest else []

    def failed(self, result: ExportResult) -> None:
        """Take note that the batch isn't taken."""
        if result.suspect:
            self._failures += 1
            self._reason = result.reason
        else:
            self._failures = self._failures_alone = 0
        self.wants_another = self._failures >= _FAILURES_UNTIL_SUSPECTED

    def another_failed(self, another: ReadSpan) -> None:
        """Take note that the other span isn't taken either."""
        self.wants_another = False
        if another.seq not in self.doubtful:  # Else it says nothing new.
            self.doubtful.add(another.seq)
            self._failures_alone = 0

    def narrowed(self, batch: list[ReadSpan], another: ReadSpan | None) -> list[ReadSpan]:
        """Return what of a batch is tried next.

        Args:
            batch: What has failed.
            another: What was taken; None if there is no other to try, and nobody is blamed.
        """
        self.wants_another = False
        if len(batch) > 1:
            middle = len(batch) // 2
            self._rest.append(batch[middle:])
            self._failures_alone = 0
            return batch[:middle]
        if another is not None and another.seq in self.doubtful:  # When it failed, it was the backend.
            self.doubtful.clear()
            self._failures_alone = 0
        elif another is not None:
            self._failures_alone += 1
        return batch

    @property
    def verdict(self) -> str:
        """Why the single span that is left is set aside; empty as long as it isn't."""
        if self._failures_alone < _FAILURES_UNTIL_BLAMED:
            return ""
        return f"{self._reason} ({self._failures_alone} times to this span alone, and took another one after each)"

    def settled(self) -> None:
        """Take note that the batch is taken or set aside."""
        self.wants_another = False
        self._failures_alone = 0
        if not self._rest:  # Else the next part is of what has failed.
            self._failures = 0
