"""Drives coroutines, iterators and other results so that each of their steps runs inside a scope of its own."""

from __future__ import annotations

import functools
import inspect
import io
import types
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Generator
from contextlib import suppress
from sys import getrefcount
from typing import Any

from pltrace._generators import async_generator, generator, is_generator_of_ours
from pltrace._health import pass_on
from pltrace._stepping import HELD_ONCE, Steps, inside, named
from pltrace._wrapping import set_class

__all__ = ["consumed", "coroutine", "is_driven"]

__tracebackhide__ = True  # pytest shows the user's own lines.


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


#: So many types are remembered.
_MOST_TYPES = 2_000


async def _each(source: AsyncIterable[Any]) -> AsyncGenerator[Any, Any]:
    async for item in source:
        yield item


#: Responses of web frameworks by package and class, and where they have their body; of a file it is the server's.
_BODIES = {
    ("starlette", "Response"): "body_iterator",  # FastAPI's too.
    ("werkzeug", "Response"): "response",  # Flask's too.
    ("django", "FileResponse"): "",
    ("django", "StreamingHttpResponse"): "streaming_content",
}


@functools.lru_cache(_MOST_TYPES)
def _place_of_body(kind: type) -> str:
    """Return the name of the attribute with the body of a response that may be streamed; an empty one of all else."""
    homes = ((str(base.__module__).partition(".")[0], base.__name__) for base in kind.__mro__)
    return next((_BODIES[home] for home in homes if home in _BODIES), "")


def _body_of(response: Any) -> Any:
    """Return what the server reads when the call is over, or None: it is there already, or a file."""
    kind: Any = type(response)
    return None if getattr(response, "direct_passthrough", False) else getattr(response, _place_of_body(kind), None)


def _response(steps: Steps, response: Any) -> Any:
    """Drive the body of a response, which the server asks for when the call is over."""
    kind: Any = type(response)
    body = _body_of(response)
    drive = consumed(body)
    driven = async_generator(steps, _each(body)) if drive is None else drive(steps, body)
    setattr(response, _place_of_body(kind), driven)
    return response


def _passing(name: str) -> Any:
    """Return a special method that is the one of what a proxy stands for."""

    def method(self: Driven, *args: Any, **kwargs: Any) -> Any:
        source = _source_of(self)
        answer = getattr(source, name)(*args, **kwargs)
        if answer is NotImplemented and args and issubclass(type(args[0]), Driven):
            # An operator that asks for the very type of the other side.
            answer = getattr(source, name)(_source_of(args[0]), *args[1:])
        return self if answer is source else answer

    return method


class Driven:
    """A result whose steps run inside the scope, and which is in all else the one it stands for.

    Python looks for special methods in classes alone. So there is a class of these for each class of results, and has
    its methods, and no others: what looks for `__len__` or `close` finds it only if it is there.
    """

    __slots__ = ("__weakref__", "__wrapped__", "_steps")
    #: What isn't asked of what it stands for; in the classes that are made, also the methods that take steps.
    _own = frozenset({"__wrapped__"})

    def __init__(self, source: Any, steps: Steps) -> None:
        _set_source(self, source)
        _set_steps(self, steps)

    def __getattribute__(self, name: str) -> Any:
        if name in type(self)._own:
            return object.__getattribute__(self, name)
        return getattr(_source_of(self), name)

    __setattr__ = _passing("__setattr__")
    __delattr__ = _passing("__delattr__")
    __eq__ = _passing("__eq__")
    __hash__ = _passing("__hash__")
    __reduce_ex__ = _passing("__reduce_ex__")


# These go past `__getattribute__`.
_source_of, _set_source = vars(Driven)["__wrapped__"].__get__, vars(Driven)["__wrapped__"].__set__
_steps_of, _set_steps = vars(Driven)["_steps"].__get__, vars(Driven)["_steps"].__set__


def _end(driven: Driven, error: BaseException | None = None, value: Any = None) -> None:
    steps = _steps_of(driven)
    if steps is not None:
        _set_steps(driven, None)
        steps.end(error, value)
        set_class(driven, type(driven).__base__)


def _stepping(name: str) -> Any:
    def step(self: Driven, *arguments: Any) -> Any:
        source, steps = _source_of(self), _steps_of(self)
        take = getattr(source, name)
        if steps is None:
            return take(*arguments)
        outside = steps.outside()
        try:
            try:
                steps.resume()
                result = take(*arguments)
            finally:
                steps.suspend(outside)
        except BaseException as error:
            steps.restore(outside)
            if isinstance(error, StopIteration):
                _end(self, value=error.value)
            else:
                _end(self, error)
            raise
        return self if result is source else result

    return step


