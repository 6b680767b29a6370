"""Sends stored spans to PromptLayer, LLM calls with their request log, and what was asked of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any
from urllib.parse import quote

from pltrace._client import client_for
from pltrace._exporter import ExportResult, Operation, StoredSpan
from pltrace._health import warn_sometimes
from pltrace._http import Answer, JsonClient, NoAnswerError, NotSentError
from pltrace._redaction import REDACTED
from pltrace._rows import ReadSpan
from pltrace._slices import Slices
from pltrace._wire import as_read, span_text, text_of
from pltrace._wrapping import when_imported

__all__ = ["PromptLayerExporter"]

#: Refusals for what a batch holds; splitting it finds the span that is meant.
_REJECTED = frozenset({400, 413, 422})


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
        """Send a batch; LLM calls that an earlier try may have delivered are asked for first, and not sent again."""
        return self._without_key(self._exported([as_read(span) for span in batch]))

    def _without_key(self, result: ExportResult) -> ExportResult:
        """Return a result whose reason, which is logged and stored, doesn't say the key: some answers repeat it."""
        return replace(result, reason=result.reason.replace(self._api_key, REDACTED))

    def _exported(self, batch: Sequence[ReadSpan]) -> ExportResult:
        known = self._arrived([span for span in batch if span.uncertain])
        if isinstance(known, ExportResult):
            return known
        rest = [span for span in batch if span.span_id not in known]
        result = self._post(rest) if rest else ExportResult("delivered")
        if result.outcome != "delivered":
            return result
        ids = {span_id: request_id for span_id, request_id in known.items() if request_id is not None}
        result = replace(result, request_ids={**ids, **result.request_ids})
        unlogged = [
            span
            for span in batch
            if span.row.kind == "llm"
            and span.span_id not in result.request_ids
            and span.span_id not in result.refused
            and span.record.get("prompt_name") is not None
        ]
        return self._logged_without_link(unlogged, result) if unlogged else result

    def _logged_without_link(self, unlogged: Sequence[ReadSpan], result: ExportResult) -> ExportResult:
        """Send LLM calls again without their prompt: PromptLayer logs no request for a prompt that it doesn't know."""
        plain = [
            StoredSpan(span.seq, {key: value for key, value in span.record.items() if not key.startswith("prompt_")})
            for span in unlogged
        ]
        second = self._post([as_read(span) for span in plain])
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

    def _post(self, spans: Sequence[ReadSpan]) -> ExportResult:
        try:
            answer = self._http.request("POST", "/spans-bulk", self.body(spans))
        except NotSentError as error:
            return ExportResult("retry", f"can't be reached: {error}")
        except NoAnswerError as error:
            return ExportResult("retry", f"took a batch and didn't answer: {error}", uncertain=True)
        return self._judged(answer)

    def body(self, batch: Sequence[ReadSpan]) -> bytes:
        """Return what is posted for a batch: the same bytes for the same spans, every time."""
        slices, spans = Slices(), []
        for span in batch:
            slices.between()
            spans.append(span_text(as_read(span)))
        return f'{{"spans":[{",".join(spans)}]}}'.encode()

    def _arrived(self, spans: Sequence[ReadSpan]) -> dict[str, int | None] | ExportResult:
        """Ask PromptLayer which of these spans it has: span id → request id."""
        wanted = {span.span_id for span in spans}
        known: dict[str, int | None] = {}
        for trace_id in dict.fromkeys(span.row.trace_id for span in spans):
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
            return self._without_key(_judged_error(error))
        return ExportResult("delivered")

    def shutdown(self) -> None:
        """Close the connection."""
        self._http.close()


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


def _refusal(answer: Answer) -> ExportResult:
    """Return what an answer other than 2xx means for a batch."""
    reason = f"answered {answer.status}: {_message(answer)}"
    if answer.status in (401, 403):
        return ExportResult("unauthorized", reason)
    if answer.status in _REJECTED:
        return ExportResult("rejected", reason)
    # A server that fails may do so after it took the batch, and a gateway can't know: asking costs little, a call that
    # is logged twice can't be taken back.
    failed = answer.status >= 500
    uncertain = failed or answer.status == 408
    return ExportResult("retry", reason, retry_after_s=answer.retry_after_s(), uncertain=uncertain, suspect=failed)


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
    track.metadata(request_id, {key: text_of(value) for key, value in arguments["metadata"].items()})


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
    return ExportResult("retry", f"failed: {error}")
