"""Says which `Scope` is current: what the `traced` blocks around the running code have set for what runs inside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pltrace._attempts import and_another
from pltrace._collecting import at_work, is_collecting
from pltrace._span import INERT_SPAN, RemoteSpan, Span, keep_in_place
from pltrace._usage import TotalsLink, elsewhere

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from pltrace._attempts import Attempt
    from pltrace._request import Request
    from pltrace._usage import RunKey, Totals

__all__ = [
    "NO_RUNS", "Callback", "Inherited", "PassedOver", "Recorder", "Scope", "ScopeCopy", "ScopeSpan", "abandon",
    "attach", "current", "current_span", "descends", "detach", "entry_of", "outermost", "reattach", "set_is_on",
    "set_outermost", "still_open",
]  # fmt: skip


_NOTHING: Mapping[str, Any] = {}
#: What a span without runs has as its `open_runs`; never changed.
NO_RUNS: dict[RunKey, Span] = {}


class Recorder(Protocol):
    """Where spans go when they end, and what gives them ids and times."""

    @property
    def opened(self) -> Callable[[ScopeSpan], None] | None:
        """Called with each span of a block or call as it begins, if anybody wants to know."""

    @property
    def new_span_bits(self) -> Callable[[], int]:
        """Returns a new span's id."""

    def new_trace_bits(self) -> int:
        """Return a new trace's id."""

    def now_ns(self) -> int:
        """Return the Unix time in nanoseconds."""

    def sampled(self, share: float | None = None) -> bool:
        """Decide whether a new trace is recorded; None stands for the application's share."""

    def record(self, span: Span) -> None:
        """Take an ended span; never raises, never waits for a disk or a network."""

    def operate_under(self, span: Span, kind: str, arguments: Mapping[str, Any]) -> None:
        """Take something that is asked of all requests under a span; never raises."""

    def readable(self, span: Span) -> Mapping[str, Any]:
        """Return what is kept of a span, as JSON-like data."""

    def handed_on(self, inherited: Inherited) -> Mapping[str, Any]:
        """Return what may leave the process of tags, metadata, user and session, as JSON-like data."""

    def requests_of(self, span: Span, request_bits: list[int]) -> list[Request]:
        """Return handles of the requests of those span ids."""


class Callback(NamedTuple):
    """An `on_request` function, and for an async one the event loop that entered its scope."""

    function: Callable[[Request], Any]
    loop: AbstractEventLoop | None


class Inherited:
    """What a block hands on to all that runs inside it: never changed, and one for all blocks that add nothing to it.

    A span keeps it for its record, whatever scope it was in.
    """

    __slots__ = ("__weakref__", "callbacks", "capture", "metadata", "recorder", "sampled", "session", "tags", "user")

    def __init__(
        self,
        recorder: Recorder,
        tags: tuple[str, ...] = (),
        metadata: Mapping[str, Any] = _NOTHING,
        callbacks: tuple[Callback, ...] = (),
        user: str | None = None,
        session: str | None = None,
        capture: int = 0,
        sampled: bool = True,
    ) -> None:
        self.recorder = recorder
        self.tags = tags
        self.metadata = metadata
        self.callbacks = callbacks
        self.user = user
        self.session = session
        self.capture = capture
        self.sampled = sampled

    def with_(self, **changes: Any) -> Inherited:
        """Return the same with other values of some attributes."""
        return Inherited(**{name: changes.get(name, getattr(self, name)) for name in _INHERITED})


_INHERITED = Inherited.__slots__[1:]


