"""`Span.usage` tells, at any moment, what the LLM calls under a block have taken so far."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.llms import BaseLLM
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, Generation, LLMResult
from langchain_core.runnables import RunnableLambda

from pltrace import Span, bind, current_span, traced
from pltrace.testing import CapturedSpans, capture_spans


class Model(BaseChatModel):
    """A model that says what its answers took: the question's length, and 2."""

    model: str = "small"

    @property
    def _llm_type(self) -> str:
        return "counting"

    def _get_ls_params(self, stop: list[str] | None = None, **settings: Any) -> Any:
        return {"ls_provider": "counting", "ls_model_name": self.model, "ls_model_type": "chat"}

    def _answer(self, messages: list[BaseMessage]) -> AIMessage:
        question = str(messages[-1].content)
        if question == "fail":
            raise ConnectionError("gone")
        return AIMessage(
            "Hello.",
            usage_metadata={"input_tokens": len(question), "output_tokens": 2, "total_tokens": len(question) + 2},
        )

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages))])

    def _stream(self, messages: list[BaseMessage], *_: Any, **__: Any) -> Iterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        yield ChatGenerationChunk(message=AIMessageChunk("Hel"))
        yield ChatGenerationChunk(message=AIMessageChunk("lo.", usage_metadata=answer.usage_metadata))


class OldModel(BaseLLM):
    """A completion model: it says what the whole answer took."""

    @property
    def _llm_type(self) -> str:
        return "old"

    def _generate(self, prompts: list[str], *_: Any, **__: Any) -> LLMResult:
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        return LLMResult(generations=[[Generation(text="Hello.")] for _ in prompts], llm_output={"token_usage": usage})


def told(span: Span) -> tuple[int, int, int, int]:
    """Gives requests, errors, input and output tokens."""
    usage = span.usage
    return usage.requests, usage.errors, usage.input_tokens, usage.output_tokens


@pytest.fixture(autouse=True)
def spans() -> Iterator[CapturedSpans]:
    """Tracing is on, in memory."""
    with capture_spans() as spans:
        yield spans


def test_grows_while_the_block_runs() -> None:
    """Each call shows as soon as it ended; afterwards the totals stay."""
    with traced("block") as span:
        assert told(span) == (0, 0, 0, 0)
        Model().invoke("four")
        assert told(span) == (1, 0, 4, 2)
        Model().invoke("sixsix")
        assert told(span) == (2, 0, 10, 4)
        assert span.usage.total_tokens == 14
    Model().invoke("outside")
    assert told(span) == (2, 0, 10, 4)


def test_current_span_knows() -> None:
    """Inside a decorated function the running call's own totals are at hand."""

    @traced
    def work() -> int:
        Model().invoke("four")
        return current_span().usage.input_tokens

    with traced("block"):
        assert [work(), work()] == [4, 4]


def test_nested_blocks_add_up() -> None:
    """An inner block's calls count for those around it too, and not the other way."""
    with traced("outer") as outer:
        Model().invoke("1")
        with traced("middle") as middle:
            Model().invoke("22")
            with traced("inner") as inner:
                Model().invoke("333")
    assert [told(span)[2] for span in (outer, middle, inner)] == [6, 5, 3]


def test_nested_chains() -> None:
    """Calls deep in chains, with traced functions in between, count for every traced one around them."""
    inner_span: list[Span] = []

    @traced
    def inner(text: str) -> Any:
        inner_span.append(current_span())
        return (RunnableLambda(lambda text: text) | Model()).invoke(text)

    chain = (
        RunnableLambda(lambda text: text + "!") | RunnableLambda(inner) | RunnableLambda(lambda m: m.content) | Model()
    )
    with traced("block") as span:
        chain.invoke("Hi")
    assert told(span) == (2, 0, 3 + 6, 4)
    assert told(inner_span[0]) == (1, 0, 3, 2)


def test_by_model() -> None:
    """Totals are split by the model's name."""
    with traced("block") as span:
        Model(model="small").invoke("1")
        Model(model="large").invoke("22")
        Model(model="small").invoke("333")
    assert {model: usage.input_tokens for model, usage in span.usage.by_model.items()} == {"small": 4, "large": 2}
    assert span.usage.by_model["small"].requests == 2
    assert span.usage.by_model["large"].total_tokens == 4


def test_by_tag() -> None:
    """Totals are split by tags, those of all blocks and the call's own; a call counts under each, once."""
    with traced("outer", tags=["all"]) as span:
        with traced("inner", tags=["draft", "all"]):
            Model().invoke("1", config={"tags": ["mine", "all"]})
        (RunnableLambda(lambda text: text) | Model().with_config(tags=["mine"])).invoke("22")
        Model().invoke("333")
    assert {tag: usage.input_tokens for tag, usage in span.usage.by_tag.items()} == {"all": 6, "draft": 1, "mine": 3}
    assert {tag: usage.requests for tag, usage in span.usage.by_tag.items()} == {"all": 3, "draft": 1, "mine": 2}


def test_errors() -> None:
    """A call that failed is a request and an error."""
    with traced("block", tags=["t"]) as span:
        Model().invoke("1")
        with pytest.raises(ConnectionError):
            Model().invoke("fail")
    assert told(span) == (2, 1, 1, 2)
    assert span.usage.by_model["small"].errors == span.usage.by_tag["t"].errors == 1


def test_retries_are_requests() -> None:
    """Every attempt counts."""
    with traced("block") as span, pytest.raises(ConnectionError):
        Model().with_retry(stop_after_attempt=3, wait_exponential_jitter=False).invoke("fail")
    assert told(span) == (3, 3, 0, 0)


