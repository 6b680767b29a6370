"""A `Request` is a handle that works before its id exists; what is asked of it arrives once, in order."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda

import pltrace
from pltrace import ConfigError, ExportResult, PltraceError, StoredSpan, traced
from tests.support.http_double import Fault
from tests.support.programs import rows
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ApiError, Reply, ScriptedOpenAI
from tests.support.traces import calls, chat, said

Deliver = Callable[..., None]


@pytest.fixture
def held(promptlayer: PromptLayerServer) -> Callable[[], None]:
    """Make PromptLayer slow to answer; return what lets it go on."""
    promptlayer.fault = Fault(delay=60)

    def let_go() -> None:
        promptlayer.fault = None
        promptlayer.release()

    return let_go


def operations(promptlayer: PromptLayerServer) -> list[tuple[Any, ...]]:
    """Gives what was asked of requests, in the order it arrived, as (id, what, value)."""
    values = {"score": ("name", "score"), "metadata": ("metadata",), "prompt": ("prompt_name",), "group": ("group_id",)}
    return [
        (found["request_id"], found["op"], *(found.get(value) for value in values[found["op"]]))
        for found in promptlayer.operations
    ]


# The handle.


def test_a_handle_before_and_after_its_id(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """Before the id, a handle says None and waits; after it, `id`, `int()` and `wait()` all give PromptLayer's."""
    deliver()
    with traced("root") as root:
        chat(llm).invoke("Hi")
        (request,) = root.requests
    assert request.id is None
    assert request.wait(0.02) is None
    with pytest.raises(PltraceError, match=request.span_id):
        int(request)
    waited: list[int | None] = []
    threads = [threading.Thread(target=lambda: waited.append(request.wait(10))) for _ in range(3)]
    for thread in threads:
        thread.start()
    held()
    for thread in threads:
        thread.join()
    (log,) = promptlayer.request_logs
    assert waited == [log["id"]] * 3
    assert (request.id, int(request), request.wait(), request.wait(0)) == (log["id"],) * 4
    assert request is root.requests[0]
    assert (request.span_id, request.trace_id) == (log["span_id"], root.trace_id)


