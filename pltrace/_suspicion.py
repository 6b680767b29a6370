"""Narrows down, try after try, which span or operation a backend fails at every time while it takes others."""

from __future__ import annotations

import math
import random
from collections.abc import Collection

from pltrace._clock import monotonic
from pltrace._exporter import ExportResult, Operation
from pltrace._pace import LONGEST_BACKOFF_S, PutOff
from pltrace._rows import ReadSpan

__all__ = ["FailingRequests", "Suspicion", "may_be_the_batch"]

#: A batch that fails so often in a row may do so for what is in it; the second is for an answer that it surely isn't
#: taken. After one about the key there is a long pause: once is enough.
_FAILURES_UNTIL_SUSPECTED, _REFUSALS_UNTIL_SUSPECTED = 3, 2
#: A span has to fail alone so often, with another one taken after each; the second, when no whole answer comes, which
#: may also be for how large it is, on a bad line. When a backend fails at random, at 50 to 97 % of all posts, a
#: simulation blames one of a million spans at 500 and above, and none at other answers or closed connections, nor where
#: so many posts a second are taken, or each other one.
_FAILURES_UNTIL_BLAMED, _UNANSWERED_UNTIL_BLAMED = 5, 10
#: An operation that fails keeps back only its own request: it waits so long at first, and so many times as long each
#: time, up to the longest back-off. So five failures take more than two minutes, which few troubles of a backend do.
_FIRST_WAIT_S, _TIMES_AS_LONG = 2.0, 5


def may_be_the_batch(result: ExportResult) -> bool:
    """Return whether a batch may have failed for what is in it: nothing can be at fault that wasn't sent."""
    answered = result.suspect or result.outcome == "unauthorized"
    return (answered or result.uncertain) and not result.unknown


class Suspicion:
    """Says what is tried while a backend fails at a batch: one thing for each back-off, as without it.

    Once a batch is suspected, every other try is another span, from behind it if there is one. If that is taken, the
    batch is halved, or, when it is a single span, has failed once for what is in it. If not, the backend is in trouble,
    and the batch is kept as it is.
    """

    def __init__(self) -> None:
        #: Whether another span is to be tried next.
        self.wants_another = False
        #: Whether that is to be at once: it surely isn't taken, and that is soon said of many.
        self.at_once = False
        #: Numbers of other spans that weren't taken: they may be like the batch, and are tried if there are no others.
        self.doubtful: set[int] = set()
        self._rest: list[list[ReadSpan]] = []  # What was put off when a batch was halved, the first part last.
        self._failures = self._failures_alone = 0
        self._others_pass = False  # Another was taken since the batch failed.
        self._last = ExportResult("retry")

    def next(self) -> list[ReadSpan]:
        """Return the next part of a batch that was halved, or none."""
        return self._rest.pop() if self._rest else []

    def failed(self, result: ExportResult) -> None:
        """Take note that the batch isn't taken."""
        if may_be_the_batch(result):
            self._failures += 1
            self._last = result
        else:
            self._failures = self._failures_alone = 0
        to_key = result.outcome == "unauthorized"
        most = _FAILURES_UNTIL_SUSPECTED if result.uncertain else _REFUSALS_UNTIL_SUSPECTED
        self.wants_another = self._failures >= (1 if to_key else most)
        may_go_on = result.retry_after_s is None and (self._others_pass or not to_key)
        self.at_once = self.wants_another and not result.uncertain and may_go_on

    def another_failed(self, another: ReadSpan) -> None:
        """Take note that the other span isn't taken either."""
        self.wants_another = self.at_once = self._others_pass = False
        if another.seq not in self.doubtful:  # Else it says nothing new.
            self.doubtful.add(another.seq)
            self._failures_alone = 0

    def narrowed(self, batch: list[ReadSpan], another: ReadSpan | None) -> list[ReadSpan]:
        """Return what of a batch is tried next.

        Args:
            batch: What has failed.
            another: What was taken; None if there is no other to try, and nobody is blamed.
        """
        self.wants_another = self.at_once = False
        self._others_pass = self._others_pass or another is not None
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
        unanswered = self._last.uncertain and not self._last.suspect
        if self._failures_alone < (_UNANSWERED_UNTIL_BLAMED if unanswered else _FAILURES_UNTIL_BLAMED):
            return ""
        return f"{self._last.reason} ({self._failures_alone} times to this span alone, and took another one after each)"

    def settled(self) -> None:
        """Take note that the batch is taken or set aside."""
        self.wants_another = self.at_once = False
        self._failures_alone = 0
        if self._rest:  # The next part is of what has failed.
            self._others_pass = True
        else:
            self._failures, self._others_pass = 0, False


