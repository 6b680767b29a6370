"""With `instrument_threads`, scopes go along into every thread and executor; without it, and after it, they don't."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda

import pltrace
from pltrace import bind, current_span, instrument_threads, traced, uninstrument_threads
from pltrace.testing import CapturedSpans, capture_spans
from tests.support.programs import rows, run, stored

_start, _submit = threading.Thread.start, ThreadPoolExecutor.submit


@pytest.fixture
def everywhere(pltrace_spans: CapturedSpans) -> Iterator[CapturedSpans]:
    """Threads carry scopes; the spans that ended."""
    instrument_threads()
    yield pltrace_spans
    uninstrument_threads()
    assert threading.Thread.start is _start
    assert ThreadPoolExecutor.submit is _submit


@traced
def work(*_: object) -> str:
    """Calls a model; gives the name of the thread it runs in."""
    FakeListChatModel(responses=["Hello."]).invoke("Hi")
    return threading.current_thread().name


def in_thread(function: Any, *arguments: Any, kind: type[threading.Thread] = threading.Thread) -> None:
    """Runs a function in a thread to its end."""
    thread = kind(target=function, args=arguments)
    thread.start()
    thread.join()


WORK = ["work", ["FakeListChatModel"]]


def test_a_thread(everywhere: CapturedSpans) -> None:
    """A thread that is started in a block works inside of it."""
    with traced("block", tags=["t"]):
        in_thread(work, 1)
    assert everywhere.tree() == [["block", WORK]]
    everywhere.assert_requests(1, tags=["t"])
    assert everywhere.named("work").input == {"_": [1]}


def test_kinds_of_threads(everywhere: CapturedSpans) -> None:
    """Subclasses with a `run` of their own, timers and daemons do as well."""
    threads = [Own(), threading.Timer(0.0, work), threading.Thread(target=work, daemon=True)]
    with traced("block"):
        for thread in threads:
            thread.start()
            thread.join()
    assert everywhere.tree() == [["block", WORK, WORK, WORK]]


def test_threads_of_threads(everywhere: CapturedSpans) -> None:
    """It goes on from thread to thread."""
    with traced("block"):
        in_thread(in_thread, work)
    assert everywhere.tree() == [["block", WORK]]


def test_a_thread_outside_of_all_blocks(everywhere: CapturedSpans) -> None:
    """Where there is no scope, a thread is left as it is."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "run" not in vars(thread)
    assert everywhere.tree() == [WORK]


def test_an_executor(everywhere: CapturedSpans) -> None:
    """What is submitted, or mapped, belongs to who submitted it."""
    with ThreadPoolExecutor(2) as executor, traced("block"):
        executor.submit(work).result()
        list(executor.map(work, [1, 2]))
    assert everywhere.tree() == [["block", WORK, WORK, WORK]]


def test_an_executor_keeps_no_scope(everywhere: CapturedSpans) -> None:
    """A pool's threads, started in one block, do later work for other blocks, or for none."""
    with ThreadPoolExecutor(1) as executor:
        with traced("first"):
            executor.submit(work).result()
        executor.submit(work).result()
        assert executor.submit(current_span).result().id == ""
        with traced("second"):
            executor.submit(work).result()
    assert everywhere.tree() == [["first", WORK], WORK, ["second", WORK]]


@pytest.mark.parametrize("method", ["apply", "map", "starmap", "imap", "imap_unordered", "map_async", "apply_async"])
def test_a_pool_of_threads(everywhere: CapturedSpans, method: str) -> None:
    """The pools of `multiprocessing` do each work for who gave it, wherever they were made."""

    def give() -> None:
        if method == "apply_async":
            pool.apply_async(func=work).get()
        elif method == "apply":
            pool.apply(work)
        else:
            given = getattr(pool, method)(work, [(1,)])
            list(given.get() if method == "map_async" else given)

    with traced("first"):
        pool = ThreadPool(1)
        give()
    with pool:
        give()
        with traced("second"):
            give()
    assert everywhere.tree() == [["first", WORK], WORK, ["second", WORK]]


def test_the_submitter_keeps_its_scope(everywhere: CapturedSpans) -> None:
    """Submitting changes nothing for who submits, not even when it fails."""
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with traced("block") as block:
        with pytest.raises(RuntimeError, match="shutdown"):
            executor.submit(work)
        assert current_span() is block
        with pytest.raises(TypeError):
            executor.submit()  # type: ignore[call-arg]
        assert current_span() is block


async def test_asyncio_threads(everywhere: CapturedSpans) -> None:
    """`to_thread`, which copies the context itself, and `run_in_executor`, which doesn't."""
    async with traced("block"):
        await asyncio.to_thread(work)
        await asyncio.get_running_loop().run_in_executor(None, work)
    assert everywhere.tree() == [["block", WORK, WORK]]


def test_langchain_batch(everywhere: CapturedSpans) -> None:
    """LangChain's own executor, which copies the context, gives each call its one span."""
    with traced("block") as block:
        FakeListChatModel(responses=["Hello."]).batch(["a", "b", "c"])
    assert everywhere.tree() == [["block", *[["FakeListChatModel"]] * 3]]
    assert block.usage.requests == 3


def test_together_with_bind(everywhere: CapturedSpans) -> None:
    """What is bound already runs where it was bound."""
    with traced("bound"):
        bound = bind(work)
    with traced("block"), ThreadPoolExecutor(1) as executor:
        executor.submit(bound).result()
    assert everywhere.tree() == [["bound", WORK], ["block"]]


