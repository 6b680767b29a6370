"""Converts the calls and results of tools that a provider runs or defines: search, code, MCP, shells, patches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pltrace._blueprint._base import (
    Block,
    Converter,
    JsonEncoder,
    MisfitError,
    add_known,
    dict_of,
    first_of,
    items_of,
    joined_text,
    json_block,
    maybe_str,
    object_of,
    str_of,
    text_of,
)
from pltrace._blueprint._media import image, produced

_OUTCOMES = {1: "OUTCOME_OK", 2: "OUTCOME_FAILED", 3: "OUTCOME_DEADLINE_EXCEEDED"}
_BOOKKEEPING = {"type", "id", "index", "status"}


def _ran(output: str, ok: bool, call_id: object = None) -> Block:
    outcome = _OUTCOMES[1 if ok else 2]
    made: Block = {"type": "code_execution_result", "output": output, "outcome": outcome}
    # Not in the schema, which allows more members: it says which of several calls this is the result of.
    add_known(made, tool_use_id=call_id)
    return made


def _used(raw_id: object, name: str, given: object, encoder: JsonEncoder) -> list[Block]:
    return [{"type": "server_tool_use", "id": str_of(raw_id), "name": name, "input": object_of(given, encoder)}]


def _openai_use(name: str, block: Block, encoder: JsonEncoder) -> list[Block]:
    """A call of OpenAI's own tools, whose input is whatever else the block holds."""
    given = {key: value for key, value in block.items() if key not in _BOOKKEEPING}
    if given.keys() == {"action"} and isinstance(given["action"], dict):
        given = given["action"]
    return _used(block["id"], name, given, encoder)


def _named_use(block: Block, encoder: JsonEncoder) -> list[Block]:
    """A call in Anthropic's or LangChain's shape; the input may still be a piece of JSON text."""
    given = first_of(block, "input", "args")
    if not given and block.get("partial_json"):
        given = block["partial_json"]
    if isinstance(given, str):
        given = {"arguments": given} if given else {}
    return _used(block["id"], str_of(block["name"]), given or {}, encoder)


def _standard_result(block: Block, encoder: JsonEncoder) -> list[Block]:
    """LangChain's standard result: the provider's own block again, if it says which that was."""
    output, failed = block["output"], block.get("status") == "error"
    kind = dict_of(block.get("extras")).get("block_type")
    if isinstance(kind, str) and kind.endswith("_tool_result"):
        given = {"tool_use_id": block["tool_call_id"], "content": output, "is_error": failed}
        return _ANTHROPIC_RESULTS[kind](given, encoder)
    return [_ran(str_of(output), not failed, block.get("tool_call_id"))]


def _web_results(block: Block, _encoder: JsonEncoder) -> list[Block]:
    results = block.get("content")
    if not isinstance(results, list):
        raise MisfitError
    found = []
    for result in results:
        made: Block = {"type": "web_search_result"}
        for key in ("url", "title", "encrypted_content", "page_age"):
            if result.get(key) is not None:
                made[key] = str_of(result[key])
        found.append(made)
    return [{"type": "web_search_tool_result", "tool_use_id": str_of(block["tool_use_id"]), "content": found}]


def _anthropic_ran(block: Block, encoder: JsonEncoder) -> list[Block]:
    content = block["content"]
    if not isinstance(content, dict) or "stdout" not in content or content.get("content"):
        return [_ran(text_of(content, encoder), "error_code" not in dict_of(content), block.get("tool_use_id"))]
    output = str_of(content["stdout"]) + str_of(content.get("stderr") or "")
    return [_ran(output, content.get("return_code") == 0, block.get("tool_use_id"))]


def _google_ran(block: Block, _encoder: JsonEncoder) -> list[Block]:
    output = str_of(first_of(block, "code_execution_result", "output"))
    outcome = block.get("outcome", 1)
    outcome = str_of(outcome) if isinstance(outcome, str) else _OUTCOMES[outcome]
    return [{"type": "code_execution_result", "output": output, "outcome": outcome}]


def _google_code(block: Block, _encoder: JsonEncoder) -> list[Block]:
    code = block["executable_code"]
    made: Block = {"type": "code", "code": str_of(code["code"] if isinstance(code, dict) else code)}
    add_known(made, id=block.get("id"))
    return [made]


def _interpreted(block: Block, encoder: JsonEncoder) -> list[Block]:
    """OpenAI's code interpreter: the code, then what it printed and drew."""
    code: Block = {"type": "code", "code": str_of(block["code"])}
    add_known(code, id=block.get("id"), container_id=block.get("container_id"))
    made = [code]
    for output in items_of(block.get("outputs")):
        if output.get("type") == "image":
            made += image(output, encoder)
        else:
            made.append(_ran(str_of(output["logs"]), block.get("status") != "failed"))
    return made


