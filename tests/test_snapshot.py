"""Values are recorded as they were at the call, whatever the program does with them afterwards."""

from __future__ import annotations

import array
import collections
import functools
import gc
import io
import itertools
import os
import tempfile
import threading
import types
import weakref
from abc import ABC, abstractmethod, update_abstractmethods
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel
from pydantic import Field as field_of_pydantic

from pltrace import traced
from pltrace._arguments import named
from pltrace._encoding import Encoder
from pltrace.testing import capture_spans
from tests.support.scripted_llm import ScriptedOpenAI
from tests.support.traces import calls, chat


class Stack(list[Any]):
    """A list of the user's."""

    def __iter__(self) -> Any:
        raise AssertionError("our own code iterates over it")

    __getitem__ = copy = __iter__  # type: ignore[assignment]


@dataclass
class Notes:
    """An agent's state as a dataclass."""

    lines: list[str] = field(default_factory=list)
    step: int = 0


@dataclass(slots=True)
class Slots:
    """The same, with slots."""

    step: int = 0


class State(BaseModel):
    """The same, as a model of pydantic."""

    messages: list[Any] = []
    step: int = 0


class Open(BaseModel, extra="allow"):
    """A model that takes more than it has fields for."""


class Shown:
    """An object of the user's with a text of its own."""

    def __init__(self, lines: Any = None) -> None:
        self.lines = lines

    def __repr__(self) -> str:
        return f"Shown({self.lines})"


class Watched:
    """Tells when code of it runs."""

    def __init__(self) -> None:
        self.lines = [1]

    def _run(self, *_: Any) -> Any:
        ran.append(threading.current_thread())
        raise SystemExit

    __repr__ = __str__ = __len__ = __iter__ = __getitem__ = __bool__ = __contains__ = __format__ = _run
    __fspath__ = __index__ = __float__ = keys = values = items = copy = __copy__ = __deepcopy__ = _run
    __reduce_ex__ = __getattr__ = __eq__ = __call__ = _run
    __hash__ = object.__hash__


class WatchedSlots(Watched):
    """The same, with what it holds in slots."""

    __slots__ = ("further",)

    def __init__(self) -> None:
        self.further = Watched()


class WatchedMapping(Watched, collections.abc.Mapping[str, int]):
    """The same, as a mapping."""


class WatchedSequence(Watched, collections.abc.Sequence[int]):
    """The same, as a sequence."""


@dataclass(eq=False)
class Loading:
    """A data object whose field is loaded when it is asked for, as an attribute of a database's row."""

    lines: Any = None


def _load(self: Any, _: Any = None) -> Any:
    ran.append(threading.current_thread())


Loading.lines = property(_load, lambda self, value: None)  # type: ignore[assignment]
ran: list[threading.Thread] = []


class Strange:
    """Has a class attribute that looks like a dataclass's, but is none."""

    __dataclass_fields__ = 5


def extended(value: Any) -> None:
    """Appends to it."""
    value.append(2)


def cleared(value: Any) -> None:
    """Empties it."""
    value.clear()


def stepped(value: Any) -> None:
    """Sets its attribute."""
    value.step = 9


def numpy() -> Any:
    """NumPy, where it is installed."""
    return pytest.importorskip("numpy")


def pandas() -> Any:
    """pandas, where it is installed."""
    return pytest.importorskip("pandas")


_CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "dict": (lambda: {"a": 1}, cleared),
    "dict of lists": (lambda: {"a": [1]}, lambda value: value["a"].append(2)),
    "long dict of lists": (lambda: {n: [1] for n in range(30)}, lambda value: value[29].append(2)),
    "default dict": (lambda: collections.defaultdict(list, a=[1]), lambda value: value["a"].append(2)),
    "ordered dict": (lambda: collections.OrderedDict(a=1), cleared),
    "counter": (lambda: collections.Counter("aab"), cleared),
    "list": (lambda: [1], extended),
    "list of lists": (lambda: [1, [1]], lambda value: value[1].append(2)),
    "list of dicts": (lambda: [{"a": 1}], lambda value: value[0].clear()),
    "tuple of lists": (lambda: ([1], 2), lambda value: value[0].append(2)),
    "subclass of list": (lambda: Stack([1]), lambda value: list.append(value, 2)),
    "deque": (lambda: collections.deque([1], maxlen=3), extended),
    "deque in a dict": (lambda: {"a": collections.deque([1])}, lambda value: value["a"].append(2)),
    "set": (lambda: {1}, cleared),
    "bytearray": (lambda: bytearray(b"a"), lambda value: value.extend(b"b")),
    "bytearray in a dict": (lambda: {"a": bytearray(b"a")}, lambda value: value["a"].clear()),
    "array": (lambda: array.array("i", [1]), extended),
    "memoryview": (lambda: memoryview(bytearray(b"a")), lambda value: value.__setitem__(0, 98)),
    "long buffer": (lambda: bytearray(200_000), cleared),
    "array of numpy": (lambda: numpy().zeros(3), lambda value: value.fill(1)),
    "long array of numpy": (lambda: numpy().zeros((200, 200)), lambda value: value.fill(1)),
    "arrays of numpy in a list": (lambda: [numpy().zeros(3)] * 30, lambda value: value[29].fill(1)),
    "data frame": (lambda: pandas().DataFrame({"a": [1]}), lambda value: value.insert(0, "b", 2)),
    "cell of a data frame": (lambda: pandas().DataFrame({"a": [1]}), lambda value: value.__setitem__("a", 2)),
    "long data frame": (lambda: pandas().DataFrame({"a": range(20_000)}), lambda value: value.pop("a")),
    "series": (lambda: {"a": pandas().Series([1])}, lambda value: value["a"].__setitem__(0, 2)),
    "user dict": (lambda: collections.UserDict(a=1), cleared),
    "list in a user dict": (lambda: collections.UserDict(a=[1]), lambda value: value["a"].append(2)),
    "user list in a dict": (lambda: {"a": collections.UserList([1])}, lambda value: value["a"].append(2)),
    "read-only dict": (lambda: types.MappingProxyType({"a": [1]}), lambda value: value["a"].append(2)),
    "chain map": (lambda: collections.ChainMap({"a": 1}), cleared),
    "values of a dict": (lambda: {"a": [1]}.values(), lambda value: next(iter(value)).append(2)),
    "namespace": (lambda: types.SimpleNamespace(step=1), stepped),
    "object with a text": (lambda: Shown([1]), lambda value: value.lines.append(2)),
    "objects with a text in a list": (lambda: [Shown(1), Shown(2)], lambda value: setattr(value[1], "lines", 3)),
    "object with a text in a dict": (lambda: {"a": Shown(1)}, lambda value: setattr(value["a"], "lines", 3)),
    "object with a text in a dataclass": (lambda: Notes(Shown(1)), lambda value: setattr(value.lines, "lines", 3)),
    "dataclass in an object with a text": (lambda: Shown(Notes()), lambda value: stepped(value.lines)),
    "error": (lambda: ValueError("a"), lambda value: setattr(value, "args", ("b",))),
    "dataclass": (Notes, stepped),
    "list in a dataclass": (lambda: Notes(["a"]), lambda value: value.lines.append("b")),
    "dataclasses in a list": (lambda: [Notes(), Notes()], lambda value: stepped(value[1])),
    "dataclass in a dict": (lambda: {"a": Notes()}, lambda value: stepped(value["a"])),
    "dataclass with an array of numpy": (lambda: Notes([numpy().zeros(3)]), stepped),
    "array of numpy in a dataclass": (lambda: Notes(numpy().zeros(3)), lambda value: value.lines.fill(1)),
    "number in a dataclass, to one that is equal": (lambda: Notes(step=1), lambda value: setattr(value, "step", True)),
    "dataclass with slots": (Slots, stepped),
    "array of numpy in slots": (lambda: Slots(numpy().zeros(3)), lambda value: value.step.fill(1)),
    "dataclasses with slots in a list": (lambda: [Slots()], lambda value: stepped(value[0])),
    "model": (State, stepped),
    "field beside those of a model": (lambda: Open(more=1), lambda value: setattr(value, "more", 2)),
    "list beside the fields of a model": (lambda: Open(more=[1]), lambda value: value.more.append(2)),
    "list in a model": (lambda: State(messages=[1]), lambda value: value.messages.append(2)),
    "messages in a model": (
        lambda: State(messages=[HumanMessage("a")]), lambda value: setattr(value.messages[0], "content", "b"),
    ),
    "message": (lambda: HumanMessage("a"), lambda value: setattr(value, "content", "b")),
    "messages": (lambda: [HumanMessage("a"), AIMessage("b")], lambda value: setattr(value[1], "content", "c")),
    "blocks of a message beside others": (
        lambda: [HumanMessage([{"type": "text"}]), "b"], lambda value: value[0].content[0].update(text="b"),
    ),
    "messages and others": (lambda: [HumanMessage("a"), "b"], lambda value: setattr(value[0], "content", "c")),
    "state": (lambda: {"messages": [HumanMessage("a")]}, lambda value: value["messages"].append(HumanMessage("b"))),
    "messages in a state": (
        lambda: {"messages": [HumanMessage("a")]}, lambda value: setattr(value["messages"][0], "content", "b"),
    ),
    "blocks of a message": (
        lambda: HumanMessage([{"type": "text", "text": "a"}]), lambda value: value.content[0].update(text="b"),
    ),
    "attributes of a message in a state": (
        lambda: {"messages": [HumanMessage("a", name="bo")]}, lambda value: setattr(value["messages"][0], "name", "al"),
    ),
    "tool calls in a state": (
        lambda: {"messages": [AIMessage("", tool_calls=[{"name": "x", "args": {}, "id": "1"}])]},
        lambda value: value["messages"][0].tool_calls[0].update(name="y"),
    ),
    "a message more blocks are added to": (
        lambda: {"messages": [HumanMessage(["a"]), *[HumanMessage("b")] * 20]},
        lambda value: value["messages"][0].content.append("c"),
    ),
    "documents": (lambda: [Document("a")], lambda value: setattr(value[0], "page_content", "b")),
    "dicts in a state": (lambda: {"messages": [{"role": "user"}]}, lambda value: value["messages"][0].clear()),
}  # fmt: skip


