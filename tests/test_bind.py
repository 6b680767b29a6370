"""`bind` takes the current scope to wherever and whenever its argument runs."""

from __future__ import annotations

import asyncio
import collections.abc
import concurrent.futures
import contextvars
import copy
import functools
import gc
import inspect
import multiprocessing
import pickle
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import cloudpickle
import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel
from langchain_core.tools import tool

import pltrace
from pltrace import bind, current_span, traced
from pltrace.testing import CapturedSpans, capture_spans
from tests.support.programs import run
from tests.support.scripted_llm import Reply, ScriptedOpenAI
from tests.support.traces import calls, chat, spans, the_span, tree


@pytest.fixture
def seen() -> Iterator[CapturedSpans]:
    """The spans that ended; the test fails if it leaves a scope or a run open."""
    with capture_spans() as spans:
        yield spans
        spans.assert_nothing_open()


def here(*_: Any) -> str:
    """Gives the name of the current span."""
    return current_span().name


async def here_later(*_: Any) -> str:
    """Gives the name of the current span, after a while."""
    await asyncio.sleep(0)
    return current_span().name


def here_often(*_: Any) -> Iterator[str]:
    """Gives the name of the current span, twice."""
    yield current_span().name
    yield current_span().name


async def here_often_later(*_: Any) -> AsyncIterator[str]:
    """Gives the name of the current span, twice."""
    yield current_span().name
    await asyncio.sleep(0)
    yield current_span().name


async def consume(result: Any) -> Any:
    """Uses a result up."""
    if inspect.isawaitable(result):
        return await result
    if hasattr(result, "__anext__"):
        return [item async for item in result]
    return list(result) if hasattr(result, "__next__") else result


class Places:
    """Methods that say where they run."""

    def method(self) -> str:
        """Gives the name of the current span."""
        return here()

    def __call__(self) -> str:
        """Gives the name of the current span."""
        return here()


_FUNCTIONS: list[tuple[Callable[..., Any], Any]] = [
    (here, "s"),
    (lambda: here(), "s"),
    (functools.partial(here, 1), "s"),
    (Places().method, "s"),
    (Places(), "s"),
    (here_later, "s"),
    (here_often, ["s", "s"]),
    (here_often_later, ["s", "s"]),
    (lambda: here_later(), "s"),
    (lambda: here_often(), ["s", "s"]),
    (lambda: here_often_later(), ["s", "s"]),
    (lambda: map(here, [1, 2]), ["s", "s"]),
]


@pytest.mark.parametrize(("function", "expected"), _FUNCTIONS)
async def test_functions(function: Callable[..., Any], expected: Any, seen: CapturedSpans) -> None:
    """A function of any kind runs in the scope, after its block too, and its stream is consumed in it."""
    with traced("s", tags=["t"]):
        bound = bind(function)
    with traced("elsewhere"):
        assert await consume(bound()) == expected
        assert here() == "elsewhere"
    assert await consume(bound()) == expected
    assert not current_span()


def test_a_block_that_is_left_elsewhere(seen: CapturedSpans) -> None:
    """What was bound runs in its scope, also when the block was left in another context than it was entered in."""
    block = traced("s")
    block.__enter__()
    bound = bind(here)
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert (bound(), here()) == ("s", "")


@pytest.mark.parametrize("make", [here_later, here_often, here_often_later, lambda: map(here, [1, 2])])
async def test_what_is_consumed(make: Callable[[], Any], seen: CapturedSpans) -> None:
    """An iterator, async iterator or awaitable that exists already is consumed in the scope."""
    with traced("s"):
        it = bind(make())
    assert await consume(it) in ("s", ["s", "s"])
    assert not current_span()


def test_identity(seen: CapturedSpans) -> None:
    """A bound function looks like the function; outside any block it is the function."""
    assert bind(here) is here
    with traced("s"):
        bound = bind(here_later)
    assert inspect.iscoroutinefunction(bound)
    assert bound.__name__ == "here_later"
    assert inspect.signature(bound) == inspect.signature(here_later)


