"""Says which tools a model was offered and how it was to choose among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
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
    maybe_str,
    object_of,
    str_of,
)

_BUILT_IN = {
    "web_search": "web_search",
    "web_search_preview": "web_search",
    "google_search": "web_search",
    "google_search_retrieval": "web_search",
    "file_search": "file_search",
    "code_interpreter": "code_interpreter",
    "code_execution": "code_interpreter",
    "image_generation": "image_generation",
    "google_maps": "google_maps",
    "url_context": "url_context",
    "mcp": "mcp",
    "bash": "bash",
    "shell": "shell",
    "local_shell": "shell",
    "apply_patch": "apply_patch",
    "text_editor": "text_editor",
}
_DATED = re.compile(r"_(\d{8}|\d{4}_\d{2}_\d{2})$")
#: Under which name providers keep the schema of a function's arguments.
_SCHEMAS = ("parameters", "input_schema", "parameters_json_schema", "inputSchema")
_NO_ARGUMENT_MODES = {"auto", "any", "none", "required"}


def tooling_of(parameters: Mapping[str, object], encoder: JsonEncoder) -> Block:
    """What the invocation parameters say of tools; what has no shape is left out."""
    made: Block = {}
    for key, make in _TOOLING.items():
        try:
            value = parameters.get(key)
            shaped = None if value is None else make(value, encoder)
        except Exception:
            continue
        if shaped:
            made[key] = shaped
    return made


def untold_of(parameters: Mapping[str, object]) -> Block:
    """What the invocation parameters say of tools beyond what `tooling_of` makes of it, as the model was given it."""
    return {key: value for key, test in _TOLD.items() if (value := parameters.get(key)) and not _is_told(test, value)}


def _is_told(test: Callable[[Any], bool], value: object) -> bool:
    try:
        return test(value)
    except Exception:
        return False


def _only(raw: Block, *keys: str) -> bool:
    """Say whether a dict has no other members that say something."""
    return all(key in keys for key, value in raw.items() if value is not None)


def _is_told_function(raw: Block) -> bool:
    schema = first_of(raw, *_SCHEMAS)
    return (
        _only(raw, "type", "name", "description", "strict", *_SCHEMAS)
        and raw.get("type") in (None, "function", "custom")
        and isinstance(raw["name"], str)
        and isinstance(schema, (dict, type(None)))
    )


def _is_told_tool(raw: Block) -> bool:
    nested = first_of(raw, "function", "toolSpec")
    if isinstance(nested, dict):
        return _only(raw, "type", "function", "toolSpec") and _is_told_function(nested)
    kind = raw.get("type")
    if kind not in (None, "function", "custom"):
        return _DATED.sub("", str_of(kind)) in _BUILT_IN  # Its configuration is all of it.
    declared = first_of(raw, "function_declarations", "functionDeclarations")
    if declared is not None:
        own = [key for key in raw if key not in _BUILT_IN]
        return len(own) == 1 and all(_is_told_function(function) for function in items_of(declared))
    return _is_told_function(raw) if "name" in raw else bool(raw) and _only(raw, *_BUILT_IN)


def _is_told_choice(raw: object) -> bool:
    if isinstance(raw, str):
        return True
    choice = dict_of(raw)
    if "function" in choice:
        return _only(choice, "type", "function") and _only(choice["function"], "name") and "name" in choice["function"]
    kinds = {"function", "tool"} if "name" in choice else _NO_ARGUMENT_MODES | _BUILT_IN.keys()
    return _only(choice, "type", "name") and choice["type"] in kinds


def _are_told(test: Callable[[Any], bool], values: object) -> bool:
    return all(test(value) for value in items_of(values))


_TOLD: dict[str, Callable[[Any], bool]] = {
    "tools": partial(_are_told, _is_told_tool),
    "functions": partial(_are_told, _is_told_function),
    "tool_choice": _is_told_choice,
    "function_call": lambda raw: isinstance(raw, str) or _only(raw, "name"),
}


def _fitting(convert: Converter, values: object, encoder: JsonEncoder) -> list[Block]:
    """What can be made of the values; those without a shape are left out."""
    made: list[Block] = []
    for value in items_of(values):
        with suppress(Exception):
            made += convert(value, encoder)
    return made


def _function(raw: Block, encoder: JsonEncoder) -> list[Block]:
    """A function's name and signature, under whichever name its provider gives the schema."""
    made: Block = {"name": str_of(raw["name"])}
    add_known(made, description=raw.get("description"))
    if isinstance(raw.get("strict"), bool):
        made["strict"] = raw["strict"]
    schema = first_of(raw, *_SCHEMAS)
    if isinstance(schema, dict):
        made["parameters"] = encoder.schema(schema.get("json", schema))
    return [made]


def _tool(raw: Block, encoder: JsonEncoder) -> list[Block]:
    """The blueprint tools for one of the model's; Google's classes put many functions into one."""
    nested = first_of(raw, "function", "toolSpec")
    if isinstance(nested, dict):
        return _function_tools([nested], encoder)
    kind = raw.get("type")
    if kind not in (None, "function", "custom"):
        return [_built_in(str_of(kind), "", raw, encoder)]
    if "name" in raw:
        return _function_tools([raw], encoder)
    declared = _function_tools(first_of(raw, "function_declarations", "functionDeclarations"), encoder)
    return declared + [_built_in(key, "google", {key: raw[key]}, encoder) for key in raw if key in _BUILT_IN]


def _function_tools(declared: object, encoder: JsonEncoder) -> list[Block]:
    functions = _fitting(_function, declared, encoder)
    return [{"type": "function", "function": function} for function in functions]


def _built_in(kind: str, provider: str, raw: Block, encoder: JsonEncoder) -> Block:
    """A tool the provider runs; Anthropic dates its types without dashes, OpenAI with."""
    dated = _DATED.search(kind)
    if not provider:
        provider = "anthropic" if dated and "_" not in dated[1] else "openai"
    return {
        "id": kind,
        "name": maybe_str(raw.get("name")) or kind,
        "description": maybe_str(raw.get("description")) or "",
        "provider": provider,
        "type": _BUILT_IN[_DATED.sub("", kind)],
        "config": object_of(raw, encoder),
    }


def _tool_choice(raw: object, _encoder: JsonEncoder) -> str | Block:
    if isinstance(raw, str):
        return str_of(raw)
    choice = dict_of(raw)
    name = choice.get("name") or dict_of(choice.get("function")).get("name")
    if isinstance(name, str):
        return {"type": "function", "function": {"name": str_of(name)}}
    kind = str_of(choice["type"])
    if kind in _NO_ARGUMENT_MODES or kind in _BUILT_IN:
        return kind
    raise MisfitError


def _function_call(raw: object, _encoder: JsonEncoder) -> str | Block:
    return str_of(raw) if isinstance(raw, str) else {"name": str_of(dict_of(raw).get("name"))}


_TOOLING: dict[str, Callable[[object, JsonEncoder], object]] = {
    "tools": partial(_fitting, _tool),
    "functions": partial(_fitting, _function),
    "tool_choice": _tool_choice,
    "function_call": _function_call,
}
