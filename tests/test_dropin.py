"""Programs that handed LangChain's former PromptLayer handler to their calls go on as they are."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

import pltrace
from pltrace import ConfigError, PromptLayerCallbackHandler, traced
from pltrace._runs import open_runs
from tests.support.programs import surroundings
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import calls, chat, completion, tree

Deliver = Callable[..., None]
Use = Callable[[ScriptedOpenAI, PromptLayerCallbackHandler], Awaitable[object]]


async def _in_the_model(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    assert chat(server, callbacks=[handler]).invoke("Hi").content == "Hello."


async def _in_the_model_async(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    assert (await chat(server, callbacks=[handler]).ainvoke("Hi")).content == "Hello."


async def _in_the_config(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    chat(server).invoke("Hi", config={"callbacks": [handler]})


async def _in_the_config_async(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    await chat(server).ainvoke("Hi", config={"callbacks": [handler]})


async def _in_a_chains_config(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    chain = RunnableLambda(str) | chat(server) | StrOutputParser()
    assert chain.invoke("Hi", config={"callbacks": [handler]}) == "Hello."


async def _in_a_chains_config_async(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    await (RunnableLambda(str) | chat(server)).ainvoke("Hi", config={"callbacks": [handler]})


async def _with_callbacks(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    chat(server).with_config(callbacks=[handler]).invoke("Hi")


async def _streamed(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    assert "".join(str(piece.content) for piece in chat(server, callbacks=[handler]).stream("Hi")) == "Hello."


async def _completion(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    assert completion(server, callbacks=[handler]).invoke("Hi") == "Hello."


async def _completion_async(server: ScriptedOpenAI, handler: PromptLayerCallbackHandler) -> None:
    assert await completion(server, callbacks=[handler]).ainvoke("Hi") == "Hello."


@pytest.mark.parametrize("use", [
    _in_the_model, _in_the_model_async, _in_the_config, _in_the_config_async, _in_a_chains_config,
    _in_a_chains_config_async, _with_callbacks, _streamed, _completion, _completion_async,
])  # fmt: skip
async def test_handed_over_anywhere(
    use: Use, deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Wherever it is handed over, without any block: the call is logged once, with the tags, and its id comes back."""
    deliver()
    ids: list[int] = []
    handler = PromptLayerCallbackHandler(pl_id_callback=ids.append, pl_tags=["langchain", "chat"])
    await use(llm, handler)
    assert await asyncio.to_thread(pltrace.flush, 10)
    (log,) = promptlayer.request_logs
    assert ids == [log["id"]]
    assert type(ids[0]) is int
    assert log["tags"] == ["langchain", "chat"]
    assert (log["provider"], log["model"], log["status"]) == ("openai", "tiny", "SUCCESS")
    assert open_runs == {}


def test_the_metadata_keys_of_the_former_handler(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Requests carry `_langchain_run_id`, `_langchain_parent_run_id` and `_langchain_tags`, as strings."""
    deliver()
    chain = ChatPromptTemplate.from_template("{x}") | chat(llm)
    message = chain.invoke(
        {"x": "Hi"},
        config={"callbacks": [PromptLayerCallbackHandler()], "tags": ["mine"], "metadata": {"my": "own"}},
    )
    chat(llm).invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler()]})
    assert pltrace.flush(10)
    chained, alone = (log["metadata"] for log in promptlayer.request_logs)
    assert chained["my"] == "own"
    assert f"lc_run--{chained['_langchain_run_id']}-0" == message.id
    assert len(chained["_langchain_parent_run_id"]) == 36
    assert chained["_langchain_tags"] == "['seq:step:2', 'mine']"
    assert (alone["_langchain_parent_run_id"], alone["_langchain_tags"]) == ("None", "[]")


def test_the_metadata_keys_of_ids_that_are_texts(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """A run's id that is a text, a UUID's or any, stands in the metadata as what it says."""
    deliver()
    run_id = str(uuid4())
    model: Any = chat(llm)
    model.invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler()], "run_id": run_id})
    chain: Any = ChatPromptTemplate.from_template("{x}") | model
    chain.invoke({"x": "Hi"}, config={"callbacks": [PromptLayerCallbackHandler()], "run_id": 'job "7"'})
    assert pltrace.flush(10)
    alone, chained = (log["metadata"] for log in promptlayer.request_logs)
    assert alone["_langchain_run_id"] == run_id
    assert chained["_langchain_parent_run_id"] == 'job "7"'


def test_the_tree_of_a_chain(local: Path, llm: ScriptedOpenAI) -> None:
    """Handed to a chain, each run in it is a span of one trace; calls without the handler stay unrecorded."""
    handler = PromptLayerCallbackHandler()
    chain = ChatPromptTemplate.from_template("{x}") | chat(llm) | StrOutputParser()
    chain.invoke({"x": 1}, config={"callbacks": [handler]})
    chain.invoke({"x": 2})
    assert tree(local) == (
        "RunnableSequence chain\n  ChatOpenAI llm\n  ChatPromptTemplate prompt\n  StrOutputParser parser\n"
    )


def test_inside_and_around_blocks(local: Path, llm: ScriptedOpenAI) -> None:
    """Beside blocks it adds its tags and callback to theirs: a block inside a chain that was handed one nests in it."""
    ids: list[int] = []
    handler = PromptLayerCallbackHandler(pl_id_callback=ids.append, pl_tags=["handler"])

    def inside(text: str) -> Any:
        with traced("inside", tags=["inside"]):
            return chat(llm).invoke(text)

    with traced("around", tags=["around"]) as around:
        RunnableLambda(inside).invoke("Hi", config={"callbacks": [handler]})
    assert tree(local) == "around block\n  inside chain\n    inside block\n      ChatOpenAI llm\n"
    (call,) = calls(local)
    assert sorted(call["request_tags"]) == ["around", "handler", "inside"]
    assert ids == [call["request_id"]]
    assert [request.id for request in around.requests] == ids


def test_a_tools_own_handler(local: Path, llm: ScriptedOpenAI) -> None:
    """One that a tool was given for itself adds nothing to what the tool calls."""

    @tool
    def look_up(word: str) -> str:
        """Look something up."""
        return str(chat(llm).invoke(word).content)

    look_up.callbacks = [PromptLayerCallbackHandler(pl_tags=["tool"])]
    with traced("root", tags=["root"]):
        look_up.invoke({"word": "Hi"})
    assert tree(local) == "root block\n  look_up tool\n    ChatOpenAI llm\n"
    assert calls(local)[0]["request_tags"] == ["root"]


def test_two_calls_with_two_handlers(local: Path, llm: ScriptedOpenAI) -> None:
    """Each handler gets the ids of the calls that it was handed to, and of no other."""
    first: list[int] = []
    second: list[int] = []
    chat(llm).invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler(first.append)]})
    chat(llm).invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler(second.append)]})
    assert pltrace.flush(10)
    assert (first, second) == ([1], [2])


def test_what_the_callback_raises(local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """What `pl_id_callback` raises is logged, and the call is none the wiser."""

    def broken(_: int) -> None:
        raise ValueError("broken")

    with caplog.at_level(logging.ERROR, "pltrace"):
        assert chat(llm, callbacks=[PromptLayerCallbackHandler(broken)]).invoke("Hi").content == "Hello."
        assert pltrace.flush(10)
    assert len([entry for entry in caplog.records if entry.name == "pltrace"]) == 1


def test_sampling_holds_for_it(tmp_path: Path, llm: ScriptedOpenAI) -> None:
    """The application's share of traces holds for calls outside blocks too, a trace at a time."""
    path = tmp_path / "traces.db"
    pltrace.configure(store=path, sample=0.0)
    ids: list[int] = []
    chain = RunnableLambda(str) | chat(llm)
    assert chain.invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler(ids.append)]}).content == "Hello."
    assert (calls(path), ids) == ([], [])


