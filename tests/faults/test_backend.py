"""PromptLayer is down, slow, strange or in doubt: nothing is lost, nothing is logged twice, nobody waits."""

from __future__ import annotations

import logging
import select
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from promptlayer import PromptLayer

import pltrace
from pltrace import traced
from pltrace._http import Answer, JsonClient, NoAnswerError, NotSentError
from tests.faults.support import (
    PRELUDE,
    Measured,
    all_delivered,
    ask,
    balance,
    deliver_rest,
    measure_worst,
    taken,
    told,
)
from tests.support.http_double import CLOSE, HANG, STORE_THEN_CLOSE, Fault, on, slow
from tests.support.programs import deliveries, ended, module, rows, run, start
from tests.support.promptlayer_server import PromptLayerServer

Deliver = Callable[..., None]

#: A hang is told from none by this; the figures themselves are printed.
MOST_S = 5.0


def recover(timeout: float = 30.0) -> None:
    """Delivers all, patiently."""
    assert pltrace.flush(timeout)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    """Gives what pltrace warned about."""
    return [entry.getMessage() for entry in log.records if entry.name == "pltrace" and entry.levelno >= logging.WARNING]


# Outages.

_OUTAGES = {
    "refused": None,
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429, headers={"Retry-After": "3"}),
    "hangs": HANG,
}


@pytest.mark.slow
@pytest.mark.parametrize("outage", _OUTAGES)
def test_outage_while_the_program_goes_on(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    measured: Measured,
    outage: str,
) -> None:
    """An outage in the middle of a program's life loses nothing, and its calls never notice."""
    fault = _OUTAGES[outage]
    if fault is None:
        promptlayer.stop()
    promptlayer.fault = fault
    source = PRELUDE + "warm()\ntimed(ask, 160, rate=20)\ntimed.report()\nassert pltrace.flush(60)"
    program = start(source, tmp_path, **settings)

    def recover_later() -> None:
        promptlayer.fault = None
        promptlayer.start()

    recovery = threading.Timer(6.0, recover_later)
    recovery.start()
    report = told(ended(program, timeout=110.0))
    recovery.join()
    all_delivered(promptlayer, store, 320)
    assert report["worst_ms"] < 1000 * MOST_S
    measure_worst(measured, report)
    measured("p99 of calls", report["p99_us"] / 1e3, "ms")


@pytest.mark.parametrize("by", [pytest.param("the next process", marks=pytest.mark.slow), "sync"])
def test_down_for_a_whole_life(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, by: str
) -> None:
    """What a process recorded that never met PromptLayer is delivered by the next, or by `pltrace sync`, once."""
    promptlayer.stop()
    told(run(PRELUDE + "warm()\ntimed(ask, 500)\ntimed.report()", tmp_path, **settings))
    assert balance(store, 1000).pending == 1000
    promptlayer.start()
    if by == "sync":
        assert module("sync", **settings).code == 0
    else:
        deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 1000)


def test_another_process_sends_the_same_bytes(tmp_path: Path, promptlayer: PromptLayerServer, store: Path) -> None:
    """A span says the same of itself whichever process sends it, the name of its service included."""
    settings = {
        "PROMPTLAYER_API_KEY": promptlayer.api_key, "PROMPTLAYER_BASE_URL": promptlayer.url, "PLTRACE_STORE": store,
    }  # fmt: skip
    bodies: list[bytes] = []

    def keep(request: Any) -> Fault | None:
        if request.path != "/spans-bulk":
            return None
        bodies.append(request.body)
        return Fault(status=503) if len(bodies) == 1 else None

    promptlayer.faults.append(keep)
    told(run(PRELUDE + "warm()\ntimed(ask, 10)\ntimed.report()", tmp_path, PLTRACE_SERVICE="shop", **settings))
    assert module("sync", **settings).code == 0
    assert bodies[0] == bodies[1]
    assert {span["resource"]["attributes"]["service.name"] for span in promptlayer.spans.values()} == {"shop"}