def test_what_is_gone_is_no_cycle() -> None:
    """What an object held isn't taken for the object itself, whose memory may be another's by the time it is shown."""

    @traced
    def function(state: Any) -> None:
        pass

    with capture_spans() as seen:
        for _ in range(1_500):
            function(State(messages=[HumanMessage("a")]))
            assert "[cycle]" not in repr(seen[-1].input)
            del seen[:]


@pytest.mark.parametrize("change", _CHANGES)
def test_what_is_changed_afterwards(change: str) -> None:
    """Arguments and results of functions, and inputs and outputs of runs, are those of the call."""
    make, mutate = _CHANGES[change]

    @traced
    def function(argument: Any) -> Any:
        return argument

    def run(argument: Any) -> Any:
        return argument

    with capture_spans() as seen:
        function(make())
        expected = {span.name.rpartition(".")[2]: (span.input, span.output) for span in seen}
        del seen[:]
        value = make()
        with traced("block") as block:
            block.update(input=value)
            RunnableLambda(run).invoke(value)
        function(value)
        mutate(value)
        given, got = expected["function"]
        assert [(span.name.rpartition(".")[2], span.input, span.output) for span in seen] == [
            ("run", given["argument"], got), ("block", given["argument"], None), ("function", given, got),
        ]  # fmt: skip


