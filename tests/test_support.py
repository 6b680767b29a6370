"""The doubles are strict, say what they got, and fail as they are told."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import ValidationError
from langchain_core.messages import AIMessageChunk
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from promptlayer import PromptLayer
from promptlayer import exceptions as promptlayer_errors
from pydantic import BaseModel, Field

from tests.support import schema
from tests.support.http_double import (
    CLOSE,
    HANG,
    STORE_THEN_CLOSE,
    STORE_THEN_CUT,
    STORE_THEN_GARBLE,
    Fault,
    on,
    slow,
)
from tests.support.llm_server import LlamaServer
from tests.support.promptlayer_server import PromptLayerProcess, PromptLayerServer
from tests.support.scripted_llm import ApiError, Reply, ScriptedOpenAI

TRACE = "0123456789abcdef0123456789abcdef"
START = 1_700_000_000_000_000_000
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def server() -> Iterator[PromptLayerServer]:
    """A PromptLayer that made no mistake of its own when the test ends."""
    with PromptLayerServer() as running:
        yield running
    assert running.errors == []


def a_span(number: int = 1, parent: int | None = None, *, request: bool = False, **changes: Any) -> dict[str, Any]:
    """Makes a correct span."""
    span = {
        "name": f"span-{number}",
        "context": {"trace_id": TRACE, "span_id": f"{number:016x}", "trace_state": ""},
        "kind": "SpanKind.INTERNAL",
        "parent_id": parent and f"{parent:016x}",
        "start_time": START + number,
        "end_time": START + number + 10**9,
        "status": {"status_code": "StatusCode.OK"},
        "attributes": {},
        "resource": {"attributes": {"service.name": "test"}, "schema_url": ""},
    }
    return {**span, **({"log_request": a_request()} if request else {}), **changes}


def a_request(**changes: Any) -> dict[str, Any]:
    """Makes a correct request log."""
    request = {
        "provider": "openai",
        "model": "gpt-4o",
        "input": chat("user", "Hello!"),
        "output": chat("assistant", "Hi."),
        "request_start_time": "2024-01-20T10:00:00Z",
        "request_end_time": "2024-01-20T10:00:01.25Z",
    }
    return {**request, **changes}


def chat(role: str, text: str) -> dict[str, Any]:
    """Makes a blueprint of one message."""
    return {"type": "chat", "messages": [{"role": role, "content": [{"type": "text", "text": text}]}]}


def send(
    server: PromptLayerServer | PromptLayerProcess,
    path: str = "/spans-bulk",
    body: Any = None,
    *,
    method: str = "POST",
    headers: dict[str, str] | None = None,
    timeout: float = 10,
) -> tuple[int, Any]:
    """Sends a request with the right headers, and gives status and JSON of the answer."""
    port = int(server.url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    defaults = {"X-API-KEY": server.api_key, "Content-Type": "application/json"}
    try:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {**defaults, **(headers or {})})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def post(server: PromptLayerServer, *spans: dict[str, Any], timeout: float = 10) -> tuple[int, Any]:
    """Posts spans."""
    return send(server, body={"spans": list(spans)}, timeout=timeout)


def in_request(change: Change) -> Change:
    """Makes a change to a span's request log."""
    return lambda span: change(span["log_request"])


def in_input(change: Change) -> Change:
    """Makes a change to the message that a request log has as its input."""
    return lambda span: change(span["log_request"]["input"]["messages"][0])