class Scope:
    """What is entered with a block or call: its span, what it hands on, and what was around it.

    Mostly it is the span itself, a `ScopeSpan`: each call needs both, and to make two objects takes half as long again.
    """

    #: The open scopes with nothing around them, in any thread or task.
    roots: ClassVar[set[Scope]] = set()
    #: What holds around it too, though its span knows nothing of that.
    joined_to: Scope | None = None
    #: Resumed in a run that is inside of it: then it alone holds, also where that is in an inner block.
    resumed_inside = False

    if TYPE_CHECKING:
        inherited: Inherited
        outer: Scope | None
        #: The declaration that opened it, if it is a block.
        entry: Any
        #: The run that it was entered, or resumed, in, unless that is inside of it.
        entered_in: Span | None
        #: The metadata that this block itself says, without the blocks around it.
        added: Mapping[str, Any]
        closed: bool
        #: Left while an inner one was open, which skips it when it is left.
        left_early: bool
        #: Left in another context, so it may still look current in its own.
        left_elsewhere: bool
        #: Of a block's entry: it can be used in that context alone.
        token: Token[Scope | None] | None
        #: The LangChain runs inside it that haven't ended, of the kinds that may never be; to be read.
        open_runs: dict[RunKey, Span]

        @property
        def span(self) -> Span:
            """Its span."""

        @property
        def parent_inside(self) -> Span:
            """The parent of what is begun inside, where no run is around that: its span, or the run it was bound in."""

        @property
        def lineage(self) -> tuple[Span, ...]:
            """The spans of the blocks and calls around what runs inside, outermost first, its own included."""

        def runs(self) -> dict[RunKey, Span]:
            """Return `open_runs`, to be changed."""

        @property
        def totals(self) -> Totals | TotalsLink | None:
            """The totals of the innermost span of its lineage, which know those above; None outside of all blocks."""

    def resumed_in(self, run: Span | None) -> Scope:
        """Return the same scope as it holds for a generator's step, or a bound call, that is made inside `run`."""
        if run is self.entered_in:
            return self
        if not descends(run, self.span):
            return ScopeCopy.of(self, self.inherited, run)
        if self.resumed_inside:
            return self
        resumed = ScopeCopy.of(self, self.inherited, self.entered_in)
        resumed.resumed_inside = True
        return resumed

    def carried(self) -> Scope:
        """Return the same scope for what takes it along, where it holds wherever its block is left."""
        return ScopeCopy.of(self, self.inherited, self.entered_in)

    def bound(self, run: Span | None) -> Scope:
        """Return the same scope for what `bind` is given in `run`: where no run is around that, it goes on there."""
        bound = ScopeCopy.of(self, self.inherited, self.entered_in)
        if run is not None and descends(run, self.span):
            bound.parent_inside = run
        return bound

    def with_(self, **changes: Any) -> Scope:
        """Return the same scope, which hands on other things, for one run."""
        return ScopeCopy.of(self, self.inherited.with_(**changes), self.entered_in)

    def added_inside(self, around: Scope) -> Mapping[str, Any]:
        """Return the metadata of the blocks entered inside `around`, this one included; all, if they aren't inside."""
        added: list[Mapping[str, Any]] = []
        scope: Scope | None = self
        while scope is not None and scope.span is not around.span:
            added.append(scope.added)
            scope = scope.base if isinstance(scope, ScopeSpan) else scope.outer
        if scope is None and around.span and around.span not in self.lineage:
            return self.inherited.metadata
        return {key: value for one in reversed(added) for key, value in one.items()}

    def inside(self, around: Scope) -> Scope:
        """Return the scope of what began in this one, but is the child of a run in `around`: both hold.

        Where neither is around the other, as in a thread that was handed the parent's `config` and opened a block of
        its own, this one counts as the inner one. The child is of the trace of `around`, which says if it is recorded.
        """
        if not self.span or (self.span is around.span and around.joined_to is None):
            return self  # Our own work stays silent; or it is the same, carried along, or with one run's additions.
        outer, inner = around.inherited, self.inherited
        known = set(around.lineage)
        own = [span for span in self.lineage if span not in known]
        if not own:
            return self if self.resumed_inside else around
        if len(own) + len(known) == len(self.lineage) and inner.sampled is outer.sampled:
            return self  # It is in there.
        metadata = {**inner.metadata, **outer.metadata}
        for span in own:
            metadata.update(span.added if isinstance(span, ScopeSpan) else span.inherited.metadata)
        functions = [callback.function for callback in inner.callbacks]
        inherited = outer.with_(
            tags=tuple(dict.fromkeys((*outer.tags, *inner.tags))),
            metadata=metadata,
            callbacks=(*inner.callbacks, *[other for other in outer.callbacks if other.function not in functions]),
            user=inner.user if inner.user is not None else outer.user,
            session=inner.session if inner.session is not None else outer.session,
            capture=outer.capture & inner.capture,
        )
        both = ScopeCopy.of(self, inherited, self.entered_in)
        both.joined_to, both.lineage = around, (*around.lineage, *own)
        return both