def test_a_bound_function_in_a_class(seen: CapturedSpans) -> None:
    """A bound function that is put into a class is given its object, or the class, as the function itself is."""

    def where(it: Any, suffix: str = "") -> str:
        return f"{getattr(it, '__name__', 'an object')}{suffix} in {current_span().name}"

    with traced("s"):
        bound, builtin = bind(where), bind(len)

    class Service:
        method, of_class, alone, given = bound, classmethod(bound), staticmethod(bound), property(bound)
        length = builtin

    service = Service()
    assert service.method("!") == "an object! in s"
    assert Service.of_class("!") == "Service! in s"
    assert service.alone(service) == service.given == Service.method(service) == "an object in s"
    assert service.length("four") == 4


def test_what_can_not_run_is_given_back(seen: CapturedSpans) -> None:
    """What is neither called nor consumed is given back as it is."""
    with traced("s"):
        assert bind(5) == 5
        assert bind(None) is None


def test_threads_and_timers(seen: CapturedSpans) -> None:
    """Threads and timers run in the scope that they were bound in."""
    names: list[str] = []
    with traced("s"):
        threads = [threading.Thread(target=bind(lambda: names.append(here()))) for _ in range(3)]
        threads.append(threading.Timer(0, bind(lambda: names.append(here()))))
    for thread in threads:
        thread.start()
        thread.join()
    assert names == ["s"] * 4


def test_executors(seen: CapturedSpans) -> None:
    """A bound executor runs what is submitted in the scope of who submits it, else in its own."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        with traced("s"):
            bound = bind(pool)
            assert bound.submit(here).result() == "s"
            with traced("inner"):
                assert bound.submit(here).result() == "inner"
                assert list(bound.map(here, range(3))) == ["inner"] * 3
        assert bound.submit(here).result() == "s"
        assert list(bound.map(here, range(3))) == ["s"] * 3
        assert pool.submit(here).result() == ""
        assert isinstance(bound, concurrent.futures.Executor)


class Direct:
    """Runs what is submitted at once, and can be called itself."""

    def submit(self, fn: Callable[..., Any], *args: Any) -> Any:
        """Calls it at once."""
        return fn(*args)

    def shutdown(self) -> None:
        """Does nothing."""

    def __call__(self) -> str:
        """Gives the name of the current span."""
        return here()


class Remote:
    """Answers whatever it is asked for, and can be called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: name

    def __call__(self) -> str:
        """Gives the name of the current span."""
        return here()


class Unconnected:
    """Can't be asked for anything yet but to be called."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError(name)

    def __call__(self) -> str:
        """Gives the name of the current span."""
        return here()


@pytest.mark.parametrize("make", [Direct, Remote, Unconnected, lambda: Mock(side_effect=here)])
def test_what_is_called_though_it_seems_an_executor(make: Callable[[], Any], seen: CapturedSpans) -> None:
    """What can be called still can be once bound, whatever else it has or answers; also what is submitted."""
    fn = make()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, traced("s"):
        bound, bound_pool = bind(fn), bind(pool)
        assert callable(bound)
        assert bound_pool.submit(fn).result() == "s"
    assert fn() == ""
    assert bound() == "s"
    if isinstance(fn, Direct):
        assert bound.submit(here) == "s"


def test_a_bound_class_of_executors(seen: CapturedSpans) -> None:
    """A class of executors is no executor: it makes one."""
    with traced("s"), bind(concurrent.futures.ThreadPoolExecutor)(1) as pool:
        assert pool.submit(len, "four").result() == 4


async def test_run_in_executor(seen: CapturedSpans) -> None:
    """`loop.run_in_executor` takes a bound function, and a bound executor."""
    loop = asyncio.get_running_loop()
    with concurrent.futures.ThreadPoolExecutor(1) as pool, traced("s"):
        assert await loop.run_in_executor(None, bind(here)) == "s"
        assert await loop.run_in_executor(pool, bind(here)) == "s"
        assert await loop.run_in_executor(bind(pool), here) == "s"
        assert await loop.run_in_executor(pool, here) == ""


async def test_tasks_of_another_context(seen: CapturedSpans) -> None:
    """A callback that the loop runs, and a queue's consumer, run in the scope that they were bound in."""
    names: list[str] = []
    with traced("s"):
        bound = bind(lambda: names.append(here()))
    asyncio.get_running_loop().call_soon(bound)
    await asyncio.sleep(0)
    await asyncio.ensure_future(asyncio.to_thread(bound))
    assert names == ["s", "s"]