def test_nothing_while_it_is_off(llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """While nobody switched tracing on, the handler changes nothing, writes nothing and calls nobody."""
    ids: list[int] = []
    handler = PromptLayerCallbackHandler(ids.append, ["t"])
    assert chat(llm, callbacks=[handler]).invoke("Hi").content == "Hello."
    assert pltrace.flush(10)
    assert ids == []
    assert list(tmp_path.iterdir()) == []


_FORMER_PROGRAM = """
import json, sys
from langchain_openai import ChatOpenAI
from pltrace import PromptLayerCallbackHandler

ids = []
handler = PromptLayerCallbackHandler(pl_id_callback=ids.append, pl_tags=["chatopenai"])
chat = ChatOpenAI(base_url=sys.argv[1], api_key="none", model="tiny", callbacks=[handler])
chat.invoke("What comes after 1,2,3?")
import pltrace
pltrace.flush(10)
print(json.dumps(ids))
"""


def test_the_documented_program(promptlayer: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """The program of PromptLayer's documentation needs nothing but another import: the environment has the key."""
    environment = surroundings(
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
        PLTRACE_STORE=tmp_path / "traces.db",
    )
    command = [sys.executable, "-c", _FORMER_PROGRAM, llm.base_url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (log,) = promptlayer.request_logs
    assert json.loads(done.stdout) == [log["id"]]
    assert log["tags"] == ["chatopenai"]


@pytest.mark.parametrize("wrong", ["chat", [1], [""], 5])
def test_wrong_tags_are_refused(wrong: Any) -> None:
    """Tags that aren't strings in a list raise `ConfigError` where they are written."""
    with pytest.raises(ConfigError, match="pl_tags"):
        PromptLayerCallbackHandler(pl_tags=wrong)


def test_a_traced_function_inside_its_run(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """With no block around it, a handler's run is what a traced function inside is in: one trace, all tags and ids."""
    deliver()
    told: list[tuple[str, int]] = []
    handler = PromptLayerCallbackHandler(pl_tags=["old"], pl_id_callback=lambda number: told.append(("old", number)))

    @traced("answer", tags=["new"], user="ada", on_request=lambda request: told.append(("new", int(request))))
    def answer(text: str) -> str:
        return str(chat(llm).invoke(text).content)

    assert (
        RunnableLambda(answer).with_config(run_name="chain").invoke("Hi", config={"callbacks": [handler]}) == "Hello."
    )
    assert pltrace.flush(10.0)
    assert promptlayer.tree() == [("chain", [("answer", [("ChatOpenAI", [])])])]
    (log,) = promptlayer.request_logs
    assert log["tags"] == ["old", "new"]
    assert log["metadata"]["user_id"] == "ada"
    assert sorted(told) == [("new", log["id"]), ("old", log["id"])]


def test_sampling_is_decided_by_the_run_around(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is sampled is whole: a traced function inside a handler's run is kept with it, or not at all."""
    deliver(sample=0.5)
    inner = RunnableLambda(traced("inner")(lambda text: text)).with_config(run_name="chain")
    for _ in range(40):
        inner.invoke("Hi", config={"callbacks": [PromptLayerCallbackHandler()]})
    assert pltrace.flush(10.0)
    assert 0 < len(promptlayer.spans) < 80
    assert all(branch == ("chain", [("inner", [])]) for branch in promptlayer.tree())
