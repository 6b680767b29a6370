"""LangChain's messages, generations and tools as PromptLayer's Prompt Blueprint."""

from __future__ import annotations

import json
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    ChatMessageChunk,
    FunctionMessage,
    FunctionMessageChunk,
    HumanMessage,
    HumanMessageChunk,
    RemoveMessage,
    SystemMessage,
    SystemMessageChunk,
    ToolMessage,
    ToolMessageChunk,
)
from langchain_core.outputs import ChatGeneration, Generation

from pltrace._blueprint import (
    Usage,
    chat_answer,
    chat_prompt,
    completion_answer,
    completion_prompt,
    text_answer,
    tokens,
)
from tests.support.schema import validate


class PlainJson:
    """An encoder that hides and shortens nothing."""

    def dumps(self, value: object) -> str:
        """The value as JSON, or its repr where there is none."""
        try:
            return json.dumps(value, default=lambda other: getattr(other, "__dict__", None) or repr(other))
        except (TypeError, ValueError, RecursionError):
            return json.dumps(f"<{type(value).__name__}>")

    def schema(self, value: object) -> object:
        """The same for a schema."""
        return self.jsonable(value)

    def jsonable(self, value: object) -> object:
        """The value as JSON data."""
        return json.loads(self.dumps(value), parse_constant=str)


JSON = PlainJson()


def only(messages: Any, **more: Any) -> dict[str, Any]:
    """The one blueprint message made of one message, checked against the schema."""
    prompt = chat_prompt([messages], JSON, **more)
    validate("ChatPrompt", prompt)
    assert prompt["type"] == "chat"
    [message] = prompt["messages"]
    return message


def said(text: str) -> dict[str, Any]:
    """A text block."""
    return {"type": "text", "text": text}


def media(title: str, mime: str | None, url: str, form: str) -> dict[str, Any]:
    """A media block."""
    return {"type": "media", "media": {"title": title, "type": mime, "url": url, "format": form}}


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A tool call of the blueprint."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class Shade(str, Enum):
    """A text that isn't only a text."""

    DARK = "dark"


class Unreadable:
    """A message that can't be read at all."""

    @property
    def type(self) -> str:
        """Raises."""
        raise RuntimeError("no")


HI = [said("hi")]
MESSAGES: list[tuple[Any, dict[str, Any]]] = [
    (HumanMessage("hi"), {"role": "user", "content": HI}),
    (HumanMessage(""), {"role": "user", "content": []}),
    (HumanMessage(["hi", "", said("")]), {"role": "user", "content": HI}),
    (HumanMessage("hi", name="Ann"), {"role": "user", "content": HI, "name": "Ann"}),
    (HumanMessageChunk("hi"), {"role": "user", "content": HI}),
    (AIMessage("hi", name="Bot"), {"role": "assistant", "content": HI, "name": "Bot"}),
    (AIMessageChunk("hi"), {"role": "assistant", "content": HI}),
    (AIMessage(""), {"role": "assistant", "content": []}),
    (SystemMessage("hi"), {"role": "system", "content": HI}),
    (SystemMessageChunk("hi"), {"role": "system", "content": HI}),
    (
        SystemMessage("hi", additional_kwargs={"__openai_role__": "developer"}),
        {"role": "developer", "content": HI},
    ),
    (HumanMessage("hi", additional_kwargs={"__openai_role__": "developer"}), {"role": "user", "content": HI}),
    (ChatMessage("hi", role="model"), {"role": "assistant", "content": HI}),
    (SimpleNamespace(type="human", content=Shade.DARK), {"role": "user", "content": [said("dark")]}),
    (ToolMessage("hi", tool_call_id="c1"), {"role": "tool", "content": HI, "tool_call_id": "c1"}),
    (
        ToolMessage("hi", tool_call_id="c1", name="f", artifact=object()),
        {"role": "tool", "content": HI, "tool_call_id": "c1", "name": "f"},
    ),
    (
        ToolMessage("no", tool_call_id="c1", status="error"),
        {"role": "tool", "content": [said("no"), said("status: error")], "tool_call_id": "c1"},
    ),
    (ToolMessageChunk("hi", tool_call_id="c1"), {"role": "tool", "content": HI, "tool_call_id": "c1"}),
    (FunctionMessage("hi", name="f"), {"role": "function", "content": HI, "name": "f"}),
    (FunctionMessage("hi", name=""), {"role": "function", "content": HI, "name": ""}),
    (
        {"role": "assistant", "content": "", "invalid_tool_calls": [{"id": "c1", "name": "f", "args": "{"}]},
        {"role": "assistant", "content": [], "tool_calls": [call("c1", "f", "{")]},
    ),
    (
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {
            "role": "assistant",
            "content": [],
            "function_call": {"name": "f", "arguments": "{}"},
        },
    ),
    (FunctionMessageChunk(content="hi", name="f"), {"role": "function", "content": HI, "name": "f"}),
    (ChatMessage("hi", role="assistant"), {"role": "assistant", "content": HI}),
    (ChatMessage("hi", role="developer"), {"role": "developer", "content": HI}),
    (ChatMessage("hi", role="tool"), {"role": "tool", "content": HI, "tool_call_id": ""}),
    (ChatMessage("hi", role="critic"), {"role": "user", "content": HI, "name": "critic"}),
    (ChatMessage("hi", role="critic", name="Ann"), {"role": "user", "content": HI, "name": "critic (Ann)"}),
    (ChatMessageChunk(content="hi", role="user"), {"role": "user", "content": HI}),
    ("hi", {"role": "user", "content": HI}),
    (("human", "hi"), {"role": "user", "content": HI}),
    (("ai", [said("hi")]), {"role": "assistant", "content": HI}),
    ({"role": "user", "content": "hi", "name": "Ann"}, {"role": "user", "content": HI, "name": "Ann"}),
    (
        {"role": "tool", "content": "hi", "tool_call_id": "c1"},
        {"role": "tool", "content": HI, "tool_call_id": "c1"},
    ),
    (
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "assistant", "content": [], "tool_calls": [call("c1", "f", "{}")]},
    ),
    (
        {"type": "ai", "content": "hi", "additional_kwargs": {"refusal": "no"}},
        {"role": "assistant", "content": [said("hi"), said("no")]},
    ),
    ({"type": "text", "text": "hi"}, {"role": "user", "content": [said('{"type": "text", "text": "hi"}')]}),
    (SimpleNamespace(type="human", content="hi"), {"role": "user", "content": HI}),
    (SimpleNamespace(type="human", content=None), {"role": "user", "content": []}),
    (SimpleNamespace(type="human", content=7), {"role": "user", "content": [said("7")]}),
    (SimpleNamespace(type=["human"], content="hi"), None),
    (SimpleNamespace(type="tool", content="hi", tool_call_id=7), None),
    (RemoveMessage("m1"), None),
    (Unreadable(), None),
    ((1, 2), None),
    (7, None),
    (None, None),
    ({}, None),
]


@pytest.mark.parametrize(("message", "expected"), MESSAGES)
def test_message(message: Any, expected: Any) -> None:
    """Every kind of message keeps its role, text and names; one unknown is a user's, holding its JSON."""
    assert only(message) == (expected or {"role": "user", "content": [said(JSON.dumps(message))]})