def test_what_a_handle_tells(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """A handle tells what was recorded of its call, also when it is asked for after the block."""
    deliver()
    with ScriptedOpenAI([Reply("Yes.", usage=(9, 3)), ApiError(500)]) as server:
        with traced("root", tags=["t"], metadata={"k": 1}, user="u") as root:
            chat(server, model="m").invoke("Hi")
            with pytest.raises(Exception, match="500"):
                chat(server, model="m").invoke("Hi")
        good, bad = root.requests
    assert [good.wait(10), bad.wait(10)] == [log["id"] for log in promptlayer.request_logs]
    assert (good.provider, good.model, good.status, good.error) == ("openai", "m", "ok", None)
    assert (good.input_tokens, good.output_tokens) == (9, 3)
    assert (good.tags, said(good.metadata)) == (("t",), {"k": "1", "user_id": "u"})
    assert good.input["messages"][0]["content"][0]["text"] == "Hi"
    assert good.output["messages"][0]["content"][0]["text"] == "Yes."
    assert good.latency_s is not None
    assert 0 < good.latency_s < 10
    assert (bad.status, bad.input_tokens) == ("error", None)
    assert "Error code: 500" in str(bad.error)


def test_a_handle_of_a_call_that_still_runs(local: Path) -> None:
    """While the call runs its handle is there already, and knows nothing yet; it can be scored."""
    seen: list[Any] = []

    def answer(_: Any) -> str:
        (request,) = root.requests
        seen.append((request, request.status, request.model, request.wait(0)))
        request.score(70)
        return "Done."

    with ScriptedOpenAI(answer) as server, traced("root") as root:
        chat(server).invoke("Hi")
    ((request, *known),) = seen
    assert known == [None, None, None]
    assert request.wait(10) == 1
    assert (request.status, request.model) == ("ok", "tiny")
    assert [operation["kind"] for operation in calls(local)[0]["operations"]] == ["score"]


def test_no_id_comes_after_the_shutdown(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """A `wait` ends with None when tracing is shut down, for who waits already and who waits later."""
    deliver()
    with traced("root") as root:
        chat(llm).invoke("Hi")
    (request,) = root.requests
    waited: list[int | None] = [0]
    thread = threading.Thread(target=lambda: waited.append(request.wait()))
    thread.start()
    pltrace.shutdown(0.05)
    thread.join(10)
    assert waited == [0, None]
    assert request.wait() is None


def test_nothing_waits_for_what_is_sampled_out(deliver: Deliver, llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """What is asked of a request that isn't recorded is dropped with it."""
    deliver()
    with traced("root", sample=0.0) as root:
        chat(llm).invoke("Hi")
    (request,) = root.requests
    request.score(5)
    with traced("recorded"):
        pass
    assert pltrace.flush(10)
    assert rows(tmp_path / "store" / "traces.db", "SELECT * FROM operations") == []


def test_no_id_comes_for_what_is_refused(deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A `wait` ends with None when PromptLayer refuses the call for what is in it; the others get their ids."""
    deliver()
    promptlayer.poison("ChatOpenAI".__eq__)
    with traced("root") as root:
        chat(llm).invoke("Hi")
        chat(llm).with_config(run_name="fine").invoke("Hi")
    refused, fine = root.requests
    assert fine.wait(10) == promptlayer.request_logs[0]["id"]
    assert refused.wait() is None
    del refused
    assert root.requests[0].wait() is None, "a handle that wasn't there to be told"


def test_what_another_exporter_refuses_still_gets_its_id(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """A further exporter that refuses a call has no say about its id, nor about who waits for it."""
    refused = threading.Event()

    class Picky:
        name = "picky"

        def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
            refused.set()
            return ExportResult("delivered", refused={span.record["span_id"]: "no" for span in batch})

        def shutdown(self) -> None:
            pass

    deliver(exporters=[Picky()])
    seen: list[int] = []
    with traced("root", on_request=lambda request: seen.append(int(request))) as root:
        chat(llm).invoke("Hi")
    (request,) = root.requests
    assert refused.wait(10)
    assert request.wait(0.1) is None
    held()
    assert request.wait(10) == promptlayer.request_logs[0]["id"]
    assert pltrace.flush(10)
    assert seen == [request.id]


# What is asked of a request.


def test_what_is_asked_arrives_in_order(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """Scores, metadata, prompt links and groups asked for before the id, and after, arrive once and in order."""
    deliver()
    promptlayer.add_prompt("greeting", "Hi", labels=["prod"])
    promptlayer.groups = 7
    with traced("root") as root:
        chat(llm).invoke("Hi")
    (request,) = root.requests
    request.score(90)
    request.score(10, "style")
    request.add_metadata({"a": "b", "n": 1, "deep": {"x": [1]}})
    request.link_prompt("greeting", version=1, input_variables={"who": "you"})
    request.link_prompt("greeting", label="prod")
    request.add_to_group(7)
    request.score(20, "style")
    assert promptlayer.operations == []
    held()
    assert pltrace.flush(10)
    request.score(0, "late")
    assert pltrace.flush(10)
    number = request.id
    assert operations(promptlayer) == [
        (number, "score", None, 90),
        (number, "score", "style", 10),
        (number, "metadata", {"a": "b", "n": "1", "deep": '{"x":[1]}'}),
        (number, "prompt", "greeting"),
        (number, "prompt", "greeting"),
        (number, "group", 7),
        (number, "score", "style", 20),
        (number, "score", "late", 0),
    ]
    linked = [found for found in promptlayer.operations if found["op"] == "prompt"]
    assert linked[0]["version"] == 1
    assert linked[0]["prompt_input_variables"] == {"who": "you"}
    assert linked[1]["label"] == "prod"


_WRONG: list[tuple[str, Callable[[Any], None]]] = [
    ("score=101", lambda request: request.score(101)),
    ("score=-1", lambda request: request.score(-1)),
    ("score=0.5", lambda request: request.score(0.5)),
    ("score=True", lambda request: request.score(True)),
    ("name=''", lambda request: request.score(1, "")),
    ("metadata='x'", lambda request: request.add_metadata("x")),
    ("metadata={1: 2}", lambda request: request.add_metadata({1: 2})),
    ("name=None", lambda request: request.link_prompt(None)),
    ("version='1'", lambda request: request.link_prompt("p", version="1")),
    ("version=0", lambda request: request.link_prompt("p", version=0)),
    ("label=1", lambda request: request.link_prompt("p", label=1)),
    ("input_variables=[]", lambda request: request.link_prompt("p", input_variables=[1])),
    ("group_id='7'", lambda request: request.add_to_group("7")),
]


@pytest.mark.parametrize(("told", "ask"), _WRONG)
def test_what_is_wrong_is_refused_at_once(
    told: str, ask: Callable[[Any], None], local: Path, llm: ScriptedOpenAI
) -> None:
    """A wrong argument raises `ConfigError` with its name, where it is written, and nothing is recorded of it."""
    with traced("root") as root:
        chat(llm).invoke("Hi")
    with pytest.raises(ConfigError, match=told.partition("=")[0]):
        ask(root.requests[0])
    with pytest.raises(ConfigError, match="score"):
        root.score(1000)
    assert calls(local)[0]["operations"] == []


# Span.score.


def test_a_spans_score_reaches_every_request_under_it(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """`Span.score` scores each request made under the span, before it and after it, exactly once, and no other."""
    deliver()
    model = chat(llm)

    @traced
    def helper() -> None:
        RunnableLambda(model.invoke).invoke("Hi")

    with traced("root"):
        model.invoke("beside")
        with traced("scored") as scored:
            model.invoke("before")
            helper()
            scored.score(80)
            helper()
            scored.score(30, "style")
            model.invoke("after")
        model.invoke("beside")
    held()
    assert pltrace.flush(10)
    scored.score(5, "late")
    assert pltrace.flush(10)
    ids = [int(request) for request in scored.requests]
    expected = [
        (number, "score", name, value) for number in ids for name, value in ((None, 80), ("style", 30), ("late", 5))
    ]
    assert len(ids) == 4
    assert sorted(operations(promptlayer), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("is_local", [False, True], ids=["promptlayer", "local"])
def test_a_spans_score_reaches_requests_in_another_trace(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path, is_local: bool
) -> None:
    """A block's calls under a `config` of another trace are scored with it, those before it and after it, once each."""
    deliver(**({"api_key": None} if is_local else {}))
    model, blocks = chat(llm), list[Any]()

    def helper(config: Any) -> None:
        with traced("around"), traced("block") as block:
            blocks.append(block)
            model.invoke("before", config=config)
            assert pltrace.flush(10)
            block.score(80)
            with traced("inner"):
                model.invoke("after", config=config)
        model.invoke("beside", config=config)

    def node(_: str, config: RunnableConfig) -> None:
        thread = threading.Thread(target=helper, args=(config,))
        thread.start()
        thread.join()

    with traced("root"):
        RunnableLambda(node).invoke("Hi")
        model.invoke("beside")
    (block,) = blocks
    block.score(5, "late")
    assert pltrace.flush(10)
    found = rows(
        tmp_path / "store" / "traces.db", "SELECT span_id, arguments FROM operations WHERE subtree = 0 ORDER BY id"
    )
    assert sorted((row["span_id"], json.loads(row["arguments"])["score"]) for row in found) == sorted(
        (request.span_id, score) for request in block.requests for score in (80, 5)
    )
    assert len(found) == 4
    if not is_local:
        expected = [
            (int(request), "score", *asked) for request in block.requests for asked in ((None, 80), ("late", 5))
        ]
        assert sorted(operations(promptlayer), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("way", ["config", "parent"])
@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "sampled out"])
def test_a_handle_of_a_request_in_another_trace(local: Path, llm: ScriptedOpenAI, way: str, is_kept: bool) -> None:
    """Whether an id can come for it, and what is asked is kept, is decided in its own trace, which the handle names."""
    model, outside, inside = chat(llm), list[Any](), list[Any]()

    def helper(config: RunnableConfig) -> None:
        with traced("block", sample=float(not is_kept)) as block:
            model.invoke("Hi", config=config)
            outside.append(block)

    def node(_: str, config: RunnableConfig) -> None:
        thread = threading.Thread(target=helper, args=(config,))
        thread.start()
        thread.join()

    if way == "config":
        with traced("root", sample=float(is_kept)) as root:
            RunnableLambda(node).invoke("Hi")
        inside.append(root)
    else:
        with traced("far away", sample=float(is_kept)):
            carrier = pltrace.inject()
        with traced("block", sample=float(not is_kept)) as block:
            outside.append(block)
            with traced("here", parent=carrier) as here, traced("step"):
                model.invoke("Hi")
        inside.append(here)
    (request,) = outside[0].requests
    assert (request.trace_id, request) == (inside[0].trace_id, inside[0].requests[0])
    request.score(7)
    outside[0].score(8)
    assert (request.wait() is not None) is is_kept
    assert pltrace.flush(10)
    found = rows(local, "SELECT span_id, arguments FROM operations WHERE subtree = 0 ORDER BY id")
    assert [(row["span_id"], json.loads(row["arguments"])["score"]) for row in found] == [
        (request.span_id, score) for score in (7, 8) if is_kept
    ]


def test_a_score_while_the_ids_arrive(deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """A score given while calls come in and ids go out still reaches each request exactly once."""
    deliver()
    model = chat(llm)
    with traced("root") as root:
        for number in range(20):
            model.invoke("Hi")
            if number % 4 == 0:
                root.score(number, f"round {number}")
    assert pltrace.flush(10)
    names = [f"round {number}" for number in range(0, 20, 4)]
    got = sorted((number, name) for number, _, name, _ in operations(promptlayer))
    assert got == sorted((int(request), name) for request in root.requests for name in names)


def test_a_score_with_nobody_waiting(local: Path, llm: ScriptedOpenAI) -> None:
    """With no PromptLayer, scores are kept in the store, on each request."""
    with traced("root") as root:
        root.score(40)
        chat(llm).invoke("Hi")
        chat(llm).invoke("Hi")
    found = [[(asked["kind"], asked["arguments"]) for asked in call["operations"]] for call in calls(local)]
    assert found == [[("score", '{"score":40,"score_name":null}')]] * 2


# Span.requests and Span.usage.


def test_requests_and_usage_are_live(local: Path) -> None:
    """`requests` and `usage` of a span grow with each call under it, in any thread and depth; siblings don't count."""
    with ScriptedOpenAI(Reply("Yes.", usage=(5, 2))) as server:
        model = chat(server)
        with traced("root") as root:
            assert (root.requests, root.usage[:4]) == ([], (0, 0, 0, 0))
            model.invoke("One")
            assert (len(root.requests), root.usage[:4]) == (1, (1, 0, 5, 2))
            with traced("left") as left:
                model.batch(["Two", "Three", "Four"])
                assert (len(root.requests), root.usage[:4]) == (4, (4, 0, 20, 8))
            with traced("right") as right:
                RunnableLambda(model.invoke).invoke("Five")
        assert (len(left.requests), left.usage[:4], left.usage.total_tokens) == (3, (3, 0, 15, 6), 21)
        assert (len(right.requests), right.usage[:4]) == (1, (1, 0, 5, 2))
        assert (len(root.requests), root.usage[:4]) == (5, (5, 0, 25, 10))
    assert {request.span_id for request in root.requests} == {call["span_id"] for call in calls(local)}


# on_request.


def test_on_request_gets_the_request_with_promptlayers_id(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """A plain `on_request` is called once per call, off the caller's thread, when the id is known."""
    deliver()
    seen: list[tuple[Any, int, bool]] = []

    def note(request: pltrace.Request) -> None:
        seen.append((request, int(request), threading.current_thread() is threading.main_thread()))
        request.score(len(seen))

    with traced("root", on_request=note) as root:
        chat(llm).invoke("Hi")
        chat(llm).batch(["Ho", "Ha"])
    assert pltrace.flush(10)
    ids = [log["id"] for log in promptlayer.request_logs]
    assert [number for _, number, _ in seen] == ids
    assert not any(in_main for *_, in_main in seen)
    assert {id(request) for request, *_ in seen} == {id(request) for request in root.requests}
    assert operations(promptlayer) == [(number, "score", None, index + 1) for index, number in enumerate(ids)]


async def test_an_async_on_request_runs_on_the_loop(local: Path, llm: ScriptedOpenAI) -> None:
    """An async `on_request` runs on the loop that entered the scope, while that is running."""
    called: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def note(request: pltrace.Request) -> None:
        await asyncio.sleep(0)
        called.set_result((request.id, asyncio.get_running_loop(), threading.get_ident()))

    async with traced("root", on_request=note):
        await chat(llm).ainvoke("Hi")
    assert pltrace.flush(10), "a flush on the loop's own thread must not wait for what runs on it"
    assert not called.done()
    assert await asyncio.wait_for(called, 10) == (1, asyncio.get_running_loop(), threading.get_ident())


def test_an_async_on_request_of_a_declaration_that_is_used_again(local: Path, llm: ScriptedOpenAI) -> None:
    """One declaration, entered without a loop and then on one, calls its function on the loop that entered it last."""
    threads: list[str] = []

    async def note(request: pltrace.Request) -> None:
        threads.append(threading.current_thread().name)

    declared = traced("root", on_request=note)
    with declared as first:  # Held: with it what its block handed on.
        chat(llm).invoke("Hi!")
    assert pltrace.flush()

    async def main() -> None:
        async with declared:
            await chat(llm).ainvoke("Hi!")
        await asyncio.to_thread(pltrace.flush)

    asyncio.run(main())
    assert threads[1:] == [threading.main_thread().name]
    assert first


def test_an_async_on_request_without_a_loop(local: Path, llm: ScriptedOpenAI) -> None:
    """An async `on_request` of a scope that was entered on no loop runs in the background."""
    threads: list[threading.Thread] = []

    async def note(_: pltrace.Request) -> None:
        await asyncio.sleep(0)
        threads.append(threading.current_thread())

    with traced("root", on_request=note):
        chat(llm).invoke("Hi")
    assert pltrace.flush(10)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_an_async_on_request_whose_loop_has_ended(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, held: Callable[[], None]
) -> None:
    """When the loop ended before the id came, an async `on_request` runs in the background."""
    deliver()
    seen: list[tuple[int, bool]] = []

    async def note(request: pltrace.Request) -> None:
        await asyncio.sleep(0)
        seen.append((int(request), threading.current_thread() is threading.main_thread()))

    async def main() -> None:
        async with traced("root", on_request=note):
            await chat(llm).ainvoke("Hi")

    asyncio.run(main())
    assert seen == []
    held()
    assert pltrace.flush(10)
    assert seen == [(promptlayer.request_logs[0]["id"], False)]


def test_an_async_on_request_that_its_loop_cuts_off(
    local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    """An async `on_request` that its loop cuts off by ending is logged, and not run twice."""
    started: list[int] = []

    async def main() -> None:
        begun = asyncio.Event()

        async def note(request: pltrace.Request) -> None:
            started.append(int(request))
            begun.set()
            await asyncio.Event().wait()

        async with traced("root", on_request=note):
            await chat(llm).ainvoke("Hi")
        await begun.wait()

    with caplog.at_level(logging.ERROR, "pltrace"):
        asyncio.run(main())
        assert pltrace.flush(10)
    assert started == [1]
    (record,) = [entry for entry in caplog.records if entry.name == "pltrace"]
    assert "cut off" in record.getMessage()


def test_what_on_request_raises(local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """What an `on_request` raises is logged with its name and changes nothing, for the app or for the other ones."""
    seen: list[int] = []

    def broken(_: pltrace.Request) -> None:
        raise ValueError("broken callback")

    async def async_broken(_: pltrace.Request) -> None:
        raise KeyError("broken callback")

    def leaving(_: pltrace.Request) -> None:
        raise SystemExit(3)

    with (
        caplog.at_level(logging.ERROR, "pltrace"),
        traced("root", on_request=lambda request: seen.append(int(request))),
        traced(on_request=broken),
        traced(on_request=async_broken),
        traced(on_request=leaving),
    ):
        assert chat(llm).invoke("Hi").content == "Hello."
        assert chat(llm).invoke("Hi").content == "Hello."
        assert pltrace.flush(10)
    assert seen == [1, 2]
    messages = [record.getMessage() for record in caplog.records if record.name == "pltrace"]
    assert len(messages) == 6
    for name in (".leaving", ".async_broken", ".broken"):
        assert sum(f"{name} at" in message for message in messages) == 2


async def test_what_an_async_on_request_raises_on_its_loop(
    local: Path, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    """The same holds for one that runs on the application's loop."""

    async def broken(_: pltrace.Request) -> None:
        raise KeyError("broken callback")

    with caplog.at_level(logging.ERROR, "pltrace"):
        async with traced("root", on_request=broken):
            assert (await chat(llm).ainvoke("Hi")).content == "Hello."
        assert await asyncio.to_thread(pltrace.flush, 10)
    (record,) = [entry for entry in caplog.records if entry.name == "pltrace"]
    assert "broken" in record.getMessage()


def test_on_request_may_make_calls_of_its_own(local: Path, llm: ScriptedOpenAI) -> None:
    """A callback may call a model itself, and flush: that neither hangs nor calls it again for its own call."""
    seen: list[int] = []
    model = chat(llm)

    def note(request: pltrace.Request) -> None:
        seen.append(int(request))
        model.invoke("from the callback")
        assert pltrace.flush(10)

    with traced("root", on_request=note):
        model.invoke("Hi")
    assert pltrace.flush(10)
    assert seen == [1]


# Without PromptLayer.


def test_local_ids(local: Path, llm: ScriptedOpenAI) -> None:
    """With no PromptLayer, requests get whole numbers of the local store, unique in it, and everything else works."""
    seen: list[int] = []
    for _ in range(2):
        with traced("root", on_request=lambda request: seen.append(int(request))) as root:
            chat(llm).batch(["One", "Two", "Three"])
        assert pltrace.flush(10)
        assert sorted(seen[-3:]) == sorted(request.wait(0) or 0 for request in root.requests)
    assert len(set(seen)) == 6
    assert sorted(call["request_id"] for call in calls(local)) == sorted(seen)
