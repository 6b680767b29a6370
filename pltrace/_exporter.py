"""What an exporter is: takes batches of stored spans, and says what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

__all__ = ["ExportResult", "Operation", "SpanExporter", "StoredSpan", "TracksRequests"]


@dataclass(frozen=True)
class StoredSpan:
    """A span as the store holds it.

    Attributes:
        seq: Its number in the store.
        record: All that is kept of it, JSON-like; not to be changed.
        uncertain: It was sent before, and no whole answer came: the backend may have it.
    """

    seq: int
    record: Mapping[str, Any]
    uncertain: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What became of a batch.

    Attributes:
        outcome: `delivered`; `retry`, try the same batch again later; `rejected`, it was refused for what is in it;
            `unauthorized`, it was refused for who sent it.
        reason: Why it isn't delivered, for people.
        request_ids: Delivered LLM calls: span id → request id.
        refused: Spans that were refused though the batch was delivered: span id → reason.
        retry_after_s: How long the backend asked to wait.
        uncertain: The batch was sent and no whole answer came: it may have been taken.
        suspect: With `retry`: the backend answered that it failed at the batch, or doesn't take it. If it does so every
            time, and takes others, spans of the batch are set aside; of what is `uncertain` alone, after twice as many
            times. That it can't be reached says nothing of them.
        unknown: Uncertain spans that the backend couldn't say anything of, whatever became of the batch: span id →
            reason. They stay pending, and are tried again later; others needn't wait for them.
    """

    outcome: Literal["delivered", "retry", "rejected", "unauthorized"]
    reason: str = ""
    request_ids: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    uncertain: bool = False
    suspect: bool = False
    unknown: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class SpanExporter(Protocol):
    """Sends spans to a backend; called from one background thread.

    Attributes:
        name: Names the exporter in the store and in `doctor`; what is pending under a name is sent by the next process
            that has an exporter of that name.
    """

    @property
    def name(self) -> str:
        """The exporter's name."""

    def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
        """Send a batch; an exception counts as `retry`."""

    def shutdown(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True)
class Operation:
    """Something asked of a request that has its id: a score, metadata, a prompt link or a group.

    Attributes:
        number: Its number in the store; operations of one request are sent in this order.
        kind: `score`, `metadata`, `prompt` or `group`.
        request_id: The request's id.
        arguments: JSON-like.
    """

    number: int
    kind: str
    request_id: int
    arguments: Mapping[str, Any]


@runtime_checkable
class TracksRequests(Protocol):
    """An exporter that gives LLM calls an id and takes operations on them."""

    @property
    def name(self) -> str:
        """The exporter's name."""

    def forked(self) -> None:
        """Start afresh in the child of a fork."""

    def operate(self, operation: Operation) -> ExportResult:
        """Send one operation."""
