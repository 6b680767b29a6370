"""Puts a scope around each step of something that is consumed, instead of around all of them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Generator
from typing import Any, Protocol

from pltrace._collecting import is_collecting

__all__ = ["HELD_ONCE", "SUSPENDED", "Steps", "WithoutScope", "inside", "named"]

__tracebackhide__ = True  # pytest shows the user's own lines.


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


#: What `getrefcount` says, at most, of what one variable or attribute holds and nobody else does.
HELD_ONCE = 2
#: In place of the consumer's scope between two steps, when that isn't held.
SUSPENDED: Any = object()


class WithoutScope:
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


@types.coroutine
def inside(steps: Steps, source: Any) -> Generator[Any, Any, Any]:
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
            outside, sent = SUSPENDED, None
            try:
                sent = yield (item, item := None)[0]
            except BaseException as error:
                thrown = error
                if is_collecting():
                    steps = WithoutScope(steps)
            outside = steps.outside()
    except BaseException:
        if outside is not SUSPENDED:
            steps.restore(outside)
        raise


def named(driver: Any, source: Any) -> Any:
    """Give a driver the name of what it drives, for tracebacks and `repr`."""
    driver.__name__, driver.__qualname__ = source.__name__, source.__qualname__
    return driver
