"""Sends stored spans to PromptLayer, LLM calls with their request log, and what was asked of requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from importlib import import_module
from types import ModuleType
from typing import Any
from urllib.parse import quote

from pltrace._client import client_for
from pltrace._exporter import ExportResult, Operation, StoredSpan
from pltrace._health import warn_sometimes
from pltrace._http import Answer, JsonClient, NoAnswerError, NotSentError
from pltrace._slices import Slices
from pltrace._wrapping import when_imported

__all__ = ["PromptLayerExporter", "log_request"]

SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"
#: Limits of `log_request` in PromptLayer's published description.
_LONGEST_TAG, _LONGEST_ERROR, _LONGEST_KEY = 512, 1024, 1024
#: Refusals for what a batch holds; splitting it finds the span that is meant.
_REJECTED = frozenset({400, 413, 422})
#: A gateway's answers that leave open whether the server behind it took the batch.
_UNCERTAIN = frozenset({408, 502, 504})
_NODE_TYPES = {"llm": "LLM_CALL", "prompt": "PROMPT_TEMPLATE"}


#: What is stored is a tree: no time for a look at whether it is.
_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")).encode


class PromptLayerExporter:
    """Delivers to PromptLayer over `POST /spans-bulk`: one request a batch, and the ids of the LLM calls come back.

    Args:
        api_key: PromptLayer's key.
        base_url: PromptLayer's address.
        client: The `promptlayer` client that scores, metadata, links and groups go through; None makes one on first
            need, since importing it takes half a second.
    """

    name = "promptlayer"

    def __init__(self, api_key: str, base_url: str, client: Any = None) -> None:
        self._api_key = api_key
        self._base_url = base_url
        self._client = client
        if client is None:
            _watch_openai()
        self.forked()

    def forked(self) -> None:
        """Start with a connection of its own; one that the parent of a fork uses is left alone."""
        self._http = JsonClient(self._base_url, {"X-API-KEY": self._api_key, "User-Agent": "pltrace"})

    def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
        """Send a batch; what an earlier try may have delivered is asked for first, and not sent again."""
        known: dict[str, int | None] = {}
        if any(span.uncertain for span in batch):
            found = self._arrived(batch)
            if isinstance(found, ExportResult):
                return found
            known = found
        rest = [span for span in batch if span.record["span_id"] not in known]
        result = self._post(rest) if rest else ExportResult("delivered")
        if result.outcome != "delivered":
            return result
        ids = {span_id: request_id for span_id, request_id in known.items() if request_id is not None}
        result = replace(result, request_ids={**ids, **result.request_ids})
        unlogged = [
            span
            for span in batch
            if span.record.get("prompt_name") is not None
            and span.record["span_id"] not in result.request_ids
            and span.record["span_id"] not in result.refused
        ]
        return self._logged_without_link(unlogged, result) if unlogged else result

    def _logged_without_link(self, unlogged: Sequence[StoredSpan], result: ExportResult) -> ExportResult:
        """Send LLM calls again without their prompt: PromptLayer logs no request for a prompt that it doesn't know."""
        plain = [
            replace(span, record={key: value for key, value in span.record.items() if not key.startswith("prompt_")})
            for span in unlogged
        ]
        second = self._post(plain)
        if second.outcome == "rejected":
            return result
        if second.outcome != "delivered":  # That the spans are there is found out by the next try.
            return replace(second, uncertain=True)
        warn_sometimes(
            "unknown_prompt",
            "PromptLayer doesn't know prompt %r, version %s: %d LLM call(s) that were made from such are logged "
            "without a link.",
            unlogged[0].record["prompt_name"],
            unlogged[0].record["prompt_version"],
            len(unlogged),
        )
        return replace(result, request_ids={**result.request_ids, **second.request_ids})

    def _post(self, spans: Sequence[StoredSpan]) -> ExportResult:
        try:
            answer = self._http.request("POST", "/spans-bulk", self.body(spans))
        except NotSentError as error:
            return ExportResult("retry", f"can't be reached: {error}")
        except NoAnswerError as error:
            return ExportResult("retry", f"took a batch and didn't answer: {error}", uncertain=True)
        return self._judged(answer)

    def body(self, batch: Sequence[StoredSpan]) -> bytes:
        """Return what is posted for a batch: the same bytes for the same spans, every time."""
        slices, spans = Slices(), []
        for span in batch:
            slices.between()
            spans.append(_json(self._span(span.record)))
        return f'{{"spans":[{",".join(spans)}]}}'.encode()

    def _arrived(self, batch: Sequence[StoredSpan]) -> dict[str, int | None] | ExportResult:
        """Ask PromptLayer which of the uncertain spans it has: span id → request id."""
        wanted = {span.record["span_id"] for span in batch if span.uncertain}
        known: dict[str, int | None] = {}
        for trace_id in dict.fromkeys(span.record["trace_id"] for span in batch if span.uncertain):
            try:
                answer = self._http.request("GET", f"/api/public/v2/traces/{quote(trace_id)}")
            except (NotSentError, NoAnswerError) as error:
                return ExportResult("retry", f"doesn't say what it has: {error}", uncertain=True)
            if answer.status == 404:
                continue
            told = answer.json()
            if answer.status != 200 or not isinstance(told, dict) or not isinstance(told.get("spans"), list):
                judged = _refusal(answer)
                outcome = judged.outcome if judged.outcome == "unauthorized" else "retry"
                return ExportResult(outcome, judged.reason, retry_after_s=judged.retry_after_s, uncertain=True)
            for span in told["spans"]:
                if isinstance(span, dict) and span.get("span_id") in wanted:
                    request_id = span.get("request_log_id")
                    known[span["span_id"]] = request_id if isinstance(request_id, int) else None
        return known

    def _judged(self, answer: Answer) -> ExportResult:
        if not 200 <= answer.status < 300:
            return _refusal(answer)
        told = answer.json()
        if not isinstance(told, dict) or not isinstance(told.get("spans"), list):
            # Somebody else may have answered, such as a login page: the next try asks what arrived.
            return ExportResult("retry", f"answered {answer.status} with something unreadable", uncertain=True)
        request_ids = {
            log["span_id"]: log["id"]
            for log in told.get("request_logs") or ()
            if isinstance(log, dict) and isinstance(log.get("id"), int) and isinstance(log.get("span_id"), str)
        }
        reason = f"PromptLayer refused it: {told.get('rejection_reason') or 'rejected'}"
        return ExportResult(
            "delivered",
            request_ids=request_ids,
            refused=dict.fromkeys(told.get("rejected_span_ids") or (), reason),
        )

    def operate(self, operation: Operation) -> ExportResult:
        """Send a score, metadata, a prompt link or a group through the `promptlayer` client."""
        try:
            client = client_for(self._api_key, self._base_url, self._client)
            _OPERATIONS[operation.kind](client.track, operation.request_id, operation.arguments)
        except Exception as error:
            return _judged_error(error)
        return ExportResult("delivered")

    def shutdown(self) -> None:
        """Close the connection."""
        self._http.close()

    def _span(self, record: Mapping[str, Any]) -> dict[str, Any]:
        is_tool = record["kind"] == "tool"
        failed = record["status"] in ("error", "cancelled")
        span: dict[str, Any] = {
            "name": f"Tool: {record['name']}" if is_tool else record["name"],
            "context": {"trace_id": record["trace_id"], "span_id": record["span_id"], "trace_state": ""},
            "kind": "SpanKind.CLIENT" if record["kind"] == "llm" else "SpanKind.INTERNAL",
            "parent_id": record["parent_id"],
            "start_time": record["started_at_ns"],
            "end_time": max(record["ended_at_ns"] or 0, record["started_at_ns"]),
            "status": {
                "status_code": "StatusCode.ERROR" if failed else "StatusCode.OK",
                "description": record["error"] if failed else None,
            },
            "attributes": _attributes(record),
            "resource": {"attributes": {"service.name": record["service"]}, "schema_url": SCHEMA_URL},
        }
        if record["kind"] == "llm":
            span["log_request"] = log_request(record)
        return span


