"""Stands in for PromptLayer over real HTTP, as strict as what is published about it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote
from urllib.request import ProxyHandler, build_opener

from . import child_process, schema
from .http_double import Answer, BadBody, Fault, HttpDouble, Request
from .span_rules import Problem, bulk_problems, request_problems

Tree = list[tuple[str, "Tree"]]
_Handler = Callable[["PromptLayerServer", Request, str], Answer]

API_KEY = "pl_test_0123456789abcdef0123456789abcdef"
_FIRST_REQUEST_ID = 1000
_STATE = "/__state__"


@dataclass
class Prompt:
    """An entry of the prompt registry; its versions count from 1."""

    id: int
    name: str
    versions: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def number(self, version: int | None = None, label: str | None = None) -> int | None:
        """Resolves a version or a label, by default the latest version; None if there is no such one."""
        wanted = self.labels.get(label) if label is not None else version or len(self.versions)
        return wanted if wanted is not None and 0 < wanted <= len(self.versions) else None


class Refusal(Exception):
    """The request is refused; the body breaks a rule, unless `violation` is False."""

    def __init__(self, status: int, message: str, *, violation: bool = True) -> None:
        super().__init__(message)
        self.status, self.message, self.violation = status, message, violation


class Unprocessable(Exception):
    """The body breaks rules that are known by place."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def lines(self) -> list[str]:
        """Says each in one line."""
        return [f"{'.'.join(map(str, path)) or '(body)'}: {message}" for path, message in self.problems]


