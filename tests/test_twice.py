"""A call that PromptLayer's own instrumentation sees as well is still one request at PromptLayer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda

import pltrace
from pltrace import traced
from pltrace._config import load
from pltrace._doctor import diagnosis
from pltrace._health import counts
from tests.support.http_double import Answer, HttpDouble, Request
from tests.support.programs import run
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import chat

_MANAGED, _BY = "promptlayer.request_log.managed", "promptlayer.request_log.span_id"


class Collector(HttpDouble):
    """Takes what PromptLayer's own instrumentation sends."""

    def answer(self, request: Request) -> Answer:
        """Takes it."""
        return Answer(200)


@pytest.fixture
def instrumented(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """PromptLayer's own instrumentation of OpenAI's client; gives what keeps its spans."""
    tracing = pytest.importorskip("promptlayer.tracing")
    openai = pytest.importorskip("opentelemetry.instrumentation.genai.openai")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    before = dict(os.environ)
    with Collector() as collector:
        provider, kept = TracerProvider(), InMemorySpanExporter()
        provider.add_span_processor(SimpleSpanProcessor(kept))
        # Another test's provider is forgotten with the instrumentation that is taken off below.
        monkeypatch.setattr(tracing, "_instrumented_provider_owners", {})
        tracing.instrument_openai(api_key="key", endpoint=collector.url, tracer_provider=provider)
        yield kept
        openai.OpenAIInstrumentor().uninstrument()
        provider.shutdown()
    for name in set(os.environ) - set(before):
        del os.environ[name]  # It sets some.


def attributes(kept: Any) -> list[dict[str, Any]]:
    """Gives what PromptLayer's instrumentation noted of each call."""
    return [dict(span.attributes) for span in kept.get_finished_spans()]


async def test_calls_are_linked(
    instrumented: Any, deliver: Callable[..., None], promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """However a model is run, the other span says that the request is logged, and under which span."""
    deliver()
    model = chat(llm)
    with traced("root"):
        model.invoke("Hi")
        await model.ainvoke("Hi")
        list(model.stream("Hi"))
        (RunnableLambda(str) | model).batch(["a", "b"])
        await asyncio.gather(*(model.ainvoke("Hi") for _ in range(3)))
        # The last, since the instrumentation leaves its own context behind it.
        [piece async for piece in model.astream("Hi")]
    assert await asyncio.to_thread(pltrace.flush, 10)
    seen = attributes(instrumented)
    assert [found[_MANAGED] for found in seen] == [True] * 9
    assert sorted(found[_BY] for found in seen) == sorted(log["span_id"] for log in promptlayer.request_logs)
    assert counts["calls_linked"] == 9


def test_other_calls_are_left_alone(
    instrumented: Any, deliver: Callable[..., None], promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Calls that we don't log, outside of blocks, sampled out or not by LangChain, are PromptLayer's own to log."""
    import openai

    deliver()
    chat(llm).invoke("Hi")
    with traced("root", sample=0.0):
        chat(llm).invoke("Hi")
    client = openai.OpenAI(base_url=llm.base_url, api_key="none")

    def managed(run_manager: Any) -> None:  # As LangChain names its own.
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])

    with traced("root"):
        managed(SimpleNamespace(run_id="run-17"))
    assert [_MANAGED in found for found in attributes(instrumented)] == [False] * 3
    assert counts["calls_linked"] == 0


def test_without_a_key_they_are_promptlayers_own(instrumented: Any, local: Path, llm: ScriptedOpenAI) -> None:
    """As long as we send PromptLayer nothing, it is told of no request of ours."""
    with traced("root"):
        chat(llm).invoke("Hi")
    assert [_MANAGED in found for found in attributes(instrumented)] == [False]


def _running(client: Any, llm: ScriptedOpenAI) -> Any:
    class Hosted(BaseChatModel):
        def _generate(self, *_: Any, **__: Any) -> ChatResult:
            with contextlib.suppress(Exception):
                client.run("greeting")
            return ChatResult(generations=[ChatGeneration(message=AIMessage("Hi."))])

        @property
        def _llm_type(self) -> str:
            return "hosted"

    return Hosted()


def _stand_in(client: Any, llm: ScriptedOpenAI) -> Any:
    openai = client.openai.OpenAI(base_url=llm.base_url, api_key="none")
    return chat(llm, client=openai.chat.completions)


def _runs(client: Any, llm: ScriptedOpenAI) -> None:
    client.run("greeting")


def _calls_a_provider(client: Any, llm: ScriptedOpenAI) -> None:
    openai = client.openai.OpenAI(base_url=llm.base_url, api_key="none")
    openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("inside", "beside", "named"),
    [(_running, _runs, "client.run()"), (_stand_in, _calls_a_provider, "client.openai")],
    ids=["run", "stand-in"],
)
def test_a_client_that_logs_inside_a_model(
    inside: Any,
    beside: Any,
    named: str,
    deliver: Callable[..., None],
    promptlayer: PromptLayerServer,
    llm: ScriptedOpenAI,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """What can't be linked is warned about once, and `doctor` says what to do about it; beside a model it is right."""
    from promptlayer import PromptLayer

    deliver()
    with Collector() as collector, caplog.at_level(logging.WARNING, "pltrace"), traced("root"):
        client = PromptLayer(api_key="key", base_url=collector.url)
        model = inside(client, llm)
        model.invoke("Hi")
        model.invoke("Hi")
        with contextlib.suppress(Exception):
            beside(client, llm)
    (record,) = [record for record in caplog.records if record.name == "pltrace"]
    assert named in record.getMessage()
    assert pltrace.flush(10)
    assert pltrace.shutdown(10)
    found = diagnosis(load(store=tmp_path / "store" / "traces.db"))
    assert found["store"]["counts"]["calls_logged_twice"] == 2
    assert any(named in remedy for remedy in found["remedies"])


def test_a_promptlayer_without_what_is_looked_for(tmp_path: Path) -> None:
    """Another version of promptlayer, that lacks what is watched for calls that are logged twice, can be imported."""
    package = tmp_path / "promptlayer"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "promptlayer.py").write_text("class PromptLayer:\n    def run(self):\n        return 1\n")
    (package / "promptlayer_base.py").write_text("class PromptLayerBase: ...\n")
    (package / "span_exporter.py").write_text("")
    program = """
        import pltrace

        pltrace.configure(api_key="pl_key", base_url="http://127.0.0.1:9", store="memory")
        import promptlayer.promptlayer, promptlayer.promptlayer_base, promptlayer.span_exporter

        print(promptlayer.promptlayer.PromptLayer().run(), callable(promptlayer.promptlayer_base.PromptLayerBase()))
        pltrace.shutdown(0)
    """
    ended = run(program, tmp_path)
    assert (ended.code, ended.out) == (0, "1 False\n"), ended.err