class ScopeSpan(Span, Scope):
    """The span of a block or call, and the scope of what runs inside it.

    Attributes:
        base: The scope that it was derived from: `outer`, or where the context was lost, that of the run it is in.
    """

    # Class-level defaults, as for `Span`: it is made on the caller's path, by `Declaration.derive`, which also sets
    # what its `__init__` would: to call that takes half as long again.
    base: Scope
    entered_in: Span | None = None
    added: Mapping[str, Any] = _NOTHING
    closed = left_early = left_elsewhere = False
    token: Token[Scope | None] | None = None
    #: Of a block that was entered while others of its declaration were open: the mark of the frame that did.
    frame: int = 0
    open_runs: dict[RunKey, Span] = NO_RUNS
    #: The runs in it that failed, those in failed blocks and calls in it included.
    noted: tuple[Attempt, ...] = ()

    @property
    def tried(self) -> tuple[Attempt, ...]:  # type: ignore[override]
        """What was tried in it, or around it up to the run that it is in, so far."""
        # Found when a run begins: to hand it on would cost each block and call.
        tried = self.noted
        around: Any = self.parent
        while type(around) is ScopeSpan:
            if around.noted:
                tried = (*around.noted, *tried)
            around = around.parent
        return tried if around is None or not around.tried else (*around.tried, *tried)

    def note(self, attempt: Attempt) -> None:
        """Remember a failed run in it."""
        self.noted = and_another(self.noted, attempt)

    @property
    def span(self) -> Span:
        """Itself: not an attribute, which would be a cycle."""
        return self

    parent_inside = span

    @property
    def lineage(self) -> tuple[Span, ...]:
        """The spans of the blocks and calls around what runs inside, outermost first, and itself."""
        # Found when it is asked for: a tuple for each would be made on the caller's path, and wait with it.
        within: list[Span] = []
        scope: Scope = self
        while isinstance(scope, ScopeSpan):
            within.append(scope)
            scope = scope.base
        return (*scope.lineage, *reversed(within))

    def runs(self) -> dict[RunKey, Span]:
        """Return `open_runs`, to be changed; one of its own from then on."""
        return self.own("open_runs", NO_RUNS, dict)

    @property
    def totals(self) -> Totals:
        """Its totals, which know those of the spans around it; made when the first call needs them."""
        if self._totals is not None:
            return self._totals
        without: list[ScopeSpan] = []
        scope = self.base
        while isinstance(scope, ScopeSpan) and scope._totals is None:
            without.append(scope)
            scope = scope.base
        above = scope.totals
        for span in reversed(without):
            above = span.totals_below(above)
        return self.totals_below(above)

    def let_go_of_left(self) -> None:
        """Let go of what had been left before it began, and is held by what was left meanwhile."""
        inner, base = self, self.base
        while isinstance(base, ScopeSpan) and base._was_left():
            if base._was_left(self.started_at_ns):
                inner._let_go(self.started_at_ns)
                return
            inner, base = base, base.base

    def _was_left(self, before_ns: int | None = None) -> bool:
        """Return whether it holds nowhere any more, or didn't at that time."""
        is_left = self.closed and (self.left_elsewhere or self.left_early)
        return is_left and (before_ns is None or 0 < self.ended_at_ns <= before_ns)

    def _let_go(self, before_ns: int) -> None:
        """Derive it from what is around what was left by then; of its parent keep the ids."""
        base, added = self.base, self.added
        while isinstance(base, ScopeSpan) and base._was_left(before_ns):
            if base.added:
                added = {**base.added, **added}
            base = base.base
        self.base, self.added = base, added
        if self._totals is not None:
            above = base.totals
            if type(self.parent) is RemoteSpan:
                above = elsewhere(above, self.trace_bits, is_recorded=self.inherited.sampled)
            self._totals.above = above
        parent = around = self.parent
        while isinstance(around, _LeftSpan) or (isinstance(around, ScopeSpan) and around._was_left(before_ns)):
            around = around.parent
        if isinstance(parent, ScopeSpan) and around is not parent:
            self.parent = _LeftSpan(parent, around)