URL = {"type": "url_citation", "title": "T", "url": "http://x", "start_index": 1, "end_index": 2}
OUTPUT_IMAGE = {"type": "output_media", "media_type": "image", "mime_type": "image/png"}
PNG = "data:image/png;base64,QUJD"
OCTETS = "data:application/octet-stream;base64,QUJD"
# What an assistant says; blocks that aren't here become text with their JSON.
ANSWERED: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"type": "text", "text": "a", "index": 0}, [said("a")]),
    ({"type": "text", "text": "a", "id": "m1"}, [{**said("a"), "id": "m1"}]),
    ({"type": "text", "text": "a", "id": 7}, [said("a")]),
    (
        {"type": "text", "text": "a", "extras": {"signature": "s"}},
        [{**said("a"), "thought_signature": "s"}],
    ),
    (
        {"type": "text", "text": "a", "thought_signature": "s"},
        [{**said("a"), "thought_signature": "s"}],
    ),
    ({"text": "a"}, [said("a")]),
    (
        {"type": "video", "url": "http://x/v", "mime_type": "video/mp4"},
        [
            {
                "type": "output_media",
                "url": "http://x/v",
                "mime_type": "video/mp4",
                "media_type": "video",
            }
        ],
    ),
    ({"type": "output_text", "text": "a", "annotations": [URL]}, [{**said("a"), "annotations": [URL]}]),
    ({"type": "output_text", "annotations": [URL]}, [{**said(""), "annotations": [URL]}]),
    ({"type": "refusal", "refusal": "no"}, [said("no")]),
    ({"type": "non_standard", "value": {"type": "refusal", "refusal": "no"}}, [said("no")]),
    (
        {"type": "thinking", "thinking": "t", "signature": "s"},
        [{"type": "thinking", "thinking": "t", "signature": "s"}],
    ),
    ({"type": "redacted_thinking", "data": "x"}, [{"type": "thinking", "thinking": "", "signature": "x"}]),
    (
        {"type": "reasoning", "reasoning": "t", "extras": {"signature": "s"}},
        [{"type": "thinking", "thinking": "t", "signature": "s"}],
    ),
    (
        {
            "type": "reasoning",
            "id": "rs",
            "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}],
            "content": [{"type": "reasoning_text", "text": "c"}],
            "encrypted_content": "e",
        },
        [{"type": "thinking", "thinking": "a\n\nb\n\nc", "id": "rs", "signature": "e"}],
    ),
    ({"type": "reasoning", "summary": []}, [{"type": "thinking", "thinking": ""}]),
    (
        {"type": "reasoning_content", "reasoning_content": {"thinking": "t"}},
        [{"type": "thinking", "thinking": "t"}],
    ),
    ({"type": "reasoning", "id": "rs", "summary": []}, [{"type": "thinking", "thinking": "", "id": "rs"}]),
    (
        {"type": "reasoning_content", "reasoning_content": {"text": "t", "signature": "s"}},
        [{"type": "thinking", "thinking": "t", "signature": "s"}],
    ),
    ({"type": "image", "base64": "QUJD", "mime_type": "image/png"}, [{**OUTPUT_IMAGE, "url": PNG}]),
    ({"type": "image_url", "image_url": {"url": PNG}}, [{**OUTPUT_IMAGE, "url": PNG}]),
    (
        {"type": "audio", "base64": "QUJD", "mime_type": "audio/mp3"},
        [
            {
                "type": "output_media",
                "url": "data:audio/mp3;base64,QUJD",
                "mime_type": "audio/mp3",
                "media_type": "audio",
            }
        ],
    ),
    ({"type": "image", "file_id": "f1"}, [media("image", None, "f1", "neither")]),
    ({"type": "audio", "url": "http://x/a"}, [media("audio", None, "http://x/a", "url")]),
    (
        {"type": "file", "url": "http://x/a", "mime_type": "text/csv"},
        [media("file", "text/csv", "http://x/a", "url")],
    ),
    (
        {
            "type": "image_generation_call",
            "id": "ig",
            "status": "completed",
            "result": "QUJD",
            "output_format": "webp",
        },
        [
            {
                "type": "output_media",
                "id": "ig",
                "url": "data:image/webp;base64,QUJD",
                "mime_type": "image/webp",
                "media_type": "image",
                "provider_metadata": {"output_format": "webp"},
            }
        ],
    ),
    (
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}},
        [{"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "q"}}],
    ),
    (
        {"type": "server_tool_use", "id": "s1", "name": "f", "input": {}, "partial_json": '{"q'},
        [{"type": "server_tool_use", "id": "s1", "name": "f", "input": {"arguments": '{"q'}}],
    ),
    (
        {"type": "server_tool_call", "id": "s1", "name": "f", "args": {"a": 1}},
        [{"type": "server_tool_use", "id": "s1", "name": "f", "input": {"a": 1}}],
    ),
    (
        {"type": "server_tool_call_chunk", "id": "s1", "name": "f", "args": ""},
        [{"type": "server_tool_use", "id": "s1", "name": "f", "input": {}}],
    ),
    (
        {"type": "server_tool_result", "tool_call_id": "s1", "status": "error", "output": "out"},
        [{"type": "code_execution_result", "output": "out", "outcome": "OUTCOME_FAILED", "tool_use_id": "s1"}],
    ),
    (
        {
            "type": "server_tool_call",
            "id": "m1",
            "name": "remote_mcp",
            "args": {"a": 1},
            "extras": {"tool_name": "f", "server_label": "srv"},
        },
        [{"type": "mcp_call", "id": "m1", "name": "f", "server_label": "srv", "arguments": '{"a": 1}'}],
    ),
    (
        {
            "type": "server_tool_call",
            "id": "m1",
            "name": "remote_mcp",
            "extras": {"tool_name": "f", "server_name": "srv", "arguments": '{"a'},
        },
        [{"type": "mcp_call", "id": "m1", "name": "f", "server_label": "srv", "arguments": '{"a'}],
    ),
    (
        {
            "type": "server_tool_call",
            "id": "m1",
            "name": "mcp_list_tools",
            "args": {},
            "extras": {"server_label": "srv"},
        },
        [{"type": "mcp_list_tools", "id": "m1", "server_label": "srv"}],
    ),
    (
        {
            "type": "server_tool_result",
            "tool_call_id": "s1",
            "status": "success",
            "output": [{"type": "web_search_result", "url": "u", "title": "t", "page_age": None}],
            "extras": {"block_type": "web_search_tool_result"},
        },
        [
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s1",
                "content": [{"type": "web_search_result", "url": "u", "title": "t"}],
            }
        ],
    ),
    (
        {
            "type": "server_tool_result",
            "tool_call_id": "s1",
            "status": "error",
            "output": "out",
            "extras": {"block_type": "mcp_tool_result"},
        },
        [{"type": "mcp_call", "id": "s1", "error": "out"}],
    ),
    (
        {
            "type": "web_search_tool_result",
            "tool_use_id": "s1",
            "content": [{"url": "u", "title": "t", "encrypted_content": "e", "page_age": "1 day"}],
        },
        [
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s1",
                "content": [
                    {
                        "type": "web_search_result",
                        "url": "u",
                        "title": "t",
                        "encrypted_content": "e",
                        "page_age": "1 day",
                    }
                ],
            }
        ],
    ),
    (
        {"type": "web_search_call", "id": "ws", "action": "q"},
        [{"type": "server_tool_use", "id": "ws", "name": "web_search", "input": {"action": "q"}}],
    ),
    (
        {"type": "server_tool_use", "id": "s1", "name": "f"},
        [{"type": "server_tool_use", "id": "s1", "name": "f", "input": {}}],
    ),
    (
        {"type": "web_search_call", "id": "ws", "status": "completed", "action": {"query": "q"}},
        [{"type": "server_tool_use", "id": "ws", "name": "web_search", "input": {"query": "q"}}],
    ),
    (
        {"type": "file_search_call", "id": "fs", "queries": ["q"], "results": None},
        [
            {
                "type": "server_tool_use",
                "id": "fs",
                "name": "file_search",
                "input": {"queries": ["q"], "results": None},
            }
        ],
    ),
    (
        {"type": "tool_search_call", "id": "ts", "arguments": {"q": 1}},
        [
            {
                "type": "server_tool_use",
                "id": "ts",
                "name": "tool_search",
                "input": {"arguments": {"q": 1}},
            }
        ],
    ),
    (
        {
            "type": "code_execution_tool_result",
            "tool_use_id": "s1",
            "content": {"stdout": "out", "stderr": "err", "return_code": 1, "content": []},
        },
        [{"type": "code_execution_result", "output": "outerr", "outcome": "OUTCOME_FAILED", "tool_use_id": "s1"}],
    ),
    (
        {"type": "code_execution_tool_result", "tool_use_id": "s1", "content": {"error_code": "down"}},
        [
            {
                "type": "code_execution_result",
                "output": '{"error_code": "down"}',
                "outcome": "OUTCOME_FAILED",
                "tool_use_id": "s1",
            }
        ],
    ),
    (
        {"type": "bash_code_execution_tool_result", "tool_use_id": "s1", "content": {"stdout": "out"}},
        [{"type": "bash_code_execution_tool_result", "tool_use_id": "s1", "content": {"stdout": "out"}}],
    ),
    (
        {"type": "text_editor_code_execution_tool_result", "tool_use_id": "s1", "content": {"lines": ["a"]}},
        [
            {
                "type": "text_editor_code_execution_tool_result",
                "tool_use_id": "s1",
                "content": {"lines": ["a"]},
            }
        ],
    ),
    (
        {
            "type": "code_interpreter_call",
            "id": "ci",
            "container_id": "cn",
            "code": "1+1",
            "status": "completed",
            "outputs": [{"type": "logs", "logs": "2"}, {"type": "image", "url": "http://x/i"}],
        },
        [
            {"type": "code", "code": "1+1", "id": "ci", "container_id": "cn"},
            {"type": "code_execution_result", "output": "2", "outcome": "OUTCOME_OK"},
            {**OUTPUT_IMAGE, "url": "http://x/i"},
        ],
    ),
    (
        {"type": "code_interpreter_call", "code": "1", "status": "failed", "outputs": [{"logs": "no"}]},
        [
            {"type": "code", "code": "1"},
            {"type": "code_execution_result", "output": "no", "outcome": "OUTCOME_FAILED"},
        ],
    ),
    ({"type": "executable_code", "executable_code": {"code": "1"}}, [{"type": "code", "code": "1"}]),
    (
        {"type": "code_execution_result", "output": "2", "outcome": "OUTCOME_OK"},
        [{"type": "code_execution_result", "output": "2", "outcome": "OUTCOME_OK"}],
    ),
    (
        {"type": "executable_code", "executable_code": "1+1", "language": "python", "id": "e1"},
        [{"type": "code", "code": "1+1", "id": "e1"}],
    ),
    (
        {"type": "code_execution_result", "code_execution_result": "2", "outcome": 3},
        [{"type": "code_execution_result", "output": "2", "outcome": "OUTCOME_DEADLINE_EXCEEDED"}],
    ),
    (
        {"type": "mcp_tool_use", "id": "m1", "name": "f", "server_name": "srv", "input": {"a": 1}},
        [{"type": "mcp_call", "id": "m1", "name": "f", "server_label": "srv", "arguments": '{"a": 1}'}],
    ),
    (
        {"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": False, "content": [said("a"), "b"]},
        [{"type": "mcp_call", "id": "m1", "output": "a\nb"}],
    ),
    (
        {"type": "mcp_tool_result", "tool_use_id": "m1", "is_error": True, "content": [{"a": 1}]},
        [{"type": "mcp_call", "id": "m1", "error": '[{"a": 1}]'}],
    ),
    (
        {"type": "mcp_tool_use", "id": "m1", "name": "f", "partial_json": '{"a'},
        [{"type": "mcp_call", "id": "m1", "name": "f", "arguments": '{"a'}],
    ),
    ({"type": "mcp_call", "error": "down"}, [{"type": "mcp_call", "error": "down"}]),
    ({"type": "mcp_list_tools", "error": "down"}, [{"type": "mcp_list_tools", "error": "down"}]),
    (
        {
            "type": "mcp_call",
            "id": "m1",
            "name": "f",
            "server_label": "srv",
            "arguments": "{}",
            "output": None,
            "error": {"code": 1},
            "approval_request_id": "a1",
        },
        [
            {
                "type": "mcp_call",
                "id": "m1",
                "name": "f",
                "server_label": "srv",
                "approval_request_id": "a1",
                "arguments": "{}",
                "error": {"code": 1},
            }
        ],
    ),
    (
        {"type": "mcp_list_tools", "id": "m1", "server_label": "srv", "tools": [{"name": "f"}]},
        [{"type": "mcp_list_tools", "id": "m1", "server_label": "srv", "tools": [{"name": "f"}]}],
    ),
    (
        {"type": "mcp_approval_request", "id": "m1", "name": "f", "arguments": "{}", "server_label": "srv"},
        [{"type": "mcp_approval_request", "id": "m1", "name": "f", "arguments": "{}", "server_label": "srv"}],
    ),
    (
        {"type": "shell_call", "id": "x", "call_id": "c", "status": "completed", "action": {"commands": []}},
        [
            {
                "type": "shell_call",
                "id": "x",
                "call_id": "c",
                "status": "completed",
                "action": {"commands": []},
            }
        ],
    ),
    (
        {"type": "local_shell_call", "id": "x", "call_id": "c", "status": "ok", "action": {"command": ["ls"]}},
        [{"type": "shell_call", "id": "x", "call_id": "c", "status": "ok", "action": {"command": ["ls"]}}],
    ),
    (
        {"type": "shell_call_output", "id": "x", "call_id": "c", "status": "ok", "output": [{"stdout": "out"}]},
        [{"type": "shell_call_output", "id": "x", "call_id": "c", "status": "ok", "output": [{"stdout": "out"}]}],
    ),
    (
        {"type": "apply_patch_call", "id": "x", "call_id": "c", "status": "ok", "operation": {"type": "delete_file"}},
        [{"type": "apply_patch_call", "id": "x", "call_id": "c", "status": "ok", "operation": {"type": "delete_file"}}],
    ),
    (
        {"type": "apply_patch_call_output", "id": "x", "call_id": "c", "output": "done", "status": "completed"},
        [{"type": "apply_patch_call_output", "id": "x", "call_id": "c", "output": "done", "status": "completed"}],
    ),
]
# What a user sends.
ASKED: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"type": "input_text", "text": "a"}, [said("a")]),
    (
        {"type": "image_url", "image_url": {"url": "http://x/i", "detail": "low"}},
        [{"type": "image_url", "image_url": {"url": "http://x/i", "detail": "low"}}],
    ),
    (
        {"type": "image_url", "image_url": "http://x/i"},
        [{"type": "image_url", "image_url": {"url": "http://x/i"}}],
    ),
    (
        {"type": "input_image", "image_url": PNG, "detail": "auto"},
        [{"type": "image_url", "image_url": {"url": PNG, "detail": "auto"}}],
    ),
    (
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        [{"type": "image_url", "image_url": {"url": PNG}}],
    ),
    (
        {"type": "image", "source": {"type": "url", "url": "http://x/i"}},
        [{"type": "image_url", "image_url": {"url": "http://x/i"}}],
    ),
    (
        {"type": "image", "source": {"type": "file", "file_id": "f1"}},
        [media("image", None, "f1", "neither")],
    ),
    (
        {"type": "image", "source_type": "base64", "data": "QUJD", "mime_type": "image/png"},
        [{"type": "image_url", "image_url": {"url": PNG}}],
    ),
    ({"type": "image", "source_type": "id", "id": "f1"}, [media("image", None, "f1", "neither")]),
    ({"type": "image", "data": "QUJD", "format": "png"}, [{"type": "image_url", "image_url": {"url": PNG}}]),
    ({"type": "image", "base64": "QUJD"}, [{"type": "image_url", "image_url": {"url": PNG}}]),
    (
        {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "mp3"}},
        [media("audio", "audio/mp3", "data:audio/mp3;base64,QUJD", "base64")],
    ),
    (
        {"type": "audio", "base64": "QUJD"},
        [media("audio", "audio/wav", "data:audio/wav;base64,QUJD", "base64")],
    ),
    (
        {"type": "video", "url": "http://x/v", "mime_type": "video/mp4"},
        [media("video", "video/mp4", "http://x/v", "url")],
    ),
    (
        {"type": "media", "mime_type": "video/mp4", "data": b"ABC"},
        [media("media", "video/mp4", "data:video/mp4;base64,QUJD", "base64")],
    ),
    (
        {"type": "media", "mime_type": "video/mp4", "file_uri": "gs://x"},
        [media("media", "video/mp4", "gs://x", "url")],
    ),
    (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,QUJD"}},
        [media("a.pdf", "application/pdf", "data:application/pdf;base64,QUJD", "base64")],
    ),
    (
        {"type": "file_data", "file_uri": "gs://x", "mime_type": "text/csv"},
        [media("file", "text/csv", "gs://x", "url")],
    ),
    ({"type": "file_data", "data": "QUJD"}, [media("file", "application/octet-stream", OCTETS, "base64")]),
    ({"type": "media", "data": "QUJD"}, [media("media", "application/octet-stream", OCTETS, "base64")]),
    ({"type": "video", "base64": "QUJD"}, [media("video", "video/mp4", "data:video/mp4;base64,QUJD", "base64")]),
    ({"type": "video", "video": {"url": "http://x"}}, [media("video", None, "http://x", "url")]),
    ({"type": "input_file", "file_data": "QUJD"}, [media("file", "application/octet-stream", OCTETS, "base64")]),
    (
        {"type": "file", "source_type": "id", "id": "f1", "metadata": {"filename": "a.pdf"}},
        [media("a.pdf", None, "f1", "neither")],
    ),
    ({"type": "file", "file": {"file_id": "f1"}}, [media("file", None, "f1", "neither")]),
    (
        {"type": "input_file", "filename": "a.pdf", "file_url": "http://x/a"},
        [media("a.pdf", None, "http://x/a", "url")],
    ),
    (
        {
            "type": "file",
            "base64": "QUJD",
            "mime_type": "application/pdf",
            "extras": {"filename": "a.pdf"},
        },
        [media("a.pdf", "application/pdf", "data:application/pdf;base64,QUJD", "base64")],
    ),
    ({"type": "file", "source_type": "text", "text": "body"}, [said("body")]),
    (
        {"type": "text-plain", "text": "body", "title": "T", "mime_type": "text/plain"},
        [said("T"), said("body")],
    ),
    (
        {"type": "text-plain", "file_id": "f1", "mime_type": "text/plain"},
        [media("file", "text/plain", "f1", "neither")],
    ),
    (
        {
            "type": "document",
            "title": "T",
            "context": "C",
            "source": {"type": "text", "media_type": "text/plain", "data": "body"},
        },
        [said("T"), said("C"), said("body")],
    ),
    (
        {"type": "document", "title": "T", "context": "C", "source": {"type": "url", "url": "http://x/a"}},
        [said("C"), media("T", None, "http://x/a", "url")],
    ),
    (
        {"type": "document", "source": {"type": "content", "content": [said("a"), "b"]}},
        [said("a\nb")],
    ),
    (
        {"type": "mcp_approval_response", "approval_request_id": "a1", "approve": True},
        [{"type": "mcp_approval_response", "approval_request_id": "a1", "approve": True}],
    ),
]
# A required member is missing or of the wrong type, or the blueprint has nothing like it.
MISFITS: list[Any] = [
    {},
    {"type": "text"},
    {"type": "text", "text": 7},
    {"type": "text", "text": None},
    {"type": ["text"], "text": "a"},
    {"type": "thinking"},
    {"type": "thinking", "thinking": 7},
    {"type": "reasoning", "summary": [{"text": 7}]},
    {"type": "image"},
    {"type": "image", "base64": "QUJD", "mime_type": 7},
    {"type": "image_url", "image_url": {"url": 7}},
    {"type": "audio", "audio": "QUJD"},
    {"type": "file", "file": {}},
    {"type": "document", "source": {"type": "content", "content": [{"type": "image"}]}},
    {"type": "server_tool_use", "name": "f"},
    {"type": "server_tool_use", "id": "s1", "name": "f", "input": [1]},
    {"type": "server_tool_result", "tool_call_id": "s1", "status": "success"},
    {"type": "web_search_tool_result", "tool_use_id": "s1", "content": {"error_code": "down"}},
    {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [{"url": 7}]},
    {"type": "bash_code_execution_tool_result", "content": {}},
    {"type": "bash_code_execution_tool_result", "tool_use_id": "s1", "content": "out"},
    {"type": "code_execution_result", "code_execution_result": "2", "outcome": 99},
    {"type": "code_interpreter_call", "id": "ci", "code": None},
    {"type": "image_generation_call", "id": "ig", "result": None},
    {"type": "mcp_call", "name": 7},
    {"type": "mcp_list_tools", "tools": ["f"]},
    {"type": "mcp_approval_response", "approval_request_id": "a1", "approve": 1},
    {"type": "mcp_approval_response", "approve": True},
    {"type": "mcp_approval_response", "approval_request_id": "a1"},
    {"type": "shell_call", "action": "ls"},
    {"type": "shell_call_output", "output": "out"},
    {"type": "web_search_call", "action": {}},
    {"type": "tool_result", "content": "out"},
    {"text": "a", "thought": True},
    {"type": "search_result", "source": "s", "title": "t", "content": [said("a")]},
    {"type": "non_standard", "value": {"type": "non_standard", "value": {"type": "text", "text": "a"}}},
    {"type": "non_standard", "value": 7},
    {"type": "brand_new", "payload": [1]},
    7,
    None,
    [said("a")],
]


