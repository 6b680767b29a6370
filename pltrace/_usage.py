"""What LangChain says of a run, and the live totals of the LLM calls under a span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

from pltrace._forks import ForkLock
from pltrace._health import failed

if TYPE_CHECKING:
    from pltrace._span import Span

__all__ = [
    "INTERNAL_TAGS", "Run", "RunKey", "Totals", "TotalsLink", "Usage", "elsewhere", "forked", "model_of", "place_of",
    "provider_of",
]  # fmt: skip

_NOTHING: Mapping[str, Any] = {}

#: How the tags start that LangChain and LangGraph set for themselves: kept on the span, not sent with the request.
INTERNAL_TAGS = ("seq:step:", "map:key:", "retry:attempt:", "graph:step:", "branch:", "condition:", "langsmith:")

#: `Span.requests` remembers this many requests, the latest: a block around a million calls must not hold a million.
MOST_REQUESTS = 10_000
#: Ended calls are folded into a span's totals by the writer's thread, and whenever `usage` is read. Where the writer
#: doesn't come to it, or past so many, each caller folds a few.
_MOST_WAITING, _FEW = 2_000, 8
#: One lock for all totals: it is held for microseconds. Re-entrant, because a generator's finalizer can end a call
#: on a thread that is folding.
_folding = ForkLock()
_is_folding = False
#: What calls are summed up by: the model, the scope's tags and the run's.
_Key = tuple[str, tuple[str, ...], tuple[str, ...]]
_NONE = (0, 0, 0, 0)


#: What a LangChain run is known by: the integer of its id; of an id that is no UUID the text.
RunKey = int | str


class Run(NamedTuple):
    """What LangChain said of a run when it started, by reference; it is read when the span is written.

    Of its ids the keys: an id is held by LangChain alone, so that it dies with the run.
    """

    run_id: RunKey
    parent_run_id: RunKey | None
    serialized: Mapping[str, Any] | None
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    invocation_params: Mapping[str, Any] | None
    chat: bool = False

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the model was called with."""
        return self.invocation_params or _NOTHING

    @property
    def model(self) -> str:
        """The model's name."""
        return model_of(self.serialized, self.metadata, self.invocation_params)

    @property
    def provider(self) -> str:
        """Who serves the model, as LangChain names it."""
        return provider_of(self.metadata, self.parameters)


def model_of(
    serialized: Mapping[str, Any] | None, metadata: Mapping[str, Any], parameters: Mapping[str, Any] | None
) -> str:
    """Return a model's name: what LangChain says, else what it was called with, else its class."""
    serialized, parameters = serialized or _NOTHING, parameters or _NOTHING
    return str(
        metadata.get("ls_model_name")
        or parameters.get("model")
        or parameters.get("model_name")
        or serialized.get("name")
        or (serialized.get("id") or ["unknown"])[-1]
    )


