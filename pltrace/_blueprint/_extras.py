"""Converts what providers put beside the content of an answer: reasoning, citations, and what has no shape at all."""

from __future__ import annotations

import json
from typing import Any

from pltrace._blueprint._annotations import annotation_of
from pltrace._blueprint._base import (
    Block,
    JsonEncoder,
    MisfitError,
    dict_of,
    first_of,
    items_of,
    json_block,
    maybe_str,
    text_block,
)
from pltrace._blueprint._text import thinking

_REASONING = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_CITATIONS = ("annotations", "citations")
#: What of the response's metadata is part of the answer; all else says how it came about.
OF_RESPONSES = ("citations", "grounding_metadata", "citation_metadata", "refusal")
#: Keys that a part of this package converts.
_TOLD = {*_REASONING, *_CITATIONS, "tool_calls", "function_call", "tool_outputs", "refusal", "audio", "images"}
#: Keys of bookkeeping: ids, roles, counts, how it ended; and the fields of a message that came as a dict.
_BOOKKEEPING = {
    "id", "response_id", "generation_id", "message_id", "request_id", "tool_call_id", "role", "type", "name", "index",
    "object", "created", "created_at", "status", "model", "model_id", "model_name", "model_provider", "provider",
    "system_fingerprint", "service_tier", "finish_reason", "native_finish_reason", "stop_reason", "stop_sequence",
    "done_reason", "usage", "token_usage", "usage_metadata", "token_count", "logprobs", "safety_ratings",
    "content", "additional_kwargs", "response_metadata", "invalid_tool_calls", "tool_call_chunks",
}  # fmt: skip
#: How the keys start that LangChain's classes set for themselves.
_INTERNAL = ("__", "lc_", "ls_")
_DEEPEST = 20


def extras_of(message: object) -> Block:
    """What stands beside the content of an answer and says something."""
    metadata = dict_of(getattr(message, "response_metadata", None))
    found = {key: metadata[key] for key in OF_RESPONSES if key in metadata}
    found.update(dict_of(getattr(message, "additional_kwargs", None)))
    return {key: value for key, value in found.items() if _says_something(value)}


def reasoning_of(extras: Block, told: list[Block], encoder: JsonEncoder) -> list[Block]:
    """The thinking blocks for reasoning, which some providers tell several times over."""
    made: list[Block] = []
    for key in _REASONING:
        known = {block.get("thinking") for block in told + made}
        blocks = [block for part in items_of(extras.get(key)) for block in _thought(part, key, encoder)]
        if "".join(block["thinking"] for block in blocks) not in known:
            made += [block for block in blocks if block["thinking"] not in known]
    return made


def annotate(extras: Block, told: list[Block], encoder: JsonEncoder) -> list[Block]:
    """Add citations to the text they follow; the blocks for those that the blueprint has no shape for."""
    rest: list[Block] = []
    fitting: list[Block] = []
    known = [annotation for block in told for annotation in block.get("annotations", ())]
    for key in _CITATIONS:
        shaped = [(raw, annotation_of(raw)) for raw in items_of(extras.get(key))]
        fitting += [shape for _, shape in shaped if shape and shape not in known + fitting]
        unshaped = [raw for raw, shape in shaped if not shape]
        if unshaped:
            rest.append(json_block({key: unshaped}, encoder))
    if fitting:
        text = next((block for block in reversed(told) if block["type"] == "text"), None)
        if text is None:
            text = text_block("")
            told.append(text)
        text["annotations"] = [*text.get("annotations", ()), *fitting]
    return rest


def others_of(extras: Block, told: list[Block], encoder: JsonEncoder) -> list[Block]:
    """A block of JSON for each key that nothing converts, but for what is bookkeeping or told already."""
    return [
        json_block({key: value}, encoder)
        for key, value in extras.items()
        if key not in _TOLD
        and key not in _BOOKKEEPING
        and not str(key).startswith(_INTERNAL)
        and not (key == "parsed" and _is_told(value, told, encoder))
    ]


def _thought(part: Any, key: str, encoder: JsonEncoder) -> list[Block]:
    try:
        if not isinstance(part, dict) or key == "reasoning_content":
            return thinking({key if key == "reasoning_content" else "thinking": part}, encoder)
        if key == "reasoning":
            return thinking(part, encoder)
        text = first_of(part, "thinking", "text", "summary")
        if text is None and part.get("data") is None:
            raise MisfitError
        about = {name: part.get(name) for name in ("id", "signature", "data")}
        return thinking({**about, "thinking": text}, encoder)
    except Exception:
        return [{"type": "thinking", "thinking": encoder.dumps(part)}]


def _is_told(parsed: object, told: list[Block], encoder: JsonEncoder) -> bool:
    """Say whether a structured output is what one of the texts holds."""
    plain = encoder.jsonable(parsed)
    return any(plain in (text, _read(text, encoder)) for block in told if (text := maybe_str(block.get("text"))))


def _read(text: str, encoder: JsonEncoder) -> object:
    try:
        return encoder.jsonable(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _says_something(value: object, depth: int = 0) -> bool:
    """Say whether there is more in a value than flags, zeros and nothing; an object counts as something."""
    if value is None or isinstance(value, bool):
        return False
    if isinstance(value, (str, bytes, int, float)):
        return bool(value)
    if depth > _DEEPEST or not isinstance(value, (dict, list, tuple)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return any(_says_something(one, depth + 1) for one in inner)
