"""Converts the calls a model makes of the program's own tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pltrace._blueprint._base import (
    Block,
    JsonEncoder,
    MisfitError,
    first_of,
    items_of,
    maybe_str,
    member_of,
    text_of,
)

CALL_KINDS = {
    "tool_use",
    "tool_call",
    "tool_call_chunk",
    "invalid_tool_call",
    "function_call",
    "custom_tool_call",
}


def call_id_of(raw: Block) -> str | None:
    """The id a call has, None if it has none."""
    # OpenAI's Responses API has both; `call_id` is the one that results refer to.
    return maybe_str(raw.get("call_id")) or maybe_str(raw.get("id"))


def call_of(raw: object, index: int, encoder: JsonEncoder) -> Block:
    """A tool call from LangChain's, OpenAI's, Anthropic's or Google's shape."""
    if not isinstance(raw, dict):
        raise MisfitError
    function = next((raw[key] for key in ("function", "custom") if isinstance(raw.get(key), dict)), raw)
    arguments = first_of(function, "args", "arguments", "input")
    if not arguments and function.get("partial_json"):
        arguments = function["partial_json"]
    return {
        "id": call_id_of(raw) or f"call_{index}",
        "type": "function",
        "function": {
            "name": maybe_str(function.get("name")) or "",
            "arguments": "" if arguments is None else text_of(arguments, encoder),
        },
    }


def calls_of(message: object) -> list[Any]:
    """The tool calls of a LangChain message, valid or not, each with its arguments as the model wrote them."""
    calls = [*items_of(member_of(message, "tool_calls")), *items_of(member_of(message, "invalid_tool_calls"))]
    chunks = items_of(member_of(message, "tool_call_chunks"))
    written = {member_of(chunk, "id"): member_of(chunk, "args") for chunk in chunks} if calls else {}
    return [_as_written(call, written) for call in calls] if written else calls


def _as_written(call: Any, written: Mapping[Any, Any]) -> Any:
    """The call; LangChain cuts what a stream brought down to what is JSON, so what is none is put back."""
    text = written.get(member_of(call, "id"))
    if not text or not isinstance(text, str):
        return call
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return {**call, "args": text}
    return call
