"""Drains the store into one exporter, from background threads: batches, retries, and a place for poison."""

from __future__ import annotations

import logging
import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pltrace._background import Background, Side
from pltrace._clock import monotonic
from pltrace._database import STORE_TROUBLE
from pltrace._exporter import ExportResult, Operation, SpanExporter, TracksRequests
from pltrace._greenlets import new_lock
from pltrace._health import counts, failed, log, warn_sometimes
from pltrace._outbox import Outbox
from pltrace._pace import Pace, PutOff
from pltrace._rows import ReadSpan
from pltrace._search import PoisonSearch
from pltrace._silence import be_silent
from pltrace._suspicion import FailingRequests, Suspicion, may_be_the_batch

__all__ = ["DeliveryWorker", "OperationWorker"]

MOST_SPANS = 200
MOST_BYTES = 2_000_000
#: Of spans that may have arrived, each trace has to be asked for: not too many questions for one try to fail at.
_MOST_UNCERTAIN = 20
#: A span waits so long for others to share its request.
LINGER_S = 0.5
#: How often processes that ended are looked for, and the lease is renewed.
_LOOK_ROUND_EVERY_S = 15.0
#: When all of a batch is refused, and it is larger, or so many small ones were in a row, it may not be the spans.
_MOST_BLAMED_AT_ONCE = 2
_MOST_REFUSED_IN_A_ROW = 10
_MOST_OPERATIONS = 50
#: promptlayer's client tries for about 15 seconds by itself. After the shorter time others needn't wait for it.
_LONGEST_OPERATION_S, _LONG_S = 30.0, 1.0
#: It waits for an answer without a limit, and each such call has a thread. What was sent so often isn't sent again as
#: long as no call ends, and with so many calls nothing is.
_MOST_UNANSWERED, _MOST_CALLS = 2, 8


class Worker(ABC):
    """A thread, started by its first work, that goes round when its pace lets it.

    Args:
        name: What it is called in warnings and lists of threads.
        linger_s: Work waits so long for more of it.
        is_users: It runs code of the user's.
    """

    _outbox: Outbox

    def __init__(self, name: str, linger_s: float, *, is_users: bool = False) -> None:
        self._name = name
        self._linger_s = linger_s
        self._is_users = is_users
        self.forked()

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        self.pace = Pace(self._name, self._linger_s, _LOOK_ROUND_EVERY_S)
        self._thread: Background | None = None
        self._starting = new_lock()

    def work(self) -> None:
        """Take note of new work."""
        self.pace.work()
        self.start()

    def start(self) -> bool:
        """Start the thread if there is none; return whether there is one."""
        if not self._starting.acquire(blocking=False):
            return True  # Another caller does; two threads would send all twice.
        try:
            if self._thread is None or not self._thread.is_alive():
                self._thread = Background(self._run, f"pltrace-{self._name}", is_users=self._is_users).start()
            return True
        except RuntimeError:
            return False  # The interpreter is shutting down; the next process delivers.
        finally:
            self._starting.release()

    def _run(self) -> None:
        be_silent()
        while self.pace.wait():
            try:
                self._round()
            except STORE_TROUBLE as error:
                self._back_off(ExportResult("retry", f"waits for the store: {error}"))
            except Exception as error:
                failed(f"delivering to {self._name}")  # All is still in the store.
                self._back_off(ExportResult("retry", str(error)))

    def _back_off(self, result: ExportResult) -> None:
        self.pace.back_off(result, self._outbox.where)

    @abstractmethod
    def _round(self) -> None:
        """Deliver what is due."""

    @abstractmethod
    def _is_left(self, up_to: int) -> bool:
        """Return whether something of what is to be flushed isn't delivered yet."""

    def stop(self) -> None:
        """Let the thread end after what it is at: what is left is another's to deliver."""
        self.pace.stop()

    def flush(self, up_to: int, deadline: float, *, patient: bool) -> bool:
        """Deliver what is in the store up to a span's number.

        Args:
            up_to: The number of the last span.
            deadline: Monotonic time to give up at.
            patient: Goes on after a try has failed.

        Returns:
            Whether all of it was delivered or set aside.
        """
        if not self._is_left(up_to):
            return True
        failed_tries = None if patient else self.pace.failed_tries
        self.pace.hurry()
        if not self.start():
            return False
        while self._is_left(up_to):
            if not self.pace.wait_for_round(deadline, failed_tries):
                return False
        return True


