"""Puts the JSON that PromptLayer is sent together, mostly out of JSON that stands in the store already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, NamedTuple

from pltrace._encoding import json_of, quoted
from pltrace._exporter import StoredSpan
from pltrace._rows import FIELDS, short_of

__all__ = ["log_request", "span_text", "text_of"]

_SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
#: Limits of `log_request` in PromptLayer's published description.
_LONGEST_TAG, _LONGEST_ERROR, _LONGEST_KEY = 512, 1024, 1024
#: What is made of longer metadata isn't kept.
_LONGEST_KEPT = 4_000
_NODE_TYPES = {"llm": "LLM_CALL", "prompt": "PROMPT_TEMPLATE"}
_STATUSES = {"ok": "SUCCESS", "partial": "WARNING"}
_TOKENS = {
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_input_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_creation_input_tokens": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
}


class _Parts(NamedTuple):
    """A span's record: what is short as values, and what may be long as JSON text."""

    short: Mapping[str, Any]
    texts: Mapping[str, str]


def _parts(span: StoredSpan) -> _Parts:
    lines = getattr(span, "lines", ())
    if lines:
        return _Parts(short_of(span), dict(zip(FIELDS, lines, strict=False)))
    return _parts_of(span.record)


def _parts_of(record: Mapping[str, Any]) -> _Parts:
    return _Parts(record, {field: json_of(record[field]) for field in FIELDS if field in record})


def span_text(span: StoredSpan) -> str:
    """Return the JSON of a span for `POST /spans-bulk`."""
    parts = _parts(span)
    record = parts.short
    kind = record["kind"]
    failed = record["status"] in ("error", "cancelled")
    return (
        f'{{"name":{quoted(_name(record))},'
        f'"context":{{"trace_id":"{record["trace_id"]}","span_id":"{record["span_id"]}","trace_state":""}},'
        f'"kind":"SpanKind.{"CLIENT" if kind == "llm" else "INTERNAL"}",'
        f'"parent_id":{_or_null(record["parent_id"])},'
        f'"start_time":{record["started_at_ns"]},'
        f'"end_time":{record["ended_at_ns"] or record["started_at_ns"]},'
        f'"status":{{"status_code":"StatusCode.{"ERROR" if failed else "OK"}",'
        f'"description":{_or_null(record["error"] if failed else None)}}},'
        f'"attributes":{{{_attributes(parts)}}},'
        f'"resource":{_resource(record["service"])}'
        f"{_logged(parts) if kind == 'llm' else ''}}}"
    )


def _name(record: Mapping[str, Any]) -> str:
    name: str = record["name"]
    return f"Tool: {name}" if record["kind"] == "tool" else name


@lru_cache(64)
def _resource(service: str) -> str:
    return json_of({"attributes": {"service.name": service}, "schema_url": _SCHEMA_URL})


def _attributes(parts: _Parts) -> str:
    """Return a span's attributes: those that PromptLayer's trace view reads, and OpenTelemetry's GenAI ones."""
    record, texts = parts
    kind = record["kind"]
    attributes = [
        f'"node_type":"{_NODE_TYPES.get(kind, "CODE_EXECUTION")}","pltrace.kind":"{kind}"'
        f',"pltrace.status":{_or_null(record["status"])},"tags":{texts["tags"]}{_metadata_attributes(texts["metadata"])}'
    ]
    for key, field in (("user.id", "user"), ("gen_ai.conversation.id", "session")):
        if record[field] is not None:
            attributes.append(f'"{key}":{json_of(record[field])}')
    if kind == "llm":
        attributes += _llm_attributes(parts)
    else:
        for side in ("input", "output"):
            text = texts[side]
            if text != "null":
                shown = text if text.startswith('"') else quoted(text)
                attributes.append(f'"function_{side}":{shown}')
    if kind == "tool":
        name = quoted(record["name"])
        attributes.append(f'"tool.name":{name},"gen_ai.operation.name":"execute_tool","gen_ai.tool.name":{name}')
    return ",".join(attributes)


