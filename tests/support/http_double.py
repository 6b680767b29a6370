"""A threaded HTTP/1.1 server for the doubles, with faults that tests ask for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NoReturn, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from typing_extensions import Self

_ASKED_FOR = {"success": False, "message": "The test asked for this fault."}


class BadBody(Exception):
    """The body isn't the strict JSON that the endpoint takes."""


@dataclass
class Request:
    """A request as it arrived, and what became of it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes
    time: float = field(default_factory=time.time)
    status: int | None = None
    """What was answered; None before an answer, and for good if there was none."""
    handled: bool = False
    """Whether the server did what was asked, whatever it answered."""
    number: int = 1
    """Which one it is on its connection."""
    sha256: str = ""
    size: int = 0
    span_ids: tuple[str, ...] = ()
    _json: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.sha256 = hashlib.sha256(self.body).hexdigest()
        self.size = len(self.body)

    @property
    def path(self) -> str:
        """The path, without the query and with its escapes undone."""
        return unquote(urlsplit(self.target).path)

    @property
    def raw_path(self) -> str:
        """The path as it was sent, in which an escaped slash isn't a slash."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query parameters."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def json(self) -> Any:
        """Gives the body, read once, or raises `BadBody` if it isn't strict JSON."""
        if self._json is None:
            self._json = _strict_json(self.body)
        return self._json

    def forget_body(self) -> None:
        """Lets the body go, so that a long test doesn't keep all it sent."""
        self.body, self._json = b"", None


def _strict_json(body: bytes) -> Any:
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)
        if b"\\ud" in body.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadBody(f"The body isn't JSON: {error}") from None
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} isn't JSON")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"an object has one key twice: {[key for key, _ in pairs]}")
    return found


@dataclass(frozen=True)
class Answer:
    """A status, a body (bytes, text, or what goes out as JSON) and further headers."""

    status: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def encoded(self) -> bytes:
        """Gives the body's bytes."""
        if isinstance(self.body, bytes):
            return self.body
        return (self.body if isinstance(self.body, str) else json.dumps(self.body)).encode()


@dataclass(frozen=True)
class Stream:
    """An answer sent piece by piece, each piece in one write."""

    pieces: Iterable[bytes]
    content_type: str = "text/event-stream"
    status: int = 200


@dataclass(frozen=True)
class Fault:
    """What goes wrong with a request; without `status`, `hang` or `close` it's answered as ever.

    `store`: the server does what was asked first, and then the fault comes.
    `hang_up`: close the connection after the answer, without having said so.
    `delay`: seconds to wait, after storing if `store`, else before handling.
    `status`, `body`, `headers`: answer this. `hang`: never answer, until `release()`.
    `close`: close the connection with no answer. `cut`: send half of the answer, then cut the connection.
    """

    status: int | None = None
    body: Any = field(default_factory=lambda: dict(_ASKED_FOR))
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang: bool = False
    close: bool = False
    cut: bool = False
    hang_up: bool = False
    store: bool = False

    @property
    def replaces_answer(self) -> bool:
        """Whether the ordinary answer isn't sent."""
        return self.status is not None or self.hang or self.close


HANG = Fault(hang=True)
STORE_THEN_HANG = Fault(hang=True, store=True)
CLOSE = Fault(close=True)
STORE_THEN_CLOSE = Fault(close=True, store=True)
STORE_THEN_CUT = Fault(cut=True)
STORE_THEN_GARBLE = Fault(status=201, body=b'{"success": tr', store=True)

FaultRule = Callable[[Request], "Fault | None"]


def slow(seconds: float) -> Fault:
    """Handles and answers as ever, but late."""
    return Fault(delay=seconds)


def on(path: str, fault: Fault, times: int | None = None) -> FaultRule:
    """Makes a rule that hits requests to paths that begin so, the first `times` of them."""
    left = times

    def rule(request: Request) -> Fault | None:
        nonlocal left
        if not request.path.startswith(path) or left == 0:
            return None
        left = None if left is None else left - 1
        return fault

    return rule