class DeliveryWorker(Worker):
    """Sends one exporter the spans that are pending for it, for as long as it takes.

    Args:
        outbox: What is pending.
        exporter: Where to.
        resolved: Called with the ids that LLM calls got: span id → request id.
        gave_up: Called with the id of a span that gets none: it was set aside, or taken without an id.
    """

    def __init__(
        self,
        outbox: Outbox,
        exporter: SpanExporter,
        resolved: Callable[[Mapping[str, int]], None],
        gave_up: Callable[[str], None],
    ) -> None:
        self.exporter = exporter
        #: Called after each look at what processes left, with how much was taken over; it may be operations alone.
        self.looked_round: Callable[[int], object] = int
        self._outbox = outbox
        self._resolved = resolved
        self._gave_up = gave_up
        super().__init__(exporter.name, LINGER_S, is_users=not isinstance(exporter, TracksRequests))

    def forked(self) -> None:
        """Start afresh, as in the child of a fork."""
        super().forked()
        self._batch: list[ReadSpan] = []  # What a retry sends again: the same spans, so the same bytes.
        self._suspicion = Suspicion()
        self._asking = PutOff()  # About spans that may have arrived.
        self._unsent_first = True  # What a process that ended got no answer about may never get one.
        self._refused_in_a_row, self._took_some = 0, False
        self._witness = 0  # Spans up to this number are refused for what is in them: a newer one was taken since.

    def _is_left(self, up_to: int) -> bool:
        # The store says that a batch is delivered before those who wait for its ids are told.
        being_told = any(span.seq <= up_to for span in self._batch)
        return self._outbox.is_pending(self.exporter.name, up_to) or being_told

    def _round(self) -> None:
        """Deliver batches until nothing is pending or something stands in the way."""
        self._outbox.lease.renew()
        self.looked_round(self._outbox.lease.adopt())
        while not self.pace.pausing:
            batch = self._batch or self._suspicion.next() or self._claim()
            if not batch:
                self._witness, self._suspicion = 0, Suspicion()
                self.pace.finished(self._asking.remaining_s or math.inf)
                return
            if any(span.uncertain for span in batch):
                batch = batch[:_MOST_UNCERTAIN]
            self._batch, self._took_some = batch, False
            try:
                result = self._try_another(batch) or self._try(batch)
                if self._suspicion.at_once:
                    result = self._go_on(result)
            except Exception:
                # It may have arrived, and the store failed to take note: it knows that it may have.
                self._batch, self._suspicion = [], Suspicion()
                raise
            if result.outcome != "delivered":
                if self._took_some:  # In the middle of a search for what is refused: the other side works.
                    self.pace.succeeded()
                self._back_off(result)
                return
            self.pace.succeeded()
            self._outbox.lease.renew()

    def _claim(self) -> list[ReadSpan]:
        """Return what is next: the oldest; of what may have arrived none while the backend can't say what it has."""
        name = self.exporter.name
        if self._unsent_first:
            batch = self._outbox.claim(name, MOST_SPANS, MOST_BYTES, unsent=True)
            self._unsent_first = bool(batch)
            if batch:
                return batch
        just_now, self._asking.just_now = self._asking.just_now, False
        if just_now or self._asking.remaining_s:
            # Each that isn't taken either may have arrived: one is enough to see.
            batch = self._outbox.claim(name, 1 if just_now else MOST_SPANS, MOST_BYTES, unsent=True)
            if batch or (self._asking.remaining_s and not self.pace.hurried):
                return batch
        return self._outbox.claim(name, MOST_SPANS, MOST_BYTES)

    def _try(self, batch: list[ReadSpan]) -> ExportResult:
        """Deliver a batch, or the first half of one that has failed while there is no other span to try."""
        if self._suspicion.wants_another:  # And there is none.
            self._batch = batch = self._suspicion.narrowed(batch, None)
        return self._deliver(batch)

    def _go_on(self, failure: ExportResult) -> ExportResult:
        """Try another span right after a batch has failed."""
        again = None
        if random.random() < 0.5:  # Not in step with backends that take turns, of which one fails.
            again = self._deliver(self._batch)
            if again.outcome == "delivered":
                return again
        return self._try_another(self._batch) or again or failure

    def _deliver(self, batch: list[ReadSpan]) -> ExportResult:
        """Send a batch, without what is refused of it."""
        result = self._send(batch)
        if result.unknown:  # What else isn't taken is claimed again, without them.
            self._batch, self._suspicion = [], Suspicion()
            batch = [span for span in batch if span.span_id not in result.unknown]
        if result.outcome == "rejected":
            result = self._without_poison(batch, result)
        if result.outcome == "delivered":
            self._batch = []
            self._suspicion.settled()
        else:
            self._suspicion.failed(result)
        return result

    def _try_another(self, batch: list[ReadSpan]) -> ExportResult | None:
        """Send another span than a batch that the backend fails at, if it is time for that and there is one."""
        if not self._suspicion.wants_another:
            return None
        # One that comes soon: else an outage leaves spans that may have arrived all over a long queue.
        doubtful = self._suspicion.doubtful
        another = self._outbox.another(self.exporter.name, batch[-1].seq, MOST_SPANS, doubtful)
        if another is None and len(batch) > 1:
            another = self._outbox.another(self.exporter.name, batch[0].seq, MOST_SPANS, doubtful)
        if another is None or (len(batch) > 1 and another.seq in doubtful):
            return None
        result = self._send([another])
        if not self._took_some:
            self._suspicion.another_failed(another)
            return result
        self._batch = self._suspicion.narrowed(batch, another)
        if self._suspicion.verdict:
            self._set_aside(batch, {batch[0].seq: self._suspicion.verdict})
            self._batch = []
            self._suspicion.settled()
        return result

    def _send(self, batch: Sequence[ReadSpan]) -> ExportResult:
        """Send spans, and write down what became of them."""
        name = self.exporter.name
        batch = self._outbox.sending(name, batch)
        if not batch:
            return ExportResult("delivered")  # Another process has taken it over.
        try:
            result = self.exporter.export(batch)
            if not isinstance(result, ExportResult):
                raise TypeError(f"export() has to return an ExportResult, and returned {result!r}")
        except BaseException as error:  # One that calls sys.exit() ends itself, not our thread.
            log(
                logging.ERROR,
                "Exporter %r raised; its batch of %d spans is tried again",
                name,
                len(batch),
                exc_info=True,
            )
            result = ExportResult("retry", f"raised {type(error).__name__}: {error}", uncertain=True)
        if result.unknown:
            self._asking.failed(result.retry_after_s)
        elif result.outcome == "delivered" and any(span.uncertain for span in batch):
            self._asking = PutOff()
        if result.outcome == "delivered":
            self._taken(batch, result)
            return result
        if result.uncertain:
            self._batch = [span.as_uncertain() for span in self._batch]
        self._outbox.not_taken(name, batch, result.reason, surely=not result.uncertain)
        return result

    def _taken(self, batch: Sequence[ReadSpan], result: ExportResult) -> None:
        batch = [span for span in batch if span.span_id not in result.unknown]
        taken = [span for span in batch if span.span_id not in result.refused]
        self._outbox.delivered(self.exporter.name, taken, result.request_ids)
        self._refused_in_a_row, self._took_some = 0, bool(taken)
        counts["delivered"] += len(taken)
        if len(taken) < len(batch):
            aside = [span for span in batch if span.span_id in result.refused]
            self._set_aside(aside, {span.seq: result.refused[span.span_id] for span in aside})
        if result.request_ids:
            self._resolved(result.request_ids)
        if isinstance(self.exporter, TracksRequests):
            self._without_id([span for span in taken if span.span_id not in result.request_ids])

    def _without_id(self, spans: Sequence[ReadSpan]) -> None:
        """Say which LLM calls were taken without being logged, as with a prompt link that the backend doesn't know."""
        calls = [span for span in spans if span.row.kind == "llm" and span.request_id is None]
        for span in calls:
            self._gave_up(span.span_id)
        if calls:
            counts["requests_without_id"] += len(calls)
            warn_sometimes(
                f"without_id:{self.exporter.name}",
                "%s took the spans of %d LLM call(s) and logged no request for them (the first: span %s). Their "
                "on_request functions are not called, and scores or metadata for them are refused.",
                self.exporter.name,
                len(calls),
                calls[0].span_id,
            )

    def _without_poison(self, batch: list[ReadSpan], refusal: ExportResult) -> ExportResult:
        """Deliver a refused batch without the spans that it is refused for, and set those aside."""
        name = self.exporter.name
        search = PoisonSearch(self._send, lambda: self._outbox.newest(name, batch[-1].seq))
        few = len(batch) <= _MOST_BLAMED_AT_ONCE and self._refused_in_a_row < _MOST_REFUSED_IN_A_ROW
        result = search.run(batch, refusal, doubtful=not few and batch[-1].seq > self._witness)
        self._witness = max(self._witness, search.witness)
        if not search.taken:
            self._refused_in_a_row += len(search.poison)
        if not may_be_the_batch(result):  # Else it is narrowed down, and what of it isn't pending any more isn't sent.
            self._batch = []  # What is left of it is claimed again.
        self._set_aside(
            [span for span, _ in search.poison.values()], {seq: reason for seq, (_, reason) in search.poison.items()}
        )
        return result

    def _set_aside(self, spans: Sequence[ReadSpan], reasons: dict[int, str]) -> None:
        kept = self._outbox.quarantine(self.exporter.name, reasons) if spans else {}
        spans = [span for span in spans if span.seq in kept]
        if not spans:
            return
        counts["quarantined"] += len(spans)
        for span in spans:
            self._gave_up(span.span_id)
        warn_sometimes(
            f"quarantine:{self.exporter.name}",
            "%s refuses %d span(s) for what is in them: it %s. They are kept in quarantine, the rest goes on; "
            "`pltrace doctor` lists them.",
            self.exporter.name,
            len(spans),
            reasons[spans[0].seq],
        )


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
