"""Drives generators, coroutines and iterators so that each of their steps runs inside a scope of its own."""

from __future__ import annotations

import inspect
import io
import sys
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Protocol

from pltrace._wrapping import ObjectProxy

__all__ = ["Steps", "async_generator", "awaitable_generator", "consumed", "coroutine", "generator"]


class Steps(Protocol):
    """What is around the steps of something that is consumed; several may be taken at once, by several threads."""

    def resume(self) -> Any:
        """Make the scope current; called before each step, for the first of which the span starts.

        Returns:
            The consumer's own scope.
        """

    def suspend(self, outside: Any) -> None:
        """Give the consumer its own scope back; called after each step with what `resume` returned."""

    def end(self, error: BaseException | None = None, value: Any = None) -> None:
        """End the span; called once."""


class CancelledError(BaseException):
    """Stands for asyncio's, which isn't imported here: a coroutine was closed, or collected, before its end."""


def _generator(steps: Steps, source: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Pass on what is sent, thrown and returned; of what passes nothing is kept, nor is an exception's context changed.

    `close` passes as what it is, a `GeneratorExit` that is thrown: so a generator may answer it in any way it likes.
    """
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        outside = steps.resume()
        try:
            # Thrown outside of the except block below, or the user's exception would get it as its context.
            item = source.send(sent) if thrown is None else source.throw(thrown)
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
        outside = thrown = sent = None
        try:
            sent = yield (item, item := None)[0]
        except BaseException as error:
            thrown = error


def generator(steps: Steps, source: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Drive a generator."""
    return _named(_generator(steps, source), source)


_coroutine_generator: Any = types.coroutine(types.FunctionType(_generator.__code__, globals()))


def awaitable_generator(steps: Steps, source: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Drive a generator that can be awaited: one made with `types.coroutine`."""
    return _named(_coroutine_generator(steps, source), source)


@types.coroutine
def _inside(steps: Steps, source: Any) -> Generator[Any, Any, Any]:
    """Await something with the scope around each of its steps, but without ending the span."""
    iterator = source if inspect.iscoroutine(source) or inspect.isgenerator(source) else source.__await__()
    has_send = hasattr(iterator, "send")
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        outside = steps.resume()
        try:
            if thrown is None:
                item = iterator.send(sent) if has_send else next(iterator)
            elif hasattr(iterator, "throw"):
                item = iterator.throw(thrown)
            else:
                raise thrown
        except StopIteration as stop:
            return stop.value
        finally:
            thrown = None
            steps.suspend(outside)
        outside = sent = None
        try:
            sent = yield (item, item := None)[0]
        except BaseException as error:
            thrown = error


def _awaited(steps: Steps, source: Awaitable[Any]) -> Generator[Any, Any, Any]:
    """Await something inside the scope, and end the span with it."""
    try:
        value = yield from _inside(steps, source)
    except BaseException as error:
        steps.end(_ending(error))
        raise
    steps.end(value=value)
    return value


class _Unawaited:
    """Closes a coroutine that nobody awaits: Python warns of its driver already, under the same name."""

    __slots__ = ("source",)

    def __init__(self, source: Any) -> None:
        self.source = source

    def __del__(self) -> None:
        if self.source is not None:
            self.source.close()


async def _coroutine(steps: Steps, unawaited: _Unawaited) -> Any:
    source, unawaited.source = unawaited.source, None
    try:
        value = await _inside(steps, source)
    except BaseException as error:
        steps.end(_ending(error))
        raise
    steps.end(value=value)
    return value


def coroutine(steps: Steps, source: Any) -> Any:
    """Drive a coroutine."""
    return _named(_coroutine(steps, _Unawaited(source)), source)


def _ending(error: BaseException) -> BaseException:
    """Return how a coroutine ended; leaving a generator early is its proper end, but not a coroutine's."""
    return CancelledError("closed before it ended") if isinstance(error, GeneratorExit) else error


async def _async_generator(steps: Steps, source: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    sent: Any = None
    thrown: BaseException | None = None
    _keep_from_loop(source)
    while True:
        try:
            item = await _inside(steps, source.asend(sent) if thrown is None else source.athrow(thrown))
        except StopAsyncIteration:
            steps.end()
            return
        except BaseException as error:
            thrown = None
            steps.end(error)
            raise
        thrown = sent = None
        try:
            sent = yield (item, item := None)[0]
        except BaseException as error:
            thrown = error


def async_generator(steps: Steps, source: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """Drive an async generator: what is sent and thrown passes through, `aclose` as for a generator."""
    return _named(_async_generator(steps, source), source)


def _keep_from_loop(source: AsyncGenerator[Any, Any]) -> None:
    """Keep the event loop from closing, when it shuts down, what its driver closes: both at once is an error."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        # Python calls the hooks when the first step of an async generator is made, which needn't be taken.
        source.asend(None).close()
    finally:
        sys.set_asyncgen_hooks(*hooks)


class Driven(ObjectProxy):
    """A result whose steps run inside the scope, and which is in all else the one it stands for.

    Subclasses have those of the methods below that its type has: what looks for `close` finds it only if it is there.
    """

    def __init__(self, source: Any, steps: Steps) -> None:
        super().__init__(source)
        self._self_steps: Steps | None = steps

    def _self_step(self, name: str, *arguments: Any) -> Any:
        steps, step = self._self_steps, getattr(self.__wrapped__, name)
        if steps is None:
            return step(*arguments)
        outside = steps.resume()
        try:
            result = step(*arguments)
        except BaseException as error:
            steps.suspend(outside)
            if isinstance(error, StopIteration):
                self._self_end(value=error.value)
            else:
                self._self_end(error)
            raise
        steps.suspend(outside)
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

    def __del__(self) -> None:
        self._self_end(GeneratorExit())

    def __copy__(self) -> Any:
        return self.__wrapped__.__class__.__copy__(self.__wrapped__) if _has_copy(self) else _reduced(self, "copy")

    def __deepcopy__(self, memo: Any) -> Any:
        return _reduced(self, "deepcopy", memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__wrapped__.__reduce_ex__(protocol)


def _has_copy(driven: Driven) -> bool:
    return hasattr(type(driven.__wrapped__), "__copy__")


def _reduced(driven: Driven, how: str, *arguments: Any) -> Any:
    import copy

    return getattr(copy, how)(driven.__wrapped__, *arguments)
