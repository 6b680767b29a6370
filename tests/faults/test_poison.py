"""What PromptLayer refuses, and what no program can encode, costs only itself."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import pltrace
from pltrace import traced
from tests.faults.support import PRELUDE, Measured, ask, balance, taken, told
from tests.support.http_double import CLOSE, STORE_THEN_CLOSE, Fault, on
from tests.support.programs import deliveries, rows, run
from tests.support.promptlayer_server import PromptLayerServer

Deliver = Callable[..., None]


def record(*names: str) -> None:
    """Records a trace of one span for each name."""
    for name in names:
        with traced(name):
            pass


def states(store: Path) -> Counter[str]:
    """Counts what became of the spans: the first word of the name and the state."""
    return Counter(f"{name.partition('-')[0]} {state}" for name, state in deliveries(store).items())


# What PromptLayer refuses.

_PLACES: dict[str, Callable[[int], bool]] = {
    "a run at the head": lambda number: number < 30,
    "a run at the end": lambda number: number >= 70,
    "the first half": lambda number: number < 50,
    "every tenth": lambda number: number % 10 == 0,
    "every other": lambda number: number % 2 == 0,
    "two of three": lambda number: number % 3 != 0,
}


@pytest.mark.parametrize("place", _PLACES)
def test_much_poison(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured, place: str
) -> None:
    """However many spans of a batch are refused, and wherever: all others are delivered, and those are set aside."""
    names = [f"{'poison' if _PLACES[place](number) else 'good'}-{number:03}" for number in range(100)]
    promptlayer.poison(lambda name: name.startswith("poison"))
    promptlayer.stop()
    deliver()
    record(*names)
    pltrace.flush(0.5)
    promptlayer.start()
    assert pltrace.flush(60.0)
    expected = Counter(
        f"{name.partition('-')[0]} {'quarantined' if 'poison' in name else 'delivered'}" for name in names
    )
    assert states(store) == expected
    assert set(taken(promptlayer).values()) == {1}
    balance(store, 100)
    measured("posts", len(promptlayer.posts), "")


def test_one_among_a_hundred(deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured) -> None:
    """One refused span in a full batch is found in at most 2·log2(100)+2 posts more than without it."""
    promptlayer.poison(lambda name: name == "poison")
    promptlayer.stop()
    deliver()
    record(*[f"good-{number:03}" for number in range(57)], "poison", *[f"good-{number:03}" for number in range(57, 99)])
    pltrace.flush(0.5)
    promptlayer.start()
    assert pltrace.flush(30.0)
    assert states(store) == {"good delivered": 99, "poison quarantined": 1}
    assert len(promptlayer.posts) <= 1 + 2 * math.log2(100) + 2
    measured("posts", len(promptlayer.posts), "")


def test_nothing_but_poison_does_not_block_what_comes_later(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path
) -> None:
    """More refused spans than a batch holds are kept while all is refused, and set aside once others are taken."""
    promptlayer.poison(lambda name: name.startswith("poison"))
    deliver()
    record(*[f"poison-{number:03}" for number in range(250)])
    for _ in range(3):
        assert not pltrace.flush()
    assert states(store) == {"poison pending": 250}
    record("good-1")
    assert pltrace.flush(60.0)
    assert states(store) == {"poison quarantined": 250, "good delivered": 1}


def test_everything_is_refused_for_a_while(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured
) -> None:
    """While PromptLayer refuses everything, few posts are made and nothing is set aside; all of it arrives later."""
    promptlayer.fault = Fault(status=400)
    deliver()
    record(*[f"good-{number:03}" for number in range(250)])
    for _ in range(3):
        assert not pltrace.flush()
    assert states(store) == {"good pending": 250}
    assert len(promptlayer.posts) <= 4 * (2 * math.log2(100) + 2 + 4)
    measured("posts in four tries", len(promptlayer.posts), "")
    promptlayer.fault = None
    assert pltrace.flush(60.0)
    assert states(store) == {"good delivered": 250}
    assert set(taken(promptlayer).values()) == {1}


@pytest.mark.parametrize("posts", [1, 4, 9, 12, 16, 18])
def test_a_backend_that_recovers_in_the_midst_of_a_search(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, posts: int
) -> None:
    """What stood alone while everything was refused is tried again once something is taken, and no span is blamed."""
    promptlayer.stop()
    deliver()
    record(*(f"good-{number:03}" for number in range(100)))
    pltrace.flush(0.5)
    promptlayer.faults.append(on("/spans-bulk", Fault(422), posts))
    promptlayer.start()
    assert pltrace.flush(30.0)
    assert states(store) == {"good delivered": 100}


def test_new_spans_pass_poison_at_the_head(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured
) -> None:
    """A refused span at the head of a full queue holds up what is recorded meanwhile for a moment only."""
    promptlayer.poison(lambda name: name.startswith("poison"))
    promptlayer.stop()
    deliver()
    record("poison-0", *[f"good-{number:03}" for number in range(99)])
    pltrace.flush(0.5)
    promptlayer.start()
    flushing = threading.Thread(target=pltrace.flush, args=(30.0,))
    flushing.start()
    began = time.monotonic()
    record("late")
    flushing.join()
    assert pltrace.flush(30.0)
    assert deliveries(store)["late"] == "delivered"
    measured("held up for", time.monotonic() - began, "s")


def test_poison_on_and_off(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """An outage, an authentication error and a slow answer in the middle of the search leave the balance right."""
    faults = iter([None, None, Fault(status=503), None, Fault(status=429), None, Fault(close=True), None])
    promptlayer.faults.append(lambda request: next(faults, None) if request.path == "/spans-bulk" else None)
    promptlayer.poison(lambda name: name.startswith("poison"))
    deliver()
    record(*[f"{'poison' if number % 17 == 3 else 'good'}-{number:03}" for number in range(100)])
    assert pltrace.flush(90.0)
    assert states(store) == {"good delivered": 94, "poison quarantined": 6}
    assert set(taken(promptlayer).values()) == {1}
    balance(store, 100)


def test_promptlayer_fails_at_some(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """Spans that PromptLayer fails at every time cost only themselves, whatever is recorded meanwhile."""
    promptlayer.poison(lambda name: name.startswith("poison"), 500)
    deliver()
    record(*[f"{'poison' if number % 10 == 0 else 'good'}-{number:03}" for number in range(50)])
    late = 0
    while states(store)["poison quarantined"] < 5 and late < 500:
        record(f"good-late-{late:03}")
        late += 1
        pltrace.flush(0.1)
    assert pltrace.flush(30.0)
    assert states(store) == {"good delivered": 45 + late, "poison quarantined": 5}
    assert set(taken(promptlayer).values()) == {1}
    balance(store, 50 + late)


_FIREWALL = Fault(status=403, body="<html>Blocked</html>", headers={"Content-Type": "text/html"})


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_FIREWALL, Fault(status=429), CLOSE], ids=["firewall", "429", "closed"])
def test_refused_in_other_ways_while_the_program_goes_on(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured, fault: Fault
) -> None:
    """Nobody flushes: what was recorded before such a span, with it and after it arrives within a minute, once."""
    promptlayer.faults.append(
        lambda request: fault if request.path == "/spans-bulk" and b"poison" in request.body else None
    )
    deliver()
    ended = threading.Event()
    late = 0
    record(*[f"{'poison' if number == 70 else 'good'}-{number:03}" for number in range(200)])
    began = time.monotonic()
    while states(store)["poison quarantined"] == 0 and time.monotonic() - began < 60.0:
        record(f"good-late-{late:03}")
        late += 1
        ended.wait(0.1)
    measured("set aside after", time.monotonic() - began, "s")
    assert pltrace.flush(30.0)
    measured("all others arrived after", time.monotonic() - began, "s")
    assert states(store) == {"good delivered": 199 + late, "poison quarantined": 1}
    assert set(taken(promptlayer).values()) == {1}
    balance(store, 200 + late)
    measured("posts that failed", sum(not post.handled for post in promptlayer.posts), "")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "fault", [CLOSE, STORE_THEN_CLOSE, _FIREWALL, Fault(status=404)], ids=["closed", "stored", "firewall", "404"]
)
def test_half_of_all_posts_fail(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured, fault: Fault
) -> None:
    """Where each post may fail, as on a bad line, no span is set aside, and each is taken once."""
    chance = random.Random(7)
    promptlayer.faults.append(
        lambda request: fault if request.path == "/spans-bulk" and chance.random() < 0.5 else None
    )
    deliver()
    recorded = 0
    for _ in range(100):
        record(*[f"good-{recorded + number:04}" for number in range(20)])
        recorded += 20
        pltrace.flush(0.05)
    promptlayer.wait_for(lambda: len(promptlayer.posts) > 20)
    while not pltrace.flush(0.2):
        pass
    assert states(store) == {"good delivered": recorded}
    assert set(taken(promptlayer).values()) == {1}
    measured("posts", len(promptlayer.posts), "")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_firewall_refuses_much(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, measured: Measured
) -> None:
    """One in ten that a firewall refuses is set aside, and all others arrive, those that are recorded meanwhile too."""
    promptlayer.faults.append(
        lambda request: _FIREWALL if request.path == "/spans-bulk" and b"poison" in request.body else None
    )
    promptlayer.stop()
    deliver()
    record(*[f"{'poison' if number % 10 == 3 else 'good'}-{number:03}" for number in range(300)])
    promptlayer.start()
    began = time.monotonic()
    late = 0
    while states(store)["poison quarantined"] < 30 and time.monotonic() - began < 120.0:
        record(f"good-late-{late:03}")
        late += 1
        pltrace.flush(0.1)
    assert pltrace.flush(30.0)
    assert states(store) == {"good delivered": 270 + late, "poison quarantined": 30}
    assert set(taken(promptlayer).values()) == {1}
    measured("took", time.monotonic() - began, "s")
    measured("posts", len(promptlayer.posts), "")


def test_a_later_process_delivers_its_own(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """What an earlier process got no answer about keeps back nothing of a later one that lives for seconds only."""
    promptlayer.faults.append(
        lambda request: CLOSE if request.path == "/spans-bulk" and b"poison" in request.body else None
    )
    source = "pltrace.configure()\nspan(1, sys.argv[1])\nspan(2, 'other')\npltrace.flush(1)"
    for name in ("poison", "second", "third"):
        assert run(PRELUDE + source, tmp_path, name, **settings).code == 0
    found = states(store)
    assert (found["poison pending"], found["second delivered"], found["third delivered"]) == (1, 1, 1)
    assert found["other pending"] <= 1


def test_what_was_asked_of_a_refused_call(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A score for a call that PromptLayer refuses is refused too, told, and holds up nobody else's."""
    promptlayer.poison(lambda name: name == "FakeListChatModel")
    deliver()
    refused = ask("refused")
    refused.score(10)
    assert refused.wait(20.0) is None
    assert pltrace.flush(20.0)
    assert rows(store, "SELECT state, error FROM operations") == [{"state": 2, "error": "it got no id"}]
    assert f"a score for the request of span {refused.span_id}" in caplog.text


