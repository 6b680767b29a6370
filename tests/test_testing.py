"""`pltrace.testing` shows what was traced and would be sent, sends nothing, and leaves all as it was."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda

import pltrace
from pltrace import ConfigError, Request, bind, current_span, traced
from pltrace.testing import CapturedSpans, capture_spans
from tests.support.programs import run, stored
from tests.support.promptlayer_server import PromptLayerServer


def ask(question: str = "Hi", **settings: Any) -> AIMessage:
    """Calls a model that answers itself."""
    return FakeListChatModel(responses=["Hello."]).invoke(question, **settings)


# What is captured.


def test_spans_come_in_the_order_they_end() -> None:
    """The list grows as spans end: it can be looked at while the block runs."""
    with capture_spans() as spans:
        assert spans == []
        with traced("outer"):
            with traced("inner"):
                ask()
            assert [span.name for span in spans] == ["FakeListChatModel", "inner"]
        assert [span.name for span in spans] == ["FakeListChatModel", "inner", "outer"]
    assert [span.status for span in spans] == ["ok"] * 3


def test_a_span_that_is_changed_after_its_end_is_there_once() -> None:
    """An update after the end shows on the span that is there."""
    with capture_spans() as spans:
        with traced("block") as span:
            pass
        span.update(tags=["late"])
    (captured,) = spans
    assert captured.tags == ("late",)


def test_tree() -> None:
    """`tree()` spells out who is inside whom."""
    with capture_spans() as spans:
        with traced("first"):
            with traced("a"):
                ask()
            with traced("b"):
                pass
        with traced("second"):
            pass
    assert spans.tree() == [["first", ["a", ["FakeListChatModel"]], ["b"]], ["second"]]


def test_named() -> None:
    """`named()` gives the one span of a name, and says what there is if there is none or several."""
    with capture_spans() as spans:
        for name in ("once", "twice", "twice"):
            with traced(name):
                pass
    assert spans.named("once").name == "once"
    with pytest.raises(AssertionError, match="2 spans are named 'twice'"):
        spans.named("twice")
    with pytest.raises(AssertionError, match=r"0 spans are named 'never', of \['once', 'twice', 'twice'\]"):
        spans.named("never")


def test_requests_are_as_they_would_be_sent(promptlayer: PromptLayerServer, tmp_path: Path) -> None:
    """What `requests` says of a call is what PromptLayer would get of the same call."""

    def program() -> None:
        with traced("chat", tags=["a"], metadata={"try": 1}, user="ada", session="s"):
            ask("Hi", config={"tags": ["b"], "metadata": {"k": [1]}})

    with capture_spans(deterministic=True) as spans:
        program()
    pltrace.configure(api_key=promptlayer.api_key, base_url=promptlayer.url, store=tmp_path / "traces.db")
    program()
    assert pltrace.flush(10.0)

    (captured,) = spans.requests
    (sent,) = promptlayer.request_logs
    for key in ("provider", "model", "input", "output", "tags", "status", "function_name"):
        assert captured.body[key] == sent[key], key
    assert captured.tags == ["a", "b"]
    assert captured.metadata == {"try": "1", "k": "[1]", "user_id": "ada", "conversation_id": "s"}
    assert captured.metadata.items() <= sent["metadata"].items()
    assert (captured.model, captured.status, captured.prompt_name) == ("FakeListChatModel", "SUCCESS", None)
    assert captured.span is spans[0]


def test_settings_hold() -> None:
    """Settings are those of `configure`."""
    with (
        capture_spans(
            tags=["app"], metadata={"region": "eu"}, capture=False, sample=1.0, service="s", redact=["note"]
        ) as spans,
        traced("block"),
    ):
        ask()
    spans.assert_requests(1, tags=["app"], metadata={"region": "eu"})
    assert "Hi" not in str(spans.requests[0].body["input"])


def test_the_environment_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own environment changes no test, not even where the program under test calls `configure`."""
    mine = {"PLTRACE_ENABLED": "0", "PLTRACE_TAGS": "mine", "PLTRACE_SAMPLE": "0", "PROMPTLAYER_BASE_URL": "nonsense"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    with capture_spans() as spans:
        with traced("block"):
            pass
        pltrace.configure(tags=["program"])
        with traced("configured"):
            pass
    assert [(span.name, span.tags) for span in spans] == [("block", ()), ("configured", ("program",))]


def test_what_is_not_sampled_is_not_there() -> None:
    """Traces that wouldn't be recorded aren't captured."""
    with capture_spans() as spans, traced("never", sample=0.0):
        ask()
    assert spans == []


def test_callbacks_have_run_when_the_block_ends() -> None:
    """`on_request` is called with local ids, by the end of the block."""
    seen: list[Request] = []
    with capture_spans() as spans, traced("block", on_request=seen.append):
        ask()
    assert [request.span_id for request in seen] == [spans.requests[0].span.id]
    assert isinstance(seen[0].id, int)


# Assertions.


def test_assert_requests_gives_those_that_match() -> None:
    """All that is given has to match; what is not given doesn't matter."""
    with capture_spans() as spans:
        with traced("a", tags=["x", "y", "z"], metadata={"n": 1, "flag": True}):
            ask()
        with traced("b", tags=["y"]):
            ask()
    assert len(spans.assert_requests()) == 2
    assert len(spans.assert_requests(2, model="FakeListChatModel", status="SUCCESS")) == 2
    (first,) = spans.assert_requests(1, tags=["x", "z"], metadata={"n": 1, "flag": "true"})
    assert first.tags == ["x", "y", "z"]
    spans.assert_requests(0, tags=["z", "x"])
    spans.assert_requests(0, model="other")
    spans.assert_requests(0, status="ERROR")
    spans.assert_requests(0, prompt="welcome")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"number": 2}, "expected 2 requests of any kind, and there are 1, among:\n  FakeListChatModel: SUCCESS, tags"),
        ({"number": 0}, "expected 0 requests of any kind, and there are 1"),
        ({"number": 1, "model": "gpt"}, "expected 1 request of model='gpt', and there are 0"),
        ({"tags": ["b"]}, "expected at least one request of tags=['b'], and there are 0"),
        ({"metadata": {"k": 2}, "status": "ERROR"}, "of metadata={'k': 2}, status='ERROR', and there are 0"),
    ],
)
def test_assert_requests_says_what_there_is(expected: dict[str, Any], message: str) -> None:
    """The message names what was expected, and lists the requests with what can be asserted of them."""
    with capture_spans() as spans, traced("block", tags=["a"], metadata={"k": 1}):
        ask()
    with pytest.raises(AssertionError) as caught:
        spans.assert_requests(**expected)
    assert message in str(caught.value)
    assert "tags ['a'], metadata {'k': '1'}" in str(caught.value)