class HttpDouble:
    """Answers over real HTTP on 127.0.0.1, keeps what it got, and fails as it's told.

    `faults` are asked in order for every request, the first that gives a `Fault` wins; `fault` hits the rest.
    `requests` lists all that arrived, `errors` the tracebacks of the double's own mistakes.
    """

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.faults: list[FaultRule] = []
        self.fault: Fault | None = None
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._released = threading.Event()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def answer(self, request: Request) -> Answer | Stream | None:
        """Does what the request asks, each double in its way; None closes the connection with no answer."""
        raise NotImplementedError

    def arrived(self, request: Request) -> None:
        """Notes what a double wants to keep of each request, faulty or not."""

    @property
    def url(self) -> str:
        """Where it listens, also while it's stopped."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Listens, on the same port as before if it was stopped."""
        if self._server is None:
            self._released = threading.Event()
            self._server = _Server(self)
            self.port = self._server.server_address[1]
            self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
            self._thread.start()
            _running.add(self)
        return self

    def stop(self) -> None:
        """Refuses connections from now on and cuts those that are open."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        _running.discard(self)
        self._released.set()
        server.shutdown()
        server.server_close()
        self._thread.join()
        with self.changed:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # The client was faster.
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def fail_next(
        self,
        times: int = 1,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        path: str = "/",
    ) -> None:
        """Answers the next requests to paths that begin so with an error, and does nothing they ask."""
        fault = Fault(status=status, headers=headers or {}, body=_ASKED_FOR if body is None else body)
        self.faults.append(on(path, fault, times))

    def release(self) -> None:
        """Lets go of the requests that hang or are delayed now; later ones hang again."""
        with self.changed:
            released, self._released = self._released, threading.Event()
        released.set()

    def wait_for(self, predicate: Callable[[], Any], timeout: float = 10.0) -> None:
        """Waits until the predicate holds, looked at under the lock at every change."""
        with self.changed:
            if not self.changed.wait_for(predicate, timeout):
                seen = [(request.method, request.path, request.status) for request in self.requests[-20:]]
                raise AssertionError(f"Not so after {timeout} s; last: {seen}; errors: {self.errors}")

    def pause(self, seconds: float | None = None) -> None:
        """Waits that long, or until `release()` or `stop()`."""
        self._released.wait(seconds)

    def _fault_for(self, request: Request) -> Fault | None:
        with self.changed:
            for rule in self.faults:
                fault = rule(request)
                if fault is not None:
                    return fault
            return self.fault

    def _handled(self, request: Request) -> Answer | Stream | None:
        try:
            answer = self.answer(request)
        except Exception:
            with self.changed:
                self.errors.append(traceback.format_exc())
            return Answer(500, {"success": False, "message": traceback.format_exc()})
        request.handled = answer is not None and answer.status < 400
        return answer

    def _decide(self, request: Request, fault: Fault | None) -> Answer | Stream | None:
        """Gives what to answer; None is no answer at all."""
        if fault is None:
            return self._handled(request)
        answer = self._handled(request) if fault.store else None
        if fault.delay:
            self.pause(fault.delay)
        if fault.hang:
            self.pause()
        if fault.hang or fault.close or self._server is None:
            return None
        if fault.status is not None:
            return Answer(fault.status, fault.body, fault.headers)
        return answer or self._handled(request)


class _Server(ThreadingHTTPServer):
    """Accepts for a double."""

    daemon_threads = True
    block_on_close = False
    # The default of 5 makes a burst of connections wait a second for the next SYN.
    request_queue_size = 256

    def __init__(self, double: HttpDouble) -> None:
        self.double = double
        super().__init__(("127.0.0.1", double.port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accepts a connection, known from then on to `stop()`."""
        connection, address = super().get_request()
        with self.double.changed:
            self.double._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection."""
        with self.double.changed:
            self.double._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Keeps a mistake of the double for the test, instead of printing it."""
        with self.double.changed:
            self.double.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """Serves one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    count = 0

    @property
    def double(self) -> HttpDouble:
        """The double that this connection belongs to."""
        return cast(_Server, self.server).double

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def handle(self) -> None:
        """Serves until either side closes; a client that goes away is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _serve(self) -> None:
        body = self._read_body()
        if body is None:
            return
        double = self.double
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.count += 1
        request = Request(self.command, self.path, headers, body, number=self.count)
        double.arrived(request)
        with double.changed:
            double.requests.append(request)
            double.changed.notify_all()
        fault = double._fault_for(request)
        answer = double._decide(request, fault)
        with double.changed:
            request.status = answer.status if answer else None
            request.forget_body()
            double.changed.notify_all()
        self._send(answer, cut=bool(fault and fault.cut))
        if fault and fault.hang_up:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _serve

    def _read_body(self) -> bytes | None:
        """Gives the body; None when its length isn't told, which is answered here, or who sent it went away."""
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            self._send(Answer(411, {"success": False, "message": "A Content-Length is needed."}))
            self.close_connection = True
            return None
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            self.close_connection = True
            return None
        return body

    def _send(self, answer: Answer | Stream | None, cut: bool = False) -> None:
        if answer is None:
            self.close_connection = True
        elif isinstance(answer, Stream):
            self._send_stream(answer)
        else:
            self._send_whole(answer, cut)

    def _send_whole(self, answer: Answer, cut: bool) -> None:
        body = answer.encoded()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **answer.headers}
        head = _head(answer.status, headers)
        if cut:
            self.connection.sendall(head + body[: len(body) // 2])
            self.close_connection = True
        else:
            # One write: a head sent on its own waits 40 ms for the client's delayed acknowledgement.
            self.connection.sendall(head + (b"" if self.command == "HEAD" else body))

    def _send_stream(self, answer: Stream) -> None:
        head = _head(answer.status, {"Content-Type": answer.content_type, "Transfer-Encoding": "chunked"})
        for piece in answer.pieces:
            self.connection.sendall(head + b"%x\r\n%b\r\n" % (len(piece), piece))
            head = b""
        self.connection.sendall(head + b"0\r\n\r\n")


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    reason = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Unknown"
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


_running: weakref.WeakSet[HttpDouble] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """Closes a forked child's copies of the sockets, which else stay open after the parent's `stop()`."""
    for double in list(_running):
        for connection in double._connections:
            os.close(connection.detach())
        if double._server is not None:
            os.close(double._server.socket.detach())
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
