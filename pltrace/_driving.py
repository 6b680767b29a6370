"""Drives coroutines, iterators and other results so that each of their steps runs inside a scope of its own."""

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
from typing import Any

from pltrace._generators import async_generator, generator
from pltrace._health import pass_on
from pltrace._stepping import HELD_ONCE, Steps, inside, named
from pltrace._wrapping import ObjectProxy, repr_of_wrapped, set_class

__all__ = ["consumed", "coroutine"]


def _awaited(steps: Steps, source: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """Await something inside the scope, and end the span with it."""
    steps.is_awaited = True
    try:
        value = yield from inside(steps, source)
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
            if getrefcount(self.coroutine) <= HELD_ONCE:
                self.coroutine.close()


async def _coroutine(steps: Steps, unawaited: _Source) -> Any:
    unawaited.__class__ = _Source
    source, unawaited.coroutine = unawaited.coroutine, None
    steps.is_awaited = True
    try:
        value = await inside(steps, source)
    except BaseException as error:
        steps.end(error)
        raise
    return _ended(steps, value)


def coroutine(steps: Steps, source: Any) -> Any:
    """Drive a coroutine."""
    return named(_coroutine(steps, _Unawaited(source)), source)


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
            result = await inside(steps, step(*arguments))
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
_FINISHED = frozenset({type(None), str, int, float, bool, bytes, list, dict, tuple, set, frozenset})
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
        if kind in _FINISHED:
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
