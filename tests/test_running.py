"""However a call is run, stepped, thrown into or left, its scope is around its own steps and nowhere else."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import gc
import inspect
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import MemorySaver
from langgraph.graph import START, StateGraph

import pltrace
from pltrace import current_span, traced
from pltrace._runs import open_runs
from pltrace._scope import Scope, current
from pltrace.testing import CapturedSpans, capture_spans
from tests.support.programs import run
from tests.support.scripted_llm import Reply, ScriptedOpenAI
from tests.support.traces import calls, chat, said, spans, tree
from tests.support.versions import recent_agents


@pytest.fixture
def seen() -> Iterator[CapturedSpans]:
    """The spans that ended; the test fails if it leaves a scope or a run open."""
    with capture_spans() as spans:
        yield spans
        if Scope.roots:
            gc.collect()
        spans.assert_nothing_open()


def here() -> str:
    """Gives the name of the current span, without what a test is called."""
    return current_span().name.rpartition(".")[2]


def both(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Gives the function undecorated and decorated."""
    return [function, traced(function)]


def does(steps: Any, *actions: Any) -> list[Any]:
    """Takes steps of a generator, or of what an async one gives to await; gives what each did.

    An action is None for `next`, `close` for itself, an exception to throw, or something to send.
    """
    done: list[Any] = []
    for action in actions:
        try:
            if action == "close":
                done.append(steps.close())
            elif isinstance(action, BaseException) or inspect.isclass(action):
                done.append(steps.throw(action))
            else:
                done.append(steps.send(action))
        except BaseException as error:
            done.append((type(error), error.args, type(error.__context__)))
    return done


async def adoes(steps: Any, *actions: Any) -> list[Any]:
    """Does the same with an async generator."""
    done: list[Any] = []
    for action in actions:
        try:
            if action == "close":
                done.append(await steps.aclose())
            elif isinstance(action, BaseException) or inspect.isclass(action):
                done.append(await steps.athrow(action))
            else:
                done.append(await steps.asend(action))
        except BaseException as error:
            done.append((type(error), error.args, type(error.__context__)))
    return done


def echo() -> Generator[Any, Any, Any]:
    """Gives what it gets, and an exception's name too."""
    got: Any = "ready"
    while got != "stop":
        try:
            got = yield got
        except (ValueError, StopIteration) as error:
            got = type(error).__name__
        except KeyError:
            raise LookupError("another") from None
    return "stopped"


def stubborn() -> Generator[Any, Any, Any]:
    """Doesn't let itself be closed."""
    try:
        yield 1
    except GeneratorExit:
        yield 2


def forgiving() -> Generator[Any, Any, Any]:
    """Takes being closed for a question."""
    try:
        yield 1
    except GeneratorExit:
        return "closed"


def failing_cleanup() -> Generator[Any, Any, Any]:
    """Fails while it is closed, after the exception was dealt with."""
    with contextlib.suppress(GeneratorExit):
        yield 1
    raise ValueError("cleanup")


def failing_finally() -> Generator[Any, Any, Any]:
    """Fails while it is closed."""
    try:
        yield 1
    finally:
        raise ValueError("cleanup")


def delegating() -> Generator[Any, Any, Any]:
    """Has another do it."""
    return (yield from echo())


def delegating_to_traced() -> Generator[Any, Any, Any]:
    """Has another, decorated, do it."""
    return (yield from traced(echo)())


_ACTIONS: dict[str, tuple[Any, ...]] = {
    "next to the end": (None, None, "stop", None, None),
    "send": (None, "a", "b", "stop"),
    "send at once": ("a",),
    "throw at once": (ValueError("x"), None),
    "throw": (None, ValueError("x"), "a", KeyError("y"), None),
    "throw a class": (None, ValueError, None),
    "throw StopIteration": (None, StopIteration(3), "a"),
    "throw GeneratorExit": (None, GeneratorExit(), None),
    "throw KeyboardInterrupt": (None, KeyboardInterrupt(), None),
    "close": (None, "close", None, "close"),
    "close at once": ("close", None),
    "close at the end": (None, "stop", "close"),
    "throw when closed": (None, "close", ValueError("x")),
}
_GENERATORS = [echo, stubborn, forgiving, failing_cleanup, failing_finally, delegating, delegating_to_traced]


@pytest.mark.parametrize("actions", _ACTIONS.values(), ids=_ACTIONS)
@pytest.mark.parametrize("generator", _GENERATORS)
def test_a_generators_steps(generator: Callable[[], Any], actions: tuple[Any, ...], seen: CapturedSpans) -> None:
    """What is sent and thrown arrives, what is yielded, returned and raised comes out, with the same context."""
    plain, decorated = both(generator)
    assert does(decorated(), *actions) == does(plain(), *actions)
    assert not current_span()


async def aecho() -> AsyncGenerator[Any, Any]:
    """Gives what it gets, and an exception's name too."""
    got: Any = "ready"
    while got != "stop":
        await asyncio.sleep(0)
        try:
            got = yield got
        except (ValueError, StopAsyncIteration) as error:
            got = type(error).__name__
        except KeyError:
            raise LookupError("another") from None


async def astubborn() -> AsyncGenerator[Any, Any]:
    """Doesn't let itself be closed."""
    try:
        yield 1
    except GeneratorExit:
        yield 2


async def aforgiving() -> AsyncGenerator[Any, Any]:
    """Takes being closed for a question."""
    try:
        yield 1
    except GeneratorExit:
        return


async def afailing_cleanup() -> AsyncGenerator[Any, Any]:
    """Fails while it is closed, after the exception was dealt with."""
    try:
        yield 1
    except GeneratorExit:
        await asyncio.sleep(0)
    raise ValueError("cleanup")


async def afailing_finally() -> AsyncGenerator[Any, Any]:
    """Fails while it is closed."""
    try:
        yield 1
    finally:
        await asyncio.sleep(0)
        raise ValueError("cleanup")


