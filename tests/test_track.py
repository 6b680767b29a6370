"""Scores, metadata, prompt links and groups by request id: as promptlayer's own client has them, but durable."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import pltrace
from pltrace import current_span, prompts, traced, track
from tests.support.http_double import CLOSE
from tests.support.programs import module, run
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import calls, chat

Deliver = Callable[..., None]


def request_id(llm: ScriptedOpenAI) -> int:
    """Make a request, and give the id that it got."""
    with traced("asking") as span:
        chat(llm).invoke("Hi")
    found = span.requests[0].wait(10.0)
    assert found is not None
    return found


def asked(server: PromptLayerServer) -> list[tuple[str, Any]]:
    """Give what arrived, with its most telling value."""
    telling = {"score": "score", "metadata": "metadata", "prompt": "prompt_name", "group": "group_id"}
    return [(op["op"], op[telling[op["op"]]]) for op in server.operations if op["op"] in telling]


def test_each_arrives(deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """What is asked by id arrives as promptlayer's client would send it, in order."""
    promptlayer.add_prompt("joke", "Tell me about {topic}.", labels=["prod"])
    deliver()
    number = request_id(llm)
    group = track.create_group()

    assert track.score(number, 100)
    assert track.score(number, 7, "style")
    assert track.metadata(number, {"foo": "bar", "count": 3})
    assert track.prompt(number, "joke", {"topic": "tea"}, version=1)
    assert track.prompt(number, "joke", {"topic": "tea"}, label="prod")
    assert track.group(number, group)
    assert pltrace.flush(10.0)

    assert promptlayer.operations == [
        {"op": "create_group", "group_id": group},
        {"op": "score", "name": None, "request_id": number, "score": 100},
        {"op": "score", "name": "style", "request_id": number, "score": 7},
        {"op": "metadata", "request_id": number, "metadata": {"foo": "bar", "count": "3"}},
        {"op": "prompt", "request_id": number, "prompt_name": "joke", "prompt_input_variables": {"topic": "tea"},
         "version": 1, "label": None},
        {"op": "prompt", "request_id": number, "prompt_name": "joke", "prompt_input_variables": {"topic": "tea"},
         "version": None, "label": "prod"},
        {"op": "group", "request_id": number, "group_id": group},
    ]  # fmt: skip


