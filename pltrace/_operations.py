"""Sends what was asked of requests, scores and the like, once their ids are known."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

from pltrace._background import Side
from pltrace._clock import monotonic
from pltrace._exporter import ExportResult, Operation, TracksRequests
from pltrace._health import counts, warn_sometimes
from pltrace._outbox import Outbox
from pltrace._silence import be_silent
from pltrace._suspicion import FailingRequests
from pltrace._workers import Worker

__all__ = ["OperationWorker"]

_MOST_OPERATIONS = 50
#: promptlayer's client tries for about 15 seconds by itself. After the shorter time others needn't wait for it.
_LONGEST_OPERATION_S, _LONG_S = 30.0, 1.0
#: It waits for an answer without a limit, and each such call has a thread. What was sent so often isn't sent again as
#: long as no call ends, and with so many calls nothing is.
_MOST_UNANSWERED, _MOST_CALLS = 2, 8


class _Sending:
    """An operation on its way.

    Args:
        operation: What is sent.
        exporter: Where to.
        ended: Called there when the call has ended.

    Attributes:
        has_ended: Whether it has.
    """

    def __init__(self, operation: Operation, exporter: TracksRequests, ended: Callable[[], None]) -> None:
        self.operation = operation
        self.has_ended = False
        self._exporter = exporter
        self._ended = ended
        self._give_up_at = monotonic() + _LONGEST_OPERATION_S
        self._result: ExportResult | None = None

    def send(self) -> None:
        """Send it; raises nothing."""
        be_silent()
        try:
            self._result = self._exporter.operate(self.operation)
        except BaseException as error:  # One that calls sys.exit() ends itself alone.
            self._result = self._failed(error)
        self.has_ended = True
        self._ended()

    @property
    def result(self) -> ExportResult | None:
        """What became of it; None while that isn't known."""
        if self._result is None and monotonic() >= self._give_up_at:
            return self._failed(TimeoutError(f"no answer within {_LONGEST_OPERATION_S:.0f} seconds"))
        return self._result

    def _failed(self, error: BaseException) -> ExportResult:
        reason = f"didn't take a {self.operation.kind}: {type(error).__name__}: {error}"
        return ExportResult("retry", reason)