_ASYNC_GENERATORS = [aecho, astubborn, aforgiving, afailing_cleanup, afailing_finally]
_ASYNC_ACTIONS = {
    **_ACTIONS,
    "throw StopIteration": (None, StopAsyncIteration(3), "a"),
    "throw CancelledError": (None, asyncio.CancelledError(), None),
}


@pytest.mark.parametrize("actions", _ASYNC_ACTIONS.values(), ids=_ASYNC_ACTIONS)
@pytest.mark.parametrize("generator", _ASYNC_GENERATORS)
async def test_an_async_generators_steps(
    generator: Callable[[], Any], actions: tuple[Any, ...], seen: CapturedSpans
) -> None:
    """What is sent and thrown arrives, what is yielded and raised comes out, with the same context."""
    plain, decorated = both(generator)
    assert await adoes(decorated(), *actions) == await adoes(plain(), *actions)
    assert not current_span()


@pytest.mark.parametrize("actions", [(None, "close"), (None, ValueError("x")), (ValueError("x"),), ("close", None)])
def test_a_coroutines_steps(actions: tuple[Any, ...], seen: CapturedSpans) -> None:
    """A coroutine that is driven by hand behaves as it did."""

    async def waits() -> str:
        try:
            await asyncio.sleep(0)
        except ValueError:
            return "caught"
        return "done"

    plain, decorated = both(waits)
    assert does(decorated(), *actions) == does(plain(), *actions)


def test_a_generators_span(seen: CapturedSpans) -> None:
    """A generator's span starts at its first step and ends with its last; what it returned is its output."""
    steps = traced("g")(echo)()
    assert seen == []
    next(steps)
    with traced("later"):
        steps.send("a")
    with pytest.raises(StopIteration):
        steps.send("stop")
    assert [span.name for span in seen] == ["later", "g"]
    assert seen[1].output == "stopped"
    assert seen[1].parent is None


@pytest.mark.parametrize(
    ("generator", "actions", "status"),
    [
        (echo, (None, "close"), "ok"),
        (echo, (None, KeyError()), "error"),
        (echo, (None, "stop"), "ok"),
        (echo, (None, asyncio.CancelledError()), "cancelled"),
        (stubborn, (None, "close", None), "ok"),
        (forgiving, (None, "close"), "ok"),
        (failing_cleanup, (None, "close"), "error"),
    ],
)
def test_how_a_generators_span_ends(
    generator: Callable[[], Any], actions: tuple[Any, ...], status: str, seen: CapturedSpans
) -> None:
    """Leaving a generator early is no error; what its cleaning-up raises is."""
    does(traced(generator)(), *actions)
    assert [span.status for span in seen] == [status]


def test_nothing_of_what_passes_is_kept(seen: CapturedSpans) -> None:
    """What a generator yields or is sent dies as early as it did."""

    class Thing:
        pass

    def things() -> Generator[Any, Any, None]:
        while True:
            yield Thing()

    steps = traced(things)()
    yielded = weakref.ref(next(steps))
    assert yielded() is None
    sent = Thing()
    reference = weakref.ref(sent)
    steps.send(sent)
    del sent
    assert reference() is None
    steps.close()


def test_blocks_inside_a_generator_survive_its_yields(seen: CapturedSpans) -> None:
    """A block that a generator opens holds in its later steps, and never for its consumer."""
    inside: list[str] = []

    @traced
    def generator() -> Iterator[None]:
        inside.append(here())
        with traced("block"):
            yield
            inside.append(here())
            yield
        inside.append(here())

    with traced("consumer"):
        for _ in generator():
            assert here() == "consumer"
    assert inside == ["generator", "block", "generator"]
    assert seen.tree() == [["consumer", [generator.__qualname__, ["block"]]]]


async def test_blocks_inside_an_async_generator_survive_its_yields(seen: CapturedSpans) -> None:
    """The same holds for async generators, across tasks."""
    inside: list[str] = []

    @traced
    async def generator() -> AsyncIterator[None]:
        async with traced("block"):
            yield
            await asyncio.sleep(0)
            inside.append(here())
            yield
        inside.append(here())

    steps = generator()
    for name in "abc":
        with traced(name):
            await asyncio.ensure_future(_anext(steps))
            assert here() == name
    assert inside == ["block", "generator"]


async def _anext(steps: Any) -> Any:
    return await anext(steps, None)


def test_blocks_around_a_yield_without_a_decorator(seen: CapturedSpans) -> None:
    """An undecorated generator's block does reach its consumer, as any ContextVar does; leaving it restores."""

    def generator() -> Iterator[None]:
        with traced("block"):
            yield

    steps = generator()
    next(steps)
    assert here() == "block"
    next(steps, None)
    assert not current_span()


def test_interleaved_generators_stay_apart(seen: CapturedSpans) -> None:
    """Generators that take turns each keep their own scope, whoever goes on longest."""

    @traced
    def numbered(number: int) -> Iterator[tuple[int, Any]]:
        with traced(f"block {number}"):
            for _ in range(number):
                yield number, current_span().name

    running = [numbered(number) for number in (3, 1, 4, 2)]
    while running:
        for steps in list(running):
            item = next(steps, None)
            if item is None:
                running.remove(steps)
            else:
                assert item[1] == f"block {item[0]}"
            assert not current_span()
    assert len(seen) == 8
    assert {span.parent_id is None for span in seen if span.kind == "function"} == {True}


def test_a_generator_in_another_thread_and_context(seen: CapturedSpans) -> None:
    """A generator goes on in its scope in any thread and context, and can be closed there."""
    names: list[str] = []

    @traced
    def generator() -> Iterator[None]:
        try:
            with traced("block"):
                while True:
                    names.append(here())
                    yield
        finally:
            names.append(here())

    steps = generator()
    next(steps)
    contextvars.Context().run(next, steps)
    for step in (steps.__next__, steps.close):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert names == ["block"] * 3 + ["generator"]
    assert [span.status for span in seen] == ["ok", "ok"]


