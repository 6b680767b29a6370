"""What the library's own tests say of its tracing: run them with `python -m pytest`; nothing is sent anywhere."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.language_models import FakeListChatModel
from tracedlib import Conversation, summarize, summarize_all, summarize_stream

import pltrace
from pltrace.testing import CapturedSpans

MODEL = FakeListChatModel(responses=["Short."])


def test_summarize(pltrace_spans: CapturedSpans) -> None:
    """One call, inside a span of the library's own."""
    assert summarize(MODEL, "A long text.") == "Short."

    assert pltrace_spans.tree() == [
        [
            "tracedlib.summarize",
            ["RunnableSequence", ["ChatPromptTemplate"], ["FakeListChatModel"], ["StrOutputParser"]],
        ]
    ]
    (request,) = pltrace_spans.assert_requests(1, status="SUCCESS")
    assert request.body["input"]["messages"][0]["content"][0]["text"] == "Summarize in 5 words: A long text."


def test_summarize_all(pltrace_spans: CapturedSpans) -> None:
    """A call for each text, all inside one span and tagged."""
    assert asyncio.run(summarize_all(MODEL, ["one", "two", "three"])) == ["Short."] * 3

    pltrace_spans.assert_requests(3, tags=["bulk"])
    assert pltrace_spans.named("tracedlib.summarize_all").usage.requests == 3


def test_summarize_stream(pltrace_spans: CapturedSpans) -> None:
    """The span lasts as long as the stream is read."""
    pieces = summarize_stream(MODEL, "A long text.")
    assert next(pieces) == "S"
    assert "tracedlib.summarize_stream" not in [span.name for span in pltrace_spans]
    assert "".join(pieces) == "hort."

    assert pltrace_spans.named("tracedlib.summarize_stream").status == "ok"
    pltrace_spans.assert_requests(1)


@pytest.mark.pltrace(deterministic=True)
def test_conversation(pltrace_spans: CapturedSpans) -> None:
    """The turns of a conversation have its name, and their number."""
    conversation = Conversation.about(FakeListChatModel(responses=["cats", "Yes.", "No."]), "A text about cats.")
    assert [conversation.ask("Is it?"), conversation.ask("Is it not?")] == ["Yes.", "No."]

    pltrace_spans.assert_requests(2, metadata={"conversation_id": "cats"})
    pltrace_spans.assert_requests(1, metadata={"turn": 2})
    assert [span.id for span in pltrace_spans if span.name == "tracedlib.Conversation.about"] == [f"{2:016x}"]


def test_a_failure_is_recorded_and_passes(pltrace_spans: CapturedSpans) -> None:
    """What the model raises reaches the caller, and is in the span."""
    with pytest.raises(IndexError):
        summarize(FakeListChatModel(responses=[]), "A long text.")

    pltrace_spans.assert_requests(1, status="ERROR")
    assert pltrace_spans.named("tracedlib.summarize").status == "error"


def test_the_application_decides(pltrace_spans: CapturedSpans) -> None:
    """The application can tag what the library records, keep it from storing texts, or switch it off."""
    pltrace.configure(libraries={"tracedlib": {"tags": ["of the library"], "capture": False}})
    summarize(MODEL, "A private text.")
    (request,) = pltrace_spans.assert_requests(1, tags=["of the library"])
    assert "private" not in str(request.body)

    del pltrace_spans[:]
    pltrace.configure(libraries={"tracedlib": {"enabled": False}})
    summarize(MODEL, "A long text.")
    assert pltrace_spans == []


#: Somebody's program, which knows nothing of pltrace. Before what is watched, `summarize` has run undecorated, so that
#: what is left is the decorator's.
PROGRAM = """
import sys, threading
opened = set()

def watch(event, about):
    if event == "open" and not str(about[0]).endswith((".py", ".pyc")):
        opened.add(about[0])

sys.addaudithook(watch)
from langchain_core.language_models import FakeListChatModel
from tracedlib import summarize

def state():
    modules = {name for name in sys.modules if not name.startswith("pltrace.")}
    return modules, set(threading.enumerate()), set(opened)

model = FakeListChatModel(responses=["Short."])
assert summarize.__wrapped__(model, "A long text.") == "Short."
before = state()
assert summarize(model, "A long text.") == "Short."
assert state() == before, (state(), before)
assert not {"promptlayer", "sqlite3", "pltrace._store", "pltrace._handler"} & set(sys.modules)
"""


def test_nothing_happens_without_an_application(tmp_path: Path) -> None:
    """Who uses the library and knows nothing of pltrace gets no thread, file, module or word from it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PLTRACE_", "PROMPTLAYER_"))
    }
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
