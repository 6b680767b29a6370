"""Drives generators, coroutines and iterators so that each of their steps runs inside a scope of its own."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import sys
import types
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator
from contextlib import suppress
from sys import getrefcount
from typing import Any, Protocol

from pltrace._collecting import is_collecting
from pltrace._health import pass_on
from pltrace._wrapping import ObjectProxy, repr_of_wrapped, set_class

__all__ = ["Steps", "async_generator", "consumed", "coroutine", "generator"]


class Steps(Protocol):
    """What is around the steps of something that is consumed; several may be taken at once, by several threads."""

    #: Whether it is awaited as a whole: it isn't left early then, but cancelled.
    is_awaited: bool

    def outside(self) -> Any:
        """Return the consumer's own scope; called before each step."""

    def resume(self) -> None:
        """Make the scope current; called before each step, for the first of which the span starts."""

    def suspend(self, outside: Any) -> None:
        """Keep what is current for the next step, and give the consumer its own scope back; called after each step."""

    def restore(self, outside: Any) -> object:
        """Give the consumer its own scope back, if it hasn't got it: Ctrl+C can interrupt the others anywhere."""

    def end(self, error: BaseException | None = None, value: Any = None) -> None:
        """End the span, if it hasn't ended."""


#: In place of the consumer's scope between two steps, when that isn't held.
_SUSPENDED: Any = object()


class _WithoutScope:
    """Steps that a finalizer takes: the collector has found something that is consumed, and closes it.

    The scope can't be made current then; the span ends.
    """

    def __init__(self, steps: Steps) -> None:
        self.is_awaited = steps.is_awaited
        self.end = steps.end

    def outside(self) -> None:
        """Do nothing."""

    def resume(self) -> None:
        """Do nothing."""

    def suspend(self, outside: Any) -> None:
        """Do nothing."""

    restore = suspend


class _Driver:
    """Tells a driver whether it is closed, or was let go of: then what it drives goes on, if others hold it too.

    As a stream does that a function was given, or keeps, and returns.
    """

    __slots__ = ("__weakref__", "_driver")

    def is_let_go(self) -> bool:
        """Return whether nobody holds the driver any more; Python tells weak references before it closes it."""
        return self._driver() is None

    def is_(self, driver: Any) -> None:
        """Take note of the driver."""
        self._driver = weakref.ref(driver)


#: What `getrefcount` says at most of what one variable or attribute holds, and nobody else.
_HELD_ONCE = 2


def _generator(steps: Steps, source: Any, driver: _Driver) -> Generator[Any, Any, Any]:
    """Pass on what is sent, thrown and returned; of what passes nothing is kept, nor is an exception's context changed.

    `close` passes as what it is, a `GeneratorExit` that is thrown: so a generator may answer it in any way it likes.
    """
    sent: Any = None
    thrown: BaseException | None = None
    outside = steps.outside()
    try:
        while True:
            try:
                steps.resume()
                # Thrown outside of the except block below, or the user's exception would get it as its context.
                if thrown is None:
                    item = source.send(sent)
                elif driver.is_let_go() and (getrefcount(source) > _HELD_ONCE or source.gi_code is _generator.__code__):
                    del source  # It is closed by that, unless others hold it too.
                    raise thrown
                else:
                    item = source.throw(thrown)
            except StopIteration as stop:
                steps.suspend(outside)
                steps.end(value=stop.value)
                return stop.value
            except BaseException as error:
                thrown = None  # It would be part of a cycle.
                steps.suspend(outside)
                steps.end(error)
                raise
            steps.suspend(outside)
            outside, thrown, sent = _SUSPENDED, None, None
            try:
                sent = yield (item, item := None)[0]
            except BaseException as error:
                thrown = error
                if is_collecting():
                    steps = _WithoutScope(steps)
            outside = steps.outside()
    except BaseException as error:
        # Mostly all is done already. Not where we were interrupted.
        if outside is not _SUSPENDED:
            steps.restore(outside)
        steps.end(error)
        raise


_awaitable_generator: Any = types.coroutine(types.FunctionType(_generator.__code__, globals()))


def generator(steps: Steps, source: Any) -> Any:
    """Drive a generator; also one that can be awaited, which `types.coroutine` makes of it, before or after us."""
    drive = _awaitable_generator if source.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE else _generator
    return _named(drive(steps, source, known := _Driver()), source, known)