@pytest.mark.parametrize(("block", "expected"), ANSWERED)
def test_block_of_an_answer(block: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    """Every block a model sends becomes the blueprint block closest to it."""
    assert only(AIMessage([block])) == {"role": "assistant", "content": expected}


@pytest.mark.parametrize(("block", "expected"), ASKED)
def test_block_of_a_question(block: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    """Every block a model is sent becomes the blueprint block closest to it."""
    assert only(HumanMessage([block])) == {"role": "user", "content": expected}


@pytest.mark.parametrize("role", ["human", "ai"])
@pytest.mark.parametrize("block", MISFITS)
def test_misfit(role: str, block: Any) -> None:
    """A block that doesn't fit the schema becomes a text block holding its JSON."""
    message = SimpleNamespace(type=role, content=[block], additional_kwargs={})
    assert only(message)["content"] == [said(JSON.dumps(block))]


@pytest.mark.parametrize("kind", ["tool_use", "tool_call", "function_call"])
def test_call_of_a_user(kind: str) -> None:
    """Only assistants have tool calls; in anybody else's message one is kept as text."""
    block = {"type": kind, "id": "c1", "name": "f"}
    assert only(HumanMessage([block])) == {"role": "user", "content": [said(JSON.dumps(block))]}


def test_cyclic_block() -> None:
    """A block that contains itself is converted like any other unknown one."""
    block: dict[str, Any] = {"type": "non_standard"}
    block["value"] = block
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": "c1"}
    result["content"] = [result]
    prompt = chat_prompt([HumanMessage([block]), SimpleNamespace(type="human", content=[result])], JSON)
    validate("ChatPrompt", prompt)
    assert [message["role"] for message in prompt["messages"]] == ["user", "tool"]


def test_tool_results_among_user_blocks() -> None:
    """A result in Anthropic's format becomes the tool message it is, before the rest of the message."""
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": "one"},
        {"type": "tool_result", "tool_use_id": "c2", "content": [said("two")], "is_error": True},
    ]
    prompt = chat_prompt([HumanMessage(results), HumanMessage([*results[:1], "more"])], JSON)
    validate("ChatPrompt", prompt)
    one = {"role": "tool", "tool_call_id": "c1", "content": [said("one")]}
    two = {"role": "tool", "tool_call_id": "c2", "content": [said("two"), said("status: error")]}
    assert prompt["messages"] == [one, two, one, {"role": "user", "content": [said("more")]}]


def test_tool_result_of_an_answer() -> None:
    """Only a user's message can hold the results of calls; in an answer one is kept as text."""
    block = {"type": "tool_result", "tool_use_id": "c1", "content": "one"}
    assert only(AIMessage([block])) == {"role": "assistant", "content": [said(JSON.dumps(block))]}


CALLS: list[tuple[BaseMessage, list[dict[str, Any]]]] = [
    (
        AIMessage("", tool_calls=[{"name": "f", "args": {"a": 1}, "id": "c1"}]),
        [call("c1", "f", '{"a": 1}')],
    ),
    (
        AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": None}, {"name": "g", "args": {}, "id": ""}]),
        [call("call_0", "f", "{}"), call("call_1", "g", "{}")],
    ),
    (
        AIMessage(
            "",
            tool_calls=[{"name": "f", "args": {}, "id": "c1"}],
            invalid_tool_calls=[{"name": "g", "args": '{"a', "id": "c2", "error": None}],
        ),
        [call("c1", "f", "{}"), call("c2", "g", '{"a')],
    ),
    (
        AIMessage("", invalid_tool_calls=[{"name": None, "args": None, "id": None, "error": None}]),
        [call("call_0", "", "")],
    ),
    (
        AIMessageChunk("", tool_call_chunks=[{"name": "f", "args": '{"a": 1}', "id": "c1", "index": 0}]),
        [call("c1", "f", '{"a": 1}')],
    ),
    (AIMessage([{"type": "tool_use", "id": "c1", "name": "f", "input": {}}]), [call("c1", "f", "{}")]),
    (
        AIMessage(
            [{"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}],
            tool_calls=[{"name": "f", "args": {"a": 1}, "id": "c1"}],
        ),
        [call("c1", "f", '{"a": 1}')],
    ),
    (
        AIMessage(
            [{"type": "function_call", "id": "fc", "call_id": "c1", "name": "f", "arguments": "{}"}],
            tool_calls=[{"name": "f", "args": {}, "id": "c1"}],
        ),
        [call("c1", "f", "{}")],
    ),
    (
        AIMessage(
            [{"type": "tool_call", "id": None, "name": "f", "args": {"a": 1}}],
            tool_calls=[{"name": "f", "args": {"a": 1}, "id": "c1"}],
        ),
        [call("c1", "f", '{"a": 1}')],
    ),
    (
        AIMessage(
            [{"type": "tool_call", "id": "c2", "name": "f", "args": {}}],
            tool_calls=[{"name": "f", "args": {}, "id": "c1"}],
        ),
        [call("c1", "f", "{}"), call("c2", "f", "{}")],
    ),
    (
        AIMessage([{"type": "function_call", "name": "f", "args": {}}] * 2),
        [call("call_0", "f", "{}"), call("call_1", "f", "{}")],
    ),
    (
        AIMessage([{"type": "custom_tool_call", "id": "ct", "call_id": "c1", "name": "f", "input": "raw"}]),
        [call("c1", "f", "raw")],
    ),
    (
        AIMessage([{"type": "tool_use", "id": "c1", "name": "f", "input": {}, "partial_json": '{"a'}]),
        [call("c1", "f", '{"a')],
    ),
    (
        AIMessage([{"type": "invalid_tool_call", "id": "c1", "name": "f", "args": "{", "error": ""}]),
        [call("c1", "f", "{")],
    ),
    (
        AIMessage([{"type": "tool_call_chunk", "id": "c1", "name": "f", "args": "{", "index": 0}]),
        [call("c1", "f", "{")],
    ),
]


@pytest.mark.parametrize(("message", "expected"), CALLS)
def test_tool_calls(message: BaseMessage, expected: list[dict[str, Any]]) -> None:
    """A tool call is told once, with a string for its id, wherever its message tells it."""
    assert only(message) == {"role": "assistant", "content": [], "tool_calls": expected}


@pytest.mark.parametrize("arguments", ["{cut", '{"a": 1, "b', '{"a": "b'])
def test_streamed_arguments_that_are_not_json(arguments: str) -> None:
    """A streamed call's arguments stay as the model wrote them, though LangChain mends or cuts what isn't JSON."""
    chunk = AIMessageChunk("", tool_call_chunks=[{"name": "f", "args": arguments, "id": "c1", "index": 0}])
    assert only(chunk)["tool_calls"] == [call("c1", "f", arguments)]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "c1", "error": "cut"}]),
        AIMessage([{"type": "invalid_tool_call", "id": "c1", "name": "f", "args": "{", "error": "cut"}]),
    ],
)
def test_invalid_tool_call(message: BaseMessage) -> None:
    """Why LangChain couldn't read a call is told as text, as a call has no place for it."""
    assert only(message) == {
        "role": "assistant",
        "content": [said("error of the tool call c1: cut")],
        "tool_calls": [call("c1", "f", "{")],
    }


