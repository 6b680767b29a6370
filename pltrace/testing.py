"""For tests of programs and libraries that use pltrace: what was traced, and what would have been sent."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from pltrace import _runs, _runtime
from pltrace._checks import checked_metadata, checked_tags
from pltrace._config import Config, load
from pltrace._encoding import Encoder
from pltrace._errors import ConfigError
from pltrace._recorder import SpanRecorder
from pltrace._scope import Inherited, Scope, ScopeSpan, attach, current, still_open
from pltrace._span import Span
from pltrace._tracing import Tracing
from pltrace._typing import CaptureSettings, Unpack
from pltrace._usage import RunKey
from pltrace._wire import log_request

__all__ = ["CapturedRequest", "CapturedSpans", "capture_spans"]

#: The first moment of a deterministic clock: 2024-01-01T00:00:00Z. It moves a millisecond at each look.
_CLOCK_STARTS_NS = 1_704_067_200_000_000_000
_CLOCK_STEP_NS = 1_000_000


@dataclass(frozen=True)
class CapturedRequest:
    """An LLM request as it would be sent to PromptLayer.

    Attributes:
        span: The span of the call.
        body: The `log_request` that would be sent.
        operations: What would be sent for it afterwards, in order: the `kind` (`score`, `metadata`, `prompt` or
            `group`) and the arguments of what was asked of its handle, or of a span that it was made under.
    """

    span: Span
    body: Mapping[str, Any] = field(repr=False)
    operations: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def provider(self) -> str:
        """Who serves the model."""
        return str(self.body["provider"])

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.body["model"])

    @property
    def tags(self) -> list[str]:
        """The tags, outermost first."""
        return list(self.body["tags"])

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata, with what was added later, without the `_langchain_*` keys that go with every request."""
        sent = {key: value for key, value in self.body["metadata"].items() if not key.startswith("_langchain_")}
        for operation in self._operations("metadata"):
            sent.update({key: _sent(value) for key, value in operation["metadata"].items()})
        return sent

    @property
    def prompt_name(self) -> str | None:
        """The registry prompt that it is linked to, if any: by itself, or by `link_prompt`."""
        linked = [operation["prompt_name"] for operation in self._operations("prompt")]
        return linked[-1] if linked else self.body.get("prompt_name")

    @property
    def scores(self) -> list[tuple[int, str | None]]:
        """Its scores in order, each with its name."""
        return [(operation["score"], operation["score_name"]) for operation in self._operations("score")]

    def _operations(self, kind: str) -> list[Mapping[str, Any]]:
        return [operation for operation in self.operations if operation["kind"] == kind]

    @property
    def status(self) -> str:
        """`SUCCESS`, `WARNING` or `ERROR`."""
        return str(self.body["status"])

    def __str__(self) -> str:
        """Return one line for an assertion's message."""
        prompt = f", prompt {self.prompt_name!r}" if self.prompt_name else ""
        return f"{self.model}: {self.status}, tags {self.tags}, metadata {self.metadata}{prompt}"


