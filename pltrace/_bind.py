"""`bind`: carries the current scope to where Python doesn't: threads, executors, other processes, later consumption."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pltrace import _runs, _runtime
from pltrace._collecting import is_collecting
from pltrace._driving import consumed
from pltrace._health import pass_on, warn_once
from pltrace._propagation import carrier_of, checked_carrier
from pltrace._runnables import TRANSFORMING, RunnableProxy, is_runnable
from pltrace._scope import Scope, attach, current, still_open
from pltrace._wrapping import (
    FunctionWrapper,
    ObjectProxy,
    WithoutWrapt,
    Wrapper,
    annotations_of_wrapped,
    class_of_wrapped,
    repr_of_wrapped,
)

__all__ = ["bind", "reading"]

__tracebackhide__ = True  # pytest shows the user's own lines.

T = TypeVar("T")


def bind(fn: T) -> T:
    """Make `fn` run inside the scope that is current now, wherever and whenever it is called.

    What that begins is the child of the LangChain run of the scope's block that calls it; where none does, as in a
    thread, of the one that `bind` is called in, also when that has ended; or else of the block.

    Args:
        fn: A function of any kind, for a thread, an executor, a process pool or a cluster's task; it can be pickled if
            it could before. A stream, iterator or awaitable that it returns keeps the scope while it is consumed.
            Also an iterator, an async iterator or an awaitable itself; a LangChain Runnable; or an executor, which
            then binds what is submitted to it.

    Returns:
        Something that is used like `fn`; outside any block, `fn` itself.
    """
    scope = still_open(current())
    if scope is None:
        return fn
    bound: Any = _bound(fn, scope)
    return fn if bound is None else bound


def _bound(fn: Any, scope: Scope) -> Any:
    scope = scope.bound(_runs.around())
    drive = consumed(fn)
    if drive is not None:
        return drive(ScopeSteps(scope), fn)
    if _is_executor(fn):
        return (CallableExecutor if callable(fn) else BoundExecutor)(fn, scope)
    if is_runnable(fn):
        return _bound_runnable(fn, carrier_of(scope), scope)
    if not callable(fn):
        return None
    try:
        return BoundFunction(fn, scope, carrier_of(scope))
    except Exception as error:  # It raises what it likes when it is asked what it is, as a wrapper is to know.
        pass_on(error)
        return BoundFunction(functools.partial(fn), scope, carrier_of(scope))


def _is_executor(fn: Any) -> bool:
    """Return whether calls are submitted to it; of what is called itself its class says so: a mock has any method."""
    try:
        whole = fn.__class__ if callable(fn) else fn
        return callable(getattr(whole, "submit", None)) and callable(getattr(whole, "shutdown", None))
    except Exception as error:  # It answers in its own way.
        pass_on(error)
        return False


class ScopeSteps:
    """Puts a scope, or none, around the steps of something that is consumed; it has no span to end."""

    __slots__ = ("_inside", "is_awaited")

    def __init__(self, scope: Scope | None) -> None:
        self._inside = scope
        self.is_awaited = False

    outside = staticmethod(current)
    restore = staticmethod(attach)

    def resume(self) -> None:
        """Make current what the last step left."""
        attach(self._inside and self._inside.resumed_in(_runs.around()))

    def suspend(self, outside: Scope | None) -> None:
        """Give the consumer its own scope back."""
        inside = current()
        if inside is not outside or not is_collecting():  # Else the scope was never current.
            self._inside = inside
            attach(outside)

    def end(self, error: BaseException | None = None, value: Any = None) -> None:
        """Do nothing: the scope is somebody else's."""


class _InputSteps(ScopeSteps):
    """Puts the scope around them as it was, in whatever LangChain run the input is read: that is from outside of it."""

    __slots__ = ()

    def resume(self) -> None:
        """Make current what the last step left."""
        attach(self._inside)


