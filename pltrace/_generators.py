"""Drives generators, sync and async, so that each of their steps runs inside a scope of its own."""

from __future__ import annotations

import inspect
import sys
import types
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from sys import getrefcount
from typing import Any

from pltrace._collecting import is_collecting
from pltrace._stepping import HELD_ONCE, SUSPENDED, Steps, WithoutScope, inside, named

__all__ = ["async_generator", "generator", "is_generator_of_ours"]

__tracebackhide__ = True  # pytest shows the user's own lines.


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
                elif driver.is_let_go() and (getrefcount(source) > HELD_ONCE or source.gi_code is _generator.__code__):
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
            outside, thrown, sent = SUSPENDED, None, None
            try:
                sent = yield (item, item := None)[0]
            except BaseException as error:
                thrown = error
                if is_collecting():
                    steps = WithoutScope(steps)
            outside = steps.outside()
    except BaseException as error:
        # Mostly all is done already. Not where we were interrupted.
        if outside is not SUSPENDED:
            steps.restore(outside)
        steps.end(error)
        raise


_awaitable_generator: Any = types.coroutine(types.FunctionType(_generator.__code__, globals()))


def generator(steps: Steps, source: Any) -> Any:
    """Drive a generator; also one that can be awaited, which `types.coroutine` makes of it, before or after us."""
    drive = _awaitable_generator if source.gi_code.co_flags & inspect.CO_ITERABLE_COROUTINE else _generator
    driver = named(drive(steps, source, known := _Driver()), source)
    known.is_(driver)
    return driver


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
                item = await inside(steps, (first or source.asend)(sent) if thrown is None else source.athrow(thrown))
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
    driver = named(_async_generator(steps, source, known := _Driver()), source)
    known.is_(driver)
    return driver


def is_generator_of_ours(value: Any) -> bool:
    """Return whether it drives another one."""
    if type(value) is types.GeneratorType:
        return value.gi_code is _generator.__code__
    return type(value) is types.AsyncGeneratorType and value.ag_code is _async_generator.__code__


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
