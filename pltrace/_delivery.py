"""Drains the store into one exporter, from a background thread: batches, retries, and a place for poison."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence

from pltrace._exporter import ExportResult, SpanExporter, TracksRequests
from pltrace._health import counts, log, warn_sometimes
from pltrace._outbox import Outbox
from pltrace._pace import PutOff
from pltrace._rows import ReadSpan
from pltrace._search import PoisonSearch
from pltrace._suspicion import Suspicion, may_be_the_batch
from pltrace._workers import Worker

__all__ = ["DeliveryWorker"]

MOST_SPANS = 200
MOST_BYTES = 2_000_000
#: Of spans that may have arrived, each trace has to be asked for: not too many questions for one try to fail at.
_MOST_UNCERTAIN = 20
#: A span waits so long for others to share its request.
LINGER_S = 0.5
#: When all of a batch is refused, and it is larger, or so many small ones were in a row, it may not be the spans.
_MOST_BLAMED_AT_ONCE = 2
_MOST_REFUSED_IN_A_ROW = 10


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
