"""`traced`: a declaration that opens a scope, with a span, around a block or around each call of a function."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload
from weakref import ref

from pltrace import _runs, _runtime
from pltrace._calling import Call, end, leave, leave_all
from pltrace._checks import (
    CAPTURE_ALL,
    INPUTS,
    checked_capture,
    checked_metadata,
    checked_name,
    checked_sample,
    checked_tags,
)
from pltrace._driving import FINISHED, async_generator, consumed, coroutine, generator
from pltrace._errors import ConfigError
from pltrace._health import failed
from pltrace._propagation import checked_carrier
from pltrace._scope import (
    Callback,
    Inherited,
    PassedOver,
    Scope,
    ScopeSpan,
    attach,
    current,
    detach,
    entry_of,
    still_open,
)
from pltrace._snapshot import arguments_of
from pltrace._span import INERT_SPAN, Span, SpanKind
from pltrace._typing import Capture
from pltrace._wrapping import (
    RunnableProxy,
    Wrapped,
    code_flags,
    has_to_stay_a_class,
    held_in,
    in_class,
    is_coroutine,
    is_decorable,
    is_own_class,
    is_runnable,
    rewrap,
    wrapped_call,
)

if TYPE_CHECKING:
    from functools import cached_property, partialmethod, singledispatchmethod

    from langchain_core.runnables import Runnable

    from pltrace._config import Library

__all__ = ["Traced", "traced"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
AnyClass = TypeVar("AnyClass", bound=type)
AnyRunnable = TypeVar("AnyRunnable", bound="Runnable[Any, Any]")
# In one piece: pyright doesn't read a type that is joined from two, and takes anything for it.
AnyDescriptor = TypeVar(
    "AnyDescriptor", bound="property | cached_property[Any] | partialmethod[Any] | singledispatchmethod[Any]"
)

_NO_TAGS: tuple[str, ...] = ()

_Maybe = Callable[[], "Inherited | None"]


def _nothing() -> None:
    return None


_NOT_MADE: tuple[_Maybe, Any, _Maybe] = (_nothing, None, _nothing)


class Traced:
    """A declaration made by `traced(...)`; it never changes, so it can be used anywhere, by many at once, and again."""

    __slots__ = (
        "_added", "_adds", "_callback", "_capture", "_is_async", "_metadata", "_module", "_name", "_on_request",
        "_open", "_parent", "_sample", "_session", "_tags", "_user",
    )  # fmt: skip

    def __init__(
        self,
        name: str | None,
        tags: tuple[str, ...],
        metadata: Mapping[str, Any],
        on_request: Callable[[Any], Any] | None,
        user: str | None,
        session: str | None,
        capture: int,
        sample: float | None,
        parent: Any,
        module: str | None,
    ) -> None:
        self._name = name
        self._tags = tags
        self._metadata = metadata
        self._on_request = on_request
        self._callback = None if on_request is None else _callback_maker(on_request)
        self._user = user
        self._session = session
        self._capture = capture
        self._sample = sample
        self._parent = parent
        self._is_async = on_request is not None and is_coroutine(on_request)
        self._adds = bool(tags or metadata or on_request or user or session) or capture != CAPTURE_ALL
        #: What holds inside, and what and who it was made from: mostly the same again.
        self._added: tuple[_Maybe, Library | None, _Maybe] = _NOT_MADE
        self._module = module  # Where it was made: a block belongs to it, as a function does to its own.
        # Blocks that are open, latest last: for one that is left in another context than it was entered in.
        self._open: dict[int, ScopeSpan] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what was declared; what is open isn't part of it."""
        return Traced, (
            self._name, self._tags, self._metadata, self._on_request, self._user, self._session, self._capture,
            self._sample, self._parent, self._module,
        )  # fmt: skip

    # As a context manager.

    def __enter__(self, _depth: int = 1) -> Span:
        """Open a block: what runs inside it is recorded under its span.

        Args:
            _depth: How far up the user's frame is.
        """
        if not _runtime.is_on_everywhere and not (_runtime.gate and _runtime.is_on(self._module)):
            # Its leaving must find it, and not a block that was opened since.
            attach(PassedOver(current(), self))
            return INERT_SPAN
        scope = None
        try:
            scope = self._enter(self._name or "traced", "block", self, self._module)
            if self._open:
                scope.frame = id(sys._getframe(_depth))
            self._open[id(scope)] = scope
            scope.token = attach(scope)
        except BaseException as error:
            if scope is not None:
                self._open.pop(id(scope), None)
                detach(scope)
            if not isinstance(error, Exception):  # The program was interrupted.
                raise
            failed("entering a traced block")
            return INERT_SPAN
        return scope

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any, _depth: int = 1) -> None:
        """Leave the latest block of this context that this declaration opened."""
        try:
            scope = current()
            if scope is None or scope.entry is not self or scope.closed:
                scope = entry_of(self) or self._left_elsewhere(id(sys._getframe(_depth)))
                if scope is None:
                    return
            span = self._open.pop(id(scope), None)
            if span is None:  # It is a copy, for a run, of the one that was entered; or nothing was recorded then.
                span = self._open.pop(id(scope.span), None)
                if type(scope) is PassedOver and scope is current():
                    attach(scope.outer)
                    return
            if error is not None and isinstance(error, KeyboardInterrupt):
                leave_all(scope, error)  # Calls in it may have been interrupted in our own code.
            else:
                detach(scope)
            if span is not None:
                if span is not scope:
                    detach(span)
                end(span, error)
        except Exception:
            failed("leaving a traced block")

    def forget(self, span: Span) -> None:
        """Take note that a block was ended by what is around it."""
        self._open.pop(id(span), None)

    def _left_elsewhere(self, frame: int) -> Scope | None:
        """Return the open block that is left in another context than it was entered in.

        Args:
            frame: Who leaves it: mostly the one who entered it, which tells it from others that are open.
        """
        opened = list(self._open.values())  # In one step: other threads enter and leave.
        theirs = [scope for scope in opened if scope.frame == frame] or [scope for scope in opened if not scope.frame]
        found = theirs or opened
        return found[-1] if found else None

    async def __aenter__(self) -> Span:
        """Open a block."""
        return self.__enter__(2)

    async def __aexit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leave the block."""
        self.__exit__(kind, error, traceback, 2)

    # As a decorator.

    @overload
    def __call__(self, function: AnyRunnable, /) -> AnyRunnable: ...
    @overload
    def __call__(self, function: classmethod[T, P, R], /) -> classmethod[T, P, R]: ...
    @overload
    def __call__(self, function: staticmethod[P, R], /) -> staticmethod[P, R]: ...
    @overload
    def __call__(self, function: AnyDescriptor, /) -> AnyDescriptor: ...
    @overload
    def __call__(self, function: AnyClass, /) -> AnyClass: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...
    def __call__(self, function: Any, /) -> Any:
        """Return `function`, traced: each call is a span.

        Args:
            function: Any callable, or a descriptor with functions in it. A class with an `__init__` of its own stays
                what it is; that is traced, under the name of the class. So does a command of Click's or a fixture of
                pytest's, with its function.

        Raises:
            ConfigError: It is something else, or a class that has yet to get its `__init__`, as by `@dataclass`.
        """
        inner = rewrap(function, self)
        if inner is not None:
            return inner
        if is_runnable(function):
            return self._traced_runnable(function)
        if not is_decorable(function):
            raise ConfigError(f"traced: expected a callable, got {function!r}")
        held = held_in(function)
        if held is not None:
            setattr(function, held, self(getattr(function, held)))
            return function
        if is_own_class(function) and "__init__" in vars(function):
            return self._traced_class(function)
        if has_to_stay_a_class(function):
            # Wrapped it would be no class to what makes it one, and what is put there, taken for the user's own.
            raise ConfigError(
                f"traced: {function!r} defines no __init__ that could be traced; put @traced on its methods, or above "
                "what makes its __init__, as @dataclass"
            )
        return in_class(self._wrapped(function, _name_of(function), _module_of(function)), function)

    def _wrapped(self, function: Any, name: str, module: str | None) -> Wrapped:
        return wrapped_call(function, self._wrapper_for(function, name, module), _runtime.gate, self)

    def _traced_class(self, kind: Any) -> Any:
        kind.__init__ = self._wrapped(vars(kind)["__init__"], _name_of(kind), _module_of(kind))
        return kind

    def _traced_runnable(self, runnable: Any) -> RunnableProxy:
        # Its own class is LangChain's; it belongs to who traces it.
        name, module = str(runnable.get_name()), self._module

        def wrap(method: Any) -> Wrapped:
            return self._wrapped(method, name, module)

        return RunnableProxy(runnable, wrap, (_traced_again, self))

    def _wrapper_for(self, function: Any, name: str, module: str | None) -> Any:
        """Return what is called in place of `function`: chosen once, by what calling it makes."""
        name = self._name or name
        flags = code_flags(function)
        for flag, drive in _DRIVERS:
            if flags & flag:
                return self._driven(name, module, drive)
        return self._plain(name, module)

    def _driven(self, name: str, module: str | None, drive: Any) -> Any:
        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            source = wrapped(*args, **kwargs)
            if not _runtime.is_on(module):
                return source
            return drive(Call(self, name, module, arguments_of(wrapped, args, kwargs)), source)

        return call

    def _plain(self, name: str, module: str | None) -> Any:
        def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
            if not _runtime.is_on_everywhere and not _runtime.is_on(module):
                return wrapped(*args, **kwargs)
            scope = None
            try:
                scope = self._enter(name, "function", None, module)
                attach(scope)
            except RecursionError:
                pass  # There is no room for us, nor is there for the call.
            except Exception:
                failed("entering a traced call")
            except BaseException as error:  # The program was interrupted.
                if scope is not None:
                    leave(scope, error)
                    end(scope, error)
                raise
            if scope is None:  # Here, or the user's exceptions would get ours as their context.
                return wrapped(*args, **kwargs)
            try:
                if scope.inherited.capture & INPUTS:
                    scope.arguments = arguments_of(wrapped, args, kwargs)
                result = wrapped(*args, **kwargs)
                drive = None if type(result) in FINISHED else consumed(result)
            except BaseException as error:
                leave(scope, error)
                end(scope, error)
                raise
            if drive is not None:
                attach(scope.outer)  # Left, but not closed: it is resumed while the result is consumed.
                return drive(Call(self, name, scope=scope), result)
            leave(scope)
            end(scope, None, result)
            return result

        return call

    def _enter(self, name: str, kind: SpanKind, entry: object, module: str | None) -> ScopeSpan:
        """Derive a scope from the current one, with an open span."""
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
        parent: Any
        if isinstance(base, ScopeSpan):  # Not by its properties, which are calls.
            parent, above = base, (*base.above, base)
        else:
            parent, above = base.span, base.lineage
        if run is not None and (outer is None or (run is not base.entered_in and not _descends(parent, run))):
            parent = run
        remote = self._parent
        if remote is not None:
            parent, inherited = remote.span, remote.applied_to(inherited)
        if not parent or remote is not None:
            inherited = self._begun(inherited, remote)
        if self._adds or not _runtime.is_on_everywhere:
            inherited = self._added_to(inherited, _runtime.library(module))
        scope = recorder.scope_type(
            name, kind, inherited, parent or None, parent.trace_bits if parent else recorder.new_trace_bits(),
            recorder.new_span_bits(), recorder.now_ns(), above, outer, entry,
        )  # fmt: skip
        if run is not None:
            scope.entered_in = run
        # What a carrier brings is this block's own too.
        added = self._metadata if remote is None else inherited.metadata
        if added:
            scope.added = added
        if outer is None:
            Scope.roots.add(scope)
        return scope

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
        if not self._is_async:  # Else its callback belongs to the loop it is entered on.
            # Weakly, or a declaration would keep what was around its last entry.
            self._added = ref(inherited), library, ref(found)
        return found

    def _begun(self, inherited: Inherited, remote: Any) -> Inherited:
        """Decide, at the root of a trace here, whether it is recorded."""
        if remote is not None and remote.sampled is not None:
            sampled = bool(remote.sampled)
        else:
            sampled = inherited.recorder.sampled(self._sample)
        return inherited if sampled is inherited.sampled else inherited.with_(sampled=sampled)


_DRIVERS: tuple[tuple[int, Callable[[Any, Any], Any]], ...] = (
    (inspect.CO_COROUTINE, coroutine),
    (inspect.CO_GENERATOR, generator),
    (inspect.CO_ASYNC_GENERATOR, async_generator),
)


def _traced_again(runnable: Any, declaration: Traced) -> Any:
    return declaration(runnable)


def _descends(span: Any, run: Span) -> bool:
    while isinstance(span, Span):
        if span is run:
            return True
        span = span.parent
    return False


def _name_of(function: Any) -> str:
    """Return a callable's qualified name: its own, that of what it stands for, or that of its class."""
    inner = getattr(function, "func", function)  # functools.partial
    return str(getattr(inner, "__qualname__", None) or type(inner).__qualname__)