class OperationWorker(Worker):
    """Sends what was asked of requests, in order, once their ids are known.

    A thread of its own, so that spans needn't wait for it. What fails or takes long keeps back what else was asked of
    the same request, whose order stays, and not what was asked of others.

    Args:
        outbox: What is pending.
        exporter: Gave the requests their ids.
        name: What it is called in warnings.
    """

    def __init__(self, outbox: Outbox, exporter: TracksRequests, name: str) -> None:
        self._outbox = outbox
        self._exporter = exporter
        super().__init__(f"{name} (scores, metadata, links)", 0.0)

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        super().forked()
        self._failing = FailingRequests()
        # A thread that can be left behind: promptlayer's client waits without a limit.
        self._side = Side(f"pltrace-{self._exporter.name}-operations")
        self._slow: list[_Sending] = []  # They take long, and others go on meanwhile.
        self._unanswered: list[_Sending] = []  # They take so long that nobody waits for them.

    def _run(self) -> None:
        try:
            super()._run()
        finally:
            self._side.leave()

    def _is_left(self, up_to: int) -> bool:
        return bool(self._outbox.due_operations(1) or self._outbox.hopeless_operations(1))

    def _round(self) -> None:
        self._outbox.lease.renew()  # Also while a batch takes its time.
        failure: ExportResult | None = None
        while not self.pace.pausing:
            for number, kind, span_id, reason in self._outbox.hopeless_operations(_MOST_OPERATIONS):
                self._refused(number, kind, f"the request of span {span_id}", reason)
            failure = self._settle_slow() or failure
            hurried = self.pace.hurried and failure is None
            due = [] if self._is_stuck else self._due(hurried=hurried)
            if not due:
                in_s = math.inf if self._is_stuck else self._failing.next(self._underway, hurried=hurried)[0]
                if hurried and in_s < math.inf:
                    self.pace.hold(in_s)
                    return
                self.pace.finished(in_s)
                failure = failure or self._not_sent_again()
                if failure is not None:  # Last: who waits for it hurries again.
                    self.pace.put_off(failure)
                return
            failure = self._send(due) or failure

    @property
    def _underway(self) -> set[int]:
        """The requests that wait for what takes long, or for the end of what was never answered."""
        unanswered = Counter(sending.operation.request_id for sending in self._unanswered)
        often = {request_id for request_id, times in unanswered.items() if times >= _MOST_UNANSWERED}
        return often | {sending.operation.request_id for sending in self._slow}

    @property
    def _is_stuck(self) -> bool:
        return len(self._slow) + len(self._unanswered) >= _MOST_CALLS

    def _due(self, *, hurried: bool) -> list[Operation]:
        """Return the oldest operations on requests at which none has failed, or on that one whose turn it is."""
        kept_back = self._failing.ids() | self._underway
        due = self._outbox.due_operations(_MOST_OPERATIONS, kept_back)
        if due and self._failing.is_in_doubt:  # Any: the oldest may be as the one that has failed.
            firsts = {operation.request_id: operation for operation in reversed(due)}
            return [random.choice([*firsts.values()])]
        while not due:
            remaining_s, request_id = self._failing.next(self._underway, hurried=hurried)
            if remaining_s:
                break
            due = self._outbox.due_operations(_MOST_OPERATIONS, kept_back - {request_id})
            if not due:  # Another process has sent them.
                self._failing.forget(request_id)
        return due

    def _send(self, due: Sequence[Operation]) -> ExportResult | None:
        """Send operations until one fails or takes long; return the failure."""
        for operation in due:
            sending = _Sending(operation, self._exporter, self.pace.work)
            self._side.do(sending.send, _LONG_S)
            result = sending.result
            if result is None:
                self._slow.append(sending)
                return None
            failure = self._settle(operation, result)
            if failure is not None:
                return failure
        return None

    def _settle_slow(self) -> ExportResult | None:
        """Take note of what took long once there is a result; return a failure, if there is one."""
        self._unanswered = [sending for sending in self._unanswered if not sending.has_ended]
        failure = None
        for sending in [*self._slow]:
            result = sending.result
            if result is not None:
                self._slow.remove(sending)
                if not sending.has_ended:
                    self._unanswered.append(sending)
                failure = self._settle(sending.operation, result) or failure
        return failure

    def _not_sent_again(self) -> ExportResult | None:
        """Return what is the matter if something was sent often enough, and no call has ended."""
        held_back = self._underway.intersection(self._failing.ids())
        return ExportResult("retry", "doesn't answer") if held_back or self._is_stuck else None

    def _settle(self, operation: Operation, result: ExportResult) -> ExportResult | None:
        """Take note of what became of an operation; return the failure, if it is to be tried again."""
        if result.outcome in ("retry", "unauthorized"):
            all_wait = self._failing.failed(operation, result)
            if all_wait or result.outcome == "unauthorized":
                self._back_off(result)
            else:
                warn_sometimes(
                    f"operation_waits:{operation.kind}",
                    "PromptLayer doesn't take a %s for request %d: it %s. All is kept in %s and sent when it works "
                    "again; what is asked of other requests goes on.",
                    operation.kind,
                    operation.request_id,
                    result.reason,
                    self._outbox.where,
                )
            return result
        self.pace.succeeded()
        if result.outcome == "rejected":
            self._failing.forget(operation.request_id)
            self._refused(operation.number, operation.kind, f"request {operation.request_id}", result.reason)
            return None
        self._outbox.operated(operation.number)
        for blamed, reason in self._failing.taken(operation):
            self._refused(blamed.number, blamed.kind, f"request {blamed.request_id}", reason)
        return None

    def _refused(self, number: int, kind: str, which: str, reason: str) -> None:
        counts["operations_refused"] += 1
        warn_sometimes(f"operation:{kind}", "PromptLayer refuses a %s for %s: %s", kind, which, reason)
        self._outbox.operated(number, reason)
