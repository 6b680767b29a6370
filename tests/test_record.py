"""What is put down of a span in a quick way is to the byte what the careful way puts down."""

from __future__ import annotations

import json
from array import array
from enum import Enum
from itertools import product
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.prompt_values import ChatPromptValue

from pltrace import traced
from pltrace._blueprint import chat_answer, chat_prompt, counts_of, plain_chat, tokens
from pltrace._encoding import Encoder, json_of
from pltrace._messages import said
from pltrace._record import answer_of, is_cached, row_of
from pltrace._snapshot import snapshot
from pltrace.testing import capture_spans


class NamedMessage(HumanMessage):
    """A user's own, which has something to say by default."""

    name: str | None = "Ann"


CALL = {"name": "look", "args": {"q": [1, {"n": None}], "tokens": 'a "b"'}, "id": "c2", "type": "tool_call"}
#: Those that hold nothing but texts and simple tool calls.
PLAIN: list[BaseMessage] = [
    HumanMessage("Hi", id="h1"),
    SystemMessage('Be "brief",\n\x00 ü \ud800'),
    AIMessage("", response_metadata={"model_name": "m"}),
    AIMessageChunk("word", additional_kwargs={"refusal": None}),
    AIMessage("Yes", usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}),
    HumanMessage("Hi", name="Bob"),
    AIMessage("", tool_calls=[CALL, {**CALL, "args": {}}], name="Ann", additional_kwargs={"refusal": None}),
    AIMessage("Let me look.", tool_calls=[CALL]),
    ToolMessage("found", tool_call_id="c2", name="look", artifact={"rows": [1, None]}),
    ToolMessage("", tool_call_id=""),
]
OTHER: list[BaseMessage] = [
    HumanMessage("my api_key=sk-abcdefghijklmnopqrstuvwxyz0123456789"),
    HumanMessage(["Look:", {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}]),
    HumanMessage("Hi", more="more"),
    NamedMessage("Hi"),
    SystemMessage("Hi", additional_kwargs={"__openai_role__": "developer"}),
    AIMessage("", tool_calls=[{"name": "look", "args": {"token": "t", "q": 1}, "id": "c1"}]),
    AIMessage("", tool_calls=[{**CALL, "id": ""}]),
    AIMessage("", tool_calls=[CALL], invalid_tool_calls=[{"name": "f", "args": "{", "id": "c3", "error": "bad"}]),
    AIMessage("", tool_calls=[CALL], additional_kwargs={"tool_calls": [{"custom": {"name": "g"}, "id": "c4"}]}),
    AIMessageChunk("", tool_call_chunks=[{"name": "look", "args": '{"q": 1', "id": "c2", "index": 0}]),
    AIMessage("Yes").model_copy(update={"tool_calls": [{**CALL, "error": "bad"}]}),
    AIMessage("It is so [1].", response_metadata={"citations": ["https://a.example"]}),
    AIMessage("No", additional_kwargs={"reasoning_content": "Because."}),
    ToolMessage(["found", {"type": "text", "text": "more"}], tool_call_id="c1", artifact={"rows": [1, None]}),
    ToolMessage("failed", tool_call_id="c1", status="error"),
    FunctionMessage("found", name="look"),
    ChatMessage("Hi", role="narrator"),
]


class Shout(str):
    """A text of the user's, whose own methods are nobody else's to run."""

    __str__ = __format__ = upper = lambda self: "WRONG"  # type: ignore[assignment]


class Kind(str, Enum):
    """An enum of texts."""

    ONE = "one", "first"

    def __new__(cls, value: str, text: str) -> Kind:
        """Have a text that isn't the value."""
        self = str.__new__(cls, text)
        self._value_ = value
        return self


TEXTS: list[Any] = [Shout("Hi"), Shout("password=hunter2"), Kind.ONE]


