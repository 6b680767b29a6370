"""Says which tools a model was offered and how it was to choose among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

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
    schema = first_of(raw, "parameters", "input_schema", "parameters_json_schema", "inputSchema")
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
