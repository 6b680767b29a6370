"""For tests of programs and libraries that use pltrace: what was traced, and what would have been sent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from pltrace import _runs, _runtime
from pltrace._config import Config, load
from pltrace._errors import ConfigError
from pltrace._promptlayer import log_request
from pltrace._recorder import SpanRecorder
from pltrace._scope import Scope, current
from pltrace._span import Span
from pltrace._tracing import Tracing

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
    """

    span: Span
    body: Mapping[str, Any] = field(repr=False)

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
        """The metadata, without the `_langchain_*` keys that go with every request."""
        return {key: value for key, value in self.body["metadata"].items() if not key.startswith("_langchain_")}

    @property
    def prompt_name(self) -> str | None:
        """The registry prompt that it is linked to, if any."""
        return self.body.get("prompt_name")

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

    @property
    def requests(self) -> list[CapturedRequest]:
        """The LLM requests among them, as they would be sent."""
        return [
            CapturedRequest(span, log_request(span.scope.recorder.readable(span)))
            for span in self
            if span.kind == "llm"
        ]

    def named(self, name: str) -> Span:
        """Return the one span of that name.

        Raises:
            AssertionError: There is none, or more than one.
        """
        found = [span for span in self if span.name == name]
        assert len(found) == 1, f"{len(found)} spans are named {name!r}, of {[span.name for span in self]}"
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
        metadata: Mapping[str, str] | None = None,
        prompt: str | None = None,
        status: str | None = None,
    ) -> list[CapturedRequest]:
        """Assert that LLM requests were made that carry all that is given.

        Args:
            number: How many there have to be; None wants at least one.
            model: The model's name.
            tags: Tags that they have, in this order, perhaps among others.
            metadata: Entries that they have, perhaps among others.
            prompt: The registry prompt that they are linked to.
            status: `SUCCESS`, `WARNING` or `ERROR`.

        Returns:
            The requests that match.

        Raises:
            AssertionError: The number is another; the message lists all requests.
        """
        made = self.requests
        matching = [
            request
            for request in made
            if (model is None or request.model == model)
            and (tags is None or [tag for tag in request.tags if tag in tags] == list(tags))
            and (metadata is None or metadata.items() <= request.metadata.items())
            and (prompt is None or request.prompt_name == prompt)
            and (status is None or request.status == status)
        ]
        wanted = {"model": model, "tags": tags, "metadata": metadata, "prompt": prompt, "status": status}
        of = ", ".join(f"{key}={value!r}" for key, value in wanted.items() if value is not None) or "any kind"
        right = len(matching) == number if number is not None else bool(matching)
        listed = "\n  ".join(map(str, made)) or "none"
        assert right, (
            f"{number or 'some'} requests of {of} were expected, and there are {len(matching)}, of:\n  {listed}"
        )
        return matching

    def assert_nothing_open(self) -> None:
        """Assert that no scope is left behind here, and that no run in any scope lacks its end.

        Raises:
            AssertionError: The message names what is open.
        """
        scope = current()
        assert scope is None or scope.closed, f"the scope of {scope.span!r} was left behind" if scope else ""
        left = [scope.span for scope in Scope.roots]
        assert not left, f"these blocks or calls are still open: {left}"
        runs = list(_runs.open_runs.values())
        assert not runs, f"these LangChain runs are still open: {runs}"


class _CapturingRecorder(SpanRecorder):
    """Also keeps ended spans in a list, at once."""

    captured: CapturedSpans

    def record(self, span: Span) -> None:
        if span.scope.sampled and span not in self.captured:
            self.captured.append(span)
        super().record(span)


@contextmanager
def capture_spans(*, deterministic: bool = False, **settings: Any) -> Iterator[CapturedSpans]:
    """Switch tracing on for a block, in memory alone, and give the spans that end in it.

    Nothing is sent and nothing is written. What tracing was set to before holds again afterwards.

    Args:
        deterministic: Ids count from 1, and time moves a millisecond whenever it is looked at.
        **settings: As for `configure`: `tags`, `metadata`, `capture`, `redact`, `sample`, `service`, `libraries`.

    Yields:
        The list of ended spans, in the order they ended; it grows while the block runs.

    Raises:
        ConfigError: A setting is wrong, or would send something somewhere.
    """
    tracing = Tracing(_quiet(settings), _CapturingRecorder)
    recorder = tracing.recorder
    assert isinstance(recorder, _CapturingRecorder)
    recorder.captured = CapturedSpans()
    if deterministic:
        numbers, looks = count(1), count()
        recorder.new_bits = lambda bits: next(numbers)
        recorder.now_ns = lambda: _CLOCK_STARTS_NS + next(looks) * _CLOCK_STEP_NS
    before = _runtime.use(tracing)
    try:
        yield recorder.captured
        tracing.flush(5.0, patient=False)
    finally:
        _runtime.use(before)
        tracing.shutdown(0.0, patient=False)


def _quiet(settings: Mapping[str, Any]) -> Config:
    loud = {"api_key", "base_url", "client", "exporters", "store", "enabled"} & settings.keys()
    if loud:
        raise ConfigError(f"{sorted(loud)[0]}: capture_spans keeps everything in memory and takes no such setting")
    return load(store="memory", enabled=True, environ={}, **settings)