def test_assert_requests_refuses_a_string_for_tags() -> None:
    """A single string, which would match letter by letter, is a mistake and named."""
    with capture_spans() as spans, traced("block", tags=["a"]):
        ask()
    with pytest.raises(ConfigError, match="tags='a'"):
        spans.assert_requests(1, tags="a")


def test_a_failed_call_is_a_request_too() -> None:
    """A call that raises is there with its error."""
    with capture_spans() as spans, traced("block"), pytest.raises(Exception, match="list index"):
        FakeListChatModel(responses=[]).invoke("Hi")
    spans.assert_requests(1, status="ERROR")


# Nothing left open.


def test_an_open_block_is_found() -> None:
    """A block that was never left is named."""
    with capture_spans() as spans:
        block = traced("forgotten")
        block.__enter__()
        with pytest.raises(AssertionError, match=r"still open.*'forgotten'"):
            spans.assert_nothing_open()
        block.__exit__(None, None, None)
        spans.assert_nothing_open()


def test_an_open_block_of_another_thread_is_found() -> None:
    """Also one in a thread that has ended."""
    with capture_spans() as spans:
        thread = threading.Thread(target=traced("in a thread").__enter__)
        thread.start()
        thread.join()
        with pytest.raises(AssertionError, match="'in a thread'"):
            spans.assert_nothing_open()