def _metadata_attributes(metadata: str) -> str:
    """Return the attributes for metadata; the same comes again and again."""
    make = _made_of_metadata if len(metadata) <= _LONGEST_KEPT else _made_of_metadata.__wrapped__
    return make(metadata)


@lru_cache(256)
def _made_of_metadata(metadata: str) -> str:
    attributes = {f"promptlayer.metadata.{key}": text_of(value) for key, value in (json.loads(metadata) or {}).items()}
    return f",{json_of(attributes)[1:-1]}" if attributes else ""


def _llm_attributes(parts: _Parts) -> list[str]:
    record, texts = parts
    chat = texts["input"].startswith('{"type":"chat"') or json.loads(texts["input"])["type"] == "chat"
    attributes = [
        f'"gen_ai.operation.name":"{"chat" if chat else "text_completion"}"'
        f',"gen_ai.provider.name":{quoted(record["provider"])},"gen_ai.request.model":{quoted(record["model"])}'
        f',"pltrace.attempt":{record["attempt"]},"pltrace.cached":{_flag(record["cached"])}'
    ]
    attributes += [f'"{name}":{record[key]}' for key, name in _TOKENS.items() if record.get(key) is not None]
    if record["first_token_at_ns"] is not None:
        seconds = (record["first_token_at_ns"] - record["started_at_ns"]) / 1e9
        attributes.append(f'"pltrace.time_to_first_token_s":{json_of(seconds)}')
    if record.get("prompt_name") is not None:
        attributes += [
            f'"promptlayer.prompt.{key}":{quoted(str(record[f"prompt_{key}"]))}'
            for key in ("name", "version", "label")
            if record[f"prompt_{key}"] is not None
        ]
    return attributes


def log_request(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `log_request` of an LLM call, within the limits of PromptLayer's description."""
    logged: dict[str, Any] = json.loads(f"{{{_logged(_parts_of(record))[1:]}}}")["log_request"]
    return logged


def _logged(parts: _Parts) -> str:
    """Return the member of a span that has its request logged."""
    record, texts = parts
    tags, metadata = texts["request_tags"], texts["request_metadata"]
    if len(tags) > _LONGEST_TAG:
        tags = json_of([tag[:_LONGEST_TAG] for tag in json.loads(tags)])
    if len(metadata) > _LONGEST_KEY:
        metadata = json_of({key[:_LONGEST_KEY]: value for key, value in json.loads(metadata).items()})
    log = (
        f',"log_request":{{"provider":{quoted(record["provider"])},"model":{quoted(record["model"])}'
        f',"input":{texts["input"]},"output":{texts["output"]}'
        f',"request_start_time":"{_iso(record["started_at_ns"])}"'
        f',"request_end_time":"{_iso(record["ended_at_ns"] or record["started_at_ns"])}"'
        f',"parameters":{texts["parameters"]},"tags":{tags},"metadata":{metadata}'
        f',"input_tokens":{record["input_tokens"] or 0},"output_tokens":{record["output_tokens"] or 0}'
        f',"function_name":{quoted(record["name"])},"status":"{_STATUSES.get(record["status"], "ERROR")}"'
    )
    if record.get("prompt_name") is not None:
        log += (
            f',"prompt_name":{json_of(record["prompt_name"])},"prompt_version_number":{json_of(record["prompt_version"])}'
            f',"prompt_input_variables":{json_of(record["prompt_input_variables"])}'
        )
    if record["error_type"] is not None:
        log += f',"error_type":{json_of(record["error_type"])}'
    if record["error"] is not None:
        log += f',"error_message":{json_of(record["error"][:_LONGEST_ERROR])}'
    return log + "}"


def _or_null(text: str | None) -> str:
    return "null" if text is None else quoted(text)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _iso(time_ns: int) -> str:
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{_iso_second(seconds)}.{rest // 1000:06}+00:00"


@lru_cache(64)
def _iso_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def text_of(value: Any) -> str:
    """Return a text as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json_of(value)