BROKEN_RULES: dict[str, tuple[Change, str]] = {
    "short span id": (lambda s: s["context"].update(span_id="ab"), "context.span_id"),
    "upper-case span id": (lambda s: s["context"].update(span_id="ABCDEF0123456789"), "context.span_id"),
    "zero span id": (lambda s: s["context"].update(span_id="0" * 16), "context.span_id"),
    "zero trace id": (lambda s: s["context"].update(trace_id="0" * 32), "context.trace_id"),
    "no trace state": (lambda s: s["context"].pop("trace_state"), "trace_state"),
    "bad parent id": (lambda s: s.update(parent_id="parent123"), "parent_id"),
    "own parent": (lambda s: s.update(parent_id=s["context"]["span_id"]), "own parent"),
    "ends before start": (lambda s: s.update(end_time=START - 1), "before it starts"),
    "milliseconds": (lambda s: s.update(start_time=START // 10**6), "start_time"),
    "fraction": (lambda s: s.update(start_time=START + 0.5), "start_time"),
    "unknown kind": (lambda s: s.update(kind="LLM"), "kind"),
    "unknown status": (lambda s: s.update(status={"status_code": "OK"}), "status_code"),
    "unknown span property": (lambda s: s.update(tags=[]), "tags"),
    "resource number": (lambda s: s["resource"]["attributes"].update(pid=1), "resource.attributes.pid"),
    "unknown property": (in_request(lambda r: r.update(tokens=1)), "log_request.tokens"),
    "no output": (in_request(lambda r: r.pop("output")), "output"),
    "local time": (in_request(lambda r: r.update(request_start_time="2024-01-20T10:00:00")), "start_time"),
    "times reversed": (in_request(lambda r: r.update(request_end_time="2024-01-19T10:00:00Z")), "end_time"),
    "long tag": (in_request(lambda r: r.update(tags=["x" * 513])), "tags.0"),
    "metadata number": (in_request(lambda r: r.update(metadata={"a": 1})), "metadata.a"),
    "long metadata key": (in_request(lambda r: r.update(metadata={"x" * 1025: ""})), "1025"),
    "long error": (in_request(lambda r: r.update(status="ERROR", error_message="x" * 1025)), "error_message"),
    "unknown error": (in_request(lambda r: r.update(status="ERROR", error_type="OOPS")), "error_type"),
    "error on success": (in_request(lambda r: r.update(error_type="PROVIDER_ERROR")), "error_type"),
    "negative tokens": (in_request(lambda r: r.update(input_tokens=-1)), "input_tokens"),
    "text content": (in_input(lambda m: m.update(content="Hello!")), "messages.0.content"),
    "unknown role": (in_input(lambda m: m.update(role="human")), "'human'"),
    "untyped block": (in_input(lambda m: m["content"][0].pop("type")), "'type' is missing"),
    "unknown block": (in_input(lambda m: m["content"][0].update(type="audio")), "'audio'"),
    "tool without call": (in_input(lambda m: m.update(role="tool")), "tool_call_id"),
}


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_broken_rule_refuses_the_whole_batch(server: PromptLayerServer, rule: str) -> None:
    """One bad span is answered with 422, names its place, and leaves nothing of the batch."""
    change, place = BROKEN_RULES[rule]
    bad = a_span(2, request=True)
    change(bad)
    status, answer = post(server, a_span(1), bad)
    schema.validate("HTTPValidationError", answer)
    assert (status, server.spans, server.request_logs) == (422, {}, [])
    assert place in server.violations[0]
    assert [post.status for post in server.posts] == [422]


@pytest.mark.parametrize(
    ("expected", "request_"),
    [
        (401, {"headers": {"X-API-KEY": "pl_wrong"}}),
        (404, {"path": "/spans"}),
        (405, {"method": "GET"}),
        (415, {"headers": {"Content-Type": "text/plain"}}),
        (415, {"headers": {"Content-Encoding": "gzip"}}),
        (400, {"body": b"{"}),
        (400, {"body": b'{"spans": [NaN]}'}),
        (400, {"body": b'{"spans": ["\\ud800"]}'}),
        (400, {"body": b'{"spans": [], "spans": []}'}),
        (400, {"body": b"\xff"}),
        (422, {"body": {"spans": [], "more": 1}}),
        (422, {"body": []}),
    ],
)
def test_a_wrong_request_gets_its_status(server: PromptLayerServer, expected: int, request_: dict[str, Any]) -> None:
    """Key, path, method, type and JSON are checked, and all but a wrong key is a violation."""
    status, answer = send(server, **{"body": {"spans": []}, **request_})
    assert (status, len(server.violations)) == (expected, 0 if expected == 401 else 1)
    schema.validate("ErrorResponse", answer)


def test_spans_are_kept_and_requests_get_ids(server: PromptLayerServer) -> None:
    """A good batch is answered as published, and the views show its spans, requests and tree."""
    status, answer = post(server, a_span(3, 1, request=True), a_span(1), a_span(2, 1))
    schema.validate("CreateSpansBulkResponse", answer)
    assert status == 201
    assert answer["request_logs"] == [{"id": 1000, "span_id": f"{3:016x}"}]
    assert server.request_logs == [{**a_request(), "id": 1000, "span_id": f"{3:016x}"}]
    assert server.tree(TRACE) == server.tree() == [("span-1", [("span-2", []), ("span-3", [])])]
    assert server.posts[0].span_ids == (f"{3:016x}", f"{1:016x}", f"{2:016x}")
    assert server.violations == []


def test_a_resent_request_is_logged_twice(server: PromptLayerServer) -> None:
    """Spans are upserted, within a batch the first wins, but each log_request that comes gets an id."""
    post(server, a_span(1, request=True))
    _, answer = post(server, a_span(1, request=True, name="new"), a_span(1, request=True, name="newer"))
    assert answer["request_logs"] == [{"id": 1001, "span_id": f"{1:016x}"}]
    assert server.spans[f"{1:016x}"]["name"] == "new"
    assert (server.duplicates_in_batch, server.duplicate_request_logs) == (1, 1)


def test_a_closed_trace_rejects_its_spans(server: PromptLayerServer) -> None:
    """Spans of a closed trace are named in the answer, the others of the batch are kept."""
    server.close_trace(TRACE)
    other = a_span(2)
    other["context"]["trace_id"] = TRACE[::-1]
    status, answer = post(server, a_span(1, request=True), other)
    schema.validate("CreateSpansBulkResponse", answer)
    assert (status, answer["rejected_span_ids"], answer["rejection_reason"]) == (
        201,
        [f"{1:016x}"],
        "trace_closed",
    )
    assert (list(server.spans), server.request_logs) == ([f"{2:016x}"], [])


def test_traces_and_requests_can_be_read(server: PromptLayerServer) -> None:
    """What was stored is read back as published, with the id of each request; the unknown is 404."""
    post(server, a_span(1), a_span(2, 1, request=True))
    status, trace = send(server, f"/api/public/v2/traces/{TRACE}", method="GET")
    schema.validate("TraceDetailResponse", trace)
    ids = {span["span_id"]: span.get("request_log_id") for span in trace["spans"]}
    assert (status, ids) == (200, {f"{1:016x}": None, f"{2:016x}": 1000})
    status, request = send(server, "/api/public/v2/requests/1000", method="GET")
    schema.validate("RequestLogDetailResponse", request)
    assert (status, request["latency_ms"], request["trace_id"]) == (200, 1250.0, TRACE)
    assert send(server, "/api/public/v2/requests/7", method="GET")[0] == 404
    assert send(server, "/api/public/v2/traces/7", method="GET")[0] == 404
    assert server.violations == []


def test_promptlayers_own_client_is_understood(server: PromptLayerServer) -> None:
    """What the client logs, tracks, groups and publishes is recorded in order."""
    client = PromptLayer(api_key=server.api_key, base_url=server.url)
    request_id = client.log_request(**a_request())["id"]
    client.templates.publish({"prompt_name": "a/b", "prompt_template": chat("user", "Hi {name}")})
    assert client.track.score(request_id, 90, "quality")
    assert client.track.metadata(request_id, {"k": "v"})
    assert client.track.prompt(request_id, "a/b", {"name": "you"}, version=1)
    assert client.track.group(request_id, client.group.create())
    assert server.operations == [
        {"op": "score", "request_id": 1000, "score": 90, "name": "quality"},
        {"op": "metadata", "request_id": 1000, "metadata": {"k": "v"}},
        {
            "op": "prompt",
            "request_id": 1000,
            "prompt_name": "a/b",
            "prompt_input_variables": {"name": "you"},
            "version": 1,
            "label": None,
        },
        {"op": "create_group", "group_id": 1},
        {"op": "group", "request_id": 1000, "group_id": 1},
    ]
    assert server.violations == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/library-track-score", {"request_id": 1000, "score": 101}),
        ("/library-track-score", {"request_id": 1000, "score": 0.5}),
        ("/rest/track-score", {"request_id": 1, "score": 50}),
        ("/library-track-metadata", {"request_id": 1000, "metadata": {"k": 1}}),
        ("/library-track-prompt", {"request_id": 1000, "prompt_name": "unknown"}),
        ("/track-group", {"request_id": 1000, "group_id": 7}),
        ("/track-group", {"request_id": 1000, "group_id": 1, "more": 1}),
    ],
)
def test_wrong_tracking_is_refused(server: PromptLayerServer, path: str, body: dict[str, Any]) -> None:
    """Ids that nobody gave, values out of range and unknown properties are refused and not recorded."""
    post(server, a_span(1, request=True))
    status, answer = send(server, path, {**body, "api_key": server.api_key})
    assert status in (400, 422), answer
    assert (server.operations, len(server.violations)) == ([], 1)