@pytest.mark.parametrize("kind", ["block", "call", "generator", "async generator"])
async def test_what_is_open_below_a_block_that_has_ended_is_found(kind: str) -> None:
    """What goes on after the block around it, in a task or half read, is named; and no more once it has ended."""
    go_on = asyncio.Event()

    async def block() -> None:
        async with traced("inner"):
            await go_on.wait()

    @traced("inner")
    def generator() -> Iterator[int]:
        yield 1

    @traced("inner")
    async def async_generator() -> AsyncIterator[int]:
        yield 1

    with capture_spans() as spans:
        with traced("outer"):
            if kind in ("block", "call"):
                task = asyncio.create_task(block() if kind == "block" else traced("inner")(go_on.wait)())
                await asyncio.sleep(0)
            elif kind == "generator":
                half_read = generator()
                next(half_read)
            else:
                half_read_too = async_generator()
                await anext(half_read_too)
        with pytest.raises(AssertionError, match=r"still open: \[<Span 'inner' \w+ open \w+>\]"):
            spans.assert_nothing_open()
        if kind in ("block", "call"):
            go_on.set()
            await task
        elif kind == "generator":
            half_read.close()  # type: ignore[attr-defined]
        else:
            await half_read_too.aclose()  # type: ignore[attr-defined]
        spans.assert_nothing_open()


def test_a_run_that_is_open_below_a_block_that_has_ended_is_found() -> None:
    """So is a LangChain run that goes on after the block around it."""
    with capture_spans() as spans:
        with traced("block"):
            stream = FakeListChatModel(responses=["Hello."]).stream("Hi")
            next(stream)
        with pytest.raises(AssertionError, match=r"runs are still open: \[<Span 'FakeListChatModel' llm open"):
            spans.assert_nothing_open()
        stream.close()  # type: ignore[attr-defined]
        spans.assert_nothing_open()


def test_what_another_process_has_open_is_not_ours() -> None:
    """A block with the scope of another process around it leaves nothing open here when it ends."""
    with capture_spans() as elsewhere, traced("far"):
        bound = pickle.dumps(pltrace.bind(ask))
    with capture_spans() as spans:
        pickle.loads(bound)()
        spans.assert_nothing_open()
    assert len(spans) == len(elsewhere) == 1


def test_an_open_run_is_found() -> None:
    """A LangChain run that wasn't consumed to its end is named."""
    with capture_spans() as spans, traced("block"):
        stream = RunnableLambda(lambda text: text).stream("x")
        next(stream)
        with pytest.raises(AssertionError, match=r"still open"):
            spans.assert_nothing_open()
        stream.close()


def test_what_was_left_open_troubles_nobody_later() -> None:
    """The next capture starts from nothing."""
    with capture_spans():
        traced("forgotten").__enter__()
    assert not current_span()
    with capture_spans() as spans:
        assert not current_span()
        with traced("next"):
            pass
        spans.assert_nothing_open()
    assert spans.tree() == [["next"]]


# Ids and times on request.


def test_deterministic() -> None:
    """On request, ids and times are the same each time, whatever the threads in the background do."""

    def told() -> list[tuple[Any, ...]]:
        with capture_spans(deterministic=True, sample=0.5) as spans:
            for number in range(20):
                with traced(f"block {number}"):
                    ask()
                    assert pltrace.flush(5.0)
        return [
            (span.name, span.id, span.trace_id, span.parent_id, span.started_at_ns, span.ended_at_ns) for span in spans
        ]

    first = told()
    assert 0 < len(first) < 40
    assert [told() for _ in range(3)] == [first] * 3


def test_deterministic_begins_at_one() -> None:
    """Ids count from 1, and time moves a millisecond at each look."""
    with capture_spans(deterministic=True) as spans, traced("block"):
        pass
    (span,) = spans
    assert (span.trace_id, span.id) == (f"{1:032x}", f"{2:016x}")
    assert span.started_at_ns == 1_704_067_200_000_000_000
    assert span.ended_at_ns - span.started_at_ns == 1_000_000