def test_in_a_run(everywhere: CapturedSpans) -> None:
    """A thread that is started in a LangChain run, and what is submitted there, works below it."""
    with traced("block"), ThreadPoolExecutor(1) as executor:
        RunnableLambda(lambda _: in_thread(work)).with_config(run_name="run").invoke(1)
        RunnableLambda(lambda _: executor.submit(work).result()).with_config(run_name="other run").invoke(1)
    assert everywhere.tree() == [["block", ["run", WORK], ["other run", WORK]]]


def test_called_twice(everywhere: CapturedSpans) -> None:
    """A second call does nothing, and one call undoes both."""
    instrument_threads()
    with traced("block"):
        in_thread(work)
    assert everywhere.tree() == [["block", WORK]]


def test_undone(pltrace_spans: CapturedSpans) -> None:
    """Without it, and after it is undone, threads start with nothing; undoing it again does nothing."""
    instrument_threads()
    uninstrument_threads()
    uninstrument_threads()
    with traced("block"), ThreadPoolExecutor(1) as executor:
        in_thread(work)
        executor.submit(work).result()
    assert pltrace_spans.tree() == [["block"], WORK, WORK]


class Own(threading.Thread):
    """A thread with a `run` of its own."""

    def run(self) -> None:
        """Calls a model."""
        work()


@pytest.mark.parametrize("kind", [threading.Thread, Own])
def test_a_thread_that_has_ended_goes_at_once(
    everywhere: CapturedSpans, no_collector: None, kind: type[threading.Thread]
) -> None:
    """Nothing of ours keeps a thread that has ended, nor makes it wait for the garbage collector."""
    thread = kind(target=work)
    with traced("block"):
        thread.start()
        thread.join()
    assert everywhere.tree() == [["block", WORK]]
    gone = weakref.ref(thread)
    del thread
    assert gone() is None


def test_what_a_thread_was_given_to_run(everywhere: CapturedSpans) -> None:
    """A function that is put in the place of its `run` runs in the block, and is there afterwards as before."""
    thread = threading.Thread()
    thread.run = run = lambda: in_thread(work)  # type: ignore[method-assign]
    with traced("block"):
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="once"):
            thread.start()
    assert thread.run is run
    assert everywhere.tree() == [["block", WORK]]


def test_our_own_threads_have_no_scope(everywhere: CapturedSpans) -> None:
    """What a callback in the background does isn't inside the block that happened to start its thread."""
    inside: list[Any] = []
    with traced("block", on_request=lambda request: inside.append(current_span())):
        work()
    assert pltrace.flush(5.0)
    assert [bool(span) for span in inside] == [False]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("early", [True, False], ids=["before the import", "after the import"])
def test_process_pools(tmp_path: Path, method: str, early: bool) -> None:
    """A process pool's work belongs to the trace of who submitted it, however early it was asked for."""
    store = tmp_path / "traces.db"
    call = "import pltrace; pltrace.instrument_threads()\n"
    program = run(
        (call if early else "")
        + """
import sys
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
import pltrace
"""
        + ("" if early else call)
        + """
@pltrace.traced
def work(number):
    return number + 1

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with pltrace.traced("block"), ProcessPoolExecutor(1, context) as executor, context.Pool(1) as pool:
        assert executor.submit(work, 1).result() == 2
        assert list(executor.map(work, [2, 3])) == [3, 4]
        assert pool.map(work, [4]) == [5]
        pool.close()
        pool.join()
    pltrace.uninstrument_threads()
    assert not hasattr(ProcessPoolExecutor.submit, "__wrapped__")
    assert not hasattr(multiprocessing.pool.Pool.map, "__wrapped__")
    assert pltrace.flush(10)
""",
        tmp_path, method, PLTRACE_ENABLED=1, PLTRACE_STORE=store,
    )  # fmt: skip
    assert (program.code, program.err) == (0, "")
    assert sorted(stored(store)) == ["block", "work", "work", "work", "work"]
    assert len(traces(store)) == 1


def traces(store: Path) -> set[str]:
    """Gives the ids of the traces in a store."""
    return {row["trace_id"] for row in rows(store, "SELECT trace_id FROM spans")}


def test_other_executors_are_found_by_their_class(everywhere: CapturedSpans) -> None:
    """An executor of somebody's own that is built on Python's is carried into as well."""

    class Own(ThreadPoolExecutor):
        pass

    executor: Executor = Own(1)
    with executor, traced("block"):
        executor.submit(work).result()
    assert everywhere.tree() == [["block", WORK]]


def test_patches_of_others_are_left() -> None:
    """Undone, it leaves what others have put over it since, and does nothing under it."""
    original = threading.Thread.start
    pltrace.instrument_threads()
    ours = threading.Thread.start

    def others(thread: threading.Thread) -> None:
        ours(thread)

    threading.Thread.start = others  # type: ignore[method-assign]
    try:
        pltrace.uninstrument_threads()
        assert threading.Thread.start is others
        seen: list[bool] = []
        with capture_spans(), traced("block"):
            thread = threading.Thread(target=lambda: seen.append(bool(pltrace.current_span())))
            thread.start()
            thread.join()
        assert seen == [False]
    finally:
        threading.Thread.start = original  # type: ignore[method-assign]
