"""Gathers what goes into one commit: ended spans, encoded, and what was asked of requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pltrace._encoding import Encoder
from pltrace._record import row_of
from pltrace._request import Registry
from pltrace._rows import Rows
from pltrace._runs import open_runs
from pltrace._scope import Callback
from pltrace._span import Span
from pltrace._store import Asked
from pltrace._usage import Totals, TotalsLink, place_of

__all__ = ["Ask", "Commit"]


class Ask(NamedTuple):
    """An operation in the queue; its arguments are encoded by the writer."""

    kind: str
    trace_bits: int
    span_bits: int
    arguments: Mapping[str, Any]
    subtree: bool
    request_id: int | None = None
    under: Span | None = None  # The span that it is asked of all requests under, if they are known here.


class Commit:
    """What goes into one commit, without the spans themselves, and what is to be done after it."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.operations: list[Asked] = []
        #: LLM calls whose requests' ids somebody waits for: trace, span, callbacks.
        self.awaited: list[tuple[int, int, tuple[Callback, ...]]] = []
        self.runs_seen = 0
        #: What its LLM calls were added to, by identity: they are lists.
        self.totals: dict[int, Totals | TotalsLink] = {}

    def __len__(self) -> int:
        return len(self.rows) + len(self.operations)

    def add(self, item: Span | Ask, encoder: Encoder, service: str, registry: Registry) -> None:
        """Encode a span, or what was asked, and add it."""
        if isinstance(item, Ask):
            known = {} if item.under is None else registry.known(_ended_calls(item.under))
            self.operations.append(
                Asked(
                    item.kind, f"{item.trace_bits:032x}", f"{item.span_bits:016x}", encoder.dumps(item.arguments),
                    item.subtree, item.request_id, {f"{bits:016x}": number for bits, number in known.items()},
                )
            )  # fmt: skip
        else:
            self.rows.add(row_of(item, encoder, service))
            self.runs_seen += item.run_key is not None
            if item.kind == "llm":
                for span in item.lineage:
                    if span.trace_bits != item.trace_bits:
                        self.rows.joined.add(span.trace_id)
                totals = item.scope.totals
                while totals is not None:
                    self.totals[id(totals)] = totals
                    totals = totals.above
                if item.inherited.callbacks:
                    self.awaited.append((item.trace_bits, item.span_bits, item.inherited.callbacks))


def _ended_calls(span: Span) -> list[int]:
    """Return the ids of the recorded calls under a span that have ended: the others are scored when they are stored."""
    still_open = {run.span_bits for run in open_runs.copy().values()}
    calls = [] if span._totals is None else span._totals.request_bits
    return [bits for bits in calls if bits not in still_open and place_of(bits, span)[1]]
