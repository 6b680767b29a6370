"""An OpenAI-compatible server that answers by a script, for exact sequences of calls."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .http_double import Answer, BadBody, HttpDouble, Request, Stream

_CREATED = 1_700_000_000
_DONE = b"data: [DONE]\n\n"
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True)
class Reply:
    """One answer of the model.

    `text`: for each choice the same, or one text for each choice (of `n`, or of a list of prompts).
    `tool_calls`: pairs of a tool's name and its arguments, which may be text that isn't JSON.
    `usage`: tokens read and written; None leaves it out. `pause`: seconds before each further chunk.
    `hang_after`, `cut_after`: chunks after which a stream stalls or breaks off; 0 does so to a plain answer.
    """

    text: str | Sequence[str] = ""
    tool_calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()
    usage: tuple[int, int] | None = (11, 7)
    finish_reason: str | None = None
    pause: float = 0.0
    hang_after: int | None = None
    cut_after: int | None = None
    message: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the message, such as `refusal` or `reasoning_content`."""

    def text_of(self, choice: int) -> str:
        """Gives the text of one choice."""
        return self.text if isinstance(self.text, str) else self.text[choice]

    @property
    def reason(self) -> str:
        """Why it ended."""
        return self.finish_reason or ("tool_calls" if self.tool_calls else "stop")


@dataclass(frozen=True)
class ApiError:
    """An error as OpenAI answers it."""

    status: int = 500
    message: str = "The test asked for this error."
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def answer(self) -> Answer:
        """Gives the HTTP answer."""
        kind = _ERROR_TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return Answer(self.status, {"error": error}, self.headers)


Step = Reply | ApiError | str
Script = Step | Sequence[Step] | Callable[[dict[str, Any]], Step]


class ScriptedOpenAI(HttpDouble):
    """Answers `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`; `base_url` is for the client.

    The script is a list of steps, each used once; a function of the request's body, which may block; or one
    step, used for every call. `bodies` lists the bodies that came. The faults of `HttpDouble` work here too.
    """

    def __init__(self, script: Script = "Hello.", api_key: str | None = None, port: int = 0) -> None:
        super().__init__(port)
        self.api_key = api_key
        self.bodies: list[dict[str, Any]] = []
        self._script = script
        self._next = 0

    @property
    def base_url(self) -> str:
        """Where OpenAI's client should send its requests."""
        return f"{self.url}/v1"

    def arrived(self, request: Request) -> None:
        """Keeps the body of each request, faulty or not."""
        try:
            body = request.json()
        except BadBody:
            return
        with self.changed:
            self.bodies.append(body)

    def answer(self, request: Request) -> Answer | Stream | None:
        """Answers as the script says."""
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return ApiError(401, "Incorrect API key provided.", "invalid_api_key").answer()
        endpoint = _ENDPOINTS.get((request.method, request.path))
        if endpoint is None:
            return ApiError(404, f"No such URL: {request.method} {request.path}").answer()
        try:
            return endpoint(self, request.json())
        except BadBody as error:
            return ApiError(400, str(error)).answer()

    def _step(self, body: dict[str, Any]) -> Reply | ApiError:
        step = self._script(body) if callable(self._script) else self._scripted()
        return Reply(step) if isinstance(step, str) else step

    def _scripted(self) -> Step:
        script = self._script
        if isinstance(script, Reply | ApiError | str) or callable(script):
            return script  # type: ignore[return-value]
        with self.changed:
            self._next += 1
            if self._next > len(script):
                self.errors.append(f"the script has {len(script)} steps, this is call {self._next}")
                return ApiError(400, "The script has no more steps.")
            return script[self._next - 1]

    def _chat(self, body: dict[str, Any]) -> Answer | Stream | None:
        return self._reply(body, range(body.get("n") or 1), _chat_message, _chat_deltas, "chat.completion")

    def _complete(self, body: dict[str, Any]) -> Answer | Stream | None:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = range(len(prompts) * (body.get("n") or 1))
        return self._reply(body, choices, _completion_text, _completion_deltas, "text_completion")

    def _embed(self, body: dict[str, Any]) -> Answer:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [{"object": "embedding", "index": i, "embedding": _vector(x)} for i, x in enumerate(inputs)]
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        return Answer(200, {"object": "list", "data": data, "model": body["model"], "usage": usage})

    def _reply(
        self, body: dict[str, Any], choices: range, whole: _Whole, deltas: _Deltas, kind: str
    ) -> Answer | Stream | None:
        reply = self._step(body)
        if isinstance(reply, ApiError):
            return reply.answer()
        head = {"id": "scripted-1", "created": _CREATED, "model": body.get("model", "scripted")}
        if body.get("stream"):
            suffix = ".chunk" if kind == "chat.completion" else ""
            head["object"] = kind + suffix
            return Stream(self._events(body, reply, head, [d for c in choices for d in deltas(reply, c)]))
        if 0 in (reply.hang_after, reply.cut_after):
            if reply.hang_after == 0:
                self.pause()
            return None
        usage = {"usage": _usage(reply)} if reply.usage else {}
        return Answer(200, {**head, "object": kind, "choices": [whole(reply, c) for c in choices], **usage})

    def _events(
        self, body: dict[str, Any], reply: Reply, head: dict[str, Any], deltas: list[dict[str, Any]]
    ) -> Iterator[bytes]:
        chunks = [{**head, "choices": [delta]} for delta in deltas]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks = [{**chunk, "usage": None} for chunk in chunks]
            chunks += [{**head, "choices": [], "usage": _usage(reply)}] if reply.usage else []
        for index, chunk in enumerate(chunks):
            if index == reply.hang_after:
                self.pause()
            if index in (reply.hang_after, reply.cut_after):
                raise ConnectionAbortedError("The script breaks off here.")
            if index and reply.pause:
                self.pause(reply.pause)
            yield b"data: %b\n\n" % json.dumps(chunk).encode()
        yield _DONE