def test_at_the_same_time(seen: CapturedSpans) -> None:
    """One bound function can run many times at once."""
    meet = threading.Barrier(8)

    def both() -> tuple[str, str]:
        before = here()
        meet.wait(10)
        with traced("inner"):
            return before, here()

    with traced("s"), concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(bind(both)) for _ in range(8)]
        assert {future.result() for future in running} == {("s", "inner")}
    assert seen.tree() == [["s", *[["inner"]] * 8]]


@pytest.mark.parametrize("again", [lambda it: pickle.loads(pickle.dumps(it)), lambda it: cloudpickle.loads(
    cloudpickle.dumps(it))])  # fmt: skip
def test_pickling(again: Callable[[Any], Any], seen: CapturedSpans) -> None:
    """A bound function can be pickled, and goes on with the trace where it arrives."""
    with traced("s", tags=["t"], metadata={"k": 1}, user="u") as span:
        bound = [again(bind(function)) for function in (here_traced, Places().method, functools.partial(here_traced))]
        runnable = again(bind(RunnableLambda(here_traced)))
    assert [function() for function in bound] == ["here_traced", "", "here_traced"]
    assert runnable.invoke(1) == "here_traced"
    found = [one for one in seen if one.name == "here_traced" and one.kind == "function"]
    assert len(found) == 3
    assert {one.trace_id for one in found} == {span.trace_id}
    assert found[0].parent_id == span.id
    assert {(one.tags, one.metadata["k"]) for one in found} == {(("t",), 1)}


@traced("here_traced")
def here_traced(*_: Any) -> str:
    """Gives the name of the current span, which is its own."""
    return here()


class Counted:
    """A callable object with a list of its own."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self) -> str:
        """Gives the name of the current span."""
        self.seen.append(here())
        return here()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_copying(again: Callable[[Any], Any], seen: CapturedSpans) -> None:
    """A copy of what is bound runs in the scope; it is as deep a copy as of what was bound."""
    counted = Counted()
    with traced("s"):
        bound, bound_object, partial = bind(here), bind(counted), bind(functools.partial(here, 1))
    assert again(bound) is bound
    assert again({"a": [bound]})["a"][0]() == "s"
    assert (again(partial)(), again(bound_object)()) == ("s", "s")
    assert counted.seen == ([] if again is copy.deepcopy else ["s"])


def test_pickling_local_functions(seen: CapturedSpans) -> None:
    """Cloudpickle takes a bound local function along, decoration included."""

    @traced("local")
    def local() -> str:
        return here()

    with traced("s"):
        sent = cloudpickle.dumps(bind(local))
    assert cloudpickle.loads(sent)() == "local"
    assert [span.name for span in seen] == ["s", "local"]


_MAIN = """
    import concurrent.futures, multiprocessing, sys
    import cloudpickle
    import pltrace
    from pltrace import bind, current_span, traced

    class Worker:
        @traced("part")
        def part(self, number):
            return number and self.part(number - 1)

    @traced("work", tags=["w"])
    def work(number):
        return Worker().part(number), current_span().trace_id

    def run(pickled):
        return cloudpickle.loads(pickled)(5)

    if __name__ == "__main__":
        pltrace.configure(store=sys.argv[1])
        context = multiprocessing.get_context(sys.argv[2])
        with traced("outer", tags=["o"]) as span, concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            results = list(pool.map(bind(work), range(3)))
            results += [bind(pool).submit(work, 3).result(), pool.submit(run, cloudpickle.dumps(bind(work))).result()]
            with context.Pool(1) as other:
                results += other.map(bind(work), [4])
                other.close()
                other.join()
        assert {trace for _, trace in results} == {span.trace_id}, results
        pltrace.shutdown()
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_process_pools(method: str, tmp_path: Path) -> None:
    """Functions of `__main__` run in the processes of a pool, however those are started, in one trace with it."""
    store = tmp_path / "store" / "traces.db"
    ended = run(_MAIN, tmp_path, store, method, timeout=100, PLTRACE_STORE=store, PLTRACE_ENABLED=1)
    assert (ended.code, ended.err) == (0, "")
    pltrace.configure(store=store)
    found = spans(store)
    (outer,) = [one for one in found if one["name"] == "outer"]
    works = [one for one in found if one["name"] == "work"]
    assert len(works) == 6
    assert {(one["parent_id"], tuple(one["tags"])) for one in works} == {(outer["span_id"], ("o", "w"))}
    # Also of what cloudpickle ships by value, all that it calls is traced.
    assert sum(one["name"] == "part" for one in found) == sum(number + 1 for number in (0, 1, 2, 3, 4, 5))