def test_custom_tool_calls() -> None:
    """The name and the input of OpenAI's custom tools are kept, also beside calls that LangChain parsed."""
    custom = {"id": "c1", "type": "custom", "custom": {"name": "f", "input": "raw"}}
    function = {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    assert only(AIMessage("", additional_kwargs={"tool_calls": [custom]}))["tool_calls"] == [call("c1", "f", "raw")]
    both = AIMessage("", additional_kwargs={"tool_calls": [function, custom]})
    assert only(both)["tool_calls"] == [call("c2", "g", "{}"), call("c1", "f", "raw")]


def test_raw_tool_calls() -> None:
    """OpenAI's raw calls stand in where LangChain parsed none."""
    raw = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a'}}]
    message = SimpleNamespace(type="ai", content="", additional_kwargs={"tool_calls": raw}, tool_calls=[])
    assert only(message)["tool_calls"] == [call("c1", "f", '{"a')]
    parsed = AIMessage("", additional_kwargs={"tool_calls": raw}, tool_calls=[{"name": "g", "args": {}, "id": "d"}])
    assert only(parsed)["tool_calls"] == [call("d", "g", "{}")]


def test_junk_tool_call() -> None:
    """A tool call that is no dict is kept as text."""
    message = SimpleNamespace(type="ai", content="", tool_calls=[7])
    assert only(message) == {"role": "assistant", "content": [said("7")]}


def test_function_call() -> None:
    """OpenAI's old function call is kept, unless it repeats a tool call."""
    extras = {"function_call": {"name": "f", "arguments": "{}"}}
    assert only(AIMessage("", additional_kwargs=extras)) == {
        "role": "assistant",
        "content": [],
        "function_call": {"name": "f", "arguments": "{}"},
    }
    repeated = AIMessage("", additional_kwargs=extras, tool_calls=[{"name": "f", "args": {}, "id": "c1"}])
    assert "function_call" not in only(repeated)


THOUGHT = {"type": "thinking", "thinking": "t"}
EXTRAS: list[tuple[Any, dict[str, Any], list[dict[str, Any]]]] = [
    ("hi", {"reasoning_content": "t"}, [THOUGHT, said("hi")]),
    ("hi", {"reasoning_content": {"text": "t"}}, [THOUGHT, said("hi")]),
    ("hi", {"reasoning_content": 7}, [{"type": "thinking", "thinking": "7"}, said("hi")]),
    ("hi", {"reasoning": {"id": "rs", "summary": [{"text": "t"}]}}, [{**THOUGHT, "id": "rs"}, said("hi")]),
    ("hi", {"reasoning": "t", "reasoning_content": "t"}, [THOUGHT, said("hi")]),
    ([THOUGHT, "hi"], {"reasoning_content": "t"}, [THOUGHT, said("hi")]),
    ("hi", {"thinking": "t"}, [THOUGHT, said("hi")]),
    ("hi", {"thinking": {"text": "t", "signature": "s"}}, [{**THOUGHT, "signature": "s"}, said("hi")]),
    ("hi", {"reasoning_details": [{"type": "reasoning.text", "text": "t"}]}, [THOUGHT, said("hi")]),
    ("hi", {"reasoning_details": [{"type": "reasoning.summary", "summary": "t"}]}, [THOUGHT, said("hi")]),
    (
        "hi",
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "d"}]},
        [{"type": "thinking", "thinking": "", "signature": "d"}, said("hi")],
    ),
    (
        "hi",
        {"reasoning_details": [{"type": "new", "words": "t"}]},
        [{"type": "thinking", "thinking": '{"type": "new", "words": "t"}'}, said("hi")],
    ),
    (
        "hi",
        {"reasoning": "ab", "reasoning_details": [{"text": "a"}, {"text": "b"}]},
        [{"type": "thinking", "thinking": "ab"}, said("hi")],
    ),
    ("hi", {"refusal": "no"}, [said("hi"), said("no")]),
    ("hi", {"refusal": None}, [said("hi")]),
    ([{"type": "refusal", "refusal": "no"}], {"refusal": "no"}, [said("no")]),
    (
        "hi",
        {"tool_outputs": [{"type": "executable_code", "executable_code": "1"}]},
        [{"type": "code", "code": "1"}, said("hi")],
    ),
    (
        "",
        {"audio": {"id": "a1", "data": "QUJD", "transcript": "spoken"}},
        [
            {
                "type": "output_media",
                "url": "data:audio/wav;base64,QUJD",
                "mime_type": "audio/wav",
                "media_type": "audio",
            },
            said("spoken"),
        ],
    ),
    (
        "",
        {"audio": b"ABC"},
        [
            {
                "type": "output_media",
                "url": "data:audio/wav;base64,QUJD",
                "mime_type": "audio/wav",
                "media_type": "audio",
            }
        ],
    ),
]


