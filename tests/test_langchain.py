"""Every LangChain run inside a block becomes a span, in the right place, whatever way it is run."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import uuid_utils
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langgraph.graph import END, START, MessagesState, StateGraph

import pltrace
from pltrace import PromptLayerCallbackHandler, bind, traced
from pltrace._health import counts
from pltrace._runs import open_runs
from pltrace._span import Span
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ApiError, Reply, Script, ScriptedOpenAI
from tests.support.traces import calls, chat, completion, said, spans, the_span, tree
from tests.support.versions import recent_agents

Program = Callable[[ScriptedOpenAI], Awaitable[object]]


@pytest.fixture(autouse=True)
def no_open_runs() -> Iterator[None]:
    """No test leaves a run in the table of open runs."""
    yield
    assert open_runs == {}


@tool
def weather(city: str) -> str:
    """Tell the weather."""
    if city == "Atlantis":
        raise LookupError("no such city")
    return f"It is sunny in {city}."


class Library(BaseRetriever):
    """Finds one document."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(f"About {query}")]


def joke(server: ScriptedOpenAI) -> Runnable[dict[str, str], str]:
    """A prompt, a model and a parser."""
    return ChatPromptTemplate.from_template("A joke about {topic}") | chat(server) | StrOutputParser()


# The trees.


async def _invoke(server: ScriptedOpenAI) -> None:
    joke(server).invoke({"topic": "cats"})


async def _ainvoke(server: ScriptedOpenAI) -> None:
    await joke(server).ainvoke({"topic": "cats"})


async def _batch(server: ScriptedOpenAI) -> None:
    joke(server).batch([{"topic": "cats"}, {"topic": "dogs"}])


async def _abatch(server: ScriptedOpenAI) -> None:
    await joke(server).abatch([{"topic": "cats"}, {"topic": "dogs"}])


async def _stream(server: ScriptedOpenAI) -> None:
    assert "".join(joke(server).stream({"topic": "cats"})) == "Hello."


async def _astream(server: ScriptedOpenAI) -> None:
    assert "".join([piece async for piece in joke(server).astream({"topic": "cats"})]) == "Hello."


async def _events(server: ScriptedOpenAI) -> None:
    assert [event async for event in joke(server).astream_events({"topic": "cats"}, version="v2")]


async def _parallel(server: ScriptedOpenAI) -> None:
    RunnableParallel(a=joke(server), b=RunnableLambda(len)).invoke({"topic": "cats"})


async def _aparallel(server: ScriptedOpenAI) -> None:
    await RunnableParallel(a=joke(server), b=RunnableLambda(len)).ainvoke({"topic": "cats"})


async def _completions(server: ScriptedOpenAI) -> None:
    model = PromptTemplate.from_template("About {topic}:") | completion(server)
    model.invoke({"topic": "cats"})
    await model.ainvoke({"topic": "cats"})


async def _several_prompts(server: ScriptedOpenAI) -> None:
    completion(server).generate(["One", "Two"])


async def _tools(server: ScriptedOpenAI) -> None:
    weather.invoke({"city": "Rome"})
    await weather.ainvoke({"city": "Rome"})


async def _retrievers(server: ScriptedOpenAI) -> None:
    Library().invoke("cats")
    await Library().ainvoke("cats")


async def _alternating(server: ScriptedOpenAI) -> None:
    model = chat(server)

    @traced("inner")
    def inner(text: str) -> Any:
        with traced("innermost"):
            return model.invoke(text)

    @traced("outer")
    def outer() -> None:
        (RunnableLambda(lambda text: inner(text)).with_config(run_name="middle") | StrOutputParser()).invoke("Hi")

    outer()


async def _aalternating(server: ScriptedOpenAI) -> None:
    model = chat(server)

    @traced("inner")
    async def inner(text: str) -> Any:
        async with traced("innermost"):
            return await model.ainvoke(text)

    async def middle(text: str) -> Any:
        return await inner(text)

    @traced("outer")
    async def outer() -> None:
        await (RunnableLambda(middle) | StrOutputParser()).ainvoke("Hi")

    await outer()


