"""Typed uses of the public API: checked by mypy and pyright in strict mode, never run.

A line with `# type: ignore[code]` is a misuse that both have to find: where one doesn't, the comment is unused, which
is an error too.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import functools
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from langchain_core.runnables import RunnableLambda
from langchain_openai import ChatOpenAI
from typing_extensions import assert_type

import pltrace
from pltrace import (
    ConfigError,
    ExportResult,
    PltraceError,
    PromptLayerCallbackHandler,
    PromptLayerError,
    Request,
    Span,
    SpanExporter,
    StoredSpan,
    StoreError,
    Usage,
    bind,
    traced,
)
from pltrace.testing import CapturedRequest, CapturedSpans, capture_spans

# Functions of every kind keep their signature, in both forms of the decorator.


@traced
def bare(topic: str, *, times: int = 1) -> list[str]:
    return [topic] * times


@traced("named", tags=["a"], metadata={"k": 1}, user="u", session="s", capture="inputs", sample=0.5)
def with_arguments(topic: str, *, times: int = 1) -> list[str]:
    return [topic] * times


assert_type(bare("x", times=2), list[str])
assert_type(with_arguments("x"), list[str])
bare(1)  # type: ignore[arg-type]
bare("x", time=2)  # type: ignore[call-arg]
with_arguments()  # type: ignore[call-arg]


@traced
async def coroutine(topic: str) -> int:
    return len(topic)


@traced()
async def coroutine_with_arguments(topic: str) -> int:
    return len(topic)


@traced
def generator(count: int) -> Generator[int, str, bool]:
    sent = yield count
    return bool(sent)


@traced(tags=("t",))
def iterator(count: int) -> Iterator[int]:
    yield from range(count)


@traced
async def async_generator(count: int) -> AsyncGenerator[int, str]:
    yield count


@traced("stream")
async def async_iterator(count: int) -> AsyncIterator[int]:
    yield count


async def awaits() -> None:
    assert_type(await coroutine("x"), int)
    assert_type(await coroutine_with_arguments("x"), int)
    await coroutine(1)  # type: ignore[arg-type]
    coroutine("x") + 1  # type: ignore[operator]
    assert_type(async_generator(1), AsyncGenerator[int, str])
    async for number in async_iterator(3):
        assert_type(number, int)
    async_iterator("3")  # type: ignore[arg-type]


def consumes() -> None:
    assert_type(generator(1), Generator[int, str, bool])
    generator(1).send(2)  # type: ignore[arg-type]
    for number in iterator(3):
        assert_type(number, int)


# A generic function stays generic, and a LangChain Runnable what it was.

T = TypeVar("T")


@traced
def identity(value: T) -> T:
    return value


@traced("pair")
async def pair(first: T, *others: T) -> list[T]:
    return [first, *others]


assert_type(identity("x"), str)
assert_type(traced(lambda: 5)(), int)
length = traced(RunnableLambda(len))
named_length = traced("length", tags=["t"])(RunnableLambda(len))
assert_type(length.invoke([1]), int)
assert_type((named_length | RunnableLambda(str)).invoke([1]), str)
model = traced(ChatOpenAI())
assert_type(model, ChatOpenAI)
traced(5)  # type: ignore[call-overload]
traced("n")(5)  # type: ignore[call-overload]

as_callable: Callable[[str], Awaitable[int]] = coroutine
as_coroutine_function: Callable[[str], Coroutine[Any, Any, int]] = coroutine

# Methods.


class Assistant:
    @traced
    def method(self, question: str) -> str:
        return question

    @traced("async method")
    async def async_method(self, question: str) -> str:
        return question

    @traced
    @classmethod
    def over_classmethod(cls, name: str) -> int:
        return len(name)

    @classmethod
    @traced("under")
    def under_classmethod(cls, name: str) -> int:
        return len(name)

    @traced("over")
    @staticmethod
    def over_staticmethod(name: str) -> int:
        return len(name)

    @staticmethod
    @traced
    def under_staticmethod(name: str) -> int:
        return len(name)

    over_partialmethod = traced(functools.partialmethod(method, "q"))

    @property
    @traced
    def under_property(self) -> int:
        return 1


assistant = Assistant()
assert_type(assistant.method("q"), str)
assert_type(Assistant.over_classmethod("n"), int)
assert_type(assistant.under_classmethod("n"), int)
assert_type(Assistant.over_staticmethod("n"), int)
assert_type(assistant.under_staticmethod("n"), int)
assert_type(assistant.over_partialmethod(), str)
assert_type(assistant.under_property, int)
assistant.method(1)  # type: ignore[arg-type]
assistant.over_classmethod(1)  # type: ignore[arg-type]
Assistant.under_classmethod(1)  # type: ignore[arg-type]
assistant.over_staticmethod(1)  # type: ignore[arg-type]
Assistant.under_staticmethod()  # type: ignore[call-arg]


async def fetches_a_prompt() -> None:
    assert_type((await pltrace.prompts.aget("joke", label="prod")).prompt_name, str)
    await pltrace.prompts.aget("joke", 1)  # type: ignore[call-arg]


async def awaits_a_method() -> None:
    assert_type(await assistant.async_method("q"), str)


# Blocks give a span.

declaration = traced("block", tags=["a"], metadata={"k": object()}, parent={"traceparent": "…"})

with declaration as span:
    assert_type(span, Span)
    assert_type(span.id, str)
    assert_type(span.trace_id, str)
    assert_type(span.parent_id, str | None)
    assert_type(span.tags, tuple[str, ...])
    assert_type(span.metadata, dict[str, Any])
    assert_type(span.requests, list[Request])
    assert_type(span.usage, Usage)
    assert_type(span.usage.total_tokens, int)
    assert_type(span.error, str | None)
    assert_type(span.ended_at_ns, int)
    span.update(name="n", tags=["t"], metadata={"k": 1}, input={"a": 1}, output=[1])
    span.update(tags="t", metadate={})  # type: ignore[call-arg]
    span.score(90)
    span.score(90, "helpful")
    span.score(0.9)  # type: ignore[arg-type]
    span.add_to_group(7)
    span.add_to_group("7")  # type: ignore[arg-type]
    span.id = "0"  # type: ignore[misc]
    kind_is_literal: str = span.kind
    is_agent = span.kind == "agent"  # type: ignore[comparison-overlap]


async def enters() -> None:
    async with traced() as span:
        assert_type(span, Span)


assert_type(pltrace.current_span(), Span)
pltrace.current_span(1)  # type: ignore[call-arg]
assert_type(pltrace.inject(), dict[str, str])
assert_type(pltrace.inject({"accept": "*/*"}), dict[str, str])
pltrace.inject({"accept": 1})  # type: ignore[dict-item]

# A misspelt name is found, whatever is loaded on first use.

pltrace.tracde  # type: ignore[attr-defined]
pltrace.track.scores  # type: ignore[attr-defined]

traced("n", "m")  # type: ignore[call-overload]
traced(name="n")  # type: ignore[call-overload]
traced(capture="input")  # type: ignore[call-overload]
traced(tags=[1])  # type: ignore[list-item]
traced(metadata={1: "x"})  # type: ignore[dict-item]
traced(sample="0.5")  # type: ignore[call-overload]
traced(on_request=lambda: None)  # type: ignore[arg-type, misc]
traced(parent="00-…")  # type: ignore[call-overload]

# Requests and their callbacks.


def on_request(request: Request) -> None:
    assert_type(int(request), int)
    assert_type(request.id, int | None)
    assert_type(request.wait(timeout=1.0), int | None)
    request.wait("1")  # type: ignore[arg-type]
    assert_type(request.provider, str | None)
    assert_type(request.model, str | None)
    assert_type(request.tags, tuple[str, ...])
    assert_type(request.metadata, dict[str, Any])
    assert_type(request.input_tokens, int | None)
    assert_type(request.output_tokens, int | None)
    assert_type(request.latency_s, float | None)
    request.score(100)
    request.score(100, "name")
    request.add_metadata({"k": object()})
    request.link_prompt("p", label="prod", input_variables={"v": 1})
    request.add_to_group(7)
    request.score("100")  # type: ignore[arg-type]
    request.add_metadata({1: "x"})  # type: ignore[dict-item]
    request.link_prompt("p", 1)  # type: ignore[call-arg]
    request.add_to_group("7")  # type: ignore[arg-type]


async def on_request_async(request: Request) -> None:
    request.score(1)


traced(on_request=on_request)
traced(on_request=on_request_async)
traced(on_request=print)

# Settings.


def redact(key: str, value: Any) -> Any:
    return value


pltrace.configure()
pltrace.configure(
    api_key="k",
    base_url="https://example.com",
    client=object(),
    store=Path("traces.db"),
    service="s",
    tags=("t",),
    metadata={"k": 1},
    capture="outputs",
    redact=redact,
    sample=1,
    enabled=True,
    libraries={"lib": {"enabled": False, "tags": ["t"], "capture": True}},
)
pltrace.configure(redact=["name", re.compile("x")], store="memory")
pltrace.configure("k")  # type: ignore[call-arg]
pltrace.configure(apikey="k")  # type: ignore[call-arg]
pltrace.configure(enabled="yes")  # type: ignore[arg-type]
pltrace.configure(store=1)  # type: ignore[arg-type]
pltrace.configure(redact=lambda value: value)  # type: ignore[arg-type, misc]
assert_type(pltrace.flush(), bool)
assert_type(pltrace.flush(timeout=1.0), bool)
assert_type(pltrace.shutdown(1), bool)
pltrace.flush("1")  # type: ignore[arg-type]
pltrace.shutdown("1")  # type: ignore[arg-type]
pltrace.configure(capture="prompts")  # type: ignore[arg-type]
pltrace.configure(tags="t", libraries={"lib": False})  # type: ignore[dict-item]
pltrace.configure(libraries={"lib": {"enable": False}})  # type: ignore[typeddict-unknown-key]
pltrace.configure(libraries={"lib": {"capture": "all"}})  # type: ignore[typeddict-item]

# Exporters are anything of this shape.


class Exporter:
    name = "mine"

    def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
        assert_type(batch[0].record["name"], Any)
        return ExportResult("delivered", request_ids={batch[0].record["span_id"]: 1})

    def shutdown(self) -> None: ...


class Nameless:
    def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
        return ExportResult("done")  # type: ignore[arg-type]

    def shutdown(self) -> None: ...


exporter: SpanExporter = Exporter()
pltrace.configure(exporters=[exporter, Exporter()])
no_exporter: SpanExporter = Nameless()  # type: ignore[assignment]

# bind keeps the type of what it is given.

assert_type(bind(len)("x"), int)
with bind(ThreadPoolExecutor()) as executor:
    assert_type(executor.submit(bare, "x").result(), list[str])
bind(bare)(1)  # type: ignore[arg-type]
bind()  # type: ignore[call-arg]

# Functions of others, by name.

pltrace.instrument("json.encoder:JSONEncoder.encode")
pltrace.instrument("json:dumps", tags=["json"], metadata={"k": 1}, user="u", session="s", capture="inputs", sample=0.5)
pltrace.instrument("json:dumps", on_request=on_request)
pltrace.uninstrument("json:dumps")
pltrace.instrument(len)  # type: ignore[arg-type]
pltrace.instrument("json:dumps", tag=["json"])  # type: ignore[call-arg]
pltrace.instrument("json:dumps", capture="output")  # type: ignore[arg-type]
pltrace.instrument("json:dumps", sample="all")  # type: ignore[arg-type]
pltrace.uninstrument()  # type: ignore[call-arg]
pltrace.instrument_threads()
pltrace.instrument_threads(True)  # type: ignore[call-arg]
pltrace.uninstrument_threads()
pltrace.uninstrument_threads(True)  # type: ignore[call-arg]

# Prompts, and requests by their id.

template = pltrace.prompts.get("joke", label="prod")
assert_type(template.prompt_name, str)
(template | ChatOpenAI()).invoke({"topic": "cats"})
pltrace.prompts.get("joke", 1)  # type: ignore[call-arg]
assert_type(pltrace.track.score(1, 100, "name"), bool)
assert_type(pltrace.track.metadata(1, {"k": object()}), bool)
assert_type(pltrace.track.prompt(1, "joke", {"topic": "cats"}, version=1), bool)
assert_type(pltrace.track.group(1, 2), bool)
assert_type(pltrace.track.create_group(), int)
pltrace.track.score("1", 100)  # type: ignore[arg-type]
pltrace.track.metadata(1, {1: "x"})  # type: ignore[dict-item]
pltrace.track.prompt(1, "joke")  # type: ignore[call-arg]
pltrace.track.group(1, "2")  # type: ignore[arg-type]
pltrace.track.create_group("g")  # type: ignore[call-arg]
pltrace.prompts.publish("joke", template, labels=["prod"], tags=["t"], metadata={"k": 1})
pltrace.prompts.publish("joke", template, label="prod")  # type: ignore[call-arg]
pltrace.prompts.refresh()
pltrace.prompts.refresh(1)  # type: ignore[arg-type]

# Totals.

usage: Usage = pltrace.current_span().usage
assert_type(usage.requests, int)
assert_type(usage.by_model["gpt"].errors, int)
assert_type(usage.by_tag["draft"].by_model["gpt"].total_tokens, int)
usage.requests = 5  # type: ignore[misc]
usage.by_model["gpt"] = usage  # type: ignore[index]
usage.tokens  # type: ignore[attr-defined]

# In tests.

with capture_spans() as spans:
    assert_type(spans, CapturedSpans)
    assert_type(spans[0], Span)
    assert_type(spans.named("block").status is None, bool)
    assert_type(spans.requests, list[CapturedRequest])
    (captured,) = spans.assert_requests(1, model="m", tags=["t"], metadata={"k": 1}, prompt="p", status="SUCCESS")
    assert_type(captured.model, str)
    assert_type(captured.tags, list[str])
    assert_type(captured.metadata, dict[str, str])
    assert_type(captured.prompt_name, str | None)
    assert_type(captured.span, Span)
    assert_type(spans.tree(), list[Any])
    spans.assert_nothing_open()
    spans.assert_nothing_open("here")  # type: ignore[call-arg]
    spans.named(1)  # type: ignore[arg-type]
    spans.tree(1)  # type: ignore[call-arg]
    spans.assert_requests("1")  # type: ignore[arg-type]
    spans.assert_requests(tag=["t"])  # type: ignore[call-arg]
    captured.span = spans[0]  # type: ignore[misc]

with capture_spans(deterministic=True, tags=["t"], sample=0.5, libraries={"lib": {"enabled": False}}):
    pass
capture_spans(tag=["t"])  # type: ignore[call-arg]
capture_spans(store="traces.db")  # type: ignore[call-arg]
capture_spans(True)  # type: ignore[call-arg]


def test_with_the_fixture(pltrace_spans: CapturedSpans) -> None:
    pltrace_spans.assert_requests(0)


# The drop-in handler.

PromptLayerCallbackHandler()
PromptLayerCallbackHandler(pl_id_callback=print, pl_tags=["t"])
PromptLayerCallbackHandler(pl_tag=["t"])  # type: ignore[call-arg]

try:
    pltrace.configure(sample=2.0)
except ConfigError as error:
    as_base: PltraceError = error
    as_value_error: ValueError = error
except (PromptLayerError, StoreError) as error:
    as_base = error