@pytest.mark.parametrize(("content", "extras", "expected"), EXTRAS)
def test_extras(content: Any, extras: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    """What providers put beside the content is kept, once."""
    assert only(AIMessage(content, additional_kwargs=extras))["content"] == expected


CITED: list[tuple[Any, dict[str, Any], list[dict[str, Any]]]] = [
    ("hi", {"annotations": [URL]}, [{**said("hi"), "annotations": [URL]}]),
    (
        "hi",
        {"annotations": [{"type": "url_citation", "url_citation": {**URL, "type": None}}]},
        [{**said("hi"), "annotations": [URL]}],
    ),
    ("hi", {"annotations": [URL], "citations": [URL]}, [{**said("hi"), "annotations": [URL]}]),
    ([{**said("hi"), "annotations": [URL]}], {"annotations": [URL]}, [{**said("hi"), "annotations": [URL]}]),
    ("", {"citations": [URL]}, [{**said(""), "annotations": [URL]}]),
    ("hi", {"citations": ["http://x"]}, [said("hi"), said('{"citations": ["http://x"]}')]),
]


@pytest.mark.parametrize("place", ["additional_kwargs", "response_metadata"])
@pytest.mark.parametrize(("content", "extras", "expected"), CITED)
def test_citations_beside_the_content(
    place: str, content: Any, extras: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    """Citations that stand beside the text annotate it; those of an unknown shape follow it as JSON."""
    if place == "response_metadata" and "annotations" in extras:
        extras = {"citations": extras["annotations"]}
    assert only(AIMessage(content, **{place: extras}))["content"] == expected


BESIDE = ["documents", "search_results", "tool_plan", "executed_tools", "images", "related_questions", "parsed"]
PLACES = [
    *[("additional_kwargs", key) for key in (*BESIDE, "grounding_metadata")],
    *[("response_metadata", key) for key in ("grounding_metadata", "citation_metadata")],
]


@pytest.mark.parametrize(("place", "key"), PLACES)
@pytest.mark.parametrize("value", ["words", [{"title": "words"}]])
def test_unknown_extras(place: str, key: str, value: Any) -> None:
    """What a provider puts beside the content in a way nobody knows is kept as text, as JSON."""
    made = only(AIMessage("hi", **{place: {key: value}}))["content"]
    assert made[0] == said("hi")
    assert len(made) == 2
    assert "words" in made[1]["text"]


def test_images_beside_the_content() -> None:
    """Images that a model made beside its text are its media."""
    made = only(AIMessage("hi", additional_kwargs={"images": [{"type": "image_url", "image_url": {"url": PNG}}]}))
    assert made["content"] == [said("hi"), {**OUTPUT_IMAGE, "url": PNG}]


def test_refusal_of_a_response() -> None:
    """A refusal that only the response's metadata tells is kept."""
    assert only(AIMessage("", response_metadata={"refusal": "no"}))["content"] == [said("no")]


@pytest.mark.parametrize(
    "message",
    [
        AIMessage("hi", additional_kwargs={"id": "a", "role": "assistant", "__openai_role__": "x", "lc_source": "y"}),
        AIMessage("hi", additional_kwargs={"__gemini_function_call_thought_signatures__": {"c1": "s"}}),
        AIMessage("hi", additional_kwargs={"usage": {"prompt_tokens": 1}, "stop_reason": "end_turn", "model_id": "m"}),
        AIMessage("hi", additional_kwargs={"documents": [], "search_results": [None, {}], "is_blocked": False}),
        AIMessage(
            "hi", additional_kwargs={"annotations": [], "citations": None, "refusal": None, "images": [], "x": ""}
        ),
        AIMessage("hi", response_metadata={"model_name": "m", "finish_reason": "stop", "logprobs": {"content": ["a"]}}),
        AIMessage("hi", response_metadata={"grounding_metadata": {"chunks": [], "score": 0.0}, "citations": []}),
        AIMessage("hi", additional_kwargs={"parsed": "hi"}),
    ],
)
def test_bookkeeping_is_no_answer(message: BaseMessage) -> None:
    """Ids, roles, counts and what is empty or told already add nothing to an answer."""
    assert only(message) == {"role": "assistant", "content": HI}


@pytest.mark.parametrize("content", ['{"b": 1, "a": "x"}', [said("first"), said('{"b": 1, "a": "x"}')]])
def test_parsed_output(content: Any) -> None:
    """A structured output is told once, if the text holds it."""
    plain = only(AIMessage(content))
    assert only(AIMessage(content, additional_kwargs={"parsed": {"a": "x", "b": 1}})) == plain
    assert only(AIMessage(content, additional_kwargs={"parsed": {"a": "y"}}))["content"] == [
        *plain["content"],
        said('{"parsed": {"a": "y"}}'),
    ]


FILE = {"type": "file_citation", "index": 3, "file_id": "f1", "filename": "a.pdf"}
CONTAINER = {
    "type": "container_file_citation",
    "container_id": "cn",
    "start_index": 1,
    "end_index": 2,
    "filename": "a.csv",
    "file_id": "f1",
}
MAP = {"type": "map_citation", "title": "T", "url": "http://x", "start_index": 1, "end_index": 2}
ANNOTATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (URL, URL),
    ({"type": "url_citation", "url_citation": {**URL, "type": None}}, URL),
    ({**URL, "type": "citation", "cited_text": "q"}, {**URL, "cited_text": "q"}),
    (
        {"type": "citation", "title": "a.pdf", "extras": {"file_id": "f1", "index": 3}},
        FILE,
    ),
    (
        {
            "type": "web_search_result_location",
            "url": "http://x",
            "title": None,
            "cited_text": "q",
            "encrypted_index": "e",
        },
        {
            "type": "url_citation",
            "title": "",
            "url": "http://x",
            "start_index": 0,
            "end_index": 0,
            "cited_text": "q",
            "encrypted_index": "e",
        },
    ),
    (
        {"type": "search_result_location", "source": "http://x", "title": "T"},
        {**URL, "start_index": 0, "end_index": 0},
    ),
    (FILE, FILE),
    (
        {
            "type": "char_location",
            "cited_text": "q",
            "document_index": 3,
            "document_title": "a.pdf",
            "file_id": None,
        },
        {**FILE, "file_id": "", "cited_text": "q"},
    ),
    ({"type": "page_location", "document_index": 3, "file_id": "f1", "title": "a.pdf"}, FILE),
    ({"type": "content_block_location", "document_index": 3, "file_id": "f1", "filename": "a.pdf"}, FILE),
    (CONTAINER, CONTAINER),
    ({"type": "citation"}, {"type": "file_citation", "index": 0, "file_id": "", "filename": ""}),
    ({"type": "non_standard_annotation", "value": CONTAINER}, CONTAINER),
    ({**MAP, "encrypted_index": "e"}, MAP),
    ({**MAP, "place_id": "p1"}, {**MAP, "place_id": "p1"}),
]


@pytest.mark.parametrize("key", ["annotations", "citations"])
@pytest.mark.parametrize(("annotation", "expected"), ANNOTATIONS)
def test_annotation(key: str, annotation: dict[str, Any], expected: dict[str, Any]) -> None:
    """A citation of any provider becomes a valid annotation of its text."""
    block = {**said("a"), key: [annotation]}
    assert only(AIMessage([block]))["content"] == [{**said("a"), "annotations": [expected]}]
    assert only(HumanMessage([block]))["content"] == [{**said("a"), "annotations": [expected]}]


@pytest.mark.parametrize(
    "annotation",
    [
        {"type": "url_citation", "title": "T"},
        {**URL, "start_index": "1"},
        {**URL, "end_index": True},
        {"type": "container_file_citation"},
        {"type": "file_path", "file_id": "f1"},
        {"type": "non_standard_annotation", "value": 7},
        7,
    ],
)
def test_misfit_annotation(annotation: Any) -> None:
    """An annotation that doesn't fit the schema follows its text as JSON."""
    content = only(AIMessage([{**said("a"), "annotations": [annotation, URL]}]))["content"]
    assert content == [{**said("a"), "annotations": [URL]}, said(JSON.dumps(annotation))]


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "does f", "parameters": SCHEMA}}
FLAT = {"type": "function", **FUNCTION["function"]}  # type: ignore[dict-item]


