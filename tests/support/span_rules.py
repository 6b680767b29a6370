"""The rules for spans and requests that PromptLayer writes down outside its schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from . import schema

Problem = tuple[list[str | int], str]
"""Where in the body, and what is wrong there."""

ALLOWED_STATUSES: Mapping[str, frozenset[str]] = {
    "PROVIDER_RATE_LIMIT": frozenset({"WARNING", "ERROR"}),
    "PROVIDER_QUOTA_LIMIT": frozenset({"WARNING", "ERROR"}),
    "PROVIDER_PARTIAL_RESPONSE": frozenset({"WARNING"}),
    "VARIABLE_MISSING_OR_EMPTY": frozenset({"WARNING"}),
    "PROVIDER_TIMEOUT": frozenset({"ERROR"}),
    "PROVIDER_AUTH_ERROR": frozenset({"ERROR"}),
    "PROVIDER_ERROR": frozenset({"ERROR"}),
    "TEMPLATE_RENDER_ERROR": frozenset({"ERROR"}),
    "UNKNOWN_ERROR": frozenset({"WARNING", "ERROR"}),
}
"""The statuses that each `error_type` may come with."""

_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
# From 2001 to 2096: a time in seconds, milliseconds or microseconds lies outside.
_EARLIEST_NS, _LATEST_NS = 10**18, 4 * 10**18
_LONGEST_METADATA_KEY = 1024
# Not published, but promptlayer's own client always sends it to /log-request.
_SENT_BY_CLIENT = "score_name"


def bulk_problems(body: Any) -> list[Problem]:
    """Lists all that is wrong with the body of a `POST /spans-bulk`."""
    found = schema.errors("CreateSpansBulk", body)
    if found:
        return found
    return [*_unknown("CreateSpansBulk", body), *_spans_problems(body["spans"])]


def request_problems(body: Any) -> list[Problem]:
    """Lists all that is wrong with the body of a `POST /log-request`."""
    found = schema.errors("LogRequest", body)
    if found:
        return found
    known = {key: value for key, value in body.items() if key != _SENT_BY_CLIENT}
    return list(_log_request_problems(known))


def _spans_problems(spans: list[dict[str, Any]]) -> Iterator[Problem]:
    for index, span in enumerate(spans):
        for path, message in _span_problems(span):
            yield ["spans", index, *path], message


def _span_problems(span: dict[str, Any]) -> Iterator[Problem]:
    yield from _unknown("Span", span)
    for key, name in (("context", "SpanContext"), ("status", "SpanStatus"), ("resource", "SpanResource")):
        yield from _under(key, _unknown(name, span[key]))
    yield from _id_problems(span["context"], span.get("parent_id"))
    yield from _time_problems(span["start_time"], span["end_time"])
    if span.get("log_request") is not None:
        yield from _under("log_request", _log_request_problems(span["log_request"]))


def _id_problems(context: Mapping[str, str], parent_id: str | None) -> Iterator[Problem]:
    if not _TRACE_ID.fullmatch(context["trace_id"]):
        yield ["context", "trace_id"], f"{context['trace_id']!r} isn't 32 lowercase hex digits, not all zeros"
    if not _SPAN_ID.fullmatch(context["span_id"]):
        yield ["context", "span_id"], f"{context['span_id']!r} isn't 16 lowercase hex digits, not all zeros"
    if parent_id is not None and not _SPAN_ID.fullmatch(parent_id):
        yield ["parent_id"], f"{parent_id!r} is neither null nor 16 lowercase hex digits, not all zeros"
    if parent_id == context["span_id"]:
        yield ["parent_id"], "the span is its own parent"


def _time_problems(start: int, end: int) -> Iterator[Problem]:
    for key, value in (("start_time", start), ("end_time", end)):
        if not isinstance(value, int) or not _EARLIEST_NS <= value < _LATEST_NS:
            yield [key], f"{value!r} isn't a Unix time in integer nanoseconds"
    if start > end:
        yield ["end_time"], f"it ends {start - end} ns before it starts"


def _log_request_problems(request: dict[str, Any]) -> Iterator[Problem]:
    yield from _unknown("LogRequest", request)
    for key in request.get("metadata", {}):
        if len(key) > _LONGEST_METADATA_KEY:
            yield ["metadata"], f"a key has {len(key)} characters, more than {_LONGEST_METADATA_KEY}"
    if schema.moment(request["request_start_time"]) > schema.moment(request["request_end_time"]):
        yield ["request_end_time"], "the request ends before it starts"
    kind, status = request.get("error_type"), request.get("status", "SUCCESS")
    if kind is not None and status not in ALLOWED_STATUSES[kind]:
        yield ["error_type"], f"{kind} isn't allowed with the status {status}"


def _unknown(name: str, value: Mapping[str, Any]) -> Iterator[Problem]:
    """Finds properties that PromptLayer doesn't know, and so would lose without a word."""
    for key in sorted(value.keys() - schema.properties(name)):
        yield [key], f"{name} has no such property"


def _under(key: str, problems: Iterator[Problem]) -> Iterator[Problem]:
    for path, message in problems:
        yield [key, *path], message