class _Failure(PutOff):
    """An operation that has failed, and keeps back what else was asked of its request."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.alone = 0  # How often another of its kind was taken right after it had failed.
        self.reason = ""
        self._wait_s = self._counts_at = self._not_before = 0.0

    def failed_by(self, result: ExportResult) -> None:
        """Take note that it failed, and why; one that was hurried doesn't count, nor makes the next wait longer."""
        now = monotonic()
        if now >= self._counts_at:
            self._wait_s = min(max(self._wait_s * _TIMES_AS_LONG, _FIRST_WAIT_S), LONGEST_BACKOFF_S)
            self._counts_at = now + self._wait_s
            self.just_now = self.just_now or result.suspect
        self._not_before = now + (result.retry_after_s or 0.0)
        self.due_at = max(now + self._wait_s * random.uniform(1, 1.25), self._not_before)
        self.reason = result.reason

    @property
    def asked_to_wait_s(self) -> float:
        """How long the backend has asked to leave it alone."""
        return max(self._not_before - monotonic(), 0.0)


class FailingRequests:
    """Says what is tried while a backend fails at operations on some requests: it may be in trouble, or it may be them.

    Only their requests wait, each longer each time. If another operation of the kind is taken right after one has
    failed, it has failed for what is in it; if another fails then, the backend is in trouble, and nobody is blamed.
    """

    def __init__(self) -> None:
        #: Whether the first operation of a request has failed, and nothing was taken since.
        self.is_in_doubt = False
        self._failing: dict[int, _Failure] = {}  # By request.
        self._again = PutOff()  # All of them, while nothing is taken.

    def ids(self) -> set[int]:
        """Return the ids of the requests."""
        return set(self._failing)

    def failed(self, operation: Operation, result: ExportResult) -> bool:
        """Take note that an operation isn't taken; return whether all wait: the backend may be in trouble, or asks to.

        One whose answer to the same operation is the same each time asks for that one alone, unless it is too much that
        was asked (429), of whatever.
        """
        failure = self._failing.get(operation.request_id)
        all_wait = result.retry_after_s is not None
        if failure is None or failure.operation.number != operation.number:
            self._acquit(operation.kind)
            failure = self._failing[operation.request_id] = _Failure(operation)
            all_wait, self.is_in_doubt = all_wait or self.is_in_doubt, True
        else:  # It says nothing new of the others.
            self._again.failed(None)
            all_wait = all_wait and not result.suspect
        failure.failed_by(result)
        return all_wait

    def taken(self, operation: Operation) -> list[tuple[Operation, str]]:
        """Take note that an operation is taken; return those that are blamed now, and why."""
        self.is_in_doubt, self._again = False, PutOff()
        if self._failing.pop(operation.request_id, None) is not None:  # When it failed, it was the backend.
            for kind in {failure.operation.kind for failure in self._failing.values()}:
                self._acquit(kind)
            return []
        for failure in self._of_kind(operation.kind):
            failure.alone += failure.just_now
            failure.just_now = False
        blamed = [one for one in self._of_kind(operation.kind) if one.alone >= _FAILURES_UNTIL_BLAMED]
        for failure in blamed:
            self.forget(failure.operation.request_id)
        return [
            (one.operation, f"{one.reason} ({one.alone} times, and took another {one.operation.kind} after each)")
            for one in blamed
        ]

    def forget(self, request_id: int) -> None:
        """Take note that what has failed of a request doesn't wait any more."""
        self._failing.pop(request_id, None)

    def next(self, without: Collection[int], *, hurried: bool = False) -> tuple[float, int]:
        """Return in how many seconds the next is due, and which one; if there is none, in infinitely many.

        Args:
            without: Not these.
            hurried: They are due at once, but for what the backend has asked.
        """
        again_s = 0.0 if hurried else self._again.remaining_s
        due = [
            (max(one.asked_to_wait_s if hurried else one.remaining_s, again_s), one.remaining_s, one_id)
            for one_id, one in self._failing.items()
            if one_id not in without
        ]
        in_s, _, next_id = min(due, default=(math.inf, math.inf, 0))
        return in_s, next_id

    def _acquit(self, kind: str) -> None:
        for failure in self._of_kind(kind):
            failure.alone, failure.just_now = 0, False

    def _of_kind(self, kind: str) -> list[_Failure]:
        """Return what has failed of a kind: others go to another address, which may work or fail by itself."""
        return [failure for failure in self._failing.values() if failure.operation.kind == kind]