class PromptLayerServer(HttpDouble):
    """PromptLayer's endpoints for spans, requests, tracking and prompts.

    `spans`: the last body of each span by id. `request_logs`: every request logged, with `id` and `span_id`.
    `operations`: scores, metadata, prompt links and groups, in the order they came.
    `violations`: each rule that a request broke; a test of good behaviour ends with `violations == []`.
    """

    def __init__(self, port: int = 0, api_key: str = API_KEY) -> None:
        super().__init__(port)
        self.api_key = api_key
        self.spans: dict[str, dict[str, Any]] = {}
        self.request_logs: list[dict[str, Any]] = []
        self.operations: list[dict[str, Any]] = []
        self.prompts: dict[str, Prompt] = {}
        self.violations: list[str] = []
        self.closed_traces: set[str] = set()
        self.groups = 0
        self.duplicates_in_batch = 0
        self.duplicate_request_logs = 0
        self._span_rows: dict[str, int] = {}
        self._request_of_span: dict[str, int] = {}

    # What tests look at and set.

    @property
    def posts(self) -> list[Request]:
        """All `POST /spans-bulk` that arrived, with `time`, `sha256`, `size`, `span_ids` and `status`."""
        with self.changed:
            return [request for request in self.requests if request.path == "/spans-bulk"]

    def tree(self, trace_id: str | None = None) -> Tree:
        """Gives the spans of one trace, or of all, as nested `(name, [children])`, by start time."""
        with self.changed:
            spans = [s for s in self.spans.values() if trace_id in (None, s["context"]["trace_id"])]
        spans.sort(key=lambda span: int(span["start_time"]))
        known = {span["context"]["span_id"] for span in spans}
        children: dict[str | None, list[dict[str, Any]]] = {}
        for span in spans:
            parent = span.get("parent_id")
            children.setdefault(parent if parent in known else None, []).append(span)
        return _forest(children, None)

    def close_trace(self, trace_id: str) -> None:
        """Rejects spans of this trace from now on."""
        with self.changed:
            self.closed_traces.add(trace_id)

    def poison(self, is_poison: Callable[[str], bool], status: int = 422) -> None:
        """Refuses any batch with a span whose name matches, as a rule of PromptLayer's that nobody knew."""
        detail = [{"loc": ["body", "spans"], "msg": "This span can't be taken.", "type": "value_error"}]
        fault = Fault(status=status, body={"detail": detail})

        def rule(request: Request) -> Fault | None:
            names = [span.get("name", "") for span in _spans_in(request)]
            return fault if any(map(is_poison, names)) else None

        self.faults.append(rule)

    def limit_body(self, size: int) -> None:
        """Answers 413 to bodies above so many bytes."""
        fault = Fault(status=413, body={"success": False, "message": "Request entity too large"})
        self.faults.append(lambda request: fault if request.size > size else None)

    def add_prompt(
        self,
        name: str,
        template: str | list[dict[str, Any]] | dict[str, Any],
        *,
        labels: Iterable[str] = (),
        tags: Iterable[str] = (),
        metadata: dict[str, Any] | None = None,
        commit_message: str | None = None,
    ) -> int:
        """Publishes a version of a prompt and gives its number.

        The template is a blueprint, the list of its messages, or the text of one user message.
        """
        blueprint = _blueprint(template)
        schema.validate("PromptVersion", {"prompt_template": blueprint, "metadata": metadata})
        with self.changed:
            prompt = self.prompts.setdefault(name, Prompt(len(self.prompts) + 1, name))
            version = {
                "prompt_template": blueprint,
                "metadata": metadata,
                "commit_message": commit_message,
                "created_at": _iso(datetime.now(timezone.utc)),
            }
            prompt.versions.append(version)
            prompt.tags = list(tags) or prompt.tags
            prompt.labels.update(dict.fromkeys(labels, len(prompt.versions)))
            return len(prompt.versions)

    def state(self) -> dict[str, Any]:
        """Gives all that tests look at, as JSON."""
        kept = ("time", "sha256", "size", "span_ids", "status", "handled")
        posts = [{name: getattr(post, name) for name in kept} for post in self.posts]
        names = ("spans", "request_logs", "operations", "violations", "errors")
        counts = ("duplicates_in_batch", "duplicate_request_logs")
        with self.changed:
            return {"posts": posts, **{name: getattr(self, name) for name in (*names, *counts)}}

    # How it answers.

    def arrived(self, request: Request) -> None:
        """Notes which spans a post brings, whatever comes of it."""
        if request.path == "/spans-bulk":
            contexts = [span.get("context") for span in _spans_in(request)]
            request.span_ids = tuple(str(c.get("span_id")) for c in contexts if isinstance(c, dict))

    def answer(self, request: Request) -> Answer:
        """Routes a request, and answers a refusal as PromptLayer does."""
        try:
            handler, argument = _route(request)
            return handler(self, request, argument)
        except Unprocessable as error:
            self._note(request, *error.lines())
            return Answer(422, {"detail": [_detail(path, message) for path, message in error.problems]})
        except BadBody as error:
            self._note(request, str(error))
            return Answer(400, {"success": False, "message": str(error), **_detail([], str(error))})
        except Refusal as error:
            if error.violation:
                self._note(request, error.message)
            return Answer(error.status, {"success": False, "message": error.message})

    def _note(self, request: Request, *lines: str) -> None:
        with self.changed:
            self.violations += [f"{request.method} {request.path}: {line}" for line in lines]

    def _authorize(self, *keys: str | None) -> None:
        given = [key for key in keys if key is not None]
        if not given or any(key != self.api_key for key in given):
            raise Refusal(401, "Unauthorized - missing or invalid API key.", violation=False)

    def _body(self, request: Request) -> Any:
        """Gives the JSON body of a request whose key is in a header."""
        self._authorize(request.headers.get("x-api-key"))
        return _json_body(request)

    # Spans and requests.

    def _create_spans(self, request: Request, _: str) -> Answer:
        body = self._body(request)
        problems = bulk_problems(body)
        if problems:
            raise Unprocessable(problems)
        with self.changed:
            spans = self._first_of_each(body["spans"])
            rejected = [span for span in spans if span["context"]["trace_id"] in self.closed_traces]
            taken = [span for span in spans if span["context"]["trace_id"] not in self.closed_traces]
            answer: dict[str, Any] = {"success": True, "spans": [self._upsert(span) for span in taken]}
            logged = [span for span in taken if span.get("log_request") and self._knows_prompt(span["log_request"])]
            answer["request_logs"] = [self._log(span) for span in logged]
            if body.get("close_after"):
                self.closed_traces.update(span["context"]["trace_id"] for span in taken)
            self.changed.notify_all()
        if rejected:
            answer["rejected_span_ids"] = [span["context"]["span_id"] for span in rejected]
            answer["rejected_trace_ids"] = sorted({span["context"]["trace_id"] for span in rejected})
            answer["rejection_reason"] = "trace_closed"
        return Answer(201, answer)

    def _knows_prompt(self, log: dict[str, Any]) -> bool:
        """Says whether a request's prompt exists; if not, the span is kept and the request not logged."""
        prompt = self.prompts.get(log.get("prompt_name") or "")
        return not log.get("prompt_name") or (prompt and prompt.number(log.get("prompt_version_number"))) is not None

    def _first_of_each(self, spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first: dict[str, dict[str, Any]] = {}
        for span in spans:
            first.setdefault(span["context"]["span_id"], span)
        self.duplicates_in_batch += len(spans) - len(first)
        return list(first.values())

    def _upsert(self, span: dict[str, Any]) -> dict[str, Any]:
        span_id = span["context"]["span_id"]
        self.spans[span_id] = span
        row = self._span_rows.setdefault(span_id, len(self._span_rows) + 1)
        return {"id": row, "name": span["name"], "span_id": span_id}

    def _log(self, span: dict[str, Any]) -> dict[str, Any]:
        """Logs a span's request, once more if it's sent once more: nothing published says otherwise."""
        span_id = span["context"]["span_id"]
        if span_id in self._request_of_span:
            self.duplicate_request_logs += 1
        request_id = self._log_request(span["log_request"], span_id)
        self._request_of_span[span_id] = request_id
        return {"id": request_id, "span_id": span_id}

    def _log_request(self, body: dict[str, Any], span_id: str | None) -> int:
        request_id = _FIRST_REQUEST_ID + len(self.request_logs)
        self.request_logs.append({**body, "id": request_id, "span_id": span_id})
        return request_id

    def _create_request(self, request: Request, _: str) -> Answer:
        body = self._body(request)
        problems = request_problems(body)
        if problems:
            raise Unprocessable(problems)
        with self.changed:
            request_id = self._log_request(body, None)
        told = {"status": "SUCCESS", "error_type": None, "error_message": None}
        told = {key: body.get(key, default) for key, default in told.items()}
        return Answer(201, {"id": request_id, "prompt_version": None, **told})

    def _get_trace(self, request: Request, trace_id: str) -> Answer:
        self._authorize(request.headers.get("x-api-key"))
        with self.changed:
            spans = [s for s in self.spans.values() if s["context"]["trace_id"] == trace_id]
            rows = [self._trace_row(span) for span in spans]
        if not rows:
            raise Refusal(404, "Trace not found", violation=False)
        return Answer(200, {"success": True, "trace_id": trace_id, "spans": rows})

    def _trace_row(self, span: dict[str, Any]) -> dict[str, Any]:
        span_id = span["context"]["span_id"]
        row = {
            "id": self._span_rows[span_id],
            "name": span["name"],
            "span_id": span_id,
            "parent_id": span.get("parent_id"),
            "start_time": _iso(_moment(span["start_time"])),
            "end_time": _iso(_moment(span["end_time"])),
        }
        if span_id in self._request_of_span:
            row["request_log_id"] = self._request_of_span[span_id]
        return row

    def _get_request(self, request: Request, request_id: str) -> Answer:
        self._authorize(request.headers.get("x-api-key"))
        with self.changed:
            logs = [log for log in self.request_logs if str(log["id"]) == request_id]
            if not logs:
                raise Refusal(404, "Request not found", violation=False)
            span = self.spans.get(logs[0]["span_id"])
        return Answer(200, _request_detail(logs[0], span))

    # Tracking. promptlayer's client puts the key into the body here.

    def _tracked(self, request: Request, schema_name: str) -> dict[str, Any]:
        """Gives the checked body of a tracking request, without the key, about a known request."""
        self._authorize_tracking(request)
        body = _json_body(request)
        body.pop("api_key", None)
        unknown = sorted(body.keys() - schema.properties(schema_name))
        problems = schema.errors(schema_name, body) + [([key], "no such property") for key in unknown]
        if problems:
            raise Unprocessable(problems)
        with self.changed:
            if str(body["request_id"]) not in {str(log["id"]) for log in self.request_logs}:
                raise Refusal(400, f"There is no request {body['request_id']!r}.")
        return {**body, "request_id": int(body["request_id"])}

    def _authorize_tracking(self, request: Request) -> None:
        body = _json_body(request)
        if not isinstance(body, dict):
            raise Unprocessable([([], "it isn't an object")])
        self._authorize(request.headers.get("x-api-key"), body.get("api_key"))

    def _record(self, request: Request, operation: dict[str, Any]) -> Answer:
        with self.changed:
            self.operations.append(operation)
            self.changed.notify_all()
        # The published answer of /rest/… has a message; the recorded one of /library-… has none.
        message = {"message": "Tracked successfully"} if request.path.startswith("/rest/") else {}
        return Answer(200, {"success": True, **message})

    def _track_score(self, request: Request, _: str) -> Answer:
        body = self._tracked(request, "TrackScoreRequest")
        return self._record(request, {"op": "score", "name": None, **body})

    def _track_metadata(self, request: Request, _: str) -> Answer:
        body = self._tracked(request, "TrackMetadataRequest")
        wrong = [key for key, value in body["metadata"].items() if not isinstance(value, str)]
        if wrong:
            raise Unprocessable([(["metadata", key], "the value isn't a string") for key in wrong])
        return self._record(request, {"op": "metadata", **body})

    def _track_prompt(self, request: Request, _: str) -> Answer:
        body = self._tracked(request, "TrackPromptRequest")
        with self.changed:
            prompt = self.prompts.get(body["prompt_name"])
        if prompt is None or prompt.number(body.get("version"), body.get("label")) is None:
            raise Refusal(400, f"There is no such prompt version: {body}. Use `server.add_prompt`.")
        return self._record(request, {"op": "prompt", **body})

    def _create_group(self, request: Request, _: str) -> Answer:
        self._authorize_tracking(request)
        with self.changed:
            self.groups += 1
            self.operations.append({"op": "create_group", "group_id": self.groups})
            self.changed.notify_all()
            return Answer(200, {"success": True, "id": self.groups})

    def _track_group(self, request: Request, _: str) -> Answer:
        body = self._tracked(request, "TrackGroupRequest")
        if not 0 < body["group_id"] <= self.groups:
            raise Refusal(400, f"There is no group {body['group_id']}.")
        return self._record(request, {"op": "group", **body})

    # Prompts.

    def _prompt(self, identifier: str, version: int | None, label: str | None) -> tuple[Prompt, int]:
        with self.changed:
            by_id = {str(prompt.id): prompt for prompt in self.prompts.values()}
            prompt = self.prompts.get(identifier) or by_id.get(identifier)
            number = prompt.number(version, label) if prompt else None
        if prompt is None or number is None:
            raise Refusal(404, "Prompt template not found", violation=False)
        return prompt, number

    def _get_prompt(self, request: Request, identifier: str) -> Answer:
        """Answers what promptlayer's own client asks; the template comes unrendered."""
        body = self._body(request) or {}
        key = body.pop("api_key", None) if isinstance(body, dict) else None
        self._authorize(request.headers.get("x-api-key"), key)
        problems = schema.errors("GetPromptTemplate", body)
        if problems:
            raise Unprocessable(problems)
        prompt, number = self._prompt(identifier, body.get("version"), body.get("label"))
        return Answer(200, _prompt_item(prompt, number))

    def _get_raw_prompt(self, request: Request, identifier: str) -> Answer:
        self._authorize(request.headers.get("x-api-key"))
        version, label = request.query.get("version"), request.query.get("label")
        if version is not None and (not version.isdecimal() or int(version) == 0 or label is not None):
            raise Unprocessable([(["version"], "a positive integer, not together with a label, is needed")])
        prompt, number = self._prompt(identifier, int(version) if version else None, label)
        item = _prompt_item(prompt, number)
        extra = {"tags": prompt.tags, "created_at": prompt.versions[number - 1]["created_at"]}
        return Answer(200, {"success": True, "workspace_id": 1, "snippets": [], **item, **extra})

    def _list_prompts(self, request: Request, _: str) -> Answer:
        self._authorize(request.headers.get("x-api-key"))
        page, size = int(request.query.get("page", 1)), int(request.query.get("per_page", 30))
        label = request.query.get("label")
        with self.changed:
            prompts = [p for p in self.prompts.values() if p.number(label=label) is not None]
        shown = prompts[(page - 1) * size : page * size]
        pages = -(-len(prompts) // size)
        numbers = {"page": page, "pages": pages, "total": len(prompts)}
        turns = {"has_next": page < pages, "has_prev": page > 1, "next_num": page + 1, "prev_num": page - 1}
        items = [{**_prompt_item(p, p.number(label=label) or 0), "external_ids": []} for p in shown]
        return Answer(200, {"items": items, **numbers, **turns})

    def _publish_prompt(self, request: Request, _: str) -> Answer:
        body = self._body(request)
        problems = schema.errors("CreatePromptTemplate", body)
        if problems:
            raise Unprocessable(problems)
        base, version = body["prompt_template"], body["prompt_version"]
        labels = body.get("release_labels") or []
        number = self.add_prompt(
            base["prompt_name"],
            version["prompt_template"],
            labels=labels,
            tags=base.get("tags", []),
            metadata=version.get("metadata"),
            commit_message=version.get("commit_message"),
        )
        prompt, _number = self._prompt(base["prompt_name"], number, None)
        ids = {"prompt_version_id": number, "version_number": number, "external_ids": []}
        item = {**_prompt_item(prompt, number), "tags": prompt.tags, "release_labels": labels}
        # 200 is published, but promptlayer's async client takes nothing but 201 for a success.
        return Answer(201, {**item, **ids})

    def _get_state(self, request: Request, _: str) -> Answer:
        return Answer(200, self.state())


_ROUTES: dict[str, dict[str, _Handler]] = {
    "/spans-bulk": {"POST": PromptLayerServer._create_spans},
    "/log-request": {"POST": PromptLayerServer._create_request},
    "/api/public/v2/traces/([^/]+)": {"GET": PromptLayerServer._get_trace},
    "/api/public/v2/requests/([1-9][0-9]*)": {"GET": PromptLayerServer._get_request},
    "/(?:library-|rest/)track-score": {"POST": PromptLayerServer._track_score},
    "/(?:library-|rest/)track-metadata": {"POST": PromptLayerServer._track_metadata},
    "/(?:library-|rest/)track-prompt": {"POST": PromptLayerServer._track_prompt},
    "/(?:rest/)?track-group": {"POST": PromptLayerServer._track_group},
    "/create-group": {"POST": PromptLayerServer._create_group},
    "/prompt-templates": {"GET": PromptLayerServer._list_prompts},
    "/prompt-templates/([^/]+)": {
        "GET": PromptLayerServer._get_raw_prompt,
        "POST": PromptLayerServer._get_prompt,
    },
    "/rest/prompt-templates": {"POST": PromptLayerServer._publish_prompt},
    _STATE: {"GET": PromptLayerServer._get_state},
}


def _route(request: Request) -> tuple[_Handler, str]:
    """Finds the handler by the path as sent, so that an escaped slash stays inside a prompt's name."""
    for pattern, methods in _ROUTES.items():
        match = re.fullmatch(pattern, request.raw_path)
        if match is None:
            continue
        if request.method not in methods:
            raise Refusal(405, f"{request.method} isn't allowed here.")
        return methods[request.method], unquote(match[1]) if match.groups() else ""
    raise Refusal(404, "There is no such path.")


def _json_body(request: Request) -> Any:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" or "content-encoding" in request.headers:
        raise Refusal(415, f"The body must be plain application/json, not {content_type!r}.")
    return request.json()


def _spans_in(request: Request) -> list[dict[str, Any]]:
    """Gives the spans of a body that may not be JSON, nor have any."""
    try:
        body = request.json()
    except BadBody:
        return []
    spans = body.get("spans") if isinstance(body, dict) else None
    return [span for span in spans if isinstance(span, dict)] if isinstance(spans, list) else []


def _detail(path: list[str | int], message: str) -> dict[str, Any]:
    return {"loc": ["body", *path], "msg": message, "type": "value_error"}


def _forest(children: dict[str | None, list[dict[str, Any]]], parent: str | None) -> Tree:
    return [(s["name"], _forest(children, s["context"]["span_id"])) for s in children.get(parent, [])]


def _blueprint(template: str | list[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    if isinstance(template, str):
        template = [{"role": "user", "content": [{"type": "text", "text": template}]}]
    return {"type": "chat", "messages": template} if isinstance(template, list) else template


def _prompt_item(prompt: Prompt, number: int) -> dict[str, Any]:
    version = prompt.versions[number - 1]
    item = {key: version[key] for key in ("prompt_template", "metadata", "commit_message")}
    return {"id": prompt.id, "prompt_name": prompt.name, "version": number, "llm_kwargs": None, **item}


def _request_detail(log: dict[str, Any], span: dict[str, Any] | None) -> dict[str, Any]:
    read, written = log.get("input_tokens", 0), log.get("output_tokens", 0)
    start, end = log["request_start_time"], log["request_end_time"]
    model = {"provider": log["provider"], "name": log["model"], "parameters": log.get("parameters", {})}
    return {
        "success": True,
        "prompt_blueprint": {
            "prompt_template": log["input"],
            "metadata": {"model": model},
            "inference_client_name": None,
        },
        "request_id": log["id"],
        "provider": log["provider"],
        "model": log["model"],
        "input_tokens": read,
        "output_tokens": written,
        "tokens": read + written,
        "price": log.get("price", 0),
        "request_start_time": start,
        "request_end_time": end,
        "latency_ms": 1000 * (schema.moment(end) - schema.moment(start)).total_seconds(),
        "trace_id": span["context"]["trace_id"] if span else None,
    }


def _moment(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, timezone.utc)


def _iso(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


class PromptLayerProcess(child_process.ChildServer):
    """A `PromptLayerServer` in a process of its own, whose `state()` is that server's."""

    api_key = API_KEY

    def __init__(self) -> None:
        super().__init__("promptlayer_server", "--api-key", self.api_key)

    def state(self) -> dict[str, Any]:
        """Gives spans, request_logs, operations, violations, errors, posts and counts."""
        direct = build_opener(ProxyHandler({}))
        with direct.open(self.url + _STATE, timeout=10) as answer:
            state: dict[str, Any] = json.load(answer)
        return state


def main() -> None:
    """Serves in a process of its own."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--api-key", default=API_KEY)
    arguments = child_process.arguments(parser)
    with PromptLayerServer(arguments.port, arguments.api_key) as server:
        child_process.serve(server.url, arguments)


if __name__ == "__main__":
    main()
