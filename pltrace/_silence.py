"""The scope of our own work: what runs in it is not traced, even if it calls functions that are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pltrace._health import counts
from pltrace._scope import Inherited, ScopeCopy, attach, current
from pltrace._span import INERT_SPAN, Span

if TYPE_CHECKING:
    from pltrace._request import Request

__all__ = ["be_silent", "silence"]


class _DeafRecorder:
    """Takes everything, counts the spans, and keeps nothing."""

    opened = None
    new_span_bits = new_trace_bits = itertools.count(1).__next__
    now_ns = staticmethod(time.time_ns)

    def sampled(self, share: float | None = None) -> bool:
        return False

    def record(self, span: Span) -> None:
        # A redactor's, but also a finalizer's or signal handler's that came in the middle of our work.
        counts["runs_seen"] += span.run_key is not None
        counts["dropped_in_own_work"] += 1

    def operate_under(self, span: Span, kind: str, arguments: Mapping[str, Any]) -> None:
        pass

    def readable(self, span: Span) -> Mapping[str, Any]:
        return {"input": None, "output": None}

    def handed_on(self, inherited: Inherited) -> Mapping[str, Any]:
        return {}

    def requests_of(self, span: Span, request_bits: list[int]) -> list[Request]:
        return []


_SILENT = ScopeCopy(Inherited(_DeafRecorder(), sampled=False), INERT_SPAN)


def be_silent() -> None:
    """Keep the running thread, one of ours, from tracing itself for all its life."""
    attach(_SILENT)


@contextmanager
def silence() -> Iterator[None]:
    """Keep a block of our own work, on whatever thread, from tracing itself."""
    outside = current()
    attach(_SILENT)
    try:
        yield
    finally:
        attach(outside)
