"""Drives generators, coroutines and iterators so that each of their steps runs inside a scope of its own."""

from __future__ import annotations

import inspect
import io
import types
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, Protocol

from pltrace._wrapping import ObjectProxy

__all__ = ["Steps", "async_generator", "consumed", "coroutine", "generator"]


class Steps(Protocol):
    """What is around the steps of something that is consumed."""

    def resume(self) -> None:
        """Make the scope current; called before each step, for the first of which the span starts."""

    def suspend(self) -> None:
        """Give the consumer its own scope back; called after each step."""

    def end(self, error: BaseException | None = None, value: Any = None) -> None:
        """End the span; called once."""


def generator(steps: Steps, source: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Drive a generator: what is sent, thrown and returned passes through."""
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        steps.resume()
        try:
            # Thrown outside of the except block below, or the user's exception would get it as its context.
            item = source.send(sent) if thrown is None else source.throw(thrown)
        except StopIteration as stop:
            steps.suspend()
            steps.end(value=stop.value)
            return stop.value
        except BaseException as error:
            steps.suspend()
            steps.end(error)
            raise
        steps.suspend()
        thrown = None
        try:
            sent = yield item
        except GeneratorExit as exit_:
            _close(steps, source.close, exit_)
            raise
        except BaseException as error:
            thrown = error


def _close(steps: Steps, close: Callable[[], Any], exit_: GeneratorExit) -> None:
    """Close what is driven, inside the scope; what its cleaning-up raises goes on to the consumer."""
    steps.resume()
    try:
        close()
    except BaseException as error:
        steps.suspend()
        steps.end(error)
        raise
    steps.suspend()
    steps.end(exit_)


@types.coroutine
def _inside(steps: Steps, source: Any) -> Generator[Any, Any, Any]:
    """Await something with the scope around each of its steps, but without ending the span."""
    iterator = source if inspect.iscoroutine(source) or inspect.isgenerator(source) else source.__await__()
    has_send = hasattr(iterator, "send")
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        steps.resume()
        try:
            if thrown is not None:
                if not hasattr(iterator, "throw"):
                    raise thrown
                item = iterator.throw(thrown)
            else:
                item = iterator.send(sent) if has_send else next(iterator)
        except StopIteration as stop:
            return stop.value
        finally:
            steps.suspend()
        thrown = None
        try:
            sent = yield item
        except GeneratorExit:
            if hasattr(iterator, "close"):
                steps.resume()
                try:
                    iterator.close()
                finally:
                    steps.suspend()
            raise
        except BaseException as error:
            thrown = error


async def coroutine(steps: Steps, source: Awaitable[Any]) -> Any:
    """Drive a coroutine, or anything else that can be awaited, and end the span with it."""
    try:
        value = await _inside(steps, source)
    except BaseException as error:
        steps.end(error)
        raise
    steps.end(value=value)
    return value


async def async_generator(steps: Steps, source: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    """Drive an async generator: what is sent and thrown passes through."""
    sent: Any = None
    thrown: BaseException | None = None
    while True:
        try:
            item = await _inside(steps, source.asend(sent) if thrown is None else source.athrow(thrown))
        except StopAsyncIteration:
            steps.end()
            return
        except BaseException as error:
            steps.end(error)
            raise
        thrown = None
        try:
            sent = yield item
        except GeneratorExit as exit_:
            try:
                await _inside(steps, source.aclose())
            except BaseException as error:
                steps.end(error)
                raise
            steps.end(exit_)
            raise
        except BaseException as error:
            thrown = error


class DrivenIterator(ObjectProxy):
    """An iterator whose steps run inside the scope, and which is in all else the one it stands for."""

    def __init__(self, source: Any, steps: Steps) -> None:
        super().__init__(source)
        self._self_steps: Steps | None = steps

    def __iter__(self) -> DrivenIterator:
        return self

    def __next__(self) -> Any:
        return self._self_step(self.__wrapped__.__next__)

    def _self_step(self, step: Callable[..., Any], *args: Any) -> Any:
        steps = self._self_steps
        if steps is None:
            return step(*args)
        steps.resume()
        try:
            item = step(*args)
        except BaseException as error:
            steps.suspend()
            self._self_end(None if isinstance(error, StopIteration) else error)
            raise
        steps.suspend()
        return item

    def _self_end(self, error: BaseException | None = None) -> None:
        steps, self._self_steps = self._self_steps, None
        if steps is not None:
            steps.end(error)

    def close(self) -> Any:
        """Close what it stands for, if that can be closed, and end the span."""
        try:
            return self.__wrapped__.close()
        finally:
            self._self_end()

    def __del__(self) -> None:
        self._self_end(GeneratorExit())


class DrivenAsyncIterator(ObjectProxy):
    """The same for an async iterator."""

    def __init__(self, source: Any, steps: Steps) -> None:
        super().__init__(source)
        self._self_steps: Steps | None = steps

    def __aiter__(self) -> DrivenAsyncIterator:
        return self

    async def __anext__(self) -> Any:
        steps = self._self_steps
        if steps is None:
            return await self.__wrapped__.__anext__()
        try:
            return await _inside(steps, self.__wrapped__.__anext__())
        except BaseException as error:
            self._self_end(None if isinstance(error, StopAsyncIteration) else error)
            raise

    def _self_end(self, error: BaseException | None = None) -> None:
        steps, self._self_steps = self._self_steps, None
        if steps is not None:
            steps.end(error)

    async def aclose(self) -> Any:
        """Close what it stands for, and end the span."""
        try:
            return await self.__wrapped__.aclose()
        finally:
            self._self_end()

    def __del__(self) -> None:
        self._self_end(GeneratorExit())


class DrivenAwaitable(ObjectProxy):
    """An awaitable that is awaited inside the scope."""

    def __init__(self, source: Any, steps: Steps) -> None:
        super().__init__(source)
        self._self_steps = steps

    def __await__(self) -> Generator[Any, Any, Any]:
        return coroutine(self._self_steps, self.__wrapped__).__await__()


#: Results that are nothing to consume: by far the most, told by one look-up.
_PLAIN = frozenset({type(None), str, int, float, bool, bytes, list, dict, tuple, set, frozenset})


def consumed(result: Any) -> Callable[[Steps], Any] | None:
    """Return how to drive what a plain function returned while it is consumed; None if it is a finished value."""
    kind = type(result)
    # Files are read later by design, and futures and tasks run by themselves. The mark is how asyncio knows its own.
    if kind in _PLAIN or isinstance(result, io.IOBase) or hasattr(kind, "_asyncio_future_blocking"):
        return None
    if kind is types.GeneratorType:
        return lambda steps: named(generator(steps, result), result)
    if kind is types.CoroutineType:
        return lambda steps: named(coroutine(steps, result), result)
    if kind is types.AsyncGeneratorType:
        return lambda steps: named(async_generator(steps, result), result)
    for marker, driven in _MARKERS:
        if hasattr(kind, marker):
            return lambda steps: driven(result, steps)
    return None


_MARKERS: tuple[tuple[str, type[Any]], ...] = (
    ("__await__", DrivenAwaitable),
    ("__anext__", DrivenAsyncIterator),
    ("__next__", DrivenIterator),
)


def named(driver: Any, source: Any) -> Any:
    """Give a driver the name of what it drives, for tracebacks and `repr`."""
    driver.__name__, driver.__qualname__ = source.__name__, source.__qualname__
    return driver