class CapturedSpans(list[Span]):
    """The spans that have ended, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self._scopes: list[Callable[[], Scope | None]] = []

    @property
    def requests(self) -> list[CapturedRequest]:
        """The LLM requests among them, as they would be sent."""
        return [
            CapturedRequest(
                span,
                log_request(span.inherited.recorder.readable(span)),
                _recorder_of(span).operations_of(span.span_bits),
            )
            for span in self
            if span.kind == "llm"
        ]

    def named(self, name: str) -> Span:
        """Return the one span of that name.

        Raises:
            AssertionError: There is none, or more than one.
        """
        __tracebackhide__ = True  # pytest shows the test's own line.
        found = [span for span in self if span.name == name]
        if len(found) != 1:
            raise AssertionError(f"{len(found)} spans are named {name!r}, of {[span.name for span in self]}")
        return found[0]

    def tree(self) -> list[Any]:
        """Return the names as nested lists: `[root, [child, [grandchild]], ...]` for each root."""
        known = {span.span_bits for span in self}
        children: dict[int | None, list[Span]] = {}
        # Ended children come before their parents; they started after them.
        for span in sorted(self, key=lambda span: span.started_at_ns):
            parent = span.parent.span_bits if span.parent is not None and span.parent.span_bits in known else None
            children.setdefault(parent, []).append(span)

        def below(span: Span) -> list[Any]:
            return [span.name, *(below(child) for child in children.get(span.span_bits, ()))]

        return [below(root) for root in children.get(None, ())]

    def assert_requests(
        self,
        number: int | None = None,
        *,
        model: str | None = None,
        tags: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        status: str | None = None,
    ) -> list[CapturedRequest]:
        """Assert that LLM requests were made that carry all that is given.

        Args:
            number: How many there have to be; None wants at least one.
            model: The model's name.
            tags: Tags that they have, in this order, perhaps among others.
            metadata: Entries that they have, perhaps among others. They are sent as strings; `1` stands for `"1"`.
            prompt: The registry prompt that they are linked to.
            status: `SUCCESS`, `WARNING` or `ERROR`.

        Returns:
            The requests that match.

        Raises:
            AssertionError: The number is another; the message lists all requests.
            ConfigError: `tags` or `metadata` is of a wrong type.
        """
        __tracebackhide__ = True
        wanted_tags = list(checked_tags("tags", tags)) if tags is not None else []
        wanted_metadata = checked_metadata("metadata", metadata) if metadata is not None else {}
        made = self.requests
        matching = [
            request
            for request in made
            if (model is None or request.model == model)
            and [tag for tag in request.tags if tag in wanted_tags] == wanted_tags
            and {key: _sent(value) for key, value in wanted_metadata.items()}.items() <= request.metadata.items()
            and (prompt is None or request.prompt_name == prompt)
            and (status is None or request.status == status)
        ]
        if len(matching) == number or (number is None and matching):
            return matching
        wanted = {"model": model, "tags": tags, "metadata": metadata, "prompt": prompt, "status": status}
        of = ", ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None) or "any kind"
        listed = "\n  ".join(map(str, made)) or "none"
        expected = "at least one request" if number is None else f"{number} request{'s' * (number != 1)}"
        raise AssertionError(f"expected {expected} of {of}, and there are {len(matching)}, among:\n  {listed}")

    def assert_nothing_open(self) -> None:
        """Assert that no scope is left behind here, and that every block, call and LangChain run has ended.

        Raises:
            AssertionError: The message names what is open.
        """
        __tracebackhide__ = True
        # A scope is copied where it goes on inside a run. The span of another process has no times here.
        entered = [scope for ref in list(self._scopes) if (scope := ref()) is not None and not scope.closed]
        spans = dict.fromkeys(scope.span for scope in entered if scope.span.started_at_ns)
        unended = [span for span in spans if not span.ended_at_ns]
        if unended:
            raise AssertionError(f"these blocks or calls are still open: {unended}")
        scope = still_open(current())
        if scope is not None and not scope.closed and _is_of(self, scope.inherited):
            raise AssertionError(f"the scope of {scope.span!r} was left behind")
        runs = [run for _, run in _runs_of(self)]
        if runs:
            raise AssertionError(f"these LangChain runs are still open: {runs}")

    def _know_of(self, scope: ScopeSpan) -> None:
        """Know of a scope while it is open; not by keeping it."""
        # A block is held: left open by a thread that is gone, nobody else does. A call ends with what it runs.
        self._scopes.append(weakref.ref(scope) if scope.entry is None else lambda: scope)


def _sent(value: Any) -> str:
    """Return a metadata value as requests have it."""
    return value if isinstance(value, str) else Encoder().dumps(value)


def _recorder_of(span: Span) -> SpanRecorder:
    recorder = span.inherited.recorder
    assert isinstance(recorder, SpanRecorder)
    return recorder


def _is_of(spans: CapturedSpans, inherited: Inherited) -> bool:
    """Return whether what is recorded in a scope, or a span itself, is gathered in `spans`."""
    recorder = inherited.recorder
    return isinstance(recorder, _CapturingRecorder) and recorder.captured is spans


def _roots_of(spans: CapturedSpans) -> list[Scope]:
    return [scope for scope in list(Scope.roots) if _is_of(spans, scope.inherited)]


def _runs_of(spans: CapturedSpans) -> list[tuple[RunKey, Span]]:
    return [(key, run) for key, run in list(_runs.open_runs.items()) if _is_of(spans, run.inherited)]


class _CapturingRecorder(SpanRecorder):
    """Also keeps ended spans in a list, at once."""

    captured: CapturedSpans
    _counts = False

    def record(self, span: Span) -> None:
        """Take an ended span; one that is changed afterwards comes again."""
        if span.inherited.sampled and "_captured" not in span.__dict__:
            span.__dict__["_captured"] = True
            if self._counts and span.run_key is not None:  # The ids of LangChain's runs: those of their spans.
                around = span.around
                span.run_key, span.parent_run_key = span.span_bits, around.span_bits if around is not None else None
            self.captured.append(span)
        super().record(span)

    def new_trace_bits(self) -> int:
        """Return a new trace's id; counted together with those of spans."""
        return self.new_span_bits() if self._counts else super().new_trace_bits()

    def count_from_one(self, numbers: Iterator[int], looks: Iterator[int]) -> None:
        """Take ids and times from counters, and always the same samples."""
        self._counts = True
        self._random.seed(0)
        self.new_span_bits = numbers.__next__
        self.now_ns = lambda: _CLOCK_STARTS_NS + next(looks) * _CLOCK_STEP_NS