def reading(wrapper: Wrapper) -> Wrapper:
    """Return a wrapper for a Runnable's `transform` or `atransform`, whose steps run in a scope, but not its input.

    That is a stream of what comes before it in a chain, which runs as the stream is read. It keeps the scope that is
    current when the method is called.
    """

    def call(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        if args:
            args = (_kept_outside(args[0]), *args[1:])
        elif "input" in kwargs:
            kwargs = {**kwargs, "input": _kept_outside(kwargs["input"])}
        return wrapper(wrapped, instance, args, kwargs)

    return call


def _kept_outside(stream: Any) -> Any:
    drive = consumed(stream)
    scope = still_open(current())
    return stream if drive is None else drive(_InputSteps(scope and scope.carried()), stream)


class _Binding:
    """What a bound function is called by: not its own method, as the two would hold each other."""

    __slots__ = ("carrier", "scope")

    def __init__(self, scope: Scope | None, carrier: Mapping[str, str]) -> None:
        self.scope = scope
        self.carrier = carrier

    def __call__(self, wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        """Call what is bound, inside the scope."""
        scope = self.scope
        if not _runtime.is_on():
            if scope is None and not _runtime.is_decided():
                warn_once(
                    "bound_but_off",
                    "%s was bound to a scope in another process, and is not recorded here, where nobody switched "
                    "tracing on: set PLTRACE_ENABLED=1 or PROMPTLAYER_API_KEY in the environment, or call "
                    'pltrace.configure() where this process comes by too, not under `if __name__ == "__main__"`. '
                    "PLTRACE_ENABLED=0 ends this warning.",
                    getattr(wrapped, "__qualname__", wrapped),
                )
            return wrapped(*args, **kwargs)
        if scope is None:
            # Made once in each process that it is sent to.
            remote = checked_carrier("bind", self.carrier)
            scope = self.scope = _runtime.base() if remote is None else remote.scope(_runtime.base())
        outside = current()
        attach(scope.resumed_in(_runs.around()))
        try:
            result = wrapped(*args, **kwargs)
        finally:
            attach(outside)
        drive = consumed(result)
        return result if drive is None else drive(ScopeSteps(scope), result)


class BoundFunction(FunctionWrapper, metaclass=WithoutWrapt):
    """A function that runs inside a scope; pickled, it takes the scope along as a carrier.

    Args:
        fn: The function.
        scope: None, where it was pickled: then it is made from the carrier.
        carrier: The scope, for other processes.
        reads: Whether it reads a stream, which isn't to run in the scope.
    """

    __annotations__ = annotations_of_wrapped
    __class__ = class_of_wrapped
    __call__ = FunctionWrapper.__call__
    __repr__ = repr_of_wrapped

    def __init__(
        self, fn: Callable[..., Any], scope: Scope | None, carrier: Mapping[str, str], *, reads: bool = False
    ) -> None:
        binding = _Binding(scope, carrier)
        super().__init__(fn, reading(binding) if reads else binding)
        self._self_kept = binding

    def __get__(self, instance: Any, owner: type | None = None) -> BoundFunction:
        """Bind to an object, or not, as the function does that it wraps."""
        bind_to = getattr(type(self.__wrapped__), "__get__", None)
        return self if bind_to is None else self._self_with(bind_to(self.__wrapped__, instance, owner))

    def __copy__(self) -> BoundFunction:
        """Return itself, as copying a function does; or one with a copy of the object that it wraps."""
        return self._self_with(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: Any) -> BoundFunction:
        """Return itself, as copying a function does; or one with a copy of the object that it wraps."""
        return self._self_with(copy.deepcopy(self.__wrapped__, memo))

    def _self_with(self, fn: Any) -> BoundFunction:
        binding = self._self_kept
        return self if fn is self.__wrapped__ else BoundFunction(fn, binding.scope, binding.carrier)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the function and the carrier."""
        return _restored, (self.__wrapped__, dict(self._self_kept.carrier))


def _restored(fn: Any, carrier: Mapping[str, str]) -> BoundFunction:
    return BoundFunction(fn, None, carrier)


class BoundExecutor(ObjectProxy):
    """An executor that runs what is submitted inside the scope of who submits it, or else the one it was bound in."""

    def __init__(self, executor: Any, scope: Scope) -> None:
        super().__init__(executor)
        self._self_scope = scope

    def _self_bound(self, fn: Any) -> Any:
        return _bound(fn, still_open(current()) or self._self_scope) or fn

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Submit a call."""
        return self.__wrapped__.submit(self._self_bound(fn), *args, **kwargs)

    def map(self, fn: Any, *iterables: Any, **options: Any) -> Any:
        """Submit a call for each item."""
        return self.__wrapped__.map(self._self_bound(fn), *iterables, **options)

    __repr__ = repr_of_wrapped

    def __enter__(self) -> BoundExecutor:
        self.__wrapped__.__enter__()
        return self


class CallableExecutor(BoundExecutor):
    """One that can be called itself, too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it, inside the scope that it was bound in."""
        return BoundFunction(self.__wrapped__, self._self_scope, {})(*args, **kwargs)


def _bound_runnable(runnable: Any, carrier: Mapping[str, str], scope: Scope | None = None) -> RunnableProxy:
    """Return a LangChain Runnable that runs inside a scope; pickled, it takes the scope along as a carrier."""

    def wrap(method: Any) -> BoundFunction:
        return BoundFunction(method, scope, carrier, reads=method.__name__ in TRANSFORMING)

    return RunnableProxy(runnable, wrap, (_bound_runnable, carrier), (scope,))