# What can't be encoded.

#: Each is an expression; `MARK` is a text that has to arrive beside it.
PAYLOADS = """
import socket

class BadRepr:
    def __repr__(self): raise ValueError("no repr")
    __str__ = __repr__

class Exits:
    def __repr__(self): raise SystemExit(9)

class Interrupts:
    def __repr__(self): raise MemoryError("no memory")

class BadGetattr:
    def __getattribute__(self, name): raise RuntimeError("no attributes")

class BadCopy:
    def __deepcopy__(self, memo): raise RuntimeError("no copies")
    __copy__ = __reduce_ex__ = __deepcopy__

class Slow:
    def __repr__(self):
        time.sleep(1.0)
        return "slow"

class BadDict(dict):
    def items(self): raise RuntimeError("no items")
    __iter__ = keys = values = items

class BadLen(list):
    def __len__(self): raise RuntimeError("no length")
    def __iter__(self): raise RuntimeError("no items")

class BadBool:
    def __bool__(self): raise RuntimeError("neither")
    def __eq__(self, other): raise RuntimeError("no comparison")
    __hash__ = None

class Knot:
    def __init__(self): self.me = self

def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value

cyclic_dict = {}; cyclic_dict["me"] = cyclic_dict
cyclic_list = []; cyclic_list.append(cyclic_list)

PAYLOADS = {
    "lock": threading.Lock(), "generator": (number for number in range(3)), "socket": socket.socket(),
    "bad repr": BadRepr(), "exits": Exits(), "interrupts": Interrupts(), "bad getattr": BadGetattr(),
    "bad copy": BadCopy(), "slow": Slow(), "bad dict": BadDict(a=1), "bad len": BadLen([1]), "bad bool": BadBool(),
    "knot": Knot(), "cyclic dict": cyclic_dict, "cyclic list": cyclic_list, "deep": deep(5_000),
    "10 MB": "x" * 10_000_000, "30 MB": b"x" * 30_000_000, "surrogate": "\\ud800 alone",
    "surrogate key": {"\\ud800": 1}, "NUL": "a\\x00b", "NaN": float("nan"), "infinite": [float("inf"), -float("inf")],
    "not UTF-8": b"\\xff\\xfe\\x00", "large int": 2**200, "keys": {1: 1, None: 2, (3, 4): 5}, "type": type,
    "module": os,
    "exception": ValueError(BadRepr()),
}
"""