def test_deterministic_requests() -> None:
    """So is all that would be sent, the ids of LangChain's runs and their order included."""

    def sent() -> list[Any]:
        chain = ChatPromptTemplate.from_template("{q}") | FakeListChatModel(responses=["Hello."])
        with capture_spans(deterministic=True) as spans:
            with traced("block"):
                chain.invoke({"q": "Hi"})
                chain.batch([{"q": "Hi"}], {"max_concurrency": 1})
            return [dict(request.body) for request in spans.requests]

    first = sent()
    assert len(first) == 2
    assert [sent() for _ in range(3)] == [first] * 3
    assert first[0]["metadata"]["_langchain_run_id"] == str(UUID(int=5))
    assert first[0]["metadata"]["_langchain_parent_run_id"] == str(UUID(int=3))


# Nothing leaves, and all is as before.


@pytest.mark.parametrize(
    "setting",
    [{"api_key": "k"}, {"base_url": "http://x"}, {"client": object()}, {"exporters": []}, {"store": "x.db"},
     {"enabled": True}],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_loud_settings_are_refused(setting: dict[str, Any]) -> None:
    """What would send something is refused by name."""
    with pytest.raises(ConfigError, match=next(iter(setting))), capture_spans(**setting):
        pass


def test_wrong_settings_are_refused() -> None:
    """So is what `configure` refuses."""
    with pytest.raises(ConfigError, match=r"sample=2"), capture_spans(sample=2):
        pass


def test_a_program_that_configures_itself_stays_in_memory(
    promptlayer: PromptLayerServer, tmp_path: Path, deliver: Callable[..., None]
) -> None:
    """`configure` inside the block sets what it can, sends nothing, writes nothing, and is forgotten afterwards."""
    exported: list[Any] = []

    class Exporter:
        name = "own"

        def export(self, batch: Any) -> Any:
            exported.append(batch)

        def shutdown(self) -> None:
            pass

    with capture_spans() as spans:
        deliver(tags=["of the program"], exporters=[Exporter()])
        with traced("block"):
            ask()
        assert pltrace.flush(5.0)
    spans.assert_requests(1, tags=["of the program"])
    assert promptlayer.requests == []
    assert exported == []
    assert not (tmp_path / "store").exists()
    with traced("after") as after:
        assert not after


def test_a_program_that_shuts_down(deliver: Callable[..., None]) -> None:
    """`shutdown` inside the block ends tracing there; what was captured is kept."""
    with capture_spans() as spans:
        with traced("before"):
            pass
        pltrace.shutdown()
        with traced("after") as span:
            assert not span
        pltrace.configure()
        with traced("again"):
            pass
    assert [span.name for span in spans] == ["before", "again"]


def test_what_was_on_goes_on(local: Path) -> None:
    """Tracing that was on before records nothing of the block, and goes on after it."""
    with traced("before"):
        pass
    with capture_spans() as spans, traced("captured"):
        pass
    with traced("after"):
        pass
    assert pltrace.flush(5.0)
    assert [span.name for span in spans] == ["captured"]
    assert stored(local) == ["before", "after"]


def test_inside_a_block(local: Path) -> None:
    """The capture is outside of a traced block around it, which goes on afterwards."""
    with traced("around") as around:
        with capture_spans() as spans:
            assert not current_span()
            with traced("captured"):
                pass
            spans.assert_nothing_open()
        assert current_span() is around
    assert pltrace.flush(5.0)
    assert spans.named("captured").parent_id is None
    assert stored(local) == ["around"]


def test_captures_nest() -> None:
    """An inner capture has what runs inside it, the outer one the rest."""
    with capture_spans() as outer:
        with traced("first"):
            pass
        with capture_spans() as inner, traced("second"):
            pass
        with traced("third"):
            pass
    assert ([span.name for span in outer], [span.name for span in inner]) == (["first", "third"], ["second"])


def test_an_exception_passes_and_restores() -> None:
    """An exception in the block passes; tracing is off again."""
    with pytest.raises(ZeroDivisionError), capture_spans() as spans, traced("block"):
        _ = 1 / 0
    assert spans.named("block").error == "ZeroDivisionError: division by zero"
    with traced("after") as span:
        assert not span


def test_the_environment_still_decides_afterwards(tmp_path: Path) -> None:
    """In a process where nobody had decided yet, what comes after a capture goes by the environment."""
    store = tmp_path / "traces.db"
    program = run(
        """
        from pltrace import traced
        from pltrace.testing import capture_spans
        with capture_spans() as spans, traced("captured"):
            pass
        assert len(spans) == 1
        with traced("after"):
            pass
        """,
        tmp_path, PLTRACE_ENABLED=1, PLTRACE_STORE=store,
    )  # fmt: skip
    assert (program.code, program.err) == (0, "")
    assert stored(store) == ["after"]


def test_the_list_is_a_list() -> None:
    """It can be used as any list of spans."""
    with capture_spans() as spans, traced("block") as span:
        pass
    assert isinstance(spans, CapturedSpans)
    assert spans == [span]
    assert spans[0] is span


def test_the_prompt_of_a_request(promptlayer: PromptLayerServer) -> None:
    """A request that was made from a prompt of the registry says from which."""
    promptlayer.add_prompt("greeting", {"type": "completion", "content": [{"type": "text", "text": "Hi {name}"}]})
    pltrace.configure(api_key=promptlayer.api_key, base_url=promptlayer.url, store="memory")
    prompt = pltrace.prompts.get("greeting")
    with capture_spans() as spans, traced("block"):
        (prompt | FakeListChatModel(responses=["Hello."])).invoke({"name": "Ada"})
    (request,) = spans.assert_requests(1, prompt="greeting")
    assert request.prompt_name == "greeting"
    assert request.body["prompt_input_variables"] == {"name": "Ada"}
    with pytest.raises(AssertionError, match="prompt 'greeting'"):
        spans.assert_requests(1, prompt="other")


def test_what_is_left_open_lets_the_process_end(tmp_path: Path) -> None:
    """A traced generator that a capture left half-read doesn't hold up the end of the process."""
    program = run(
        """
        from pltrace import traced
        from pltrace.testing import capture_spans

        @traced
        def numbers():
            yield 1
            yield 2

        with capture_spans():
            left = numbers()
            next(left)
        print("done")
        """,
        tmp_path,
    )
    assert (program.code, program.out, program.err) == (0, "done\n", "")


def test_direct_calls_send_nothing(promptlayer: PromptLayerServer, tmp_path: Path) -> None:
    """While spans are captured, the registry isn't asked, nor a group made, with a key from outside either."""
    pltrace.configure(api_key=promptlayer.api_key, base_url=promptlayer.url, store=tmp_path / "traces.db")
    with capture_spans():
        with pytest.raises(ConfigError, match="there is no API key"):
            pltrace.prompts.get("welcome")
        pltrace.track.create_group()
    assert promptlayer.requests == []


def test_a_block_left_open_in_a_thread_is_found() -> None:
    """A block that a thread entered and never left is open, also when the thread is long gone."""
    with capture_spans() as seen:
        with traced("outer"):
            thread = threading.Thread(target=bind(lambda: traced("inner").__enter__() and None))
            thread.start()
            thread.join()
            del thread
        gc.collect()
        with pytest.raises(AssertionError, match="'inner'"):
            seen.assert_nothing_open()


def test_what_is_asked_of_requests() -> None:
    """What was asked of a request's handle, or of a span around it, is told as it would be sent."""
    with capture_spans() as seen:
        with traced("block") as span:
            FakeListChatModel(responses=["Hello."]).invoke("Hi")
        (handle,) = span.requests
        handle.link_prompt("greeting", version=2)
        handle.add_metadata({"checked": True})
        handle.score(70, "own")
        span.score(90)
        span.add_to_group(7)
        (request,) = seen.assert_requests(1, prompt="greeting", metadata={"checked": True})
    assert request.scores == [(70, "own"), (90, None)]
    assert [operation["kind"] for operation in request.operations] == ["prompt", "metadata", "score", "score", "group"]
    assert request.operations[0]["version"] == 2


def test_nothing_is_left_open() -> None:
    """What a capture used is closed when it is collected; Python, which warns of what isn't, has nothing to say."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            with capture_spans(), traced("block"):
                pass
            gc.collect()
    assert [str(one.message) for one in told if "database" in str(one.message)] == []