async def test_cancelled_calls_are_errors() -> None:
    """A call whose task is cancelled, of which LangChain reports no end, is an error when its block ends."""
    started = asyncio.Event()

    class Slow(Model):
        async def _agenerate(self, *_: Any, **__: Any) -> ChatResult:
            started.set()
            await asyncio.Event().wait()
            raise AssertionError

    async def block() -> None:
        async with traced("block") as span:
            spans.append(span)
            await Slow().ainvoke("Hi")

    spans: list[Span] = []
    task = asyncio.create_task(block())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert told(spans[0]) == (1, 1, 0, 0)


#: Earlier versions of langchain-core don't mark a chat model's answers that come from the cache.
_marked = pytest.mark.skipif(
    not hasattr(BaseChatModel, "_convert_cached_generations"), reason="LangChain doesn't tell cached answers apart"
)


@pytest.mark.parametrize("model", [pytest.param(Model, marks=_marked), OldModel])
def test_cached_answers_take_no_tokens(model: Any) -> None:
    """The tokens of an answer from LangChain's cache were counted before; with completion models it is no run."""
    cached = model(cache=InMemoryCache())
    with traced("block") as span:
        cached.invoke("four")
        once = told(span)
        cached.invoke("four")
        cached.invoke("four")
    assert once[0] == 1
    assert once[2] > 0
    assert told(span) == (3 if model is Model else 1, *once[1:])


def test_completion_models() -> None:
    """Tokens of models that tell them for the whole answer."""
    with traced("block") as span:
        OldModel().invoke("Hi")
    assert told(span) == (1, 0, 7, 3)
    assert list(span.usage.by_model) == ["OldModel"]


def test_streams() -> None:
    """A stream counts when it has ended, also one that is left early, which is no error."""
    with traced("block") as span:
        stream = Model().stream("four")
        next(stream)
        assert told(span) == (0, 0, 0, 0)
        assert "".join(str(chunk.content) for chunk in stream) == "lo."
        assert told(span) == (1, 0, 4, 2)
        left = Model().stream("four")
        next(left)
        left.close()  # type: ignore[attr-defined]
    assert told(span)[:2] == (2, 0)


def test_threads() -> None:
    """Calls of many threads at once are all counted, and can be read meanwhile."""
    number, reads, stop = 400, [], threading.Event()

    def watch(span: Span) -> None:
        while not stop.is_set():
            usage = span.usage
            reads.append(usage.requests)
            assert usage.input_tokens == 4 * usage.requests
            assert sum(split.requests for split in usage.by_model.values()) == usage.requests

    with traced("block", tags=["t"]) as span:
        watcher = threading.Thread(target=watch, args=(span,))
        watcher.start()
        with ThreadPoolExecutor(8) as executor:
            list(bind(executor).map(lambda _: Model().invoke("four"), range(number)))
        stop.set()
        watcher.join()
        assert told(span) == (number, 0, 4 * number, 2 * number)
    assert reads == sorted(reads)
    assert span.usage.by_tag["t"].requests == number


async def test_tasks() -> None:
    """Concurrent blocks count for themselves, and together for the one around them."""

    async def one(text: str) -> int:
        async with traced(text) as span:
            await asyncio.gather(*[Model().ainvoke(text) for _ in range(3)])
        return span.usage.input_tokens

    async with traced("all") as span:
        assert await asyncio.gather(one("1"), one("22"), one("333")) == [3, 6, 9]
    assert told(span) == (9, 0, 18, 18)


def test_many_calls_take_no_more_room() -> None:
    """Totals are folded as calls end: what they keep doesn't grow with the number of calls."""
    with traced("block") as span:
        for _ in range(2_500):
            Model().invoke("1")
        assert told(span) == (2_500, 0, 2_500, 5_000)
    assert len(span.requests) == 2_500


def test_generators() -> None:
    """The calls of a traced generator are its own, and not those of who consumes it."""

    @traced
    def generator() -> Iterator[Span]:
        Model().invoke("1")
        yield current_span()
        Model().invoke("22")
        yield current_span()

    seen = []
    for span in generator():
        Model().invoke("consumer")
        seen.append(span)
    assert told(seen[-1]) == (2, 0, 3, 4)


def test_where_nothing_is_traced() -> None:
    """Outside of all blocks, everything is zero."""
    usage = current_span().usage
    assert (usage.requests, usage.total_tokens, dict(usage.by_model), dict(usage.by_tag)) == (0, 0, {}, {})


def test_what_is_not_sampled_is_counted() -> None:
    """Totals don't depend on whether the trace is recorded."""
    with traced("block", sample=0.0) as span:
        Model().invoke("four")
    assert told(span) == (1, 0, 4, 2)


def test_an_output_that_is_replaced() -> None:
    """The tokens of a call count, whatever is put in the place of what its span says was answered."""
    with capture_spans() as spans, traced("block") as block:
        Model().invoke("abc")
        spans[0].update(output="something else")
        assert block.usage[:4] == (1, 0, 3, 2)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="POSIX signals")
def test_ctrl_c_while_it_is_read() -> None:
    """A program that is interrupted while it reads the totals, and goes on, finds each call in them once."""
    is_reading, interrupted = False, 0

    def interrupt(number: int, frame: object) -> None:
        if is_reading:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with traced("block") as span:
            for number in range(600):
                Model().invoke("four")
                signal.setitimer(signal.ITIMER_REAL, (2 + number % 25) * 1e-6)  # Once.
                try:
                    is_reading = True
                    told(span)
                    is_reading = False
                except KeyboardInterrupt:
                    is_reading = False
                    interrupted += 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5
    assert told(span) == (600, 0, 2400, 1200)