@pytest.mark.parametrize(
    "place",
    [
        lambda value: value, lambda value: [value], lambda value: {"a": value}, lambda value: {value: 1},
        lambda value: {(value, 1): 1}, lambda value: ({"a": [{"b": value}]},), lambda value: {value}, Notes,
        lambda value: [Notes(value)], lambda value: State(messages=[value]), Shown, lambda value: [Shown([value])],
        lambda value: types.MappingProxyType({"a": value}), lambda value: {"a": value}.items(),
        lambda value: functools.partial(print, value), lambda value: types.SimpleNamespace(a={"b": value}),
        lambda value: ValueError("a"), lambda value: collections.deque([value]), lambda value: frozenset([value]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Watched, WatchedSlots, WatchedMapping, WatchedSequence, Loading])
def test_no_code_of_values_runs(kind: type, place: Callable[[Any], Any]) -> None:
    """Nothing of a value's class runs to record it: it may read a database, or wait for what the program holds."""

    @traced("take")
    def take(value: Any) -> Any:
        return value

    with capture_spans() as spans:
        value = place(kind())
        ran.clear()
        take(value)
        with traced("around", metadata={"value": value}):
            RunnableLambda(lambda given: None).invoke({"value": value})
        take_them = [(span.input, span.output, span.metadata) for span in spans]
    assert len(take_them) == 3
    assert ran == []


class Masked:
    """Hides what it holds."""

    def __init__(self) -> None:
        self._value, self.__token = "hunter2", "hunter2"

    __repr__ = Shown.__repr__


class MaskedSlots(Masked):
    """The same, with slots."""

    __slots__ = ("_further", "_value")

    def __init__(self) -> None:
        self._value, self._further = "hunter2", Shown()


@pytest.mark.parametrize("place", [lambda value: value, lambda value: [value], lambda value: {"a": [{"b": value}]}])
@pytest.mark.parametrize(
    "make",
    [
        Masked, MaskedSlots, lambda: pytest.importorskip("httpx").URL("https://bob:hunter2@h/x"),
        lambda: pytest.importorskip("httpx").Headers({"Authorization": "Basic hunter2", "X-Api-Key": "hunter2"}),
        lambda: pytest.importorskip("starlette.datastructures").Secret("hunter2"),
    ],
)  # fmt: skip
def test_what_objects_hide(make: Callable[[], Any], place: Callable[[Any], Any]) -> None:
    """What an object keeps to itself, or a library's class shows without its secrets, isn't recorded."""
    with capture_spans() as spans:
        traced(lambda value: None)(place(make()))
    assert "hunter2" not in repr(spans[0].input)


def test_of_very_many_objects_the_first_are_recorded_as_they_were() -> None:
    """A long list of objects that are no data, or very many attributes of one, take a call no longer than others."""
    huge = types.SimpleNamespace(**{f"a{number}": number for number in range(100_000)})
    many = [Shown(number) for number in range(5_000)]

    @traced
    def take(huge: Any, many: list[Shown]) -> None:
        many[0].lines = "later"

    with capture_spans() as spans:
        take(huge, many)
    assert list(spans[0].input["huge"])[-1] == "a99"
    assert spans[0].input["many"][:2] == [{"lines": 0}, {"lines": 1}]
    assert len(spans[0].input["many"]) == 5_000


def test_what_is_shown_of_an_object() -> None:
    """Of an object that is no data its attributes are recorded, in little, and of those in it the class."""

    class Account:
        def __init__(self) -> None:
            self.name = "bo"
            self.password = "hunter2"
            self.owner = Shown()
            self.numbers = [*range(1_000)]
            self.lines = [Shown(1)]
            self._secret = 1

        __repr__ = Shown.__repr__

    with capture_spans() as spans:
        traced(lambda value: None)(Account())
    assert spans[0].input["value"] == {
        "name": "bo", "password": "[redacted]", "owner": "<Shown>", "numbers": "<list of 1,000 items>",
        "lines": [{"lines": 1}],
    }  # fmt: skip


def test_what_is_too_long_to_be_copied() -> None:
    """Of a long buffer its size is recorded, and of a long list of long lists all that there is room for."""
    array_ = numpy().zeros((200, 200))
    with capture_spans() as seen:
        traced("f")(lambda *them: None)(bytearray(200_000), array_, [[0] * 1000] * 100)
    buffer, shape, lists = seen[0].input["them"]
    assert (buffer, shape) == ("<bytearray of 200,000 items>", "<ndarray of shape (200, 200), float64>")
    assert len(lists) == 100


@pytest.mark.parametrize("place", ["argument", "in a dict", "in a list of dicts"])
def test_of_a_very_long_container_it_is_told_how_much_more_there_was(place: str) -> None:
    """Of a list, dict or set with more items than are stored the last of those that are kept tells of the others."""
    many = range(20_000)
    for value in ([*many], (*many,), {*many}, dict.fromkeys(many), collections.deque(many), [Notes()] * 20_000):
        given = {"argument": value, "in a dict": {"it": value}, "in a list of dicts": [{"it": value}]}[place]
        with capture_spans() as seen:
            traced("f")(lambda it: None)(given)
        found: Any = seen[0].input["it"]
        if place != "argument":
            found = (found if place == "in a dict" else found[0])["it"]
        assert len(found) <= 10_001
        assert (found["…"] if isinstance(found, dict) else found[-1]) in ("[… 10001 more]", "[… 10000 more]")


@pytest.mark.parametrize("value", [Strange(), Strange, [Strange()], {"a": Strange()}])
def test_a_class_that_looks_like_another(value: Any) -> None:
    """What can't be copied is recorded as it is, and disturbs nothing."""
    with capture_spans() as seen:
        assert traced("f")(lambda it: it)(value) is value
    assert "Strange" in str(seen[0].input)


def test_nothing_is_made_twice() -> None:
    """An object whose class cleans up after it is not copied: it would clean up twice."""
    cleaned: list[int] = []

    @dataclass
    class Handle:
        number: int

        def __del__(self) -> None:
            cleaned.append(self.number)

    with capture_spans() as seen:
        handle = Handle(1)
        traced("f")(lambda it: None)(handle)
        handle.number = 2
        recorded = seen[0].input
        del handle, seen[:]
    gc.collect()
    assert recorded == {"it": {"number": 2}}
    assert cleaned == [2]


def test_the_messages_of_a_call(local: Path, llm: ScriptedOpenAI) -> None:
    """A model's prompt and answer are those of the call, though their messages are changed afterwards."""
    asked = [HumanMessage("Hi", name="bo"), HumanMessage([{"type": "text", "text": "Hi"}])]
    with traced("root"):
        answer: BaseMessage = chat(llm).invoke(asked)
    asked[0].content, asked[0].name = "Ho", "al"
    asked[1].content[0]["text"] = "Ho"  # type: ignore[index]
    answer.content = "Bye."
    answer.tool_calls = [{"name": "x", "args": {}, "id": "1"}]  # type: ignore[attr-defined]
    (call,) = calls(local)
    assert [message["content"] for message in call["input"]["messages"]] == [[{"type": "text", "text": "Hi"}]] * 2
    assert call["input"]["messages"][0]["name"] == "bo"
    assert call["output"]["messages"][0]["content"] == [{"type": "text", "text": "Hello."}]
    assert not call["output"]["messages"][0].get("tool_calls")


class NoTruth:
    """Is neither true nor false, as an array."""

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


class Vector(HumanMessage):
    """A message with something that has no truth where an empty list is usual."""

    vector: Any = field_of_pydantic(default_factory=list)


class Counted(HumanMessage):
    """A message whose default is made by a function of the user's."""

    number: int = field_of_pydantic(default_factory=lambda: Counted.made())

    made: ClassVar[Callable[[], int]] = itertools.count().__next__


@pytest.mark.parametrize("make", [lambda: Vector("a", vector=NoTruth()), lambda: Counted("a")])
def test_strange_messages(make: Callable[[], HumanMessage]) -> None:
    """Messages of the user's own classes are recorded with their calls, and no code of theirs is run for it."""
    before = Counted.made()
    with capture_spans() as seen, traced("ask"):
        FakeListChatModel(responses=["Hello."]).invoke([make()])
    assert seen.requests[0].body["input"]["messages"][0]["content"] == [{"type": "text", "text": "a"}]
    assert Counted.made() - before <= 2


@pytest.mark.parametrize("usage", [{"total_tokens": 5}, {"input_tokens": "1"}, [1]])
def test_strange_token_counts(usage: Any) -> None:
    """A model that counts its tokens in a way of its own loses no call, and no total."""

    class Strange(FakeListChatModel):
        def _generate(self, *arguments: Any, **options: Any) -> ChatResult:
            message = AIMessage("Hello.")
            message.usage_metadata = usage
            return ChatResult(generations=[ChatGeneration(message=message)])

    with capture_spans() as seen, traced("ask") as span:
        Strange(responses=["a"]).invoke("Hi!", {"tags": [1, "b"]})
        assert span.usage.requests in (0, 1)
    assert [request.tags for request in seen.requests] == [["1", "b"]]


def test_tokens_that_are_changed_afterwards() -> None:
    """What a program does with the usage of an answer doesn't change the totals."""
    answer = AIMessage("a", usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2})
    with capture_spans(), traced("ask") as span:
        told: Any = GenericFakeChatModel(messages=iter([answer])).invoke("Hi!")
        told.usage_metadata["input_tokens"] = 1_000
        assert span.usage.input_tokens == 1