def test_a_generator_that_steps_itself(seen: CapturedSpans) -> None:
    """A generator that takes its own next step gets Python's error, and keeps its scope."""
    steps: Any = None

    @traced
    def generator() -> Iterator[str]:
        with pytest.raises(ValueError, match="already executing"):
            next(steps)
        yield here()

    steps = generator()
    assert list(steps) == ["generator"]


async def test_an_async_generator_that_is_stepped_twice_at_once(seen: CapturedSpans) -> None:
    """Closing or stepping an async generator while it runs raises what it did."""

    async def waits() -> AsyncIterator[int]:
        await asyncio.sleep(0.001)
        yield 1

    messages = []
    for function in both(waits):
        steps = function()
        running = asyncio.ensure_future(_anext(steps))
        await asyncio.sleep(0)
        for again in (steps.aclose, steps.__anext__):
            with pytest.raises(RuntimeError) as caught:
                await again()
            messages.append(str(caught.value))
        assert await running == 1
        await steps.aclose()
    assert messages[:2] == messages[2:]
    assert [span.status for span in seen] == ["ok"]


# Abandoned.


def returned(source: Callable[[], Any]) -> Any:
    """Gives a plain function that returns what `source` makes."""
    return lambda: source()


@pytest.mark.parametrize("decorated", [traced(echo), traced(returned(echo)), traced(returned(lambda: iter([1, 2])))])
@pytest.mark.parametrize("steps", [0, 1])
def test_an_abandoned_generator(decorated: Callable[[], Any], steps: int, seen: CapturedSpans) -> None:
    """What is consumed in part or not at all ends when it is collected; a generator that never began has no span."""
    it = decorated()
    for _ in range(steps):
        next(it)
    del it
    gc.collect()
    began = steps or decorated.__name__ == "<lambda>"
    assert [span.status for span in seen] == (["ok"] if began else [])


def test_an_abandoned_generator_cleans_up_inside(seen: CapturedSpans) -> None:
    """The cleaning-up of a collected generator runs in its scope, not in that of whoever caused the collection."""
    names: list[str] = []

    @traced
    def generator() -> Iterator[None]:
        try:
            yield
        finally:
            names.append(here())

    steps = generator()
    next(steps)
    with traced("other"):
        del steps
        gc.collect()
        assert here() == "other"
    assert names == ["generator"]


@pytest.mark.parametrize("function", ["coroutine function", "function returning a coroutine"])
def test_a_coroutine_that_is_never_awaited(function: str, seen: CapturedSpans) -> None:
    """Python warns once, by the coroutine's own name; a coroutine function's call is no span then."""

    async def mine() -> None: ...

    decorated = traced(mine) if function == "coroutine function" else traced(lambda: mine())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decorated()
        gc.collect()
        messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
        del caught[:]  # It held the coroutine.
        gc.collect()
        messages += [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert messages == [f"coroutine '{mine.__qualname__}' was never awaited"]
    assert len(seen) == (function != "coroutine function")


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_an_abandoned_coroutine(seen: CapturedSpans) -> None:
    """A coroutine that is closed or collected before its end is cancelled, not done."""

    @traced
    async def waits() -> None:
        await asyncio.sleep(0)

    for end in ("close", "collect"):
        running = waits()
        running.send(None)
        if end == "close":
            running.close()
        del running
    gc.collect()
    assert [span.status for span in seen] == ["cancelled", "cancelled"]


def test_an_abandoned_coroutine_in_a_cycle(seen: CapturedSpans, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the collector finds while it waits, as a closed loop's task, is `cancelled` and complains of nothing."""
    gc.collect()  # Other tests' garbage may complain.
    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)

    @traced("waits")
    async def waits() -> None:
        await asyncio.Future(loop=loop)

    loop = asyncio.new_event_loop()
    coroutine = waits()
    coroutine.send(None)
    cycle: list[Any] = [coroutine]
    cycle.append(cycle)
    del coroutine, cycle
    gc.collect()
    loop.close()
    assert seen.named("waits").status == "cancelled"
    assert not complaints


def test_an_abandoned_async_generator(seen: CapturedSpans) -> None:
    """The loop closes an abandoned async generator, inside of its scope, and its span ends."""
    names: list[str] = []

    @traced
    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0)
            names.append(here())

    async def main() -> None:
        async for _ in generator():
            break
        gc.collect()
        while not names:
            await asyncio.sleep(0)

    asyncio.run(main())
    assert names == ["generator"]
    assert [span.status for span in seen] == ["ok"]


@pytest.mark.parametrize("kept", [True, False])
def test_an_async_generator_at_the_end_of_the_loop(kept: bool, seen: CapturedSpans) -> None:
    """The loop's shutdown closes what is left as it did, without a word, and the span ends."""
    left: list[Any] = []
    complaints: list[Any] = []
    cleaned: list[int] = []

    @traced
    async def generator(number: int) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0)
            cleaned.append(number)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        for number in range(10):
            steps = generator(number)
            await steps.__anext__()
            if kept:
                left.append(steps)

    asyncio.run(main())
    left.clear()
    gc.collect()
    assert complaints == []
    assert len(seen) == 10
    if kept:
        assert sorted(cleaned) == list(range(10))
        assert {span.status for span in seen} == {"ok"}
    else:
        assert {span.status for span in seen} <= {"ok", "cancelled"}


def test_an_async_generator_without_a_loop(seen: CapturedSpans) -> None:
    """An async generator whose loop is gone ends when it is collected."""

    @traced
    async def generator() -> AsyncIterator[None]:
        yield

    loop = asyncio.new_event_loop()
    steps = generator()
    loop.run_until_complete(_anext(steps))
    loop.close()
    del steps
    gc.collect()
    assert [span.status for span in seen] == ["ok"]


