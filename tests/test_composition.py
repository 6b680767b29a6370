"""Blocks, calls, generators, runs, tasks, threads, exceptions and cancellations, composed at random, keep apart."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.runnables import RunnableLambda

from pltrace import Span, bind, current_span, traced
from pltrace.testing import CapturedSpans, capture_spans

# A program is a list of operations; an operation is a tuple of its name and its arguments, programs among them. Each is
# performed with the span that has to be current around it, and checks it before, inside and afterwards.

Program = list[tuple[Any, ...]]


class Boom(Exception):
    """What programs raise."""


class Halt(BaseException):
    """What programs raise that is no Exception."""


_ERRORS: list[type[BaseException]] = [Boom, Halt, asyncio.CancelledError]
_ONE, _SAME = traced("block"), traced("same", tags=["t"])


def parent_of(span: Span) -> object:
    """Gives the block or call around a span, past the LangChain runs in between."""
    parent = span.parent
    while isinstance(parent, Span) and parent.run_key is not None:
        parent = parent.parent
    return parent


class Performer:
    """Performs programs, and counts the spans that they open."""

    def __init__(self) -> None:
        self.opened: list[Span] = []

    def inside(self, around: Span | None, inner: Span | None = None) -> Span:
        """Checks, in a block or call that was just opened around us, that it is where it has to be; gives its span."""
        span = inner if inner is not None else current_span()
        assert current_span() is span
        assert parent_of(span) is (around or None)
        self.opened.append(span)
        return span

    def check(self, around: Span | None) -> None:
        """Checks that a span is current."""
        assert (current_span() or None) is (around or None)

    # Without an event loop.

    def perform(self, program: Program, around: Span | None) -> None:
        """Performs a program."""
        for name, *arguments in program:
            self.check(around)
            try:
                getattr(self, f"_do_{name}")(around, *arguments)
            finally:
                self.check(around)

    def _do_raise(self, around: Span | None, error: type[BaseException]) -> None:
        raise error

    def _do_sleep(self, around: Span | None) -> None: ...

    def _do_attempt(self, around: Span | None, program: Program) -> None:
        with contextlib.suppress(*_ERRORS):
            self.perform(program, around)

    def _do_block(self, around: Span | None, program: Program) -> None:
        with _ONE as span:
            self.perform(program, self.inside(around, span))

    def _do_nested_in_itself(self, around: Span | None, program: Program) -> None:
        with _SAME as outer, _SAME as inner:
            assert parent_of(outer) is (around or None)
            self.opened.append(outer)
            self.perform(program, self.inside(outer, inner))

    def _do_out_of_order(self, around: Span | None, program: Program) -> None:
        first, second = traced("first"), traced("second")
        outer = self.inside(around, first.__enter__())
        inner = self.inside(outer, second.__enter__())
        try:
            self.perform(program, inner)
        finally:
            first.__exit__(None, None, None)
            assert current_span() is inner
            second.__exit__(None, None, None)

    def _do_left_in_a_copy(self, around: Span | None, program: Program) -> None:
        block = traced("block")
        try:
            self.perform(program, self.inside(around, block.__enter__()))
        finally:
            contextvars.copy_context().run(block.__exit__, None, None, None)

    def _do_call(self, around: Span | None, program: Program) -> None:
        traced(lambda: self.perform(program, self.inside(around)))()

    def _do_runnable(self, around: Span | None, program: Program) -> None:
        RunnableLambda(lambda _: self.perform(program, around)).invoke(None)

    def _generator(self, around: Span | None, programs: list[Program]) -> Iterator[None]:
        span = self.inside(around)
        try:
            for program in programs:
                self.perform(program, span)
                with _ONE as block:
                    self.inside(span, block)
                    yield
                    self.check(block)
                self.check(span)
        finally:
            self.check(span)

    def _take(self, steps: Iterator[None], around: Span | None, between: Program, count: int, ending: str) -> None:
        for _ in range(count):
            if next(steps, self) is self:
                return
            self.perform(between, around)
        if ending == "close":
            steps.close()  # type: ignore[attr-defined]
        elif ending == "throw":
            steps.throw(Boom)  # type: ignore[attr-defined]
        elif ending == "exhaust":
            for _ in steps:
                self.check(around)
        # Else it is abandoned, and collected now.

    def _do_generator(
        self, around: Span | None, programs: list[Program], between: Program, count: int, ending: str
    ) -> None:
        self._take(traced(self._generator)(around, programs), around, between, count, ending)

    def _do_returned_generator(
        self, around: Span | None, programs: list[Program], between: Program, count: int, ending: str
    ) -> None:
        def start() -> Iterator[None]:
            return self._generator_of(around, programs, box)

        box: list[Span] = []
        steps = traced(lambda: (box.append(self.inside(around)), start())[1])()
        self._take(steps, around, between, count, ending)

    def _generator_of(self, around: Span | None, programs: list[Program], box: list[Span]) -> Iterator[None]:
        for program in programs:
            self.perform(program, box[0])
            yield

    def _do_interleave(self, around: Span | None, programs: list[Program], count: int) -> None:
        running = [traced(self._generator)(around, [program] * (2 + count)) for program in programs]
        try:
            for _ in range(count):
                for steps in running:
                    next(steps, None)
                    self.check(around)
        finally:
            for steps in running:
                with contextlib.suppress(*_ERRORS):
                    steps.close()  # type: ignore[attr-defined]

    def _do_handed_over(self, around: Span | None, programs: list[Program]) -> None:
        """Takes a generator's steps here, in another context and in a thread, by turns."""
        steps = traced(self._generator)(around, programs * 3)

        def step() -> None:
            with contextlib.suppress(*_ERRORS):
                next(steps, None)

        for _ in range(2):
            step()
            self.check(around)
            contextvars.Context().run(step)
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
            self.check(around)
        steps.close()  # type: ignore[attr-defined]

    def _do_thread(self, around: Span | None, program: Program, bound: bool) -> None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.perform(program, around if bound else None)
            except tuple(_ERRORS):
                pass
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=bind(run) if bound else run)
        thread.start()
        thread.join()
        if failures:
            raise failures[0]

    # On an event loop.

    async def aperform(self, program: Program, around: Span | None) -> None:
        """Performs a program."""
        for name, *arguments in program:
            self.check(around)
            try:
                asynchronous = getattr(self, f"_ado_{name}", None)
                if asynchronous is not None:
                    await asynchronous(around, *arguments)
                else:
                    getattr(self, f"_do_{name}")(around, *arguments)
            finally:
                self.check(around)

    async def _ado_sleep(self, around: Span | None) -> None:
        await asyncio.sleep(0)

    async def _ado_attempt(self, around: Span | None, program: Program) -> None:
        with contextlib.suppress(*_ERRORS):
            await self.aperform(program, around)

    async def _ado_block(self, around: Span | None, program: Program) -> None:
        async with _ONE as span:
            await self.aperform(program, self.inside(around, span))

    async def _ado_left_in_a_copy(self, around: Span | None, program: Program) -> None:
        block = traced("block")
        try:
            await self.aperform(program, self.inside(around, block.__enter__()))
        finally:
            contextvars.copy_context().run(block.__exit__, None, None, None)

    async def _ado_call(self, around: Span | None, program: Program) -> None:
        async def call() -> None:
            await self.aperform(program, self.inside(around))

        await traced(call)()

    async def _ado_runnable(self, around: Span | None, program: Program) -> None:
        async def perform(_: Any) -> None:
            await self.aperform(program, around)

        await RunnableLambda(perform).ainvoke(None)

    async def _agenerator(self, around: Span | None, programs: list[Program]) -> AsyncIterator[None]:
        span = self.inside(around)
        try:
            for program in programs:
                await self.aperform(program, span)
                async with _ONE as block:
                    self.inside(span, block)
                    yield
                    await asyncio.sleep(0)
                    self.check(block)
                self.check(span)
        finally:
            self.check(span)

    async def _ado_generator(
        self, around: Span | None, programs: list[Program], between: Program, count: int, ending: str
    ) -> None:
        steps: Any = traced(self._agenerator)(around, programs)
        for _ in range(count):
            if await anext(steps, self) is self:
                return
            await self.aperform(between, around)
        if ending == "close":
            await steps.aclose()
        elif ending == "throw":
            await steps.athrow(Boom)
        elif ending == "exhaust":
            async for _ in steps:
                self.check(around)

    async def _ado_task(self, around: Span | None, program: Program, ticks: int | None) -> None:
        """Runs a program in a task; cancels it after some ticks, waits for it, or leaves it running."""
        task = asyncio.ensure_future(self.aperform(program, around))
        for _ in range(ticks if ticks is not None else 0):
            await asyncio.sleep(0)
        if ticks is not None:
            task.cancel()
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            raise task.exception()  # type: ignore[misc]

    async def _ado_gather(self, around: Span | None, programs: list[Program]) -> None:
        results = await asyncio.gather(*(self.aperform(one, around) for one in programs), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _ado_timeout(self, around: Span | None, program: Program) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.aperform([*program, ("forever",)], around), 0.0005)

    async def _ado_forever(self, around: Span | None) -> None:
        await asyncio.sleep(0.1)  # No longer: a program that has swallowed the cancellation waits for all of it.