def test_a_named_tuple_that_holds_a_growing_list() -> None:
    """A named tuple can't change; what is in it is recorded as it was at the call, messages too."""

    class State(NamedTuple):
        step: int
        messages: list[Any]

    @traced
    def take(state: State) -> State:
        state.messages.append(AIMessage("added later"))
        return state

    with capture_spans() as spans:
        take(State(1, [HumanMessage("first")]))
    given = spans[0].input["state"]
    assert given["step"] == 1
    assert [message["content"] for message in given["messages"]] == ["first"]
    assert [message["content"] for message in spans[0].output["messages"]] == ["first", "added later"]


def test_an_object_with_many_long_lists() -> None:
    """Of an object with more attributes than are fit for a call the first are recorded as they were at the call."""

    @dataclass
    class Item:
        number: int = 0

    @dataclass
    class Thing:
        def __post_init__(self) -> None:
            for number in range(30):
                setattr(self, f"items{number}", [Item() for _ in range(300)])

    @traced
    def take(thing: Thing) -> None:
        for items in vars(thing).values():
            items[0].number = 1

    with capture_spans() as spans:
        take(Thing())
    thawed = named(spans[0].arguments)["thing"]
    assert thawed.items0[0].number == 0
    assert thawed.items29[0].number == 1


class Client:
    """Something of the user's that others would look at for its end."""


