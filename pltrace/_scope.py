"""Says which `Scope` is current: what the `traced` blocks around the running code have set for what runs inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from pltrace._errors import ConfigError
from pltrace._span import INERT_SPAN, Span

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from pltrace._request import Request

__all__ = [
    "Callback", "Recorder", "Scope", "attach",
    "current", "current_span", "detach", "entry_of", "outermost", "set_outermost", "still_open",
]  # fmt: skip


class Recorder(Protocol):
    """Where spans go when they end, and what gives them ids and times."""

    def new_bits(self, count: int, /) -> int:
        """Return `count` random bits."""

    def now_ns(self) -> int:
        """Return the Unix time in nanoseconds."""

    def sampled(self, share: float | None = None) -> bool:
        """Decide whether a new trace is recorded; None stands for the application's share."""

    def record(self, span: Span) -> None:
        """Take an ended span; never raises, never waits for a disk or a network."""

    def operate(
        self, kind: str, trace_bits: int, span_bits: int, arguments: Mapping[str, Any], *, subtree: bool
    ) -> None:
        """Take something that is asked of a request (`subtree`: of all requests under a span); never raises."""

    def readable(self, span: Span) -> Mapping[str, Any]:
        """Return what is kept of a span, as JSON-like data."""

    def requests_of(self, span: Span, request_bits: list[int]) -> list[Request]:
        """Return handles of the requests of those span ids."""


class Callback(NamedTuple):
    """An `on_request` function, and for an async one the event loop that entered its scope."""

    function: Callable[[Request], Any]
    loop: AbstractEventLoop | None


class Scope:
    """What holds for all that runs inside some blocks; never changed, an inner block derives a new one.

    Two things on it do change, and belong to the entry, not to what it says: `closed`, set when its block is left,
    and `open_runs`, the LangChain runs inside it that haven't ended.
    """

    __slots__ = (
        "added", "callbacks", "capture", "closed", "entered_in", "entry", "left_early", "left_elsewhere", "lineage",
        "metadata", "open_runs", "outer", "recorder", "sampled", "session", "span", "tags", "token", "user",
    )  # fmt: skip

    #: The open scopes with nothing around them, in any thread or task.
    roots: ClassVar[set[Scope]] = set()

    def __init__(
        self,
        recorder: Recorder,
        tags: tuple[str, ...],
        metadata: Mapping[str, Any],
        callbacks: tuple[Callback, ...],
        user: str | None,
        session: str | None,
        capture: int,
        sampled: bool,
        outer: Scope | None,
        entry: object,
        entered_in: Span | None,
    ) -> None:
        self.recorder = recorder
        self.tags = tags
        self.metadata = metadata
        self.callbacks = callbacks
        self.user = user
        self.session = session
        self.capture = capture
        self.sampled = sampled
        self.outer = outer
        self.entry = entry
        self.entered_in = entered_in
        self.span: Span = INERT_SPAN
        self.lineage: tuple[Span, ...] = ()
        self.added = metadata  # What this block itself says, without the blocks around it.
        self.closed = False
        self.left_early = False  # Left while an inner one was open, which skips it when it is left.
        self.left_elsewhere = False  # Left in another context, so it may still look current in its own.
        self.token: Token[Scope | None] | None = None  # Of a block's entry: it can be used in that context alone.
        self.open_runs: dict[int, Span] = {}

    def resumed_in(self, run: Span | None) -> Scope:
        """Return the same scope as it holds for a generator's step that is taken inside `run`."""
        return self if run is self.entered_in else self._copy(self.tags, self.callbacks, run)

    def carried(self) -> Scope:
        """Return the same scope for what takes it along, where it holds wherever its block is left."""
        return self._copy(self.tags, self.callbacks, self.entered_in)

    def with_added(self, tags: tuple[str, ...], callbacks: tuple[Callback, ...]) -> Scope:
        """Return the same scope with other tags and callbacks, for one run."""
        return self._copy(tags, callbacks, self.entered_in)

    def unsampled(self) -> Scope:
        """Return the same scope for a trace that is not recorded."""
        copy = self._copy(self.tags, self.callbacks, self.entered_in)
        copy.sampled = False
        return copy

    def _copy(self, tags: tuple[str, ...], callbacks: tuple[Callback, ...], entered_in: Span | None) -> Scope:
        copy = type(self)(
            self.recorder, tags, self.metadata, callbacks, self.user, self.session, self.capture, self.sampled,
            self.outer, self.entry, entered_in,
        )  # fmt: skip
        copy.span, copy.lineage, copy.open_runs = self.span, self.lineage, self.open_runs
        copy.added = self.added
        return copy

    def added_inside(self, around: Scope) -> Mapping[str, Any]:
        """Return the metadata of the blocks entered inside `around`, this one included; all, if they aren't inside."""
        added: list[Mapping[str, Any]] = []
        scope: Scope | None = self
        while scope is not None and scope.span is not around.span:
            added.append(scope.added)
            scope = scope.outer
        if scope is None and around.span:
            return self.metadata
        return {key: value for one in reversed(added) for key, value in one.items()}


_current: ContextVar[Scope | None] = ContextVar("pltrace_scope", default=None)

#: The current scope, or None: a C call, for the paths that count nanoseconds.
current = _current.get
#: Makes a scope current in the running context; what it returns isn't needed to leave it, in any order, anywhere.
attach = _current.set


def still_open(scope: Scope | None) -> Scope | None:
    """Return a current scope, or the one around it, where it was left in a thread or task that couldn't tell ours."""
    while scope is not None and scope.left_elsewhere:
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
    top = _current.get()
    if top is not scope:
        scope.left_early = True
        inner = top
        while inner is not None and inner is not scope:
            # Closed and still there: its leaving was interrupted.
            inner.left_early = inner.left_early or inner.closed
            inner = inner.outer
        scope.left_elsewhere = inner is None
    token, scope.token = scope.token, None
    if token is not None:
        try:
            _current.reset(token)
        except ValueError:  # This context is another than the one it was entered in, as a copy of it.
            scope.left_elsewhere = True
    # Not all that is closed: in a task that outlives the block it was made in, the block's scope goes on to hold.
    while top is not None and (top is scope or top.left_early):
        top = top.outer
    _current.set(top)


def entry_of(entry: object) -> Scope | None:
    """Return the latest scope of this context that `entry` opened and that is still open."""
    scope = _current.get()
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
    scope = still_open(_current.get())
    return INERT_SPAN if scope is None else scope.span


def checked_sample(argument: str, value: object) -> float:
    """Return `value` if it is a number from 0 to 1; raise `ConfigError` naming `argument` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"{argument}={value!r}: expected a number from 0.0 to 1.0")
    return float(value)
