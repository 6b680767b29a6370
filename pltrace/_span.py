"""`Span`: one timed operation of a trace, while the program runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pltrace._arguments import Arguments
from pltrace._attempts import Attempt, and_another
from pltrace._checks import (
    checked_group,
    checked_metadata,
    checked_name,
    checked_optional_name,
    checked_score,
    checked_tags,
)
from pltrace._forks import ForkLock
from pltrace._snapshot import snapshot
from pltrace._told import message_of
from pltrace._usage import Run, RunKey, Totals, TotalsLink, Usage, elsewhere

if TYPE_CHECKING:
    from pltrace._request import Request
    from pltrace._scope import Inherited, Scope

__all__ = ["INERT_SPAN", "InertSpan", "RemoteSpan", "Span", "SpanKind", "SpanStatus", "keep_in_place"]

SpanKind = Literal["function", "block", "chain", "llm", "tool", "retriever", "prompt", "parser"]
SpanStatus = Literal["ok", "error", "cancelled", "partial"]


T = TypeVar("T")

_NOTHING: Mapping[str, Any] = {}
_change = count(1)
#: Held while a span gets what only some have. Re-entrant, because a generator's finalizer may come in between.
_making = ForkLock()


class RemoteSpan(NamedTuple):
    """The ids of a span that another process opened: all that is known of it here."""

    trace_bits: int
    span_bits: int

    @property
    def tried(self) -> tuple[Attempt, ...]:
        """Nothing is known of the runs under it in another process."""
        return ()


class Span:
    """One timed operation of a trace: a `traced` function or block, or a LangChain run.

    A span is true. The one that `current_span()` gives outside any block is false, its ids are empty strings, and
    what is done with it has no effect.

    Attributes:
        name: What the span is called.
        kind: `function`, `block`, `chain`, `llm`, `tool`, `retriever`, `prompt` or `parser`.
        status: `ok`, `error`, `cancelled` or `partial`; None while the span is open.
        error: What went wrong, as `TypeName: message`, or None.
        started_at_ns: When it started, Unix time in nanoseconds.
        ended_at_ns: When it ended, Unix time in nanoseconds; 0 while the span is open.
    """

    # Class-level defaults instead of assignments in __init__: a span is made on the caller's path.
    status: SpanStatus | None = None
    error: str | None = None
    error_types: tuple[str, ...] = ()
    ended_at_ns: int = 0
    #: What went in and came out, by reference or as a snapshot of the caller's containers; `input` and `output`
    #: read it.
    raw_input: Any = None
    #: Of a call of a function, until `update` gives it an input: the function and its arguments.
    arguments: Arguments | None = None
    raw_output: Any = None
    #: Given by `update`: then it is kept whatever is captured.
    input_is_set: bool = False
    output_is_set: bool = False
    #: The scope that a LangChain run is in.
    scope: Scope
    #: What LangChain said of a run when it started; `run` names it. Not an object of its own, which would have to be
    #: made and held for each. Of a function or block there is no key.
    run_key: RunKey | None = None
    parent_run_key: RunKey | None = None
    serialized: Mapping[str, Any] | None = None
    run_tags: Sequence[str] = ()
    run_metadata: Mapping[str, Any] = _NOTHING
    invocation_params: Mapping[str, Any] | None = None
    is_chat: bool = False
    #: The run that the LangChain run's parent id names, where the scope's span is the parent instead.
    run_around: Span | None = None
    first_token_at_ns: int = 0
    #: The tokens go to a reader, who may read on at any time, in any task.
    is_stream: bool = False
    #: The tokens so far of an answer that is given in one piece: all there will be of it if it is cancelled.
    pieces: list[Any] | None = None
    #: The task or thread that started the run, and the run's id, as weak references while it is open.
    starter: Any = None
    run_id: Any = None
    #: How often that task had been cancelled by then, and had gone on.
    cancels_before: int = 0
    #: The runs under it that failed, or that came after one that did; and those around it when it started.
    tried: tuple[Attempt, ...] = ()
    tried_before: tuple[Attempt, ...] = ()
    noted_attempt: Attempt | None = None
    #: What the context that started an LLM call knows of prompts from the registry; `_links` reads it.
    rendered: tuple[Any, ...] = ()
    #: What it was found to be made from, once that is known; `_links` keeps it here.
    linked: tuple[Any] | None = None
    #: What the steps of a sequence rendered, by their numbers; `_links` keeps it here.
    rendered_in_steps: tuple[tuple[int, Any], ...] = ()
    #: What `update` added, each a dict of its own once there is something; of the tags the keys.
    added_tags: Mapping[str, None] = _NOTHING
    added_metadata: Mapping[str, Any] = _NOTHING
    #: Tells whether tags or metadata of any span were added to since; what `said` returned, and when.
    _changes: ClassVar[int] = 0
    _kept: tuple[int, tuple[tuple[str, ...], dict[str, Any]]] | None = None
    _totals: Totals | None = None

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        inherited: Inherited,
        parent: Span | RemoteSpan | None,
        trace_bits: int,
        span_bits: int,
        started_at_ns: int,
    ) -> None:
        self.name = name
        self.kind: SpanKind = kind
        self.inherited = inherited
        self.parent = parent
        self.trace_bits = trace_bits
        self.span_bits = span_bits
        self.started_at_ns = started_at_ns

    @property
    def id(self) -> str:
        """The span's id, 16 hexadecimal digits."""
        return self.span_bits.to_bytes(8, "big").hex()

    @property
    def trace_id(self) -> str:
        """The id of the trace that the span belongs to, 32 hexadecimal digits."""
        return self.trace_bits.to_bytes(16, "big").hex()

    @property
    def parent_id(self) -> str | None:
        """The id of the span around this one, or None for the root of a trace."""
        return None if self.parent is None else self.parent.span_bits.to_bytes(8, "big").hex()

    @property
    def run(self) -> Run | None:
        """What LangChain said of the run; None for a function or block."""
        if self.run_key is None:
            return None
        return Run(
            self.run_key, self.parent_run_key, self.serialized, self.run_tags, self.run_metadata,
            self.invocation_params, self.is_chat,
        )  # fmt: skip

    @property
    def attempt(self) -> Attempt:
        """What tells it from other runs that attempt the same."""
        return self.noted_attempt or Attempt(
            self.kind, self.name, self.run_tags, self.raw_input, self.error, self.tried_before, self.tried
        )

    def note(self, attempt: Attempt) -> None:
        """Remember how a run under it ended."""
        self.tried = and_another(self.tried, attempt)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags of the blocks and runs around it, outermost first, then its own, each once."""
        return self.said()[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata of the blocks and runs around it and its own; the inner wins."""
        return self.said()[1]

    def said(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return tags and metadata."""
        tags, metadata = self.inherited.tags, self.inherited.metadata
        own_tags, own = self.run_tags, self.run_metadata
        around = self.around
        if around is None:
            if own_tags or self.added_tags:
                tags = tuple(dict.fromkeys((*tags, *own_tags, *self.added_tags)))
            return tags, {**metadata, **own, **self.added_metadata}
        outer_tags, outer = around._kept_said()
        # LangChain hands tags down to a run without saying from where; the run around it knows the order.
        handed_down = [tag for tag in outer_tags if tag in own_tags or tag in tags]
        tags = tuple(dict.fromkeys((*handed_down, *tags, *own_tags, *self.added_tags)))
        # LangChain hands metadata down to a run; what comes from outside the scope must not win over the scope's.
        handed = around.run_metadata
        new = {key: value for key, value in own.items() if key not in handed or handed[key] is not value}
        outside = {key: value for key, value in outer.items() if key in own or key in metadata}
        inside = _NOTHING if self.scope is around.scope else self.scope.added_inside(around.scope)
        return tags, {**outside, **inside, **new, **self.added_metadata}

    def _kept_said(self) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Return tags and metadata for the runs inside, each of which asks; kept until any span is updated."""
        kept, changes = self._kept, Span._changes
        if kept is None or kept[0] != changes:
            kept = self._kept = changes, self.said()
        return kept[1]

    @property
    def around(self) -> Span | None:
        """Return the span of the LangChain run that this run is in, whatever its parent is."""
        if self.run_key is None:
            return None
        parent = self.parent
        if self.run_around is not None or not isinstance(parent, Span) or parent.run_key is None:
            return self.run_around
        # LangChain knows nothing of the run that it was bound in, and hands nothing down from there.
        return parent if self.parent_run_key is not None else None

    @property
    def lineage(self) -> tuple[Span, ...]:
        """The spans of the blocks and calls around it, outermost first; of a block or call its own too."""
        return self.scope.lineage

    @property
    def input(self) -> Any:
        """What went in, arguments or a prompt, as JSON-like data; None if it isn't captured."""
        return self.inherited.recorder.readable(self)["input"]

    @property
    def output(self) -> Any:
        """What came out, as JSON-like data; None if it isn't captured or not there yet."""
        return self.inherited.recorder.readable(self)["output"]

    @property
    def requests(self) -> list[Request]:
        """The LLM requests made under it so far, oldest first; at most the latest 10,000."""
        return self.inherited.recorder.requests_of(self, self.totals.request_bits)

    @property
    def usage(self) -> Usage:
        """Requests, errors and tokens of the LLM calls that have ended so far under a `traced` block or call.

        Those of a chain count for the blocks and calls around it, not for the chain's own span.
        """
        return self.totals.read()

    @property
    def totals(self) -> Totals:
        """The collector behind `requests` and `usage`, made when the first call needs it."""
        found = self._totals
        return self.totals_below(None) if found is None else found

    def totals_below(self, above: Totals | TotalsLink | None) -> Totals:
        """Return its totals, which are made if there are none.

        Args:
            above: Those of the span around.
        """
        if type(self.parent) is RemoteSpan:  # The blocks around are in another trace.
            above = elsewhere(above, self.trace_bits, is_recorded=self.inherited.sampled)
        return self.own("_totals", None, lambda: Totals(above))

    def own(self, attribute: str, shared: object, make: Callable[[], T]) -> T:
        """Return an attribute, made for this span if it is still what others have; one for all threads.

        Not by way of `__dict__`, whose `setdefault` is one step: to have it makes one.
        """
        with _making.lock:
            found: T = getattr(self, attribute)
            if found is shared:
                found = make()
                setattr(self, attribute, found)
            return found

    def update(
        self,
        *,
        name: str | None = None,
        tags: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
        input: Any = None,
        output: Any = None,
    ) -> None:
        """Add to what is recorded of this span; what runs inside it is not affected.

        Args:
            name: Replaces the name.
            tags: Strings, added to the tags.
            metadata: Added to the metadata; a key that is there already is replaced.
            input: Replaces the recorded input.
            output: Replaces the recorded output, also the one that a return would record.

        Raises:
            ConfigError: An argument has a wrong type.
        """
        if name is not None:
            self.name = checked_name("name", name)
        # setdefault and update of a dict are one step each: nothing is lost of what another thread adds, or a
        # finalizer that comes in between, and there is no lock to be held at a fork.
        if tags != ():
            self.__dict__.setdefault("added_tags", {}).update(dict.fromkeys(checked_tags("tags", tags)))
        if metadata is not None:
            self.__dict__.setdefault("added_metadata", {}).update(checked_metadata("metadata", metadata))
        if tags != () or metadata is not None:
            Span._changes = next(_change)
        if input is not None:
            self.raw_input, self.arguments = snapshot(input), None
            self.input_is_set = True
        if output is not None:
            if self.kind == "llm" and self.ended_at_ns:
                self._fold_totals()  # The tokens are told by the answer.
            self.raw_output = snapshot(output)
            self.output_is_set = True
        if self.ended_at_ns:
            self.inherited.recorder.record(self)

    def score(self, value: int, name: str | None = None) -> None:
        """Score every LLM request made under this span, those to come included.

        Args:
            value: 0 to 100.
            name: What is scored; PromptLayer shows scores without a name as the request's own.

        Raises:
            ConfigError: `value` is not a whole number from 0 to 100, or `name` is not a string.
        """
        arguments = {"score": checked_score(value), "score_name": checked_optional_name("name", name)}
        self.inherited.recorder.operate_under(self, "score", arguments)

    def count_call(self) -> None:
        """Add this LLM call, which has ended, to the totals of the spans around it."""
        totals = self.scope.totals
        while totals is not None:
            totals.add(self)
            totals = totals.above
        if not self.inherited.sampled:  # The writer never comes to it.
            self._fold_totals()

    def _fold_totals(self) -> None:
        totals = self.scope.totals
        while totals is not None:
            totals.fold()
            totals = totals.above

    def add_to_group(self, group_id: int) -> None:
        """Put every LLM request made under this span into a group of PromptLayer's, those to come included.

        Args:
            group_id: What `track.create_group()` returned.

        Raises:
            ConfigError: `group_id` is not a whole number.
        """
        arguments = {"group_id": checked_group(group_id)}
        self.inherited.recorder.operate_under(self, "group", arguments)

    def set_error(self, error: BaseException) -> None:
        """Set status and error from an exception.

        A stream that is left is no error, nor is a program's exit that reports none; a cancelled task is its own.
        """
        names = tuple(kind.__name__ for kind in type(error).__mro__)
        # The latter is how a graph is interrupted, and how a node goes to one of the graph around its own.
        if "GeneratorExit" in names or "GraphBubbleUp" in names:
            self.status = "partial" if self.kind == "llm" else "ok"
            return
        if self.kind != "llm" and _is_successful_exit(error, names):  # A model's call is cut short by it.
            self.status = "ok"
            return
        self.status = "error" if _CANCELLATIONS.isdisjoint(names) else "cancelled"
        self.error_types = names
        self.error = f"{type(error).__name__}: {message_of(error)}"

    def __repr__(self) -> str:
        """Return name, kind, status and id."""
        return f"<Span {self.name!r} {self.kind} {self.status or 'open'} {self.id}>"


#: What ends a task of asyncio, of trio and of gevent that is cancelled.
_CANCELLATIONS = frozenset({"CancelledError", "Cancelled", "GreenletExit"})


def _is_successful_exit(error: BaseException, names: tuple[str, ...]) -> bool:
    """Return whether it ends the program with exit code 0: Python's own, or that of click and typer."""
    code: Any = None
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
    elif "Exit" in names:
        code = getattr(error, "exit_code", None)
    return isinstance(code, int) and code == 0  # Of all else that it may be, Python makes a 1.


def keep_in_place(kind: type, attributes: Iterable[str]) -> None:
    """Have the objects of a class hold these attributes themselves, as CPython does since 3.11 where it can.

    It does so with attributes that the first objects of the class have. For an object that gets another one it makes a
    dict, which takes 0.3 µs, and is one thing more for the garbage collector to go over while the object waits.

    Args:
        kind: The class, of which there is no object yet.
        attributes: At most 28 names.
    """
    first: object = object.__new__(kind)
    for name in attributes:
        setattr(first, name, None)


# Those of a run: the rest is of fallbacks, retries and streams, or is given by `update`.
keep_in_place(
    Span,
    (
        "name", "kind", "inherited", "parent", "trace_bits", "span_bits", "started_at_ns", "scope", "run_key",
        "parent_run_key", "serialized", "run_tags", "run_metadata", "invocation_params", "is_chat", "run_around",
        "raw_input", "run_id", "starter", "rendered", "raw_output", "status", "ended_at_ns", "error", "error_types",
        "_kept", "linked", "first_token_at_ns",
    ),
)  # fmt: skip


class InertSpan(Span):
    """The span where nothing is traced: false, without ids, and deaf."""

    name = ""
    kind: SpanKind = "block"
    trace_bits = span_bits = started_at_ns = 0
    id = ""
    trace_id = ""
    parent = parent_id = None
    input = output = None
    tags = ()

    def __init__(self) -> None:
        """Take nothing: an inert span belongs to no scope."""

    def __bool__(self) -> bool:
        return False

    @property
    def metadata(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    @property
    def requests(self) -> list[Request]:
        """Nothing."""
        return []

    @property
    def usage(self) -> Usage:
        """Nothing."""
        return Usage()

    def update(self, **_: Any) -> None:
        """Do nothing."""

    def score(self, value: int, name: str | None = None) -> None:
        """Do nothing."""

    def add_to_group(self, group_id: int) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return "<Span, inert: nothing is traced here>"


#: What `current_span()` is outside any block, and what a block yields while tracing is off.
INERT_SPAN = InertSpan()
