"""The handle of one LLM request, and the registry that tells handles and callbacks which id a request got."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

from pltrace._checks import (
    checked_group,
    checked_metadata,
    checked_name,
    checked_optional_name,
    checked_release,
    checked_score,
    checked_timeout,
)
from pltrace._clock import monotonic
from pltrace._errors import PltraceError
from pltrace._greenlets import Condition
from pltrace._health import failed
from pltrace._scope import Callback
from pltrace._span import SpanStatus

__all__ = ["MOST_WAITING", "Registry", "Request", "Waiting"]

#: More callbacks than this never wait for an id; the oldest are given up and counted. About 0.5 KB each.
MOST_WAITING = 100_000
#: Who waits for an id looks into the store so often, besides being told.
LOOK_AGAIN_S = 1.0


class Records(Protocol):
    """What a handle needs of the process's recorder."""

    def operate(
        self,
        kind: str,
        trace_bits: int,
        span_bits: int,
        arguments: Mapping[str, Any],
        request_id: int | None,
    ) -> None:
        """Take something that is asked of a request, whose id is given if it is known."""

    def stored(self, span_bits: int) -> Mapping[str, Any] | None:
        """Return what the store holds of a span, waiting for the writer; None if it holds nothing."""

    def request_of(self, span_bits: int) -> tuple[int | None, bool]:
        """Return the id that a request got, or None, and whether one can still come."""

    def is_missing(self, span_bits: int) -> bool:
        """Return whether a request's span is neither open nor stored; just as the call ends it is neither."""