_Whole = Callable[[Reply, int], dict[str, Any]]
_Deltas = Callable[[Reply, int], list[dict[str, Any]]]
_ENDPOINTS: dict[tuple[str, str], Callable[[ScriptedOpenAI, dict[str, Any]], Answer | Stream | None]] = {
    ("POST", "/v1/chat/completions"): ScriptedOpenAI._chat,
    ("POST", "/v1/completions"): ScriptedOpenAI._complete,
    ("POST", "/v1/embeddings"): ScriptedOpenAI._embed,
}


def _pieces(text: str) -> list[str]:
    """Splits a text into what a stream brings at a time."""
    return re.findall(r"\s*\S+|\s+$", text)


def _usage(reply: Reply) -> dict[str, int]:
    read, written = reply.usage or (0, 0)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _calls(reply: Reply) -> list[tuple[str, str, str]]:
    """Gives id, name and arguments of each tool call."""
    return [
        (f"call_{index}", name, arguments if isinstance(arguments, str) else json.dumps(arguments))
        for index, (name, arguments) in enumerate(reply.tool_calls)
    ]


def _chat_message(reply: Reply, choice: int) -> dict[str, Any]:
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name, arguments in _calls(reply)
    ]
    message = {"role": "assistant", "content": reply.text_of(choice) or None, **reply.message}
    if calls:
        message["tool_calls"] = calls
    return {"index": choice, "message": message, "logprobs": None, "finish_reason": reply.reason}


def _chat_deltas(reply: Reply, choice: int) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "", **reply.message}]
    deltas += [{"content": piece} for piece in _pieces(reply.text_of(choice))]
    for index, (id_, name, arguments) in enumerate(_calls(reply)):
        begun: dict[str, Any] = {"id": id_, "type": "function", "function": {"name": name, "arguments": ""}}
        parts = [begun, *({"function": {"arguments": piece}} for piece in _pieces(arguments))]
        deltas += [{"tool_calls": [{"index": index, **part}]} for part in parts]
    choices = [{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
    return [*choices, {"index": choice, "delta": {}, "logprobs": None, "finish_reason": reply.reason}]


def _completion_text(reply: Reply, choice: int) -> dict[str, Any]:
    return {"index": choice, "text": reply.text_of(choice), "logprobs": None, "finish_reason": reply.reason}


def _completion_deltas(reply: Reply, choice: int) -> list[dict[str, Any]]:
    head = {"index": choice, "logprobs": None}
    deltas = [{**head, "text": piece, "finish_reason": None} for piece in _pieces(reply.text_of(choice))]
    return [*deltas, {**head, "text": "", "finish_reason": reply.reason}]


def _vector(text: object) -> list[float]:
    """Gives a vector that depends on the text alone."""
    return [byte / 255 for byte in hashlib.sha256(repr(text).encode()).digest()[:8]]