def abandon(steps: Any) -> None:
    """Takes the first step, and leaves the rest to the garbage collector."""
    begun = steps.__anext__() if inspect.isasyncgen(steps) else steps
    with contextlib.suppress(StopIteration):
        begun.send(None)
    cycle = [steps]
    cycle.append(cycle)


@types.coroutine
def suspended() -> Generator[None, None, None]:
    """Is awaited for ever."""
    yield


unit = traced("unit")


def unit_generator() -> Iterator[None]:
    """Is closed inside of two blocks."""
    with unit, unit:
        yield


async def unit_coroutine() -> None:
    """Does the same."""
    async with unit:
        with unit:
            await suspended()


async def unit_async_generator() -> AsyncIterator[None]:
    """Does the same."""
    async with unit:
        with unit:
            yield


@pytest.mark.parametrize("collected", ["in its code", "in another thread"])
@pytest.mark.parametrize("begun", ["before", "inside"])
@pytest.mark.parametrize(
    "function",
    [
        unit_generator, traced("call")(unit_generator), traced("call")(returned(unit_generator)),
        traced("call")(unit_coroutine), unit_async_generator, traced("call")(unit_async_generator),
    ],
    ids=["undecorated", "generator", "returned", "coroutine", "undecorated async generator", "async generator"],
)  # fmt: skip
def test_what_the_collector_closes_inside_of_a_block(
    function: Callable[[], Any], begun: str, collected: str, no_collector: None, seen: CapturedSpans
) -> None:
    """It leaves the blocks that it entered itself, not the one that it came in between, of the same declaration."""
    begin = functools.partial(contextvars.copy_context().run, abandon)
    if begun == "before":
        begin(function())
    with unit as mine:
        if begun == "inside":
            begin(function())
        if collected == "in its code":
            gc.collect()
        else:  # The block holds there, too, but what entered it isn't around what runs.
            bound = threading.Thread(target=contextvars.copy_context().run, args=(gc.collect,))
            bound.start()
            bound.join()
        assert current_span() is mine
        assert mine.status is None
        assert [span.status for span in seen if span.name == "unit"] == ["ok", "ok"]
        with traced("inner") as inner:
            assert inner.parent_id == mine.id
    assert mine.status == "ok"
    assert not current_span()


async def test_a_closed_generators_exit_stack(seen: CapturedSpans) -> None:
    """A block that a closed async generator leaves through an exit stack is its own, whoever else is in one."""

    @traced
    async def generator() -> AsyncIterator[Any]:
        async with contextlib.AsyncExitStack() as stack:
            yield await stack.enter_async_context(unit)

    several = [generator() for _ in range(3)]
    spans = [await anext(steps) for steps in several]
    left = []
    for number in (1, 2, 0):
        await several[number].aclose()  # type: ignore[attr-defined]
        left.append(number)
        assert [number for number, span in enumerate(spans) if span.status] == sorted(left)


@pytest.mark.parametrize("loop", ["running", "closed", "none"])
@pytest.mark.parametrize("clean_up", ["at once", "waits", "refuses"])
def test_an_abandoned_async_generator_in_a_cycle(
    clean_up: str, loop: str, no_collector: None, seen: CapturedSpans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the collector finds cleans up as it did, and complains of no more."""
    events: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: events.append(str(unraisable.exc_value)))

    async def generator() -> AsyncIterator[None]:
        try:
            yield
        finally:
            if clean_up == "waits":
                await asyncio.sleep(0)
            elif clean_up == "refuses":
                yield
            events.append("cleaned up")

    async def main(function: Callable[[], Any]) -> None:
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda loop, context: events.append(str(context.get("exception"))))
        abandon(function())
        if loop == "running":
            gc.collect()
            for _ in range(5):
                await asyncio.sleep(0)
            gc.collect()

    def use(function: Callable[[], Any]) -> list[str]:
        if loop == "none":
            abandon(function())
        else:
            used = asyncio.new_event_loop()
            used.run_until_complete(main(function))
            used.close()
        gc.collect()
        happened = events[:]
        events.clear()
        return happened

    undecorated, decorated = map(use, both(generator))
    assert decorated == undecorated
    assert [span.status for span in seen] == ["ok"]


async def test_an_async_generator_that_is_closed_behind_its_driver(seen: CapturedSpans) -> None:
    """What a function returned may be closed by who made it; to close the result then does nothing, as it did."""
    made: list[Any] = []

    async def generator() -> AsyncIterator[None]:
        yield

    @traced
    def returns() -> Any:
        made.append(generator())
        return made[-1]

    steps = returns()
    await anext(steps)
    await made[0].aclose()
    await steps.aclose()
    assert [span.status for span in seen] == ["ok"]


# Tasks.


@traced
async def waiting(seconds: float = 60.0) -> str:
    """Waits."""
    await asyncio.sleep(seconds)
    return here()


async def test_ways_of_running_coroutines(seen: CapturedSpans) -> None:
    """Tasks, gather, wait_for, shield, timeouts and task groups run a coroutine in its scope."""
    names = [
        await waiting(0),
        await asyncio.create_task(waiting(0)),
        *await asyncio.gather(waiting(0), waiting(0)),
        await asyncio.wait_for(waiting(0), 10),
        await asyncio.shield(waiting(0)),
    ]
    if sys.version_info >= (3, 11):
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            tasks = [group.create_task(waiting(0)) for _ in range(2)]
        names += [task.result() for task in tasks]
    assert set(names) == {"waiting"}
    assert len(seen) == len(names)
    assert not current_span()


async def test_cancelled_tasks(seen: CapturedSpans) -> None:
    """A cancelled call is recorded as such, and its task's caller keeps its scope."""
    with traced("outer"):
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting(), 0.001)
        if sys.version_info >= (3, 11):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await waiting()
        assert here() == "outer"
    assert {span.status for span in seen if span.name == "waiting"} == {"cancelled"}
    assert {span.parent for span in seen if span.name == "waiting"} == {seen.named("outer")}