def test_hostile_payloads(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, measured: Measured
) -> None:
    """Whatever a program hands to traced code: the call goes on at once, its span arrives, and so do all others."""
    source = """
from langchain_core.messages import HumanMessage
warm()

@traced
def poison(mark, payload):
    return payload

def one(number):
    kind = kinds[number]
    payload = PAYLOADS[kind]
    try:
        with traced(f"around {kind}", metadata={"payload": payload, "mark": f"mark {kind}"}) as around:
            poison(f"mark {kind}", payload)
            around.update(output={"mark": f"mark {kind}", "payload": payload})
            message = HumanMessage(f"mark {kind}", additional_kwargs={"payload": payload})
            model().invoke([message], config={"metadata": {"payload": payload, "mark": f"mark {kind}"}})
    except BaseException as error:
        raise SystemExit(f"{kind}: {error!r}")

def neighbours(number):
    for other in range(20):
        span(number * 20 + other, "neighbour")

kinds = list(PAYLOADS)
for number in range(len(kinds)):
    timed(one, 1, start=number)
    timed(neighbours, 1, start=number)
worst = max(range(len(timed.took_ns)), key=timed.took_ns.__getitem__)
slow = timed.took_ns[2 * kinds.index("slow")] / 1e6
timed.report(kinds=kinds, worst=kinds[worst // 2], slow_ms=slow)
assert pltrace.flush(90)
"""
    report = told(run(PRELUDE + PAYLOADS + source, tmp_path, timeout=110.0, **settings))
    kinds = report["kinds"]
    found = balance(store, len(kinds) * 23)
    assert found.delivered == len(kinds) * 23
    sent = list(promptlayer.spans.values())
    for kind in kinds:
        (around,) = [span for span in sent if span["name"] == f"around {kind}"]
        children = [span for span in sent if span["parent_id"] == around["context"]["span_id"]]
        assert len(children) == 2, kind
        for span in (around, *children):
            assert str(span).count(f"mark {kind}") >= 1, (kind, span)
    assert sum(span["name"].startswith("neighbour") for span in sent) == len(kinds) * 20
    assert len(promptlayer.request_logs) == len(kinds)
    assert report["slow_ms"] < 900.0  # It takes a second, but not the caller's.
    measured(f"worst call ({report['worst']})", report["worst_ms"], "ms")
    measured("call with a repr of a second", report["slow_ms"], "ms")


