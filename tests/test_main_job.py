"""The main job, against a real model: say `traced` once, and every LLM call inside reaches PromptLayer once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Annotated, Any

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from pydantic import Field

import pltrace
from pltrace import traced
from pltrace._runs import open_runs
from tests.support.http_double import HANG, Fault, on
from tests.support.llm_server import LlamaServer
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ApiError, Reply, ScriptedOpenAI
from tests.support.traces import chat, drawn, said, timeout_of_its_own

Deliver = Callable[..., None]


@tool
def weather(city: Annotated[str, Field(max_length=6)]) -> str:
    """Tell the weather."""
    return f"It is sunny in {city}."


class Program:
    """A program as people write them; it hands nothing to anyone. `seen` has what `on_request` was told."""

    def __init__(self, server: LlamaServer) -> None:
        self.seen: list[tuple[str, int, str]] = []
        self.model = chat(server, max_tokens=4, stream_usage=True, timeout=timeout_of_its_own())
        self.forced = chat(server).bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
        self.chain = ChatPromptTemplate.from_template("{text}") | self.model | StrOutputParser()

    def note(self, who: str) -> Callable[[pltrace.Request], None]:
        """Makes an `on_request` that keeps what it is told."""
        return lambda request: self.seen.append((who, int(request), request.span_id))

    def run(self) -> None:
        """Does everything synchronous."""

        @traced("summarise", tags=["summary"], metadata={"step": "summary"})
        def summarise(text: str) -> str:
            return str(self.model.invoke(text).content)

        @traced(
            "answer", tags=["app", "answer"], metadata={"step": "answer", "team": "a"}, on_request=self.note("answer")
        )
        def answer(text: str) -> None:
            self.model.invoke(f"{text} directly")
            with traced("block", tags=["block"], metadata={"step": "block"}, on_request=self.note("block")):
                chained = (
                    RunnableLambda(lambda text: summarise(text)).with_config(run_name="helper") | StrOutputParser()
                )
                chained.invoke(f"{text} helped")
            "".join(self.chain.stream({"text": f"{text} streamed"}))
            self.chain.batch([{"text": f"{text} batch {number}"} for number in range(3)])
            (called,) = self.forced.invoke(f"{text} forced").tool_calls
            weather.invoke(called)

        answer("sync")

    async def arun(self) -> None:
        """Does everything asynchronous."""

        @traced("one", tags=["one"])
        async def one(number: int) -> None:
            with traced("numbered", metadata={"number": number}):
                await self.chain.ainvoke({"text": f"async {number}"})

        @traced("all", tags=["app"], metadata={"number": "none", "team": "b"}, on_request=self.note("all"))
        async def everything() -> None:
            await asyncio.gather(*(one(number) for number in range(20)))
            async for _ in self.chain.astream({"text": "async streamed"}):
                pass
            await self.chain.abatch([{"text": f"async batch {number}"} for number in range(2)])

        await everything()


_CHAIN = """\
  RunnableSequence chain
    ChatOpenAI llm
    ChatPromptTemplate prompt
    StrOutputParser parser
"""
_INDENTED = _CHAIN.replace("\n", "\n    ").rstrip(" ")
_SYNC_TREE = f"""\
answer function
  ChatOpenAI llm
  ChatOpenAI llm
{_CHAIN * 4}\
  Tool: weather tool
  block block
    RunnableSequence chain
      StrOutputParser parser
      helper chain
        summarise function
          ChatOpenAI llm
"""
_ASYNC_TREE = "all function\n" + _CHAIN * 3 + f"  one function\n    numbered block\n    {_INDENTED}" * 20


def delivered_tree(promptlayer: PromptLayerServer) -> str:
    """Gives PromptLayer's spans as a tree."""
    return drawn(
        {
            "span_id": span["context"]["span_id"],
            "parent_id": span["parent_id"],
            "name": span["name"],
            "kind": span["attributes"]["pltrace.kind"],
            "status": span["attributes"]["pltrace.status"],
        }
        for span in promptlayer.spans.values()
    )


def prompt_of(log: dict[str, Any]) -> str:
    """Gives the text of a logged prompt."""
    return str(log["input"]["messages"][0]["content"][0]["text"])