def built_in(kind: str, given: dict[str, Any], provider: str, made: str, name: str = "") -> Any:
    """A built-in tool as given and as made."""
    tool = {"id": kind, "name": name or kind, "description": "", "provider": provider, "type": made}
    return given, [{**tool, "config": given}]


TOOLS: list[tuple[Any, list[dict[str, Any]]]] = [
    (FUNCTION, [FUNCTION]),
    (FLAT, [FUNCTION]),
    (
        {**FLAT, "strict": True, "description": None},
        [{"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}],
    ),
    ({"name": "f", "description": "does f", "input_schema": SCHEMA}, [FUNCTION]),
    ({"type": "custom", "name": "f", "description": "does f", "input_schema": SCHEMA}, [FUNCTION]),
    ({"type": "custom", "name": "f"}, [{"type": "function", "function": {"name": "f"}}]),
    ({"toolSpec": {"name": "f", "description": "does f", "inputSchema": {"json": SCHEMA}}}, [FUNCTION]),
    (
        {"function_declarations": [FLAT, {"name": "g"}, 7], "google_search": {}},
        [
            FUNCTION,
            {"type": "function", "function": {"name": "g"}},
            {
                "id": "google_search",
                "name": "google_search",
                "description": "",
                "provider": "google",
                "type": "web_search",
                "config": {"google_search": {}},
            },
        ],
    ),
    ({"functionDeclarations": [FLAT]}, [FUNCTION]),
    (
        {"function_declarations": [{"name": "g", "parameters_json_schema": SCHEMA}]},
        [{"type": "function", "function": {"name": "g", "parameters": SCHEMA}}],
    ),
    (
        {"type": "mcp", "description": "does m", "name": "m"},
        [
            {
                "id": "mcp",
                "name": "m",
                "description": "does m",
                "provider": "openai",
                "type": "mcp",
                "config": {"type": "mcp", "description": "does m", "name": "m"},
            }
        ],
    ),
    built_in("web_search_preview", {"type": "web_search_preview"}, "openai", "web_search"),
    built_in("local_shell", {"type": "local_shell"}, "openai", "shell"),
    built_in("google_search_retrieval", {"google_search_retrieval": {}}, "google", "web_search"),
    built_in("code_execution", {"code_execution": {}}, "google", "code_interpreter"),
    built_in("web_search", {"type": "web_search"}, "openai", "web_search"),
    built_in("web_search_preview_2025_03_11", {"type": "web_search_preview_2025_03_11"}, "openai", "web_search"),
    built_in("file_search", {"type": "file_search", "vector_store_ids": ["v"]}, "openai", "file_search"),
    built_in("code_interpreter", {"type": "code_interpreter"}, "openai", "code_interpreter"),
    built_in("image_generation", {"type": "image_generation"}, "openai", "image_generation"),
    built_in("mcp", {"type": "mcp", "server_label": "srv"}, "openai", "mcp"),
    built_in("shell", {"type": "shell"}, "openai", "shell"),
    built_in("apply_patch", {"type": "apply_patch"}, "openai", "apply_patch"),
    built_in(
        "web_search_20250305",
        {"type": "web_search_20250305", "name": "search"},
        "anthropic",
        "web_search",
        "search",
    ),
    built_in("bash_20250124", {"type": "bash_20250124"}, "anthropic", "bash"),
    built_in("text_editor_20250728", {"type": "text_editor_20250728"}, "anthropic", "text_editor"),
    built_in("code_execution_20250825", {"type": "code_execution_20250825"}, "anthropic", "code_interpreter"),
    built_in("url_context", {"url_context": {}}, "google", "url_context"),
    built_in("google_maps", {"google_maps": {}}, "google", "google_maps"),
]


@pytest.mark.parametrize(("tool", "expected"), TOOLS)
def test_tool(tool: Any, expected: list[dict[str, Any]]) -> None:
    """A tool definition in any provider's format becomes a blueprint tool."""
    prompt = chat_prompt([], JSON, parameters={"tools": [tool]})
    validate("ChatPrompt", prompt)
    assert prompt["tools"] == expected


@pytest.mark.parametrize(
    "tool",
    [
        {},
        7,
        None,
        {"type": "function"},
        {"type": "computer_20250124"},
        {"type": 7},
        {"name": 7},
        {"function": {}},
    ],
)
def test_misfit_tool(tool: Any) -> None:
    """A tool the blueprint has no shape for is left to the parameters, and the others are kept."""
    prompt = chat_prompt([], JSON, parameters={"tools": [tool, FUNCTION], "functions": [tool]})
    validate("ChatPrompt", prompt)
    assert prompt == {"type": "chat", "messages": [], "tools": [FUNCTION]}


CHOSEN = {"type": "function", "function": {"name": "f"}}
CHOICES: list[tuple[str, Any, Any]] = [
    ("tool_choice", "auto", "auto"),
    ("tool_choice", CHOSEN, CHOSEN),
    ("tool_choice", {"type": "function", "name": "f"}, CHOSEN),
    ("tool_choice", {"type": "tool", "name": "f"}, CHOSEN),
    ("tool_choice", {"type": "any", "disable_parallel_tool_use": True}, "any"),
    ("tool_choice", {"type": "auto"}, "auto"),
    ("tool_choice", {"type": "none"}, "none"),
    ("tool_choice", {"type": "required"}, "required"),
    ("tool_choice", {"type": "web_search"}, "web_search"),
    ("tool_choice", {"type": "allowed_tools", "tools": []}, None),
    ("tool_choice", True, None),
    ("tool_choice", None, None),
    ("function_call", "auto", "auto"),
    ("function_call", {"name": "f"}, {"name": "f"}),
    ("function_call", {"name": 7}, None),
    ("functions", [FUNCTION["function"]], [FUNCTION["function"]]),
    ("tools", [], None),
]


@pytest.mark.parametrize(("key", "given_value", "expected"), CHOICES)
def test_choice(key: str, given_value: Any, expected: Any) -> None:
    """The choice of a tool is kept where the blueprint can say it."""
    prompt = chat_prompt([], JSON, parameters={key: given_value, "temperature": 0})
    validate("ChatPrompt", prompt)
    assert prompt == {"type": "chat", "messages": []} | ({key: expected} if expected else {})


def test_completion() -> None:
    """A text model's prompts and answers are one text block each."""
    prompt = completion_prompt(["a", "", 7], JSON)  # type: ignore[list-item]
    answer = completion_answer([Generation(text="a"), Generation(text=""), 7], JSON)
    for value in (prompt, answer):
        validate("CompletionPrompt", value)
        assert value == {"type": "completion", "content": [said("a"), said(""), said("7")]}


def test_chat_answer() -> None:
    """Every generation is an assistant message, also one that has only text, or nothing readable."""
    generations = [
        ChatGeneration(message=AIMessage("a")),
        ChatGeneration(message=ChatMessage("b", role="critic")),
        Generation(text="c"),
        Generation(text=""),
        7,
        ChatGeneration(message=AIMessage("", tool_calls=[{"name": "f", "args": {}, "id": "c1"}])),
    ]
    answer = chat_answer(generations, JSON)
    validate("ChatPrompt", answer)
    assert {message["role"] for message in answer["messages"]} == {"assistant"}
    assert [message["content"] for message in answer["messages"]] == [
        [said("a")],
        [said("b")],
        [said("c")],
        [],
        [said("7")],
        [],
    ]


@pytest.mark.parametrize(("text", "content"), [("so far", [said("so far")]), ("", [])])
def test_text_answer(text: str, content: list[dict[str, Any]]) -> None:
    """An answer that was cut off holds what had arrived."""
    answer = text_answer(text)
    validate("ChatPrompt", answer)
    assert answer == {"type": "chat", "messages": [{"role": "assistant", "content": content}]}


def used(**usage: Any) -> list[Any]:
    """Generations whose message reports its usage."""
    return [SimpleNamespace(message=SimpleNamespace(usage_metadata=usage))]


COUNTS: list[tuple[list[Any], Any, Usage]] = [
    ([], None, Usage()),
    ([Generation(text="a")], {}, Usage()),
    (
        used(input_tokens=3, output_tokens=4, total_tokens=7),
        {"token_usage": {"prompt_tokens": 9}},
        Usage(3, 4),
    ),
    (used(input_tokens=3, output_tokens=4) * 2, None, Usage(3, 4)),
    (
        used(
            input_tokens=3,
            output_tokens=4,
            input_token_details={"cache_read": 2},
            output_token_details={"reasoning": 1},
        ),
        None,
        Usage(3, 4, 2, 1),
    ),
    (
        [],
        {
            "token_usage": {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 2},
                "completion_tokens_details": {"reasoning_tokens": 1},
            }
        },
        Usage(3, 4, 2, 1),
    ),
    (
        [],
        {"usage": {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 2}},
        Usage(3, 4, 2),
    ),
    (
        used(input_tokens=3, output_tokens=4, input_token_details={"cache_creation": 2}),
        None,
        Usage(3, 4, None, None, 2),
    ),
    (
        used(
            input_tokens=3,
            output_tokens=4,
            input_token_details={
                "cache_creation": 0,
                "ephemeral_5m_input_tokens": 2,
                "ephemeral_1h_input_tokens": 1,
            },
        ),
        None,
        Usage(3, 4, None, None, 3),
    ),
    (
        [],
        {"usage": {"input_tokens": 3, "output_tokens": 4, "cache_creation_input_tokens": 2}},
        Usage(3, 4, None, None, 2),
    ),
    ([], {"token_usage": {}, "usage": {"prompt_tokens": 0}}, Usage(0)),
    (used(input_tokens=-1, output_tokens=4.0), None, Usage(None, 4)),
    (used(input_tokens=True, output_tokens="4"), {"usage": {"input_tokens": 1.5}}, Usage()),
    ([7, Unreadable()], [1], Usage()),
    (used(input_tokens=float("nan"), output_tokens=float("inf")), "x", Usage()),
]


@pytest.mark.parametrize(("generations", "llm_output", "expected"), COUNTS)
def test_tokens(generations: list[Any], llm_output: Any, expected: Usage) -> None:
    """Token counts come from the message, else from the provider's report, and are whole numbers or None."""
    assert tokens(generations, llm_output) == expected


# --- any input ----------------------------------------------------------------------------------------------

KINDS = sorted({block["type"] for block, _ in ANSWERED + ASKED if "type" in block} | {"tool_use", "function_call"})
KEYS = sorted({key for block, _ in ANSWERED + ASKED for key in block if key not in {"type", "text"}})
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
# Texts are numbered, so that each can be looked for in the result.
texts = st.integers(0, 10**9).map(lambda number: f'text "{number}" äß')
blocks = st.one_of(
    st.sampled_from([block for block, _ in ANSWERED + ASKED] + MISFITS[:-3]),
    st.builds(lambda text: {"type": "text", "text": text}, texts),
    st.builds(lambda text, junk: {"type": "text", "text": text, "annotations": [junk]}, texts, junk),
    st.builds(lambda text, junk: {"type": "thinking", "thinking": text, "signature": junk}, texts, junk),
    st.builds(lambda text, junk: {"type": "reasoning", "reasoning": text, "id": junk}, texts, junk),
    st.builds(lambda text: {"type": "reasoning", "summary": [{"text": text}, {"text": text}]}, texts),
    st.builds(lambda text: {"type": "document", "source": {"type": "text", "data": text}}, texts),
    st.builds(
        lambda kind, fields: {**fields, "type": kind},
        st.sampled_from(KINDS) | st.text(max_size=3),
        st.dictionaries(st.sampled_from(KEYS), junk, max_size=5),
    ),
)
contents = texts | st.lists(texts | blocks, max_size=4)
EXTRA_KEYS = {key for _, extras, _ in EXTRAS + CITED for key in extras} | {*BESIDE, "tool_calls", "id"}
extras = st.dictionaries(st.sampled_from(sorted(EXTRA_KEYS)), texts | junk, max_size=3)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.text(max_size=3),
            "args": st.dictionaries(st.text(max_size=2), junk, max_size=2),
            "id": st.none() | st.text(max_size=3),
        }
    ),
    max_size=3,
)
names = st.none() | st.text(max_size=3)
messages = st.one_of(
    st.builds(HumanMessage, contents, name=names, additional_kwargs=extras),
    st.builds(SystemMessage, contents, additional_kwargs=extras),
    st.builds(ToolMessage, contents, tool_call_id=st.text(max_size=3), status=st.sampled_from(["success", "error"])),
    st.builds(ChatMessage, contents, role=st.sampled_from(["user", "tool", "assistant", "system", "critic"])),
    st.builds(FunctionMessage, contents, name=st.text(max_size=3)),
    st.builds(AIMessage, contents, name=names, tool_calls=calls, additional_kwargs=extras),
    st.builds(
        lambda kind, content, extras: SimpleNamespace(
            type=kind, content=content, additional_kwargs=extras, tool_calls=extras
        ),
        st.sampled_from(["human", "ai", "tool", "weird", "chat"]),
        junk,
        junk,
    ),
    texts,
    st.tuples(st.sampled_from(["human", "ai", "critic"]), contents),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]) | junk, "content": contents}),
    junk,
)


