"""Converts the calls a model makes of the program's own tools."""

from __future__ import annotations

from pltrace._blueprint._base import Block, JsonEncoder, MisfitError, first_of, maybe_str, text_of

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