def test_prompts_are_found_by_version_and_label(server: PromptLayerServer) -> None:
    """The latest version is the default, labels and numbers choose others, and the unknown is 404."""
    server.add_prompt("greeting", "Hi {name}", labels=["prod"])
    server.add_prompt("greeting", "Hello {name}")
    client = PromptLayer(api_key=server.api_key, base_url=server.url)
    found = [client.templates.get("greeting", params) for params in ({}, {"version": 1}, {"label": "prod"})]
    assert [prompt["version"] for prompt in found] == [2, 1, 1]
    schema.validate("GetPromptTemplateResponse", found[0])
    with pytest.raises(promptlayer_errors.PromptLayerNotFoundError):
        client.templates.get("greeting", {"label": "dev"})
    _, raw = send(server, "/prompt-templates/greeting?label=prod", method="GET")
    schema.validate("GetPromptTemplateRawResponse", raw)
    _, listed = send(server, "/prompt-templates?page=1&per_page=5", method="GET")
    schema.validate("ListPromptTemplates", listed)
    assert [item["version"] for item in listed["items"]] == [2]
    assert server.violations == []


def test_errors_come_as_often_as_asked(server: PromptLayerServer) -> None:
    """`fail_next` answers an error so many times, with its headers, and stores nothing meanwhile."""
    server.fail_next(2, 429, {"Retry-After": "7"}, path="/spans-bulk")
    assert [post(server, a_span(1))[0] for _ in range(3)] == [429, 429, 201]
    assert [(p.status, p.handled) for p in server.posts] == [(429, False), (429, False), (201, True)]
    assert len({p.sha256 for p in server.posts}) == 1