def _expected_logs() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Gives tags and metadata of each call by its prompt."""
    answer = (["app", "answer"], {"step": "answer", "team": "a"})
    everything = (["app"], {"number": "none", "team": "b"})
    expected = {f"sync {way}": answer for way in ("directly", "streamed", "batch 0", "batch 1", "batch 2", "forced")}
    expected["sync helped"] = (["app", "answer", "block", "summary"], {"step": "summary", "team": "a"})
    expected |= {f"async {way}": everything for way in ("streamed", "batch 0", "batch 1")}
    return expected | {
        f"async {number}": (["app", "one"], {"number": str(number), "team": "b"}) for number in range(20)
    }


def test_the_whole_program(deliver: Deliver, promptlayer: PromptLayerServer, llama: LlamaServer) -> None:
    """Each call arrives once, with the tags and metadata of all around it, its id told to all, in one tree a root."""
    deliver()
    program = Program(llama)
    program.run()
    asyncio.run(program.arun())
    assert pltrace.flush(20)

    logs = {prompt_of(log): log for log in promptlayer.request_logs}
    assert len(promptlayer.request_logs) == len(logs)
    assert promptlayer.duplicate_request_logs == 0
    assert {text: (log["tags"], said(log["metadata"])) for text, log in logs.items()} == _expected_logs()
    for log in logs.values():
        assert (log["provider"], log["model"], log["status"]) == ("openai", "tiny", "SUCCESS")
        assert log["input_tokens"] > 0
        assert log["output_tokens"] > 0

    everyone = {text: ["answer"] if text.startswith("sync") else ["all"] for text in logs}
    everyone["sync helped"] = ["block", "answer"]
    assert {
        text: [(who, number) for who, number, span_id in program.seen if span_id == log["span_id"]]
        for text, log in logs.items()
    } == {text: [(who, logs[text]["id"]) for who in told] for text, told in everyone.items()}

    assert delivered_tree(promptlayer) == _ASYNC_TREE + _SYNC_TREE
    roots = [span for span in promptlayer.spans.values() if span["parent_id"] is None]
    assert sorted(span["name"] for span in roots) == ["all", "answer"]
    assert {span["context"]["trace_id"] for span in promptlayer.spans.values()} == {
        span["context"]["trace_id"] for span in roots
    }
    assert open_runs == {}


def test_tool_calls_that_are_forced(deliver: Deliver, promptlayer: PromptLayerServer, llama: LlamaServer) -> None:
    """A forced tool call is logged with its tools and its call, whether it was invoked, awaited or streamed."""
    deliver()

    async def main() -> None:
        model = chat(llama).bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
        async with traced("root", tags=["t"]):
            assert model.invoke("Hi").tool_calls
            assert (await model.ainvoke("Hi")).tool_calls
            assert [piece async for piece in model.astream("Hi")]

    asyncio.run(main())
    assert pltrace.flush(10)
    assert len(promptlayer.request_logs) == 3
    for log in promptlayer.request_logs:
        (answer,) = log["output"]["messages"]
        assert answer["content"] == []
        assert [call["function"]["name"] for call in answer["tool_calls"]] == ["weather"]
        assert [offered["function"]["name"] for offered in log["input"]["tools"]] == ["weather"]
        assert log["tags"] == ["t"]


def test_sixty_calls_share_their_posts(deliver: Deliver, promptlayer: PromptLayerServer, llama: LlamaServer) -> None:
    """Sixty calls in a row take thirty posts at most, and each is there."""
    deliver()
    model = chat(llama, max_tokens=1)
    with traced("root"):
        for number in range(60):
            model.invoke(f"call {number}")
    assert pltrace.flush(20)
    assert sorted(map(prompt_of, promptlayer.request_logs)) == sorted(f"call {number}" for number in range(60))
    assert 1 <= len(promptlayer.posts) <= 30


def test_no_call_waits_for_promptlayer(deliver: Deliver, promptlayer: PromptLayerServer, llama: LlamaServer) -> None:
    """While PromptLayer hangs, calls go on; when it is back, all of them arrive, once."""
    deliver()
    model = chat(llama, max_tokens=1)
    promptlayer.faults.append(on("/spans-bulk", HANG, times=1))
    with traced("first"):
        model.invoke("call 0")
    promptlayer.wait_for(lambda: promptlayer.requests)
    with traced("root") as root:
        for number in range(1, 10):
            assert model.invoke(f"call {number}").content is not None
        root.score(50)
    assert (root.status, promptlayer.request_logs) == ("ok", [])
    promptlayer.release()
    assert pltrace.flush(20)
    assert sorted(map(prompt_of, promptlayer.request_logs)) == [f"call {number}" for number in range(10)]
    assert promptlayer.duplicate_request_logs == 0


_TROUBLES: dict[str, Fault | None] = {
    "nothing": None,
    "500": Fault(status=500),
    "401": Fault(status=401),
    "422": Fault(status=422),
    "garbage": Fault(status=201, body="<html>"),
    "closed": Fault(close=True),
    "hanging": HANG,
}


async def _app(server: ScriptedOpenAI, wrapped: Callable[..., Any], note: Callable[..., Any]) -> list[Any]:
    """Does what apps do, some of it in vain, and gives all that it sees."""
    seen: list[Any] = []
    model = chat(server)

    def attempt(run: Callable[[], Any]) -> None:
        try:
            seen.append(run())
        except Exception as error:
            context = (type(error.__cause__), type(error.__context__))
            seen.append((type(error), str(error), context))

    @wrapped("sync", on_request=note)
    def sync(text: str) -> str:
        return str(model.invoke(text).content)

    @wrapped("failing", on_request=note)
    def failing(text: str) -> str:
        raise ZeroDivisionError(text)

    @wrapped("coroutine", on_request=note)
    async def coroutine(text: str) -> str:
        return str((await model.ainvoke(text)).content)

    @wrapped("generator", on_request=note)
    def generator(text: str) -> Any:
        for piece in model.stream(text):
            yield piece.content

    attempt(lambda: sync("good"))
    attempt(lambda: sync("refused"))
    attempt(lambda: sync("limited"))
    attempt(lambda: failing("mine"))
    attempt(lambda: RunnableLambda(failing).invoke("chained"))
    attempt(lambda: list(generator("streamed")))
    seen.extend(await asyncio.gather(coroutine("good"), coroutine("good")))
    failed = await asyncio.gather(coroutine("refused"), return_exceptions=True)
    seen.extend((type(error), str(error)) for error in failed)
    return seen


def _answer(body: dict[str, Any]) -> Any:
    text = body["messages"][0]["content"]
    return {"refused": ApiError(400), "limited": ApiError(429)}.get(text, Reply(f"You said {text}."))


def _untraced(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function


@pytest.mark.parametrize("trouble", _TROUBLES)
def test_the_app_sees_what_it_would_see_without_us(
    trouble: str, deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors of the app, of `on_request` and of PromptLayer never change what the app gets, nor what it raises."""
    called: list[int] = []

    def broken(request: pltrace.Request) -> None:
        called.append(int(request))
        raise RuntimeError("broken callback")

    deliver()
    promptlayer.fault = _TROUBLES[trouble]
    with ScriptedOpenAI(_answer) as server, caplog.at_level(logging.CRITICAL, "pltrace"):
        without = asyncio.run(_app(server, _untraced, broken))
        inside = asyncio.run(_app(server, traced, broken))
        assert inside == without
        assert len(inside) == 9
        if trouble == "nothing":
            assert pltrace.flush(10)
            assert sorted(called) == sorted(log["id"] for log in promptlayer.request_logs)
            assert len(called) == 7
        else:
            pltrace.shutdown(0.1)
            assert called == []


def test_threads_of_ours_hold_nothing_up(deliver: Deliver, promptlayer: PromptLayerServer, llama: LlamaServer) -> None:
    """All that runs in the background is daemon threads of ours, so a program can always end."""
    deliver()
    with traced("root", on_request=lambda _: None):
        chat(llama, max_tokens=1).invoke("Hi")
    assert pltrace.flush(10)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("pltrace")]
    assert ours
    assert all(thread.daemon for thread in ours)