def _drawn(block: Block, encoder: JsonEncoder) -> list[Block]:
    """OpenAI's image generation."""
    mime = f"image/{maybe_str(block.get('output_format')) or 'png'}"
    about = {key: value for key, value in block.items() if key not in {*_BOOKKEEPING, "result"}}
    (made,) = [produced(drawn) for drawn in image({"base64": block["result"], "mime_type": mime}, encoder)]
    if made["type"] == "text":  # It is too large, what was said of it isn't.
        return [made, json_block(about, encoder)] if about else [made]
    add_known(made, id=block.get("id"))
    if about:
        made["provider_metadata"] = object_of(about, encoder)
    return [made]


def _string(value: object, _encoder: JsonEncoder) -> str:
    return str_of(value)


def _flag(value: object, _encoder: JsonEncoder) -> bool:
    if isinstance(value, bool):
        return value
    raise MisfitError


def _objects(value: object, encoder: JsonEncoder) -> list[Block]:
    if isinstance(value, (list, tuple)):
        return [object_of(item, encoder) for item in value]
    raise MisfitError


def _text_or_object(value: object, encoder: JsonEncoder) -> str | Block:
    return object_of(value, encoder) if isinstance(value, dict) else text_of(value, encoder)


def _fields(
    kind: str, strings: str, required: str = "", /, **checks: Callable[[Any, JsonEncoder], object]
) -> Converter:
    """A converter of blocks whose members only need checking; those in `strings` are strings."""
    needed = set(required.split())
    plan = {**dict.fromkeys(strings.split(), _string), **checks}

    def convert(block: Block, encoder: JsonEncoder) -> list[Block]:
        made: Block = {"type": kind}
        for name, check in plan.items():
            value = block.get(name)
            if value is not None:
                made[name] = check(value, encoder)
            elif name in needed:
                raise MisfitError
        return [made]

    return convert


_mcp_call = _fields(
    "mcp_call",
    "id name server_label approval_request_id",
    arguments=text_of,
    output=text_of,
    error=_text_or_object,
)


def _mcp_use(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Anthropic's call of an MCP server."""
    given = {"id": block["id"], "name": block["name"], "server_label": block.get("server_name")}
    return _mcp_call({**given, "arguments": first_of(block, "input", "partial_json")}, encoder)


def _standard_use(block: Block, encoder: JsonEncoder) -> list[Block]:
    """LangChain's standard call; of an MCP server, what tells the call stands in its `extras`."""
    extras = dict_of(block.get("extras"))
    label = first_of(extras, "server_label", "server_name")
    if block.get("name") == "remote_mcp":
        given = {**extras, "id": block["id"], "name": extras.get("tool_name"), "server_label": label}
        return _mcp_call({**given, "arguments": first_of(block, "args") or extras.get("arguments")}, encoder)
    if block.get("name") == "mcp_list_tools" and label is not None:
        return [{"type": "mcp_list_tools", "id": str_of(block["id"]), "server_label": str_of(label)}]
    return _named_use(block, encoder)


def _mcp_result(block: Block, encoder: JsonEncoder) -> list[Block]:
    """Anthropic's answer of an MCP server, told as the outcome of the call with that id."""
    content = block.get("content")
    try:
        output = joined_text(content)
    except Exception:
        output = encoder.dumps(content)
    key = "error" if block.get("is_error") is True else "output"
    return [{"type": "mcp_call", "id": str_of(block["tool_use_id"]), key: output}]


_ANTHROPIC_RESULTS: dict[str, Converter] = {
    "web_search_tool_result": _web_results,
    "code_execution_tool_result": _anthropic_ran,
    "mcp_tool_result": _mcp_result,
    **{
        kind: _fields(kind, "tool_use_id", "tool_use_id", content=object_of)
        for kind in ("bash_code_execution_tool_result", "text_editor_code_execution_tool_result")
    },
}

CONVERTERS: dict[str, Converter] = {
    **_ANTHROPIC_RESULTS,
    "server_tool_use": _named_use,
    "server_tool_call": _standard_use,
    "server_tool_call_chunk": _standard_use,
    "server_tool_result": _standard_result,
    "web_search_call": partial(_openai_use, "web_search"),
    "file_search_call": partial(_openai_use, "file_search"),
    "tool_search_call": partial(_openai_use, "tool_search"),
    "code_execution_result": _google_ran,
    "executable_code": _google_code,
    "code_interpreter_call": _interpreted,
    "image_generation_call": _drawn,
    "mcp_tool_use": _mcp_use,
    "mcp_call": _mcp_call,
    "mcp_list_tools": _fields("mcp_list_tools", "id server_label", tools=_objects, error=_text_or_object),
    "mcp_approval_request": _fields("mcp_approval_request", "id name server_label", arguments=text_of),
    "mcp_approval_response": _fields(
        "mcp_approval_response", "approval_request_id", "approval_request_id approve", approve=_flag
    ),
    "shell_call": _fields("shell_call", "id call_id status", action=object_of),
    "local_shell_call": _fields("shell_call", "id call_id status", action=object_of),
    "shell_call_output": _fields("shell_call_output", "id call_id status", output=_objects),
    "apply_patch_call": _fields("apply_patch_call", "id call_id status", operation=object_of),
    "apply_patch_call_output": _fields("apply_patch_call_output", "id call_id status", output=text_of),
}
