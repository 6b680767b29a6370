"""Sends stored spans to PromptLayer, LLM calls with their request log, and what was asked of requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple
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
#: Answers that are meant for who asks, whatever about.
_TO_WHO_ASKS = frozenset({401, 429})
#: PromptLayer has to fail at a trace so often, and to answer about another one after each.
_FAILURES_UNTIL_BLAMED = 5


class _Arrived(NamedTuple):
    """What PromptLayer says of spans that it may have, by their ids.

    Attributes:
        known: Those that it has → id of their request.
        unknown: Those that it couldn't say anything of → why.
        refused: Those that it fails at every time → why.
        retry_after_s: How long it asked to wait.
    """

    known: dict[str, int | None]
    unknown: dict[str, str]
    refused: dict[str, str]
    retry_after_s: float | None


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
        self._blamed: dict[str, int] = {}  # How often PromptLayer failed at a trace that it was asked about.
        self._taken_trace = ""  # A trace that was taken lately.

    def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
        """Send a batch; LLM calls that an earlier try may have delivered are asked for first, and not sent again."""
        return self._without_key(self._exported([as_read(span) for span in batch]))

    def _without_key(self, result: ExportResult) -> ExportResult:
        """Return a result whose reason, which is logged and stored, doesn't say the key: some answers repeat it."""
        return replace(result, reason=result.reason.replace(self._api_key, REDACTED))

    def _exported(self, batch: Sequence[ReadSpan]) -> ExportResult:
        arrived = self._arrived([span for span in batch if span.uncertain])
        if isinstance(arrived, ExportResult):
            return arrived
        known, unknown, refused, retry_after_s = arrived
        rest = [span for span in batch if span.span_id not in {*known, *unknown, *refused}]
        if len(unknown) == len(batch):
            why = next(iter(unknown.values()))
            return ExportResult("retry", why, retry_after_s=retry_after_s, uncertain=True, unknown=unknown)
        result = replace(self._post(rest) if rest else ExportResult("delivered"), unknown=unknown)
        if result.outcome != "delivered":
            return result
        self._taken_trace = rest[-1].row.trace_id if rest else self._taken_trace
        ids = {span_id: request_id for span_id, request_id in known.items() if request_id is not None}
        result = replace(
            result,
            request_ids={**ids, **result.request_ids},
            refused={**refused, **result.refused},
            retry_after_s=retry_after_s,
        )
        unlogged = [
            span
            for span in batch
            if span.row.kind == "llm"
            and span.span_id not in {*result.request_ids, *result.refused, *unknown}
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
        return self._judged(answer, {span.span_id for span in spans})

    def body(self, batch: Sequence[ReadSpan]) -> bytes:
        """Return what is posted for a batch: the same bytes for the same spans, every time."""
        slices, spans = Slices(), []
        for span in batch:
            slices.between()
            spans.append(span_text(as_read(span)))
        return f'{{"spans":[{",".join(spans)}]}}'.encode()

    def _arrived(self, spans: Sequence[ReadSpan]) -> _Arrived | ExportResult:
        """Ask PromptLayer which of these spans it has; that it fails at some of their traces is told of these."""
        traces: dict[str, list[str]] = {}
        for span in spans:
            traces.setdefault(span.row.trace_id, []).append(span.span_id)
        known: dict[str, int | None] = {}
        failed: dict[str, ExportResult] = {}
        answered: set[str] = set()
        for trace_id in random.sample(list(traces), len(traces)):  # None always comes before the others.
            told = self._spans_of(trace_id)
            if not isinstance(told, ExportResult):
                answered.add(trace_id)
                self._blamed.pop(trace_id, None)
                known.update({span_id: told[span_id] for span_id in traces[trace_id] if span_id in told})
            elif not told.uncertain:
                return told
            else:
                failed[trace_id] = told
                if len(failed) > 1 and not answered:
                    break  # It isn't the traces.
        if not failed:
            return _Arrived(known, {}, {}, None)
        refused = self._refused(failed, answers_others=bool(answered) or self._answers_about_another(failed))
        why = next(iter(failed.values()))
        unknown = {
            span_id: failed.get(trace_id, why).reason
            for trace_id, span_ids in traces.items()
            if trace_id not in answered and trace_id not in refused
            for span_id in span_ids
        }
        aside = {span_id: reason for trace_id, reason in refused.items() for span_id in traces[trace_id]}
        waits = [result.retry_after_s for result in failed.values() if result.retry_after_s is not None]
        return _Arrived(known, unknown, aside, max(waits, default=None))

    def _spans_of(self, trace_id: str) -> dict[str, int | None] | ExportResult:
        """Return what PromptLayer has of a trace: span id → request id; or why it doesn't say."""
        try:
            answer = self._http.request("GET", f"/api/public/v2/traces/{quote(trace_id)}")
        except (NotSentError, NoAnswerError) as error:
            return ExportResult("retry", f"doesn't say what it has: {error}", uncertain=True)
        if answer.status == 404:
            return {}
        told = answer.json()
        if answer.status == 200 and isinstance(told, dict) and isinstance(told.get("spans"), list):
            ids = {
                str(span.get("span_id")): span.get("request_log_id") for span in told["spans"] if isinstance(span, dict)
            }
            return {span_id: number if _is_id(number) else None for span_id, number in ids.items()}
        failure = _refusal(answer)
        if answer.status in _TO_WHO_ASKS:
            return replace(failure, uncertain=False, suspect=False)
        reason = f"doesn't say what it has of trace {trace_id}: it {failure.reason}"
        return ExportResult(
            "retry", reason, retry_after_s=failure.retry_after_s, uncertain=True, suspect=answer.status != 408
        )

    def _answers_about_another(self, failed: Mapping[str, ExportResult]) -> bool | None:
        """Return whether PromptLayer answers about a trace taken lately; None if none was since the last time.

        Args:
            failed: The traces that it has failed at; if they are several, it doesn't answer about others.
        """
        if len(failed) > 1:
            return False
        another, self._taken_trace = self._taken_trace, ""
        if not another or another in failed:
            return None
        return not isinstance(self._spans_of(another), ExportResult)

    def _refused(self, failed: Mapping[str, ExportResult], *, answers_others: bool | None) -> dict[str, str]:
        """Return the traces that PromptLayer has failed at too often while it answers about others, and why."""
        if answers_others is None:  # Nobody can tell whether it is the trace.
            return {}
        if not answers_others:
            self._blamed.clear()
            return {}
        refused = {}
        for trace_id, result in failed.items():
            times = self._blamed[trace_id] = self._blamed.get(trace_id, 0) + result.suspect
            if times >= _FAILURES_UNTIL_BLAMED:
                refused[trace_id] = f"{result.reason} ({times} times, and answered about another one after each)"
        return refused

    def _judged(self, answer: Answer, sent: Collection[str]) -> ExportResult:
        if not 200 <= answer.status < 300:
            return _refusal(answer)
        told = answer.json()
        parts = ("spans", "request_logs", "rejected_span_ids")
        spans, logs, rejected = [told.get(part) for part in parts] if isinstance(told, dict) else [None] * 3
        if not (isinstance(spans, list) and isinstance(logs or [], list) and isinstance(rejected or [], list)):
            # Somebody else may have answered, such as a login page: the next try asks what arrived.
            return ExportResult("retry", f"answered {answer.status} with something unreadable", uncertain=True)
        request_ids = {
            log["span_id"]: log["id"]
            for log in logs or ()
            if isinstance(log, dict) and str(log.get("span_id")) in sent and _is_id(log.get("id"))
        }
        reason = f"PromptLayer refused it: {told.get('rejection_reason') or 'rejected'}"
        return ExportResult(
            "delivered",
            request_ids=request_ids,
            refused={span_id: reason for span_id in rejected or () if isinstance(span_id, str)},
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
    # What answers 403 with a page isn't PromptLayer, but a firewall in front of it: not to the key.
    if answer.status == 401 or (answer.status == 403 and isinstance(answer.json(), dict)):
        return ExportResult("unauthorized", reason)
    if answer.status in _REJECTED:
        return ExportResult("rejected", reason)
    # A server that fails may do so after it took the batch, and a gateway can't know: asking costs little, a call that
    # is logged twice can't be taken back.
    uncertain = answer.status >= 500 or answer.status == 408
    retry_after_s = answer.retry_after_s()
    return ExportResult("retry", reason, retry_after_s=retry_after_s, uncertain=uncertain, suspect=answer.status != 408)


def _is_id(told: object) -> bool:
    """Return whether it can be the id of a request: not `True`, nor more than SQLite can hold."""
    return type(told) is int and 0 < told < 2**63


def _message(answer: Answer) -> str:
    told = answer.json()
    if isinstance(told, dict):
        for key in ("message", "error", "detail"):
            if told.get(key):
                return str(told[key])[:500]
    return " ".join(answer.body[:200].decode("utf-8", "replace").split())


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
#: Answers of 400 to 499 that others may follow: they are no refusal for what is asked.
_MAY_PASS = frozenset({401, 402, 403, 407, 408, 421, 423, 424, 425, 429})


def _judged_error(error: BaseException) -> ExportResult:
    """Return what an exception of promptlayer's means: it wraps the one with the answer in others."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "PromptLayerValidationError":
            return ExportResult("rejected", str(error))
        answer = getattr(cause, "response", None)
        if answer is not None and isinstance(getattr(answer, "status_code", None), int):
            headers = {name.lower(): value for name, value in answer.headers.items()}
            return _judged_answer(Answer(answer.status_code, headers, b""), str(error))
        cause = cause.__cause__ or cause.__context__
    return ExportResult("retry", f"failed: {error}")


def _judged_answer(answer: Answer, reason: str) -> ExportResult:
    if answer.status == 401:
        return ExportResult("unauthorized", reason)
    if 400 <= answer.status < 500 and answer.status not in _MAY_PASS:
        return ExportResult("rejected", reason)
    if answer.status == 403:
        reason += " (403: the API key may not do this, or not for this request)"
    failed = answer.status >= 500
    return ExportResult("retry", f"failed: {reason}", retry_after_s=answer.retry_after_s(), suspect=failed)