@types.coroutine
def _inside(steps: Steps, source: Any) -> Generator[Any, Any, Any]:
    """Await something with the scope around each of its steps, but without ending the span."""
    iterator = source if inspect.iscoroutine(source) or inspect.isgenerator(source) else source.__await__()
    has_send = hasattr(iterator, "send")
    sent: Any = None
    thrown: BaseException | None = None
    outside = steps.outside()
    try:
        while True:
            try:
                steps.resume()
                if thrown is None:
                    item = iterator.send(sent) if has_send else next(iterator)
                elif hasattr(iterator, "throw") and getattr(iterator, "cr_frame", iterator) is not None:
                    item = iterator.throw(thrown)
                else:  # Or it is a coroutine that the garbage collector found together with this one, and closed first.
                    raise thrown
            except StopIteration as stop:
                return stop.value
            except BaseException:
                source = iterator = None  # What throws an exception holds it: it would be part of a cycle.
                raise
            finally:
                thrown = None
                steps.suspend(outside)
            outside, sent = _SUSPENDED, None
            try:
                sent = yield (item, item := None)[0]
            except BaseException as error:
                thrown = error
                if is_collecting():
                    steps = _WithoutScope(steps)
            outside = steps.outside()
    except BaseException:
        if outside is not _SUSPENDED:
            steps.restore(outside)
        raise


def _awaited(steps: Steps, source: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """Await something inside the scope, and end the span with it."""
    steps.is_awaited = True
    try:
        value = yield from _inside(steps, source)
    except BaseException as error:
        steps.end(error)
        raise
    return _ended(steps, value)


def _ended(steps: Steps, value: Any) -> Any:
    """End the span with what was awaited; or let it go on, if that is a stream, while that is consumed."""
    drive = consumed(value)
    # What else can be consumed, as a database's cursor or client, is given back as it is.
    if drive is None or drive is _driven:
        steps.end(value=value)
        return value
    steps.is_awaited = False
    return drive(steps, value)


class _Source:
    """A coroutine, and its driver's from the first step on."""

    __slots__ = ("coroutine",)

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine


class _Unawaited(_Source):
    """Closes a coroutine that nobody awaits: Python warns of its driver already, under the same name.

    Its finalizer isn't there any more when somebody does: an interrupt in there would be lost.
    """

    __slots__ = ()

    def __del__(self) -> None:
        with suppress(AttributeError):  # Its making was interrupted.
            if getrefcount(self.coroutine) <= _HELD_ONCE:
                self.coroutine.close()


async def _coroutine(steps: Steps, unawaited: _Source) -> Any:
    unawaited.__class__ = _Source
    source, unawaited.coroutine = unawaited.coroutine, None
    steps.is_awaited = True
    try:
        value = await _inside(steps, source)
    except BaseException as error:
        steps.end(error)
        raise
    return _ended(steps, value)


def coroutine(steps: Steps, source: Any) -> Any:
    """Drive a coroutine."""
    return _named(_coroutine(steps, _Unawaited(source)), source)


async def _async_generator(steps: Steps, source: Any, driver: _Driver) -> AsyncGenerator[Any, Any]:
    sent: Any = None
    thrown: BaseException | None = None
    driving = _Driving()
    first: Callable[[Any], Any] | None = driving.first_step_of(source)
    try:
        while True:
            try:
                if isinstance(thrown, GeneratorExit) and getattr(source, "ag_frame", source) is None:
                    raise thrown  # Others closed it, and it would answer as one that goes on.
                item = await _inside(steps, (first or source.asend)(sent) if thrown is None else source.athrow(thrown))
            except StopAsyncIteration:
                steps.end()
                return
            except BaseException as error:
                thrown = None
                steps.end(error)
                raise
            first, thrown, sent = None, None, None
            try:
                sent = yield (item, item := None)[0]
            except BaseException as error:
                thrown = error
                if driver.is_let_go() and not driving.is_collected:
                    known, driving.retakes = weakref.ref(source), True
                    del source
                    retaken, driving.retaken, driving.retakes = driving.retaken, None, False
                    source = known() if retaken is None else retaken
                    if retaken is None:  # Others hold it too.
                        thrown = None  # It would be part of a cycle.
                        raise
    except BaseException as error:
        steps.end(error)
        driving.leave(source)
        raise


def async_generator(steps: Steps, source: AsyncGenerator[Any, Any]) -> Any:
    """Drive an async generator: what is sent and thrown passes through, `aclose` as `close` does for a generator."""
    return _named(_async_generator(steps, source, known := _Driver()), source, known)


class _Driving:
    """What an event loop knows of an async generator that is driven: nothing, as long as its driver sees to it.

    When a loop shuts down it closes all async generators it knows, at once; closing both a driver and, beside it, what
    it drives is an error. Nor may the garbage collector close it, which can't await: the loop closes the driver then.
    """

    def __init__(self) -> None:
        self._hooks: Any = None
        self._is_left = False
        #: The garbage collector has found it, together with its driver.
        self.is_collected = False
        #: It is let go of, to be taken again, and closed, if nobody else holds it.
        self.retakes = False
        self.retaken: Any = None

    def first_step_of(self, source: AsyncGenerator[Any, Any]) -> Callable[[Any], Any]:
        """Return what makes the first step without the loop's knowing of it."""

        def asend(sent: Any) -> Any:
            self._hooks = sys.get_asyncgen_hooks()
            try:
                sys.set_asyncgen_hooks(None, self._collected)
                return source.asend(sent)
            finally:
                sys.set_asyncgen_hooks(*self._hooks)

        return asend

    def leave(self, source: AsyncGenerator[Any, Any]) -> None:
        """Leave it to the loop, if it hasn't ended with its driver: that was interrupted in our own code."""
        if self._hooks is not None and sys.get_asyncgen_hooks().finalizer == self._collected:
            sys.set_asyncgen_hooks(*self._hooks)  # That was interrupted, too.
        if self._hooks is not None and getattr(source, "ag_frame", None) is not None:
            self._is_left = True
            if self._hooks.firstiter is not None:
                self._hooks.firstiter(source)

    def _collected(self, source: AsyncGenerator[Any, Any]) -> None:
        self.is_collected = True
        if self.retakes:
            self.retaken = source
        elif self._is_left and self._hooks.finalizer is not None:
            self._hooks.finalizer(source)


async def _each(source: AsyncIterable[Any]) -> AsyncGenerator[Any, Any]:
    async for item in source:
        yield item


def _response(steps: Steps, response: Any) -> Any:
    """Drive the body of a response, which the server asks for when the call is over."""
    body = response.body_iterator
    response.body_iterator = async_generator(steps, body if inspect.isasyncgen(body) else _each(body))
    return response


class Driven(ObjectProxy):
    """A result whose steps run inside the scope, and which is in all else the one it stands for.

    Subclasses have those of the methods below that its type has: what looks for `close` finds it only if it is there.
    One that hasn't ended is of a subclass of these, with a finalizer; when it has, an interrupt in there would be lost.
    """

    def __init__(self, source: Any, steps: Steps) -> None:
        super().__init__(source)
        self._self_steps: Steps | None = steps

    def _self_step(self, name: str, *arguments: Any) -> Any:
        steps, step = self._self_steps, getattr(self.__wrapped__, name)
        if steps is None:
            return step(*arguments)
        outside = steps.outside()
        try:
            try:
                steps.resume()
                result = step(*arguments)
            finally:
                steps.suspend(outside)
        except BaseException as error:
            steps.restore(outside)
            if isinstance(error, StopIteration):
                self._self_end(value=error.value)
            else:
                self._self_end(error)
            raise
        return self if result is self.__wrapped__ else result

    async def _self_async_step(self, name: str, *arguments: Any) -> Any:
        steps, step = self._self_steps, getattr(self.__wrapped__, name)
        if steps is None:
            return await step(*arguments)
        try:
            result = await _inside(steps, step(*arguments))
        except BaseException as error:
            self._self_end(None if isinstance(error, StopAsyncIteration) else error)
            raise
        return self if result is self.__wrapped__ else result

    def _self_end(self, error: BaseException | None = None, value: Any = None) -> None:
        steps, self._self_steps = self._self_steps, None
        if steps is not None:
            steps.end(error, value)
            set_class(self, type(self).__base__)

    def __copy__(self) -> Any:
        return copy.copy(self.__wrapped__)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)

    __repr__ = repr_of_wrapped