def test_a_request_of_somebody_else(deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """The request may be of another process: its id is all that is needed."""
    deliver()
    number = request_id(llm)
    deliver(store="memory")

    track.score(number, 50)

    assert pltrace.flush(10.0)
    assert asked(promptlayer) == [("score", 50)]


def test_an_unknown_request_is_refused_and_told(
    deliver: Deliver,
    promptlayer: PromptLayerServer,
    llm: ScriptedOpenAI,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """PromptLayer's refusal is logged with the id, and what is asked of others goes on."""
    deliver()
    number = request_id(llm)

    track.score(999_999, 50)
    track.score(number, 60)

    assert pltrace.flush(10.0)
    assert asked(promptlayer) == [("score", 60)]
    assert "PromptLayer refuses a score for request 999999" in caplog.text
    assert (
        "refused      score for request 999999: " in module("doctor", "--store", tmp_path / "store" / "traces.db").out
    )
    (violation,) = promptlayer.violations
    assert "no request 999999" in violation
    promptlayer.violations.clear()


def test_an_outage_is_told_in_a_sentence(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning about scores that can't be sent says what failed and that nothing is lost."""
    deliver()
    number = request_id(llm)
    promptlayer.faults.append(lambda request: CLOSE)

    track.score(number, 1)
    assert not pltrace.flush()

    assert f"doesn't take a score for request {number}: it failed: While tracking your score" in caplog.text
    promptlayer.faults.clear()
    assert pltrace.flush(30.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: track.score(0, 50),
        lambda: track.score("1", 50),  # type: ignore[arg-type]
        lambda: track.score(True, 50),
        lambda: track.score(1, 101),
        lambda: track.score(1, 0.5),  # type: ignore[arg-type]
        lambda: track.score(1, 50, ""),
        lambda: track.metadata(1, "foo"),  # type: ignore[arg-type]
        lambda: track.metadata(1, {1: "bar"}),  # type: ignore[dict-item]
        lambda: track.prompt(1, "", {}),
        lambda: track.prompt(1, "joke", []),  # type: ignore[arg-type]
        lambda: track.prompt(1, "joke", {}, version=0),
        lambda: track.prompt(1, "joke", {}, label=""),
        lambda: track.prompt(1, "joke", {}, version=1, label="prod"),
        lambda: track.group(1, "a"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused_at_once(local: Path, call: Callable[[], bool]) -> None:
    """A wrong argument raises where it is given, not in the background."""
    with pytest.raises(pltrace.ConfigError):
        call()


def test_a_request_handle_is_pointed_to_its_own_methods(local: Path, llm: ScriptedOpenAI) -> None:
    """Who hands over the `Request` of `on_request` instead of its id is told what to call."""
    with traced("asking") as span:
        chat(llm).invoke("Hi")

    with pytest.raises(pltrace.ConfigError, match=r"a Request has score\(\)"):
        track.score(span.requests[0], 50)  # type: ignore[arg-type]


def test_while_tracing_is_off_it_says_so() -> None:
    """With nothing configured, nothing is kept, and False says that."""
    assert not track.score(1, 50)
    assert not track.metadata(1, {"foo": "bar"})
    assert not track.prompt(1, "joke", {})
    assert not track.group(1, 2)


def test_with_no_promptlayer_it_is_kept_with_the_local_request(local: Path, llm: ScriptedOpenAI) -> None:
    """The local store shows what was asked of its requests by id as it shows what was asked by handle."""
    number = request_id(llm)
    group = track.create_group()

    track.score(number, 50, "style")
    track.metadata(number, {"foo": "bar"})
    track.group(number, group)

    (call,) = calls(local)
    kept = [(operation["kind"], json.loads(operation["arguments"])) for operation in call["operations"]]
    assert kept == [
        ("score", {"score": 50, "score_name": "style"}),
        ("metadata", {"metadata": {"foo": "bar"}}),
        ("group", {"group_id": group}),
    ]
    assert group > 0


def test_secrets_are_redacted(local: Path, llm: ScriptedOpenAI) -> None:
    """What is asked by id goes through the redaction before it is kept."""
    number = request_id(llm)

    track.metadata(number, {"api_key": "hunter2"})

    (call,) = calls(local)
    assert "hunter2" not in json.dumps(call)
    assert b"hunter2" not in local.read_bytes()


def test_create_group_tells_what_is_wrong(deliver: Deliver, promptlayer: PromptLayerServer) -> None:
    """A direct call of PromptLayer that fails raises, with what was refused and what to look at."""
    pltrace.configure(enabled=False)  # Whatever was configured before.
    with pytest.raises(pltrace.ConfigError, match=r"track.create_group\(\).*PROMPTLAYER_API_KEY"):
        track.create_group()
    deliver(api_key="pl_wrong")
    with pytest.raises(pltrace.PromptLayerError, match=r"create a group.*PROMPTLAYER_API_KEY"):
        track.create_group()


def test_one_line_puts_all_requests_of_a_block_into_a_group(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI
) -> None:
    """`Span.add_to_group` holds for the requests made before it and after it, in all that the block calls."""
    deliver()

    @traced
    def step() -> None:
        chat(llm).invoke("Hi")

    with traced("conversation"):
        step()
        current_span().add_to_group(track.create_group())
        step()
    step()

    assert pltrace.flush(10.0)
    first, second, _ = (log["id"] for log in promptlayer.request_logs)
    grouped = [(op["request_id"], op["group_id"]) for op in promptlayer.operations if op["op"] == "group"]
    assert sorted(grouped) == [(first, 1), (second, 1)]


def test_a_group_is_checked_and_ignored_outside_any_block(local: Path) -> None:
    """A wrong group id raises; the inert span ignores a right one."""
    with traced("conversation") as span, pytest.raises(pltrace.ConfigError, match="group_id='a'"):
        span.add_to_group("a")  # type: ignore[arg-type]

    current_span().add_to_group(1)


def test_an_outage_keeps_the_order(deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """Scores and links made while the server was down arrive once it is back, in the order they were made."""
    promptlayer.add_prompt("joke", "Tell me about {topic}.")
    deliver()
    prompt = prompts.get("joke")
    number = request_id(llm)
    promptlayer.faults.append(lambda request: CLOSE)

    track.score(number, 1)
    track.prompt(number, "joke", {"topic": "tea"})
    with traced("down") as span:
        (prompt | chat(llm)).invoke({"topic": "pie"})
        span.score(4)
    track.metadata(number, {"n": "2"})
    track.score(number, 3)
    assert not pltrace.flush()
    promptlayer.faults.clear()
    assert pltrace.flush(30.0)

    of_first = [(op["op"], op.get("score")) for op in promptlayer.operations if op["request_id"] == number]
    assert of_first == [("score", 1), ("prompt", None), ("metadata", None), ("score", 3)]
    late = promptlayer.request_logs[1]
    assert (late["prompt_name"], late["prompt_input_variables"]) == ("joke", {"topic": "pie"})
    assert [op["score"] for op in promptlayer.operations if op["request_id"] == late["id"]] == [4]


_ASKING = """
    import sys
    import pltrace
    from pltrace import track

    number = int(sys.argv[1])
    pltrace.configure()
    for score in range(1, 6):
        track.score(number, score)
        track.prompt(number, "joke", {"n": score}, version=1)
"""


@pytest.mark.parametrize(
    "end", ["", "\n    import os\n    pltrace.flush(0.5)\n    os._exit(1)\n"], ids=["exit", "kill"]
)
def test_what_a_process_left_is_sent_by_the_next(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path, end: str
) -> None:
    """Scores and links made while the server was down, by a process that ended, arrive in order when it is back."""
    promptlayer.add_prompt("joke", "Tell me about {topic}.")
    deliver(store="memory")
    number = request_id(llm)
    store = tmp_path / "left.db"
    surroundings = {
        "PROMPTLAYER_API_KEY": promptlayer.api_key, "PROMPTLAYER_BASE_URL": promptlayer.url, "PLTRACE_STORE": store,
    }  # fmt: skip
    promptlayer.faults.append(lambda request: CLOSE)
    run(_ASKING + end, tmp_path, number, **surroundings)
    assert promptlayer.operations == []
    with closing(sqlite3.connect(store)) as connection:
        assert connection.execute("SELECT count(*) FROM operations WHERE state = 0").fetchone() == (10,)

    promptlayer.faults.clear()
    deliver(store=store)
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 10)

    expected = [item for n in range(1, 6) for item in (("score", n), ("prompt", "joke"))]
    assert asked(promptlayer) == expected
    assert [op["prompt_input_variables"]["n"] for op in promptlayer.operations[1::2]] == [1, 2, 3, 4, 5]


_HANDLES = """
    import os
    import sys
    import pltrace
    from langchain_openai import ChatOpenAI
    from pltrace import traced

    base_url, group = sys.argv[1:]
    model = ChatOpenAI(model="scripted", base_url=base_url, api_key="none")
    pltrace.configure()
    with traced("conversation") as span:
        span.add_to_group(int(group))
        model.invoke("one")
        first = span.requests[0]
        first.score(1)
        first.link_prompt("joke", version=1, input_variables={"topic": "tea"})
        span.score(2)
        with traced("inner"):
            model.invoke("two")
        first.add_metadata({"late": "yes"})
        first.score(3, "style")
    pltrace.flush(0.5)
    os._exit(1)
"""


def test_what_is_asked_before_the_ids_survives_the_process(
    deliver: Deliver, promptlayer: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path
) -> None:
    """What handles and blocks were asked before any request had an id is sent by a later process, each in its order."""
    promptlayer.add_prompt("joke", "Tell me about {topic}.")
    deliver(store="memory")
    group, store = track.create_group(), tmp_path / "left.db"
    promptlayer.operations.clear()
    promptlayer.faults.append(lambda request: CLOSE)
    run(
        _HANDLES, tmp_path, llm.base_url, group,
        PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_STORE=store,
    )  # fmt: skip
    assert promptlayer.request_logs == []

    promptlayer.faults.clear()
    deliver(store=store)
    promptlayer.wait_for(lambda: len(promptlayer.operations) == 8, 30.0)

    by_words = {log["input"]["messages"][0]["content"][0]["text"]: log["id"] for log in promptlayer.request_logs}
    asked_of = {
        words: [(op["op"], op.get("score")) for op in promptlayer.operations if op["request_id"] == number]
        for words, number in by_words.items()
    }
    assert asked_of == {
        "one": [("group", None), ("score", 1), ("prompt", None), ("score", 2), ("metadata", None), ("score", 3)],
        "two": [("group", None), ("score", 2)],
    }