_OFF = """
    import concurrent.futures, multiprocessing
    import pltrace
    from pltrace import bind, traced

    if __name__ == "__main__":
        pltrace.configure(store="memory")
        context = multiprocessing.get_context("spawn")
        with traced("outer"), concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            assert list(pool.map(bind(abs), [-1, 2])) == [1, 2]
"""


@pytest.mark.parametrize("decided", [False, True])
def test_a_process_where_tracing_is_off(decided: bool, tmp_path: Path) -> None:
    """What runs where nobody switched tracing on isn't recorded; one warning says so, if it wasn't switched off."""
    ended = run(_OFF, tmp_path, **({"PLTRACE_ENABLED": 0} if decided else {}))
    assert ended.code == 0, ended.err
    assert ended.err.count("abs was bound to a scope in another process") == (0 if decided else 1)


async def test_runnables(llm: ScriptedOpenAI, local: Path) -> None:
    """A bound Runnable runs in the scope, however it is run, and stays a Runnable, also in a chain."""
    with traced("s", tags=["t"]):
        model = bind(chat(llm))
        chain = bind(chat(llm) | StrOutputParser())
    assert isinstance(model, Runnable)
    model.invoke("Hi")
    await model.ainvoke("Hi")
    list(model.stream("Hi"))
    [chunk async for chunk in model.astream("Hi")]
    model.batch(["Hi", "Ho"])
    [event async for event in model.astream_events("Hi", version="v2")]
    (model | StrOutputParser()).invoke("Hi")
    chain.invoke("Hi")
    (RunnableLambda(str) | chain | str.upper).invoke("Hi")
    list(chain.stream("Hi"))
    chain.with_retry().invoke("Hi")
    found = calls(local)
    assert len(found) == 12
    assert {(tuple(call["request_tags"]), call["trace_id"] == found[0]["trace_id"]) for call in found} == {
        (("t",), True)
    }


def test_what_a_bound_runnable_makes(llm: ScriptedOpenAI, local: Path) -> None:
    """A copy of a bound Runnable, and what its methods make of it, run in the scope, callbacks included."""
    asked: list[Any] = []
    with traced("s", on_request=asked.append):
        model = bind(chat(llm))
    for made in (copy.copy(model), model.bind_tools([]), model.with_config(tags=["t"]), model.bind(stop=["."])):
        made.invoke("Hi")
    assert {call["parent_id"] for call in calls(local)} == {spans(local)[0]["span_id"]}
    assert pltrace.flush(10)
    assert len(asked) == 4


def test_a_bound_stream(llm: ScriptedOpenAI, local: Path) -> None:
    """A stream that is made inside a block and bound is recorded in it, though it is read outside."""
    with traced("s", tags=["t"]):
        stream = bind(chat(llm).stream("Hi"))
    assert "".join(str(chunk.content) for chunk in stream) == "Hello."
    (call,) = calls(local)
    assert call["request_tags"] == ["t"]
    assert not current_span()


def test_bound_while_on_and_called_while_off(local: Path) -> None:
    """A bound function outlives tracing."""
    with traced("s"):
        bound, steps = bind(here), bind(here_often())
    pltrace.shutdown()
    assert bound() == ""
    assert len(list(steps)) == 2


class Held:
    """Something that a function of the user's holds."""


def test_what_is_bound_is_let_go_of(seen: CapturedSpans) -> None:
    """A bound function that nobody has any more is gone at once, with what it holds, without the garbage collector."""

    def bound() -> weakref.ref[Held]:
        held = Held()
        with traced("around"):
            assert bind(lambda: held)() is held
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        assert bound()() is None
    finally:
        gc.enable()


