"""What was recorded reaches PromptLayer, once, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage

import pltrace
from pltrace import ExportResult, Span, StoredSpan, _health, _runtime, traced
from pltrace._promptlayer import PromptLayerExporter
from tests.support.http_double import (
    CLOSE,
    HANG,
    STORE_THEN_CLOSE,
    STORE_THEN_CUT,
    STORE_THEN_GARBLE,
    STORE_THEN_HANG,
    Fault,
    on,
    slow,
)
from tests.support.programs import deliveries, module, rows
from tests.support.promptlayer_server import PromptLayerServer

Deliver = Callable[..., None]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The file that `deliver` records into."""
    return tmp_path / "store" / "traces.db"


def record(*names: str) -> None:
    """Records a trace of one span for each name."""
    for name in names:
        with traced(name):
            pass


def ask(name: str = "ask", **arguments: Any) -> Any:
    """Makes one LLM call in a block and gives the block's span."""
    with traced(name, **arguments) as span:
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    return span


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    """Gives what pltrace warned about."""
    return [entry.getMessage() for entry in log.records if entry.name == "pltrace" and entry.levelno >= logging.WARNING]


def arrived(server: PromptLayerServer) -> list[str]:
    """Gives the names of the spans that PromptLayer has, sorted."""
    with server.changed:
        return sorted(span["name"] for span in server.spans.values())


def recover() -> None:
    """Flushes until all is delivered; each flush ends when a try fails."""
    assert any(pltrace.flush() for _ in range(6))


# When all is well.


