"""A request is logged as the model was given it: tools, choices, structured output and media, through real clients."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration
from pydantic import BaseModel

import pltrace
from pltrace import traced
from pltrace._blueprint import chat_answer, untold_of
from pltrace._encoding import Encoder
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import Reply, ScriptedOpenAI
from tests.support.traces import chat

Deliver = Callable[..., None]

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Look.", "parameters": SCHEMA}}
GRAMMAR = {"type": "custom", "custom": {"name": "sql", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}}}


def logged(server: PromptLayerServer, call: Callable[[], Any]) -> dict[str, Any]:
    """Make a call in a block, and give how PromptLayer logged it."""
    with traced("calling"):
        call()
    assert pltrace.flush(10.0)
    (log,) = server.request_logs
    return log


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [WEATHER]}},
        {"type": "custom", "custom": {"name": "sql"}},
    ],
    ids=["allowed_tools", "custom"],
)
def test_a_choice_among_tools_is_logged_as_it_was_given(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, choice: dict[str, Any]
) -> None:
    """What the blueprint can't say of tools and their choice stands in the parameters, exactly as the model got it."""
    deliver()

    log = logged(
        promptlayer,
        lambda: (
            chat(llm, use_responses_api=False)
            .bind(tools=[WEATHER, GRAMMAR], tool_choice=choice, temperature=0.5)
            .invoke("Hi")
        ),
    )

    assert log["input"]["tools"] == [WEATHER]
    assert "tool_choice" not in log["input"]
    assert log["parameters"]["tools"] == llm.bodies[0]["tools"] == [WEATHER, GRAMMAR]
    assert log["parameters"]["tool_choice"] == llm.bodies[0]["tool_choice"] == choice
    assert log["parameters"]["temperature"] == 0.5


def test_what_the_blueprint_says_is_not_repeated(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Plain functions and a plain choice stand in the prompt alone."""
    deliver()

    log = logged(promptlayer, lambda: chat(llm).bind_tools([WEATHER], tool_choice="weather").invoke("Hi"))

    assert log["input"]["tools"] == [WEATHER]
    assert log["input"]["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert not log["parameters"].keys() & {"tools", "tool_choice"}


@pytest.mark.parametrize(
    "tooling",
    [
        {"tools": [WEATHER], "tool_choice": "auto"},
        {"tools": [{**WEATHER["function"], "type": "function", "strict": True}]},  # type: ignore[dict-item]
        {"tools": [{"name": "weather", "description": "Look.", "input_schema": SCHEMA}]},
        {"tools": [{"toolSpec": {"name": "weather", "inputSchema": {"json": SCHEMA}}}]},
        {"tools": [{"function_declarations": [{"name": "weather", "parameters": SCHEMA}]}]},
        {"tools": [{"google_search": {}}, {"type": "web_search_preview", "search_context_size": "low"}]},
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        {"tool_choice": {"type": "tool", "name": "weather"}},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "web_search_preview"}},
        {"functions": [WEATHER["function"]], "function_call": {"name": "weather"}},
        {"tools": None, "tool_choice": None, "temperature": 0.5},
    ],
)
def test_tooling_that_the_blueprint_tells_in_full(tooling: dict[str, Any]) -> None:
    """Every provider's usual shapes are told by the prompt."""
    assert untold_of(tooling) == {}


@pytest.mark.parametrize(
    "tooling",
    [
        {"tools": [{"name": "weather", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{"name": "weather", "input_schema": SCHEMA, "defer_loading": True}]},
        {"tools": [{"type": "custom", "name": "sql", "format": {"type": "grammar"}}]},
        {"tools": [{"type": "computer_20250124", "name": "computer"}]},
        {"tools": [{"function_declarations": [{"name": "f", "behavior": "NON_BLOCKING"}]}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "none"}}]},
        {"tools": [7, WEATHER]},
        {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
        {"tool_choice": {"type": "mcp", "server_label": "docs", "name": "read"}},
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
        {"tool_choice": True},
        {"function_call": {"name": "f", "strict": True}},
    ],
)
def test_tooling_that_the_blueprint_tells_in_part(tooling: dict[str, Any]) -> None:
    """Whatever has more to it than the prompt can say is kept beside it as a whole."""
    assert untold_of({**tooling, "temperature": 0.5}) == tooling


def test_without_inputs_no_tools_are_kept(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Tools are a part of what the model is given, in whichever place they stand."""
    deliver(capture="outputs")

    log = logged(
        promptlayer,
        lambda: chat(llm, use_responses_api=False).bind(tools=[GRAMMAR], tool_choice="required").invoke("Hi"),
    )

    assert "sql" not in json.dumps(log)


def test_structured_output_is_logged_with_its_schema(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """The schema of a structured output stands in the parameters as the provider gets it, as does `strict`."""

    class City(BaseModel):
        name: str
        api_key: str

    deliver()
    with ScriptedOpenAI(Reply('{"name": "Ulm", "api_key": ""}')) as llm:
        log = logged(
            promptlayer,
            lambda: (
                chat(llm)
                .with_structured_output(City.model_json_schema(), method="json_schema", strict=True)
                .invoke("Hi")
            ),
        )

    assert log["parameters"]["response_format"] == llm.bodies[0]["response_format"]


PHOTO = b64encode(bytes(900_000)).decode()  # 1.2 million characters.


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        ({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{PHOTO}"}}, "image left out: image/jpeg"),
        ({"type": "image", "base64": PHOTO, "mime_type": "image/webp"}, "image left out: image/webp"),
        (
            {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PHOTO}"}},
            "a.pdf left out: application/pdf",
        ),
        ({"type": "input_audio", "input_audio": {"data": PHOTO, "format": "wav"}}, "audio left out: audio/wav"),
    ],
    ids=["image_url", "image", "file", "audio"],
)
def test_a_medium_that_is_too_large_is_left_out_as_a_whole(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, block: dict[str, Any], kept: str
) -> None:
    """Beyond a million characters a medium is replaced by a note of what it was: half of one would show nothing."""
    deliver()

    log = logged(promptlayer, lambda: chat(llm).invoke([HumanMessage(["Look:", block])]))

    look, medium = log["input"]["messages"][0]["content"]
    assert look == {"type": "text", "text": "Look:"}
    assert medium["type"] == "text"
    assert kept in medium["text"]
    assert "base64," not in json.dumps(log["input"])


def test_many_media_are_kept_whole_or_not_at_all(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """Of many images that are too much together some are whole, and no data URL is cut."""
    deliver()
    url = f"data:image/png;base64,{PHOTO[:900_000]}"

    log = logged(
        promptlayer,
        lambda: chat(llm).invoke([HumanMessage([{"type": "image_url", "image_url": {"url": url}}] * 14)]),
    )

    urls = [block["image_url"]["url"] for block in log["input"]["messages"][0]["content"]]
    assert urls.count(url) >= 10
    assert {other for other in urls if other != url} == {"[… 900022 characters of image/png;base64 left out …]"}


def test_a_generated_image_that_is_too_large_keeps_what_is_said_of_it() -> None:
    """The prompt that an image was drawn from is text, and stays."""
    drawn = {"type": "image_generation_call", "id": "ig_1", "result": PHOTO, "revised_prompt": "A cat."}

    answer = chat_answer([ChatGeneration(message=AIMessage([drawn]))], Encoder())

    first, second = answer["messages"][0]["content"]
    assert "image left out: image/png" in first["text"]
    assert "A cat." in second["text"]
