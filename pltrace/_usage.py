"""What LangChain says of a run, and the live totals of the LLM calls under a span."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from operator import add
from typing import Any, NamedTuple

from pltrace._health import failed

__all__ = ["INTERNAL_TAGS", "Run", "Totals", "Usage", "forked", "model_of", "provider_of"]

_NOTHING: Mapping[str, Any] = {}

#: How the tags start that LangChain and LangGraph set for themselves: kept on the span, not sent with the request.
INTERNAL_TAGS = ("seq:step:", "map:key:", "retry:attempt:", "graph:step:", "branch:", "condition:", "langsmith:")

#: `Span.requests` remembers this many requests, the latest: a block around a million calls must not hold a million.
MOST_REQUESTS = 10_000
#: Ended calls are folded into a span's totals by the writer's thread, and whenever `usage` is read. Where the writer
#: doesn't come to it, or past so many, each caller folds a few.
_MOST_TALLIES, _FEW = 1_000, 4
#: One lock for all totals: it is held for microseconds. Re-entrant, because a generator's finalizer can end a call
#: on a thread that is folding.
_folding = threading.RLock()
_is_folding = False


class Run(NamedTuple):
    """What LangChain said of a run when it started, by reference; it is read when the span is written.

    Of its ids the integers: an id is held by LangChain alone, so that it dies with the run.
    """

    run_id: int
    parent_run_id: int | None
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


#: What one ended LLM call adds to the totals of the spans around it: errors, its answer or None, which knows its
#: tokens; what tells its model; the run's tags and the scope's.
Tally = tuple[
    int, Any, "Mapping[str, Any] | None", "Mapping[str, Any]", "Mapping[str, Any] | None", "Sequence[str]",
    "tuple[str, ...]",
]  # fmt: skip
_TALLY = 7


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


class Totals:
    """Collects the LLM calls under one span, without a lock on their path."""

    __slots__ = ("_begun", "_sums", "_tallies")

    def __init__(self) -> None:
        # Lists: a block around one call has them too, and to make two deques takes half a microsecond more.
        self._begun: list[int] = []
        # Flat, so that they are no objects of their own while they wait; `extend` is one step for all threads.
        self._tallies: list[Any] = []
        # By model, the scope's tags and the run's.
        self._sums: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[int]] = {}

    def begin(self, span_bits: int) -> None:
        """Take note of a call that has begun, by its span's id."""
        self._begun.append(span_bits)
        if len(self._begun) > 2 * MOST_REQUESTS:
            del self._begun[:-MOST_REQUESTS]

    @property
    def request_bits(self) -> list[int]:
        """The ids of the spans of the latest calls, in the order they began."""
        return self._begun[-MOST_REQUESTS:]

    def add(self, tally: Tally) -> None:
        """Add one ended call; safe from any thread and from a finalizer."""
        self._tallies.extend(tally)
        if len(self._tallies) > _MOST_TALLIES * _TALLY:
            self.fold(_FEW)

    def fold(self, most: int | None = None) -> None:
        """Work off what was added, or so many of it."""
        global _is_folding
        with _folding:
            if _is_folding:
                return  # It is a finalizer that comes in between; what it added is folded later.
            _is_folding = True
            end = len(self._tallies) if most is None else most * _TALLY
            waiting = self._tallies[:end]
            folded = 0
            try:
                while folded < len(waiting):
                    tally = waiting[folded : folded + _TALLY]
                    folded += _TALLY
                    try:
                        self._count(*tally)
                    except Exception:
                        failed("counting an LLM call")
            finally:
                del self._tallies[:folded]  # Others have only added behind them.
                _is_folding = False

    def _count(
        self, errors: int, answer: Any, serialized: Any, metadata: Any, parameters: Any, tags: Any, scope_tags: Any
    ) -> None:
        tokens_in, tokens_out = (0, 0) if answer is None else answer.tokens()
        key = (model_of(serialized, metadata, parameters), scope_tags, tuple(map(str, tags)))
        sums = self._sums.setdefault(key, [0, 0, 0, 0])
        sums[:] = sums[0] + 1, sums[1] + errors, sums[2] + tokens_in, sums[3] + tokens_out

    def read(self) -> Usage:
        """Return the totals so far."""
        total = [0, 0, 0, 0]
        by_model: dict[str, list[int]] = {}
        by_tag: dict[str, list[int]] = {}
        with _folding:
            self.fold()
            for (model, scope_tags, run_tags), added in self._sums.items():
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


def forked() -> None:
    """Give the child of a fork a lock of its own; another thread of the parent may have held this one."""
    global _folding, _is_folding
    _folding, _is_folding = threading.RLock(), False