def test_greenlets_that_are_killed(seen: CapturedSpans) -> None:
    """A greenlet that is killed in a traced call was cancelled, as a task is, and leaves nothing in others."""
    greenlet = pytest.importorskip("greenlet")
    waiting = greenlet.greenlet(traced("waits")(greenlet.getcurrent().switch))
    waiting.switch()
    assert not current_span()
    waiting.throw()
    assert [span.status for span in seen] == ["cancelled"]


async def test_a_task_that_is_cancelled_before_it_starts(seen: CapturedSpans) -> None:
    """A task that never took a step has no span, and no complaint is made."""
    task = asyncio.create_task(waiting())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == []


async def test_a_task_that_refuses_to_be_cancelled(seen: CapturedSpans) -> None:
    """A call that catches its cancellation goes on, and ends as it ends."""

    @traced
    async def refuses() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return here()

    task = asyncio.create_task(refuses())
    await asyncio.sleep(0)
    task.cancel()
    assert await task == "refuses"
    assert [span.status for span in seen] == ["ok"]


async def test_shielded_tasks_go_on(seen: CapturedSpans) -> None:
    """A shielded call goes on in its scope when who waits for it is cancelled."""
    go = asyncio.Event()

    @traced
    async def inner() -> str:
        await go.wait()
        return here()

    @traced
    async def outer(task: asyncio.Future[str]) -> None:
        await asyncio.shield(task)

    task = asyncio.ensure_future(inner())
    around = asyncio.ensure_future(outer(task))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    around.cancel()
    await asyncio.wait([around])
    go.set()
    assert await task == "inner"
    assert [(span.name.rpartition(".")[2], span.status) for span in seen] == [("outer", "cancelled"), ("inner", "ok")]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="came with Python 3.12")
async def test_eager_tasks(seen: CapturedSpans) -> None:
    """A task that starts at once takes its steps in its own scope, not in its creator's."""
    asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    with traced("outer"):
        task = asyncio.create_task(waiting(0))
        assert here() == "outer"
        assert await task == "waiting"
    assert seen.tree() == [["outer", ["waiting"]]]


async def test_threads_of_asyncio(seen: CapturedSpans) -> None:
    """`asyncio.to_thread` takes the scope along."""
    with traced("outer"):
        assert await asyncio.to_thread(here) == "outer"
        assert await asyncio.to_thread(traced("inner")(here)) == "inner"
    assert seen.tree() == [["outer", ["inner"]]]