def _module_of(function: Any) -> str:
    """Return the module that a callable was defined in."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__module__", None) or type(inner).__module__)


def _callback_maker(on_request: Callable[[Any], Any]) -> Callable[[], Callback]:
    """Return what makes the scope's callback at its entry: an async one remembers the loop it is entered on."""
    if not is_coroutine(on_request):
        callback = Callback(on_request, None)
        return lambda: callback
    return lambda: Callback(on_request, _runs.running_loop())


@overload
def traced(function: AnyRunnable, /) -> AnyRunnable: ...
@overload
def traced(function: classmethod[T, P, R], /) -> classmethod[T, P, R]: ...
@overload
def traced(function: staticmethod[P, R], /) -> staticmethod[P, R]: ...
@overload
def traced(function: AnyDescriptor, /) -> AnyDescriptor: ...
@overload
def traced(function: AnyClass, /) -> AnyClass: ...
@overload
def traced(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def traced(
    name: str | None = None,
    /,
    *,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_request: Callable[[Any], Any] | None = None,
    user: str | None = None,
    session: str | None = None,
    capture: Capture = True,
    sample: float | None = None,
    parent: Mapping[str, str] | None = None,
) -> Traced: ...
def traced(
    name: Any = None,
    /,
    *,
    tags: Iterable[str] = (),
    metadata: Mapping[str, Any] | None = None,
    on_request: Callable[[Any], Any] | None = None,
    user: str | None = None,
    session: str | None = None,
    capture: Capture = True,
    sample: float | None = None,
    parent: Mapping[str, str] | None = None,
) -> Any:
    """Record all LangChain calls inside a block, or inside each call of a function, under one span.

    Use it as a decorator (`@traced` or `@traced(...)`), on any callable, or as a context manager (`with` or
    `async with`), which yields the `Span`. One object can be used many times, at the same time, and nested in itself.

    Args:
        name: The span's name; by default the function's qualified name, or `traced` for a block.
        tags: Strings, added to those of the blocks around it.
        metadata: String keys and any values, added to that of the blocks around it; the inner wins.
        on_request: Called in the background with the `Request` of each LLM call inside, once it has its id; plain or
            async. Those of the blocks around it are called too, the innermost first.
        user: The end user that it is done for.
        session: The conversation that it belongs to.
        capture: True, False, `"inputs"` or `"outputs"`: what is kept of arguments, prompts and results. An inner
            block can only narrow it.
        sample: The share of traces that is recorded, 0.0 to 1.0; decided where a trace begins.
        parent: A carrier that `inject()` made, in another process: the block goes on with its trace.

    Returns:
        The function, traced; or a declaration to decorate or enter.

    Raises:
        ConfigError: An argument has a wrong type or value.
    """
    runnable = None
    if name is not None and not isinstance(name, str):
        if is_runnable(name):
            name, runnable = None, name
        elif is_decorable(name):
            return _DEFAULT(name)
        else:
            raise ConfigError(f"name={name!r}: expected a string, got {type(name).__name__}")
    if on_request is not None and not callable(on_request):
        raise ConfigError(f"on_request={on_request!r}: expected a function that takes a Request")
    try:
        module = sys._getframe(1).f_globals.get("__name__")
    except ValueError:  # Called by no Python code, as a thread's first function is.
        module = None
    # What isn't given isn't checked: blocks are declared where they are entered, also while tracing is off.
    declaration = Traced(
        name or (None if name is None else checked_name("name", name)),
        () if tags is _NO_TAGS else checked_tags("tags", tags),
        {} if metadata is None else checked_metadata("metadata", metadata),
        on_request,
        None if user is None else checked_name("user", user),
        None if session is None else checked_name("session", session),
        CAPTURE_ALL if capture is True else checked_capture("capture", capture),
        None if sample is None else checked_sample("sample", sample),
        None if parent is None else checked_carrier("parent", parent),
        module,
    )
    return declaration if runnable is None else declaration(runnable)


_DEFAULT = traced()