def strings_of(value: Any) -> list[str]:
    """Every string in a value, also inside strings that hold JSON."""
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            return [value]
        return [value, *(strings_of(inner) if inner != value else [])]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in strings_of(item)] if isinstance(value, list) else []


def texts_of(value: Any) -> set[str]:
    """The numbered texts in a message, wherever they stand."""
    if isinstance(value, str):
        return {value} if value.startswith('text "') else set()
    if isinstance(value, (BaseMessage, SimpleNamespace)):
        value = {"content": value.content, "extras": value.additional_kwargs if value.type == "ai" else None}
        if isinstance(value["extras"], dict):
            lost = {"tool_calls", "id"}
            value["extras"] = {key: text for key, text in value["extras"].items() if key not in lost}
    if isinstance(value, dict):
        value = list(value.values())
    return {text for item in value for text in texts_of(item)} if isinstance(value, (list, tuple)) else set()


LOOK = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@LOOK
@given(st.lists(messages, max_size=3))
def test_any_messages(given_messages: list[Any]) -> None:
    """Whatever the messages, the result is valid by the schema, is JSON, and has lost no text."""
    prompt = chat_prompt(given_messages, JSON)
    answer = chat_answer([SimpleNamespace(message=message) for message in given_messages], JSON)
    for result in (prompt, answer):
        validate("ChatPrompt", result)
        found = strings_of(json.loads(json.dumps(result, allow_nan=False)))
        for text in set().union(*map(texts_of, given_messages)):
            assert any(text in string for string in found)
    assert all(message["role"] == "assistant" for message in answer["messages"])


@LOOK
@given(
    st.dictionaries(
        st.sampled_from(["tools", "functions", "tool_choice", "function_call"]),
        junk | st.lists(junk | st.sampled_from([tool for tool, _ in TOOLS]), max_size=3),
    )
    | junk
)
def test_any_parameters(parameters: Any) -> None:
    """Whatever the invocation parameters, the prompt is valid by the schema."""
    prompt = chat_prompt(["hi"], JSON, parameters=parameters)
    validate("ChatPrompt", prompt)
    assert prompt["messages"] == [{"role": "user", "content": [said("hi")]}]


@LOOK
@given(junk, junk)
def test_any_junk(first: Any, second: Any) -> None:
    """Whatever is given in place of sequences, nothing raises and the results are valid by the schema."""
    validate("ChatPrompt", chat_prompt(first, JSON, parameters=second))
    validate("ChatPrompt", chat_answer(first, JSON))
    validate("CompletionPrompt", completion_prompt(first, JSON))
    validate("CompletionPrompt", completion_answer(first, JSON))
    for count in tokens(first, {"usage": second}):
        assert count is None or (type(count) is int and count >= 0)