def operations(programs: st.SearchStrategy[Program]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Makes operations of programs."""
    several = st.lists(programs, min_size=1, max_size=3)
    small = st.integers(0, 3)
    endings = st.sampled_from(["close", "throw", "exhaust", "drop"])
    one_of: Callable[..., Any] = st.one_of
    return one_of(
        *(
            st.tuples(st.just(name), programs)
            for name in (
                "attempt", "block", "nested_in_itself", "out_of_order", "left_in_a_copy", "call", "runnable", "timeout",
            )
        ),
        *(
            st.tuples(st.just(name), several, programs, small, endings)
            for name in ("generator", "returned_generator")
        ),
        st.tuples(st.just("interleave"), several, small),
        st.tuples(st.just("handed_over"), several),
        st.tuples(st.just("thread"), programs, st.booleans()),
        st.tuples(st.just("task"), programs, st.none() | small),
        st.tuples(st.just("gather"), several),
    )  # fmt: skip


_LEAVES = st.one_of(st.just(("sleep",)), st.tuples(st.just("raise"), st.sampled_from(_ERRORS)), st.just(("sleep",)))
_PROGRAMS = st.recursive(
    st.lists(_LEAVES, max_size=2), lambda programs: st.lists(operations(programs) | _LEAVES, max_size=3), max_leaves=12
)
# In code without a loop there is nothing to wait for.
Performer._do_timeout = Performer._do_attempt  # type: ignore[attr-defined]
Performer._do_task = lambda self, around, program, ticks: self._do_attempt(around, program)  # type: ignore[attr-defined]
Performer._do_gather = lambda self, around, programs: [  # type: ignore[attr-defined]
    self._do_attempt(around, program) for program in programs
]


def of_ours(seen: CapturedSpans) -> list[Span]:
    """Gives the spans that are no runs of LangChain's."""
    return [span for span in seen if span.kind in ("block", "function")]


def run(program: Program, seen: CapturedSpans, asynchronous: bool) -> None:
    """Performs a program, and checks that nothing is left of it and that every span that it opened has ended."""
    del seen[:]
    performer = Performer()
    with contextlib.suppress(*_ERRORS):
        if asynchronous:
            asyncio.run(performer.aperform(program, None))
        else:
            performer.perform(program, None)
    assert not current_span()
    if len(of_ours(seen)) != len(performer.opened):
        gc.collect()  # What an exception holds.
    ours = of_ours(seen)
    assert {span.id for span in performer.opened} == {span.id for span in ours}
    assert len(performer.opened) == len(ours)
    assert {span.status for span in seen} <= {"ok", "error", "cancelled"}
    seen.assert_nothing_open()


def check_programs(examples: int, asynchronous: bool) -> None:
    """Runs so many programs."""
    with capture_spans() as seen:

        @settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
            print_blob=False,
        )  # fmt: skip
        @given(_PROGRAMS)
        def each(program: Program) -> None:
            run(program, seen, asynchronous)

        each()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_programs(asynchronous: bool) -> None:
    """After any mixture the scope is what it was, and inside each part it is that part's own."""
    check_programs(400, asynchronous)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("asynchronous", [False, True])
def test_thousands_of_programs(asynchronous: bool, part: int) -> None:
    """The same for thousands."""
    check_programs(1_500, asynchronous)