class _LeftSpan(Span):
    """Stands for the span of a block that was left, as the parent of another."""

    def __init__(self, span: Span, parent: Span | RemoteSpan | None) -> None:
        self.trace_bits = span.trace_bits
        self.span_bits = span.span_bits
        self.parent = parent


keep_in_place(
    ScopeSpan,
    (
        "name", "kind", "inherited", "parent", "trace_bits", "span_bits", "started_at_ns", "base", "outer", "entry",
        "token", "arguments", "closed", "status", "raw_output", "ended_at_ns", "added", "entered_in", "frame", "error",
        "error_types", "left_early", "left_elsewhere", "raw_input", "output_is_set", "open_runs", "_totals",
    ),
)  # fmt: skip


class ScopeCopy(Scope):
    """A scope that isn't its span: the outermost, and one that holds elsewhere or hands on other things."""

    span: Span
    parent_inside: Span
    lineage: tuple[Span, ...]

    def __init__(
        self,
        inherited: Inherited,
        span: Span,
        lineage: tuple[Span, ...] = (),
        outer: Scope | None = None,
        entry: object = None,
        entered_in: Span | None = None,
    ) -> None:
        self.inherited = inherited
        self.span = self.parent_inside = span
        self.lineage = lineage
        self.outer = outer
        self.entry = entry
        self.entered_in = entered_in
        self.added = _NOTHING
        self.closed = self.left_early = self.left_elsewhere = False
        self.token = None
        self.open_runs = {}

    @classmethod
    def of(cls, scope: Scope, inherited: Inherited, entered_in: Span | None) -> ScopeCopy:
        """Return the same as another scope, with what it hands on, entered in a run."""
        copy = cls(inherited, scope.span, scope.lineage, scope.outer, scope.entry, entered_in)
        copy.added, copy.open_runs, copy.joined_to = scope.added, scope.runs(), scope.joined_to
        copy.parent_inside = scope.parent_inside
        return copy

    def runs(self) -> dict[RunKey, Span]:
        """Return `open_runs`, to be changed."""
        return self.open_runs

    @property
    def totals(self) -> Totals | TotalsLink | None:
        """The totals of the innermost span of its lineage, which know those above; None outside of all blocks."""
        if self.joined_to is None:
            return self.lineage[-1].totals if self.lineage else None
        found, around = self.joined_to.totals, self.joined_to
        while around.joined_to is not None:
            around = around.joined_to
        for span in self.lineage[len(self.joined_to.lineage) :]:
            found = TotalsLink(span.totals, found, around.span.trace_bits, is_recorded=self.inherited.sampled)
        return found


class PassedOver(Scope):
    """Stands for a block that was entered while nothing was recorded: its leaving finds it, and all else passes over.

    Args:
        entry: The declaration.
    """

    span: Span = INERT_SPAN
    parent_inside: Span = INERT_SPAN
    lineage: tuple[Span, ...] = ()
    entered_in: Span | None = None
    added: Mapping[str, Any] = _NOTHING
    closed = left_early = False
    left_elsewhere = True
    token: Token[Scope | None] | None = None
    frame: int = 0
    open_runs: dict[RunKey, Span] = NO_RUNS
    totals: Totals | None = None

    def __init__(self, entry: object) -> None:
        outer = current()
        self.outer = outer if outer is None or not outer.closed else still_linked(outer)
        self.entry = entry

    def resumed_in(self, run: Span | None) -> Scope:
        """Return itself."""
        return self


_current: ContextVar[Scope | None] = ContextVar("pltrace_scope", default=None)

#: The current scope, or None: a C call, for the paths that count nanoseconds.
current = _current.get
_reset = _current.reset
#: Makes current again what was before `attach` in the same step of the same code: then the collector doesn't call that.
reattach = _current.set

if TYPE_CHECKING or sys.version_info < (3, 12):

    def attach(scope: Scope | None) -> Token[Scope | None] | None:
        """Make a scope current in the running context, but not in what the garbage collector calls.

        What it returns isn't needed to leave the scope, in any order, anywhere.
        """
        if at_work and is_collecting():
            return None
        return reattach(scope)

