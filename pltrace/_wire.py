"""Puts the JSON that PromptLayer is sent together, mostly out of JSON that stands in the store already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, NamedTuple

from pltrace._encoding import json_of, quoted
from pltrace._exporter import StoredSpan
from pltrace._provider_errors import PARTIAL
from pltrace._rows import COLUMNS, FIELDS, LINE, ReadSpan, Row

__all__ = ["as_read", "log_request", "span_text", "text_of"]

_SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
#: Limits of `log_request` in PromptLayer's published description.
_LONGEST_TAG, _LONGEST_ERROR, _LONGEST_KEY = 512, 1024, 1024
#: What is made of longer texts isn't kept.
_LONGEST_KEPT = 4_000
#: What a body's first object says.
_ALIKE = (
    "user", "session", "service", "tags", "metadata", "provider", "model", "attempt", "cached", "request_tags",
)  # fmt: skip
_NODE_TYPES = {"llm": "LLM_CALL", "prompt": "PROMPT_TEMPLATE"}
#: The status of a request by that of its span; of all others it is ERROR.
_LOGGED = {"ok": "SUCCESS", "partial": "WARNING"}
_TOKENS = {
    "cached_input_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_creation_input_tokens": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
}


class _Alike(NamedTuple):
    """What is sent alike of many spans: as JSON text, all but what stands between these parts."""

    opening: str
    middle: str
    attributes: str
    resource: str
    log: str
    request_tags: str


def as_read(span: StoredSpan) -> ReadSpan:
    """Return a span with its row, which is made if it has none."""
    if isinstance(span, ReadSpan):
        return span
    record = span.record
    alike = {key: record[key] for key in _ALIKE if key in record}
    known = {*COLUMNS, *FIELDS, *_ALIKE, "request_id"}
    own = {key: value for key, value in record.items() if key not in known and value is not None}
    lines = [json_of(part) for part in (alike, own, *(record[field] for field in FIELDS if field in record))]
    row = Row._make([*(record[column] for column in COLUMNS), LINE.join(lines)])
    return ReadSpan.read(span.seq, row, uncertain=span.uncertain, request_id=record.get("request_id"))


def span_text(span: ReadSpan) -> str:
    """Return the JSON of a span for `POST /spans-bulk`."""
    row = span.row
    alike, said, _, given, answered, *of_call = row.body.split(LINE)
    own: dict[str, Any] = json.loads(said) if said != "{}" else {}
    chat = given.startswith('{"type":"chat"') or (bool(of_call) and json.loads(given)["type"] == "chat")
    make = _made_alike if len(alike) <= _LONGEST_KEPT else _made_alike.__wrapped__
    logged = _LOGGED.get("partial" if own.get("error_type") == PARTIAL else row.status or "", "ERROR")
    opening, middle, attributes, resource, log, tags = make(row.name, row.kind, row.status, logged, chat, alike)
    attributes += _own_attributes(row, own) if of_call else _function_attributes(given, answered)
    text = (
        f'{opening}{row.trace_id}","span_id":"{row.span_id}{middle}{_or_null(row.parent_id)},'
        f'"start_time":{row.started_at_ns},"end_time":{row.ended_at_ns or row.started_at_ns},'
        f'"status":{_status(row.status, own.get("error"))},"attributes":{{{attributes}}},{resource}'
    )
    if not of_call:
        return text + "}"
    return f'{text}{log}{given},"output":{answered}{_own_log(row, own, *of_call)},"tags":{tags}}}}}'


@lru_cache(512)
def _made_alike(name: str, kind: str, status: str | None, logged: str, chat: bool, alike: str) -> _Alike:
    record = json.loads(alike)
    shown = quoted(f"Tool: {name}" if kind == "tool" else name)
    resource = {"attributes": {"service.name": record["service"]}, "schema_url": _SCHEMA_URL}
    log = tags = ""
    if kind == "llm":
        log = f',"log_request":{{"provider":{quoted(record["provider"])},"model":{quoted(record["model"])}'
        log += f',"function_name":{quoted(name)},"status":"{logged}","input":'
        tags = json_of([tag[:_LONGEST_TAG] for tag in record["request_tags"]])
    return _Alike(
        f'{{"name":{shown},"context":{{"trace_id":"',
        f'","trace_state":""}},"kind":"SpanKind.{"CLIENT" if kind == "llm" else "INTERNAL"}","parent_id":',
        _attributes(name, kind, status, chat, record),
        f'"resource":{json_of(resource)}',
        log,
        tags,
    )


def _status(status: str | None, error: str | None) -> str:
    if status not in ("error", "cancelled"):
        return '{"status_code":"StatusCode.OK","description":null}'
    return f'{{"status_code":"StatusCode.ERROR","description":{_or_null(error)}}}'


def _attributes(name: str, kind: str, status: str | None, chat: bool, record: Mapping[str, Any]) -> str:
    """Return those attributes of a span that are alike for many.

    They are those that PromptLayer's trace view reads, and OpenTelemetry's GenAI ones.
    """
    attributes = [
        f'"node_type":"{_NODE_TYPES.get(kind, "CODE_EXECUTION")}","pltrace.kind":"{kind}"'
        f',"pltrace.status":{_or_null(status)},"tags":{json_of(record["tags"])}'
    ]
    for key, value in (record["metadata"] or {}).items():
        attributes.append(f"{quoted(f'promptlayer.metadata.{key}')}:{quoted(text_of(value))}")
    for key, field in (("user.id", "user"), ("gen_ai.conversation.id", "session")):
        if record[field] is not None:
            attributes.append(f'"{key}":{json_of(record[field])}')
    if kind == "llm":
        attributes.append(
            f'"gen_ai.operation.name":"{"chat" if chat else "text_completion"}"'
            f',"gen_ai.provider.name":{quoted(record["provider"])},"gen_ai.request.model":{quoted(record["model"])}'
            f',"pltrace.attempt":{record["attempt"]},"pltrace.cached":{_flag(record["cached"])}'
        )
    if kind == "tool":
        shown = quoted(name)
        attributes.append(f'"tool.name":{shown},"gen_ai.operation.name":"execute_tool","gen_ai.tool.name":{shown}')
    return ",".join(attributes)


def _function_attributes(given: str, answered: str) -> str:
    """Return the attributes that say what a function was given and what it answered."""
    text = ""
    for side, value in (("input", given), ("output", answered)):
        if value != "null":
            shown = value if value.startswith('"') else quoted(value)
            text += f',"function_{side}":{shown}'
    return text


def _own_attributes(row: Row, own: Mapping[str, Any]) -> str:
    """Return the attributes of an LLM call that are its own."""
    text = ""
    if row.input_tokens is not None:
        text += f',"gen_ai.usage.input_tokens":{row.input_tokens}'
    if row.output_tokens is not None:
        text += f',"gen_ai.usage.output_tokens":{row.output_tokens}'
    if not own:
        return text
    for key, name in _TOKENS.items():
        if own.get(key) is not None:
            text += f',"{name}":{own[key]}'
    if own.get("first_token_at_ns") is not None:
        seconds = (own["first_token_at_ns"] - row.started_at_ns) / 1e9
        text += f',"pltrace.time_to_first_token_s":{json_of(seconds)}'
    if own.get("prompt_name") is not None:
        for key in ("name", "version", "label"):
            if own.get(f"prompt_{key}") is not None:
                text += f',"promptlayer.prompt.{key}":{quoted(str(own[f"prompt_{key}"]))}'
    return text


def log_request(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `log_request` of an LLM call, within the limits of PromptLayer's description."""
    logged: dict[str, Any] = json.loads(span_text(as_read(StoredSpan(0, record))))["log_request"]
    return logged


def _own_log(row: Row, own: Mapping[str, Any], parameters: str, metadata: str) -> str:
    """Return those members of a request's log that are its own, but for input and output."""
    if len(metadata) > _LONGEST_KEY:
        metadata = json_of({key[:_LONGEST_KEY]: value for key, value in json.loads(metadata).items()})
    log = (
        f',"request_start_time":"{_iso(row.started_at_ns)}"'
        f',"request_end_time":"{_iso(row.ended_at_ns or row.started_at_ns)}"'
        f',"parameters":{parameters},"metadata":{metadata}'
        f',"input_tokens":{row.input_tokens or 0},"output_tokens":{row.output_tokens or 0}'
    )
    if not own:
        return log
    if own.get("prompt_name") is not None:
        log += (
            f',"prompt_name":{json_of(own["prompt_name"])},"prompt_version_number":{json_of(own.get("prompt_version"))}'
            f',"prompt_input_variables":{json_of(own["prompt_input_variables"])}'
        )
    if own.get("error_type") is not None:
        log += f',"error_type":{json_of(own["error_type"])}'
    if own.get("error") is not None:
        log += f',"error_message":{json_of(own["error"][:_LONGEST_ERROR])}'
    return log


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