def test_everything_asked_during_an_outage_happens_once(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """Calls, callbacks, scores and metadata of an outage all happen after it, once each, through one's own client."""
    told_ids: list[int] = []
    deliver(client=PromptLayer(api_key=promptlayer.api_key, base_url=promptlayer.url))
    promptlayer.stop()
    requests = [
        ask(f"ask-{number:02}", on_request=lambda request: told_ids.append(int(request))) for number in range(30)
    ]
    for number, request in enumerate(requests):
        request.score(number)
        request.add_metadata({"number": number})
    assert not pltrace.flush()
    promptlayer.start()
    recover()
    all_delivered(promptlayer, store, 60)
    ids = [request.wait(0.0) for request in requests]
    assert sorted(told_ids) == sorted(id_ for id_ in ids if id_)
    asked = sorted(
        (op["request_id"], op.get("score", op.get("metadata"))) for op in promptlayer.operations if "score" in op
    )
    assert asked == sorted((id_, number) for number, id_ in enumerate(ids))
    assert sum(op["op"] == "metadata" for op in promptlayer.operations) == 30
    assert rows(store, "SELECT count(*) AS count FROM operations WHERE state <> 1") == [{"count": 0}]


# In doubt.


def test_stored_but_never_acknowledged_in_a_crowd(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """Batch after batch that PromptLayer takes without an answer: one set of spans, one request log for each call."""
    promptlayer.faults.append(on("/spans-bulk", STORE_THEN_CLOSE, 4))
    deliver()
    for number in range(120):
        ask(f"ask-{number:03}")
    recover(60.0)
    all_delivered(promptlayer, store, 240)
    assert set(taken(promptlayer).values()) == {1}


def test_the_store_fails_after_promptlayer_took_it(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A batch that was taken while the store couldn't be written is asked for, not sent again."""
    deliver()
    pltrace.flush()
    failing = threading.Event()

    def break_the_store(request: Any) -> Fault | None:
        if request.path == "/spans-bulk" and not failing.is_set():
            failing.set()
            with closing(sqlite3.connect(store)) as connection:
                connection.execute(
                    "CREATE TRIGGER failing BEFORE INSERT ON requests"
                    " BEGIN SELECT RAISE(ABORT, 'the disk is failing'); END"
                )
        return None

    promptlayer.faults.append(break_the_store)
    ask()
    assert failing.wait(10.0)
    assert not pltrace.flush()
    with closing(sqlite3.connect(store)) as connection:
        connection.execute("DROP TRIGGER failing")
    recover()
    all_delivered(promptlayer, store, 2)
    assert len(promptlayer.posts) == 1
    pltrace._health.counts.clear()  # That it is told as a failure of ours is not what this is about.


def test_slow_to_say_what_it_has(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """A PromptLayer that takes its time to say what became of many traces gets the time."""
    promptlayer.faults += [on("/spans-bulk", STORE_THEN_CLOSE, 1), on("/api/public", slow(0.05))]
    deliver()
    for number in range(40):
        ask(f"ask-{number:02}")
    recover(60.0)
    all_delivered(promptlayer, store, 80)


# Strange answers.

_NOT_PROMPTLAYER = {
    "page": Fault(status=200, body="<html>Log in.</html>", headers={"Content-Type": "text/html"}),
    "empty": Fault(status=200, body=b""),
    "other JSON": Fault(status=200, body={"status": "maintenance"}),
    "list": Fault(status=201, body=[1, 2]),
    "half": Fault(status=201, body=b'{"success": true, "spa'),
    "number of logs": Fault(status=201, body={"spans": [], "request_logs": 5}),
    "number of spans": Fault(status=201, body={"spans": [], "rejected_span_ids": 7}),
    "deep": Fault(status=201, body=b"[" * 200_000),
    "accepted": Fault(status=202, body={}),
    "redirect": Fault(status=302, headers={"Location": "http://127.0.0.1:9/"}),
    "teapot": Fault(status=418),
    "unknown": Fault(status=599),
}


@pytest.mark.parametrize("answer", _NOT_PROMPTLAYER)
def test_somebody_else_answers(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    """What isn't an answer of PromptLayer's never counts as delivered, and ends with PromptLayer's own."""
    promptlayer.faults.append(on("/spans-bulk", _NOT_PROMPTLAYER[answer], 2))
    deliver()
    ask()
    assert not pltrace.flush()
    assert set(deliveries(store).values()) == {"pending"}
    recover()
    all_delivered(promptlayer, store, 2)
    assert not [entry for entry in caplog.records if entry.exc_info]


def test_a_call_that_is_not_logged(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A call whose span PromptLayer takes without logging the request: nobody waits for its id."""
    called: list[Any] = []
    unlogged = Fault(status=201, body={"success": True, "spans": [], "request_logs": []})
    promptlayer.faults.append(on("/spans-bulk", unlogged, 1))
    deliver()
    with traced("unlogged", on_request=called.append) as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi")
    (request,) = span.requests
    request.score(50)
    began = time.monotonic()
    assert request.wait() is None
    assert time.monotonic() - began < MOST_S
    other = ask("other", on_request=called.append)
    recover()
    other.score(60)
    recover()
    request.add_metadata({"asked": "later"})
    recover()
    assert set(deliveries(store).values()) == {"delivered"}
    assert called == [other]
    assert [operation["score"] for operation in promptlayer.operations] == [60]
    assert rows(store, "SELECT kind, error FROM operations WHERE state = 2 ORDER BY id") == [
        {"kind": "score", "error": "it got no id"}, {"kind": "metadata", "error": "it got no id"},
    ]  # fmt: skip
    assert any("logged no request for" in warning for warning in warnings(caplog))
    pltrace.shutdown(5.0)
    doctor = module(
        "doctor", PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=store
    )
    assert "1  LLM calls that PromptLayer took as spans and logged no request for" in doctor.out


# The connection.


@pytest.mark.parametrize(
    "rule",
    [lambda request: Fault(hang_up=True), lambda request: CLOSE if request.number > 1 else None],
    ids=["after each answer", "at the second request"],
)
def test_a_server_that_closes_kept_connections(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, rule: Callable[[Any], Fault | None]
) -> None:
    """A server that keeps no connection, and doesn't say so, still gets everything, soon, and each call once."""
    promptlayer.faults.append(rule)
    deliver()
    for number in range(150):
        ask(f"ask-{number:03}")
    recover(30.0)
    all_delivered(promptlayer, store, 300)
    assert set(taken(promptlayer).values()) == {1}


def test_a_connection_that_was_closed_meanwhile(promptlayer: PromptLayerServer) -> None:
    """A kept connection that the server has closed since isn't used again, so that nothing is in doubt."""
    promptlayer.fault = Fault(hang_up=True)
    client = JsonClient(promptlayer.url, {"X-API-KEY": promptlayer.api_key})
    for _ in range(3):
        assert client.request("GET", f"/api/public/v2/traces/{1:032x}").status == 404
        assert client._connection is not None
        select.select([client._connection.sock], [], [], 10.0)
    client.close()


@contextmanager
def listening(serve: Callable[[socket.socket], None], family: int = socket.AF_INET) -> Iterator[int]:
    """Serves each connection in a thread, on a port of this machine."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with closing(socket.socket(family)) as listener:
        listener.bind((host, 0))
        listener.listen()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_ipv6(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """A PromptLayer with an IPv6 address alone is reached."""

    def forward(connection: socket.socket) -> None:
        def pump(source: socket.socket, sink: socket.socket) -> None:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.close()

        onward = socket.create_connection(("127.0.0.1", promptlayer.port))
        threading.Thread(target=pump, args=(connection, onward), daemon=True).start()
        pump(onward, connection)

    with listening(forward, socket.AF_INET6) as port:
        deliver(base_url=f"http://[::1]:{port}")
        ask()
        recover()
        pltrace.shutdown(1.0)
    all_delivered(promptlayer, store, 2)


def test_a_proxy(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy that the environment names carries it, with its user and password."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", f"http://user:pass%20word@127.0.0.1:{promptlayer.port}")
    deliver(base_url="http://promptlayer.invalid/")
    ask()
    recover()
    all_delivered(promptlayer, store, 2)
    (post,) = promptlayer.posts
    assert post.target == "http://promptlayer.invalid/spans-bulk"
    assert post.headers["host"] == "promptlayer.invalid"
    assert post.headers["proxy-authorization"] == "Basic dXNlcjpwYXNzIHdvcmQ="


@pytest.mark.parametrize("proxy", ["http://[bad", "http://user:pass word@127.0.0.1:port", "//", "http://127.0.0.1:0"])
def test_a_proxy_that_is_none(
    deliver: Deliver,
    promptlayer: PromptLayerServer,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    proxy: str,
) -> None:
    """A variable that names no proxy is told once, with the remedy and without its value; all is kept meanwhile."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", proxy)
    deliver()
    ask()
    for _ in range(3):
        assert not pltrace.flush()
    assert balance(store, 2).pending == 2
    (warning,) = warnings(caplog)
    assert "can't be reached: http_proxy in the environment isn't the address of a proxy; set it to one" in warning
    assert "pass word" not in caplog.text
    assert "Traceback" not in caplog.text
    monkeypatch.delenv("http_proxy")
    recover()
    all_delivered(promptlayer, store, 2)


@pytest.mark.parametrize("address", ["http://no-such-host.invalid", "https://127.0.0.1:{port}", "http://127.0.0.1:1"])
def test_an_address_that_does_not_work(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, address: str
) -> None:
    """No such name, no TLS, nobody there: all is kept, one warning says why, and the right address gets it."""
    deliver(base_url=address.format(port=promptlayer.port))
    ask()
    for _ in range(3):
        assert not pltrace.flush()
    assert balance(store, 2).pending == 2
    (warning,) = warnings(caplog)
    assert "can't be reached" in warning
    deliver()
    recover()
    all_delivered(promptlayer, store, 2)


#: How answers begin, and what then comes again and again.
_ENDLESS = {
    "body": (b"HTTP/1.1 201 Created\r\nContent-Length: 100000\r\n\r\n", b" "),
    "status": (b"HTTP/1.1 2", b"0"),
    "header": (b"HTTP/1.1 201 Created\r\nX: ", b"y"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk": (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
    "trailer": (b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.slow
def test_an_answer_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that goes on and on, a little at a time, wherever in it, is given up: every request has a limit."""

    def endless(connection: socket.socket) -> None:
        request = connection.recv(65536)
        beginning, again = _ENDLESS.get(request.split()[1].decode().strip("/"), _ENDLESS["headers"])
        try:
            connection.sendall(beginning)
            for _ in range(90):  # Longer than anybody should listen.
                connection.sendall(again)
                time.sleep(0.5)
        except OSError:
            pass
        connection.close()

    def give_up(url: str, path: str, expected: type[Exception]) -> float:
        began = time.monotonic()
        with pytest.raises(expected, match="TimeoutError"):
            JsonClient(url, {}).request("POST", path, b"{}")
        return time.monotonic() - began

    with listening(endless) as port, ThreadPoolExecutor(len(_ENDLESS) + 1) as executor:
        url = f"http://127.0.0.1:{port}"
        monkeypatch.delenv("no_proxy")
        monkeypatch.delenv("NO_PROXY")
        monkeypatch.setenv("https_proxy", url)
        waits = [executor.submit(give_up, url, f"/{which}", NoAnswerError) for which in _ENDLESS]
        waits.append(executor.submit(give_up, "https://promptlayer.invalid", "/", NotSentError))
        assert all(29.0 < wait.result(60.0) < 30.0 + MOST_S for wait in waits)


@pytest.mark.parametrize("value", ["1000000000", "inf", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_retry_after_has_a_limit(value: str) -> None:
    """A `Retry-After` of years is five minutes."""
    assert Answer(429, {"retry-after": value}, b"").retry_after_s() == 300.0


@pytest.mark.slow
def test_operations_that_are_never_answered(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """A score that PromptLayer never answers holds up neither spans nor, in the end, itself."""
    promptlayer.faults.append(on("/library-track-score", HANG, 1))
    promptlayer.faults.append(on("/rest/track-score", HANG, 1))
    deliver()
    request = ask("first")
    request.score(50)
    promptlayer.wait_for(lambda: any("track-score" in arrived.path for arrived in promptlayer.requests), 20.0)
    ask("second").wait(MOST_S)
    assert set(deliveries(store).values()) == {"delivered"}
    recover(60.0)
    assert [operation["score"] for operation in promptlayer.operations] == [50]


# Those who have to do with the answers.


def test_callbacks_that_never_end(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, measured: Measured
) -> None:
    """An `on_request` that never returns keeps nobody from recording, delivering or leaving."""
    source = """
        def for_ever(request):
            threading.Event().wait()

        warm()
        with traced("around", on_request=for_ever):
            timed(ask, 50)
        timed.report()
    """
    program = run(PRELUDE + dedented(source), tmp_path, **settings)
    told(program)
    all_delivered(promptlayer, store, 101)
    measured("the whole program, 2 s of it at exit", program.seconds, "s")


def dedented(source: str) -> str:
    """Gives a piece of a program without the test's indent."""
    return "".join(line[8:] if line.strip() else "\n" for line in source.splitlines(keepends=True))