def _passing(name: str) -> Any:
    return lambda self, *args, **kwargs: getattr(self.__wrapped__, name)(*args, **kwargs)


def _stepping(name: str) -> Any:
    return lambda self, *arguments: self._self_step(name, *arguments)


def _async_stepping(name: str) -> Any:
    return lambda self, *arguments: self._self_async_step(name, *arguments)


def _ending_with(step: Any) -> Any:
    """Return a method that takes a step, and ends the span."""

    def last(self: Driven, *arguments: Any) -> Any:
        try:
            return step(self, *arguments)
        finally:
            self._self_end()

    return last


def _async_ending_with(step: Any) -> Any:
    async def last(self: Driven, *arguments: Any) -> Any:
        try:
            return await step(self, *arguments)
        finally:
            self._self_end()

    return last


def _await(self: Driven) -> Any:
    steps, self._self_steps = self._self_steps, None
    return self.__wrapped__.__await__() if steps is None else _awaited(steps, self.__wrapped__)


_METHODS: dict[str, Any] = {
    **{name: _stepping(name) for name in ("__iter__", "__next__", "send", "throw", "__aiter__", "__enter__")},
    **{name: _ending_with(_stepping(name)) for name in ("close", "__exit__")},
    **{name: _async_stepping(name) for name in ("__anext__", "asend", "athrow", "__aenter__")},
    **{name: _async_ending_with(_async_stepping(name)) for name in ("aclose", "__aexit__")},
    "__await__": _await,
}