def test_what_comes_before_a_bound_runnable_in_a_stream(llm: ScriptedOpenAI, local: Path) -> None:
    """In a chain that streams, a bound Runnable runs in its scope, and what it reads in that of who runs the chain."""
    with traced("bound in", tags=["bound"]):
        parser = bind(StrOutputParser())
    assert inspect.isgeneratorfunction(parser.transform)
    with traced("used in", tags=["used"]):
        (chat(llm) | parser).invoke("Hi")
        list((chat(llm) | parser).stream("Hi"))
    assert [call["request_tags"] for call in calls(local)] == [["used"]] * 2


@pytest.mark.parametrize("fn", [lambda: None, len, functools.partial(max, 1), [].__len__])
def test_what_a_bound_function_is_besides(fn: Any, local: Path) -> None:
    """A bound function has no length and no items for who asks an abstract class, if it has none unbound."""
    with traced("block"):
        bound = bind(fn)
    for name in ("Sized", "Container", "Iterable", "Iterator", "Awaitable", "Callable", "Hashable"):
        kind = getattr(collections.abc, name)
        assert isinstance(bound, kind) == isinstance(fn, kind), name


def test_traced_and_bound_runnables() -> None:
    """A Runnable that is traced or bound already can be bound, and traced, once more."""

    def trace_id(_: object) -> str:
        return current_span().trace_id

    once = traced("once")(RunnableLambda(trace_id))
    with capture_spans() as spans:
        with traced("root") as root:
            bound = bind(once)
            bound_plain = bind(RunnableLambda(trace_id))
        assert bound is not once
        with concurrent.futures.ThreadPoolExecutor() as pool:
            assert pool.submit(bound.invoke, 1).result() == root.trace_id
        spans.clear()
        traced("twice")(once).invoke(1)
        assert [span.name for span in spans if span.kind == "function"] == ["once", "twice"]
        traced("over")(bound_plain).invoke(1)
        assert spans[-1].name == "over"


def asks_for_weather(body: dict[str, Any]) -> Any:
    """Answers as a model that calls a tool, whose code asks it again."""
    return Reply(tool_calls=[("weather", {"city": "Rome"})]) if body["messages"][-1]["content"] == "How?" else "Fine."


#: Of the agent's tree: what is around it differs with the version of langchain.
_FANNED_OUT = """
      weather tool
        ChatOpenAI llm
        asked function
          ChatOpenAI llm
"""


def bound_threads(*functions: Callable[[str], Any]) -> None:
    """Runs each function, bound here, in a thread of its own."""
    threads = [threading.Thread(target=bind(function), args=["Rome"]) for function in functions]
    for thread in threads:
        thread.start()
        thread.join()


def a_bound_pool(*functions: Callable[[str], Any]) -> None:
    """Runs each function in a pool that is bound here."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for submitted in [bind(pool).submit(function, "Rome") for function in functions]:
            submitted.result()


def threads_of_a_bound_pool(*functions: Callable[[str], Any]) -> None:
    """Runs each function, bound in a pool that is bound here, in a thread of its own."""
    a_bound_pool(*[lambda _, function=function: bound_threads(function) for function in functions])


@pytest.mark.parametrize("fan_out", [bound_threads, a_bound_pool, threads_of_a_bound_pool])
def test_what_a_tool_fans_out(fan_out: Callable[..., None], local: Path) -> None:
    """What a tool of an agent's runs elsewhere is below the tool, and all else of it is the block's that is around."""
    create_agent = pytest.importorskip("langchain.agents").create_agent
    heard: list[Any] = []
    names: list[str] = []

    @tool
    def weather(city: str) -> str:
        """Tell the weather."""
        fan_out(asks, asked)
        return "Fine."

    with ScriptedOpenAI(asks_for_weather) as llm, traced("request", tags=["t"], on_request=heard.append) as request:
        model = chat(llm)

        def asks(city: str) -> None:
            names.append(current_span().name)
            model.invoke(city)

        asked = traced("asked")(asks)
        create_agent(model, [weather]).invoke({"messages": [("user", "How?")]}, {"metadata": {"from": "config"}})
    assert _FANNED_OUT in tree(local)
    assert sorted(names) == ["asked", "request"]
    assert request.usage.requests == len(heard) == 4
    assert [call["request_tags"] for call in calls(local)] == [["t"]] * 4


@pytest.mark.skipif(sys.version_info < (3, 11), reason="LangChain sets no context in async code on Python 3.10")
async def test_what_an_async_tool_fans_out(local: Path) -> None:
    """What an agent's async tool gives to the loop's executor, or to another thread, is below the tool."""
    create_agent = pytest.importorskip("langchain.agents").create_agent

    @tool
    async def weather(city: str) -> str:
        """Tell the weather."""
        await asyncio.to_thread(bind(asked), city)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            await asyncio.get_running_loop().run_in_executor(bind(pool), model.invoke, city)
        return "Fine."

    with ScriptedOpenAI(asks_for_weather) as llm, traced("request"):
        model = chat(llm)
        asked = traced("asked")(lambda city: model.invoke(city))
        await create_agent(bind(model), [bind(weather)]).ainvoke({"messages": [("user", "How?")]})
    assert _FANNED_OUT in tree(local)


_CHAIN = """outer block
  RunnableSequence chain
    ChatOpenAI llm
    ChatOpenAI llm
    RunnableParallel<a,b> chain
      a chain
        ChatOpenAI llm
      b chain
        b function
          ChatOpenAI llm
    str chain
    streamed chain
      ChatOpenAI llm