@pytest.mark.parametrize(
    ("fault", "error", "stored"),
    [
        (CLOSE, http.client.RemoteDisconnected, False),
        (STORE_THEN_CLOSE, http.client.RemoteDisconnected, True),
        (STORE_THEN_CUT, http.client.IncompleteRead, True),
        (STORE_THEN_GARBLE, json.JSONDecodeError, True),
    ],
)
def test_a_broken_answer_may_hide_a_stored_batch(
    server: PromptLayerServer, fault: Fault, error: type[Exception], stored: bool
) -> None:
    """A connection that breaks or an answer that's no JSON comes before or after the spans are kept."""
    server.faults.append(on("/spans-bulk", fault, times=1))
    with pytest.raises(error):
        post(server, a_span(1, request=True))
    assert (len(server.spans), len(server.request_logs)) == (stored, stored)
    assert post(server, a_span(1))[0] == 201


def test_a_hanging_server_answers_no_more(server: PromptLayerServer) -> None:
    """A request that hangs is seen, times out at the client, and keeps nothing."""
    server.fault = HANG
    with pytest.raises(TimeoutError):
        post(server, a_span(1), timeout=0.1)
    server.wait_for(lambda: server.posts)
    server.fault = None
    assert (post(server, a_span(2))[0], list(server.spans)) == (201, [f"{2:016x}"])


def test_a_slow_server_answers_once_it_is_released(server: PromptLayerServer) -> None:
    """A delayed request is handled after all, at the latest when the test lets it go."""
    server.fault = slow(60)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(post(server, a_span(1))[0]))
    thread.start()
    server.wait_for(lambda: server.posts)
    assert server.spans == {}
    server.release()
    thread.join(10)
    assert (answers, len(server.spans)) == ([201], 1)