class Closing(Client):
    """One that does something at its end, and has a short text."""

    def __repr__(self) -> str:
        return "a text of mine"

    def __del__(self) -> None:
        ended.append(threading.current_thread())


ended: list[threading.Thread] = []


def _steps() -> Iterator[int]:
    try:
        yield 1
        yield 2
    finally:
        ended.append(threading.current_thread())


async def _waits() -> None:
    pass  # Never awaited.


def _begun() -> Iterator[int]:
    steps = _steps()
    next(steps)
    return steps


def _holding() -> Callable[[], Any]:
    client = Closing()
    return lambda: client


class NoSuchCity(LookupError):
    """An error that can be watched."""

    def __str__(self) -> str:
        return "no such city"


def _failed() -> Exception:
    error = NoSuchCity("Atlantis")
    error.args = (*error.args, Client())
    return error


class Loose(BaseModel, arbitrary_types_allowed=True):
    """A model that may hold anything."""

    step: Any = None
    lines: Any = None


@dataclass(slots=True)
class Held(Slots):
    """More slots than those of its base."""

    lines: Any = None


class Named(dict[str, Any]):
    """A dict of the user's."""


#: What holds something under the name of `lines`, as an argument; and where it is in what is recorded of that.
_HOLDERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "in a list": (lambda made: [1, made], lambda found: found[1]),
    "in a subclass of dict": (lambda made: Named(lines=made), lambda found: found["lines"]),
    "in a dataclass": (Notes, lambda found: found["lines"]),
    "in a model": (lambda made: Loose(lines=made), lambda found: found["lines"]),
    "beside the fields of a model": (lambda made: Open(lines=made), lambda found: found["lines"]),
    "in slots": (lambda made: Held(lines=made), lambda found: found["lines"]),
    "in a user dict": (lambda made: collections.UserDict(lines=made), lambda found: found["lines"]),
    "in an object with a text": (Shown, lambda found: found["lines"]),
    "in a list in an object with a text": (lambda made: Shown([made]), lambda found: found["lines"][0]),
    "in an object with a text in a list": (lambda made: [1, Shown(made)], lambda found: found[1]["lines"]),
    "in a user list": (lambda made: collections.UserList([made]), lambda found: found[0]),
    "in a dataclass in a dict": (lambda made: {"a": Notes(made)}, lambda found: found["a"]["lines"]),
    "in dataclasses in a list": (lambda made: [Notes(made), Notes(made)], lambda found: found[1]["lines"]),
    "in models in a list": (lambda made: [Loose(lines=made), 1], lambda found: found[0]["lines"]),
}