_watching = False


def _watch_openai() -> None:
    """Load httpx where openai is loaded, in the user's thread, so that no thread of ours is seen loading it.

    openai 3 takes a module `httpx` that it finds in `sys.modules` for a whole one. If our thread imports promptlayer,
    and with it httpx, while the program calls openai, that call fails with an AttributeError.
    """
    global _watching
    if not _watching:
        _watching = True
        when_imported("openai", _load_httpx)


def _load_httpx(openai: ModuleType) -> None:
    with suppress(ImportError):
        import_module("httpx")


def _attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a span's attributes: those that PromptLayer's trace view reads, and OpenTelemetry's GenAI ones."""
    attributes: dict[str, Any] = {
        "node_type": _NODE_TYPES.get(record["kind"], "CODE_EXECUTION"),
        "pltrace.kind": record["kind"],
        "pltrace.status": record["status"],
        "tags": record["tags"],
    }
    for key, value in (record["metadata"] or {}).items():
        attributes[f"promptlayer.metadata.{key}"] = _text(value)
    if record["user"] is not None:
        attributes["user.id"] = record["user"]
    if record["session"] is not None:
        attributes["gen_ai.conversation.id"] = record["session"]
    if record["kind"] == "llm":
        attributes.update(_llm_attributes(record))
    else:
        for side in ("input", "output"):
            if record[side] is not None:
                attributes[f"function_{side}"] = _text(record[side])
    if record["kind"] == "tool":
        attributes["tool.name"] = record["name"]
        attributes["gen_ai.operation.name"] = "execute_tool"
        attributes["gen_ai.tool.name"] = record["name"]
    return attributes


