"""Takes ended spans on the caller's path, hands them to the writer, and gives out what is kept of them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from pltrace._commit import Ask
from pltrace._encoding import Encoder
from pltrace._health import counts
from pltrace._record import row_of
from pltrace._request import Registry, Request, Waiting
from pltrace._rows import record_of
from pltrace._runs import open_runs
from pltrace._scope import Inherited, ScopeSpan
from pltrace._span import Span
from pltrace._store import Store
from pltrace._usage import place_of
from pltrace._writer import Writer

__all__ = ["SpanRecorder"]

#: How long the writer is waited for, by who reads what it has to write, and by who only asks whether it is there.
_READING_S, _ASKING_S = 5.0, 1.0


class SpanRecorder:
    """Where spans go when they end; their ids and times come from here too.

    Args:
        store: What the writer commits to.
        encoder: Bounds and redacts what is written.
        callbacks: Runs `on_request` functions.
        wrote: Called by the writer after each commit.
        began: Called when the writer is started, by the first to record in a process.
        sample: The share of traces that is recorded.
        service: Names the application.
    """

    def __init__(
        self,
        store: Store,
        encoder: Encoder,
        callbacks: Waiting,
        wrote: Callable[[], None],
        began: Callable[[], None],
        sample: float = 1.0,
        service: str = "",
    ) -> None:
        self.store = store
        self.writer = Writer(store, encoder, service, Registry(self, callbacks), wrote, began)
        self._callbacks = callbacks
        self._encoder = encoder
        self._service = service
        self.sample = sample
        self._random = random.Random()
        self.now_ns = time.time_ns
        self.opened: Callable[[ScopeSpan], None] | None = None
        self._forked_at_ns = 0
        self._successor: Callable[[Span | Ask], None] | None = None  # Takes all, once there are other settings.
        self._start_afresh()

    def _start_afresh(self) -> None:
        #: Returns a span's id: the next one, from a random one on. Ids that grow are added at the end of the store's
        #: indexes. Each random one would change another page of these, the more there are, and a commit write them all.
        self.new_span_bits: Callable[[], int] = itertools.count(self._random.getrandbits(63) + 1).__next__

    @property
    def registry(self) -> Registry:
        """Who waits for the ids of requests, and their handles."""
        return self.writer.registry

    def sampled(self, share: float | None = None) -> bool:
        """Decide whether a new trace is recorded; None stands for the application's share."""
        share = self.sample if share is None else share
        return share >= 1.0 or self._random.random() < share

    # The caller's path.

    def new_trace_bits(self) -> int:
        """Return a trace's id: the time in seconds, which grows as spans' ids do, and 96 random bits.

        W3C wants the last 56 to be random (https://www.w3.org/TR/trace-context-2/#random-trace-id-flag).
        """
        return (self.now_ns() // 1_000_000_000 & 0xFFFFFFFF) << 96 | self._random.getrandbits(96)

    def record(self, span: Span) -> None:
        """Take an ended span; never raises, never waits for a disk or a network.

        A span that was opened before a fork is its parent process's to record.
        """
        if not span.inherited.sampled:
            counts["sampled_out"] += 1
            counts["runs_seen"] += span.run_key is not None
        elif span.started_at_ns > self._forked_at_ns or self._clock_went_back():
            if self._successor is not None:
                self._successor(span)
                return
            # As in `Writer.put`: a call for each span would be a tenth of all that is done here.
            writer = self.writer
            queue = writer.queue
            queue.append(span)
            if writer.asleep or writer.thread is None:
                writer.rouse()
            if len(queue) > writer.bound.most and writer.bound.hold_up(queue, span):
                writer.drop_newest()

    def operate(
        self,
        kind: str,
        trace_bits: int,
        span_bits: int,
        arguments: Mapping[str, Any],
        request_id: int | None,
    ) -> None:
        """Take something that is asked of a request, whose id is given if it is known."""
        self._put(Ask(kind, trace_bits, span_bits, dict(arguments), False, request_id))

    def operate_under(self, span: Span, kind: str, arguments: Mapping[str, Any]) -> None:
        """Take something that is asked of all requests under a span."""
        # Of requests from before a fork some may be the parent's to write yet.
        under = span if span.started_at_ns > self._forked_at_ns else None
        self._put(Ask(kind, span.trace_bits, span.span_bits, dict(arguments), True, under=under))

    def track(self, kind: str, request_id: int, arguments: Mapping[str, Any]) -> None:
        """Take something that is asked of a request by its id."""
        self._put(Ask(kind, 0, 0, dict(arguments), False, request_id))

    def _put(self, item: Span | Ask) -> None:
        if self._successor is not None:
            self._successor(item)
        else:
            self.writer.put(item)

    def _clock_went_back(self) -> bool:
        """Return whether the clock was set back after a fork: then it doesn't tell any more what began before it."""
        if self.now_ns() > self._forked_at_ns:
            return False
        self._forked_at_ns = 0
        return True

    # What others ask of it.

    def readable(self, span: Span) -> Mapping[str, Any]:
        """Return what is kept of a span, as JSON-like data."""
        return record_of(row_of(span, self._encoder, self._service))

    def handed_on(self, inherited: Inherited) -> Mapping[str, Any]:
        """Return what may leave the process of tags, metadata, user and session, as JSON-like data."""
        label = self._encoder.label
        return {
            "tags": label(inherited.tags, "tags"),
            "metadata": self._encoder.jsonable(inherited.metadata),
            "user": label(inherited.user, "user"),
            "session": label(inherited.session, "session"),
        }

    def stored(self, span_bits: int) -> Mapping[str, Any] | None:
        """Return what the store holds of a span, waiting for the writer; None if it holds nothing."""
        self.writer.drain(_READING_S)
        return self.store.record(f"{span_bits:016x}")

    def operations_of(self, span_bits: int) -> list[dict[str, Any]]:
        """Return what was asked of a request so far, waiting for the writer: its `kind`, and its arguments."""
        self.writer.drain(_READING_S)
        return self.store.operations_of(f"{span_bits:016x}")

    def request_of(self, span_bits: int) -> tuple[int | None, bool]:
        """Return the id that a request got, or None, and whether one can still come."""
        return self.store.request_of(f"{span_bits:016x}")

    def is_missing(self, span_bits: int) -> bool:
        """Return whether a run's span is neither open nor stored, waiting for the writer: it was dropped, or pruned."""
        if any(run.span_bits == span_bits for run in open_runs.copy().values()):
            return False
        return self.writer.drain(_ASKING_S) and self.store.record(f"{span_bits:016x}") is None

    def requests_of(self, span: Span, request_bits: list[int]) -> list[Request]:
        """Return handles of the requests of those span ids."""
        places = [place_of(bits, span) for bits in request_bits]
        return [
            self.registry.handle(trace_bits, bits, closed=not is_recorded)
            for bits, (trace_bits, is_recorded) in zip(request_bits, places, strict=True)
        ]

    def succeed(self, before: SpanRecorder) -> None:
        """Take over from the recorder of earlier settings: what is still open there is recorded here when it ends."""
        if before.store.database is self.store.database:
            self.writer.registry = before.registry
            self.registry.serve(self, self._callbacks)
        else:
            before.registry.shut()
            before.writer.registry = self.registry
        before._retire_for(self)

    def _retire_for(self, successor: SpanRecorder) -> None:
        same_store = successor.store.database is self.store.database

        def put(item: Span | Ask) -> None:
            # What is asked of a request is of use where the request's span is; those under a span may be in both.
            if not same_store and type(item) is Ask:
                item = item._replace(under=None)  # Of those that either hasn't, nobody can tell whether it had them.
                self.writer.put(item)
            if same_store or type(item) is not Ask or item.subtree:
                successor._put(item)

        self._successor = put

    def after_fork_in_child(self) -> None:
        """Start afresh: what is queued here is the parent's to write."""
        self._forked_at_ns = time.time_ns()
        self._random.seed()
        self._start_afresh()
        self.writer.start_afresh()
        self.registry.forked()
        self.store.forked()