def _name(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("message", PLAIN + OTHER, ids=_name)
def test_messages_that_hold_little(message: BaseMessage) -> None:
    """The blueprint of a message of texts and tool calls is made of what was noted of it, and says what it has to."""
    encoder = Encoder()
    notes = said([message])

    asked = plain_chat(notes[::4], notes[1::4], notes[3::4], encoder)
    answered = plain_chat(notes[::4], notes[1::4], notes[3::4], encoder, "assistant")

    assert asked in (None, encoder.dumps_shaped(chat_prompt([message], encoder)))
    generations = [ChatGeneration(message=AIMessage("")).model_copy(update={"message": message})]
    assert answered in (None, encoder.dumps_shaped(chat_answer(generations, encoder)))
    if message in PLAIN and message.content.isprintable():  # type: ignore[union-attr]
        assert asked is not None


@pytest.mark.parametrize("held", [0, 12], ids=["noted", "held"])
@pytest.mark.parametrize(
    "said", [*PLAIN, *OTHER, Document("page", metadata={"n": 1}, id="d"), Document("p"), *TEXTS], ids=_name
)
def test_notes_of_values(said: Any, held: int) -> None:
    """The JSON of messages, of prompts and of documents is the same of a snapshot and of what they were at the time."""
    turns = [HumanMessage("turn") for _ in range(held)]
    items = [*turns, said]
    values: list[Any] = [said, items, {"items": items, "one": said, "deep": {"one": said}}]
    if isinstance(said, BaseMessage):
        values.append(ChatPromptValue(messages=items))
    expected = [json_of(Encoder().jsonable(value)) for value in values]

    snapshots = [snapshot(value) for value in values]
    for turn in turns:
        turn.content = "changed"

    assert [Encoder().dumps(value) for value in snapshots] == expected


def test_messages_that_cannot_be_compared() -> None:
    """What a message said is shown also where nobody can tell whether it says the same now."""

    class Array:
        def __eq__(self, other: object) -> bool:
            raise ValueError("ambiguous")

        __hash__ = None  # type: ignore[assignment]

    turns = [HumanMessage([{"type": "text", "text": "Hi", "more": Array()}]) for _ in range(12)]
    expected = Encoder().dumps(turns)
    kept = snapshot(turns)
    for turn in turns:
        turn.content = [{"type": "text", "text": "Hi", "more": Array()}, "later"]
        turn.content.pop()

    assert Encoder().dumps(kept) == expected


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5},
        {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "total_cost": 0},
        {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5, "input_token_details": {"cache_read": 1}},
        {"total_tokens": 5},
    ],
)
def test_token_counts_of_one_message(usage: dict[str, Any] | None) -> None:
    """The token counts of an answer are the same of what was noted of it and of its generations."""
    message = AIMessage("Yes")
    message.usage_metadata = usage  # type: ignore[assignment]
    llm_output = {"token_usage": {"prompt_tokens": 7, "completion_tokens": 8}}
    one, free = ChatGeneration(message=message), ChatGeneration(message=AIMessage("No"))
    free.message.usage_metadata = {"total_cost": 0}  # type: ignore[attr-defined]
    for generations in ([one], [one, free], [Generation(text="")]):
        answer = answer_of(generations, llm_output)

        cached, counted = answer.counted()

        named = answer.named()
        assert cached == is_cached(named)
        assert counted == tokens([] if cached else named, {} if cached else llm_output)
        assert answer.tokens() == (counted.input_tokens or 0, counted.output_tokens or 0)


def test_reports_of_tokens() -> None:
    """LangChain's own report of tokens, which is read at once, says what it says with a stranger's key in it."""
    counts: list[Any] = [0, 3, None, 3.0, True, -3, "3"]
    inside: list[Any] = [
        None, {}, {"cache_read": 2, "audio": 0}, {"cache_read": 1.0}, {"cache_read": True}, {"cache_creation": 5},
        {"cache_creation": -1}, {"cache_creation": 0, "ephemeral_5m_input_tokens": 4}, 7,
    ]  # fmt: skip
    outside: list[Any] = [None, {"reasoning": 0}, {"reasoning": 9, "audio": 1}, {"reasoning": "9"}, [9]]
    keys = ("input_tokens", "output_tokens", "input_token_details", "output_token_details")
    for values in product(counts, counts, inside, outside):
        report = dict(zip(keys, values, strict=True))

        read, closely = counts_of(report), counts_of({**report, "stranger": None})

        assert repr(read) == repr(closely)  # As 1 and True are equal.


def _tool(least: Any) -> dict[str, Any]:
    """Give the definition of a tool, in whose schema the name of a secret is none."""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": least, "password": "shown"}}}
    return {"type": "function", "function": {"name": "count", "description": "Count.", "parameters": schema}}


def test_what_is_alike_for_many_spans() -> None:
    """Spans that differ in the type of a value, in order or deep inside share nothing that was made of the other."""
    mutable = {"inner": {"n": 1}}
    cyclic: dict[str, Any] = {}
    cyclic.update(one=cyclic, other=cyclic)
    again: Any = ["ha"]
    for _ in range(12):
        again = [again, again]
    said: list[dict[str, Any]] = [
        {"n": 1}, {"n": 1.0}, {"n": True}, {"n": "1"}, {"n": None}, {"n": [1, 2]}, {"n": (1, 2)}, {"n": b"1"},
        {"n": array("b", b"1")}, {"a": "b", "c": "d"}, {"c": "d", "a": "b"}, {"password": "a"},
        {"user": {1: "a"}}, {"user": {"1": "a"}}, {"n": object}, mutable, mutable, {"inner": {"n": 2.0}},
        cyclic, {"n": again},
    ]  # fmt: skip
    called: list[dict[str, Any]] = [
        {"stop": 1}, {"stop": True}, {"stop": 1.0}, {"tools": [_tool(1)]}, {"tools": [_tool(True)]},
        {"tools": [_tool(1)], "tool_choice": "any"}, {"response_format": {"schema": {"password": {"n": 1}}}},
        {"response_format": object}, {"functions": [{"name": "f", "strict": 1}], "text": {"n": 1}},
    ]  # fmt: skip
    declared: list[dict[str, Any]] = [{"metadata": one} for one in said]
    declared += [{}, {"tags": ["a"]}, {"user": "u"}, {"session": "u"}, {"capture": False}, {"capture": "outputs"}]
    model = FakeListChatModel(responses=["yes"])
    shared = Encoder()
    with capture_spans() as spans:
        for around in declared:
            for parameters in called if "metadata" not in around else called[:1]:
                with traced("around", **around):
                    model.bind(**parameters).invoke("Hi", {"metadata": {"own": 1}, "tags": ["t"]})
                mutable["inner"]["n"] += 1
        for span in spans:
            row = row_of(span, shared, "service")
            assert row == row_of(span, Encoder(), "service")
            assert json.loads(row.body.split("\n")[0])["metadata"] == Encoder().jsonable(span.metadata)