#: Counts that a request log has no field for.
_TOKEN_DETAILS = {
    "cached_input_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_creation_input_tokens": "gen_ai.usage.cache_creation.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
}


def _llm_attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat" if record["input"]["type"] == "chat" else "text_completion",
        "gen_ai.provider.name": record["provider"],
        "gen_ai.request.model": record["model"],
        "pltrace.attempt": record["attempt"],
        "pltrace.cached": record["cached"],
    }
    for side in ("input", "output"):
        if record[f"{side}_tokens"] is not None:
            attributes[f"gen_ai.usage.{side}_tokens"] = record[f"{side}_tokens"]
    for key, name in _TOKEN_DETAILS.items():
        if record.get(key) is not None:
            attributes[name] = record[key]
    if record["first_token_at_ns"] is not None:
        attributes["pltrace.time_to_first_token_s"] = (record["first_token_at_ns"] - record["started_at_ns"]) / 1e9
    for key in ("name", "version", "label"):
        if record.get(f"prompt_{key}") is not None:
            attributes[f"promptlayer.prompt.{key}"] = str(record[f"prompt_{key}"])
    return attributes


def log_request(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `log_request` of an LLM call, within the limits of PromptLayer's description."""
    status = {"ok": "SUCCESS", "partial": "WARNING"}.get(record["status"], "ERROR")
    log: dict[str, Any] = {
        "provider": record["provider"],
        "model": record["model"],
        "input": record["input"],
        "output": record["output"],
        "request_start_time": _iso(record["started_at_ns"]),
        "request_end_time": _iso(record["ended_at_ns"] or record["started_at_ns"]),
        "parameters": record["parameters"],
        "tags": [tag[:_LONGEST_TAG] for tag in record["request_tags"]],
        "metadata": {key[:_LONGEST_KEY]: value for key, value in record["request_metadata"].items()},
        "input_tokens": record["input_tokens"] or 0,
        "output_tokens": record["output_tokens"] or 0,
        "function_name": record["name"],
        "status": status,
    }
    if record.get("prompt_name") is not None:
        log["prompt_name"] = record["prompt_name"]
        log["prompt_version_number"] = record["prompt_version"]
        log["prompt_input_variables"] = record["prompt_input_variables"]
    if record["error_type"] is not None:
        log["error_type"] = record["error_type"]
    if record["error"] is not None:
        log["error_message"] = record["error"][:_LONGEST_ERROR]
    return log


def _iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, timezone.utc).isoformat()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _refusal(answer: Answer) -> ExportResult:
    """Return what an answer other than 2xx means for a batch."""
    reason = f"answered {answer.status}: {_message(answer)}"
    if answer.status in (401, 403):
        return ExportResult("unauthorized", reason)
    if answer.status in _REJECTED:
        return ExportResult("rejected", reason)
    return ExportResult("retry", reason, retry_after_s=answer.retry_after_s(), uncertain=answer.status in _UNCERTAIN)


def _message(answer: Answer) -> str:
    told = answer.json()
    if isinstance(told, dict):
        for key in ("message", "error", "detail"):
            if told.get(key):
                return str(told[key])[:500]
    return answer.body[:200].decode("utf-8", "replace")


def _score(track: Any, request_id: int, arguments: Mapping[str, Any]) -> None:
    track.score(request_id, arguments["score"], arguments["score_name"])


def _metadata(track: Any, request_id: int, arguments: Mapping[str, Any]) -> None:
    track.metadata(request_id, {key: _text(value) for key, value in arguments["metadata"].items()})


def _prompt(track: Any, request_id: int, arguments: Mapping[str, Any]) -> None:
    track.prompt(request_id, **arguments)


def _group(track: Any, request_id: int, arguments: Mapping[str, Any]) -> None:
    track.group(request_id, arguments["group_id"])


_OPERATIONS: dict[str, Callable[[Any, int, Mapping[str, Any]], None]] = {
    "score": _score,
    "metadata": _metadata,
    "prompt": _prompt,
    "group": _group,
}
#: What promptlayer's exceptions mean, by class name along their causes: it wraps one in another.
_REFUSALS = {
    "PromptLayerAuthenticationError": "unauthorized",
    "PromptLayerPermissionDeniedError": "unauthorized",
    "PromptLayerBadRequestError": "rejected",
    "PromptLayerNotFoundError": "rejected",
    "PromptLayerConflictError": "rejected",
    "PromptLayerUnprocessableEntityError": "rejected",
    "PromptLayerValidationError": "rejected",
}


def _judged_error(error: BaseException) -> ExportResult:
    cause: BaseException | None = error
    while cause is not None:
        outcome = _REFUSALS.get(type(cause).__name__)
        if outcome == "unauthorized":
            return ExportResult("unauthorized", str(error))
        if outcome == "rejected":
            return ExportResult("rejected", str(error))
        cause = cause.__cause__ or cause.__context__
    return ExportResult("retry", str(error))