@pytest.mark.parametrize("place", ["argument", "result", "of a chain", *_HOLDERS])
@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (Client, "<Client>"),
        (Closing, "<Closing>"),
        (_begun, "<generator object _steps>"),
        (_waits, "<coroutine object _waits>"),
        (lambda: open(os.devnull), f"<TextIOWrapper name='{os.devnull}'>"),  # noqa: SIM115
        (_holding, f"{__name__}._holding.<locals>.<lambda>"),
        (_failed, "NoSuchCity: no such city"),
        (lambda: functools.partial(_holding, Client()), f"<partial of {__name__}._holding>"),
        (tempfile.TemporaryDirectory, "<TemporaryDirectory>"),
    ],
    ids=[
        "object", "with a finalizer", "generator", "coroutine", "file", "function", "error", "partial", "to be entered",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_what_is_handed_on_ends_when_the_program_lets_go_of_it(
    make: Callable[[], Any], shown: str | None, place: str, no_collector: None
) -> None:
    """Files, generators and the like end where they would without us, not later, in the writer's thread."""
    ended.clear()

    def watched() -> Any:
        made = make()
        weakref.finalize(made, lambda: ended.append(threading.current_thread()))
        return made

    @traced("take")
    def take(value: Any) -> Any:
        return watched() if place == "result" else None

    with capture_spans() as spans:
        if place == "argument":
            take(watched())
        elif place in _HOLDERS:
            take(_HOLDERS[place][0](watched()))
        elif place == "of a chain":
            with traced("around"):
                RunnableLambda(lambda given: None).invoke({"value": watched()}, {"run_name": "take"})
        else:
            take(0)
        assert {*ended} == {threading.current_thread()}
    span = spans.named("take")
    found = span.output if place == "result" else span.input["value"]
    if place == "result" and make in (_begun, _waits):  # It is consumed, or thrown away, after the call.
        shown = None
    assert (_HOLDERS[place][1](found) if place in _HOLDERS else found) == shown


def _ring(kind: type) -> Any:
    first, second = kind(), kind()
    first.step, second.step = second, first
    return first


def _tree(kind: type) -> Any:
    root = kind()
    root.lines = [kind() for _ in range(3)]
    for child in root.lines:
        child.step, child.lines = root, [kind()]
        child.lines[0].step = child
    return root


def _box(kind: type) -> Any:
    inner: Any = collections.UserDict(kind=kind.__name__)
    outer = collections.UserList([inner])
    inner["outer"] = outer
    return outer


@pytest.mark.parametrize("kind", [Notes, Loose, Open])
@pytest.mark.parametrize("make", [_ring, _tree, _box])
@pytest.mark.parametrize("place", [lambda value: value, lambda value: [value], lambda value: {"a": value}])
def test_objects_that_hold_each_other(kind: type, make: Callable[[type], Any], place: Callable[[Any], Any]) -> None:
    """Data objects that refer to those they are in are recorded once, with a mark where they come again."""
    value = place(make(kind))
    with capture_spans() as spans:
        traced("take")(lambda value: None)(value)
    assert spans[0].input == {"value": Encoder().jsonable(value)}


@pytest.mark.parametrize("make", [Notes, Loose, Held, Open, lambda: [Notes()], lambda: {"a": Loose()}])
def test_an_object_that_holds_the_stream_it_was_given_for(make: Callable[[], Any]) -> None:
    """Who keeps the stream of a traced call in an argument of that call can be collected with it."""

    @traced("take")
    def take(value: Any) -> Iterator[int]:
        yield from (1, 2)

    with capture_spans() as spans:
        given = make()
        holder = given[0] if isinstance(given, list) else given["a"] if isinstance(given, dict) else given
        holder.lines = take(given)
        assert next(holder.lines) == 1
        collected = weakref.ref(holder.lines)
        del holder, given
        gc.collect()
        assert collected() is None
    assert [span.name for span in spans] == ["take"]


class Caller:
    """A callable object, whose bound methods have no names."""

    def __call__(self, *_: Any) -> None:
        """Do nothing."""


class Number(int):
    """A number without a text of its own."""

    __repr__ = object.__repr__


class Failure(Exception):
    """An error that has something to do at its end."""

    def __del__(self) -> None:
        pass


class Letter(Enum):
    """A member whose class has no text."""

    A = "a"
    __repr__ = object.__repr__


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (types.MethodType(Caller(), 3), "<method>"),
        (Number(5), 5),
        (Failure("no"), "Failure: no"),
        (Letter.A, "a"),
        (io.StringIO("a"), "<StringIO>"),
    ],
    ids=["method", "number", "error", "enum", "file without a name"],
)
def test_what_is_shown_of_what_is_not_held(value: Any, shown: Any) -> None:
    """Only what would be shown by its class alone is kept so; and what is beside it is as it was at the call."""

    @traced("take")
    def take(value: Any, beside: list[Any]) -> None:
        beside[1]["state"] = "later"

    with capture_spans() as spans:
        take(value, [value, {"state": "at the call"}])
    assert spans[0].input == {"value": shown, "beside": [shown, {"state": "at the call"}]}