else:
    attach = reattach


def descends(span: Any, above: Span) -> bool:
    """Return whether a span is another, or is below it."""
    while isinstance(span, Span):
        if span is above:
            return True
        span = span.parent
    return False


def still_open(scope: Scope | None) -> Scope | None:
    """Return a current scope, or the one around it, where it was left in a thread or task that couldn't tell ours."""
    while scope is not None and scope.left_elsewhere:
        scope = scope.outer
        while scope is not None and scope.left_early:  # The inner one was to skip it.
            scope = scope.outer
    return scope


def still_linked(scope: Scope | None) -> Scope | None:
    """Return the same, or what is passed over but still open: its leaving has to find it."""
    while scope is not None and scope.left_elsewhere and scope.closed:
        scope = scope.outer
        while scope is not None and scope.left_early:
            scope = scope.outer
    return scope


#: What is around all blocks: the application's own tags, metadata and capture; None while tracing is off.
_outermost: Scope | None = None


#: Returns whether tracing is on, after reading the environment if nobody has decided yet; `_runtime` gives it.
_is_on: Callable[[], bool] = bool


def outermost() -> Scope | None:
    """Return the scope around all blocks, or None while tracing is off; the first call may switch it on."""
    if _outermost is None:
        _is_on()
    return _outermost


def set_is_on(is_on: Callable[[], bool]) -> None:
    """Set what knows whether tracing is on."""
    global _is_on
    _is_on = is_on


def set_outermost(scope: Scope | None) -> None:
    """Set the scope around all blocks, when tracing is switched on or off."""
    global _outermost
    _outermost = scope


def detach(scope: Scope) -> None:
    """Close `scope` and make current what was before it; in any order, from any context, never failing.

    A scope that is left while an inner one is still open is only marked: leaving the inner one skips it.
    """
    scope.closed = True
    top, outer = current(), scope.outer
    token, scope.token = scope.token, None
    if top is scope and token is not None and not at_work and (outer is None or not outer.left_early):
        try:  # Nearly always. The same as below, in two thirds of the time.
            _reset(token)
            if current() is outer:
                return
        except ValueError:
            scope.left_elsewhere = True
        token = None
    if top is not scope:
        scope.left_early = True
        inner = top
        while inner is not None and inner is not scope:
            # Closed and still there: its leaving was interrupted.
            inner.left_early = inner.left_early or inner.closed
            inner = inner.outer
        if inner is None:
            scope.left_elsewhere = True
    if token is not None:
        try:
            if at_work and is_collecting():
                scope.left_elsewhere = True
            else:
                _reset(token)
        except ValueError:  # This context is another than the one it was entered in, as a copy of it.
            scope.left_elsewhere = True
    # Not all that is closed: in a task that outlives the block it was made in, the block's scope goes on to hold.
    while top is not None and (top is scope or top.left_early):
        top = top.outer
    if current() is not top:
        attach(top)
    if scope.left_early or scope.left_elsewhere:
        _unlink(scope)


def abandon(scope: Scope) -> None:
    """Close `scope` where no context variable can be set: should it be current somewhere, all else passes over it."""
    scope.closed = scope.left_early = scope.left_elsewhere = True
    scope.token = None
    _unlink(scope)


def _unlink(scope: Scope) -> None:
    """Let go of what was left around `scope`, which itself is let go of when what is current inside is left.

    Else, where each block is entered before the last one is left, it would hold all that were before it.
    """
    outer = scope.outer
    while outer is not None and outer.closed and (outer.left_early or outer.left_elsewhere):
        outer = outer.outer
    scope.outer = outer
    if isinstance(scope, ScopeSpan):
        scope.let_go_of_left()


def entry_of(entry: object) -> Scope | None:
    """Return the latest scope of this context that `entry` opened and that is still open."""
    scope = current()
    while scope is not None:
        if scope.entry is entry and not scope.closed:
            return scope
        scope = scope.outer
    return None


def current_span() -> Span:
    """Return the span of the innermost block or decorated call around the running code.

    Returns:
        The span; outside any block an inert one, which is false and ignores everything.
    """
    scope = still_open(current())
    return INERT_SPAN if scope is None else scope.span