def _abandoned(driven: Driven) -> None:
    with suppress(AttributeError):  # Its making was interrupted.
        driven._self_end(GeneratorExit())


_classes: weakref.WeakKeyDictionary[type[Any], type[Driven]] = weakref.WeakKeyDictionary()


def _driven(steps: Steps, source: Any) -> Driven:
    kind = type(source)
    driven = _classes.get(kind)
    if driven is None:
        # Python looks for special methods in classes alone, so a proxy has to have those of what it stands for.
        special = [name for name in {*dir(kind)} - {*dir(Driven)} if name.startswith("__") and name != "__del__"]
        methods = {name: _passing(name) for name in special if callable(getattr(kind, name, None))}
        methods.update({name: method for name, method in _METHODS.items() if hasattr(kind, name)})
        if hasattr(kind, "fetchall"):  # A database cursor's, by PEP 249: it reads to the end.
            is_async = inspect.iscoroutinefunction(kind.fetchall)
            last = _async_ending_with(_async_stepping("fetchall")) if is_async else _ending_with(_stepping("fetchall"))
            methods["fetchall"] = last
        ended = type(Driven.__name__, (Driven,), methods)
        driven = _classes[kind] = type(Driven.__name__, (ended,), {"__del__": _abandoned})
    return driven(source, steps)


#: Results that are nothing to consume: by far the most, told by one look-up.
FINISHED = frozenset({type(None), str, int, float, bool, bytes, list, dict, tuple, set, frozenset})
#: What all files are, without the detour of an abstract class, and without asking the object, which may be a proxy.
_FILE: Any = io.IOBase.__base__
#: What marks a type whose objects are consumed step by step, and what else such a type has: a database's client may be
#: awaited, or refuse `next()`, and isn't consumed.
_MARKERS = {"__next__": "__iter__", "__anext__": "__aiter__", "__await__": "__await__"}
#: What marks futures: that of asyncio, of others, and of Ray.
_FUTURES = ("_asyncio_future_blocking", "add_done_callback", "as_future")
#: So many types are remembered.
_MOST_TYPES = 2_000


def consumed(result: Any) -> Callable[[Steps, Any], Any] | None:
    """Return what drives the result of a plain function while it is consumed; None if it is a finished value."""
    kind: Any = type(result)
    try:
        if kind in FINISHED:
            return None
        drive = _way_of(kind)
        if drive is _response:
            return drive if "body_iterator" in vars(result) else None
        # A proxy has all markers; what it stands for, which is all that counts, is what it says it is. One that stands
        # for nothing yet says that it is itself.
        if drive is _driven and len({hasattr(result.__class__, mark) for mark in _MARKERS}) == 1:
            return None
        return drive
    except Exception as error:  # Its class answers in its own way, even when asked what it has.
        pass_on(error)
        return None


_DRIVERS: dict[type, Callable[[Steps, Any], Any]] = {
    types.GeneratorType: generator,
    types.CoroutineType: coroutine,
    types.AsyncGeneratorType: async_generator,
}


@functools.lru_cache(_MOST_TYPES)
def _way_of(kind: type) -> Callable[[Steps, Any], Any] | None:
    if kind in _DRIVERS:
        return _DRIVERS[kind]
    # FastAPI's too; whoever made one has imported it.
    if issubclass(kind, getattr(sys.modules.get("starlette.responses"), "Response", ())):
        return _response
    # Files are read later by design.
    if issubclass(kind, _FILE) or kind.__module__ == "unittest.mock":
        return None
    return _driven if _is_consumed(kind) else None


def _is_consumed(kind: type) -> bool:
    marks = [mark for mark, other in _MARKERS.items() if hasattr(kind, mark) and getattr(kind, other, None) is not None]
    if marks != ["__await__"]:
        return bool(marks)
    # Futures and tasks run by themselves. What is awaited or else entered, and is no coroutine in disguise, lives on,
    # as a client or a pool.
    lives_on = not hasattr(kind, "send") and hasattr(kind, "__aenter__")
    return not lives_on and not any(hasattr(kind, mark) for mark in _FUTURES)


def _named(driver: Any, source: Any, known: _Driver | None = None) -> Any:
    """Give a driver the name of what it drives, for tracebacks and `repr`."""
    driver.__name__, driver.__qualname__ = source.__name__, source.__qualname__
    if known is not None:
        known.is_(driver)
    return driver