@dataclass(slots=True)
class Event:
    """A data object with slots."""

    number: int


@dataclass
class ToolEvent(Event):
    """One with attributes beside the slots."""

    handler: Any


def test_an_object_that_holds_a_function() -> None:
    """A data object that wasn't changed is recorded whole, also where it holds what is kept as a text."""

    @traced("take")
    def take(event: ToolEvent) -> None:
        pass

    with capture_spans() as spans:
        take(ToolEvent(9, print))
    assert spans[0].input == {"event": {"number": 9, "handler": "builtins.print"}}


@dataclass(slots=True)
class Remark:
    """A data object with slots, and more that is no field of it."""

    known: ClassVar[int] = 3
    kind: str = "remark"
    number: int = 1
    hidden: str = field(default="s", repr=False)


class Click(Remark):
    """It computes a field of its base."""

    def __init__(self) -> None:
        self.number = 2

    @property  # type: ignore[override]
    def kind(self) -> str:
        """Return what kind it is."""
        return "click"

    @kind.setter
    def kind(self, value: str) -> None:
        pytest.fail("a property is set")


class Key(Remark):
    """The same, read only."""

    def __init__(self) -> None:
        self.number = 3

    @property  # type: ignore[override]
    def kind(self) -> str:
        """Return what kind it is."""
        return "key"


class Area:
    """A base with a slot that is no field."""

    __slots__ = ("_area",)


@dataclass(init=False)
class Square(Area):
    """It computes a field from the slot."""

    side: int
    area: int

    def __init__(self) -> None:
        self.side, self._area = 3, 9

    @property  # type: ignore[no-redef]
    def area(self) -> int:
        """Return what is in the slot."""
        return self._area


@dataclass
class Listed:
    """It computes what has its attributes."""

    number: int = 1

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return {"number": self.number, "other": 2}


class Choice(Remark, Enum):
    """Its members are data objects."""

    ONE = "one"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Remark(), {"kind": "remark", "number": 1}),
        (Click(), {"kind": "click", "number": 2}),
        (Key(), {"kind": "key", "number": 3}),
        (Square(), {"side": 3, "area": 9}),
        (Listed(), {"number": 1}),
        (Choice.ONE, Encoder().jsonable(Choice.ONE.value)),
    ],
)
@pytest.mark.parametrize("place", [lambda value: value, lambda value: [value], lambda value: {"state": value}])
def test_fields_that_no_attribute_can_be_set_for(value: Any, shown: Any, place: Callable[[Any], Any]) -> None:
    """Of a data object that computes a field, or has variables of its class beside them, the fields are recorded."""
    with capture_spans() as spans:
        traced("take")(lambda value: value)(place(value))
    assert spans[0].input == {"value": place(shown)}
    assert spans[0].output == place(shown)


@pytest.mark.parametrize("kind", ["dataclass", "model"])
def test_a_class_that_is_changed_after_the_call(kind: str) -> None:
    """A span is recorded also where no object of an argument's class can be made any more."""

    @dataclass
    class Plain(ABC):  # noqa: B024
        number: int = 1

    class Model(BaseModel, ABC):
        number: int = 1

    one: Any = Plain if kind == "dataclass" else Model
    with capture_spans() as spans:
        traced("take")(lambda value: None)(one())
        one.later = abstractmethod(lambda self: None)
        update_abstractmethods(one)
        assert spans[0].input == {"value": {"number": 1} if kind == "dataclass" else "<Model>"}