def test_other_threads_start_without_a_scope(seen: CapturedSpans) -> None:
    """A thread, a timer or an executor starts outside of the scope, and leaves nothing behind in its thread."""
    names: list[str] = []
    with traced("outer"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        timer = threading.Timer(0, lambda: names.append(here()))
        timer.start()
        timer.join()
        assert list(pool.map(traced("inner")(lambda number: here()), range(3))) == ["inner"] * 3
        assert pool.submit(here).result() == ""
    assert names == [""]
    assert [span.parent_id for span in seen if span.name == "inner"] == [None] * 3


def test_an_interrupted_program(seen: CapturedSpans) -> None:
    """Ctrl-C and `sys.exit` inside any mixture of blocks and calls leave nothing behind."""

    @traced
    def generator(error: BaseException) -> Iterator[None]:
        with traced("in generator"):
            yield
            raise error

    @traced
    async def coroutine(error: BaseException) -> None:
        async with traced("in coroutine"):
            for _ in generator(error):
                await asyncio.sleep(0)

    for error in (KeyboardInterrupt(), SystemExit(1)):
        with pytest.raises(type(error)), traced("outer"):
            asyncio.run(coroutine(error))
        assert not current_span()
    assert [span.status for span in seen] == ["error"] * 10


#: Where calls and blocks are entered and left.
ON_THE_PATH = tuple(f"/pltrace/{name}.py" for name in ("_traced", "_block", "_declaration", "_scope"))


def test_an_interrupt_inside_our_own_code(no_collector: None, seen: CapturedSpans) -> None:
    """Wherever in our own code a call is interrupted, the calls and blocks around it put things right."""

    @traced
    def inner() -> None: ...

    interrupted = 0
    for line in range(1, 400):
        lines = 0

        def strike(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith(ON_THE_PATH):
                return None
            if event == "line":
                lines += 1
                if lines == line:  # noqa: B023
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return strike

        def program() -> None:
            sys.settrace(strike)
            try:
                inner()
            finally:
                sys.settrace(None)

        # A tracer of somebody else's, such as a debugger's or coverage's, is put back.
        others = sys.gettrace()
        try:
            with traced("around"):
                traced(program)()
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(others)
        assert not current_span(), f"interrupted at line {line}"
        if lines < line:
            break
    assert interrupted > 20
    gc.collect()  # Of those that were interrupted the tracebacks hold something yet.


# LangChain's and LangGraph's own ways of running things.


@pytest.fixture(autouse=True)
def no_open_runs() -> Iterator[None]:
    """No test leaves a run in the table of open runs."""
    yield
    assert open_runs == {}


#: Where a Python can't run a task in a context, LangChain's async code doesn't know which run it is in.
needs_contexts = pytest.mark.skipif(sys.version_info < (3, 11), reason="tasks can't be given a context before 3.11")


def asks_for_two_cities(body: dict[str, Any]) -> Any:
    """Answers as a model that calls a tool twice at once, whose tools ask it again."""
    last = body["messages"][-1]
    if last["content"] == "How is it?":
        return Reply(tool_calls=[("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})])
    return "It is fine."


def weather_agent(llm: ScriptedOpenAI) -> Any:
    """Makes an agent whose tool opens a scope of its own and asks the model in it."""
    create_agent = pytest.importorskip("langchain.agents").create_agent
    model = chat(llm)

    @tool
    @traced("forecast", tags=["forecast"])
    def weather(city: str) -> str:
        """Tell the weather."""
        with traced(f"in {city}", tags=[city], metadata={"city": city}):
            return str(model.invoke(city).content)

    return create_agent(model, [weather])


AGENT = """\
LangGraph chain
  model chain
    ChatOpenAI llm
  model chain
    ChatOpenAI llm
  tools chain
    weather tool
      forecast function
        in Oslo block
          ChatOpenAI llm
  tools chain
    weather tool
      forecast function
        in Rome block
          ChatOpenAI llm
"""


def under(root: str, tree_of_it: str) -> str:
    """Puts a tree under a root."""
    return f"{root}\n" + "".join(f"  {line}\n" for line in tree_of_it.splitlines())


async def _agent_invoked(agent: Any) -> None:
    agent.invoke({"messages": [("user", "How is it?")]})


async def _agent_ainvoked(agent: Any) -> None:
    await agent.ainvoke({"messages": [("user", "How is it?")]})


async def _agent_streamed(agent: Any) -> None:
    assert list(agent.stream({"messages": [("user", "How is it?")]}, stream_mode="updates"))


async def _agent_astreamed(agent: Any) -> None:
    assert [item async for item in agent.astream({"messages": [("user", "How is it?")]}, stream_mode="messages")]


async def _agent_events(agent: Any) -> None:
    events = agent.astream_events({"messages": [("user", "How is it?")]}, version="v2")
    assert [event async for event in events]


@recent_agents
@pytest.mark.parametrize(
    "way",
    [
        _agent_invoked,
        _agent_streamed,
        pytest.param(_agent_ainvoked, marks=needs_contexts),
        pytest.param(_agent_astreamed, marks=needs_contexts),
        pytest.param(_agent_events, marks=needs_contexts),
    ],
)
async def test_an_agents_tree(way: Callable[[Any], Any], local: Path) -> None:
    """An agent's tools that run at once each have their own scope, below their own tool."""
    with ScriptedOpenAI(asks_for_two_cities) as llm, traced("ask", tags=["a"]):
        await way(weather_agent(llm))
    assert tree(local) == under("ask block", AGENT)
    assert sorted(tuple(call["request_tags"]) for call in calls(local)) == [
        ("a",), ("a",), ("a", "forecast", "Oslo"), ("a", "forecast", "Rome"),
    ]  # fmt: skip
    assert sorted(said(call["request_metadata"]).get("city", "") for call in calls(local)) == ["", "", "Oslo", "Rome"]


async def test_an_agents_inputs_are_those_of_each_call(local: Path) -> None:
    """Each call of an agent's model shows the messages as they were then, not the list as it grew."""
    with ScriptedOpenAI(asks_for_two_cities) as llm, traced("ask"):
        weather_agent(llm).invoke({"messages": [("user", "How is it?")]})
    asked = [call for call in calls(local) if "forecast" not in call["request_tags"]]
    assert [len(call["input"]["messages"]) for call in asked] == [1, 4]
    nodes = [span for span in spans(local) if span["name"] == "model"]
    assert [len(node["input"]["messages"]) for node in nodes] == [1, 4]


class Count(TypedDict, total=False):
    """A graph's state."""

    count: int


def asking_graph(llm: ScriptedOpenAI, interrupt: Callable[[str], str]) -> Any:
    """Makes a graph that asks a person in a node of a subgraph, between two calls of a model."""
    model = chat(llm)

    @traced("approval")
    def approve(state: Count) -> Count:
        model.invoke("before")
        answer = interrupt("Go on?")
        model.invoke(f"after {answer}")
        return {"count": 1}

    sub = StateGraph(Count)
    sub.add_node("approve", approve)
    sub.add_edge(START, "approve")
    graph = StateGraph(Count)
    graph.add_node("sub", sub.compile())
    graph.add_edge(START, "sub")
    return graph.compile(checkpointer=MemorySaver())


def test_interrupts_and_resume(local: Path) -> None:
    """An interrupted graph leaves nothing open, and resumed in another block it is recorded there; that is no error."""
    types: Any = pytest.importorskip("langgraph.types")
    if not hasattr(types, "interrupt"):
        pytest.skip("this langgraph has no interrupt() yet")
    config: Any = {"configurable": {"thread_id": "1"}}
    with ScriptedOpenAI() as llm:
        graph = asking_graph(llm, types.interrupt)
        with traced("first", tags=["1"]):
            assert graph.invoke({"count": 0}, config)["__interrupt__"][0].value == "Go on?"
        assert open_runs == {}
        with traced("second", tags=["2"]):
            assert graph.invoke(types.Command(resume="yes"), config) == {"count": 1}
    drawn = tree(local)
    first, second = drawn.index("first block"), drawn.index("second block")
    assert drawn.count("approval function") == 2
    assert first < drawn.index("approval function") < second
    assert [call["request_tags"] for call in calls(local)] == [["1"], ["2"], ["2"]]
    assert {span["status"] for span in spans(local)} == {"ok"}


def test_the_functional_api(seen: CapturedSpans) -> None:
    """LangGraph's tasks and entry points of decorated functions run in their scopes, before and after an interrupt."""
    func: Any = pytest.importorskip("langgraph.func")
    types: Any = pytest.importorskip("langgraph.types")

    @func.task
    @traced("double")
    def double(number: int) -> int:
        return 2 * number

    @func.entrypoint(checkpointer=MemorySaver())
    @traced("flow")
    def flow(number: int) -> int:
        doubled: int = double(number).result()
        return doubled + int(types.interrupt("How many more?"))

    config: Any = {"configurable": {"thread_id": "1"}}
    with traced("first"):
        assert flow.invoke(3, config)["__interrupt__"][0].value == "How many more?"
    with traced("second"):
        assert flow.invoke(types.Command(resume=1), config) == 7
    assert seen.tree() == [
        ["first", ["LangGraph", ["flow", ["flow", ["double", ["double"]]]]]],
        ["second", ["LangGraph", ["flow", ["flow"]]]],
    ]  # fmt: skip
    assert {span.status for span in seen} == {"ok"}


def test_what_is_injected(seen: CapturedSpans) -> None:
    """LangChain finds in the signatures of an agent's decorated tools and middleware what they are to be given."""
    middleware = pytest.importorskip("langchain.agents.middleware")
    create_agent = pytest.importorskip("langchain.agents").create_agent

    @tool
    @traced("note")
    def note(text: str, call: Annotated[str, InjectedToolCallId], config: RunnableConfig) -> str:
        """Note a text."""
        return f"{text} {call} {config['configurable']['who']}"

    @middleware.wrap_model_call
    @traced("around")
    def around(request: Any, handler: Any) -> Any:
        return handler(request)

    with ScriptedOpenAI([Reply(tool_calls=[("note", {"text": "a"})]), "Done."]) as llm:
        agent = create_agent(chat(llm), [note], middleware=[around])
        messages = agent.invoke({"messages": [("user", "Hi")]}, {"configurable": {"who": "bo"}})["messages"]
    assert messages[2].content == f"a {messages[2].tool_call_id} bo"
    assert seen.tree() == [["around", ["ChatOpenAI"]], ["note"], ["around", ["ChatOpenAI"]]]


def test_batches_with_few_threads(local: Path) -> None:
    """Each item of a batch that runs in threads keeps its scope, blocks opened in them their own."""

    def ask(number: int) -> str:
        with traced(f"item {number}", tags=[str(number)]):
            return str(model.invoke(str(number)).content)

    with ScriptedOpenAI() as llm, traced("all", tags=["all"]):
        model = chat(llm)
        RunnableLambda(ask).batch(list(range(9)), {"max_concurrency": 3})
    assert sorted(tuple(call["request_tags"]) for call in calls(local)) == [("all", str(n)) for n in range(9)]
    assert len({call["trace_id"] for call in calls(local)}) == 1


async def test_async_batches_with_few_tasks(local: Path) -> None:
    """The same for tasks."""

    async def ask(number: int) -> str:
        async with traced(f"item {number}", tags=[str(number)]):
            return str((await model.ainvoke(str(number))).content)

    with ScriptedOpenAI() as llm, traced("all", tags=["all"]):
        model = chat(llm)
        await RunnableLambda(ask).abatch(list(range(9)), {"max_concurrency": 3})
    assert sorted(tuple(call["request_tags"]) for call in calls(local)) == [("all", str(n)) for n in range(9)]


def test_retries_and_fallbacks_of_traced_functions(seen: CapturedSpans) -> None:
    """Each attempt of a decorated step is a call of its own, and so is what it falls back to."""
    attempts: list[int] = []

    @traced("shaky")
    def shaky(text: str) -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise ValueError("not yet")
        return text

    @traced("broken")
    def broken(text: str) -> str:
        raise ValueError("never")

    retried = RunnableLambda(shaky).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)
    with traced("outer"):
        assert RunnableLambda(broken).with_fallbacks([retried]).invoke("x") == "x"
    assert [(span.name, span.status) for span in seen if span.kind == "function"] == [
        ("broken", "error"), ("shaky", "error"), ("shaky", "error"), ("shaky", "ok"),
    ]  # fmt: skip


def test_message_history(local: Path) -> None:
    """A chain with a message history is recorded in its scope, and its history grows no recorded input."""
    history = InMemoryChatMessageHistory()
    with ScriptedOpenAI() as llm:
        chain = RunnableWithMessageHistory(chat(llm), lambda session_id: history)
        config: Any = {"configurable": {"session_id": "1"}}
        for number in range(3):
            with traced("turn", session="1"):
                chain.invoke([("user", f"Hi {number}")], config)
    assert [len(call["input"]["messages"]) for call in calls(local)] == [1, 3, 5]
    assert {call["session"] for call in calls(local)} == {"1"}


@pytest.mark.slow
async def test_ten_thousand_runs_leave_no_run_open(seen: CapturedSpans) -> None:
    """After 10,000 runs with errors and cancellations nothing is left in the tables of open runs."""
    go = asyncio.Event()

    @tool
    async def hangs(number: int) -> int:
        """Wait for ever."""
        await go.wait()
        return number

    @tool
    def fails(number: int) -> int:
        """Fail."""
        raise ValueError(number)

    @traced("one")
    async def one(number: int) -> None:
        if number % 3 == 0:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(hangs.ainvoke({"number": number}), 0.001)
        elif number % 3 == 1:
            with contextlib.suppress(ValueError):
                fails.invoke({"number": number})
        else:
            await RunnableLambda(str).ainvoke(number)

    for start in range(0, 10_000, 200):
        with traced("many"):
            scope = current()
            await asyncio.gather(*(one(number) for number in range(start, start + 200)))
        assert scope is not None
        assert scope.open_runs == {}
        assert open_runs == {}
        statuses = {span.name: span.status for span in seen if span.kind != "function"}
        assert statuses == {"hangs": "cancelled", "fails": "error", "str": "ok", "many": "ok"}
        del seen[:]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
@pytest.mark.parametrize("kind", ["call", "block", "generator", "argument"])
def test_what_a_signal_handler_raises_reaches_the_program(kind: str, no_collector: None) -> None:
    """A timeout that a signal handler raises, wherever it comes in between, isn't taken for a failure of ours.

    But in the finalizer of what was interrupted earlier, from which Python lets nothing out.
    """

    class Mutable:
        def __init__(self) -> None:
            self.items = [1]

    @traced
    def call(item: Any) -> Any:
        return item

    @traced
    def generator() -> Iterator[int]:
        yield from range(3)

    def block() -> None:
        with traced("block", tags=["tag"]):
            pass

    steps: dict[str, Callable[[], object]] = {
        "call": lambda: call(1),
        "block": block,
        "generator": lambda: sum(generator()),
        "argument": lambda: call({"a": [Mutable()], "b": {}}),
    }

    def out_of_time(number: int, frame: object) -> None:
        nonlocal is_out
        if is_running:
            is_out = True
            raise TimeoutError("out of time")

    # A function of its own: Python doesn't catch what is raised on the way back to the beginning of a loop.
    def work() -> None:
        give_up_at = time.monotonic() + 0.02
        while time.monotonic() < give_up_at:
            step()

    is_running, is_out, swallowed, step = False, False, 0, steps[kind]
    before = signal.signal(signal.SIGALRM, out_of_time)
    try:
        with capture_spans():
            step()
            pltrace.flush(5.0)  # Python can't start a thread that is interrupted.
            for number in range(150):
                signal.setitimer(signal.ITIMER_REAL, (50 + number) * 1e-6)
                is_out = False
                try:
                    is_running = True
                    work()
                    is_running = False
                    swallowed += is_out
                except TimeoutError:
                    is_running = False
    finally:
        signal.signal(signal.SIGALRM, before)
    assert swallowed == 0


def test_a_block_that_the_collector_leaves_last(seen: CapturedSpans) -> None:
    """Of a generator's block that outlives the one around it nothing is left when the collector closes it."""

    def steps() -> Iterator[int]:
        with traced("in one that isn't traced"):
            yield 1

    gc.disable()
    try:
        with traced("around"):
            cycle: list[Any] = [steps()]
            cycle.append(cycle)
            next(cycle[0])
        del cycle
        gc.collect()
        with traced("after") as span:
            assert (current_span(), span.parent_id) == (span, None)
    finally:
        gc.enable()


def test_generators_that_the_collector_closes(tmp_path: Path) -> None:
    """Before Python 3.12 the collector comes inside of `ContextVar.set`, and what it closes must set none there.

    Else the process crashes, after some thousand generators that are left unfinished in cycles.
    """
    source = """
import gc
import random
import pltrace
from pltrace import traced

pltrace.configure(store="memory")
random = random.Random(1)

@traced
def steps():
    with traced("inside"):
        yield 1

def untraced_steps():
    with traced("in one that isn't traced"):
        yield 1

class Node:
    def __init__(self, steps):
        self.me, self.steps = self, steps
        next(steps)

for number in range(30_000):
    junk = [[] for _ in range(random.randrange(9))]
    with traced("block"):
        pass
    if number % 5 == 0:
        Node(steps())
    if number % 500 == 0:
        with traced("around"):
            Node(untraced_steps())
            span = pltrace.current_span()
gc.collect()  # Else the block of one that isn't closed yet is current.
with traced("at the end") as span:
    assert pltrace.current_span() is span and not span.parent_id
print("survived", flush=True)
import os
os._exit(0)
"""
    done = run(source, tmp_path)
    assert (done.code, done.out, done.err) == (0, "survived\n", "")


def test_a_finalizer_that_waits_in_another_thread(no_collector: None, seen: CapturedSpans) -> None:
    """While one thread's collector waits in a finalizer, what is thrown into another's generator stays in scope."""
    waits, goes_on = threading.Event(), threading.Event()

    class Slow:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            waits.set()
            goes_on.wait(10)

    @traced
    def steps() -> Iterator[bool]:
        with contextlib.suppress(ValueError):
            yield bool(current_span())
        yield bool(current_span())
        yield bool(current_span())

    Slow()
    collecting = threading.Thread(target=gc.collect)
    collecting.start()
    assert waits.wait(10)
    generator: Any = steps()
    try:
        assert [next(generator), generator.throw(ValueError()), next(generator)] == [True] * 3
    finally:
        goes_on.set()
        collecting.join()
    generator.close()
    assert [span.name.rpartition(".")[2] for span in seen] == ["steps"]


@pytest.mark.parametrize("tracing", ["on", "off"])
def test_finalizers_that_the_collector_calls(tracing: str, tmp_path: Path) -> None:
    """Before Python 3.12 traced code that a finalizer runs inside of `ContextVar.set` sets none: the process lives on.

    What it does is recorded as ever, and what it came in between is left as it was.
    """
    source = (
        f"""
import gc
from collections import Counter
import pltrace
from pltrace import current_span, traced
from pltrace.testing import capture_spans

tracing = {tracing!r} == "on"
"""
        + """
pltrace.configure(enabled=tracing, store="memory")
closing = traced("closing")
made = 0

class Connection:
    def __init__(self):
        global made
        made += 1
        self.me, self.rows = self, self.read()
        next(self.rows)

    def read(self):
        try:
            yield
        finally:
            self.close()

    @traced
    def close(self):
        return [*self.left()]

    @traced
    def left(self):
        yield 1
        yield 2

    def __del__(self):
        with closing:
            self.close()

gc.set_threshold(50)
for number in range(3_000):
    with closing as span:
        Connection()
        for _ in range(20):
            with traced("call"):
                pass
        assert not tracing or current_span() is span, number
assert not current_span()
gc.collect()
assert pltrace.flush(60)
with capture_spans() as spans:
    with traced("around"):
        Connection()
        gc.collect()
names = Counter(span.name for span in spans)
assert names == {"around": 1, "closing": 1, "Connection.close": 2, "Connection.left": 2}, names
assert all(span.status == "ok" for span in spans)
print("survived", flush=True)
import os
os._exit(0)
"""
    )
    done = run(source, tmp_path)
    assert (done.code, done.out, done.err) == (0, "survived\n", "")