def test_a_span_that_is_updated_while_it_is_sent(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is added to a span in the moment that it is on its way arrives too."""
    deliver()
    with traced("order") as span:
        pass

    def update(request: Any) -> None:
        """Stands for a program that goes on while the server takes its time."""
        if request.path.endswith("/spans-bulk") and not span.added_tags:
            span.update(tags=["late"])
            pltrace.flush(timeout=0.5)  # The post can't end before; but what was added is written.

    promptlayer.faults.append(update)
    assert pltrace.flush()
    assert [span["attributes"]["tags"] for span in promptlayer.spans.values()] == [["late"]]


def test_an_update_of_what_was_sent_without_an_answer(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is added to a span arrives too where PromptLayer took the former version and its answer was lost."""
    deliver()
    promptlayer.faults.append(on("/spans-bulk", STORE_THEN_HANG, 1))
    with traced("order") as span:
        pass
    promptlayer.wait_for(lambda: promptlayer.spans)
    span.update(tags=["late"])
    deliver(tags=["other settings"])  # Others deliver now, who know only what the store says.
    promptlayer.release()
    recover()
    assert [span["attributes"]["tags"] for span in promptlayer.spans.values()] == [["late"]]


def test_an_update_that_is_lost_on_its_way(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is added to a delivered span is sent until it arrives, though PromptLayer has the span as it was."""
    deliver()
    with traced("order") as span:
        pass
    assert pltrace.flush()
    promptlayer.fail_next(1, 503, path="/spans-bulk")
    span.update(tags=["late"])
    recover()
    assert [span["attributes"]["tags"] for span in promptlayer.spans.values()] == [["late"]]


def test_spans_share_requests(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """Hundreds of spans go out in batches of a hundred, each span once, and `flush` waits for them."""
    deliver()
    names = [f"span-{number:03}" for number in range(250)]
    record(*names)
    assert pltrace.flush(20.0)
    assert arrived(promptlayer) == names
    assert sum(len(post.span_ids) for post in promptlayer.posts) == 250
    assert max(len(post.span_ids) for post in promptlayer.posts) <= 200
    assert len(promptlayer.posts) <= 5


def test_large_spans_go_in_smaller_batches(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """A batch stays at a few megabytes, however many spans wait."""
    deliver()
    for number in range(12):
        with traced(f"large-{number}") as span:
            span.update(output=[f"{number}-{part}-" + "x" * 60_000 for part in range(8)])
    assert pltrace.flush(30.0)
    assert len(promptlayer.spans) == 12
    assert max(post.size for post in promptlayer.posts) < 4_000_000


def test_delivered_without_being_asked(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """Nobody has to flush: spans go out by themselves, soon."""
    deliver()
    record("by itself")
    promptlayer.wait_for(lambda: promptlayer.spans, timeout=10.0)
    assert arrived(promptlayer) == ["by itself"]


def test_ids_come_back(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Every LLM call gets PromptLayer's id: in the handle, in `on_request`, and in the store."""
    told: list[int] = []
    deliver()
    span = ask(on_request=lambda request: told.append(int(request)))
    (request,) = span.requests
    (log_id,) = [request.wait(10.0)]
    assert pltrace.flush(10.0)
    assert [log["id"] for log in promptlayer.request_logs] == [log_id]
    assert promptlayer.request_logs[0]["span_id"] == request.span_id
    assert told == [log_id]
    assert rows(store, "SELECT request_id FROM requests") == [{"request_id": log_id}]


def test_ids_that_cannot_be(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """An answer with ids of no span of ours, or that can't be a request's, costs only these: the others come back."""
    told: list[int] = []
    ids = [1000, True, 2**63, -1, "7", None, 1001]
    left = iter(ids)

    def lie(request: Any) -> Fault:
        logs: list[Any] = [{"id": 77, "span_id": "zzzz"}, {"id": 78, "span_id": ["\ud800"]}, "nothing"]
        calls = [span["context"]["span_id"] for span in request.json()["spans"] if span["name"] != "ask"]
        logs += [{"id": number, "span_id": span_id} for span_id, number in zip(calls, left, strict=False)]
        body = {"success": True, "spans": [], "request_logs": logs}
        return Fault(status=201, body=body, store=True)

    promptlayer.faults.append(lie)
    deliver()
    with traced("ask", on_request=lambda request: told.append(int(request))) as span:
        for _ in ids:
            FakeListChatModel(responses=["Hello."]).invoke("Hi!")
    assert pltrace.flush(10.0)
    assert told == [1000, 1001]
    assert [request.id for request in span.requests] == [1000, None, None, None, None, None, 1001]
    assert [row["request_id"] for row in rows(store, "SELECT request_id FROM requests")] == told
    assert set(deliveries(store).values()) == {"delivered"}


# When PromptLayer doesn't take it now.


@pytest.mark.parametrize("status", [301, 302, 307, 404, 408, 409, 425, 429, 500, 502, 503, 504])
def test_sent_again(deliver: Deliver, promptlayer: PromptLayerServer, status: int) -> None:
    """An answer that isn't a 2xx never counts as delivered: the same bytes are sent again until it does."""
    deliver()
    promptlayer.fail_next(1, status, {"Location": promptlayer.url + "/elsewhere"}, path="/spans-bulk")
    ask()
    recover()
    assert [post.status for post in promptlayer.posts[:2]] == [status, 201]
    assert len({post.sha256 for post in promptlayer.posts[:2]}) == 1
    assert len(promptlayer.request_logs) == 1
    assert not [request for request in promptlayer.requests if request.path == "/elsewhere"]


def test_sent_again_after_a_closed_connection(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """A connection that closes before the batch was taken costs nothing: the same bytes are sent again."""
    deliver()
    promptlayer.faults.append(on("/spans-bulk", CLOSE, 1))
    ask()
    recover()
    assert [post.status for post in promptlayer.posts[:2]] == [None, 201]
    assert len({post.sha256 for post in promptlayer.posts[:2]}) == 1
    assert len(promptlayer.request_logs) == 1


def test_new_spans_do_not_change_a_batch_that_is_tried_again(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is recorded during an outage goes into later batches; the failed one is sent again as it was."""
    deliver()
    promptlayer.fail_next(2, 503, path="/spans-bulk")
    record("first")
    assert not pltrace.flush()
    record("second")
    recover()
    assert arrived(promptlayer) == ["first", "second"]
    assert len({post.sha256 for post in promptlayer.posts[:3]}) == 1
    assert len({post.span_ids for post in promptlayer.posts}) == 2


def test_refused_and_back(deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture) -> None:
    """While nobody listens, spans wait in the store, one warning says so, and they go out once somebody does."""
    deliver()
    promptlayer.stop()
    names = [f"span-{number:03}" for number in range(150)]
    record(*names)
    assert not pltrace.flush()
    assert not pltrace.flush(0.5)
    (warning,) = warnings(caplog)
    assert "promptlayer can't be delivered to" in warning
    assert "kept in the store and sent" in warning
    promptlayer.start()
    assert pltrace.flush()
    assert arrived(promptlayer) == names
    assert sum(len(post.span_ids) for post in promptlayer.posts) == 150
    assert len(warnings(caplog)) == 1


def test_a_warning_says_where_spans_wait(
    deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where there is no file, the warning that spans can't be delivered doesn't promise that they are kept in one."""
    deliver(store="memory")
    promptlayer.stop()
    record("first")
    assert not pltrace.flush()
    (warning,) = warnings(caplog)
    assert "kept in memory, as long as the process lives and there is room, and sent" in warning
    promptlayer.start()
    assert pltrace.flush()


@pytest.mark.parametrize(
    ("value", "at_least"),
    [("2", 1.9), (lambda: formatdate(time.time() + 3, usegmt=True), 1.9)],
    ids=["seconds", "date"],
)
def test_retry_after(deliver: Deliver, promptlayer: PromptLayerServer, value: Any, at_least: float) -> None:
    """A 429 with `Retry-After` is obeyed: no request comes before, whoever flushes or records meanwhile."""
    deliver()
    headers = {"Retry-After": value if isinstance(value, str) else value()}
    promptlayer.fail_next(1, 429, headers, path="/spans-bulk")
    record("first")
    assert not pltrace.flush()
    record("second")
    assert not pltrace.flush()
    assert not pltrace.flush(0.5)
    assert len(promptlayer.requests) == 1
    assert pltrace.flush(20.0)
    first, second, *_ = promptlayer.requests
    assert second.time - first.time >= at_least
    assert arrived(promptlayer) == ["first", "second"]


@pytest.mark.parametrize("value", ["soon", "", "-5", "nan", "Wed, 21 Oct 2015 07:28:00 GMT", "0", "Wed, 99 Foo"])
def test_useless_retry_after(deliver: Deliver, promptlayer: PromptLayerServer, value: str) -> None:
    """A `Retry-After` that says nothing usable is as good as none: a flush may try at once."""
    deliver()
    promptlayer.fail_next(1, 429, {"Retry-After": value}, path="/spans-bulk")
    record("first")
    recover()
    assert arrived(promptlayer) == ["first"]


def test_backs_off(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """Failure after failure the pauses grow, so that a PromptLayer in trouble isn't hammered."""
    deliver()
    promptlayer.fault = Fault(status=503)
    record("first")
    promptlayer.wait_for(lambda: len(promptlayer.requests) >= 3)
    first, second, third = (request.time for request in promptlayer.requests[:3])
    assert second - first >= 0.45
    assert third - second >= 0.95


def test_clocks_are_stopped(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """`flush`, `wait` and back-off take as long as ever where a test of the program's lets time stand still."""
    deliver()
    promptlayer.fault = Fault(status=503)
    with freeze_time("2012-01-14"):
        (request,) = ask().requests
        assert not pltrace.flush(timeout=0.2)
        assert request.wait(timeout=0.2) is None
        promptlayer.wait_for(lambda: len(promptlayer.requests) >= 3)
        promptlayer.fault = None
        assert pltrace.flush(timeout=30.0)
        assert request.id is not None


@pytest.mark.parametrize("status", [401, 403])
def test_wrong_key(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """A key that is refused pauses delivery with one warning that names the remedy; a right key sends all of it."""
    promptlayer.fail_next(1, status, path="/spans-bulk")
    deliver()
    ask("first")
    assert not pltrace.flush()
    ask("second")
    assert not pltrace.flush()
    assert not pltrace.flush(0.5)
    assert [post.status for post in promptlayer.posts] == [status]
    (warning,) = warnings(caplog)
    assert "refuses the API key" in warning
    assert "set a valid key" in warning
    assert set(deliveries(store).values()) == {"pending"}

    deliver(service="with another key")
    assert pltrace.flush(20.0)
    assert set(deliveries(store).values()) == {"delivered"}
    assert len(promptlayer.request_logs) == 2


def test_key_is_checked_by_promptlayer(
    deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The key itself appears in no warning and no log entry."""
    caplog.set_level(logging.DEBUG)
    deliver(api_key="pl_a_wrong_key_0123456789")
    record("first")
    assert not pltrace.flush()
    promptlayer.wait_for(lambda: promptlayer.posts[0].status == 401)
    assert "pl_a_wrong_key" not in caplog.text


def test_key_is_repeated_by_promptlayer(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer that repeats the key puts it neither into the log nor, as a span's reason, onto the disk."""
    for status, times in ((401, 1), (422, 10)):
        promptlayer.fail_next(times, status, path="/spans-bulk", body={"message": f"{promptlayer.api_key} is wrong"})
        deliver(service=f"answered {status}")
        record(f"for {status}")
        pltrace.flush()
    assert "quarantined" in deliveries(store).values()
    assert "is wrong" in caplog.text
    raw = b"".join(file.read_bytes() for file in store.parent.iterdir())
    assert promptlayer.api_key not in caplog.text
    assert promptlayer.api_key.encode() not in raw


# When a span can never be taken.


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("place", [0, 31, 63])
def test_poison_stands_alone(
    deliver: Deliver,
    promptlayer: PromptLayerServer,
    store: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    place: int,
) -> None:
    """One span that PromptLayer refuses costs no other: it is found in few posts, set aside, and told."""
    promptlayer.poison(lambda name: name == "poison", status)
    deliver()
    names = [f"span-{number:02}" for number in range(63)]
    names.insert(place, "poison")
    record(*names)
    assert pltrace.flush(30.0)
    states = deliveries(store)
    assert states.pop("poison") == "quarantined"
    assert set(states.values()) == {"delivered"}
    assert arrived(promptlayer) == sorted(set(names) - {"poison"})
    # It may have been recorded while a batch was on its way already: one more batch then.
    assert len(promptlayer.posts) <= 2 + 2 * math.log2(64) + 2
    (reason,) = rows(store, "SELECT error FROM deliveries WHERE state = 2")
    assert str(status) in reason["error"]
    assert "can't be taken" in reason["error"]
    (warning,) = warnings(caplog)
    assert "quarantine" in warning
    assert "doctor" in warning


def test_several_poisonous_spans(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Several refused spans in one batch are all found, and the others delivered, each once."""
    promptlayer.poison(lambda name: name.startswith("poison"))
    deliver()
    names = [f"poison-{number}" if number in (3, 40, 41, 77) else f"span-{number}" for number in range(90)]
    record(*names)
    assert pltrace.flush(30.0)
    states = deliveries(store)
    assert {name for name, state in states.items() if state == "quarantined"} == {
        "poison-3", "poison-40", "poison-41", "poison-77",
    }  # fmt: skip
    assert len(promptlayer.spans) == 86
    taken = [span_id for post in promptlayer.posts if post.status == 201 for span_id in post.span_ids]
    assert len(taken) == len(set(taken)) == 86


def test_poison_that_is_mended_on_its_way(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """A span that is updated while PromptLayer refuses it as it was is sent as it is now, and not set aside."""
    deliver()
    with traced("order") as span:
        span.update(output="poison")

    def refuse(request: Any) -> Fault | None:
        """Stands for a program that mends it while the server takes its time."""
        if span.output != "poison":
            return None
        span.update(output="mended")
        pltrace.flush(timeout=0.5)  # The post can't end before; but what was changed is written.
        return Fault(status=422)

    promptlayer.faults.append(refuse)
    assert pltrace.flush(10.0)
    assert deliveries(store) == {"order": "delivered"}
    assert [span["attributes"]["function_output"] for span in promptlayer.spans.values()] == ["mended"]


def test_poison_alone(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """A refused LLM call that stands alone is set aside too, and who waits for its id is told that none comes."""
    promptlayer.poison(lambda name: name == "FakeListChatModel")
    deliver()
    (request,) = ask().requests
    assert request.wait(20.0) is None
    assert pltrace.flush(10.0)
    assert deliveries(store) == {"ask": "delivered", "FakeListChatModel": "quarantined"}


def test_a_batch_of_nothing_but_poison_is_held(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When PromptLayer refuses everything, it isn't the spans: nothing is set aside, all is sent when it works."""
    promptlayer.poison(lambda name: True)
    deliver()
    names = [f"span-{number:02}" for number in range(50)]
    record(*names)
    assert not pltrace.flush()
    assert set(deliveries(store).values()) == {"pending"}
    assert len(promptlayer.posts) <= 2 * (2 * math.log2(50) + 3)
    assert any("refuses all of" in warning for warning in warnings(caplog))
    promptlayer.faults.clear()
    assert pltrace.flush()
    assert arrived(promptlayer) == names
    assert set(deliveries(store).values()) == {"delivered"}


def test_outage_while_searching_poison(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """An outage in the middle of the search loses nothing and sets aside nobody else."""
    promptlayer.poison(lambda name: name == "span-17")
    posts = 0

    def out_for_a_while(request: Any) -> Fault | None:
        nonlocal posts
        if request.path != "/spans-bulk":
            return None
        posts += 1
        return Fault(status=503) if posts == 4 else None

    promptlayer.faults.insert(0, out_for_a_while)
    deliver()
    names = [f"span-{number:02}" for number in range(40)]
    record(*names)
    assert pltrace.flush(30.0)
    assert {name for name, state in deliveries(store).items() if state == "quarantined"} == {"span-17"}
    assert arrived(promptlayer) == [name for name in names if name != "span-17"]


def test_a_trace_closed_before_it_is_sent_again(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """What arrived without an answer, and is refused when it is sent again, its trace closed since, isn't set aside."""
    deliver()
    promptlayer.faults.append(on("/spans-bulk", STORE_THEN_CLOSE, 1))
    with traced("order") as span:
        pass
    assert not pltrace.flush()
    promptlayer.close_trace(span.trace_id)
    recover()
    assert deliveries(store) == {"order": "delivered"}


def test_closed_trace(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Spans that come back as rejected, because their trace was closed, are set aside; their neighbours are taken."""
    deliver()
    with traced("long") as long:
        record("early")
        assert pltrace.flush(10.0)
        promptlayer.close_trace(long.trace_id)
        (request,) = ask("late").requests
    record("neighbour")
    assert request.wait(20.0) is None
    assert pltrace.flush(10.0)
    assert deliveries(store) == {
        "early": "delivered", "FakeListChatModel": "quarantined", "late": "quarantined", "long": "quarantined",
        "neighbour": "delivered",
    }  # fmt: skip
    reasons = {row["error"] for row in rows(store, "SELECT error FROM deliveries WHERE state = 2")}
    assert reasons == {"PromptLayer refused it: trace_closed"}
    assert "trace_closed" in caplog.text


# When PromptLayer fails at a span every time.


def insist(tries: int = 300) -> None:
    """Flushes until nothing is left; each flush cuts a back-off short."""
    assert any(pltrace.flush(0.1) for _ in range(tries))


def fail_at(server: PromptLayerServer, fault: Fault, *poison: str) -> None:
    """Gives all posts with one of these spans a fault."""

    def rule(request: Any) -> Fault | None:
        if request.path != "/spans-bulk":
            return None
        return fault if any(span["name"] in poison for span in request.json()["spans"]) else None

    server.faults.append(rule)


@pytest.mark.parametrize("status", [500, 503, 504])
@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_span_that_promptlayer_fails_at(
    deliver: Deliver,
    promptlayer: PromptLayerServer,
    store: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    place: int,
) -> None:
    """A span that is answered 5xx every time costs only itself: while others are taken, it is set aside, and told."""
    fail_at(promptlayer, Fault(status=status), "poison")
    deliver()
    names = [f"span-{number:02}" for number in range(90)]
    names.insert(place, "poison")
    record(*names)
    insist()
    states = deliveries(store)
    assert states.pop("poison") == "quarantined"
    assert set(states.values()) == {"delivered"}
    assert arrived(promptlayer) == sorted(set(names) - {"poison"})
    (reason,) = rows(store, "SELECT error FROM deliveries WHERE state = 2")
    assert reason["error"] == (
        f"answered {status}: The test asked for this fault. (5 times to this span alone, and took another one after "
        "each)"
    )
    (warning,) = [warning for warning in warnings(caplog) if "quarantine" in warning]
    assert f"answered {status}" in warning
    assert "doctor" in warning
    # A batch of all, three of 20, halves of these, the span alone: no more, whoever hurries.
    failed = [post for post in promptlayer.posts if post.status == status]
    assert len(failed) <= 1 + 3 + math.ceil(math.log2(20)) + 5


def test_calls_around_one_that_promptlayer_fails_at(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """Who waits for the id of such a call is told that none comes; all other calls are logged, once each."""
    deliver()
    spans = [ask(f"ask-{number:02}") for number in range(10)]
    (bad,) = spans[3].requests

    def fail(request: Any) -> Fault | None:
        return Fault(status=500) if bad.span_id in request.span_ids else None

    promptlayer.faults.append(fail)
    insist()
    assert bad.wait(0.0) is None
    assert Counter(row["state"] for row in rows(store, "SELECT state FROM deliveries")) == {1: 19, 2: 1}
    assert promptlayer.duplicate_request_logs == 0
    assert len(promptlayer.request_logs) == 9


def test_promptlayer_fails_at_several_spans(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Such spans are all found, though there are more of them than others, one of which PromptLayer refuses."""
    poison = {"span-0", "span-1", "span-4", "span-5", "span-6", "span-9"}
    promptlayer.poison(lambda name: name == "span-7")
    fail_at(promptlayer, Fault(status=500), *poison)
    deliver()
    record(*[f"span-{number}" for number in range(10)])
    for number in range(300):  # A program that goes on.
        record(f"late-{number:03}")
        if pltrace.flush(0.1):
            break
    states = deliveries(store)
    assert {name for name, state in states.items() if state == "quarantined"} == poison | {"span-7"}
    assert set(states.values()) == {"quarantined", "delivered"}


def test_promptlayer_fails_at_most_of_what_waits(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Spans that PromptLayer fails at don't make one another last when others are rare: each is found."""
    promptlayer.poison(lambda name: name.startswith("poison"), 500)
    deliver()
    record("poison-1", "poison-2")
    for number in range(200):
        if number % 4 == 0:
            record(f"late-{number:03}")
        if pltrace.flush(0.1):
            break
    states = deliveries(store)
    assert (states.pop("poison-1"), states.pop("poison-2")) == ("quarantined", "quarantined")
    assert set(states.values()) == {"delivered"}


def test_promptlayer_stores_a_span_and_fails_every_time(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """A span that is there, whatever was answered, is delivered and not set aside."""
    fail_at(promptlayer, Fault(status=500, store=True), "FakeListChatModel")
    deliver()
    for number in range(10):
        ask(f"ask-{number}")
    insist()
    assert set(deliveries(store).values()) == {"delivered"}
    assert len(promptlayer.request_logs) == 10
    assert promptlayer.duplicate_request_logs == 0


@pytest.mark.parametrize("path", ["/spans-bulk", "/"])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_promptlayer_fails_at_everything(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, path: str, count: int
) -> None:
    """While PromptLayer fails at all it gets, nothing is set aside, a try is one post, and all arrives later."""
    promptlayer.faults.append(on(path, Fault(status=500)))
    deliver()
    record(*[f"span-{number:03}" for number in range(count)])
    tries = 25
    for number in range(tries):
        assert not pltrace.flush()
        record(f"late-{number:02}")
    assert set(deliveries(store).values()) == {"pending"}
    assert len(promptlayer.posts) <= tries + 1  # The first went out before anybody hurried.
    assert len(promptlayer.requests) <= (tries + 1) * (1 + 20)
    promptlayer.faults.clear()
    insist()
    assert set(deliveries(store).values()) == {"delivered"}
    assert len(promptlayer.spans) == count + tries
    assert (
        max(Counter(span_id for post in promptlayer.posts if post.handled for span_id in post.span_ids).values()) == 1
    )


@pytest.mark.parametrize("names", [["only"], ["first", "second", "third"]], ids=["one", "three"])
def test_promptlayer_fails_at_the_only_spans_there_are(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, names: list[str]
) -> None:
    """When nothing else is there to show whether PromptLayer works, nobody is blamed, and all arrives later."""
    promptlayer.faults.append(on("/spans-bulk", Fault(status=500)))
    deliver()
    record(*names)
    for _ in range(25):
        assert not pltrace.flush()
    assert set(deliveries(store).values()) == {"pending"}
    promptlayer.faults.clear()
    assert pltrace.flush()
    assert arrived(promptlayer) == names


def test_promptlayer_fails_at_others_too_now_and_then(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """While PromptLayer fails at one of three other posts, a span that it fails at every time isn't blamed."""
    others = 0

    def fail(request: Any) -> Fault | None:
        nonlocal others
        if request.path != "/spans-bulk":
            return None
        if any(span["name"] == "poison" for span in request.json()["spans"]):
            return Fault(status=500)
        others += 1
        return Fault(status=500) if others % 3 == 0 else None

    promptlayer.faults.append(fail)
    deliver()
    record("poison")
    for number in range(40):  # A program that goes on.
        record(f"span-{number:02}")
        pltrace.flush(0.1)
    assert others >= 12
    assert deliveries(store)["poison"] == "pending"
    promptlayer.faults.clear()
    insist()
    assert set(deliveries(store).values()) == {"delivered"}


_PAGE = "<html>\n  <h1>Blocked</h1>\n</html>"
#: How gateways, proxies and firewalls refuse what they don't like in a body, and what is told of it.
_REFUSALS = {
    "403 page": (Fault(status=403, body=_PAGE), "answered 403: <html> <h1>Blocked</h1> </html>"),
    "406 page": (Fault(status=406, body=_PAGE), "answered 406: <html> <h1>Blocked</h1> </html>"),
    "404": (Fault(status=404), "answered 404: The test asked for this fault."),
    "302": (Fault(status=302, body=b""), "answered 302: "),
    "408": (Fault(status=408), "answered 408: The test asked for this fault."),
    "429": (Fault(status=429), "answered 429: The test asked for this fault."),
    "431": (Fault(status=431, body=_PAGE), "answered 431: <html> <h1>Blocked</h1> </html>"),
    "a page as if all were well": (Fault(status=200, body=_PAGE), "answered 200 with something unreadable"),
    "closed": (CLOSE, "took a batch and didn't answer: RemoteDisconnected"),
}


@pytest.mark.parametrize("refusal", _REFUSALS)
def test_a_span_that_is_refused_in_other_ways(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, refusal: str
) -> None:
    """However a span is refused, it costs only itself: it is found, set aside with the reason, and told."""
    fault, reason = _REFUSALS[refusal]
    fail_at(promptlayer, fault, "poison")
    deliver()
    names = [f"span-{number:02}" for number in range(90)]
    names.insert(31, "poison")
    record(*names)
    insist()
    states = deliveries(store)
    assert states.pop("poison") == "quarantined"
    assert set(states.values()) == {"delivered"}
    assert arrived(promptlayer) == sorted(set(names) - {"poison"})
    assert set(
        Counter(span_id for post in promptlayer.posts if post.handled for span_id in post.span_ids).values()
    ) == {1}
    (aside,) = rows(store, "SELECT error FROM deliveries WHERE state = 2")
    assert aside["error"].startswith(reason)
    assert "times to this span alone, and took another one after each" in aside["error"]
    (warning,) = [warning for warning in warnings(caplog) if "quarantine" in warning]
    assert reason in warning
    assert not [warning for warning in warnings(caplog) if "API key" in warning]


def test_a_firewall_refuses_a_span(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """All others arrive within seconds, though nobody flushes, and the span is set aside."""
    fail_at(promptlayer, Fault(status=403, body=_PAGE), "poison")
    promptlayer.stop()
    deliver()
    record("poison", *[f"span-{number:03}" for number in range(299)])
    promptlayer.start()
    promptlayer.wait_for(lambda: len(promptlayer.spans) == 299, timeout=30.0)
    assert len([post for post in promptlayer.posts if post.status == 403]) <= 2 * (1 + math.ceil(math.log2(200)) + 5)
    promptlayer.wait_for(lambda: deliveries(store)["poison"] == "quarantined", timeout=10.0)


@pytest.mark.parametrize(
    "fault",
    [CLOSE, Fault(status=408), Fault(status=404), Fault(status=429), Fault(status=403, body=_PAGE)],
    ids=["closed", "408", "404", "429", "403 page"],
)
def test_all_is_refused_in_other_ways(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, fault: Fault
) -> None:
    """While no other span is taken either, nobody is blamed, a try is two posts at most, and all arrives later."""
    promptlayer.faults.append(on("/spans-bulk", fault))
    deliver()
    record(*[f"span-{number:03}" for number in range(250)])
    tries = 25
    for number in range(tries):
        assert not pltrace.flush()
        record(f"late-{number:02}")
    assert set(deliveries(store).values()) == {"pending"}
    assert len(promptlayer.posts) <= 3 * (tries + 1)
    promptlayer.faults.clear()
    insist()
    assert set(deliveries(store).values()) == {"delivered"}
    assert len(promptlayer.spans) == 250 + tries
    assert set(
        Counter(span_id for post in promptlayer.posts if post.handled for span_id in post.span_ids).values()
    ) == {1}


def test_backends_take_turns(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Where each other post comes to a server that refuses all, no span is blamed, and all arrive."""
    posts = 0

    def fail(request: Any) -> Fault | None:
        nonlocal posts
        posts += 1
        return Fault(status=404) if posts % 2 else None

    promptlayer.faults.append(fail)
    deliver()
    for number in range(40):
        record(*[f"span-{number:02}-{part}" for part in range(10)])
        pltrace.flush(0.1)
    insist()
    assert set(deliveries(store).values()) == {"delivered"}


def test_nothing_is_sent_to_show_that_there_is_nothing_to_send_to(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """While nobody listens, no span is suspected, however long it takes."""
    deliver()
    promptlayer.stop()
    record(*[f"span-{number:02}" for number in range(10)])
    for _ in range(30):
        assert not pltrace.flush()
    assert set(deliveries(store).values()) == {"pending"}
    promptlayer.start()
    assert pltrace.flush()
    assert [len(post.span_ids) for post in promptlayer.posts] == [10]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_span_that_is_refused_as_if_for_the_key(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A firewall that answers as PromptLayer does for a wrong key costs the pause, and then the span alone."""
    fail_at(promptlayer, Fault(status=403, body={"message": "Forbidden"}), "poison")
    deliver()
    record("poison", *[f"span-{number:02}" for number in range(90)])
    promptlayer.wait_for(lambda: len(promptlayer.posts) == 1)
    promptlayer.wait_for(lambda: len(promptlayer.spans) == 90, timeout=100.0)
    assert pltrace.flush(10.0)
    assert deliveries(store)["poison"] == "quarantined"
    assert len([warning for warning in warnings(caplog) if "set a valid key" in warning]) == 1
    assert promptlayer.posts[1].time - promptlayer.posts[0].time >= 59.0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=404), "answered 404: The test asked for this fault."),
        (Fault(status=403, body=_PAGE), "answered 403: <html> <h1>Blocked</h1> </html>"),
        (Fault(status=401), "answered 401: The test asked for this fault."),
        (CLOSE, "took a batch and didn't answer: RemoteDisconnected"),
    ],
    ids=["404", "403 page", "401", "closed"],
)
def test_doctor_says_why_spans_wait(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, fault: Fault, reason: str
) -> None:
    """Another process tells why the last try has failed, as long as it is the last."""
    promptlayer.faults.append(on("/spans-bulk", fault))
    deliver()
    record("first", "second")
    assert not pltrace.flush()
    settings = {"PROMPTLAYER_API_KEY": promptlayer.api_key, "PROMPTLAYER_BASE_URL": promptlayer.url}
    told = module("doctor", "--store", store, **settings).out
    assert "API key set, reachable" in told
    assert f"failing      2 of them for promptlayer, at the last try: it {reason}" in told
    assert "2 spans wait for delivery; `pltrace sync` tries again now: see above why they weren't taken." in told
    promptlayer.faults.clear()
    deliver(service="another")
    insist()
    assert "failing" not in module("doctor", "--store", store, **settings).out


# When nobody knows whether it was taken.

_NO_ANSWER = {
    "closed": STORE_THEN_CLOSE,
    "cut": STORE_THEN_CUT,
    "hangs": STORE_THEN_HANG,
    "garbled": STORE_THEN_GARBLE,
    "empty": Fault(status=204, body=b"", store=True),
    "gateway": Fault(status=502, store=True),
    "gateway timeout": Fault(status=504, store=True),
    "request timeout": Fault(status=408, store=True),
    "error": Fault(status=500, store=True),
    "unavailable": Fault(status=503, store=True),
    "unavailable for a while": Fault(status=503, headers={"Retry-After": "1"}, store=True),
}


@pytest.mark.parametrize("fault", _NO_ANSWER.values(), ids=_NO_ANSWER)
def test_stored_but_unanswered(deliver: Deliver, promptlayer: PromptLayerServer, store: Path, fault: Fault) -> None:
    """A batch that PromptLayer took without a whole answer is asked for, not sent again: each call is logged once."""
    told: list[int] = []
    promptlayer.faults.append(on("/spans-bulk", fault, 1))
    deliver()
    span = ask("first", on_request=lambda request: told.append(int(request)))
    if fault.hang:
        promptlayer.wait_for(lambda: len(promptlayer.request_logs) == 1)
        promptlayer.release()
    assert pltrace.flush(20.0)
    ask("second")
    assert pltrace.flush(20.0)
    assert promptlayer.duplicate_request_logs == 0
    assert len(promptlayer.request_logs) == 2
    (request,) = span.requests
    assert request.wait(0.0) == promptlayer.request_logs[0]["id"]
    assert told == [request.id]
    assert set(deliveries(store).values()) == {"delivered"}


def test_asking_does_not_multiply_requests(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """While posts fail, a try asks after some of the traces, not after each that waits, and sends what it asked for."""
    deliver()
    promptlayer.fail_next(3, 500, path="/spans-bulk")
    record(*(f"span-{number:03}" for number in range(150)))
    recover()
    before, *between = [request.method for request in promptlayer.requests if request.time <= promptlayer.posts[3].time]
    assert before == "POST"
    assert between.count("POST") == 3
    assert between.count("GET") <= 3 * 20
    assert len(arrived(promptlayer)) == 150


@pytest.mark.slow
@pytest.mark.parametrize("fault", [HANG, STORE_THEN_HANG], ids=["lost", "stored"])
def test_promptlayer_hangs(deliver: Deliver, promptlayer: PromptLayerServer, fault: Fault) -> None:
    """A request that is never answered is given up by itself, and what it carried is logged once."""
    promptlayer.faults.append(on("/spans-bulk", fault, 1))
    deliver()
    ask()
    assert pltrace.flush(40.0)
    assert len(promptlayer.request_logs) == 1


def test_promptlayer_does_not_say_what_it_has(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """While PromptLayer can't say what became of a batch, it isn't sent again."""
    promptlayer.faults += [on("/spans-bulk", STORE_THEN_CLOSE, 1), on("/api/public", Fault(status=500), 2)]
    deliver()
    span = ask()
    recover()
    assert [request.status for request in promptlayer.requests if request.method == "GET"] == [500, 500, 200]
    assert len(promptlayer.posts) == 1
    assert span.requests[0].wait(0.0) == promptlayer.request_logs[0]["id"]


def record_doubtful(server: PromptLayerServer, fault: Fault) -> Span:
    """Records a call that is answered 503, and about which PromptLayer can't be asked then; gives its block's span."""
    server.fail_next(1, 503, path="/spans-bulk")
    span = ask("doubtful")
    assert not pltrace.flush()
    server.faults.append(on(f"/api/public/v2/traces/{span.trace_id}", fault))
    return span


@pytest.mark.parametrize("status", [500, 501, 403, 302])
def test_a_trace_that_promptlayer_cannot_be_asked_about(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """It keeps no other back, isn't sent again while nobody knows whether it arrived, and is set aside in the end."""
    deliver()
    span = record_doubtful(promptlayer, Fault(status=status))
    assert not pltrace.flush()
    for number in range(60):  # A program that goes on.
        ask(f"late-{number:02}")
        if pltrace.flush(0.5):
            break
        assert f"late-{number:02}" in arrived(promptlayer)
    states = rows(
        store, f"SELECT trace_id = '{span.trace_id}' AS doubtful, state FROM spans JOIN deliveries USING (seq)"
    )
    assert {(row["doubtful"], row["state"]) for row in states} == {(1, 2), (0, 1)}
    assert [post.status for post in promptlayer.posts if span.id in post.span_ids] == [503]
    assert promptlayer.duplicate_request_logs == 0
    assert span.requests[0].wait(0.0) is None
    reasons = {row["error"] for row in rows(store, "SELECT error FROM deliveries WHERE state = 2")}
    assert reasons == {
        f"doesn't say what it has of trace {span.trace_id}: it answered {status}: The test asked for this fault. "
        "(5 times, and answered about another one after each)"
    }
    assert not [warning for warning in warnings(caplog) if "API key" in warning]


@pytest.mark.parametrize("status", [500, 403])
def test_promptlayer_cannot_be_asked_about_any_trace(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, status: int
) -> None:
    """While it takes spans, and says of none whether it has it, new ones are delivered, and nothing is set aside."""
    promptlayer.faults += [on("/spans-bulk", Fault(status=503, store=True), 1)]
    promptlayer.faults += [on("/api/public", Fault(status=status))]
    deliver()
    record(*(f"doubtful-{number:03}" for number in range(120)))
    assert not pltrace.flush()
    doubtful = set(arrived(promptlayer))
    assert doubtful
    for number in range(12):
        record(f"late-{number:02}")
        assert not pltrace.flush(0.5)
    states = deliveries(store)
    assert {states.pop(name) for name in doubtful} == {"pending"}
    assert set(states.values()) == {"delivered"}
    promptlayer.faults.clear()
    insist()
    assert set(deliveries(store).values()) == {"delivered"}
    assert max(Counter(span_id for post in promptlayer.posts for span_id in post.span_ids).values()) == 1


@pytest.mark.slow
def test_promptlayer_never_answers_about_a_trace(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Others wait for that no longer than for one answer; it isn't set aside, and delivered once when that is over."""
    deliver()
    record_doubtful(promptlayer, HANG)
    for number in range(8):
        record(f"late-{number:02}")
        promptlayer.wait_for(lambda: len(promptlayer.spans) > number, timeout=20.0)  # noqa: B023
    states = deliveries(store)
    assert (states["FakeListChatModel"], states["doubtful"]) == ("pending", "pending")
    promptlayer.faults.clear()
    promptlayer.release()
    assert pltrace.flush(30.0)
    assert set(deliveries(store).values()) == {"delivered"}
    assert len(promptlayer.request_logs) == 1


def test_somebody_else_answers(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """A login page that answers 200 to everything, as a captive network has it, doesn't count as PromptLayer."""
    promptlayer.fault = Fault(status=200, body="<html>Please log in.</html>", headers={"Content-Type": "text/html"})
    deliver()
    ask()
    assert not pltrace.flush()
    promptlayer.fault = None
    assert pltrace.flush()
    assert len(promptlayer.request_logs) == 1


def test_settings_change_during_an_outage(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """What waits when the application configures anew is taken over, and sent once."""
    promptlayer.fault = Fault(status=503)
    deliver()
    ask()
    assert not pltrace.flush()
    earlier = [thread for thread in threading.enumerate() if thread.name == "pltrace-promptlayer"]
    deliver(service="another")
    deliver(service="a third")
    promptlayer.fault = None
    assert pltrace.flush(20.0)
    for thread in earlier:
        thread.join(5.0)
        assert not thread.is_alive(), "it would send again"
    assert promptlayer.duplicate_request_logs == 0
    assert set(deliveries(store).values()) == {"delivered"}


def test_threads_record_while_settings_change(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """New settings leave no moment in which other threads record nothing; a flush waits for what was before them."""
    promptlayer.faults.append(on("/spans-bulk", slow(0.1)))
    deliver()
    done = threading.Event()
    blocks: list[Span] = []

    def work() -> None:
        while not done.is_set():
            with traced("block") as block:
                blocks.append(block)
            time.sleep(0.001)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    for service in ("a", "b", "c"):
        changing = threading.Thread(target=deliver, kwargs={"service": service}, daemon=True)
        changing.start()
        while changing.is_alive():
            recorded = {block.id for block in blocks[:-1] if block}
            assert pltrace.flush(20.0)
            assert promptlayer.spans.keys() >= recorded
        changing.join()
    done.set()
    worker.join()
    assert all(blocks)
    assert pltrace.flush(20.0)
    assert promptlayer.spans.keys() == {block.id for block in blocks}
    assert max(Counter(span_id for post in promptlayer.posts for span_id in post.span_ids).values()) == 1


def test_no_threads_are_left(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """`shutdown` ends the threads that tracing started."""
    before = set(threading.enumerate())
    deliver()
    ask(on_request=lambda request: None)
    started = [thread for thread in threading.enumerate() if thread not in before and "pltrace" in thread.name]
    assert started
    assert pltrace.shutdown(10.0)
    for thread in started:
        if thread.name != "pltrace-callbacks":
            thread.join(5.0)
            assert not thread.is_alive()


# Exporters of the user's own.


class Own:
    """An exporter that keeps what it gets, and does as it is told."""

    def __init__(self, name: str, *answers: Any) -> None:
        self.name = name
        self.answers = list(answers)
        self.batches: list[list[str]] = []
        self.shut = threading.Event()

    def export(self, batch: Sequence[StoredSpan]) -> Any:
        """Take a batch."""
        self.batches.append([span.record["name"] for span in batch])
        answer = self.answers.pop(0) if self.answers else ExportResult("delivered")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def shutdown(self) -> None:
        """Take note of it."""
        self.shut.set()

    @property
    def names(self) -> list[str]:
        """The names of all that came, sorted."""
        return sorted(name for batch in self.batches for name in batch)


def test_own_exporter(tmp_path: Path) -> None:
    """A user's exporter, needing no base class of ours, gets all spans in batches, and is shut down in the end."""
    own = Own("own")
    pltrace.configure(store=tmp_path / "traces.db", exporters=[own])
    names = [f"span-{number:03}" for number in range(150)]
    record(*names)
    assert pltrace.flush(10.0)
    assert own.names == names
    assert pltrace.shutdown(5.0)
    assert own.shut.is_set()


@pytest.mark.parametrize(
    "answer",
    [RuntimeError("out of order"), ExportResult("retry", "is busy"), None, SystemExit(3)],
    ids=["raises", "asks", "returns nothing", "exits"],
)
def test_own_exporter_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: Any) -> None:
    """A user's exporter that raises, asks for it, or forgets to answer gets the same batch again; one log names it."""
    own = Own("own", answer)
    pltrace.configure(store=tmp_path / "traces.db", exporters=[own])
    record("first")
    recover()
    assert own.batches == [["first"], ["first"]]
    assert deliveries(tmp_path / "traces.db", "own") == {"first": "delivered"}
    assert any("own" in warning for warning in warnings(caplog))


def test_own_exporter_refuses(tmp_path: Path) -> None:
    """A user's exporter can refuse single spans, or a batch for what is in it, as PromptLayer can."""

    class Picky(Own):
        def export(self, batch: Sequence[StoredSpan]) -> ExportResult:
            super().export(batch)
            if any(span.record["name"] == "poison" for span in batch):
                return ExportResult("rejected", "doesn't like it")
            return ExportResult(
                "delivered", refused={s.record["span_id"]: "late" for s in batch if s.record["name"] == "late"}
            )

    pltrace.configure(store=tmp_path / "traces.db", exporters=[Picky("picky")])
    record("a", "poison", "b", "late", "c")
    assert pltrace.flush(20.0)
    assert deliveries(tmp_path / "traces.db", "picky") == {
        "a": "delivered", "poison": "quarantined", "b": "delivered", "late": "quarantined", "c": "delivered",
    }  # fmt: skip


def test_a_record_is_what_is_sent(tmp_path: Path) -> None:
    """What is sent, put together out of stored texts, is to the byte what is made of the records that exporters get."""

    @traced("tool", tags=["a", "ä\n"], metadata={"n": 1, "nested": {"x": [None, "y"]}}, user="ada", session="s\x1e1")
    def call(value: Any) -> Any:
        with pytest.raises(ZeroDivisionError):
            fail()
        return FakeListChatModel(responses=['It\'s "so".']).invoke([("system", "Be\nbrief."), ("human", str(value))])

    @traced
    def fail() -> None:
        raise ZeroDivisionError("no")

    batches: list[Sequence[StoredSpan]] = []
    own = Own("own")
    own.export = lambda batch: batches.append(batch) or ExportResult("delivered")  # type: ignore[method-assign, func-returns-value]
    pltrace.configure(store=tmp_path / "traces.db", exporters=[own])
    call({"deep": [1, 2.5, True]})
    assert pltrace.flush(10.0)
    (batch,) = batches
    exporter = PromptLayerExporter("pl_key", "http://127.0.0.1:9")
    sent = exporter.body(batch)
    assert [span["name"] for span in json.loads(sent)["spans"]] == [span.record["name"] for span in batch]
    assert sent == exporter.body([StoredSpan(span.seq, dict(span.record)) for span in batch])


def test_two_exporters(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Each exporter gets everything at its own pace: one in trouble doesn't hold up the other."""
    own = Own("own")
    deliver(exporters=[own])
    promptlayer.fault = Fault(status=503)
    ask()
    assert not pltrace.flush()
    assert own.names == ["FakeListChatModel", "ask"]
    assert set(deliveries(store, "own").values()) == {"delivered"}
    assert set(deliveries(store).values()) == {"pending"}
    promptlayer.fault = None
    assert pltrace.flush(20.0)
    assert arrived(promptlayer) == ["FakeListChatModel", "ask"]
    assert len(own.names) == 2


# What is asked of requests.


def test_operations_during_an_outage(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """Scores, metadata, prompt links and groups asked for while nothing can be sent arrive after it, in order."""
    promptlayer.add_prompt("greeting", "Hi!")
    promptlayer.groups = 1
    deliver()
    promptlayer.stop()
    span = ask()
    (request,) = span.requests
    request.score(10)
    request.score(90, "tone")
    request.add_metadata({"rating": 5})
    request.link_prompt("greeting", version=1)
    request.add_to_group(1)
    request.score(20)
    span.score(30, "whole")
    assert not pltrace.flush()
    promptlayer.start()
    assert pltrace.flush(30.0)
    log_id = promptlayer.request_logs[0]["id"]
    assert [(operation["op"], operation["request_id"]) for operation in promptlayer.operations] == [
        ("score", log_id), ("score", log_id), ("metadata", log_id), ("prompt", log_id), ("group", log_id),
        ("score", log_id), ("score", log_id),
    ]  # fmt: skip
    assert [op["score"] for op in promptlayer.operations if op["op"] == "score"] == [10, 90, 20, 30]
    assert promptlayer.operations[2]["metadata"] == {"rating": "5"}


def make_room(*span_ids: str) -> None:
    """Has the store give up these spans for others."""
    give_up_at = time.monotonic() + 30
    while any(_runtime.active().store.record(span_id) is not None for span_id in span_ids):
        assert time.monotonic() < give_up_at
        for _ in range(100):
            with traced("large", metadata={"text": "x" * 50_000}):
                pass
        assert pltrace.flush(20.0)


@pytest.mark.slow
def test_operations_on_what_is_not_kept(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What is asked of a request with an id arrives though the store doesn't have its span any more."""
    deliver(store="off")
    (request,) = ask().requests
    request_id = request.wait(10)
    make_room(request.span_id)
    request.score(60)
    assert pltrace.flush(20.0)
    assert [(found["request_id"], found["score"]) for found in promptlayer.operations] == [(request_id, 60)]


@pytest.mark.slow
def test_a_score_for_calls_that_are_not_kept(
    deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A block's score reaches those of its calls that the store doesn't have any more by the ids that handles know.

    For the others it is refused, which is told.
    """
    deliver(store="off")
    with traced("around") as around:
        known, unknown = ask("known").requests[0], ask("unknown").requests[0].span_id
        request_id = known.wait(10)
        make_room(known.span_id, unknown)
        kept = ask("kept").requests[0]
        around.score(60)
        after = ask("after").requests[0]
    assert pltrace.flush(20.0)
    ids = [request_id, int(kept), int(after)]
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 3)
    assert [(found["request_id"], found["score"]) for found in promptlayer.operations] == [(one, 60) for one in ids]
    give_up_at = time.monotonic() + 30
    while not _health.counts["operations_refused"]:
        assert time.monotonic() < give_up_at
        pltrace.flush(1.0)
    assert f"refuses a score for the request of span {unknown}: span {unknown} isn't in the store" in caplog.text
    assert _health.counts["operations_refused"] == 1


def test_refused_operation(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation that PromptLayer refuses is told and doesn't hold up those behind it."""
    deliver()
    (request,) = ask().requests
    request.add_to_group(77)
    request.wait(10)
    pltrace.track.group(int(request), 78)
    request.score(50)
    assert pltrace.flush(20.0)
    told = module("doctor", "--store", store).out
    assert told.count(f"refused      group for request {int(request)} (span {request.span_id}): ") == 2
    assert [(operation["op"], operation.get("score")) for operation in promptlayer.operations] == [("score", 50)]
    assert any("refuses a group" in warning for warning in warnings(caplog))
    promptlayer.violations.clear()  # That there is no such group is what this is about.


def fail_scores(server: PromptLayerServer, name: str, fault: Fault) -> list[Any]:
    """Gives all posts of a score of this name a fault, and gives these; they go to another path than spans do."""
    failed: list[Any] = []

    def rule(request: Any) -> Fault | None:
        if "score" not in request.path or request.json().get("name") != name:
            return None
        failed.append(request)
        return fault

    server.faults.append(rule)
    return failed


@pytest.mark.parametrize("status", [500, 403, 429, 402])
def test_an_operation_that_promptlayer_fails_at(
    deliver: Deliver, promptlayer: PromptLayerServer, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """It keeps back what else was asked of its request, whose order stays, and nothing that was asked of others."""
    fail_scores(promptlayer, "bad", Fault(status=status))
    deliver()
    (first,) = ask().requests
    first.score(10, "bad")
    first.add_metadata({"asked": "later"})
    assert not pltrace.flush()
    for number in range(5):
        (other,) = ask(f"other-{number}").requests
        other.score(number)
        assert not pltrace.flush()
        promptlayer.wait_for(lambda: len(promptlayer.operations) > number)  # noqa: B023
    assert {operation["request_id"] for operation in promptlayer.operations}.isdisjoint({int(first)})
    assert not [warning for warning in warnings(caplog) if "refuses" in warning]
    promptlayer.faults.clear()
    assert pltrace.flush(20.0)
    assert [operation["op"] for operation in promptlayer.operations if operation["request_id"] == int(first)] == [
        "score", "metadata",
    ]  # fmt: skip
    assert len(promptlayer.operations) == 7


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault(status=500), pytest.param(CLOSE, id="closed")])
def test_an_operation_that_promptlayer_fails_at_for_seconds(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, fault: Fault
) -> None:
    """Other operations are taken all the while, and it arrives when that is over."""
    failed = fail_scores(promptlayer, "bad", fault)
    deliver()
    first, other = [ask(f"ask-{number}").requests[0] for number in range(2)]
    assert pltrace.flush(10.0)
    first.score(10, "bad")
    promptlayer.wait_for(lambda: failed)
    taken = 0
    while time.time() < failed[0].time + 16.0:  # A try more could be waited for a minute.
        taken += 1
        other.score(1)
        promptlayer.wait_for(lambda: len(promptlayer.operations) == taken)  # noqa: B023
        time.sleep(0.3)
    assert rows(store, "SELECT * FROM operations WHERE state = 2") == []
    promptlayer.faults.clear()
    assert pltrace.flush(20.0)
    assert promptlayer.operations[-1]["score"] == 10


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_operation_that_promptlayer_always_fails_at(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Others go on at once; after five times in more than two minutes, with others taken, it is set aside, and told."""
    failed = fail_scores(promptlayer, "bad", Fault(status=500))
    deliver()
    first, other = [ask(f"ask-{number}").requests[0] for number in range(2)]
    assert pltrace.flush(10.0)
    first.score(10, "bad")
    first.add_metadata({"asked": "later"})
    promptlayer.wait_for(lambda: failed)
    began = failed[0].time
    number = 0
    while not rows(store, "SELECT * FROM operations WHERE state = 2"):
        assert time.time() < began + 200.0
        other.score(number % 100)
        number += 1
        promptlayer.wait_for(lambda: len(promptlayer.operations) == number, 2.0)  # noqa: B023
        time.sleep(0.5)
    assert failed[-1].time > began + 120.0
    assert pltrace.flush(10.0)
    assert [operation["op"] for operation in promptlayer.operations] == ["score"] * number + ["metadata"]
    (refused,) = rows(store, "SELECT kind, error FROM operations WHERE state = 2")
    assert refused["kind"] == "score"
    assert "(5 times, and took another score after each)" in refused["error"]
    (warning,) = [warning for warning in warnings(caplog) if "refuses" in warning]
    assert f"refuses a score for request {int(first)}" in warning
    told = module("doctor", "--store", store).out
    assert f"refused      score for request {int(first)} (span {first.span_id}): {refused['error']}" in told


def test_one_kind_of_operation_fails(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """While PromptLayer fails at all of one kind, those of another show nothing of it: none is set aside."""
    promptlayer.faults.append(lambda request: Fault(status=500) if "metadata" in request.path else None)
    deliver()
    requests = [ask(f"ask-{number}").requests[0] for number in range(3)]
    for number, request in enumerate(requests):
        request.add_metadata({"number": number})
    for number in range(8):
        requests[0].score(number)
        (other,) = ask(f"other-{number}").requests
        other.score(number)
        assert not pltrace.flush()
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 8)
    assert rows(store, "SELECT * FROM operations WHERE state = 2") == []
    promptlayer.faults.clear()
    insist()
    assert Counter(operation["op"] for operation in promptlayer.operations) == {"score": 16, "metadata": 3}


@pytest.mark.slow
def test_promptlayer_fails_at_operations_on_several_requests(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """Those behind them needn't wait until each has failed often, and none is set aside for what others did."""
    deliver()
    requests = [ask(f"ask-{number}").requests[0] for number in range(30)]
    assert pltrace.flush(10.0)
    fail_scores(promptlayer, "bad", Fault(status=500))
    for number, request in enumerate(requests):
        request.score(number, "bad" if number < 10 else "good")
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 20, 30.0)
    assert rows(store, "SELECT * FROM operations WHERE state = 2") == []
    promptlayer.faults.clear()
    assert pltrace.flush(30.0)
    assert sorted(operation["score"] for operation in promptlayer.operations) == list(range(30))


@pytest.mark.slow
def test_an_operation_that_is_never_answered(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """After a second others needn't wait for it, in whatever order they come; what is asked of its request does."""
    deliver()
    first, *others = [ask(f"ask-{number}").requests[0] for number in range(4)]
    assert pltrace.flush(10.0)
    fail_scores(promptlayer, "bad", HANG)
    first.score(10, "bad")
    first.score(20)
    for number, other in enumerate(others):
        other.score(number)
        other.add_metadata({"number": number})
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 6, 5.0)
    assert int(first) not in {operation["request_id"] for operation in promptlayer.operations}
    promptlayer.faults.clear()
    promptlayer.release()
    assert pltrace.flush(60.0)
    assert [operation["score"] for operation in promptlayer.operations if operation["request_id"] == int(first)] == [
        10, 20,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_operation_that_is_never_answered_at_all(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """It is sent twice, which holds two threads, and again when one of the calls has ended."""
    deliver()
    first, other = [ask(f"ask-{number}").requests[0] for number in range(2)]
    assert pltrace.flush(10.0)
    asked = fail_scores(promptlayer, "bad", HANG)
    first.score(10, "bad")
    assert not pltrace.flush(110.0)
    assert len(asked) == 2
    other.score(20)
    promptlayer.wait_for(lambda: promptlayer.operations)
    began = time.monotonic()
    assert not pltrace.flush()
    assert time.monotonic() - began < 10.0
    promptlayer.faults.clear()
    promptlayer.release()
    assert pltrace.flush(60.0)


@pytest.mark.slow
def test_operations_that_are_never_answered(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """However many there are, they hold eight threads; what isn't sent meanwhile is sent later."""
    deliver()
    requests = [ask(f"ask-{number}").requests[0] for number in range(12)]
    assert pltrace.flush(10.0)
    asked = fail_scores(promptlayer, "bad", HANG)
    for number, request in enumerate(requests):
        request.score(number, "bad")
    promptlayer.wait_for(lambda: len(asked) == 8, 30.0)
    assert not pltrace.flush(5.0)
    assert len(asked) == 8
    promptlayer.faults.clear()
    promptlayer.release()
    assert pltrace.flush(60.0)
    assert {operation["score"] for operation in promptlayer.operations} == set(range(12))


@pytest.mark.parametrize("status", [404, 405, 413, 431])
def test_an_operation_that_promptlayer_can_never_take(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """An answer that says so is a refusal for good, which is told, and all else goes on."""
    fail_scores(promptlayer, "bad", Fault(status=status))
    deliver()
    (request,) = ask().requests
    request.score(10, "bad")
    request.score(20)
    assert pltrace.flush(20.0)
    assert [operation["score"] for operation in promptlayer.operations] == [20]
    assert [row["state"] for row in rows(store, "SELECT state FROM operations ORDER BY id")] == [2, 1]
    assert any("refuses a score" in warning for warning in warnings(caplog))


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_an_operation(deliver: Deliver, promptlayer: PromptLayerServer, status: int) -> None:
    """`Retry-After` is obeyed there too: no operation comes before, on whichever request."""
    deliver()
    first, second = ask("first"), ask("second")
    assert pltrace.flush(10.0)
    promptlayer.faults.append(lambda request: None if "score" not in request.path else asked_to_wait(request))
    waited: list[Any] = []

    def asked_to_wait(request: Any) -> Fault | None:
        waited.append(request)
        return Fault(status=status, headers={"Retry-After": "2"}) if len(waited) == 1 else None

    first.requests[0].score(1)
    assert not pltrace.flush()
    second.requests[0].score(2)
    assert not pltrace.flush()
    assert len(waited) == 1
    assert pltrace.flush(20.0)
    assert waited[1].time - waited[0].time >= 1.9
    assert sorted(operation["score"] for operation in promptlayer.operations) == [1, 2]


@pytest.mark.slow
def test_retry_after_one_operation_every_time(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """From the second time on it is obeyed for that operation alone, also where somebody flushes; others go on."""
    deliver()
    first, other = [ask(f"ask-{number}").requests[0] for number in range(2)]
    assert pltrace.flush(10.0)
    failed = fail_scores(promptlayer, "bad", Fault(status=503, headers={"Retry-After": "4"}))
    first.score(10, "bad")
    promptlayer.wait_for(lambda: len(failed) == 2, 20.0)
    other.score(20)
    promptlayer.wait_for(lambda: promptlayer.operations, 3.0)
    assert not pltrace.flush()
    assert len(failed) == 2
    promptlayer.wait_for(lambda: len(failed) == 3, 20.0)
    assert failed[1].time - failed[0].time >= 3.9
    assert failed[2].time - failed[1].time >= 3.9
    assert not pltrace.flush()  # It may be on its way: who hurries then waits like all.
    promptlayer.faults.clear()
    assert pltrace.flush(30.0)
    assert [operation["score"] for operation in promptlayer.operations] == [20, 10]


def test_promptlayer_fails_at_all_operations(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """While it does, a try is one operation, at first two, however many wait; all arrive later, once each."""
    deliver()
    requests = [ask(f"ask-{number}").requests[0] for number in range(8)]
    assert pltrace.flush(10.0)
    promptlayer.fault = Fault(status=500)
    before = len(promptlayer.requests)
    for number, request in enumerate(requests):
        request.score(number)
    tries = 12
    for _ in range(tries):
        assert not pltrace.flush()
    assert len(promptlayer.requests) - before <= tries + 2
    promptlayer.fault = None
    assert pltrace.flush(20.0)
    assert sorted(operation["score"] for operation in promptlayer.operations) == list(range(8))


def test_the_counts_of_the_cache_arrive(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """What was read from a provider's cache and what was written to it goes with the span."""
    deliver()
    details: Any = {"cache_read": 3, "cache_creation": 5}
    usage: Any = {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11, "input_token_details": details}

    with traced("asking"):
        GenericFakeChatModel(messages=iter([AIMessage("Hello.", usage_metadata=usage)])).invoke("Hi")

    assert pltrace.flush(10.0)
    (call,) = [span for span in promptlayer.spans.values() if "gen_ai.operation.name" in span["attributes"]]
    assert call["attributes"]["gen_ai.usage.cache_read.input_tokens"] == 3
    assert call["attributes"]["gen_ai.usage.cache_creation.input_tokens"] == 5
