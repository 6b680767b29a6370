"""Whatever is decorated behaves as it did before, and each call of it is one span with the scope inside."""

from __future__ import annotations

import abc
import asyncio
import collections.abc
import contextlib
import contextvars
import copy
import csv
import enum
import functools
import inspect
import io
import itertools
import operator
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
import types
import typing
import unittest.mock
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from operator import attrgetter, length_hint
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import wrapt
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel

import pltrace
from pltrace import ConfigError, bind, current_span, traced
from pltrace.testing import CapturedSpans, capture_spans
from tests.support.programs import run, surroundings
from tests.support.scripted_llm import Reply, ScriptedOpenAI
from tests.support.traces import chat


@pytest.fixture
def seen() -> Iterator[CapturedSpans]:
    """The spans that ended; the test fails if it leaves a scope or a run open."""
    with capture_spans() as spans:
        yield spans
        spans.assert_nothing_open()


# The kinds, each defined once, and made twice: decorated and not. All of them do what `body` says.

_body: Callable[[int, int], Any] = lambda a, b: a + b  # noqa: E731
_user_variable: contextvars.ContextVar[str] = contextvars.ContextVar("users", default="unset")


def body(a: int, b: int) -> Any:
    """Does what the test says."""
    return _body(a, b)


@pytest.fixture
def doing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], Any]], None]:
    """Says what all kinds do."""
    return lambda what: monkeypatch.setitem(globals(), "_body", what)


class Countdown:
    """An iterator that is no generator."""

    def __init__(self, a: int, b: int) -> None:
        self.items = [a, b]

    def __iter__(self) -> Countdown:
        return self

    def __next__(self) -> Any:
        if not self.items:
            raise StopIteration
        return body(self.items.pop(), 0)


class AsyncCountdown:
    """An async iterator that is no generator."""

    def __init__(self, a: int, b: int) -> None:
        self.items = [a, b]

    def __aiter__(self) -> AsyncCountdown:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        if not self.items:
            raise StopAsyncIteration
        return body(self.items.pop(), 0)


class Promise:
    """An awaitable that is no coroutine."""

    def __init__(self, a: int, b: int) -> None:
        self.arguments = (a, b)

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return body(*self.arguments)