"""


def test_what_is_bound_in_a_chain(llm: ScriptedOpenAI, local: Path) -> None:
    """What is bound runs below the run that calls it, if that is in its block, and in its block's scope."""
    with traced("outer", tags=["outer"]):
        model = chat(llm)
        stream = bind(model.stream("Hi"))

        def a(_: Any) -> Any:
            return model.invoke("Hi")

        def streamed(_: Any) -> str:
            return "".join(str(chunk.content) for chunk in stream)

        b = traced("b")(a)
        both = RunnableParallel(a=bind(a), b=RunnableLambda(lambda text: bind(b)(text)).with_config(run_name="b"))
        chain = both | str | bind(model) | RunnableLambda(streamed) | bind(model)
        chain.invoke("Hi")
    assert tree(local) == _CHAIN
    assert [call["request_tags"] for call in calls(local)] == [["outer"]] * 5


def test_what_is_called_in_a_block_inside_its_own(llm: ScriptedOpenAI, local: Path) -> None:
    """What is bound runs below the run that calls it, also in an inner block; that block's tags aren't its own."""
    with traced("outer", tags=["outer"], metadata={"k": 1}):
        model = chat(llm)

        def ask(text: str) -> Any:
            return model.invoke(text)

        bound, asked = bind(ask), bind(traced("asked")(ask))
        with traced("inner", tags=["inner"], metadata={"k": 2}) as inner:
            (RunnableLambda(bound) | (lambda _: asked("Hi"))).invoke("Hi")
    assert (
        tree(local)
        == """\
outer block
  inner block
    RunnableSequence chain
      RunnableLambda chain
        asked function
          ChatOpenAI llm
      ask chain
        ChatOpenAI llm
"""
    )
    assert [(call["request_tags"], call["metadata"]["k"]) for call in calls(local)] == [(["outer"], 1)] * 2
    assert inner.usage.requests == 0


@pytest.mark.parametrize("again", [lambda it: it, lambda it: cloudpickle.loads(cloudpickle.dumps(it))])
def test_what_outlives_the_run_it_was_bound_in(again: Callable[[Any], Any], local: Path) -> None:
    """What is bound in a run stays below it when that has ended, and in another process; it is still the block's."""
    bound: list[Callable[[], Any]] = []
    with traced("block", metadata={"k": "block"}) as block:
        RunnableLambda(lambda _: bound.append(again(bind(here_traced)))).invoke(1, {"metadata": {"k": "run"}})
        RunnableLambda(lambda _: bound.append(again(bind(RunnableLambda(here))))).invoke(1)
    bound[0]()
    bound[1].invoke(1)
    assert (
        tree(local)
        == """\
block block
  RunnableLambda chain
    here chain
  RunnableLambda chain
    here_traced function
"""
    )
    outlived = the_span(local, "here")
    assert (outlived["metadata"], outlived["lineage"]) == ({"k": "block"}, [block.id])