class _CapturingTracing(Tracing):
    """Forgets nothing as too old: a deterministic clock runs long ago, and only who traces looks at it."""

    def _prune(self) -> None:
        pass


class _Capture:
    """Stands in for the usual tracing: whatever the program under test sets, its spans end up in one list.

    Args:
        spans: The list.
        deterministic: Ids and times are counted.
    """

    def __init__(self, spans: CapturedSpans, deterministic: bool) -> None:
        self._spans = spans
        self._counters = (count(1), count()) if deterministic else None

    def settings(self, config: Config) -> Config:
        """Return the settings without those that would send or write something."""
        return replace(config, api_key=None, base_url=Config.base_url, client=None, store="memory", exporters=())

    def tracing(self, config: Config, before: Tracing | None) -> Tracing:
        """Return what to record with."""
        return _CapturingTracing(config, before, self._recorder)

    def _recorder(self, *parts: Any) -> _CapturingRecorder:
        recorder = _CapturingRecorder(*parts)
        recorder.captured = self._spans
        recorder.opened = self._spans._know_of
        if self._counters is not None:
            recorder.count_from_one(*self._counters)
        return recorder


@contextmanager
def capture_spans(*, deterministic: bool = False, **settings: Unpack[CaptureSettings]) -> Iterator[CapturedSpans]:
    """Switch tracing on for a block, in memory alone, and give the spans that end in it.

    Nothing is sent and nothing is written, whatever `configure` is told inside the block: it sets tags, metadata,
    capture and the like, and where to send is left out, as is the environment. The block is outside of all traced
    blocks around it. What tracing was set to before holds again afterwards.

    Args:
        deterministic: Ids count from 1, also those that requests name LangChain's runs by, and time moves a
            millisecond whenever it is looked at.
        **settings: As for `configure`: `tags`, `metadata`, `capture`, `redact`, `sample`, `service`, `libraries`.

    Yields:
        The list of ended spans, in the order they ended; it grows while the block runs.

    Raises:
        ConfigError: A setting is wrong, or would send something somewhere.
    """
    loud = {"api_key", "base_url", "client", "exporters", "store", "enabled"} & settings.keys()
    if loud:
        raise ConfigError(f"{sorted(loud)[0]}: capture_spans keeps everything in memory and takes no such setting")
    config = load(store="memory", enabled=True, environ={}, **settings)
    spans = CapturedSpans()
    outside = current()
    attach(None)
    try:
        with _runtime.instead(_Capture(spans, deterministic), config):
            yield spans
            _runtime.flush(5.0)
    finally:
        # What is left open must not trouble what comes later.
        Scope.roots.difference_update(_roots_of(spans))
        for key, _ in _runs_of(spans):
            _runs.open_runs.pop(key, None)
        attach(outside)