def _graph(server: ScriptedOpenAI) -> Any:
    model = chat(server)

    @traced("helper")
    def helper(state: MessagesState) -> Any:
        return model.invoke(state["messages"])

    def first(state: MessagesState) -> Any:
        return {"messages": [helper(state)]}

    def second(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("first", first)
    graph.add_node("second", second)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("second", END)
    return graph.compile()


async def _langgraph(server: ScriptedOpenAI) -> None:
    _graph(server).invoke({"messages": [("user", "Hi")]})


async def _alanggraph(server: ScriptedOpenAI) -> None:
    await _graph(server).ainvoke({"messages": [("user", "Hi")]})


async def _agent(server: ScriptedOpenAI) -> None:
    create_agent(chat(server), [weather]).invoke({"messages": [("user", "How is it in Rome?")]})


async def _aagent(server: ScriptedOpenAI) -> None:
    await create_agent(chat(server), [weather]).ainvoke({"messages": [("user", "How is it in Rome?")]})


async def _agent_stream(server: ScriptedOpenAI) -> None:
    assistant = create_agent(chat(server), [weather])
    async for _ in assistant.astream({"messages": [("user", "How is it in Rome?")]}, stream_mode="messages"):
        pass


_JOKE = """\
  RunnableSequence chain
    ChatOpenAI llm
    ChatPromptTemplate prompt
    StrOutputParser parser
"""
_PARALLEL = """\
  RunnableParallel<a,b> chain
    RunnableSequence chain
      ChatOpenAI llm
      ChatPromptTemplate prompt
      StrOutputParser parser
    len chain
"""
_COMPLETION = """\
  RunnableSequence chain
    OpenAI llm
    PromptTemplate prompt
"""
_GRAPH = """\
  LangGraph chain
    first chain
      helper function
        ChatOpenAI llm
    second chain
      ChatOpenAI llm
"""
_AGENT = """\
  LangGraph chain
    model chain
      ChatOpenAI llm
    model chain
      ChatOpenAI llm
    tools chain
      weather tool
"""
_ALTERNATING = """\
  outer function
    RunnableSequence chain
      StrOutputParser parser
      middle chain
        inner function
          innermost block
            ChatOpenAI llm
"""
# Python 3.10 has no way to run a task in a context, so LangGraph's async nodes don't know which run they are in, and
# what they call goes to the block.
_TASKS_HAVE_CONTEXTS = sys.version_info >= (3, 11)
_GRAPH_ASYNC = (
    _GRAPH
    if _TASKS_HAVE_CONTEXTS
    else """\
  ChatOpenAI llm
  LangGraph chain
    first chain
    second chain
  helper function
    ChatOpenAI llm
"""
)
_AGENT_ASYNC = (
    _AGENT
    if _TASKS_HAVE_CONTEXTS
    else """\
  ChatOpenAI llm
  ChatOpenAI llm
  LangGraph chain
    model chain
    model chain
    tools chain
      weather tool
"""
)
_CALLS_THE_TOOL = [Reply(tool_calls=[("weather", {"city": "Rome"})]), Reply("Sunny.")]
_TREES: list[tuple[Program, Script, str]] = [
    (_invoke, "Hello.", _JOKE),
    (_ainvoke, "Hello.", _JOKE),
    (_batch, "Hello.", _JOKE * 2),
    (_abatch, "Hello.", _JOKE * 2),
    (_stream, "Hello.", _JOKE),
    (_astream, "Hello.", _JOKE),
    (_events, "Hello.", _JOKE),
    (_parallel, "Hello.", _PARALLEL),
    (_aparallel, "Hello.", _PARALLEL),
    (_completions, "Hello.", _COMPLETION * 2),
    (_several_prompts, Reply(["First.", "Second."]), "  OpenAI llm\n" * 2),
    (_tools, "Hello.", "  weather tool\n" * 2),
    (_retrievers, "Hello.", "  Library retriever\n" * 2),
    (_alternating, "Hello.", _ALTERNATING),
    (_aalternating, "Hello.", _ALTERNATING),
    (_langgraph, "Hello.", _GRAPH),
    (_alanggraph, "Hello.", _GRAPH_ASYNC),
]
_AGENT_TREES: list[tuple[Program, Script, str]] = [
    (_agent, _CALLS_THE_TOOL, _AGENT),
    (_aagent, _CALLS_THE_TOOL, _AGENT_ASYNC),
    (_agent_stream, _CALLS_THE_TOOL, _AGENT_ASYNC),
]


@pytest.mark.parametrize(
    ("program", "script", "expected"),
    [pytest.param(*row, id=row[0].__name__[1:]) for row in _TREES]
    + [pytest.param(*row, id=row[0].__name__[1:], marks=recent_agents) for row in _AGENT_TREES],
)
async def test_the_tree(program: Program, script: Script, expected: str, local: Path) -> None:
    """Each run is one span of its kind under the right parent, in one trace, run in any way."""
    with ScriptedOpenAI(script) as server, traced("root") as root:
        await program(server)
        assert server.errors == []
    assert tree(local) == "root block\n" + expected
    assert {span["trace_id"] for span in spans(local)} == {root.trace_id}
    assert len(root.requests) == root.usage.requests == expected.count(" llm\n")


def test_a_stream_read_after_the_block(local: Path, llm: ScriptedOpenAI) -> None:
    """A stream that is made inside a block but first read outside of it isn't the block's; one begun inside is."""
    with traced("block"):
        pieces = chat(llm).stream("Hi")
        next(pieces)
    assert "".join(str(piece.content) for piece in pieces) == "Hello."
    assert tree(local) == "block block\n  ChatOpenAI llm\n"


@pytest.mark.parametrize("run_id", ["abc", str(uuid4()), uuid_utils.uuid7(), 7], ids=["name", "text", "other", "int"])
async def test_run_ids_of_any_kind(run_id: Any, local: Path) -> None:
    """A run whose id isn't a UUID is recorded as any, however it ends, and what is traced or bound works inside it."""

    @traced("inner")
    def inner(x: int) -> int:
        return x // 0 if x > 3 else x

    def body(x: int) -> Any:
        return doubled(inner(x)) + next(numbers)

    @tool
    async def slow(city: str) -> str:
        """Tell the weather, some day."""
        started.set()
        await asyncio.Event().wait()
        return city

    started = asyncio.Event()
    config: Any = {"run_id": run_id}
    with traced("block"):
        doubled, numbers = bind(lambda x: 2 * x), bind(iter([10, 20]))
        assert RunnableLambda(body).invoke(1, config) == 12
        assert (RunnableLambda(body) | RunnableLambda(str)).invoke(2, config) == "24"
        with pytest.raises(ZeroDivisionError):
            RunnableLambda(body).invoke(4, config)
        weather.invoke({"city": "Rome"}, config)
        with pytest.raises(LookupError):
            weather.invoke({"city": "Atlantis"}, config)
        Library().invoke("cats", config)
        list(FakeListChatModel(responses=["Hi"]).stream("Hi", config))
        task = asyncio.create_task(slow.ainvoke({"city": "Rome"}, config))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
    assert tree(local) == (
        "block block\n"
        "  FakeListChatModel llm\n"
        "  Library retriever\n"
        "  RunnableSequence chain\n    body chain\n      inner function\n    str chain\n"
        "  body chain\n    inner function\n"
        "  body chain error\n    inner function error\n"
        "  slow tool cancelled\n"
        "  weather tool\n"
        "  weather tool error\n"
    )


# What an LLM call tells.


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_a_call_tells(streamed: bool, local: Path) -> None:
    """A call is recorded with provider, model, parameters, messages, tokens; a stream with its first token's time."""
    with ScriptedOpenAI(Reply("Why? Because.", usage=(30, 4), pause=0.01)) as server, traced("root") as root:
        model = chat(server, model="gpt-x", temperature=0.5, stream_usage=True)
        if streamed:
            async for _ in model.astream("A joke"):
                pass
        else:
            await model.ainvoke("A joke")
    (call,) = calls(local)
    assert (call["provider"], call["model"], call["parameters"]["temperature"]) == ("openai", "gpt-x", 0.5)
    assert (call["input_tokens"], call["output_tokens"]) == (30, 4)
    assert root.usage[:4] == (1, 0, 30, 4)
    assert root.usage.total_tokens == 34
    assert call["input"]["messages"][0]["content"] == [{"type": "text", "text": "A joke"}]
    assert call["output"]["messages"][0]["content"] == [{"type": "text", "text": "Why? Because."}]
    if streamed:
        assert call["started_at_ns"] < call["first_token_at_ns"] < call["ended_at_ns"]
    else:
        assert call["first_token_at_ns"] is None


def test_what_a_completion_tells(local: Path) -> None:
    """A completion model's call is recorded as one, its tokens taken from what the provider reported."""
    with ScriptedOpenAI(Reply("Once.", usage=(3, 2))) as server, traced():
        completion(server).invoke("A tale:")
    (call,) = calls(local)
    assert (call["provider"], call["model"], call["input_tokens"], call["output_tokens"]) == ("openai", "tiny", 3, 2)
    assert call["input"] == {"type": "completion", "content": [{"type": "text", "text": "A tale:"}]}
    assert call["output"] == {"type": "completion", "content": [{"type": "text", "text": "Once."}]}


def test_what_tools_and_retrievers_tell(local: Path) -> None:
    """A tool is recorded with its arguments and result, a retriever with its query and documents."""
    with traced():
        weather.invoke({"city": "Rome"})
        Library().invoke("cats")
    found = the_span(local, "weather")
    assert (found["input"], found["output"]) == ({"city": "Rome"}, "It is sunny in Rome.")
    found = the_span(local, "Library")
    assert found["input"] == "cats"
    assert found["output"][0]["page_content"] == "About cats"


# What goes wrong.


async def test_an_error_of_the_provider(deliver: Callable[..., None], promptlayer: PromptLayerServer) -> None:
    """A refused call reaches the user as ever, and PromptLayer as an ERROR of the right type."""
    deliver()
    refusals = [
        (ApiError(429), "PROVIDER_RATE_LIMIT"),
        (ApiError(429, code="insufficient_quota", message="You exceeded your current quota"), "PROVIDER_QUOTA_LIMIT"),
        (ApiError(401), "PROVIDER_AUTH_ERROR"),
        (ApiError(500), "PROVIDER_ERROR"),
        (ApiError(400), "PROVIDER_ERROR"),
    ]
    messages = []
    with ScriptedOpenAI([error for error, _ in refusals]) as server, traced("root") as root:
        for _ in refusals:
            with pytest.raises(Exception, match="Error code") as caught:
                await chat(server).ainvoke("Hi")
            messages.append(f"{type(caught.value).__name__}: {caught.value}")
    assert root.usage[:4] == (5, 5, 0, 0)
    assert await asyncio.to_thread(pltrace.flush, 10)
    logs = promptlayer.request_logs
    assert [log["status"] for log in logs] == ["ERROR"] * 5
    assert [log["error_type"] for log in logs] == [kind for _, kind in refusals]
    assert [log["error_message"] for log in logs] == messages
    assert {tuple(log["output"]["messages"][0]["content"]) for log in logs} == {()}


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
async def test_an_exception_in_a_tool(how: str, local: Path) -> None:
    """An exception in a tool is recorded on it and on the chains around it, and reaches the user as it is."""
    chain = RunnableLambda(lambda city: {"city": city}).with_config(run_name="ask") | weather
    with traced("root"), pytest.raises(LookupError, match="no such city"):
        chain.invoke("Atlantis") if how == "invoke" else await chain.ainvoke("Atlantis")
    assert tree(local) == ("root block\n  RunnableSequence chain error\n    ask chain\n    weather tool error\n")
    assert the_span(local, "weather")["error"] == "LookupError: no such city"


@pytest.mark.parametrize("how", ["invoke", "ainvoke"])
async def test_an_exception_in_a_lambda(how: str, local: Path) -> None:
    """An exception in a lambda is recorded there, once, and reaches the user as it is."""
    error = ZeroDivisionError("no")

    def fail(_: int) -> None:
        raise error

    chain = RunnableLambda(fail)
    with pytest.raises(ZeroDivisionError) as caught, traced("root"):
        chain.invoke(1) if how == "invoke" else await chain.ainvoke(1)
    assert caught.value is error
    assert tree(local) == "root block error\n  fail chain error\n"


def test_an_exit_cuts_a_call_short(local: Path) -> None:
    """Where the program exits in order while a model is asked, all that is around is ok, and the call isn't."""

    class Stopped(FakeListChatModel):
        def _call(self, *_: Any, **__: Any) -> str:
            raise SystemExit(0)  # As a signal handler does.

    with pytest.raises(SystemExit), traced("root"):
        (RunnableLambda(str) | Stopped(responses=["Never."])).invoke("Hi")
    assert tree(local) == "root block\n  RunnableSequence chain\n    Stopped llm error\n    str chain\n"


@pytest.mark.parametrize("leave", ["timeout", "cancel"])
@pytest.mark.parametrize("chained", [False, True])
async def test_a_cancelled_call(
    leave: str, chained: bool, deliver: Callable[..., None], promptlayer: PromptLayerServer
) -> None:
    """A call that is cancelled is closed as such, once, and logged as ERROR, though LangChain says nothing of it."""
    deliver()
    with ScriptedOpenAI(Reply("Never.", hang_after=0)) as server:
        model: Any = chat(server) if not chained else RunnableLambda(str) | chat(server)
        async with traced("root") as root:
            task = asyncio.ensure_future(model.ainvoke("Hi"))
            await asyncio.to_thread(server.wait_for, lambda: server.bodies)
            if leave == "timeout":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(task, 0.001)
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
    assert await asyncio.to_thread(pltrace.flush, 10)
    (log,) = promptlayer.request_logs
    assert (log["status"], log["error_type"]) == ("ERROR", "UNKNOWN_ERROR")
    attributes = promptlayer.spans[log["span_id"]]["attributes"]
    assert attributes["pltrace.status"] == "cancelled"
    assert root.usage[:4] == (1, 1, 0, 0)
    assert root.status == "ok"


async def test_a_cancelled_block(local: Path) -> None:
    """A block whose task is cancelled ends cancelled, with the call inside it."""

    async def work() -> None:
        async with traced("root"):
            await weather_later.ainvoke({"city": "Rome"})

    started = asyncio.Event()

    @tool
    async def weather_later(city: str) -> str:
        """Tell the weather, some day."""
        started.set()
        await asyncio.Event().wait()
        return city

    task = asyncio.create_task(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tree(local) == "root block cancelled\n  weather_later tool cancelled\n"


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize("status", ["ok", "cancelled"])
async def test_a_task_that_goes_on_is_not_closed(status: str, make: Callable[..., Any], local: Path) -> None:
    """A call that still runs in a task of its own when its block ends goes on, and ends as it ends."""
    go_on = threading.Event()

    def answer(_: Any) -> str:
        go_on.wait(10)
        return "Late."

    with ScriptedOpenAI(answer) as server:
        async with traced("root"):
            task = asyncio.create_task(make(server).ainvoke("Hi"))
            await asyncio.to_thread(server.wait_for, lambda: server.bodies)
        assert len(open_runs) == 1
        if status == "cancelled":
            task.cancel()
        else:
            go_on.set()
        await asyncio.wait([task])
        go_on.set()
        if status == "cancelled":
            await until(lambda: not open_runs)
        else:
            assert str(getattr(task.result(), "content", task.result())) == "Late."
    (call,) = calls(local)
    assert (call["status"], call["parent_id"]) == (status, the_span(local, "root")["span_id"])
    assert ("Late." in str(call["output"])) == (status == "ok")


async def test_a_completion_that_is_cancelled_as_it_starts(local: Path) -> None:
    """One that is cancelled while other handlers are told of its start, in tasks of LangChain's own, is closed."""
    started = asyncio.Event()

    class Slow(AsyncCallbackHandler):
        async def on_llm_start(self, *_: Any, **__: Any) -> None:
            started.set()
            await asyncio.Event().wait()

    with traced("root"):
        task = asyncio.create_task(FakeListLLM(responses=[""]).ainvoke("Hi", {"callbacks": [Slow()]}))
        await started.wait()
        task.cancel()
        await asyncio.wait([task])
    del task
    await until(lambda: not open_runs)
    assert tree(local) == "root block\n  FakeListLLM llm cancelled\n"


@pytest.mark.parametrize("when", ["inside", "afterwards"])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_cancelled_call_is_closed_soon(when: str, tokens: int, kept: bool, local: Path) -> None:
    """A cancelled call is closed as soon as nothing can end it any more, be its block left before, with its tokens.

    Where something keeps its id, as LangSmith's tracer does, it is closed with its block, or with its task.
    """
    first_token = asyncio.Event()
    ids: list[Any] = []

    class Tokens(AsyncCallbackHandler):
        async def on_chat_model_start(self, *_: Any, run_id: Any, **__: Any) -> None:
            if kept:
                ids.append(run_id)

        async def on_llm_new_token(self, token: Any, **_: Any) -> None:
            if token:  # LangChain gives an empty one first.
                first_token.set()

    async def ask(server: ScriptedOpenAI) -> None:
        model = chat(server, streaming=bool(tokens))
        with contextlib.suppress(asyncio.CancelledError):
            await model.ainvoke("Hi", {"callbacks": [Tokens()]})

    with ScriptedOpenAI(Reply("One two three four", hang_after=tokens)) as server:
        with traced("root") as root:
            task = asyncio.create_task(ask(server))
            await (first_token.wait() if tokens else asyncio.to_thread(server.wait_for, lambda: server.bodies))
            if when == "inside":
                task.cancel()
                await (task if kept else until(lambda: not open_runs))
        if when == "afterwards":
            assert len(open_runs) == 1
            task.cancel()
            await until(lambda: not open_runs)
    assert open_runs == {}
    (call,) = calls(local)
    assert (call["status"], call["first_token_at_ns"] is not None) == ("cancelled", bool(tokens))
    said_so_far = [block["text"] for message in call["output"]["messages"] for block in message["content"]]
    assert said_so_far == (["One"] if tokens else [])
    assert root.usage[:2] == (1, 1)
    assert counts["closed_as_cancelled"] == 1


class Jobs:
    """A task that does what it is handed, one job after the other, and a tool that waits until it may end."""

    def __init__(self, *, swallowing: bool = False) -> None:
        self._swallows = swallowing
        self._jobs: asyncio.Queue[Callable[[], Awaitable[object]]] = asyncio.Queue()
        self._done = asyncio.Event()
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.task = asyncio.create_task(self._work())

        @tool
        async def wait(text: str) -> str:
            """Wait until it may end."""
            self.begun.set()
            await self.go_on.wait()
            return text

        self._tool = wait

    async def _work(self) -> None:
        if self._swallows:
            with contextlib.suppress(asyncio.CancelledError):
                self.begun.set()
                await asyncio.Event().wait()
        while True:
            await (await self._jobs.get())()
            self._done.set()

    async def outlive_a_block(self, name: str) -> None:
        """Runs the tool in a block that ends before the tool does."""
        for event in (self.begun, self.go_on, self._done):
            event.clear()
        with traced(name):
            self._jobs.put_nowait(bind(lambda: self._tool.ainvoke({"text": "Hi"})))
            await self.begun.wait()
        self.go_on.set()
        await self._done.wait()


async def test_a_worker_keeps_nothing_of_what_ended(local: Path) -> None:
    """Of a run that outlived its block and has ended, nothing is kept by the task that goes on."""
    jobs = Jobs()

    async def alive() -> int:
        assert await asyncio.to_thread(pltrace.flush, 10)
        gc.collect()
        return sum(issubclass(type(one), Span) for one in gc.get_objects())

    await jobs.outlive_a_block("first")
    before = await alive()
    for _ in range(20):
        await jobs.outlive_a_block("another")
    assert await alive() <= before
    jobs.task.cancel()


async def test_a_task_that_was_cancelled_and_goes_on(local: Path) -> None:
    """What a task runs after it refused to be cancelled isn't taken for cancelled when its block ends."""
    jobs = Jobs(swallowing=True)
    await jobs.begun.wait()
    jobs.task.cancel()
    await jobs.outlive_a_block("block")
    assert tree(local) == "block block\n  wait tool\n"
    jobs.task.cancel()


async def test_a_stream_that_is_handed_on(local: Path) -> None:
    """A stream goes on with who reads it, though its block, and the task that read its first token, are over."""
    go_on = threading.Event()

    def answer(_: Any) -> Reply:
        go_on.wait(10)
        return Reply("One two three")

    async def first() -> Any:
        pieces = chat(server).astream("Hi")
        await anext(pieces)
        return pieces

    with ScriptedOpenAI(answer) as server:
        with traced("root"):
            task = asyncio.create_task(first())
            await asyncio.to_thread(server.wait_for, lambda: server.bodies)
        go_on.set()
        pieces = await task
        await asyncio.sleep(0)  # What waits for the task's end runs now.
        assert "".join([str(piece.content) async for piece in pieces]) == "One two three"
    (call,) = calls(local)
    assert (call["status"], call["output"]["messages"][0]["content"][0]["text"]) == ("ok", "One two three")


async def until(condition: Callable[[], bool]) -> None:
    """Lets the event loop run until a condition holds."""
    async with asyncio.timeout(10) if sys.version_info >= (3, 11) else contextlib.nullcontext():
        while not condition():
            await asyncio.sleep(0.001)


def test_runs_of_a_loop_that_was_stopped(local: Path) -> None:
    """Runs that an event loop left half-way, and that nobody holds any longer, are closed, chains too."""

    async def begin() -> AsyncIterator[str]:
        pieces = chain.astream({"topic": "cats"})
        await anext(pieces)
        return pieces

    with ScriptedOpenAI(Reply("One two three four", pause=0.01)) as server:
        # Made outside of the loop: langchain-openai drops its oldest client for this one, and where a loop is running
        # has it closed there, which fails if its own is gone; and the log keeps the frames, with our stream in them.
        chain = joke(server)
        loop = asyncio.new_event_loop()
        with traced("root"):
            pieces = loop.run_until_complete(begin())
        assert len(open_runs) == 3
        with warnings.catch_warnings(record=True):  # Python and LangChain tell of what the loop left behind.
            warnings.simplefilter("always")
            loop.close()
            del pieces
            gc.collect()
        for _ in range(3):  # What the finalizers and the warnings held is free only after them.
            gc.collect()
        assert open_runs == {}
    assert {span["status"] for span in spans(local) if span["name"] not in ("root", "ChatPromptTemplate")} == {
        "cancelled"
    }


@pytest.mark.parametrize("how", ["stream", "astream", "garbage"])
async def test_an_abandoned_stream(how: str, deliver: Callable[..., None], promptlayer: PromptLayerServer) -> None:
    """A stream that is closed or collected half-way is logged as WARNING, a partial response with the text so far."""
    deliver()
    with ScriptedOpenAI(Reply("One two three four", pause=0.005)) as server, traced("root"):
        model, got = chat(server), ""
        if how != "astream":
            pieces: Any = model.stream("Hi")
            while "two" not in got:
                got += str(next(pieces).content)
            if how == "stream":
                pieces.close()
            cycle = [pieces]
            cycle.append(cycle)
            del pieces, cycle
            gc.collect()
        else:
            apieces: AsyncIterator[Any] = model.astream("Hi")
            while "two" not in got:
                got += str((await apieces.__anext__()).content)
            await apieces.aclose()  # type: ignore[attr-defined]
    assert await asyncio.to_thread(pltrace.flush, 10)
    (log,) = promptlayer.request_logs
    assert (log["status"], log["error_type"]) == ("WARNING", "PROVIDER_PARTIAL_RESPONSE")
    assert log["output"]["messages"][0]["content"] == [{"type": "text", "text": "One two"}]
    assert promptlayer.spans[log["span_id"]]["attributes"]["pltrace.status"] == "partial"


async def test_a_stream_whose_task_is_cancelled(deliver: Callable[..., None], promptlayer: PromptLayerServer) -> None:
    """A stream that is cancelled half-way, as when a web client leaves, is a cancelled span, and a partial response."""
    deliver()
    seen = asyncio.Event()

    async def read(model: Any) -> None:
        async for piece in model.astream("Hi"):
            if "two" in str(piece.content):
                seen.set()

    with ScriptedOpenAI(Reply("One two three four", pause=0.2)) as server, traced("root"):
        task = asyncio.create_task(read(chat(server)))
        await seen.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert await asyncio.to_thread(pltrace.flush, 10)
    (log,) = promptlayer.request_logs
    assert (log["status"], log["error_type"]) == ("WARNING", "PROVIDER_PARTIAL_RESPONSE")
    assert log["output"]["messages"][0]["content"] == [{"type": "text", "text": "One two"}]
    assert promptlayer.spans[log["span_id"]]["attributes"]["pltrace.status"] == "cancelled"


async def test_a_stream_that_is_cancelled_before_it_begins(
    deliver: Callable[..., None], promptlayer: PromptLayerServer
) -> None:
    """A stream that is cancelled before any of its answer came, as by a timeout, is logged as ERROR."""
    deliver()

    async def read(model: Any) -> None:
        async for _ in model.astream("Hi"):
            pass

    with ScriptedOpenAI(Reply("One", hang_after=1)) as server, traced("root"), pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(read(chat(server)), 0.5)
    assert await asyncio.to_thread(pltrace.flush, 10)
    (log,) = promptlayer.request_logs
    assert (log["status"], log["error_type"]) == ("ERROR", "UNKNOWN_ERROR")


@pytest.mark.parametrize("how", ["stream", "ainvoke"])
async def test_a_stream_that_breaks_off(how: str, local: Path) -> None:
    """A stream that the server breaks off is an error, with the text so far, also where the model reads it itself."""

    async def ask(model: Any) -> None:
        list(model.stream("Hi")) if how == "stream" else await model.ainvoke("Hi")

    server = ScriptedOpenAI(Reply("One two three", cut_after=3))
    with server, traced("root"), pytest.raises(Exception, match=r"Connection error|closed connection") as caught:
        await ask(chat(server, streaming=True))
    (call,) = calls(local)
    assert (call["status"], call["error"]) == ("error", f"{type(caught.value).__name__}: {caught.value}")
    assert call["output"]["messages"][0]["content"] == [{"type": "text", "text": "One two"}]


# Retries, fallbacks, cache.


async def test_attempts_are_numbered(local: Path) -> None:
    """Attempts of `with_retry` are a request each, numbered, also when what is retried is a chain."""
    refused = ApiError(503)
    retry = {"stop_after_attempt": 3, "wait_exponential_jitter": False}
    with ScriptedOpenAI([refused, refused, Reply("Yes.")] * 4) as server, traced("root"):
        chat(server).with_retry(**retry).invoke("Hi")
        await chat(server).with_retry(**retry).ainvoke("Hi")
        joke(server).with_retry(**retry).invoke({"topic": "cats"})
        await joke(server).with_retry(**retry).ainvoke({"topic": "cats"})
    found = [(call["attempt"], call["status"]) for call in calls(local)]
    assert found == [(1, "error"), (2, "error"), (3, "ok")] * 4
    assert all(call["request_tags"] == [] for call in calls(local))


def test_a_fallback(local: Path) -> None:
    """With a fallback, both models' calls are there, the failed and the good one, numbered as attempts."""
    with ScriptedOpenAI([ApiError(500), Reply("Yes.")]) as server, traced("root"):
        assert chat(server, model="a").with_fallbacks([chat(server, model="b")]).invoke("Hi").content == "Yes."
    assert [(call["model"], call["status"], call["attempt"]) for call in calls(local)] == [
        ("a", "error", 1), ("b", "ok", 2),
    ]  # fmt: skip
    assert tree(local) == ("root block\n  RunnableWithFallbacks chain\n    ChatOpenAI llm\n    ChatOpenAI llm error\n")


def _retried_fallback(server: ScriptedOpenAI) -> Any:
    return joke(server).with_fallbacks([_retried(joke(server))]).with_config(run_name="jokes")


async def _invoked(runnable: Any) -> None:
    runnable.invoke({"topic": "cats"})


async def _ainvoked(runnable: Any) -> None:
    await runnable.ainvoke({"topic": "cats"})


async def _streamed(runnable: Any) -> None:
    assert list(runnable.stream({"topic": "cats"}))


async def _astreamed(runnable: Any) -> None:
    assert [piece async for piece in runnable.astream({"topic": "cats"})]


@pytest.mark.parametrize("way", [_invoked, _ainvoked])
async def test_a_retry_in_a_fallback(way: Callable[[Any], Awaitable[None]], local: Path) -> None:
    """A retry of what was fallen back to is an attempt more."""
    with ScriptedOpenAI([ApiError(500)] * 2 + ["Yes."]) as server, traced("root"):
        await way(_retried_fallback(server))
    assert [(call["attempt"], call["status"]) for call in calls(local)] == [(1, "error"), (2, "error"), (3, "ok")]


def _retried(runnable: Any, attempts: int = 2) -> Any:
    return runnable.with_retry(stop_after_attempt=attempts, wait_exponential_jitter=False)


@pytest.mark.parametrize("given", ["Hi", [("user", "Hi")], [{"role": "user", "content": "Hi"}], [HumanMessage("Hi")]])
@pytest.mark.parametrize(
    "nested",
    [
        lambda a, b: _retried(a).with_fallbacks([_retried(b)]),
        lambda a, b: _retried(_retried(a)),
        lambda a, b: a.with_fallbacks([_retried(b, 3)]),
        lambda a, b: _retried(a, 3).with_fallbacks([b]),
        lambda a, b: _retried(a.with_fallbacks([b])),
        lambda a, b: a.with_fallbacks([b]).with_fallbacks([b.with_fallbacks([a])]),
    ],
)
def test_nested_attempts_rise(nested: Callable[[Any, Any], Any], given: Any, local: Path) -> None:
    """However retries and fallbacks are nested, each attempt has a number of its own, in their order."""
    with ScriptedOpenAI([ApiError(500)] * 3 + ["Yes."]) as server, traced("root"):
        nested(chat(server, model="a"), chat(server, model="b")).invoke(given)
    assert [(call["attempt"], call["status"]) for call in calls(local)] == [
        (1, "error"), (2, "error"), (3, "error"), (4, "ok"),
    ]  # fmt: skip


def test_attempts_after_a_success(local: Path) -> None:
    """An attempt that follows on one that went well, in a chain that was then tried again, has a number of its own."""
    with ScriptedOpenAI([ApiError(500), "Yes.", "Yes."]) as server, traced("root"):
        model = chat(server)

        def twice(text: str) -> str:
            with contextlib.suppress(Exception):
                return str(model.invoke(text).content)
            model.invoke(text)
            raise ValueError(text)

        _retried(RunnableLambda(twice)).invoke("Hi")
    assert [call["attempt"] for call in calls(local)] == [1, 2, 3]


@pytest.mark.parametrize("way", [_streamed, _astreamed])
async def test_a_fallback_of_a_stream(way: Callable[[Any], Awaitable[None]], local: Path) -> None:
    """A stream that falls back is numbered too."""
    with ScriptedOpenAI([ApiError(500)] * 2 + ["Yes."]) as server, traced("root"):
        await way(joke(server).with_fallbacks([joke(server), joke(server)]))
    assert [(call["attempt"], call["status"]) for call in calls(local)] == [(1, "error"), (2, "error"), (3, "ok")]


def test_a_retry_by_hand(local: Path) -> None:
    """Who asks the same again in the same block makes a further attempt; who asks something else doesn't."""
    with ScriptedOpenAI([ApiError(500)] * 2 + ["Yes.", "No."]) as server, traced("root"):
        for text in ("Hi", "Hi", "Hi", "Ho"):
            with contextlib.suppress(Exception):
                chat(server).invoke(text)
    assert [call["attempt"] for call in calls(local)] == [1, 2, 3, 1]


def _in_a_call(ask: Callable[[str], Any], text: str) -> Any:
    return traced(ask)(text)


def _in_a_block(ask: Callable[[str], Any], text: str) -> Any:
    with traced("try"):
        return ask(text)


def _in_both(ask: Callable[[str], Any], text: str) -> Any:
    with traced("try"):
        return traced(ask)(text)


def _in_a_task(ask: Callable[[str], Any], text: str) -> Any:
    @traced
    async def asked() -> Any:
        return ask(text)

    return asyncio.run(asked())


@pytest.mark.parametrize("try_", [_in_a_call, _in_a_block, _in_both, _in_a_task])
@pytest.mark.parametrize("is_chain", [False, True])
def test_a_retry_by_hand_around_a_block(try_: Callable[..., Any], is_chain: bool, local: Path) -> None:
    """Who makes a block or a decorated call that failed again makes a further attempt at what was asked in it."""
    with ScriptedOpenAI([ApiError(500)] * 2 + ["Yes.", "No."]) as server, traced("root"):

        def ask(text: str) -> Any:
            return joke(server).invoke({"topic": text}) if is_chain else chat(server).invoke(text)

        for text in ("Hi", "Hi", "Hi", "Ho"):
            with contextlib.suppress(Exception):
                try_(ask, text)
    assert [call["attempt"] for call in calls(local)] == [1, 2, 3, 1]


def test_what_follows_on_a_block_that_went_well(local: Path) -> None:
    """Who asks the same again after a block that dealt with its failure makes no further attempt."""
    with ScriptedOpenAI([ApiError(500), "Yes."]) as server, traced("root"):
        with traced("first"), contextlib.suppress(Exception):
            chat(server).invoke("Hi")
        with traced("second"):
            chat(server).invoke("Hi")
    assert [call["attempt"] for call in calls(local)] == [1, 1]


def test_a_retry_of_a_decorated_chain(local: Path) -> None:
    """Retries by hand in a decorated function that is retried in turn are numbered through."""
    with ScriptedOpenAI([ApiError(500)] * 3 + ["Yes."]) as server, traced("root"):

        @traced
        def ask(text: str) -> Any:
            return chat(server).invoke(text)

        @traced
        def twice(text: str) -> Any:
            try:
                return ask(text)
            except Exception:
                return ask(text)

        _retried(RunnableLambda(twice)).invoke("Hi")
    assert [call["attempt"] for call in calls(local)] == [1, 2, 3, 4]


def test_a_fallback_that_is_told_why(local: Path) -> None:
    """A fallback that is given the exception too is numbered as any other."""
    with ScriptedOpenAI([ApiError(500)] * 2 + ["Yes."]) as server, traced("root"):
        fallbacks = [joke(server), joke(server)]
        joke(server).with_fallbacks(fallbacks, exception_key="why").invoke({"topic": "cats"})
    assert [call["attempt"] for call in calls(local)] == [1, 2, 3]


@recent_agents
def test_an_agents_fallback(local: Path) -> None:
    """An agent's fallback to another model is numbered."""
    middleware = pytest.importorskip("langchain.agents.middleware")
    with ScriptedOpenAI([ApiError(500), "Yes."]) as server, traced("root"):
        fallback = middleware.ModelFallbackMiddleware(chat(server, model="b"))
        create_agent(chat(server, model="a"), middleware=[fallback]).invoke({"messages": [("user", "Hi")]})
    assert [(call["model"], call["attempt"]) for call in calls(local)] == [("a", 1), ("b", 2)]


def test_branches_are_no_attempts(local: Path) -> None:
    """Branches are given the same and may fail, one after the other: each is the first attempt of its own."""
    with ScriptedOpenAI([ApiError(500), "Yes."]) as server:
        both = RunnableParallel(a=chat(server), b=chat(server))
        with traced("root"), pytest.raises(Exception, match="500"):
            both.invoke("Hi", {"max_concurrency": 1})
    assert [call["attempt"] for call in calls(local)] == [1, 1]


async def test_a_cache_hit(local: Path) -> None:
    """A call that LangChain's cache answers is marked, and its tokens aren't counted again; the first call's are."""
    with ScriptedOpenAI([Reply("Once.", usage=(10, 5))]) as server, traced("root") as root:
        model = chat(server, cache=InMemoryCache())
        model.invoke("Hi")
        model.invoke("Hi")
        await model.ainvoke("Hi")
    first, *hits = calls(local)
    assert root.usage[:4] == (3, 0, 10, 5)
    assert (first["cached"], first["input_tokens"], first["output_tokens"]) == (False, 10, 5)
    assert [(hit["cached"], hit["input_tokens"], hit["output_tokens"]) for hit in hits] == [(True, None, None)] * 2
    assert hits[0]["output"]["messages"][0]["content"][0]["text"] == "Once."


# Contexts.


def test_a_lost_context_finds_its_parents_scope(local: Path, llm: ScriptedOpenAI) -> None:
    """A run in a bare thread that was handed the `config` is its parent's child, with the scope of its parent."""
    model = chat(llm)

    def in_a_thread(text: str, config: RunnableConfig) -> None:
        thread = threading.Thread(target=model.invoke, args=(text, config))
        thread.start()
        thread.join()

    seen: list[Any] = []
    with traced("root", tags=["t"], metadata={"k": "v"}, on_request=seen.append) as root:
        RunnableLambda(in_a_thread).invoke("Hi")
    assert tree(local) == "root block\n  in_a_thread chain\n    ChatOpenAI llm\n"
    (call,) = calls(local)
    assert (call["request_tags"], said(call["request_metadata"])) == (["t"], {"k": "v"})
    assert [request.span_id for request in root.requests] == [request.span_id for request in seen]


def test_a_traced_function_finds_its_parents_scope(local: Path, llm: ScriptedOpenAI) -> None:
    """So does a traced function there: it is a child of the run, with the tags of the block around that."""

    @traced("helper", tags=["helper"])
    def helper(text: str) -> object:
        return chat(llm).invoke(text)

    def node(text: str, config: RunnableConfig) -> None:
        thread = threading.Thread(target=lambda: RunnableLambda(helper).invoke(text, config=config))
        thread.start()
        thread.join()

    with traced("root", tags=["root"]):
        RunnableLambda(node).with_config(run_name="outer").invoke("Hi")
    assert tree(local) == (
        "root block\n  outer chain\n    helper chain\n      helper function\n        ChatOpenAI llm\n"
    )
    (call,) = calls(local)
    assert call["request_tags"] == ["root", "helper"]


def test_a_config_is_handed_to_a_traced_function(local: Path, llm: ScriptedOpenAI) -> None:
    """What a traced function in a bare thread does with the `config` is in the parent's trace, with the scope of both.

    It counts as if the function were in there.
    """
    seen: list[str] = []

    @traced(
        "helper", tags=["helper", "both"], metadata={"who": "helper", "helper": "h"}, user="Eve", capture="outputs",
        on_request=lambda _: seen.append("helper"),
    )  # fmt: skip
    def helper(text: str, config: RunnableConfig) -> Any:
        (RunnableLambda(str) | chat(llm)).invoke(text, config=config)
        return pltrace.current_span()

    def node(text: str, config: RunnableConfig) -> Any:
        with ThreadPoolExecutor() as executor:
            return executor.submit(helper, text, config).result()

    with traced(
        "root", tags=["both", "root"], metadata={"who": "root", "root": "r"}, user="Ann", session="S",
        on_request=lambda _: seen.append("root"),
    ) as root:  # fmt: skip
        helped = RunnableLambda(node).invoke("Hi")
    assert pltrace.flush()
    assert tree(local) == (
        "helper function\nroot block\n  node chain\n    RunnableSequence chain\n      ChatOpenAI llm\n      str chain\n"
    )
    (call,) = calls(local)
    assert call["request_tags"] == ["both", "root", "helper"]
    assert said(call["request_metadata"]) == {
        "who": "helper", "root": "r", "helper": "h", "user_id": "Eve", "conversation_id": "S",
    }  # fmt: skip
    assert (call["input"]["messages"], seen) == ([], ["helper", "root"])
    assert [len(span.requests) for span in (root, helped)] == [root.usage.requests, helped.usage.requests] == [1, 1]


@pytest.mark.parametrize("kept", ["root", "helper"])
def test_a_config_of_a_trace_that_is_sampled(kept: str, tmp_path: Path, llm: ScriptedOpenAI) -> None:
    """Whether such a call is recorded is decided at the root of the trace that it is in; it is counted anyway."""

    @traced("helper", sample=float(kept == "helper"))
    def helper(text: str, config: RunnableConfig) -> object:
        return chat(llm).invoke(text, config=config)

    def node(text: str, config: RunnableConfig) -> None:
        thread = threading.Thread(target=helper, args=(text, config))
        thread.start()
        thread.join()

    pltrace.configure(store=tmp_path / "traces.db")
    with traced("root", sample=float(kept == "root")) as root:
        RunnableLambda(node).invoke("Hi")
    assert root.usage.requests == 1
    assert pltrace.flush()
    assert [span["name"] for span in spans(tmp_path / "traces.db")] == (
        ["root", "node", "ChatOpenAI"] if kept == "root" else ["helper"]
    )


def test_a_config_of_another_block_of_the_same_trace(local: Path, llm: ScriptedOpenAI) -> None:
    """The same holds for a block beside that of the `config`, and for work that is done further out."""
    model, seen = chat(llm), list[Any]()

    def beside(config: RunnableConfig) -> None:
        with traced("beside", tags=["beside"]):
            model.invoke("Beside", config=config)
        model.invoke("Further out", config=config)

    with traced("root", tags=["root"]):
        bound = bind(beside)
        with traced("block", tags=["block"], on_request=seen.append) as block:

            def node(_: object, config: RunnableConfig) -> None:
                thread = threading.Thread(target=bound, args=(config,))
                thread.start()
                thread.join()

            RunnableLambda(node).invoke("Hi")
    assert [call["request_tags"] for call in calls(local)] == [["root", "block", "beside"], ["root", "block"]]
    assert (block.usage.requests, [request.id for request in seen]) == (2, [request.id for request in block.requests])


def test_a_traced_function_further_in(local: Path, llm: ScriptedOpenAI) -> None:
    """A traced function that runs in what was handed the `config` has the scope of both too, and blocks in it."""

    @traced("step", tags=["step"])
    def step(text: str) -> object:
        with traced("block"):
            return chat(llm).invoke(text)

    @traced("helper", tags=["helper"])
    def helper(text: str, config: RunnableConfig) -> Any:
        RunnableLambda(step).invoke(text, config=config)
        return pltrace.current_span()

    def node(text: str, config: RunnableConfig) -> Any:
        with ThreadPoolExecutor() as executor:
            return executor.submit(helper, text, config).result()

    seen: list[Any] = []
    with traced("root", tags=["root"], session="S", on_request=seen.append) as root:
        helped = RunnableLambda(node).invoke("Hi")
    assert tree(local) == (
        "helper function\nroot block\n  node chain\n"
        "    step chain\n      step function\n        block block\n          ChatOpenAI llm\n"
    )
    (call,) = calls(local)
    assert call["request_tags"] == ["root", "helper", "step"]
    assert said(call["request_metadata"]) == {"conversation_id": "S"}
    assert [request.span_id for request in seen] == [call["span_id"]]
    assert (root.usage.requests, helped.usage.requests) == (1, 1)


@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_traced_function_inside_a_retriever(local: Path, way: str) -> None:
    """A traced function that a retriever calls is its child, though LangChain sets no context there."""

    @traced("look up")
    def look_up(query: str) -> list[Document]:
        return [Document(query)]

    class Library(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return look_up(query)

        async def _aget_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return look_up(query)

    with traced("root"):
        if way == "invoke":
            Library().invoke("Hi")
        else:
            await Library().ainvoke("Hi")
        look_up("Hi")
    assert tree(local) == ("root block\n  Library retriever\n    look up function\n  look up function\n")


class OwnModel(FakeListChatModel):
    """A model whose own code is traced."""

    @traced("own code")
    def _generate(self, *args: Any, **settings: Any) -> Any:
        return super()._generate(*args, **settings)

    @traced("own code")
    async def _agenerate(self, *args: Any, **settings: Any) -> Any:
        await asyncio.sleep(0)
        return super()._generate(*args, **settings)

    @traced("own code")
    def _stream(self, *args: Any, **settings: Any) -> Iterator[Any]:
        yield from super()._stream(*args, **settings)

    @traced("own code")
    async def _astream(self, *args: Any, **settings: Any) -> AsyncIterator[Any]:
        async for chunk in super()._astream(*args, **settings):
            yield chunk


class OwnCompletion(FakeListLLM):
    """A completion model whose own code is traced."""

    @traced("own code")
    def _call(self, *args: Any, **settings: Any) -> str:
        return super()._call(*args, **settings)

    @traced("own code")
    async def _acall(self, *args: Any, **settings: Any) -> str:
        await asyncio.sleep(0)
        return super()._call(*args, **settings)


@pytest.mark.parametrize("kind", [OwnModel, OwnCompletion])
@pytest.mark.parametrize("way", ["invoke", "ainvoke"])
async def test_a_traced_function_inside_a_model(local: Path, way: str, kind: Any) -> None:
    """A traced function that is a model's own code is its child, though LangChain sets no context there."""
    with traced("root"):
        if way == "ainvoke":
            await asyncio.gather(*[kind(responses=["Hello."], name="OwnModel").ainvoke("Hi") for _ in range(2)])
        else:
            for text in ("Hi", "Ho"):
                kind(responses=["Hello."], name="OwnModel").invoke(text)
    assert tree(local) == "root block\n" + "  OwnModel llm\n    own code function\n" * 2


@pytest.mark.parametrize("kind", [OwnModel, FakeListChatModel])
@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_block_beside_a_stream(local: Path, way: str, kind: Any) -> None:
    """What is done with each chunk of a stream isn't inside the model, whose own code is."""
    model = kind(responses=["Hm"])
    with traced("root"):
        if way == "stream":
            for _ in model.stream("Hi"):
                with traced("chunk"):
                    pass
        else:
            async for _ in model.astream("Hi"):
                with traced("chunk"):
                    pass
    own = "    own code function\n" if kind is OwnModel else ""
    chunks = "  chunk block\n" * 2
    assert tree(local) in (
        f"root block\n  {kind.__name__} llm\n{own}{chunks}", f"root block\n{chunks}  {kind.__name__} llm\n{own}"
    )  # fmt: skip


@pytest.mark.parametrize("way", ["stream", "astream"])
async def test_a_handler_of_a_streams_tokens(local: Path, way: str) -> None:
    """What a handler does with each token of a stream, the first one too, isn't inside the model."""

    class Handler(BaseCallbackHandler):
        run_inline = True

        def on_llm_new_token(self, *_: object, **__: object) -> None:
            with traced("token"):
                pass

    model, config = FakeListChatModel(responses=["Hm"]), RunnableConfig(callbacks=[Handler()])
    with traced("root"):
        if way == "stream":
            list(model.stream("Hi", config))
        else:
            async for _ in model.astream("Hi", config):
                pass
    assert tree(local) == "root block\n  FakeListChatModel llm\n" + "  token block\n" * 2


def test_what_else_runs_while_a_model_is_asked(local: Path) -> None:
    """What another thread or a handler does meanwhile isn't inside the model; nor what answers several prompts."""

    @traced("beside")
    def beside(*_: object) -> None:
        pass

    class Handler(BaseCallbackHandler):
        def on_llm_start(self, *_: object, **__: object) -> None:
            beside()

        def on_chat_model_start(self, *_: object, **__: object) -> None:
            beside()

    class Slow(FakeListChatModel):
        def _call(self, *args: Any, **settings: Any) -> str:
            with ThreadPoolExecutor() as executor:
                executor.submit(bind(beside)).result()
            return super()._call(*args, **settings)

    with traced("root"):
        Slow(responses=["Hello."]).invoke("Hi", config={"callbacks": [Handler()]})
        OwnCompletion(responses=["1", "2"]).generate(["One", "Two"])
    assert tree(local) == (
        "root block\n" + "  OwnCompletion llm\n" * 2 + "  Slow llm\n" + "  beside function\n" * 2
        + "  own code function\n" * 2
    )  # fmt: skip


def test_a_model_or_retriever_that_runs_a_chain(local: Path) -> None:
    """Traced code in a chain that a model's or retriever's own code runs is inside the chain, and that inside of it."""

    @traced("step")
    def step(text: object) -> object:
        return text

    class Router(FakeListChatModel):
        def _call(self, *args: Any, **settings: Any) -> str:
            RunnableLambda(step).with_config(run_name="chain").invoke(1)
            return str(OwnModel(responses=["Hello."]).invoke("Hi").content)

    class Deep(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            RunnableLambda(step).with_config(run_name="chain").invoke(1, config={"callbacks": run_manager.get_child()})
            return []

    with traced("root"):
        Router(responses=[]).invoke("Hi")
        Deep().invoke("Hi")
    # LangChain doesn't say what is called inside a model.
    assert tree(local) == (
        "root block\n  Deep retriever\n    chain chain\n      step function\n  OwnModel llm\n    own code function\n"
        "  Router llm\n  chain chain\n    step function\n"
    )


def test_a_lost_scope_is_told_once(local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """Calls in a thread that lost the scope are counted, and one warning names `bind`."""
    model = chat(llm)

    def work() -> None:
        model.invoke("Hi")
        joke(llm).invoke({"topic": "cats"})

    thread = threading.Thread(target=work, name="lonely")
    with caplog.at_level(logging.WARNING, "pltrace"), traced("root"):
        thread.start()
        thread.join()
    (record,) = [entry for entry in caplog.records if entry.name == "pltrace"]
    assert "pltrace.bind" in record.getMessage()
    assert "lonely" in record.getMessage()
    assert counts["runs_without_scope_in_threads"] == 2
    assert tree(local) == "root block\n"


def test_no_warning_where_nothing_is_lost(local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """Calls outside blocks are nothing to warn about in the main thread, nor in threads while no block is open."""
    model = chat(llm)
    opened, called = threading.Event(), threading.Event()

    def block_elsewhere() -> None:
        with traced():
            opened.set()
            called.wait(10)
            model.batch(["One", "Two"])

    with caplog.at_level(logging.WARNING, "pltrace"):
        alone = threading.Thread(target=model.invoke, args=("Hi",))
        alone.start()
        alone.join()
        elsewhere = threading.Thread(target=block_elsewhere)
        elsewhere.start()
        assert opened.wait(10)
        model.invoke("Hi")
        called.set()
        elsewhere.join()
    assert [entry for entry in caplog.records if entry.name == "pltrace"] == []
    assert counts["runs_without_scope"] == 2
    assert len(calls(local)) == 2


# Beside other handlers.


async def test_two_of_our_handlers_make_one_request(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """A call that the scope and two handed-over handlers see is one span and one request, with what all ask for."""
    deliver()
    ids: list[int] = []
    seen: list[Any] = []
    first = PromptLayerCallbackHandler(pl_id_callback=ids.append, pl_tags=["first"])
    second = PromptLayerCallbackHandler(pl_tags=["second"])
    with traced("root", tags=["scope"], on_request=seen.append):
        chat(llm, callbacks=[first]).invoke("Hi", config={"callbacks": [second]})
        await (RunnableLambda(str) | chat(llm, callbacks=[first])).ainvoke("Hi", config={"callbacks": [second]})
    assert await asyncio.to_thread(pltrace.flush, 10)
    assert [sorted(log["tags"]) for log in promptlayer.request_logs] == [["first", "scope", "second"]] * 2
    assert promptlayer.duplicate_request_logs == 0
    assert ids == [log["id"] for log in promptlayer.request_logs] == [int(request) for request in seen]
    assert len(promptlayer.spans) == 5
    assert counts["runs_merged"] == 6
    assert counts["runs_without_scope"] == 0


def test_a_handler_that_is_handed_over_is_not_without_scope(local: Path, llm: ScriptedOpenAI) -> None:
    """A call outside any block that a handler was handed to is recorded, so it counts as merged, not as missed."""
    chat(llm).invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler()]})
    assert len(calls(local)) == 1
    assert (counts["runs_merged"], counts["runs_without_scope"]) == (1, 0)


class _Notes:
    """Notes each event that a handler is called with, with what comes along."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def note(self, event: str, **options: Any) -> None:
        metadata = {key: value for key, value in (options.get("metadata") or {}).items() if key != "lc_versions"}
        parent = options.get("parent_run_id") is not None
        self.events.append((event, options.get("name"), parent, tuple(options.get("tags") or ()), metadata))


_EVENTS = (
    "on_chain_start", "on_chain_end", "on_chain_error", "on_llm_start", "on_chat_model_start", "on_llm_new_token",
    "on_llm_end", "on_llm_error", "on_tool_start", "on_tool_end", "on_tool_error", "on_retriever_start",
    "on_retriever_end", "on_retriever_error", "on_text", "on_retry", "on_custom_event",
)  # fmt: skip


def _sync_event(event: str) -> Callable[..., None]:
    def on_event(self: Any, *_: Any, **options: Any) -> None:
        self.notes.note(event, **options)

    return on_event


def _async_event(event: str) -> Callable[..., Awaitable[None]]:
    async def on_event(self: Any, *_: Any, **options: Any) -> None:
        self.notes.note(event, **options)

    return on_event


class _WithNotes:
    def __init__(self, notes: _Notes) -> None:
        self.notes = notes


_SYNC: Any = type("_SYNC", (_WithNotes, BaseCallbackHandler), {event: _sync_event(event) for event in _EVENTS})
_INLINE: Any = type("_INLINE", (_SYNC,), {"run_inline": True})
_ASYNC: Any = type("_ASYNC", (_WithNotes, AsyncCallbackHandler), {event: _async_event(event) for event in _EVENTS})
_HANDLERS: dict[str, tuple[Any, ...]] = {
    "sync": (_SYNC,),
    "inline": (_INLINE,),
    "async": (_ASYNC,),
    "two sync": (_SYNC, _SYNC),
    "sync and inline": (_SYNC, _INLINE),
    "inline and async": (_INLINE, _ASYNC),
}


async def _everything(server: ScriptedOpenAI, config: RunnableConfig) -> None:
    """Runs each kind of thing in each way, one after the other."""
    topic = {"topic": "cats"}
    joke(server).invoke(topic, config)
    await joke(server).ainvoke(topic, config)
    "".join(joke(server).stream(topic, config))
    "".join([piece async for piece in joke(server).astream(topic, config)])
    completion(server).invoke("Once", config)
    await completion(server).ainvoke("Once", config)
    async for _ in completion(server).astream("Once", config):
        pass
    weather.invoke({"city": "Rome"}, config)
    await weather.ainvoke({"city": "Rome"}, config)
    for ask in (weather.invoke, RunnableLambda(weather.invoke).invoke):
        with pytest.raises(LookupError):
            ask({"city": "Atlantis"}, config)
    with pytest.raises(LookupError):
        await weather.ainvoke({"city": "Atlantis"}, config)
    Library().invoke("cats", config)
    await Library().ainvoke("cats", config)


@pytest.mark.parametrize("kinds", _HANDLERS)
async def test_other_handlers_see_what_they_would_see_without_us(
    kinds: str, llm: ScriptedOpenAI, tmp_path: Path
) -> None:
    """Handlers of others, inline or not, async or not, get the same events with the same names, tags and metadata."""

    async def events_of_each() -> list[list[tuple[Any, ...]]]:
        handlers = [kind(_Notes()) for kind in _HANDLERS[kinds]]
        await _everything(llm, {"callbacks": list(handlers), "tags": ["mine"], "metadata": {"my": "own"}})
        return [handler.notes.events for handler in handlers]

    pltrace.configure(enabled=False)
    without = await events_of_each()
    pltrace.configure(store=tmp_path / "traces.db")
    outside = await events_of_each()
    with traced("root", tags=["t"], metadata={"k": "v"}):
        inside = await events_of_each()
    assert outside == without
    assert inside == without
    assert all(len(events) > 50 for events in without)
    assert len(calls(tmp_path / "traces.db")) == 7


async def test_a_handler_that_raises_changes_nothing_for_ours(local: Path, llm: ScriptedOpenAI) -> None:
    """What another handler raises doesn't keep the call from being recorded."""

    class Broken(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        def on_llm_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

    with traced("root"):
        chat(llm).invoke("Hi", config={"callbacks": [Broken()]})
        await chat(llm).ainvoke("Hi", config={"callbacks": [Broken()]})
    assert tree(local) == "root block\n" + "  ChatOpenAI llm\n" * 2