def provider_of(metadata: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    """Return who serves a model, as LangChain names it."""
    return str(metadata.get("ls_provider") or parameters.get("_type") or "unknown")


class Usage(NamedTuple):
    """Totals of the LLM calls that have ended under a span so far.

    Attributes:
        requests: How many calls.
        errors: How many of them failed or were cancelled.
        input_tokens: Tokens of their prompts.
        output_tokens: Tokens of their answers.
        by_model: The same for each model.
        by_tag: The same for each tag; a call with several tags counts under each.
    """

    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    by_model: Mapping[str, Usage] = _NOTHING
    by_tag: Mapping[str, Usage] = _NOTHING

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


def _usage(total: list[int], by_model: Mapping[str, Usage] = _NOTHING, by_tag: Mapping[str, Usage] = _NOTHING) -> Usage:
    requests, errors, input_tokens, output_tokens = total
    return Usage(requests, errors, input_tokens, output_tokens, by_model, by_tag)


class Totals(list[Any]):
    """Collects the LLM calls under one span, without a lock on their path.

    The list is of the ids of those that have begun, and behind what is worked off the ended ones' spans too, until they
    are counted. A span with calls in it has one such object, and nothing in it: what waits to be written is gone over
    by Python's garbage collector.

    Attributes:
        above: The totals of the span around.
    """

    __slots__ = ("_sums", "_worked_off", "above")

    def __init__(self, above: Totals | TotalsLink | None) -> None:
        self.above = above
        #: How many at the beginning are ids alone.
        self._worked_off = 0
        self._sums: dict[_Key, list[int]] | None = None

    @property
    def request_bits(self) -> list[int]:
        """The ids of the spans of the latest calls, in the order they began."""
        return [item for item in self.copy() if isinstance(item, int)][-MOST_REQUESTS:]

    def add(self, call: Span) -> None:
        """Add one ended call; safe from any thread and from a finalizer."""
        self.append(call)
        if len(self) - self._worked_off > _MOST_WAITING:
            self.fold(_FEW)

    def fold(self, most: int | None = None) -> None:
        """Work off what was added, or so much of it."""
        global _is_folding
        with _folding.lock:
            if _is_folding:
                return  # It is a finalizer that comes in between; what it added is folded later.
            _is_folding = True
            try:
                self._work_off(most)
            finally:
                _is_folding = False

    def _work_off(self, most: int | None) -> None:
        start = self._worked_off
        waiting = self[start:] if most is None else self[start : start + most]
        ids: list[int] = []
        changed: dict[_Key, list[int]] = {}
        for item in waiting:
            if isinstance(item, int):
                ids.append(item)
                continue
            try:
                self._count(item, changed)
            except Exception:
                failed("counting an LLM call")
        if self._sums is None:
            self._sums = {}
        sums, stop, worked_off = self._sums, start + len(waiting), start + len(ids)
        # All or nothing: within these lines nothing returns from a call, which is where Ctrl+C interrupts.
        self[start:stop] = ids  # Others have only added behind them.
        self._worked_off = worked_off
        sums.update(changed)
        if worked_off > 2 * MOST_REQUESTS:
            del self[: worked_off - MOST_REQUESTS]
            self._worked_off = MOST_REQUESTS

    def _count(self, call: Span, changed: dict[_Key, list[int]]) -> None:
        answer = None if call.output_is_set else call.raw_output
        tokens_in, tokens_out = (0, 0) if answer is None else answer.tokens()
        model = model_of(call.serialized, call.run_metadata, call.invocation_params)
        key = model, call.inherited.tags, tuple(map(str, call.run_tags))
        requests, errors, before_in, before_out = changed.get(key) or (self._sums or {}).get(key) or _NONE
        failures = call.status in ("error", "cancelled")
        changed[key] = [requests + 1, errors + failures, before_in + tokens_in, before_out + tokens_out]

    def read(self) -> Usage:
        """Return the totals so far."""
        total = [0, 0, 0, 0]
        by_model: dict[str, list[int]] = {}
        by_tag: dict[str, list[int]] = {}
        with _folding.lock:
            self.fold()
            for (model, scope_tags, run_tags), added in (self._sums or {}).items():
                sums = [total, by_model.setdefault(model, [0, 0, 0, 0])]
                sums += [
                    by_tag.setdefault(tag, [0, 0, 0, 0])
                    for tag in dict.fromkeys((*scope_tags, *run_tags))
                    if not tag.startswith(INTERNAL_TAGS)
                ]
                for one in sums:
                    one[:] = map(add, one, added)
        return _usage(
            total,
            {model: _usage(one) for model, one in by_model.items()},
            {tag: _usage(one) for tag, one in by_tag.items()},
        )


class CallElsewhere(int):
    """The id of a call in another trace than the span whose totals it is in.

    Attributes:
        trace_bits: Its trace.
        is_recorded: Whether that is.
    """

    trace_bits: int
    is_recorded: bool

    @classmethod
    def of(cls, span_bits: int, trace_bits: int, *, is_recorded: bool) -> CallElsewhere:
        """Return the id of a call."""
        call = cls(span_bits)
        call.trace_bits, call.is_recorded = trace_bits, is_recorded
        return call


class TotalsLink:
    """Totals that have others above them for some runs alone, where what is around these isn't around their span.

    Args:
        totals: A span's.
        above: Those of the span around, or the link to them.
        trace_bits: The trace of the runs.
        is_recorded: Whether that is.
    """

    __slots__ = ("above", "add", "append", "fold", "totals")

    def __init__(
        self, totals: Totals, above: Totals | TotalsLink | None, trace_bits: int, *, is_recorded: bool
    ) -> None:
        self.totals = totals
        self.add, self.fold = totals.add, totals.fold
        self.append = lambda bits: totals.append(CallElsewhere.of(bits, trace_bits, is_recorded=is_recorded))
        self.above = above


def elsewhere(totals: Totals | TotalsLink | None, trace_bits: int, *, is_recorded: bool) -> TotalsLink | None:
    """Return totals, and those above them, for runs in another trace than that of their spans."""
    if totals is None:
        return None
    above = elsewhere(totals.above, trace_bits, is_recorded=is_recorded)
    return TotalsLink(
        totals.totals if isinstance(totals, TotalsLink) else totals, above, trace_bits, is_recorded=is_recorded
    )


def place_of(call: int, span: Span) -> tuple[int, bool]:
    """Return the trace of a call in the totals of a span, and whether it is recorded."""
    if isinstance(call, CallElsewhere):
        return call.trace_bits, call.is_recorded
    return span.trace_bits, span.inherited.sampled


def forked() -> None:
    """Start afresh in the child of a fork that didn't wait for another thread to fold."""
    global _is_folding
    _is_folding = False