def test_a_stopped_server_refuses_and_comes_back(server: PromptLayerServer) -> None:
    """After `stop` nobody listens and open connections are cut; `start` goes on with port and state."""
    post(server, a_span(1))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as idle:
        idle.sendall(b"GET /__state__ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(9) == b"HTTP/1.1 "
        server.stop()
        while idle.recv(65536):
            pass
    with pytest.raises(ConnectionRefusedError):
        post(server, a_span(2))
    server.start()
    assert (post(server, a_span(2))[0], len(server.spans)) == (201, 2)


def test_poison_and_size_refuse_a_batch(server: PromptLayerServer) -> None:
    """A batch with a poisoned span, or a big one, is refused whole, whatever else is in it."""
    server.poison(lambda name: name == "span-2")
    server.limit_body(2000)
    assert post(server, a_span(1), a_span(2))[0] == 422
    assert post(server, *map(a_span, range(3, 30)))[0] == 413
    assert post(server, a_span(1))[0] == 201
    assert (list(server.spans), server.violations) == ([f"{1:016x}"], [])


def test_a_server_of_its_own_process_tells_its_state() -> None:
    """The double in a child process is as strict, and its state is read over HTTP."""
    with PromptLayerProcess() as server:
        send(server, body={"spans": [a_span(1, request=True)]})
        send(server, body={"spans": [{}]})
        state = server.state()
    assert [post["status"] for post in state["posts"]] == [201, 422]
    assert [log["id"] for log in state["request_logs"]] == [1000]
    assert list(state["spans"]) == [f"{1:016x}"]
    assert state["violations"]


def test_the_schema_error_names_the_place() -> None:
    """A message says where the value is wrong, inside the alternative that its tag chooses."""
    blueprint = chat("user", "Hi")
    schema.validate("ChatPrompt", blueprint)
    blueprint["messages"][0]["content"][0]["text"] = None
    with pytest.raises(ValidationError, match=r"messages\.0\.content\.0\.text: None is not of type 'string'"):
        schema.validate("ChatPrompt", blueprint)


def a_chat(server: ScriptedOpenAI | LlamaServer, **options: Any) -> ChatOpenAI:
    """Makes a chat model that asks this server."""
    url = server.base_url if isinstance(server, ScriptedOpenAI) else server.url
    return ChatOpenAI(base_url=url, api_key="x", model="m", max_retries=0, stream_usage=True, timeout=20, **options)


def streamed(model: ChatOpenAI) -> AIMessageChunk:
    """Adds up a stream."""
    chunks = list(model.stream("Hi"))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert isinstance(total, AIMessageChunk)
    return total


def test_a_script_is_followed_in_order() -> None:
    """Texts, tool calls and usage arrive as scripted, plain and streamed, and the bodies are kept."""
    call = Reply("Let me see.", tool_calls=[("weather", {"city": "Paris"})], usage=(5, 6))
    with ScriptedOpenAI(["One two.", call, call, ApiError(429, headers={"Retry-After": "1"})]) as server:
        model = a_chat(server)
        assert streamed(model).content == "One two."
        for answer in (model.invoke("Hi"), streamed(model)):
            assert answer.content == "Let me see."
            assert [(c["name"], c["args"]) for c in answer.tool_calls] == [("weather", {"city": "Paris"})]
            assert answer.usage_metadata is not None
            assert answer.usage_metadata["total_tokens"] == 11
        with pytest.raises(Exception, match="429"):
            model.invoke("Hi")
    assert [body.get("stream", False) for body in server.bodies] == [True, False, True, False]
    assert server.errors == []


def test_completions_and_embeddings_are_scripted_too() -> None:
    """A function of the body answers each prompt of a batch, a stream comes in pieces, vectors are stable."""

    def shout(body: dict[str, Any]) -> Reply:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return Reply([f"{prompt}!" for prompt in prompts])

    with ScriptedOpenAI(shout) as server:
        llm = OpenAI(base_url=server.base_url, api_key="x", max_retries=0)
        texts = [generations[0].text for generations in llm.generate(["a", "b c"]).generations]
        assert texts == ["a!", "b c!"]
        assert "".join(llm.stream("d e")) == "d e!"
        embeddings = OpenAIEmbeddings(
            base_url=server.base_url, api_key="x", check_embedding_ctx_length=False, max_retries=0
        )
        assert embeddings.embed_query("x") == embeddings.embed_query("x") != embeddings.embed_query("y")


def test_a_scripted_stream_can_break_off() -> None:
    """The chunks before the break arrive, then the client gets an error."""
    with ScriptedOpenAI(Reply("one two three", cut_after=2)) as server:
        stream = a_chat(server).stream("Hi")
        assert "one" in [next(stream).content, next(stream).content]
        with pytest.raises(Exception, match=r"(?i)connection"):
            list(stream)


def test_a_real_model_answers() -> None:
    """llama.cpp chats, streams, calls a tool that it must call, and completes."""

    class Weather(BaseModel):
        """Tell the weather."""

        city: str = Field(max_length=8)

    with LlamaServer() as server:
        model = a_chat(server, max_tokens=16)
        assert model.invoke("Hi").usage_metadata
        assert streamed(model).usage_metadata
        forced = a_chat(server).bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
        assert [call["name"] for call in forced.invoke("Hi").tool_calls] == ["Weather"]
        assert OpenAI(base_url=server.url, api_key="x", model="m", max_tokens=8).invoke("Once")