class Request:
    """One LLM request; usable before it has an id: what is asked of it is kept and sent once the id is known.

    Attributes:
        span_id: The id of the request's span, 16 hexadecimal digits.
        trace_id: The id of its trace, 32 hexadecimal digits.
    """

    __slots__ = (
        "__weakref__",
        "_id",
        "_is_recorded",
        "_looked_up",
        "_registry",
        "_span_bits",
        "_stored",
        "_trace_bits",
        "closed",
    )

    def __init__(self, registry: Registry, trace_bits: int, span_bits: int, *, closed: bool = False) -> None:
        self._registry = registry
        self._trace_bits = trace_bits
        self._span_bits = span_bits
        self._stored: Mapping[str, Any] | None = None
        self._id: int | None = None
        self._looked_up = closed
        self._is_recorded = not closed
        self.closed = closed

    @property
    def id(self) -> int | None:
        """PromptLayer's integer id, with no PromptLayer the local store's; None until it is known."""
        if self._id is None and not self._looked_up:
            # An earlier handle of the same request may have been told, and been dropped since; this one will be.
            self._looked_up = True
            self._registry.look_up(self)
        return self._id

    @property
    def span_id(self) -> str:
        """The id of the request's span, 16 hexadecimal digits."""
        return f"{self._span_bits:016x}"

    @property
    def trace_id(self) -> str:
        """The id of the request's trace, 32 hexadecimal digits."""
        return f"{self._trace_bits:032x}"

    @property
    def provider(self) -> str | None:
        """Who served it, as LangChain names it (`openai`, `anthropic`, …); None until the call has ended."""
        value: str | None = self._get("provider")
        return value

    @property
    def model(self) -> str | None:
        """The model's name; None until the call has ended."""
        value: str | None = self._get("model")
        return value

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that are sent with it."""
        return tuple(self._get("request_tags") or ())

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that is sent with it."""
        return dict(self._get("request_metadata") or {})

    @property
    def input(self) -> Any:
        """The prompt, as Prompt Blueprint; None if it isn't captured, or until the call has ended."""
        return self._get("input")

    @property
    def output(self) -> Any:
        """The answer, as Prompt Blueprint; None if it isn't captured, or until the call has ended."""
        return self._get("output")

    @property
    def input_tokens(self) -> int | None:
        """Tokens of the prompt, as the provider counted them; None if it didn't."""
        value: int | None = self._get("input_tokens")
        return value

    @property
    def output_tokens(self) -> int | None:
        """Tokens of the answer, as the provider counted them; None if it didn't."""
        value: int | None = self._get("output_tokens")
        return value

    @property
    def latency_s(self) -> float | None:
        """Seconds from start to end; None until the call has ended."""
        started, ended = self._get("started_at_ns"), self._get("ended_at_ns")
        return None if started is None or ended is None else (ended - started) / 1e9

    @property
    def error(self) -> str | None:
        """What went wrong, as `TypeName: message`, or None."""
        value: str | None = self._get("error")
        return value

    @property
    def status(self) -> SpanStatus | None:
        """`ok`, `error`, `cancelled` or `partial`; None until the call has ended."""
        value: SpanStatus | None = self._get("status")
        return value

    def __int__(self) -> int:
        number = self.id
        if number is None:
            raise PltraceError(f"The request of span {self.span_id} has no id yet; wait() returns it when it has one")
        return number

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the id.

        Args:
            timeout: The longest wait in seconds; None waits as long as an id can still come.

        Returns:
            The id, or None when the time is over or none can come (sampled out, quarantined, shut down).

        Raises:
            ConfigError: `timeout` is not a number of seconds.
        """
        return self._registry.wait(self, checked_timeout(timeout))

    def score(self, value: int, name: str | None = None) -> None:
        """Score the request.

        Args:
            value: 0 to 100.
            name: What is scored; without it, it is the request's own score.

        Raises:
            ConfigError: `value` is not a whole number from 0 to 100, or `name` is not a string.
        """
        self._ask("score", {"score": checked_score(value), "score_name": checked_optional_name("name", name)})

    def add_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Add metadata to the request; values that aren't strings are sent as JSON text.

        Args:
            metadata: String keys, any values.

        Raises:
            ConfigError: `metadata` is not a mapping with string keys.
        """
        self._ask("metadata", {"metadata": checked_metadata("metadata", metadata)})

    def link_prompt(
        self,
        name: str,
        *,
        version: int | None = None,
        label: str | None = None,
        input_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Link the request to a prompt of the registry.

        Args:
            name: The prompt's name.
            version: Its version; without it and `label`, the latest.
            label: A release label, in place of the version.
            input_variables: What its variables were given.

        Raises:
            ConfigError: An argument is wrong, or both `version` and `label` are given.
        """
        arguments = {
            "prompt_name": checked_name("name", name),
            "prompt_input_variables": checked_metadata("input_variables", input_variables or {}),
            **checked_release(version, label),
        }
        self._ask("prompt", arguments)

    def add_to_group(self, group_id: int) -> None:
        """Put the request into a group of PromptLayer's.

        Args:
            group_id: What `track.create_group()`, or promptlayer's `client.group.create()`, returned.

        Raises:
            ConfigError: `group_id` is not a whole number.
        """
        self._ask("group", {"group_id": checked_group(group_id)})

    def _ask(self, kind: str, arguments: Mapping[str, Any]) -> None:
        if not self._is_recorded:
            return  # There is nothing that it could be said of.
        # With the id, as the store may not have the span any more.
        self._registry.records.operate(kind, self._trace_bits, self._span_bits, arguments, self._id)

    def _get(self, field: str) -> Any:
        if self._stored is None:
            self._stored = self._registry.records.stored(self._span_bits)
        return None if self._stored is None else self._stored.get(field)

    def __repr__(self) -> str:
        return f"<Request {self.id if self.id is not None else 'without id yet'} span {self.span_id}>"


class Waiting(Protocol):
    """What runs `on_request` functions, off the caller's and the delivery's path."""

    def submit(self, callbacks: tuple[Callback, ...], request: Request) -> None:
        """Call them one after the other with `request`."""


class Registry:
    """Knows which requests wait for their id, and whom to tell.

    A request costs memory here only while somebody holds its handle or has an `on_request` for it.

    Args:
        records: The process's recorder.
        callbacks: Runs `on_request` functions.
    """

    def __init__(self, records: Records, callbacks: Waiting) -> None:
        self.serve(records, callbacks)
        self.forked()

    def serve(self, records: Records, callbacks: Waiting) -> None:
        """Go on with another recorder, which took the place of the one before: what waits, waits on."""
        self.records = records
        self._callbacks = callbacks

    def forked(self) -> None:
        """Start empty, as in the child of a fork: what is waited for is the parent's to be told."""
        self._changed = Condition()
        self._handles: WeakValueDictionary[int, Request] = WeakValueDictionary()
        self._waiting: dict[int, tuple[int, tuple[Callback, ...]]] = {}
        self._shut = False

    def handle(self, trace_bits: int, span_bits: int, *, closed: bool = False) -> Request:
        """Return the one handle of a request, made now if nobody holds it; `closed` when no id will come."""
        with self._changed:
            request = self._handles.get(span_bits)
            if request is None:
                request = Request(self, trace_bits, span_bits, closed=closed)
                self._handles[span_bits] = request
            return request

    def expect(self, trace_bits: int, span_bits: int, callbacks: tuple[Callback, ...]) -> int:
        """Note that `callbacks` want the id of a request; return how many waiting ones had to be given up for it."""
        with self._changed:
            self._waiting[span_bits] = (trace_bits, callbacks)
            if len(self._waiting) <= MOST_WAITING:
                return 0
            del self._waiting[next(iter(self._waiting))]
            return 1

    def waiting(self) -> set[int]:
        """Return the bits of the spans of those requests whose id an `on_request` waits for."""
        with self._changed:
            return {*self._waiting}

    def known(self, span_bits: Iterable[int]) -> dict[int, int | None]:
        """Return the ids of requests as far as their handles know them, by the bits of their spans."""
        handles = [(bits, self._handles.get(bits)) for bits in span_bits]
        return {bits: None if request is None else request._id for bits, request in handles}

    def resolve(self, ids: Mapping[int, int]) -> None:
        """Tell the handles, and whoever waits, that requests got their ids: the bits of their spans → id."""
        told: list[tuple[tuple[Callback, ...], Request]] = []
        with self._changed:
            for span_bits, request_id in ids.items():
                waiting = self._waiting.pop(span_bits, None)
                request = self._handles.get(span_bits)
                if request is None and waiting is not None:
                    request = self._handles[span_bits] = Request(self, waiting[0], span_bits)
                if request is not None:
                    request._id = request_id
                    if waiting is not None:
                        told.append((waiting[1], request))
            self._changed.notify_all()
        for callbacks, request in told:
            self._callbacks.submit(callbacks, request)

    def give_up(self, span_bits: int) -> None:
        """Tell the handle that no id will come."""
        with self._changed:
            self._waiting.pop(span_bits, None)
            request = self._handles.get(span_bits)
            if request is not None:
                request.closed = True
            self._changed.notify_all()

    def shut(self) -> None:
        """Tell all handles that no id will come any more."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()

    def look_up(self, request: Request) -> None:
        """Read from the store what became of a request, for a handle that wasn't there to be told."""
        try:
            number, can_come = self.records.request_of(request._span_bits)
        except Exception:
            failed("looking up the id of a request")
            return
        with self._changed:
            if number is not None:
                request._id = number
            request.closed = request.closed or not can_come

    def wait(self, request: Request, timeout: float | None) -> int | None:
        """Wait until `request` has its id, none can come, or `timeout` seconds are over."""
        deadline = None if timeout is None else monotonic() + timeout
        was_missing = False
        while request.id is None and not request.closed and not self._shut:
            with self._changed:
                if request._id is None and not request.closed and not self._shut:
                    remaining = LOOK_AGAIN_S if deadline is None else min(LOOK_AGAIN_S, deadline - monotonic())
                    if remaining <= 0:
                        return None
                    if self._changed.wait(remaining):
                        continue
            request._looked_up = False  # Another process may have delivered it.
            if deadline is not None and deadline - monotonic() < LOOK_AGAIN_S:
                continue  # To look for the span takes as long, where others keep the file.
            is_missing = self._is_missing(request)
            if is_missing and was_missing:
                self.give_up(request._span_bits)
            was_missing = is_missing
        return request.id

    def _is_missing(self, request: Request) -> bool:
        try:
            return self.records.is_missing(request._span_bits)
        except Exception:
            failed("looking for the span of a request")
            return False