def kinds(wrap: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    """Makes a callable of each kind, which takes `a` and `b`."""

    @wrap
    def function(a: int, /, b: int = 2) -> int:
        """Adds."""
        return body(a, b)

    @wrap
    async def coroutine_function(a: int, b: int = 2) -> int:
        """Adds, later."""
        await asyncio.sleep(0)
        return body(a, b)

    @wrap
    def generator(a: int, b: int = 2) -> collections.abc.Generator[int, str, str]:
        """Gives both."""
        yield a
        yield body(a, b)
        return "done"

    @wrap
    async def async_generator(a: int, b: int = 2) -> AsyncIterator[int]:
        """Gives both, later."""
        yield a
        await asyncio.sleep(0)
        yield body(a, b)

    @wrap
    @types.coroutine
    def awaitable_generator(a: int, b: int = 2) -> Any:
        yield from asyncio.sleep(0).__await__()
        return body(a, b)

    class Adder:
        __slots__ = ("by",)

        def __init__(self) -> None:
            self.by = 0

        @wrap
        def method(self, a: int, b: int = 2) -> int:
            """Adds."""
            return body(a, b + self.by)

        @wrap
        async def coroutine_method(self, a: int, b: int = 2) -> int:
            await asyncio.sleep(0)
            return body(a, b + self.by)

        @wrap
        def generator_method(self, a: int, b: int = 2) -> Iterator[int]:
            yield body(a, b + self.by)

        @wrap
        async def async_generator_method(self, a: int, b: int = 2) -> AsyncIterator[int]:
            yield body(a, b + self.by)

        @wrap
        @classmethod
        def above_classmethod(cls, a: int, b: int = 2) -> int:
            assert cls is Adder
            return body(a, b)

        @classmethod
        @wrap
        def below_classmethod(cls, a: int, b: int = 2) -> int:
            assert cls is Adder
            return body(a, b)

        @wrap
        @staticmethod
        def above_staticmethod(a: int, b: int = 2) -> int:
            return body(a, b)

        @staticmethod
        @wrap
        def below_staticmethod(a: int, b: int = 2) -> int:
            return body(a, b)

        @wrap
        @functools.lru_cache  # noqa: B019
        def cached_method(self, a: int, b: int = 2) -> int:
            return body(a, b + self.by)

        @wrap
        def __call__(self, a: int, b: int = 2) -> int:
            return body(a, b + self.by)

    class Object:
        """A callable object."""

        def __call__(self, a: int, b: int = 2) -> int:
            return body(a, b)

    class AsyncObject:
        async def __call__(self, a: int, b: int = 2) -> int:
            await asyncio.sleep(0)
            return body(a, b)

    class Meta(type):
        @wrap
        def of_class(cls, a: int, b: int = 2) -> int:
            return body(a, b)

    class WithMeta(metaclass=Meta):
        pass

    class Base:
        @wrap
        def overridden(self, a: int, b: int = 2) -> int:
            return body(a, b)

    class Inheriting(Base):
        def overridden(self, a: int, b: int = 2) -> int:
            return super().overridden(a, b)

    async def plain_coroutine(a: int, b: int = 2) -> int:
        await asyncio.sleep(0)
        return body(a, b)

    def plain_generator(a: int, b: int = 2) -> Iterator[int]:
        yield a
        yield body(a, b)

    async def plain_async_generator(a: int, b: int = 2) -> AsyncIterator[int]:
        yield a
        yield body(a, b)

    @functools.wraps(plain_coroutine)
    @wrap
    def under_wraps(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    @wrap
    @functools.wraps(plain_generator)
    def over_wraps(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    @functools.singledispatch
    @wrap
    def under_singledispatch(a: object, b: int = 2) -> int:
        raise AssertionError

    @under_singledispatch.register
    @wrap
    def _(a: int, b: int = 2) -> int:
        return body(a, b)

    @wrap
    @functools.singledispatch
    def over_singledispatch(a: object, b: int = 2) -> int:
        return body(typing.cast(int, a), b)

    @wrap
    def returning_future(a: int, b: int = 2) -> Any:
        future = asyncio.get_running_loop().create_future()
        future.set_result(body(a, b))
        return future

    @wrap
    async def returning_generator(a: int, b: int = 2) -> Iterator[int]:
        return plain_generator(a, b)

    @wrap
    async def returning_async_generator(a: int, b: int = 2) -> AsyncIterator[int]:
        return plain_async_generator(a, b)

    adder = Adder()
    return {
        "function": function,
        "lambda": wrap(lambda a, b=2: body(a, b)),
        "coroutine function": coroutine_function,
        "generator": generator,
        "async generator": async_generator,
        "generator that can be awaited": awaitable_generator,
        "method": adder.method,
        "method of the class": functools.partial(Adder.method, adder),
        "coroutine method": adder.coroutine_method,
        "generator method": adder.generator_method,
        "async generator method": adder.async_generator_method,
        "above classmethod": adder.above_classmethod,
        "above classmethod, of the class": Adder.above_classmethod,
        "below classmethod": Adder.below_classmethod,
        "above staticmethod": adder.above_staticmethod,
        "below staticmethod": Adder.below_staticmethod,
        "__call__ method": adder,
        "method of a metaclass": WithMeta.of_class,
        "overridden method": Inheriting().overridden,
        "bound method": wrap(functools.partial(body).__call__),
        "partial": wrap(functools.partial(body, b=2)),
        "partial of a coroutine function": wrap(functools.partial(plain_coroutine, b=2)),
        "partial of a generator": wrap(functools.partial(plain_generator, b=2)),
        "under partial": functools.partial(function, b=2),
        "callable object": wrap(Object()),
        "async callable object": wrap(AsyncObject()),
        "builtin": functools.partial(wrap(functools.reduce), lambda a, b: body(a, b)),
        "over lru_cache": wrap(functools.lru_cache(body)),
        "under lru_cache": functools.lru_cache(wrap(body)),
        "method over lru_cache": adder.cached_method,
        "over wraps": over_wraps,
        "under wraps": under_wraps,
        "over singledispatch": over_singledispatch,
        "under singledispatch": under_singledispatch,
        "function returning a generator": wrap(lambda a, b=2: plain_generator(a, b)),
        "function returning a coroutine": wrap(lambda a, b=2: plain_coroutine(a, b)),
        "function returning an async generator": wrap(lambda a, b=2: plain_async_generator(a, b)),
        "function returning an iterator": wrap(lambda a, b=2: Countdown(a, b)),
        "function returning a map": wrap(lambda a, b=2: map(body, [a], [b])),
        "function returning an async iterator": wrap(lambda a, b=2: AsyncCountdown(a, b)),
        "function returning an awaitable": wrap(lambda a, b=2: Promise(a, b)),
        "function returning a future": returning_future,
        "function returning a task": wrap(lambda a, b=2: asyncio.ensure_future(plain_coroutine(a, b))),
        "coroutine function returning a generator": returning_generator,
        "coroutine function returning an async generator": returning_async_generator,
        "decorated twice": wrap(wrap(plain_coroutine)),
    }  # fmt: skip


PLAIN, TRACED = kinds(lambda it: it), kinds(traced)
KINDS = sorted(PLAIN)
#: All that is decorated can be referred to weakly and has a module.
_MORE_THAN_BEFORE = {("bound method", "weak reference"), ("bound method", "module")}
#: How many spans a call makes where it isn't one.
SPANS = {"decorated twice": 2}


def call(kind: str, callables: dict[str, Callable[..., Any]]) -> Any:
    """Calls it with 1 and 2."""
    return callables[kind]([1, 2]) if kind == "builtin" else callables[kind](1, b=2) if kind != "bound method" else (
        callables[kind](1, 2)
    )  # fmt: skip


async def consume(result: Any) -> Any:
    """Uses a result up; gives all that came out of it."""
    if inspect.isawaitable(result):
        result = await result
    if hasattr(result, "__anext__"):
        return [item async for item in result]
    if hasattr(result, "__next__"):
        items = []
        while True:
            try:
                items.append(next(result))
            except StopIteration as stop:
                return items, stop.value
    return result


async def outcome(kind: str, callables: dict[str, Callable[..., Any]]) -> Any:
    """Calls it, uses the result up, and gives what came out, or what was raised."""
    for cached in ("over lru_cache", "under lru_cache"):
        callables[cached].cache_clear()  # type: ignore[attr-defined]
    callables["method over lru_cache"].__func__.cache_clear()  # type: ignore[attr-defined]
    try:
        return await consume(call(kind, callables))
    except BaseException as error:
        return error


@pytest.mark.parametrize("kind", KINDS)
async def test_the_same_comes_out(kind: str, seen: CapturedSpans) -> None:
    """A call returns and yields what it did before, and is one span that is ok."""
    assert await outcome(kind, TRACED) == await outcome(kind, PLAIN)
    assert [span.status for span in seen] == ["ok"] * SPANS.get(kind, 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_scope_is_inside_alone(kind: str, seen: CapturedSpans, doing: Callable[[Any], None]) -> None:
    """What runs inside a call sees its span, wherever in the consuming it runs; the consumer never does."""
    inside: list[Any] = []
    doing(lambda a, b: inside.append(current_span()))
    with traced("outer") as outer:
        result = call(kind, TRACED)
        assert current_span() is outer
        await consume(result)
        assert current_span() is outer
    assert inside
    assert set(inside) <= set(seen)
    innermost = inside[0].parent if kind == "decorated twice" else inside[0]
    assert innermost.parent is outer


#: What is recorded of the arguments, where it isn't by the names of `a` and `b`.
_INPUTS = {
    "bound method": {"args": [1, 2]},
    "builtin": {"0": "tests.test_callables.kinds.<locals>.<lambda>", "1": [1, 2]},
}
#: What a call that gives one thing after the other returns at last, or what a future looks like, is another matter.
_GIVE_ONE = [
    kind for kind in KINDS
    if not any(word in kind for word in ("generator", "iterator", "map", "future", "task")) or "awaited" in kind
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_arguments_and_result_are_recorded(kind: str, seen: CapturedSpans) -> None:
    """The span says what went in, by the names of the parameters, and what came out."""
    result = await outcome(kind, TRACED)
    assert [span.input for span in seen] == [_INPUTS.get(kind, {"a": 1, "b": 2})] * SPANS.get(kind, 1)
    if kind in _GIVE_ONE:
        assert {span.output for span in seen} == {result}


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_result_that_nobody_uses(kind: str, seen: CapturedSpans) -> None:
    """A call whose result is dropped leaves no scope behind, and no span open."""
    with traced("outer") as outer:
        result = call(kind, TRACED)
        if "task" in kind:
            await result
        del result
        assert current_span() is outer


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), asyncio.CancelledError()])
@pytest.mark.parametrize("kind", KINDS)
async def test_an_exception_passes_unchanged(
    kind: str, error: BaseException, seen: CapturedSpans, doing: Callable[[Any], None]
) -> None:
    """The very exception comes out, with the context that it had before, and the span records it."""
    if "task" in kind and isinstance(error, (KeyboardInterrupt, SystemExit)):
        pytest.skip("asyncio ends the loop")

    def fail(a: int, b: int) -> None:
        raise error

    doing(fail)
    plain, context = await outcome(kind, PLAIN), error.__context__
    error.__traceback__ = error.__context__ = None
    passed = await outcome(kind, TRACED)
    assert type(passed) is type(plain)
    assert passed is error or plain is not error
    assert error.__context__ is context
    assert current_span().id == ""
    in_call = "task" not in kind
    expected = "cancelled" if isinstance(error, asyncio.CancelledError) else "error"
    assert {span.status for span in seen} == {expected if in_call else "ok"}


@pytest.mark.parametrize(
    ("code", "status"),
    [(None, "ok"), (0, "ok"), (False, "ok"), (1, "error"), (True, "error"), ("", "error"), (0.0, "error")],
)
def test_an_exit(code: Any, status: str, seen: CapturedSpans) -> None:
    """The exit of a program is an error of what it leaves if Python reports one, and only then."""

    @traced
    def leave() -> None:
        sys.exit(code)

    with pytest.raises(SystemExit), traced():
        leave()
    with pytest.raises(SystemExit):
        RunnableLambda(lambda _: leave()).invoke(None)
    assert {span.status for span in seen} == {status}
    assert {span.error for span in seen} == ({None} if status == "ok" else {f"SystemExit: {code}"})


@pytest.mark.parametrize("kind", KINDS)
async def test_the_users_own_context_variables(kind: str, seen: CapturedSpans, doing: Callable[[Any], None]) -> None:
    """What the body sets in a ContextVar of the user's is seen by the caller exactly where it was before."""

    async def after(callables: dict[str, Callable[..., Any]]) -> str:
        _user_variable.set("unset")
        await outcome(kind, callables)
        return _user_variable.get()

    doing(lambda a, b: _user_variable.set("set") and None)
    assert await after(TRACED) == await after(PLAIN)


#: What inspect, typing and others ask of a callable.
_QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "signature": lambda it: str(inspect.signature(it)),
    "name": lambda it: it.__name__,
    "qualified name": lambda it: it.__qualname__,
    "module": lambda it: it.__module__,
    "docstring": lambda it: it.__doc__,
    "annotations": lambda it: it.__annotations__,
    "type hints": lambda it: typing.get_type_hints(it, {"collections": collections}, {}),
    "defaults": lambda it: it.__defaults__,
    "source": inspect.getsource,
    "type": lambda it: isinstance(it, type(PLAIN["function"])),
    "builtin": inspect.isbuiltin,
    "routine": inspect.isroutine,
    "method descriptor": inspect.ismethoddescriptor,
    "data descriptor": inspect.isdatadescriptor,
    "function": inspect.isfunction,
    "method": inspect.ismethod,
    "class": inspect.isclass,
    "coroutine function": inspect.iscoroutinefunction,
    "generator function": inspect.isgeneratorfunction,
    "async generator function": inspect.isasyncgenfunction,
    "callable": callable,
    "callable to typing": lambda it: isinstance(it, typing.Callable),  # type: ignore[arg-type]
    "callable class": lambda it: issubclass(type(it), collections.abc.Callable),
    "attributes": lambda it: sorted(set(dir(it)) - {"__wrapped__"}),
    "object": lambda it: type(it.__self__).__name__,
    "hashable": lambda it: isinstance(hash(it), int),
    "weak reference": lambda it: weakref.ref(it) is not None,
    "parameters bound": lambda it: inspect.signature(it).bind(1, b=2).arguments,
    "shown": lambda it: re.sub("0x[0-9a-f]+", "", repr(it)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_identity(kind: str) -> None:
    """Whoever inspects a decorated callable gets the answers that the undecorated one gives."""

    def answer(question: str, it: Any) -> Any:
        if (kind, question) in _MORE_THAN_BEFORE:
            return "more than before"
        try:
            return _QUESTIONS[question](it)
        except Exception as error:
            return type(error)

    assert {question: answer(question, TRACED[kind]) for question in _QUESTIONS} == {
        question: answer(question, PLAIN[kind]) for question in _QUESTIONS
    }


_RESULT_QUESTIONS = [
    inspect.iscoroutine, inspect.isgenerator, inspect.isasyncgen, inspect.isawaitable, asyncio.isfuture,
    lambda it: isinstance(it, collections.abc.Iterator), lambda it: isinstance(it, collections.abc.AsyncIterator),
    lambda it: isinstance(it, collections.abc.Coroutine), lambda it: isinstance(it, (Countdown, Promise, map)),
    lambda it: hasattr(it, "close"), lambda it: hasattr(it, "send"), lambda it: hasattr(it, "__await__"),
    lambda it: getattr(it, "__qualname__", None),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
async def test_results_are_of_the_same_kind(kind: str, seen: CapturedSpans) -> None:
    """Whoever inspects a result gets the answer that the undecorated call's gives."""

    async def answers(callables: dict[str, Callable[..., Any]]) -> list[Any]:
        result = call(kind, callables)
        given = [question(result) for question in _RESULT_QUESTIONS]
        await consume(result)
        return given

    assert await answers(TRACED) == await answers(PLAIN)


@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_happens_while_tracing_is_off(kind: str) -> None:
    """While tracing is off, a decorated callable does what it did before, and there is no span."""
    assert await outcome(kind, TRACED) == await outcome(kind, PLAIN)
    assert not current_span()


async def test_tracing_switched_off_and_on_around_open_generators(local: Path) -> None:
    """Generators that were made while tracing was on go on when it is off, and the other way round."""
    on = [TRACED[kind](1, 2) for kind in ("generator", "async generator", "coroutine function")]
    next(on[0])
    pltrace.shutdown()
    off = [TRACED[kind](1, 2) for kind in ("generator", "async generator", "coroutine function")]
    next(off[0])
    assert [await consume(it) for it in on] == [([3], "done"), [1, 3], 3]
    pltrace.configure(store="memory")
    assert [await consume(it) for it in off] == [([3], "done"), [1, 3], 3]


# Arguments.


def test_any_parameter_names(seen: CapturedSpans) -> None:
    """No parameter name is taken by the decorator."""

    @traced
    def f(wrapped: int, instance: int, args: int, kwargs: int, self: int, cls: int, name: int, function: int) -> Any:
        return wrapped, instance, args, kwargs, self, cls, name, function

    names = list(inspect.signature(f).parameters)
    assert f(**{name: number for number, name in enumerate(names)}) == tuple(range(8))
    assert seen[0].input == {name: number for number, name in enumerate(names)}


def test_wrong_arguments(seen: CapturedSpans) -> None:
    """A wrong call raises the TypeError that it did, and leaves nothing behind."""
    for kind in ("function", "coroutine function", "generator", "async generator"):
        with pytest.raises(TypeError) as plain:
            PLAIN[kind](1, 2, 3)
        with pytest.raises(TypeError) as traced_:
            TRACED[kind](1, 2, 3)
        assert str(traced_.value) == str(plain.value)


def test_values_are_recorded_as_they_were(seen: CapturedSpans) -> None:
    """Arguments are recorded as they were at the call, results as they were at the return."""

    @traced
    def agent(state: dict[str, list[str]], *more: list[int], flag: bool = True) -> list[str]:
        state["messages"].append("answer")
        more[0].clear()
        return state["messages"]

    messages = ["question"]
    result = agent({"messages": messages}, [1, 2])
    result.append("later")
    assert seen[0].input == {"state": {"messages": ["question"]}, "more": [[1, 2]]}
    assert seen[0].output == ["question", "answer"]


async def test_arguments_of_generators_are_of_the_call(seen: CapturedSpans) -> None:
    """A generator's and a coroutine's arguments are those of the call, not those of the first step."""

    @traced
    def generator(items: list[int]) -> Iterator[int]:
        yield from items

    @traced
    async def coroutine(items: list[int]) -> None: ...

    items = [1]
    steps, waiting = generator(items), coroutine(items)
    items.append(2)
    assert list(steps) == [1, 2]
    await waiting
    assert [span.input for span in seen] == [{"items": [1]}] * 2


def test_self_is_no_input(seen: CapturedSpans) -> None:
    """A method's input is its arguments without the object or the class."""

    class Thing:
        @traced
        def method(self, a: int) -> None: ...

        @traced
        @classmethod
        def of_class(cls, a: int) -> None: ...

    @traced
    def self_means_something_here(self: int) -> None: ...

    Thing().method(1)
    Thing.of_class(a=2)
    self_means_something_here(3)
    assert [span.input for span in seen] == [{"a": 1}, {"a": 2}, {"self": 3}]


def test_a_container_that_another_thread_changes(seen: CapturedSpans) -> None:
    """Arguments that change while they are noted disturb neither the call nor what comes after it."""
    shared: dict[int, Any] = {number: [number] for number in range(300)}
    stop = threading.Event()

    def change() -> None:
        number = 10_000
        while not stop.is_set():
            shared[number] = []
            shared.pop(number, None)
            number += 1

    changing = threading.Thread(target=change)
    changing.start()
    try:
        for _ in range(100):
            traced(lambda state: None)(shared)
            assert not current_span()
    finally:
        stop.set()
        changing.join()


# Identity beyond the table.


@traced
def by_name(a: int = 1) -> int:
    """Gives what it got."""
    return a


@traced("named", tags=["t"])
async def async_by_name(a: int = 1) -> int:
    """Gives what it got, later."""
    return a


class Named:
    def __init__(self, factor: int = 1) -> None:
        self.factor = factor
        self.callback = by_name

    @traced
    def method(self, a: int = 1) -> int:
        """One kind of method."""
        return a * self.factor

    @traced
    @classmethod
    def above_classmethod(cls, a: int = 1) -> int:
        """One kind of method."""
        return a

    @classmethod
    @traced
    def below_classmethod(cls, a: int = 1) -> int:
        """One kind of method."""
        return a

    @traced
    @staticmethod
    def above_staticmethod(a: int = 1) -> int:
        """One kind of method."""
        return a

    @traced
    @functools.lru_cache  # noqa: B019
    def cached(self, a: int = 1) -> int:
        """One kind of method."""
        return a * self.factor

    def __call__(self, a: int = 1) -> int:
        """One kind of method."""
        return a * self.factor

    @property
    @traced
    def under_property(self) -> int:
        """One kind of method."""
        return self.factor

    @functools.cached_property
    @traced
    def under_cached_property(self) -> int:
        """One kind of method."""
        return self.factor

    partial_method = functools.partialmethod(method, 5)


traced_builtin, traced_partial, traced_object = traced(len), traced(functools.partial(int, "7")), traced(Named(3))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "one",
    [
        by_name, async_by_name, Named.method, Named.above_classmethod, Named.below_classmethod,
        Named.above_staticmethod, functools.partial(by_name, 3),
    ],
    ids=["function", "coroutine", "method", "above classmethod", "below classmethod", "staticmethod", "partial"],
)  # fmt: skip
def test_pickling_by_name(one: Any, protocol: int) -> None:
    """Functions and methods are pickled by name, as they were before, and come back as the same."""
    back = pickle.loads(pickle.dumps(one, protocol))
    for part in ("__func__", "func"):
        back, one = getattr(back, part, back), getattr(one, part, one)
    assert back is one


@pytest.mark.parametrize(
    "one",
    [Named(4).method, Named(4).cached, traced_object, traced_partial],
    ids=["method", "cached", "object", "partial"],
)
@pytest.mark.parametrize("again", [lambda it: pickle.loads(pickle.dumps(it)), copy.copy, copy.deepcopy])
def test_pickling_and_copying_by_value(one: Any, again: Callable[[Any], Any], seen: CapturedSpans) -> None:
    """Bound methods, partials and callable objects come back from pickling and copying whole, and once traced."""
    assert again(one)() == one()
    assert len(seen) == 2
    assert seen[0].name == seen[1].name


def test_a_builtin_under_another_name(seen: CapturedSpans) -> None:
    """A decorated builtin, which its own name doesn't lead to, can be pickled, tracing included."""
    assert pickle.loads(pickle.dumps(traced_builtin))([1, 2]) == 2
    assert [span.name for span in seen] == ["len"]


def test_copies_are_as_deep_as_they_were() -> None:
    """Copying a decorated function gives the function; deep-copying a decorated object copies the object."""
    assert copy.copy(by_name) is by_name
    assert copy.deepcopy(by_name) is by_name
    assert copy.deepcopy(Named()).callback is by_name
    assert copy.deepcopy(traced_object).__wrapped__ is not traced_object.__wrapped__


def test_local_functions_are_pickled_no_more_than_before() -> None:
    """What can't be pickled undecorated can't be decorated."""
    for local in (lambda: None, PLAIN["generator"]):
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(local)
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(traced(local))


def test_cloudpickle_of_local_functions(seen: CapturedSpans) -> None:
    """Cloudpickle takes a decorated local function along."""
    offset = 5

    @traced
    def local(a: int) -> int:
        return a + offset

    assert cloudpickle.loads(cloudpickle.dumps(local))(1) == 6


def test_weak_references() -> None:
    """A decorated function and its bound methods can be referred to weakly, and die as they did."""

    @traced
    def local() -> None: ...

    thing = Named()
    function, method, key = weakref.ref(local), weakref.WeakMethod(thing.method), weakref.WeakKeyDictionary({local: 1})
    assert function() is local
    assert method()() == 1  # type: ignore[misc]
    assert key[local] == 1
    del local, thing
    assert function() is None
    assert method() is None


def test_descriptors(seen: CapturedSpans) -> None:
    """Properties, partial methods and overriding work over decorated methods."""
    assert (Named(2).under_property, Named(2).under_cached_property, Named(2).partial_method()) == (2, 2, 10)
    assert Named.method is Named.__dict__["method"]
    assert isinstance(Named().method, types.MethodType)
    assert Named.method(Named(3), 2) == 6


@pytest.mark.parametrize("made", [lambda fn: classmethod(traced(fn)), lambda fn: traced(classmethod(fn))])
def test_class_methods_of_what_is_no_function(made: Callable[[Any], Any], seen: CapturedSpans) -> None:
    """A class method of a partial function, which doesn't bind, gets the class as it does undecorated."""
    kind = type("Kind", (), {"both": made(functools.partial(lambda *both: both, 1))})
    assert (kind.both(2), kind().both()) == ((1, kind, 2), (1, kind))  # type: ignore[attr-defined]


def test_over_descriptors(seen: CapturedSpans) -> None:
    """Over a property, and over all else that makes something of functions in a class, it stays what it is."""

    class Shade(enum.Enum):
        DARK = 1

        @traced  # type: ignore[prop-decorator]
        @property
        def doubled(self) -> int:
            return 2 * self.value

    class Thing:
        size = 1

        @traced  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            """Twice the size."""
            return 2 * self.size

        @double.setter
        def double(self, value: int) -> None:
            self.size = value // 2

        @traced
        @functools.cached_property
        def cached(self) -> int:
            return self.size

        def add(self, a: int, b: int) -> int:
            return a + b

        add_one = traced(functools.partialmethod(add, 1))

        @traced
        @functools.singledispatchmethod
        def kind_of(self, it: object) -> str:
            return "object"

        @kind_of.register
        def _(self, it: int) -> str:
            return "int"

    thing = Thing()
    thing.double = 6
    assert (thing.double, thing.cached, thing.cached, thing.add_one(2)) == (6, 3, 3, 3)
    assert (thing.kind_of(1), thing.kind_of("a"), Shade.DARK.doubled, list(Shade)) == ("int", "object", 2, [Shade.DARK])
    assert [span.name.rpartition(".")[2] for span in seen] == [
        "double", "cached", "add", "kind_of", "kind_of", "doubled",
    ]  # fmt: skip
    assert isinstance(Thing.__dict__["double"], property)
    assert Thing.double.__doc__ == "Twice the size."


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_what_is_put_on_a_class_or_static_method(kind: Any, seen: CapturedSpans) -> None:
    """What other decorators put on a class or static method, and read there, stays on it."""
    marked = kind(lambda *_: 1)
    marked.mark = "theirs"
    both = traced("both")(marked)
    assert (type(both), both.mark) == (kind, "theirs")
    assert type("Thing", (), {"both": both}).both() == 1  # type: ignore[attr-defined]
    assert [span.name for span in seen] == ["both"]


def test_methods_of_what_is_no_function(seen: CapturedSpans) -> None:
    """A method whose function is a partial or an object, which has no name, may return an iterator."""

    class Steps:
        def __call__(self, given: str) -> Iterator[str]:
            return iter(given)

    for function in (functools.partial(iter), Steps()):
        assert list(traced("steps")(types.MethodType(function, "ab"))()) == ["a", "b"]
    assert [(span.name, span.status) for span in seen] == [("steps", "ok")] * 2


def test_names_of_callables(seen: CapturedSpans) -> None:
    """A span has the name of the function that a partial stands for; what else a callable calls `func` is its own."""

    class Retry:
        def __init__(self, func: Any = None) -> None:
            self.func = func

        def __call__(self) -> None: ...

    def marked() -> None: ...

    marked.func = len  # type: ignore[attr-defined]
    for function in (Retry(), marked, Retry(marked), functools.partial(marked)):
        traced(function)()
    assert [span.name.rpartition(".")[2] for span in seen] == ["Retry", "marked", "marked", "marked"]


@wrapt.decorator
def seeing(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    """Tells, of each call, what it was bound to."""
    return getattr(instance, "__name__", None) or type(instance).__name__, wrapped(*args, **kwargs)


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize(
    "decorate",
    [
        lambda wrap, function: seeing(wrap(function)),
        lambda wrap, function: wrap(seeing(function)),
        lambda wrap, function: seeing(wrap(seeing(function))),
    ],
    ids=["below", "above", "between"],
)
def test_decorators_of_wrapt(decorate: Callable[[Any, Any], Any], on: bool) -> None:
    """Decorators made with wrapt see what they see without tracing, whichever stands above the other."""

    def owner(wrap: Callable[[Any], Any]) -> Any:
        class Owner:
            method = decorate(wrap, lambda self, a: a)
            of_class = decorate(wrap, classmethod(lambda cls, a: a))
            alone = decorate(wrap, staticmethod(lambda a: a))
            cached = decorate(wrap, functools.lru_cache(lambda self, a: a))

        return Owner

    def seen_by(kind: Any) -> list[Any]:
        it = kind()
        return [
            it.method(1), kind.method(it, 2), it.of_class(3), kind.of_class(4), it.alone(5), kind.alone(6),
            it.cached(7), kind.cached(it, 8),
        ]  # fmt: skip

    with capture_spans() if on else contextlib.nullcontext([]) as spans:
        assert seen_by(owner(traced)) == seen_by(owner(lambda function: function))
    assert [span.input for span in spans] == [{"a": number} for number in range(1, 9) if on]


def test_without_the_extension_of_wrapt(tmp_path: Path) -> None:
    """Where wrapt has no compiled part, as in other Pythons than CPython, what is decorated is traced too."""
    program = """
        from langchain_core.runnables import RunnableLambda
        from pltrace import current_span, traced
        from pltrace.testing import capture_spans

        class Owner:
            @traced
            def method(self, a):
                return current_span().name

            @traced
            @classmethod
            def of_class(cls, a):
                yield current_span().name

        with capture_spans() as spans:
            assert Owner().method(1) == "Owner.method"
            assert [*Owner.of_class(2)] == ["Owner.of_class"]
            assert traced("runnable")(RunnableLambda(lambda a: current_span().name)).invoke(3) == "runnable"
        print(len(spans))
    """
    ended = run(program, tmp_path, WRAPT_DISABLE_EXTENSIONS=1)
    assert (ended.out, ended.err) == ("4\n", "")


def test_over_a_setter(seen: CapturedSpans) -> None:
    """Over a property's setter it is traced too, and the getter once."""

    class Thing:
        size = 1

        @traced  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return 2 * self.size

        @traced
        @double.setter
        def double(self, value: int) -> None:
            self.size = value // 2

    thing = Thing()
    thing.double = 8
    assert thing.double == 8
    assert [span.input for span in seen] == [{"value": 8}, {}]


def test_what_a_class_treats_by_its_name(seen: CapturedSpans) -> None:
    """Functions that Python makes class or static methods of by their names alone stay so."""

    class Plugin:
        names: typing.ClassVar[list[str]] = []

        @traced
        def __init_subclass__(cls, name: str) -> None:
            cls.names.append(name)

        @traced
        def __class_getitem__(cls, key: str) -> str:
            return key

        @traced
        def __new__(cls) -> Plugin:
            return super().__new__(cls)

    class Special(Plugin, name="special"):
        pass

    special = Special()
    assert (Plugin.names, Plugin["key"], type(special)) == (["special"], "key", Special)
    assert type(special.__new__(Special)) is Special
    assert [span.name.rpartition(".")[2] for span in seen] == [
        "__init_subclass__", "__new__", "__class_getitem__", "__new__",
    ]  # fmt: skip


def test_abstract_methods() -> None:
    """A decorated abstract method stays abstract, in either order."""

    class Shape(abc.ABC):
        @traced
        @abc.abstractmethod
        def above(self) -> None: ...

        @abc.abstractmethod
        @traced
        def below(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Shape()  # type: ignore[abstract]
    assert Shape.__abstractmethods__ == {"above", "below"}


def test_dataclasses(seen: CapturedSpans) -> None:
    """Methods and fields of a dataclass can be decorated functions."""

    @dataclass
    class Point:
        x: int = 1
        near: Callable[..., int] = by_name
        others: list[int] = field(default_factory=traced(list))

        @traced
        def double(self) -> int:
            return 2 * self.x

        @traced
        def __post_init__(self) -> None:
            self.others.append(self.x)

    assert (Point(3).double(), Point(3).others, Point().near()) == (6, [3], 1)
    assert copy.deepcopy(Point(2)) == Point(2)


@traced
@dataclass
class Decorated:
    """A decorated class."""

    a: int = 0


def test_a_decorated_class_stays_the_class(seen: CapturedSpans) -> None:
    """A decorated class is what it was, also where nothing may stand for it; making an object of it is a span."""

    class Special(Decorated):
        pass

    def matched(value: object) -> int | None:
        match value:
            case Decorated(a=a):
                return a
        return None

    class Model(BaseModel):
        field: Decorated

    assert Special(1).a == 1
    assert type(Decorated(1)) is Decorated
    assert pickle.loads(pickle.dumps(Decorated(1))) == copy.deepcopy(Decorated(1)) == Decorated(1)
    assert str(inspect.signature(Decorated)) == "(a: 'int' = 0) -> None"
    assert inspect.getattr_static(Decorated, "a") == matched(Decorated()) == 0
    assert isinstance(unittest.mock.create_autospec(Decorated)(1), Decorated)
    assert Model.model_validate({"field": {"a": 3}}).field.a == 3
    assert {span.name for span in seen} == {"Decorated"}
    assert (seen[0].input, seen[0].output) == ({"a": 1}, None)


def test_a_class_without_an_init(seen: CapturedSpans) -> None:
    """One that makes its objects by inherited code is wrapped; one that has to stay a class is refused."""

    class Undecorated:
        field: int = 0

    @traced
    class Model(BaseModel):
        field: int = 0

    @traced
    class Pair(typing.NamedTuple):
        field: int = 0

    class Choice(enum.Enum):
        ONE = 1

    class Failure(Exception):
        """Caught by its class, which has to stay one."""

    with pytest.raises(ConfigError, match=r"Undecorated'> defines no __init__ .* above what makes its __init__"):
        traced(Undecorated)
    for other in (Choice, Failure):
        with pytest.raises(ConfigError, match="defines no __init__"):
            traced(other)
    assert (Model(field=1).field, Pair(1).field) == (1, 1)
    assert isinstance(Model(), Model)
    assert [span.name.rpartition(".")[2] for span in seen] == ["Model", "Pair", "Model"]
    assert traced(dict)(a=1) == {"a": 1}
    assert (RunnableLambda(str) | traced(str) | len).invoke(7) == 1


def test_wraps_leaves_what_is_called_alone(seen: CapturedSpans) -> None:
    """`functools.wraps` over a decorated function changes its name, not what it does."""

    def original() -> str:
        return "original"

    @functools.wraps(original)
    @traced("inner")
    def replacement() -> str:
        return f"more than {original()}"

    assert replacement() == "more than original"
    assert replacement.__name__ == "original"
    assert inspect.unwrap(replacement) is original
    assert seen.named("inner").output == "more than original"


@pytest.mark.parametrize("on", [False, True])
def test_wraps_with_what_is_decorated_itself(on: bool, local: Path) -> None:
    """`functools.wraps(f)` over the decorated `f`, or with what stands for `f`, makes no loop of `__wrapped__`."""
    if not on:
        pltrace.configure(enabled=False)

    def plain(a: int, b: int = 2) -> int:
        return a + b

    @functools.wraps(plain)
    def around(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    for named, function in ((plain, plain), (around, around), (around, plain), (plain, traced(plain))):
        decorated = functools.wraps(named)(traced(function))
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert inspect.unwrap(decorated) is plain
        assert decorated(1) == 3


@pytest.mark.parametrize("function", [lambda *_: True, functools.partial(lambda *_: True)])
def test_a_callable_on_an_exit_stack(function: Callable[..., bool]) -> None:
    """A decorated callable is called by an exit stack, and may take the exception."""
    with contextlib.ExitStack() as stack:
        stack.push(traced(function))
        raise ValueError("passed to it")


def test_attributes_belong_to_the_function() -> None:
    """Attributes set on a decorated function are its own, and are seen on it."""

    @traced
    def f() -> None: ...

    f.mark = 1  # type: ignore[attr-defined]
    assert f.mark == f.__wrapped__.mark == 1  # type: ignore[attr-defined]
    assert f.__dict__ == {"mark": 1}


def test_mocks(seen: CapturedSpans) -> None:
    """A mock goes through a decorated function as it is; decorated functions can be specified and patched."""
    mock = unittest.mock.MagicMock()
    assert traced(lambda: mock)() is mock
    assert traced(mock)(1) is mock.return_value
    with unittest.mock.patch.object(Named, "method", autospec=True, return_value=9):
        assert Named().method(a=1) == 9
    with pytest.raises(TypeError):
        unittest.mock.create_autospec(by_name)(1, 2, 3)


async def test_async_mocks(seen: CapturedSpans) -> None:
    """An async mock can be decorated."""
    assert await traced(unittest.mock.AsyncMock(return_value=3))() == 3


async def test_marked_coroutine_functions(seen: CapturedSpans) -> None:
    """A function that is only marked as a coroutine function may return any awaitable."""
    if sys.version_info < (3, 12):
        pytest.skip("came with Python 3.12")

    def later() -> Any:
        future = asyncio.get_running_loop().create_future()
        future.set_result(1)
        return future

    marked = inspect.markcoroutinefunction(later)
    assert await traced(marked)() == 1
    assert inspect.iscoroutinefunction(traced(marked))
    assert len(seen) == 1


# Results that are consumed later.


def test_files_are_returned_as_they_are(tmp_path: Path, seen: CapturedSpans) -> None:
    """An opened file is a finished result."""
    path = tmp_path / "file"
    with traced(open)(path, "w") as file:
        assert type(file) is io.TextIOWrapper
    stream = io.BytesIO()
    assert traced(lambda: stream)() is stream
    assert [span.status for span in seen] == ["ok", "ok"]


async def test_futures_and_tasks_are_returned_as_they_are(seen: CapturedSpans) -> None:
    """A future or task is a finished result, of the same identity."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    task = asyncio.ensure_future(asyncio.sleep(0))
    assert traced(lambda: future)() is future
    assert traced(lambda: task)() is task
    await task


class Cursor(Countdown):
    """An iterator as databases have it."""

    rows = 2

    def __init__(self) -> None:
        super().__init__(1, 2)
        self.closed = False

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __len__(self) -> int:
        return 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Gives what it got."""
        return args, kwargs

    def __repr__(self) -> str:
        return "cursor"


def test_an_iterator_hides_nothing(seen: CapturedSpans, doing: Callable[[Any], None]) -> None:
    """An iterator keeps its attributes and methods, `with` included, and has none that it hadn't."""
    inside: list[str] = []
    doing(lambda a, b: inside.append(current_span().name))
    cursor = Cursor()
    query = traced("query")(lambda: cursor)
    with query() as rows:
        assert isinstance(rows, Cursor)
        assert (rows.rows, len(rows), rows.closed) == (2, 2, False)
        assert (rows(1, a=2), repr(rows)) == (((1,), {"a": 2}), "cursor")
        assert rows == cursor == rows
        assert hash(rows) == hash(cursor)
        assert next(rows) is None
        assert next(iter(rows)) is None
        assert not current_span()
        assert not seen
    assert cursor.closed
    assert inside == ["query"] * 2
    assert not hasattr(traced(lambda: iter([]))(), "close")
    assert length_hint(traced(lambda: iter([1, 2]))()) == 2
    assert [span.status for span in seen] == ["ok", "ok", "ok"]


class Meta(type):
    """A metaclass with a special method, which isn't its classes' objects'."""

    def __len__(cls) -> int:
        return 1


class Bars(metaclass=Meta):
    """An iterator that can be compared and joined with its like, and whose `close` is a price."""

    __slots__ = ("close", "count")

    def __init__(self) -> None:
        self.count, self.close = 0, 2.5

    def __iter__(self) -> Bars:
        return self

    def __next__(self) -> int:
        self.count += 1
        return self.count

    def __eq__(self, other: object) -> bool:
        return self.count == other.count if type(other) is Bars else NotImplemented

    def __add__(self, other: Any) -> int:
        return self.count + other.count if type(other) is Bars else NotImplemented

    def __iadd__(self, other: int) -> Bars:
        self.count += other
        return self


class Forwarding:
    """An iterator whose special methods are those of something inside."""

    def __init__(self) -> None:
        self.rows = iter([1, 2])

    __iter__ = property(attrgetter("rows.__iter__"))
    __next__ = property(attrgetter("rows.__next__"))
    __length_hint__ = property(attrgetter("rows.__length_hint__"))
    close = property(lambda self: 2.5)


class Endless(Cursor):
    """An iterator that takes back its base class's length and hash."""

    __len__ = __hash__ = None  # type: ignore[assignment]


_ABSTRACT = [getattr(collections.abc, name) for name in collections.abc.__all__ if name != "ByteString"] + [
    getattr(typing, name) for name in typing.__all__ if name.startswith("Supports")
]


def _answers(value: Any) -> Iterator[Any]:
    """What a value is, and what it says to those who look for its special methods."""
    yield [kind.__name__ for kind in _ABSTRACT if isinstance(value, kind)]
    yield {*dir(value)} - {"__slotnames__"}  # Python puts that into a class whose objects are copied.
    yield from (hasattr(value, "close"), type(value).__name__, value.__class__)
    asked: list[Callable[[Any], Any]] = [
        len, int, float, operator.index, reversed, iter, aiter, bool, callable, vars, copy.copy, pickle.dumps,
        os.fspath, length_hint, lambda it: type(hash(it)), lambda it: it[0], lambda it: it(), lambda it: it < it,
        lambda it: it + 1, lambda it: it == it, lambda it: format(it, "?"), lambda it: setattr(it, "unknown", 1),
    ]  # fmt: skip
    for ask in asked:
        try:
            answer = ask(value)
        except Exception as error:
            yield type(error), re.sub(r"\b(itertools|_csv)\.", "", str(error))  # So they name classes in C.
        else:
            yield answer if isinstance(answer, int) else type(answer).__name__


@pytest.mark.parametrize(
    "make",
    [
        lambda: map(str, [1]), lambda: iter([1]), itertools.count, lambda: csv.reader(["a"]), Bars, Endless, Forwarding,
        lambda: Countdown(1, 2), Cursor, lambda: AsyncCountdown(1, 2), lambda: Promise(1, 2),
    ],
)  # fmt: skip
def test_what_is_consumed_has_the_special_methods_of_its_class(make: Callable[[], Any], seen: CapturedSpans) -> None:
    """It is and can what it was, no more and no less, and Python's messages name its class."""
    driven = traced(lambda: make())()
    assert type(driven) is not type(driven.__wrapped__)
    assert [*_answers(driven)] == [*_answers(make())]
    del driven


def test_an_iterator_is_read_by_what_looks_for_more_than_iteration(seen: CapturedSpans) -> None:
    """`tee` gives all items to each, and a pool that asks for a length takes it as an iterator."""

    @traced
    def lengths() -> Any:
        return map(len, ["a", "bc", "def"])

    first, second = itertools.tee(lengths())
    assert next(second) == 1
    assert (list(first), list(second)) == ([1, 2, 3], [2, 3])
    with ThreadPool(2) as pool:
        assert pool.map(str, lengths()) == ["1", "2", "3"]
    assert [span.status for span in seen] == ["ok", "ok"]


def test_operators_of_an_iterator(seen: CapturedSpans) -> None:
    """They work on it, in place and with another one as well; its attributes can be set, and have any name."""
    bars, others = Bars(), Bars()
    driven, other = traced(lambda: bars)(), traced(lambda: others)()
    assert driven == other == bars == driven
    assert len({id(driven), id(weakref.ref(driven)())}) == 1
    same = driven
    same += 3
    assert same is driven
    assert (driven + other, driven + others, bars.count, driven.close) == (3, 3, 3, 2.5)
    assert driven != other
    del driven.close
    assert not hasattr(bars, "close")
    driven.count = 7
    assert next(driven) == bars.count == 8
    forwarding = traced(lambda: Forwarding())()
    assert (forwarding.close, list(forwarding)) == (2.5, [1, 2])


def test_a_database_cursor(seen: CapturedSpans) -> None:
    """A function that returns a database's cursor ends when all rows are fetched, in whatever way."""
    database = sqlite3.connect(":memory:")
    query = traced("query")(lambda: database.execute("VALUES (1), (2)"))
    cursors = []
    for number, fetch in enumerate((list, lambda cursor: cursor.fetchall()), 1):
        cursors.append(query())
        assert len(seen) == number - 1
        assert fetch(cursors[-1]) == [(1,), (2,)]
        assert len(seen) == number
    database.close()


async def test_an_async_database_cursor(seen: CapturedSpans) -> None:
    """One whose rows are fetched by awaiting ends when they are there."""

    class AsyncCursor:
        def __aiter__(self) -> AsyncCursor:
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

        async def fetchall(self) -> list[int]:
            await asyncio.sleep(0)
            assert current_span().name == "query"
            return [1, 2]

    cursor = traced("query")(AsyncCursor)()
    fetching = cursor.fetchall()
    assert not seen
    assert await fetching == [1, 2]
    assert [span.status for span in seen] == ["ok"]


class Local:
    """A proxy that has all special methods, as a web framework's objects of the current request are."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Local if self.value is None else type(self.value)

    def __next__(self) -> Any:
        return next(self.value)

    def __anext__(self) -> Any:
        return anext(self.value)

    def __await__(self) -> Any:
        return self.value.__await__()


class Overeager(type):
    """A metaclass that fails in its own way when it is asked for what isn't there."""

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(name)


class Finished(metaclass=Overeager): ...


@pytest.mark.parametrize("result", [Local({}), Local(), Finished()])
def test_what_is_no_iterator_is_returned_as_it_is(result: Any, seen: CapturedSpans) -> None:
    """A proxy of what can't be iterated, or of nothing yet, and an object of a strange class, are finished results."""
    assert traced(lambda: result)() is result
    assert [span.status for span in seen] == ["ok"]


def test_made_awaitable_afterwards(seen: CapturedSpans) -> None:
    """`types.coroutine` makes a decorated generator function one whose result can be awaited, as of any other."""

    @types.coroutine
    @traced
    def steps() -> Any:
        return (yield 1)

    async def waits() -> Any:
        return await steps()

    waiting = waits()
    assert waiting.send(None) == 1
    with pytest.raises(StopIteration) as stopped:
        waiting.send(2)
    assert stopped.value.value == 2


def test_copying_and_pickling_iterators(seen: CapturedSpans) -> None:
    """An iterator that could be copied or pickled still can."""
    rows = traced(lambda: iter([1, 2]))()
    next(rows)
    assert list(copy.copy(rows)) == list(copy.deepcopy(rows)) == list(pickle.loads(pickle.dumps(rows))) == [2]
    assert list(rows) == [2]


def test_yield_from_an_iterator(seen: CapturedSpans) -> None:
    """`yield from` takes an iterator that can't be closed, and leaves it as it did."""

    def outer() -> Iterator[str]:
        yield from traced(lambda: map(str, [1, 2]))()

    steps = outer()
    assert next(steps) == "1"
    steps.close()
    del steps
    assert [span.status for span in seen] == ["ok"]


class Connecting:
    """Awaitable once, and an async context manager, as what HTTP clients return for a request."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def send(self, sent: None) -> None:
        """Be a coroutine, for who asks."""

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        self.names.append(current_span().name)
        return self

    async def __aenter__(self) -> Connecting:
        return await self

    async def __aexit__(self, *_: object) -> None:
        self.names.append(current_span().name)


async def test_what_can_be_awaited_and_entered(seen: CapturedSpans) -> None:
    """What is both awaitable and an async context manager stays so, and opens and closes inside the scope."""
    connect = traced("connect")(lambda: Connecting())
    async with connect() as connection:
        assert isinstance(connection, Connecting)
        assert not current_span()
        assert not seen
    assert connection.names == ["connect", "connect"]
    assert (await connect()).names == ["connect"]
    assert [span.status for span in seen] == ["ok", "ok"]


class Pool:
    """Lives on, and may be awaited, or entered, at its beginning: clients of databases do so."""

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self

    async def __aenter__(self) -> Pool:
        return self

    async def __aexit__(self, *_: object) -> None: ...


class Collection:
    """Answers to `next()` that it can't be iterated: a database's, which makes one of each attribute asked for."""

    __iter__ = None

    def __next__(self) -> Any:
        raise TypeError("not iterable")


class Running:
    """A future of others than asyncio's: a cluster's, whose functions ask for its class."""

    def add_done_callback(self, function: Callable[[Any], object]) -> None:
        """Do nothing."""

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()


@pytest.mark.parametrize("kind", [Pool, Collection, Running])
async def test_what_lives_on_is_returned_as_it_is(kind: type, seen: CapturedSpans) -> None:
    """Clients and futures aren't streams, though they can be awaited: the span ends with the call that made them."""
    made = kind()
    assert traced("get")(lambda: made)() is made
    assert await traced("aget")(_returns)(made) is made
    assert [(span.name, span.status) for span in seen] == [("get", "ok"), ("aget", "ok")]


async def _returns(value: Any) -> Any:
    return value


def _numbers() -> Iterator[int]:
    yield from range(6)


async def _anumbers() -> AsyncIterator[int]:
    for number in range(6):
        yield number


class Feed:
    """Keeps one stream, and gives it to whoever asks."""

    def __init__(self) -> None:
        self._numbers, self._anumbers = _numbers(), _anumbers()

    @traced
    def numbers(self) -> Iterator[int]:
        """Give it."""
        return self._numbers

    @traced
    def anumbers(self) -> AsyncIterator[int]:
        """Give the async one."""
        return self._anumbers

    @traced
    async def awaited(self) -> Iterator[int]:
        """Give it after a while."""
        await asyncio.sleep(0)
        return self._numbers

    @traced
    def waits(self) -> Any:
        """Give a coroutine that is kept."""
        return self.waiting


def test_a_stream_that_others_hold_too_goes_on(seen: CapturedSpans) -> None:
    """Who leaves a stream that a function was given, or keeps, closes it no more than undecorated."""

    @traced
    def skip_one(numbers: Iterator[int]) -> Iterator[int]:
        next(numbers)
        return numbers

    numbers = _numbers()
    for number in skip_one(numbers):
        if number == 2:
            break
    assert [*numbers] == [3, 4, 5]
    feed = Feed()
    assert [next(feed.numbers()) for _ in range(3)] == [0, 1, 2]
    assert next(asyncio.run(feed.awaited())) == 3
    with traced("block"):
        assert next(pltrace.bind(feed.numbers())) == 4
    assert [*feed.numbers()] == [5]
    assert {span.status for span in seen} == {"ok"}


async def test_an_async_stream_that_others_hold_too_goes_on(seen: CapturedSpans) -> None:
    """Who leaves an async stream that a function keeps closes it no more than undecorated."""
    feed = Feed()
    found = []
    async for number in feed.anumbers():
        found.append(number)
        if number == 1:
            break
    while not seen:  # The loop closes what was let go of.
        await asyncio.sleep(0)
    with traced("block"):
        found.append(await anext(pltrace.bind(feed.anumbers())))
    while len(seen) < 3:
        await asyncio.sleep(0)
    assert [*found, *[number async for number in feed.anumbers()]] == [0, 1, 2, 3, 4, 5]
    assert [span.status for span in seen] == ["ok"] * 4


def _left(closed: list[str]) -> Iterator[int]:
    try:
        yield from (1, 2)
    finally:
        closed.append(threading.current_thread().name)


class Owner:
    """Keeps the stream that it opens."""

    def __init__(self, stream: Iterator[int]) -> None:
        self.stream = stream

    def open(self) -> Iterator[int]:
        """Give it."""
        return self.stream


@pytest.mark.parametrize(
    "make",
    [
        lambda stream: traced(lambda: stream)(),
        lambda stream: traced(Owner(stream).open)(),
        lambda stream: traced(lambda given: given[0]["stream"])([{"stream": stream}]),
        lambda stream: traced(lambda given: given["a"][0])({"a": [stream]}),
        lambda stream: traced(lambda: (number for number in stream))(),
        lambda stream: traced(traced(lambda: stream))(),
    ],
    ids=["of a closure", "of an object", "in a list", "in a dict", "iterated over", "traced twice"],
)  # fmt: skip
def test_a_stream_that_only_its_span_could_hold_is_closed(
    make: Callable[[Iterator[int]], Iterator[int]], seen: CapturedSpans
) -> None:
    """A stream that is left is closed right then, though its function, or an argument, had to do with it."""
    closed: list[str] = []
    for _ in make(_left(closed)):
        break
    assert closed == [threading.current_thread().name]
    assert {span.status for span in seen} == {"ok"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_fails_as_it_is_left(seen: CapturedSpans) -> None:
    """A stream that fails while it is closed, when nobody holds it any more, is recorded as failed."""

    @traced
    def fails() -> Iterator[int]:
        try:
            yield 1
        finally:
            raise OSError("cleanup failed")

    for _ in fails():
        break
    assert [(span.status, span.error) for span in seen] == [("error", "OSError: cleanup failed")]


async def test_an_async_stream_ends_when_the_last_lets_go(seen: CapturedSpans) -> None:
    """What others hold too, and nobody reads any more, is closed when they let go of it, not by the collector."""
    closed = asyncio.Event()

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in range(3):
                yield number
        finally:
            closed.set()

    kept = [numbers()]
    async for _ in traced(lambda: kept[0])():
        break
    while not seen:
        await asyncio.sleep(0)
    assert not closed.is_set()
    kept.clear()
    await asyncio.wait_for(closed.wait(), 10)


class Rendezvous:
    """A stream that is a future too, as those of gRPC."""

    def __iter__(self) -> Rendezvous:
        return self

    def __next__(self) -> int:
        raise StopIteration

    def add_done_callback(self, function: Callable[[Any], object]) -> None:
        """Do nothing."""


def test_a_stream_that_is_a_future_too(seen: CapturedSpans) -> None:
    """What can be iterated over is a stream, whatever else it is."""
    stream = traced(Rendezvous)()
    assert not seen
    assert [*stream] == []
    assert [span.status for span in seen] == ["ok"]


class Given:
    """Has a static method that hands on what it was given."""

    @staticmethod
    @traced
    def passed(stream: Iterator[int]) -> Iterator[int]:
        """Give it back."""
        return stream


def test_a_static_method_that_returns_its_argument(seen: CapturedSpans) -> None:
    """It has no object of its own: the span lasts as long as the stream is read."""
    stream = Given.passed(iter([1, 2]))
    assert not seen
    assert [*stream] == [1, 2]
    assert [span.status for span in seen] == ["ok"]


@pytest.mark.parametrize("make", [lambda: (number for number in range(3_000)), lambda: map(int, range(3_000))])
def test_a_stream_that_goes_from_hand_to_hand(make: Callable[[], Iterator[int]], seen: CapturedSpans) -> None:
    """A stream that is read by many functions in turn, each of which gives it back, stays as quick as it was."""

    @traced
    def read_one(numbers: Iterator[int], found: list[int]) -> Iterator[int]:
        found.append(next(numbers))
        return numbers

    @traced
    def nested(numbers: Iterator[int], levels: int) -> Iterator[int]:
        return nested(numbers, levels - 1) if levels else numbers

    found: list[int] = []
    numbers = make()
    for _ in range(1_500):
        numbers = read_one(numbers, found)
    found += nested(numbers, 20)
    assert found == [*range(3_000)]
    assert [span.status for span in seen] == ["ok"] * (1_500 + 21)


async def test_closing_a_stream_that_others_hold_too(seen: CapturedSpans) -> None:
    """Who closes such a stream, closes it."""
    feed = Feed()
    numbers, anumbers = feed.numbers(), feed.anumbers()
    assert (next(numbers), await anext(anumbers)) == (0, 0)
    numbers.close()  # type: ignore[attr-defined]
    await anumbers.aclose()  # type: ignore[attr-defined]
    assert ([*feed.numbers()], [number async for number in feed.anumbers()]) == ([], [])


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
async def test_a_coroutine_that_others_hold_too(seen: CapturedSpans) -> None:
    """Who throws away a coroutine that a function keeps leaves it to be awaited later."""
    feed = Feed()
    feed.waiting = _returns(7)  # type: ignore[attr-defined]
    feed.waits()
    assert await feed.waiting == 7  # type: ignore[attr-defined]


async def test_awaiting_again(seen: CapturedSpans) -> None:
    """An awaitable that can be awaited again is, the second time outside of the ended span."""
    promise = traced("promise")(lambda: Connecting())()
    connection = await promise
    with traced("outer"):
        await promise
    assert connection.names == ["promise", "outer"]


def test_one_iterator_in_many_threads(seen: CapturedSpans) -> None:
    """Threads that share an iterator each keep their own scope."""
    shared = [traced("numbers")(lambda: map(str, range(4_000)))()]
    wrong: list[Any] = []

    def take() -> None:
        with traced("taker") as span:
            for _ in range(500):
                next(shared[0], None)
                if current_span() is not span:
                    wrong.append(current_span())
        if current_span():
            wrong.append(current_span())

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    shared.clear()


# Exceptions beyond the table.


def test_no_frame_of_ours_but_one(seen: CapturedSpans) -> None:
    """A traceback shows at most one frame of ours for a function, and two for the others."""

    def ours(error: BaseException) -> int:
        frames = inspect.getinnerframes(error.__traceback__)  # type: ignore[arg-type]
        return sum("pltrace/_" in frame.filename for frame in frames)

    def fail() -> None:
        raise ValueError

    async def afail() -> None:
        raise ValueError

    def generate() -> Iterator[None]:
        yield
        raise ValueError

    async def agenerate() -> AsyncIterator[None]:
        yield
        raise ValueError

    async def run() -> list[int]:
        counts = []
        for start in (fail, afail, generate, agenerate):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                await consume(traced(start)())
            counts.append(ours(caught.value))
        return counts

    assert all(count <= most for count, most in zip(asyncio.run(run()), (1, 2, 1, 2), strict=True))


def test_stop_iteration_passes(seen: CapturedSpans) -> None:
    """StopIteration raised by a function comes out as such."""

    @traced
    def f() -> None:
        raise StopIteration(5)

    with pytest.raises(StopIteration) as caught:
        f()
    assert caught.value.value == 5
    assert seen[0].status == "error"


def test_too_deep_a_recursion_leaves_nothing(seen: CapturedSpans) -> None:
    """A RecursionError, wherever it strikes, leaves no scope behind, and every call that began has ended."""

    @traced
    def down(level: int) -> None:
        down(level + 1)

    for extra in range(12):

        def deeper(level: int) -> None:
            down(0) if level == 0 else deeper(level - 1)

        with pytest.raises(RecursionError):
            deeper(extra)
        assert not current_span()
    seen.assert_nothing_open()
    assert {span.status for span in seen} == {"error"}


def test_recursion_of_some_depth(seen: CapturedSpans) -> None:
    """A decorated function may call itself hundreds of times."""

    @traced
    def down(level: int) -> int:
        return level and down(level - 1)

    assert down(250) == 0
    assert len(seen) == 251


def test_exceptions_die_without_the_collector(seen: CapturedSpans) -> None:
    """What an exception holds is free once it is handled, as undecorated: no cycle of ours keeps it."""

    class Big:
        pass

    def fail(kind: str) -> weakref.ref[Big]:
        error: Any = ValueError()
        error.big = Big()
        reference = weakref.ref(error.big)
        with contextlib.suppress(ValueError):
            if kind == "generator":
                steps = traced(_echo)()
                next(steps)
                steps.throw(error)
            elif kind == "coroutine":
                waiting = traced(_wait)()
                waiting.send(None)
                waiting.throw(error)
            else:
                asteps = traced(_agen)()
                with contextlib.suppress(StopIteration):
                    asteps.asend(None).send(None)
                asteps.athrow(error).send(None)
        del error
        return reference

    def _echo() -> Iterator[None]:
        yield

    async def _wait() -> None:
        await _Raiser()

    class _Raiser:
        def __await__(self) -> Any:
            yield

    async def _agen() -> AsyncIterator[None]:
        yield

    import gc

    gc.disable()
    try:
        for kind in ("generator", "coroutine", "async generator"):
            assert fail(kind)() is None, kind
    finally:
        gc.enable()


# Libraries.


def test_pytest_fixtures_and_tests(tmp_path: Path) -> None:
    """Decorated fixtures and tests, of each kind, do their work under pytest, and are spans."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import pytest
        from pltrace import traced, current_span

        seen = []

        @pytest.fixture
        @traced
        def plain(): return current_span().name

        @pytest.fixture
        @traced
        def cleaned():
            seen.append(current_span().name)
            yield "value"
            seen.append(current_span().name)

        @traced
        @pytest.fixture
        def above():
            yield current_span().name

        @pytest.fixture
        @traced
        def dependent(plain, request): return plain

        @pytest.fixture(params=[1, 2])
        @traced
        def many(request): return request.param

        @pytest.fixture
        @traced
        async def later(): return current_span().name

        @pytest.fixture
        @traced
        async def later_cleaned():
            yield current_span().name

        @traced
        def test_sync(cleaned, plain, dependent, above):
            assert (cleaned, plain, dependent, above) == ("value", "plain", "plain", "above")
            assert current_span().name == "test_sync"

        def test_after(): assert seen == ["cleaned", "cleaned"] and not current_span()

        @traced
        @pytest.mark.parametrize("n", [1, 2])
        def test_parametrized(many, n): assert current_span().name == "test_parametrized"

        @pytest.mark.asyncio
        @traced
        async def test_async(later, later_cleaned):
            assert (later, later_cleaned, current_span().name) == ("later", "later_cleaned", "test_async")

        class TestClass:
            @pytest.fixture
            @traced
            def own(self): yield type(self)

            @traced
            def test_method(self, own, plain): assert own is TestClass and plain == "plain"
        """)
    )
    (tmp_path / "conftest.py").write_text("import pltrace; pltrace.configure(store='memory')")
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert "8 passed" in ran.stdout, ran.stdout + ran.stderr


def test_what_pytest_shows_of_a_failure(tmp_path: Path) -> None:
    """No line of ours is in what pytest shows when a test that calls traced code fails."""
    (tmp_path / "test_it.py").write_text(
        textwrap.dedent("""
        import asyncio
        import pltrace
        from pltrace import bind, traced

        pltrace.configure(store="memory")

        @traced
        def fail(): raise ValueError

        @traced
        async def fail_later(): fail()

        @traced
        def steps():
            yield 1
            asyncio.run(fail_later())

        def test_it():
            with traced("block"):
                bind(list)(steps())
        """)
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, env=surroundings())
    assert "1 failed" in ran.stdout, ran.stdout + ran.stderr
    assert "async def fail_later(): fail()" in ran.stdout
    assert "pltrace/_" not in ran.stdout


def test_click_and_typer(seen: CapturedSpans) -> None:
    """Commands can be decorated below and above the command line's own decorator, and stay what they are."""
    click, typer = pytest.importorskip("click"), pytest.importorskip("typer")
    from click.testing import CliRunner
    from typer.testing import CliRunner as TyperRunner

    @click.command()
    @click.option("--count", default=1)
    @traced
    def below(count: int) -> None:
        """Counts."""
        click.echo(f"{current_span().name.rpartition('.')[2]} {count}")

    @click.command()
    @traced
    @click.argument("word")
    def between(word: str) -> None:
        click.echo(word)

    @traced
    @click.group()
    def group() -> None:
        click.echo(current_span().name.rpartition(".")[2])

    @traced("above")
    @group.command()
    def above() -> None:
        click.echo(current_span().name)

    app = typer.Typer()

    @app.command()
    @traced
    def typed(number: int, loud: bool = False) -> None:
        typer.echo(f"{number + 1} {loud}")

    assert CliRunner().invoke(below, ["--count", "3"]).output == "below 3\n"
    assert CliRunner().invoke(between, ["hey"]).output == "hey\n"
    assert CliRunner().invoke(group, ["above"]).output == "group\nabove\n"
    assert type(above) is click.Command
    assert "Counts." in CliRunner().invoke(below, ["--help"]).output
    assert TyperRunner().invoke(app, ["4", "--loud"]).output == "5 True\n"
    assert [span.status for span in seen] == ["ok"] * 5


def test_commands_that_exit(seen: CapturedSpans) -> None:
    """An exit of click's or typer's that reports no failure is none; one with another code is an error."""
    click, typer = pytest.importorskip("click"), pytest.importorskip("typer")
    from click.testing import CliRunner
    from typer.testing import CliRunner as TyperRunner

    @click.command()
    @click.argument("code", type=int)
    @traced
    def clicked(code: int) -> None:
        click.get_current_context().exit(code)

    app = typer.Typer()

    @app.command()
    @traced
    def typed(code: int) -> None:
        raise typer.Exit(code)

    assert [CliRunner().invoke(clicked, [code]).exit_code for code in ("0", "2")] == [0, 2]
    assert [TyperRunner().invoke(app, [code]).exit_code for code in ("0", "2")] == [0, 2]
    assert [(span.status, span.error) for span in seen] == [("ok", None), ("error", "Exit: 2")] * 2


async def test_fastapi(seen: CapturedSpans) -> None:
    """Routes and dependencies, plain, async, cleaning up and streaming, keep their parameters and are spans."""
    fastapi, httpx = pytest.importorskip("fastapi"), pytest.importorskip("httpx")
    from fastapi.responses import StreamingResponse

    app, names = fastapi.FastAPI(), []

    @traced
    def token(x_token: str = fastapi.Header("none")) -> Iterator[str]:
        yield x_token
        names.append(current_span().name.rpartition(".")[2])

    @traced
    async def user(who: str = "me") -> AsyncIterator[str]:
        yield who
        names.append(current_span().name.rpartition(".")[2])

    @app.get("/sync/{number}")
    @traced
    def sync_route(number: int, token: str = fastapi.Depends(token)) -> dict[str, Any]:
        return {"number": number, "token": token, "span": bool(current_span())}

    @app.get("/async/{number}")
    @traced
    async def async_route(number: int, user: str = fastapi.Depends(user)) -> dict[str, Any]:
        return {"number": number, "user": user}

    @traced("streamed")
    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            yield f"{number}{current_span().name} "

    @traced("streamed too")
    def sync_lines() -> Iterator[str]:
        for number in range(3):
            yield f"{number}{current_span().name} "

    @app.get("/stream")
    @traced
    async def stream_route() -> Any:
        return StreamingResponse(lines())

    @app.get("/sync-stream")
    @traced
    def sync_stream_route() -> Any:
        return StreamingResponse(sync_lines())

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.get("/sync/4", headers={"x-token": "t"})
        assert answer.json() == {"number": 4, "token": "t", "span": True}
        assert (await client.get("/async/5?who=you")).json() == {"number": 5, "user": "you"}
        assert (await client.get("/async/five")).status_code == 422
        assert (await client.get("/stream")).text == "0streamed 1streamed 2streamed "
        assert (await client.get("/sync-stream")).text == "0streamed too 1streamed too 2streamed too "
    assert {"number", "who"} <= set(str(app.openapi()).replace("'", " ").split())
    assert names[:2] == ["token", "user"]
    # Newer versions throw into a dependency what was wrong with the request.
    assert {span.error_types[0] for span in seen if span.status != "ok"} <= {"RequestValidationError"}


@pytest.mark.parametrize("way", ["async", "sync", "iterable"])
async def test_streamed_responses(way: str, seen: CapturedSpans) -> None:
    """A route's span lasts until its response is sent, and the scope is inside the body; not in what runs after it."""
    fastapi, httpx = pytest.importorskip("fastapi"), pytest.importorskip("httpx")
    from fastapi.responses import StreamingResponse
    from langchain_core.output_parsers import StrOutputParser
    from starlette.background import BackgroundTask

    app, scopes = fastapi.FastAPI(), []

    async def lines() -> AsyncIterator[str]:
        async for chunk in chain.astream("Why?"):
            scopes.append(current_span().name)
            yield chunk

    def sync_lines() -> Iterator[str]:  # It runs in a thread.
        for chunk in chain.stream("Why?"):
            scopes.append(current_span().name)
            yield chunk

    class Lines:
        def __aiter__(self) -> AsyncIterator[str]:
            return lines()

    @app.get("/")
    @traced("route", tags=["t"])
    async def route() -> Any:
        afterwards = BackgroundTask(lambda: scopes.append((current_span().name, seen[-1].name)))
        return StreamingResponse({"async": lines, "sync": sync_lines, "iterable": Lines}[way](), background=afterwards)

    with ScriptedOpenAI("one two three") as llm:
        chain = chat(llm) | StrOutputParser()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            assert (await client.get("/")).text == "one two three"
    assert {*scopes[:-1]} == {"route"}
    assert scopes[-1] == ("", "route")
    assert seen.tree() == [["route", ["RunnableSequence", ["ChatOpenAI"], ["StrOutputParser"]]]]
    assert {(span.status, span.tags[0]) for span in seen} == {("ok", "t")}


def test_streamed_responses_of_flask_and_django(seen: CapturedSpans) -> None:
    """A view's span lasts until its streamed response is read, and the scope is inside; what isn't streamed stays."""
    import django
    import flask
    from django.conf import settings
    from django.http import FileResponse, StreamingHttpResponse
    from django.test import RequestFactory

    def lines() -> Iterator[str]:
        yield from (current_span().name, " ", current_span().name)

    async def async_lines() -> AsyncIterator[str]:
        yield current_span().name

    app = flask.Flask("views")
    views: dict[str, Callable[[], Any]] = {
        "streamed": lambda: flask.Response(lines()),
        "listed": lambda: flask.Response(["a", "b"]),
        "text": lambda: flask.Response("text"),
        "file": lambda: flask.send_file(io.BytesIO(b"file"), "text/plain"),
    }
    for name, view in views.items():
        app.add_url_rule(f"/{name}", name, traced(name)(view))
    client = app.test_client()
    assert [client.get(f"/{name}").text for name in views] == ["streamed streamed", "ab", "text", "file"]

    settings.configure(ALLOWED_HOSTS=["*"])
    django.setup()
    request = RequestFactory().get("/")
    streamed = traced("view")(lambda request: StreamingHttpResponse(lines()))(request)
    assert seen[-1].name != "view"
    assert (b"".join(streamed), seen[-1].name) == (b"view view", "view")
    as_it_comes = traced("async view")(lambda request: StreamingHttpResponse(async_lines()))(request)
    assert asyncio.run(_all_of(as_it_comes)) == [b"async view"]
    file = traced("download")(lambda request: FileResponse(io.BytesIO(b"file")))(request)
    assert (seen[-1].name, b"".join(file)) == ("download", b"file")
    assert {span.status for span in seen} == {"ok"}


async def _all_of(items: Any) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize(("version", "status"), [("2.3", "cancelled"), ("2.4", "ok")])
async def test_a_client_that_leaves_a_stream(version: str, status: str, seen: CapturedSpans) -> None:
    """A response that is not read to its end leaves nothing open, however the server tells that the client is gone."""
    fastapi = pytest.importorskip("fastapi")
    from fastapi.responses import StreamingResponse

    app, began = fastapi.FastAPI(), asyncio.Event()

    @app.get("/")
    @traced("route")
    async def route() -> Any:
        async def lines() -> AsyncIterator[str]:
            async for chunk in chat(llm).astream("Why?"):
                yield str(chunk.content)
                await asyncio.Event().wait()

        return StreamingResponse(lines())

    async def receive() -> dict[str, Any]:
        await began.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            began.set()
            if version == "2.4":
                raise OSError("gone")

    request = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
    with ScriptedOpenAI("one two three") as llm:
        with contextlib.suppress(Exception):  # Starlette says of the second kind alone that the client is gone.
            await app({**request, "asgi": {"version": "3.0", "spec_version": version}}, receive, send)
        while len(seen) < 2:  # The loop closes what was left.
            await asyncio.sleep(0)
    assert {span.name: span.status for span in seen} == {"route": status, "ChatOpenAI": "partial"}


def test_contextmanager(seen: CapturedSpans) -> None:
    """Under `contextmanager` a generator's span lasts for the block, whose body doesn't see its scope."""

    @contextlib.contextmanager
    @traced("under")
    def under() -> Iterator[str]:
        yield current_span().name

    @traced("over")
    @contextlib.contextmanager
    def over() -> Iterator[str]:
        yield current_span().name

    with under() as name:
        assert name == "under"
        assert not current_span()
        assert not seen
    assert [span.name for span in seen] == ["under"]
    with over() as name:  # Making the context manager is the call.
        assert name == ""
        assert [span.name for span in seen] == ["under", "over"]

    with pytest.raises(ValueError, match="mine"), under():
        raise ValueError("mine")
    assert [span.status for span in seen] == ["ok", "ok", "error"]


def test_tools(seen: CapturedSpans) -> None:
    """LangChain's `@tool` works over and under: it stays a tool, and running it runs in the scope."""
    from langchain_core.tools import BaseTool, tool

    @tool
    @traced("inside")
    def below(city: str, days: int = 1) -> str:
        """Tell the weather."""
        return f"{city} {days} {current_span().name}"

    @traced("outside", tags=["t"])
    @tool
    def above(city: str, days: int = 1) -> str:
        """Tell the weather."""
        return f"{city} {days} {current_span().name}"

    for one, scope in ((below, "inside"), (above, "outside")):
        assert isinstance(one, BaseTool)
        assert (one.description, set(one.args)) == ("Tell the weather.", {"city", "days"})
        assert one.invoke({"city": "Rome"}) == f"Rome 1 {scope}"
        with traced("around"):
            assert one.invoke({"city": "Rome"}) == f"Rome 1 {scope}"
    tree = seen.tree()
    assert tree[:1] == [["outside", ["above"]]] or ["outside", ["above"]] in tree
    assert ["around", ["below", ["inside"]]] in tree
    assert ["around", ["outside", ["above"]]] in tree


async def test_async_tools(seen: CapturedSpans) -> None:
    """Async tools work the same."""
    from langchain_core.tools import tool

    @tool
    @traced("inside")
    async def below(city: str) -> str:
        """Tell the weather."""
        return f"{city} {current_span().name}"

    above = traced("outside")(tool(below.coroutine.__wrapped__))
    assert await below.ainvoke({"city": "Rome"}) == "Rome inside"
    assert await above.ainvoke({"city": "Rome"}) == "Rome outside"
    assert above.name == "below"


async def test_runnable_lambdas(seen: CapturedSpans) -> None:
    """`RunnableLambda` works over and under: alone, in a chain, streamed, in batches, sync and async."""
    from langchain_core.runnables import Runnable, RunnableLambda

    def scope(text: str) -> str:
        return f"{text} {current_span().name}"

    for one in (RunnableLambda(traced("t")(scope)), traced("t")(RunnableLambda(scope)),
                traced("t")(RunnableLambda(str) | RunnableLambda(scope))):  # fmt: skip
        assert isinstance(one, Runnable)
        assert one.invoke("a") == "a t"
        assert await one.ainvoke("a") == "a t"
        assert one.batch(["a", "b"]) == ["a t", "b t"]
        assert await one.abatch(["a", "b"]) == ["a t", "b t"]
        assert list(one.stream("a")) == ["a t"]
        assert [item async for item in one.astream("a")] == ["a t"]
        assert (one | RunnableLambda(str.upper)).invoke("a") == "A T"
        assert (RunnableLambda(str.upper) | one).invoke("a") == "A t"
        assert (str.upper | one | str.lower).invoke("a") == "a t"
        assert one.with_retry().invoke("a") == "a t"
    assert {span.status for span in seen} == {"ok"}
    assert {span.name for span in seen} >= {"t"}


async def test_what_traced_models_make(seen: CapturedSpans) -> None:
    """A model with tools or a structured output, and what an agent makes of it, is decorated as the model is."""
    from langchain.agents import create_agent
    from langchain_core.runnables import ConfigurableField
    from langchain_core.tools import tool

    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        return f"Sunny in {city}."

    replies = [Reply(tool_calls=[("weather", {"city": "Rome"})])] * 3 + ["Sunny.", Reply('{"name": "Bo"}'), "a", "b"]
    with ScriptedOpenAI(replies) as llm:
        model = traced("ask", tags=["t"])(chat(llm))
        assert model.bind_tools([weather]).invoke("Rome?").tool_calls
        assert (await model.bind_tools([weather]).ainvoke("Rome?")).tool_calls
        create_agent(model, [weather]).invoke({"messages": [("user", "Rome?")]})
        schema = {"title": "Person", "description": "A person.", "type": "object", "properties": {"name": {}}}
        structured = model.with_structured_output(schema, method="json_mode")
        assert (structured | (lambda person: person["name"])).invoke("Who?") == "Bo"
        configurable = model.configurable_fields(temperature=ConfigurableField(id="heat"))
        configurable.invoke("a")
        configurable.with_config(configurable={"heat": 1}).invoke("b")
    asked = [span for span in seen if span.kind == "llm"]
    assert len(asked) == len([span for span in seen if span.name == "ask"]) == 7
    assert {span.tags[0] for span in asked} == {"t"}


@pytest.mark.parametrize("wrap", [lambda one: traced("graph")(one), bind], ids=["traced", "bound"])
async def test_what_a_class_makes_of_its_own_runnables(wrap: Callable[[Any], Any], seen: CapturedSpans) -> None:
    """What a Runnable's class makes by a method of its own, as a graph with a config, is what it is undecorated."""
    from langgraph.graph import END, START, MessagesState, StateGraph
    from langgraph.graph.state import CompiledStateGraph

    builder = StateGraph(MessagesState)
    builder.add_node("node", lambda _: {"messages": [current_span().name]})
    builder.add_edge(START, "node")
    builder.add_edge("node", END)
    with traced("around"):
        graph = wrap(wrap(builder.compile()).with_config(tags=["c"])).with_config(recursion_limit=7)
    assert isinstance(graph, CompiledStateGraph)
    assert graph.config["recursion_limit"] == 7
    assert len(graph.get_graph(xray=True).nodes) == 3
    outer = StateGraph(MessagesState)
    outer.add_node("sub", graph)
    outer.add_edge(START, "sub")
    assert [name for name, _ in outer.compile().get_subgraphs()] == ["sub"]
    for said in (graph.invoke({"messages": []}), await graph.ainvoke({"messages": []})):
        assert said["messages"][0].content in ("graph", "around")
    ran = [span for span in seen if span.kind == "chain"]
    assert [span.name for span in ran] == ["node", "LangGraph"] * 2
    assert "c" in ran[1].tags
    assert len([span for span in seen if span.name == "graph"]) == (0 if wrap is bind else 4)


def test_a_runnable_that_is_called(seen: CapturedSpans) -> None:
    """A Runnable whose class can be called still can be when it is decorated or bound; each call is a span."""
    from langchain_core.runnables import RunnableLambda

    class Called(RunnableLambda[int, int]):
        def __call__(self, given: int) -> int:
            return self.invoke(given)

    plain = Called(lambda given: given + 1)
    assert not callable(traced(RunnableLambda(len)))
    assert callable(traced(plain))
    assert list(map(traced("called")(plain), [1, 2])) == [2, 3]
    assert [span.name for span in seen] == ["Called", "called"] * 2
    with traced("around"):
        bound = bind(plain)
    assert bound(1) == 2
    assert seen[-1].parent_id == seen.named("around").id


def test_what_only_looks_like_a_runnable() -> None:
    """What has methods of the same names and isn't a Runnable is a callable, or none, as anything else."""

    class Pipe:
        async def ainvoke(self, _: Any) -> None: ...

        async def abatch(self, _: Any) -> None: ...

        def map(self, function: Callable[[int], int]) -> int:
            return function(1)

    class CalledPipe(Pipe):
        def __call__(self) -> int:
            return 2

    with pytest.raises(ConfigError, match="Pipe"):
        traced(Pipe())  # type: ignore[call-overload]
    assert traced(CalledPipe()).map(lambda one: one) == 1  # type: ignore[attr-defined]
    assert traced(CalledPipe())() == 2


async def test_what_comes_before_a_traced_runnable_in_a_stream(seen: CapturedSpans) -> None:
    """In a chain that streams, as in one that doesn't, a decoration holds for its Runnable, not for what that reads."""
    from langchain_core.output_parsers import StrOutputParser

    heard: list[str] = []
    with ScriptedOpenAI() as llm:
        first, second = chat(llm), traced("second", tags=["second"], on_request=lambda _: heard.append("second"))
        chain = first | StrOutputParser() | second(chat(llm)) | traced("parse")(StrOutputParser())

        async def asynchronously() -> None:
            assert [chunk async for chunk in chain.astream("Hi")]

        trees = set()
        for run in (lambda: chain.invoke("Hi"), lambda: list(chain.stream("Hi")), asynchronously):
            seen.clear()
            with traced("root", tags=["root"]):
                waiting = run()
                if waiting is not None and not isinstance(waiting, (str, list)):
                    await waiting
            names = {span.id: span.name for span in seen}
            trees.add(tuple(sorted((span.name, names[span.parent_id or ""], span.tags[:2]) for span in seen[:-1])))
            list(chain.stream("Hi"))  # The first model is in no scope of ours: nothing of it is recorded.
            assert [span.tags[0] for span in seen if span.kind == "llm"].count("root") == 2
    assert trees == {(
        ("ChatOpenAI", "RunnableSequence", ("root", "seq:step:1")),
        ("ChatOpenAI", "second", ("root", "second")),
        ("RunnableSequence", "root", ("root",)),
        ("StrOutputParser", "RunnableSequence", ("root", "seq:step:2")),
        ("StrOutputParser", "parse", ("root", "seq:step:4")),
        ("parse", "RunnableSequence", ("root",)),
        ("second", "RunnableSequence", ("root", "second")),
    )}  # fmt: skip
    assert pltrace.flush(30)
    assert heard == ["second"] * 6


def test_traced_runnables_as_json(seen: CapturedSpans) -> None:
    """LangChain's `dumps` makes the same of a decorated or bound Runnable, and of a chain with it, as of a bare one."""
    from langchain_core.load import dumps
    from langchain_core.output_parsers import StrOutputParser

    with ScriptedOpenAI() as llm, traced("block"):
        model = chat(llm)
        for wrapped in (traced("ask")(model), pltrace.bind(model)):
            assert dumps(wrapped) == dumps(model)
            assert dumps(wrapped | StrOutputParser()) == dumps(model | StrOutputParser())


def test_traced_runnables_are_copied_and_pickled(seen: CapturedSpans) -> None:
    """A decorated Runnable can be copied and pickled, tracing included."""
    from langchain_core.prompts import PromptTemplate

    prompt = traced("prompt")(PromptTemplate.from_template("Hi {name}"))
    for again in (prompt, copy.copy(prompt), copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert again.invoke({"name": "Bo"}).to_string() == "Hi Bo"
    assert [span.name for span in seen] == ["PromptTemplate", "prompt"] * 4


def test_methods_that_return_their_object(seen: CapturedSpans) -> None:
    """What makes an object, or gives its own, gives the object itself, whatever can be consumed of it later."""

    class Reader:
        @traced
        def __new__(cls) -> Reader:
            return super().__new__(cls)

        def __init__(self) -> None:
            self.left = 2

        @traced
        def __enter__(self) -> Reader:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @traced
        def __iter__(self) -> Reader:
            return self

        @traced
        def limited(self, most: int) -> Reader:
            self.left = most
            return self

        def __next__(self) -> int:
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return self.left

        def __await__(self) -> Iterator[Any]:
            return iter(())

    reader = Reader()
    with reader as entered:
        assert entered is reader
        assert [span.name.rpartition(".")[2] for span in seen] == ["__new__", "__enter__"]
        assert list(reader) == [1, 0]
    assert iter(reader.limited(3)) is reader


def test_an_object_that_cannot_be_asked(seen: CapturedSpans) -> None:
    """A callable object whose attributes can't be looked up is called as undecorated, and recorded."""

    class Remote:
        def __call__(self) -> Iterator[int]:
            return iter([1])

        def __getattr__(self, name: str) -> Any:
            if not connected:
                raise RuntimeError("working outside of context")
            raise AttributeError(name)

    connected = True
    remote = traced("remote")(Remote())
    connected = False
    assert list(remote()) == [1]
    assert [span.name for span in seen] == ["remote"]


def test_values_whose_class_has_no_hash() -> None:
    """A metaclass that defines `__eq__` alone makes classes that can't be looked up anywhere; their objects pass."""

    class Meta(type):
        def __eq__(cls, other: object) -> bool:
            return cls is other

    class Thing(metaclass=Meta):
        pass

    @traced
    def function(*args: Any, **kwargs: Any) -> Any:
        return (*args, *kwargs.values())[0]

    @traced
    def generator(item: Any) -> Iterator[Any]:
        yield item

    @traced
    async def coroutine(item: Any) -> Any:
        return item

    thing = Thing()
    with capture_spans() as spans:
        assert function(thing) is thing
        assert function(key=thing) is thing
        assert function([thing]) == [thing]
        assert [*generator(thing)] == [thing]
        assert asyncio.run(coroutine(thing)) is thing
    assert [span.status for span in spans] == ["ok"] * 5
    assert all("Thing" in str(span.input) for span in spans)


def test_the_object_of_a_method_ends_where_the_program_lets_go_of_it() -> None:
    """A traced method keeps nothing of its object, whose end could come on another thread, or late."""
    ended: list[threading.Thread] = []

    class Thing:
        @traced
        def method(self, number: int, *, items: Any = ()) -> int:
            return number

        def __del__(self) -> None:
            ended.append(threading.current_thread())

    with capture_spans() as spans:
        for number in range(10):
            Thing().method(number)
            Thing().method(number, items=[1])
            assert ended == [threading.current_thread()] * 2
            ended.clear()
    assert [span.input for span in spans[:2]] == [{"number": 0}, {"number": 0, "items": [1]}]


class Endless:
    """A callable object that can also be iterated, awaited, and opened as a path."""

    def __call__(self, number: int) -> int:
        """Return what it is given."""
        return number

    def __iter__(self) -> Iterator[int]:
        return iter((1, 2))

    def __next__(self) -> int:
        return 7

    def __await__(self) -> Iterator[Any]:
        yield from ()
        return 3

    def __aiter__(self) -> AsyncIterator[int]:
        async def numbers() -> AsyncIterator[int]:
            yield 5

        return numbers()

    def __fspath__(self) -> str:
        return "/a/path"

    def __length_hint__(self) -> int:
        return 2


@pytest.mark.parametrize("on", [False, True])
def test_a_callable_object_keeps_its_special_methods(on: bool) -> None:
    """What Python looks for in an object's class alone is there, and nothing to be awaited where there was none."""
    thing: Any = traced(Endless())

    async def consumed() -> tuple[int, list[int]]:
        return await thing, [number async for number in thing]

    with capture_spans() if on else contextlib.nullcontext():
        assert thing(4) == 4
        assert [*thing] == [1, 2]
        assert next(thing) == 7
        assert asyncio.run(consumed()) == (3, [5])
        assert os.fspath(thing) == "/a/path"
        assert length_hint(thing) == 2
    assert not isinstance(traced(functools.partial(len)), collections.abc.Awaitable)


class Bag:
    """A callable object that is a container and a context manager, and empty."""

    def __call__(self) -> None:
        """Do nothing."""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __contains__(self, item: object) -> bool:
        return item == 1

    def __enter__(self) -> str:
        return "entered"

    def __exit__(self, *_: object) -> None: ...


class Without(Bag):
    """A callable container that refuses a length."""

    __len__ = __contains__ = __reversed__ = None  # type: ignore[assignment]


_ABSTRACT = [
    *[getattr(collections.abc, name) for name in collections.abc.__all__ if name != "ByteString"],
    contextlib.AbstractContextManager, contextlib.AbstractAsyncContextManager, os.PathLike,
    # These ask the class, and not what it says it is.
    *[getattr(typing, name) for name in ("Callable", "Sized", "Iterable", "Container", "Collection", "Reversible",
      "Iterator", "Awaitable", "AsyncIterable", "AsyncIterator", "ContextManager", "AsyncContextManager", "Hashable")],
]  # fmt: skip


@pytest.mark.parametrize(
    "wrapped", [lambda *_: True, functools.partial(max, 1), len, Bag().__len__, Endless(), Bag(), Without()]
)
def test_what_a_callable_is_besides(wrapped: Any) -> None:
    """A decorated callable has items, or can be entered, for who asks an abstract class, if it does undecorated."""
    decorated = traced(wrapped)
    for kind in _ABSTRACT:
        assert isinstance(decorated, kind) == isinstance(wrapped, kind), kind
    for ask in (bool, len, reversed, lambda it: 1 in it, lambda it: it[0], lambda it: it + 1):
        assert _answer(ask, decorated) == _answer(ask, wrapped)
    assert _answer(iter, decorated)[0] is _answer(iter, wrapped)[0]
    if isinstance(wrapped, Bag):
        with decorated as entered:
            assert entered == "entered"


def _answer(ask: Callable[[Any], Any], it: Any) -> tuple[type, str]:
    try:
        answer = ask(it)
    except Exception as error:
        return type(error), str(error)
    return type(answer), ""


def test_a_returned_iterator_with_a_finalizer(seen: CapturedSpans) -> None:
    """An iterator that a function returns is finalized once, also when it was consumed to its end."""
    finalized = []

    class Rows:
        def __init__(self) -> None:
            self.left = 2

        def __iter__(self) -> Rows:
            return self

        def __next__(self) -> int:
            self.left -= 1
            if self.left < 0:
                raise StopIteration
            return self.left

        def __del__(self) -> None:
            finalized.append(self.left)

    @traced
    def rows() -> Rows:
        return Rows()

    assert list(rows()) == [1, 0]
    assert finalized == [-1]
    assert next(rows()) == 1
    assert finalized == [-1, 1]