def test_changed_right_after_the_call(deliver: Deliver, promptlayer: PromptLayerServer, store: Path) -> None:
    """What another thread changes right after, or all the time, is recorded as it was, and never an error of ours."""
    shared = {f"key-{number}": number for number in range(50)}
    stop = threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            shared[f"more-{number % 1000}"] = number
            shared.pop(f"more-{(number + 500) % 1000}", None)

    @traced("reads")
    def reads(value: object) -> None:
        pass

    @traced("keeps")
    def keeps(value: list[str]) -> None:
        pass

    deliver()
    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for number in range(200):
            reads(shared)
            value = [f"before-{number}"]
            keeps(value)
            value[0] = "after"
    finally:
        stop.set()
        churning.join()
    assert pltrace.flush(30.0)
    assert balance(store, 400).delivered == 400
    inputs = [span["attributes"]["function_input"] for span in promptlayer.spans.values() if span["name"] == "keeps"]
    assert all("before-" in text and "after" not in text for text in inputs)


def test_nothing_feeds_itself(
    deliver: Deliver, promptlayer: PromptLayerServer, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With all logging on and a log handler that is itself traced, our own work records nothing of itself."""

    class Traced(logging.Handler):
        @traced("logs")
        def emit(self, entry: logging.LogRecord) -> None:
            pass

    handler = Traced()
    root = logging.getLogger()
    root.addHandler(handler)
    caplog.set_level(logging.DEBUG)
    try:
        promptlayer.fail_next(2, 503)
        deliver()
        record("first")
        assert pltrace.flush(30.0)
    finally:
        root.removeHandler(handler)
    assert pltrace.flush(30.0)
    assert {span["name"] for span in promptlayer.spans.values()} - {"logs"} == {"first"}
    assert sum(name == "logs" for name in deliveries(store)) <= 1
    assert len(promptlayer.posts) < 10
