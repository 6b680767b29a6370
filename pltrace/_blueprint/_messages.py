"""Converts one message: its role, its names, its content, and what providers put beside the content."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from pltrace._blueprint._base import (
    Block,
    JsonEncoder,
    MisfitError,
    dict_of,
    first_of,
    items_of,
    json_block,
    maybe_str,
    member_of,
    str_of,
    text_blocks,
)
from pltrace._blueprint._calls import call_of, calls_of
from pltrace._blueprint._content import Draft, error_note
from pltrace._blueprint._extras import OF_RESPONSES, annotate, extras_of, others_of, reasoning_of
from pltrace._messages import told_by

_ROLES = {
    "human": "user",
    "user": "user",
    "HumanMessageChunk": "user",
    "ai": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "AIMessageChunk": "assistant",
    "system": "system",
    "SystemMessageChunk": "system",
    "developer": "developer",
    "tool": "tool",
    "ToolMessageChunk": "tool",
    "function": "function",
    "FunctionMessageChunk": "function",
}
_PLAIN_TYPES = ("human", "ai", "system", "tool", "HumanMessageChunk", "AIMessageChunk")
_PLAIN_ROLES = {kind: _ROLES[kind] for kind in _PLAIN_TYPES}
_OF_CALLS = {"name", "args", "id", "type"}
_OF_RESPONSES = frozenset(OF_RESPONSES)
_MESSAGE_KEYS = {"content", "tool_calls", "function_call"}


def messages_of(message: object, encoder: JsonEncoder, forced_role: str | None = None) -> list[Block]:
    """The blueprint messages for one of LangChain's, mostly one."""
    try:
        return _converted(message, encoder, forced_role)
    except Exception:
        return [{"role": forced_role or "user", "content": [json_block(message, encoder)]}]


def plain_message(
    kind: Any, content: Any, rest: Mapping[str, Any] | None, encoder: JsonEncoder, forced_role: str | None = None
) -> str | None:
    """The JSON text of what `messages_of` makes of a message of texts and simple tool calls; None for any other.

    The message is given as `_messages` notes it, without its id.
    """
    if type(content) is not str or not isinstance(kind, type):
        return None
    try:
        fields = told_by(kind, rest)
        role = forced_role or _PLAIN_ROLES[fields["type"]]
        block = f'{{"type":"text","text":{_plain(content, encoder)}}}' if content else ""
        members = _plain_members(role, fields, encoder) if len(fields) > 1 else ""
    except (AttributeError, KeyError, TypeError, MisfitError):
        return None
    return f'{{"role":"{role}","content":[{block}]{members}}}'


def _plain_members(role: str, fields: Mapping[str, Any], encoder: JsonEncoder) -> str:
    """What a message says beside its content, as members of an object, each behind a comma."""
    extras = fields.get("additional_kwargs")
    if extras and any(value is not None for value in extras.values()):
        raise MisfitError
    members = ""
    if role == "assistant":
        if fields.get("invalid_tool_calls") or fields.get("tool_call_chunks"):
            raise MisfitError
        if not _OF_RESPONSES.isdisjoint(fields.get("response_metadata", ())):
            raise MisfitError
        calls = fields.get("tool_calls")
        if calls:
            members = f',"tool_calls":[{",".join([_plain_call(call, encoder) for call in calls])}]'
    name = fields.get("name")
    if name:
        members += f',"name":{_plain(name, encoder)}'
    if role == "tool":
        if fields.get("status") == "error":
            raise MisfitError
        members += f',"tool_call_id":{_plain(fields["tool_call_id"], encoder)}'
    return members


def _plain_call(call: Any, encoder: JsonEncoder) -> str:
    """The JSON text of a tool call that is as LangChain's own classes make it."""
    arguments = call["args"]
    if not call["id"] or type(arguments) is not dict or not call.keys() <= _OF_CALLS:
        raise MisfitError
    name, written = _plain(call["name"], encoder), _plain(encoder.dumps(arguments), encoder)
    function = f'{{"name":{name},"arguments":{written}}}'
    return f'{{"id":{_plain(call["id"], encoder)},"type":"function","function":{function}}}'


def _plain(text: Any, encoder: JsonEncoder) -> str:
    """The JSON text of an exact string in which nothing is redacted or cut; anything else is a misfit."""
    found = encoder.dumps_plain(text) if type(text) is str else None
    if found is None:
        raise MisfitError
    return found


