"""What `traced(...)` declares, and how it opens a scope, with a span, inside the one that is current."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import ref

from pltrace import _runs, _runtime
from pltrace._callables import is_coroutine
from pltrace._checks import CAPTURE_ALL
from pltrace._scope import Callback, Inherited, Scope, ScopeSpan, current, descends, still_open
from pltrace._span import SpanKind

if TYPE_CHECKING:
    from pltrace._config import Library
    from pltrace._propagation import Remote

__all__ = ["Declaration"]

_Maybe = Callable[[], "Inherited | None"]
_new = object.__new__


def _nothing() -> None:
    return None


class Declaration:
    """What holds inside a block, or a function's calls; it never changes once it is made.

    Args:
        name: The span's name, or None.
        module: Where it was made, if that is known: a block belongs to it, as a function does to its own.
    """

    # Class-level defaults: most blocks have a name alone, and many are declared where they are entered.
    _tags: tuple[str, ...] = ()
    _metadata: Mapping[str, Any] = {}
    _on_request: Callable[[Any], Any] | None = None
    _user: str | None = None
    _session: str | None = None
    _capture: int = CAPTURE_ALL
    _sample: float | None = None
    _parent: Remote | None = None
    #: Whether it changes what is handed on.
    _adds = False
    #: Makes the callback for `on_request` at an entry; whether that belongs to the event loop then.
    _callback: Callable[[], Callback] | None = None
    _is_async = False
    _is_used = False
    #: What holds inside, and what and who it was made from: mostly the same again.
    _added: tuple[_Maybe, Library | None, _Maybe] = (_nothing, None, _nothing)

    def __init__(self, name: str | None, module: str | None) -> None:
        self._name = name
        self._module = module

    def say(
        self,
        tags: tuple[str, ...],
        metadata: Mapping[str, Any],
        on_request: Callable[[Any], Any] | None,
        user: str | None,
        session: str | None,
        capture: int,
        sample: float | None,
        parent: Remote | None,
    ) -> None:
        """Say the rest, before anything is made of it; the arguments are those of `traced`, checked."""
        self._tags = tags
        self._metadata = metadata
        self._on_request = on_request
        self._user = user
        self._session = session
        self._capture = capture
        self._sample = sample
        self._parent = parent
        self._adds = bool(tags or metadata or on_request or user or session or parent) or capture != CAPTURE_ALL
        if on_request is not None:
            self._callback = _callback_maker(on_request)
            self._is_async = is_coroutine(on_request)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was declared; what is open isn't part of it."""
        said = (
            self._tags, self._metadata, self._on_request, self._user, self._session, self._capture, self._sample,
            self._parent,
        )  # fmt: skip
        return _again, (type(self), self._name, self._module, said)

    def derive(self, name: str, kind: SpanKind, entry: object, module: str | None) -> ScopeSpan:
        """Return a scope made from the current one, with an open span; it isn't current yet.

        Args:
            name: The span's.
            kind: The span's.
            entry: What leaves it, if it is a block.
            module: The code that it belongs to.
        """
        outer = current()
        if outer is not None and outer.left_elsewhere:
            outer = still_open(outer)
        run = None
        if _runs.config_here() is not None or (outer is not None and outer.open_runs):
            run = _runs.around(outer)
        # Where the context was lost, or a run is all there is around, its scope is the one that holds.
        base = outer if outer is not None else run.scope if run is not None else _runtime.base()
        inherited = base.inherited
        recorder = inherited.recorder
        span: Any = base
        parent: Any = base
        if not isinstance(base, ScopeSpan):  # Else not by its properties, which are calls.
            span, parent = base.span, base.parent_inside
        if run is not None and (outer is None or (run is not base.entered_in and not descends(span, run))):
            parent = run
            if run.scope is not base:
                base = base.inside(run.scope)
                inherited = base.inherited
                recorder = inherited.recorder
        remote = self._parent if self._adds else None
        if remote is not None:
            parent, inherited = remote.span, remote.applied_to(inherited)
        if not parent or remote is not None:
            inherited = self._begun(inherited, remote)
        if self._adds or not _runtime.is_on_everywhere:
            inherited = self._added_to(inherited, _runtime.library(module))
        scope = _new(ScopeSpan)
        scope.name = name
        scope.kind = kind
        scope.inherited = inherited
        scope.parent = parent or None
        scope.trace_bits = parent.trace_bits if parent else recorder.new_trace_bits()
        scope.span_bits = recorder.new_span_bits()
        scope.started_at_ns = recorder.now_ns()
        scope.base = base
        scope.outer = outer
        scope.entry = entry
        if recorder.opened is not None:
            recorder.opened(scope)
        if run is not None:
            scope.entered_in = run
        # What a carrier brings is this block's own too.
        added = self._metadata if remote is None else inherited.metadata
        if added:
            scope.added = added
        try:
            if outer is None:
                Scope.roots.add(scope)
            return scope
        except BaseException:  # An interrupt: nobody would take it out.
            Scope.roots.discard(scope)
            raise

    def _added_to(self, inherited: Inherited, library: Library | None) -> Inherited:
        """Return what holds inside; made anew only when something else holds around."""
        around, found_library, made = self._added
        if around() is inherited and found_library is library:
            found = made()
            if found is not None:
                return found
        tags, metadata, callbacks = self._tags, self._metadata, inherited.callbacks
        capture = inherited.capture & self._capture
        if library is not None:
            tags, capture = (*tags, *library.tags), capture & library.capture
        if self._callback is not None:
            callback = self._callback()
            # Each function once: a recursive one is entered many times.
            callbacks = (callback, *[other for other in callbacks if other.function != callback.function])
        found = Inherited(
            inherited.recorder,
            tuple(dict.fromkeys((*inherited.tags, *tags))) if tags else inherited.tags,
            {**inherited.metadata, **metadata} if metadata else inherited.metadata,
            callbacks,
            self._user if self._user is not None else inherited.user,
            self._session if self._session is not None else inherited.session,
            capture,
            inherited.sampled,
        )
        # Not the first time: most declarations that are made for a block are entered once. And not an async callback,
        # which belongs to the loop it is entered on.
        if self._is_used and not self._is_async:
            # Weakly, or a declaration would keep what was around its last entry.
            self._added = ref(inherited), library, ref(found)
        self._is_used = True
        return found

    def _begun(self, inherited: Inherited, remote: Any) -> Inherited:
        """Decide, at the root of a trace here, whether it is recorded."""
        if remote is not None and remote.sampled is not None:
            sampled = bool(remote.sampled)
        else:
            sampled = inherited.recorder.sampled(self._sample)
        return inherited if sampled is inherited.sampled else inherited.with_(sampled=sampled)


def _again(kind: type[Declaration], name: str | None, module: str | None, said: tuple[Any, ...]) -> Declaration:
    declaration = kind(name, module)
    declaration.say(*said)
    return declaration


def _callback_maker(on_request: Callable[[Any], Any]) -> Callable[[], Callback]:
    """Return what makes the scope's callback at its entry: an async one remembers the loop it is entered on."""
    if not is_coroutine(on_request):
        callback = Callback(on_request, None)
        return lambda: callback
    return lambda: Callback(on_request, _runs.running_loop())