def _async_stepping(name: str) -> Any:
    async def step(self: Driven, *arguments: Any) -> Any:
        source, steps = _source_of(self), _steps_of(self)
        take = getattr(source, name)
        if steps is None:
            return await take(*arguments)
        try:
            result = await inside(steps, take(*arguments))
        except BaseException as error:
            _end(self, None if isinstance(error, StopAsyncIteration) else error)
            raise
        return self if result is source else result

    return step


def _ending_with(step: Any) -> Any:
    """Return a method that takes a step, and ends the span."""

    def last(self: Driven, *arguments: Any) -> Any:
        try:
            return step(self, *arguments)
        finally:
            _end(self)

    return last


def _async_ending_with(step: Any) -> Any:
    async def last(self: Driven, *arguments: Any) -> Any:
        try:
            return await step(self, *arguments)
        finally:
            _end(self)

    return last


def _await(self: Driven) -> Any:
    source, steps = _source_of(self), _steps_of(self)
    _set_steps(self, None)
    return source.__await__() if steps is None else _awaited(steps, source)


_METHODS: dict[str, Any] = {
    **{name: _stepping(name) for name in ("__iter__", "__next__", "send", "throw", "__aiter__", "__enter__")},
    **{name: _ending_with(_stepping(name)) for name in ("close", "__exit__")},
    **{name: _async_stepping(name) for name in ("__anext__", "asend", "athrow", "__aenter__")},
    **{name: _async_ending_with(_async_stepping(name)) for name in ("aclose", "__aexit__")},
    "__await__": _await,
}


def _has_method(kind: type, name: str) -> bool:
    """Return whether a kind has it: a special method also by a property, which gives that of something inside."""
    found = getattr(kind, name, None)
    return callable(found) or (isinstance(found, property) and name.startswith("__"))


def _steps_taken_by(kind: type) -> dict[str, Any]:
    """Return the methods that take the steps of what is of a kind."""
    methods = {name: method for name, method in _METHODS.items() if _has_method(kind, name)}
    if _has_method(kind, "fetchall"):  # A database cursor's, by PEP 249: it reads to the end.
        is_async = inspect.iscoroutinefunction(getattr(kind, "fetchall", None))
        last = _async_ending_with(_async_stepping("fetchall")) if is_async else _ending_with(_stepping("fetchall"))
        methods["fetchall"] = last
    return methods


#: Special methods by which an object is made, found out about and destroyed: it is, once, and by its own class.
_ONLY_ITS_OWN = frozenset({
    "__class__", "__class_getitem__", "__del__", "__getattr__", "__getattribute__", "__init__", "__init_subclass__",
    "__new__", "__subclasshook__", "__wrapped__",
})  # fmt: skip


def _special_methods(kind: type) -> dict[str, Any]:
    """Return the special methods of a kind, passed on; what it has of `object` is right of a proxy, as it is.

    Its text, too: where a kind has none of its own, that is told of the proxy's class as well.
    """
    methods: dict[str, Any] = {"__hash__": Driven.__hash__}  # Else Python puts None there, if there is an `__eq__`.
    for name in {name for base in kind.__mro__ for name in vars(base)} - _ONLY_ITS_OWN:
        method = getattr(kind, name, None)
        if not (name.startswith("__") and name.endswith("__")) or method is getattr(object, name, ...):
            continue
        if _has_method(kind, name):
            methods[name] = _passing(name)
        elif method is None:  # There is none, whatever its base classes have.
            methods[name] = None
    return methods


def _abandoned(driven: Driven) -> None:
    with suppress(AttributeError):  # Its making was interrupted.
        _end(driven, GeneratorExit())


_classes: weakref.WeakKeyDictionary[type[Any], type[Driven]] = weakref.WeakKeyDictionary()


def _driven(steps: Steps, source: Any) -> Driven:
    kind = type(source)
    driven = _classes.get(kind)
    if driven is None:
        # Messages of Python's name the class.
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
        methods = _steps_taken_by(kind)
        own = {"_own": Driven._own.union(methods)}
        ended = type(kind.__name__, (Driven,), {**_special_methods(kind), **methods, **own, **names})
        # One that hasn't ended has a finalizer; when it has, an interrupt in there would be lost.
        driven = _classes[kind] = type(kind.__name__, (ended,), {"__del__": _abandoned, **names})
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


def consumed(result: Any) -> Callable[[Steps, Any], Any] | None:
    """Return what drives the result of a plain function while it is consumed; None if it is a finished value."""
    kind: Any = type(result)
    try:
        if kind in _FINISHED:
            return None
        drive = _way_of(kind)
        if drive is _response:
            body = _body_of(result)
            return drive if consumed(body) or hasattr(type(body), "__aiter__") else None
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
    if _place_of_body(kind):
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


def is_driven(result: Any) -> bool:
    """Return whether the steps of a stream or iterator run inside a scope already."""
    return issubclass(type(result), Driven) or is_generator_of_ours(result)