def _converted(message: Any, encoder: JsonEncoder, forced_role: str | None) -> list[Block]:
    kind: Any = getattr(message, "type", None)
    if kind is None:
        message = _as_chat_message(message)
    role, label = forced_role or _ROLES.get(kind), None
    if role is None:
        role, label = _free_role(message)
    extras = dict_of(getattr(message, "additional_kwargs", None))
    if role == "system" and extras.get("__openai_role__") == "developer":
        role = "developer"
    content = message.content
    results: list[Block] = []
    if role == "assistant":
        made = _answer(message, content, encoder)
    elif type(content) is str:
        made = {"role": role, "content": text_blocks(content)}
    else:
        draft = Draft(role, encoder)
        draft.add_all(content)
        made = {"role": role, "content": draft.blocks}
        results = draft.results
    _add_names(made, message, label)
    # A user message that only carried tool results is those tool messages, and nothing more.
    return [*results, made] if made["content"] or not results else results


def _as_chat_message(message: Any) -> SimpleNamespace:
    """A view of a string, a (role, content) pair or a dict with the attributes of a ChatMessage."""
    if isinstance(message, str):
        message = {"role": "user", "content": message}
    elif isinstance(message, (tuple, list)) and len(message) == 2:
        message = {"role": str_of(message[0]), "content": message[1]}
    elif not isinstance(message, dict) or not message.keys() & _MESSAGE_KEYS:
        raise MisfitError
    message = {**message, **dict_of(message.get("additional_kwargs"))}
    return SimpleNamespace(
        role=first_of(message, "role", "type"),
        content=message.get("content"),
        additional_kwargs=message,
        name=message.get("name"),
        tool_call_id=message.get("tool_call_id"),
        status=message.get("status"),
        invalid_tool_calls=message.get("invalid_tool_calls"),
    )


def _free_role(message: Any) -> tuple[str, str | None]:
    """The role a ChatMessage says it has; one the blueprint doesn't know is a user named so."""
    said = str_of(message.role)
    role = _ROLES.get(said)
    return (role, None) if role else ("user", said)


def _add_names(made: Block, message: object, label: str | None) -> None:
    """Add whom a message is from or about, and that a tool failed."""
    name = maybe_str(getattr(message, "name", None))
    if label:
        name = f"{label} ({name})" if name else label
    role = made["role"]
    if name or role == "function":
        made["name"] = name or ""
    if role == "tool":
        call_id = getattr(message, "tool_call_id", None)
        made["tool_call_id"] = "" if call_id is None else str_of(call_id)
        if getattr(message, "status", None) == "error":
            made["content"].append(error_note())


def _answer(message: object, content: object, encoder: JsonEncoder) -> Block:
    """An assistant message, with what providers put beside the content."""
    extras = extras_of(message)
    parsed = calls_of(message)
    if type(content) is str and not (parsed or extras):
        return {"role": "assistant", "content": text_blocks(content)}
    draft = Draft("assistant", encoder)
    for call in parsed:
        draft.add_call(call)
    known = [call["id"] for call in draft.calls]
    for call in items_of(extras.get("tool_calls")):
        # LangChain parses calls of functions alone.
        if not parsed or (member_of(call, "custom") and member_of(call, "id") not in known):
            draft.add_call(call)
    draft.told = draft.calls[:]
    draft.add_all(content)
    # What only the extras know is put where it happened: reasoning and server tools first, the rest last.
    told, draft.blocks = draft.blocks, []
    unshaped = annotate(extras, told, encoder)
    draft.blocks += reasoning_of(extras, told, encoder)
    for output in items_of(extras.get("tool_outputs")):
        draft.add(output)
    draft.blocks += told
    for key in ("refusal", "audio"):
        if extras.get(key) and not any(block.get("text") == extras[key] for block in told):
            draft.add({"type": key, key: extras[key]})
    for image in items_of(extras.get("images")):
        draft.add(image)
    draft.blocks += unshaped + others_of(extras, told, encoder)
    made: Block = {"role": "assistant", "content": draft.blocks}
    if draft.calls:
        made["tool_calls"] = draft.calls
    function_call = extras.get("function_call")
    if isinstance(function_call, dict):
        function = call_of(function_call, 0, encoder)["function"]
        # Google's classes repeat a tool call here; told once is enough.
        if function["name"] not in {call["function"]["name"] for call in draft.calls}:
            made["function_call"] = function
    return made
