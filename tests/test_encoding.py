"""What users rely on when any value of theirs is turned into JSON."""

from __future__ import annotations

import base64
import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import re
import socket
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, ToolMessage
from langchain_core.prompt_values import ChatPromptValue, StringPromptValue

from pltrace._encoding import Encoder
from pltrace._redaction import Rules

REDACTED = "[redacted]"
SECRETS = {
    "openai": "sk-abcdefghijklmnopqrstuvwxyz012345",
    "openai_project": "sk-proj-Ab3_dEfGhIjKlMnOpQrStUvWx-Yz0123456789",
    "anthropic": "sk-ant-api03-Ab3_dEfGhIjKlMnOpQrStUvWxYz0123456789-AA",
    "promptlayer": "pl_0123456789abcdef0123456789abcdef",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "google": "AIzaSyA-bcdefghijklmnopqrstuvwxyz012345",
    "github": "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "github_app": "ghs_0123456789abcdefghijklmnopqrstuvwxyz",
    "github_pat": "github_pat_11ABCDEFG0abcdefghijkl_0123456789abcdef",
    "slack": "xoxb-123456789012-123456789012-AbCdEfGhIjKl",
    "hugging_face": "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "langsmith": "lsv2_pt_0123456789abcdef0123456789abcdef_0123456789",
    "pem": "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA\n-----END RSA PRIVATE KEY-----",
}


def strict(text: str) -> Any:
    """Parse as the strictest reader would."""
    text.encode("utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def roundtrip(value: object, **options: Any) -> Any:
    """Encode, check strictness, and return what a reader gets."""
    encoder = Encoder(**options)
    text = encoder.dumps(value)
    assert "\\u0000" not in text
    return strict(text)


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Node:
    name: str
    next: Any = None
    hidden: str = dataclasses.field(default="hidden-value", repr=False)


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1


class BadRepr:
    def __repr__(self) -> str:
        raise ValueError("no")


class ExitRepr:
    def __repr__(self) -> str:
        raise SystemExit(3)


class BadStr(Exception):
    def __str__(self) -> str:
        raise KeyError("no")


class BadGetattribute:
    def __getattribute__(self, name: str) -> Any:
        raise ValueError(name)


class BadClass:
    @property
    def __class__(self) -> Any:
        raise ValueError("no class")


class BadMapping(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise ValueError(key)

    def __iter__(self) -> Iterator[str]:
        raise SystemExit(1)

    def __len__(self) -> int:
        return 1


class BadDict(dict[str, int]):
    def items(self) -> Any:
        """Raise."""
        raise ValueError("items")

    def __iter__(self) -> Iterator[str]:
        raise ValueError("iter")

    def __len__(self) -> int:
        raise ValueError("len")


class BadMeta(type):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other: object) -> bool:
        raise ValueError("eq")

    def __getattribute__(cls, name: str) -> Any:
        raise ValueError(name)


class OfBadMeta(metaclass=BadMeta):
    pass


class Model(pydantic.BaseModel):
    model_config = {"extra": "allow"}
    key: pydantic.SecretStr
    count: int = 1
    client: Any = pydantic.Field(default=None, exclude=True)

    @pydantic.model_serializer
    def broken(self) -> Any:
        """Fail, as a user's serializer may."""
        raise RuntimeError("must not run")


def cyclic_dict() -> dict[str, Any]:
    """Build a dict that holds itself."""
    value: dict[str, Any] = {"a": 1}
    value["self"] = value
    return value


def cyclic_list() -> list[Any]:
    """Build a list that holds itself."""
    value: list[Any] = [1]
    value.append(value)
    return value


def cyclic_object() -> Node:
    """Build an object that holds itself."""
    node = Node("n")
    node.next = [node]
    return node


def nested(depth: int) -> Any:
    """Build lists in lists."""
    value: Any = "end"
    for _ in range(depth):
        value = [value]
    return value


PAYLOADS: dict[str, tuple[Any, Any]] = {
    "none": (None, None),
    "bool": (True, True),
    "lock": (threading.Lock(), "<lock>"),
    "generator": ((i for i in [1]), "<generator object <genexpr>>"),
    "object": (object(), "<object>"),
    "bad repr": (BadRepr(), "<BadRepr>"),
    "exit repr": (ExitRepr(), "<ExitRepr>"),
    "bad str": (BadStr(), "BadStr: <its __str__ raised KeyError>"),
    "bad getattribute": (BadGetattribute(), "<BadGetattribute>"),
    "bad class": (BadClass(), "<BadClass>"),
    "bad mapping": (BadMapping(), "<BadMapping>"),
    "bad dict": (BadDict(a=1), {"a": 1}),
    "bad metaclass": ([OfBadMeta()], ["<OfBadMeta: reading it raised TypeError>"]),
    "bad metaclass beside others": ({"password": OfBadMeta(), "a": 1}, {"password": REDACTED, "a": 1}),
    "bad key": ({BadRepr(): 1}, {"<BadRepr>": 1}),
    "cyclic dict": (cyclic_dict(), {"a": 1, "self": "[cycle]"}),
    "cyclic list": (cyclic_list(), [1, "[cycle]"]),
    "cyclic object": (cyclic_object(), {"name": "n", "next": ["[cycle]"]}),
    "lone surrogates": ({"k\ud800": "v\udc00"}, {"k\ufffd": "v\ufffd"}),
    "surrogate pair": ("\ud83d\ude00", "\U0001f600"),
    "nul": ({"k\0": "v\0"}, {"k\ufffd": "v\ufffd"}),
    "not finite": ([math.nan, math.inf, -math.inf], ["NaN", "Infinity", "-Infinity"]),
    "utf-8 bytes": (b"caf\xc3\xa9", {"type": "bytes", "length": 5, "text": "café"}),
    "other bytes": (bytearray(b"\xff\0"), {"type": "bytes", "length": 2, "base64": "/wA="}),
    "memoryview": (memoryview(b"ab"), {"type": "bytes", "length": 2, "text": "ab"}),
    "huge int": (2**200, str(2**200)),
    "64 bit": ([2**63 - 1, -(2**63), 2**63], [2**63 - 1, -(2**63), str(2**63)]),
    "unprintable int": (1 << 50_000, "<int of 50001 bits>"),
    "keys": ({1: "a", None: "b", 2.5: "c", b"k": "d"}, {"1": "a", "None": "b", "2.5": "c", "k": "d"}),
    "equal keys": ({1: "a", "1": "b"}, {"1": "a", "1 (2)": "b"}),
    "tuple key": ({(1, "a"): 1}, {"(1, 'a')": 1}),
    "enum key": ({Color.RED: 1}, {"red": 1}),
    "slots": (Slots(), "<Slots>"),
    "dataclass": (Node("n"), {"name": "n", "next": None}),
    "named tuple": (Point(1, 2), {"x": 1, "y": 2}),
    "enum": ([Color.RED, Level.LOW], ["red", 1]),
    "secret": (pydantic.SecretStr("hunter2"), REDACTED),
    "model": (
        Model(key=pydantic.SecretStr("hunter2"), client=object(), more=2),
        {"key": REDACTED, "count": 1, "more": 2},
    ),
    "message": (
        AIMessage("hi", tool_calls=[{"name": "f", "args": {"a": 1}, "id": "c1"}]),
        {
            "type": "ai",
            "content": "hi",
            "tool_calls": [{"name": "f", "args": {"a": 1}, "id": "c1", "type": "tool_call"}],
        },
    ),
    "tool message": (
        ToolMessage("ok", tool_call_id="c1"),
        {"type": "tool", "content": "ok", "tool_call_id": "c1", "status": "success"},
    ),
    "chat message": (
        ChatMessage("hi", role="judge"),
        {"type": "chat", "content": "hi", "role": "judge"},
    ),
    "document": (
        Document("text", metadata={"a": 1}, id="7"),
        {"page_content": "text", "metadata": {"a": 1}, "id": "7"},
    ),
    "chat prompt": (
        ChatPromptValue(messages=[HumanMessage("q")]),
        [{"type": "human", "content": "q"}],
    ),
    "text prompt": (StringPromptValue(text="q"), "q"),
    "sequences": (
        [(1,), {2}, frozenset({3}), collections.deque([4]), range(2)],
        [[1], [2], [3], [4], [0, 1]],
    ),
    "views": ([{"a": 1}.keys(), {"a": 1}.values()], [["a"], [1]]),
    "mappings": ([types.MappingProxyType({"a": 1}), collections.UserDict(a=1)], [{"a": 1}, {"a": 1}]),
    "user string": (collections.UserString("abc"), "abc"),
    "times": (
        [datetime.datetime(2026, 1, 2, 3), datetime.date(2026, 1, 2), datetime.timedelta(seconds=1)],
        ["2026-01-02T03:00:00", "2026-01-02", "0:00:01"],
    ),
    "scalars": (
        [uuid.UUID(int=1), pathlib.PurePosixPath("/a"), decimal.Decimal("1.50")],
        ["00000000-0000-0000-0000-000000000001", "/a", "1.50"],
    ),
    "errors": ([ValueError("bad"), KeyError()], ["ValueError: bad", "KeyError"]),
    "code": ([dict, json.dumps, re.compile("a+")], ["builtins.dict", "json.dumps", "a+"]),
}


class TestAnyValue:
    """Any value at all becomes strict JSON, and what can be read of it stays readable."""

    @pytest.mark.parametrize("kind", PAYLOADS)
    def test_every_kind_has_its_form(self, kind: str) -> None:
        """Each kind of value has one documented form."""
        value, expected = PAYLOADS[kind]
        assert roundtrip(value) == expected

    @pytest.mark.parametrize("kind", PAYLOADS)
    def test_a_neighbour_survives(self, kind: str) -> None:
        """What stands beside a poisonous value is kept whole."""
        value = PAYLOADS[kind][0]
        assert roundtrip([{"poison": value}, value, "kept"])[2] == "kept"

    def test_a_socket_reads_as_one(self) -> None:
        """An open resource becomes a short text without an address in memory."""
        with socket.socket() as open_socket:
            assert roundtrip(open_socket) == "<socket>"
            assert "0x" not in str(roundtrip(threading.Thread(target=open_socket.close)))

    def test_deep_nesting_ends(self) -> None:
        """Five thousand levels, of lists, dicts or reprs, neither raise nor crash."""
        assert "[too deep]" in json.dumps(roundtrip(nested(5_000)))
        deepest = json.dumps(roundtrip(nested(5_000), max_depth=10**9))
        assert deepest == "[" * 200 + '"[too deep]"' + "]" * 200
        deep: dict[str, Any] = {}
        for _ in range(5_000):
            deep = {"d": deep}
        assert "[too deep]" in json.dumps(roundtrip(deep))
        # Which depth a repr bears differs between versions of Python.
        assert roundtrip(types.SimpleNamespace(a=nested(5_000))) == {"a": roundtrip([nested(5_000)])[0]}

    def test_the_end_of_the_stack_is_survived(self) -> None:
        """A caller that has used up its stack gets an answer too."""
        encoder = Encoder()
        refused: list[int] = []

        def down() -> int:
            try:
                left = down() + 1
            except RecursionError:
                return 0
            for value in (None, "text", "é" * 300, [], {"a": [{"b": [1]}]}, Node("n"), object()):
                # Python cannot even call `dumps` and what that calls with nothing left.
                try:
                    encoder.jsonable(value)
                    strict(encoder.dumps(value)) if left > 20 else encoder.dumps(value)
                except RecursionError:
                    refused.append(left)
            return left

        down()
        assert max(refused, default=0) <= 2

    def test_subclasses_of_plain_types_are_plain(self) -> None:
        """Subclasses of str, int and float lose their class, not their value."""

        class Text(str):
            def __str__(self) -> str:
                raise ValueError

        class Number(float):
            pass

        result = Encoder().jsonable([Text("a"), Number(1.5)])
        assert result == ["a", 1.5]
        assert [type(item) for item in result] == [str, float]

    def test_a_dict_changed_meanwhile_is_read(self) -> None:
        """A mapping that another thread changes is recorded, never an error of ours."""
        shared: dict[str, int] = {str(i): i for i in range(500)}
        user = collections.UserDict(shared)
        stop = threading.Event()

        def change() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                for data in (shared, user.data):
                    data[f"n{number}"] = 1
                    data.pop(f"n{number - 5}", None)

        old = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        thread = threading.Thread(target=change)
        thread.start()
        try:
            results = [roundtrip([shared, user]) for _ in range(30)]
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(old)
        for result in results:
            assert isinstance(result[0], dict)
            assert isinstance(result[1], dict)
            assert result[0]["7"] == 7

    @pytest.mark.parametrize("changes", [3, 100])
    def test_a_container_that_refuses_is_asked_again(self, changes: int) -> None:
        """A container that changes while read is read again, and in the end in part."""

        class Restless(collections.UserDict[str, int]):
            reads = 0

            def items(self) -> Any:
                type(self).reads += 1
                yield ("a", 1)
                if self.reads <= changes:
                    raise RuntimeError("dictionary changed size during iteration")
                yield ("b", 2)

        result = roundtrip(Restless(a=1, b=2))
        assert result["a"] == 1
        assert ("b" in result) == (changes == 3)

    def test_attrs_and_numpy_are_read_without_them(self) -> None:
        """Classes of attrs and scalars of NumPy are known by their shape."""

        class Attribute(NamedTuple):
            name: str
            repr: bool

        class Attrs:
            __attrs_attrs__ = (Attribute("a", True), Attribute("b", False), Attribute("unset", True))
            a, b = 1, 2

        generic = type("generic", (), {"__module__": "numpy", "ndim": 0, "item": lambda self: 1.5})
        stubborn = type("generic", (), {"__module__": "numpy", "ndim": 0, "item": lambda self: self})
        assert roundtrip([Attrs(), generic(), stubborn()]) == [{"a": 1}, 1.5, "<generic>"]


#: Texts that slow patterns down.
LONG = {
    "a table": ("|" + "-" * 40) * 50_000,
    "lines": ("-" * 79 + "\n") * 25_000,
    "underscores": "_" * 2_000_000,
    "names": "some_snake_case " * 125_000,
    "what might begin a key": "kq3-sk-7Zx_xai-" * 130_000,
    "a key without an end": "-----BEGIN PRIVATE KEY-----" + "A-" * 1_000_000,
    "spaces": "Bearer" + " " * 2_000_000,
    "a password": "password='" + "a" * 2_000_000,
    "no ASCII": "é-_" * 700_000,
}


def longest_wait(work: Callable[[], object]) -> float:
    """Return how long at most this thread waited to run while another one worked, in seconds."""
    worker = threading.Thread(target=work)
    longest, before = 0.0, time.perf_counter()
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    return longest


class TestBounds:
    """However large a value is, what is kept of it is bounded, and says what is missing."""

    def test_a_long_text_keeps_both_ends(self) -> None:
        """Ten megabytes of text keep head, tail and the count of what is left out."""
        result = roundtrip("head" + "x" * 10_000_000 + "tail")
        assert result.startswith("head")
        assert result.endswith("tail")
        assert "[… 9000008 characters left out …]" in result
        assert len(result) < 1_000_100

    @pytest.mark.parametrize("limit", [0, 1, 2, 7])
    def test_the_smallest_limits_hold(self, limit: int) -> None:
        """A tiny limit keeps exactly so many characters."""
        result = roundtrip("abcdefghij", max_string=limit)
        assert len(re.sub(r"\[….*…\]", "", result)) == limit

    def test_a_repr_is_short(self) -> None:
        """The repr of an unknown object keeps at most 2,000 characters."""

        class Long:
            __slots__ = ()

            def __repr__(self) -> str:
                return "long" * 100_000

        result = roundtrip(Long())
        assert len(result) < 2_100
        assert result.startswith("longlong")

    def test_large_containers_say_what_is_missing(self) -> None:
        """Large lists and dicts keep their first items and a marker that counts the rest."""
        assert roundtrip(list(range(10)), max_items=3) == [0, 1, 2, "[… 7 more]"]
        assert roundtrip({str(i): i for i in range(5)}, max_items=2) == {"0": 0, "1": 1, "…": "[… 3 more]"}
        assert len(roundtrip(range(10**9))) == 10_001
        assert roundtrip({"…": 1, "b": 2}, max_items=1) == {"…": 1, "… (2)": "[… 1 more]"}

    def test_wide_times_deep_ends(self) -> None:
        """A small value that unfolds to a thousand to the fortieth ends soon."""
        bomb: Any = [1] * 1_000
        for _ in range(40):
            bomb = [bomb] * 1_000
        started = time.perf_counter()
        text = Encoder().dumps(bomb)
        assert time.perf_counter() - started < 30
        assert len(text) < 5_000_000

    def test_many_long_texts_share_a_budget(self) -> None:
        """One long text held a thousand times takes neither its memory nor its time a thousand times."""
        started = time.perf_counter()
        for item in ("y z" * 300_000, b"y z" * 300_000, bytearray(b"\xff" * 3_000), "é" * 900_000):
            text = Encoder(max_string=10_000).dumps([item] * 3_000)
            assert len(text) < 400_000
            strict(text)
        assert time.perf_counter() - started < 30

    def test_a_long_key_is_cut(self) -> None:
        """A mapping key keeps at most 2,000 characters."""
        assert len(Encoder().dumps({"k" * 1_000_000: 1})) < 2_100

    def test_the_start_of_large_bytes(self) -> None:
        """Bytes that are no text keep all of 4 KiB, of more the first KiB."""
        whole = roundtrip(b"\xff" * 4_096)
        start = roundtrip(b"\xff" * 4_097)
        assert base64.b64decode(whole["base64"]) == b"\xff" * 4_096
        assert base64.b64decode(start["base64_start"]) == b"\xff" * 1_024
        assert start["length"] == 4_097

    @pytest.mark.parametrize(
        "unit",
        ["eyJ", "sk-", "sk-ant-", "://a:", "token:{", "token='", "-----BEGIN ", "earer ", "bearer ", "pl_",
         "\\", '"', "_", "AIza", "-----BEGIN PRIVATE KEY-----", "password: a.", "\\u0000", "token:a=", "://@"],
    )  # fmt: skip
    def test_no_text_takes_long(self, unit: str) -> None:
        """A text made to slow the patterns down takes time in proportion to its length."""
        started = time.perf_counter()
        Encoder().jsonable(unit * 20_000)
        assert time.perf_counter() - started < 30

    @pytest.mark.parametrize("kind", LONG)
    def test_no_text_keeps_other_threads_waiting(self, kind: str) -> None:
        """While a long text is made JSON, whatever it consists of, other threads run at least every 50 ms."""
        assert min(longest_wait(lambda: Encoder().dumps(LONG[kind])) for _ in range(5)) < 0.05

    @pytest.mark.parametrize(
        ("before", "unit"),
        [("sk-", "Ab1"), ("eyJ", "Ab1"), ("Bearer ", "Ab1"), ("AKIA", "AB1"), ('"password": "', 'a\\"'),
         ("password: ", "Ab1"), ("password=", "Ab1"), ('"password": [', "1, "), ("cookie: a=", "Ab1")],
    )  # fmt: skip
    def test_no_huge_secret_keeps_other_threads_waiting(self, before: str, unit: str) -> None:
        """A text of 20 MB that is one secret, or may be one up to its end, is looked at while other threads run."""
        text = before + unit * (20_000_000 // len(unit))
        assert min(longest_wait(lambda: Rules(()).mask(text)) for _ in range(3)) < 0.05

    @pytest.mark.parametrize("kind", ["list", "set", "text"])
    def test_nothing_large_among_what_comes_again_keeps_other_threads_waiting(self, kind: str) -> None:
        """Of metadata and the like, which are made once and kept, no large value keeps others waiting."""
        large = {"list": [1] * 5_000_000, "set": set(range(300_000)), "text": "x" * 100_000_000}[kind]

        def made(encoder: Encoder, metadata: Any) -> tuple[str, ...]:
            return (str(len(metadata["v"])),)

        assert min(longest_wait(lambda: Encoder().made_of(({"v": large},), made)) for _ in range(3)) < 0.05

    def test_no_very_long_text_keeps_other_threads_waiting(self) -> None:
        """Of a text of which only the ends are kept, too, no single look at all of it keeps others waiting."""
        text = "a longer one, " * 10_000_000
        assert min(longest_wait(lambda: Encoder().dumps({"text": text})) for _ in range(2)) < 0.05


AROUND = ["{}", "see {} there", '{{"x": "{}"}}', "a\\n{}\\n", "%3D{}&", "({})", "é{}é"]
SECRET_NAMES = [
    "myAccessToken",
    "DBPassphrase",
    "api_key",
    "apikey",
    "api-key",
    "x-api-key",
    "X-API-KEY",
    "OPENAI_API_KEY",
    "openaiApiKey",
    "OpenAIAPIKey",
    "API_KEY_2",
    "authorization",
    "Proxy-Authorization",
    "password",
    "passwd",
    "user_password",
    "dbpassword",
    "passWord",
    "pwd",
    "passphrase",
    "secret",
    "client_secret",
    "clientSecret",
    "token",
    "access_token",
    "accessToken",
    "refresh_token",
    "auth_token",
    "bearer_token",
    "id_token",
    "session_token",
    "HF_TOKEN",
    "private_key",
    "privateKey",
    "cookie",
    "Set-Cookie",
    "credentials",
    "aws_secret_access_key",
    "connection_string",
    "Ocp-Apim-Subscription-Key",
]
OTHER_NAMES = [
    "input_tokens",
    "max_tokens",
    "token_count",
    "total_tokens",
    "tokens",
    "next_page_token",
    "eos_token",
    "first_token",
    "author",
    "keyword",
    "key",
    "primary_key",
    "session_id",
    "secretary",
    "passenger",
    "tokenizer",
    "prompt_tokens",
    "monkey",
]


class TestDefaultRedaction:
    """Without any setting, what names or looks like a secret never leaves."""

    @pytest.mark.parametrize("name", SECRET_NAMES)
    def test_a_secret_by_its_name(self, name: str) -> None:
        """What stands under a name of a secret is replaced whole, in data, JSON text and reprs."""
        assert roundtrip({name: "hunter2"}) == {name: REDACTED}
        shouted = name.upper() if name.islower() else name
        assert roundtrip({shouted: ["hunter2", {"a": 1}]}) == {shouted: REDACTED}
        assert roundtrip({name: 12345, "n": 1}) == {name: REDACTED, "n": 1}
        text = json.dumps({"a": 1, name: "hun\\ter\"2, 'x", "n": "kept"})
        assert strict(roundtrip(text)) == {"a": 1, name: REDACTED, "n": "kept"}
        twice = roundtrip(json.dumps({"args": text}))
        assert strict(strict(twice)["args"]) == {"a": 1, name: REDACTED, "n": "kept"}
        assert "hunter2" not in roundtrip(repr({name: "hunter2"}))
        assert "hunter2" not in str(roundtrip(types.SimpleNamespace(**{name: "hunter2"})))

    @pytest.mark.parametrize("name", OTHER_NAMES)
    def test_other_names_stay(self, name: str) -> None:
        """Counts of tokens and other harmless names keep their values."""
        assert roundtrip({name: [5]}) == {name: [5]}
        assert roundtrip(f'{{"{name}": "kept"}}') == f'{{"{name}": "kept"}}'

    def test_empty_values_stay(self) -> None:
        """None, booleans and empty values under a secret's name say nothing and stay."""
        value = {"api_key": None, "password": "", "secret": True, "token": [], "cookie": {}}
        assert roundtrip(value) == value

    def test_log_probabilities_keep_their_tokens(self) -> None:
        """The tokens that a model lists with their log-probabilities are no secrets."""
        value = [{"token": "Hi", "logprob": -0.1}]
        assert roundtrip(value) == value

    def test_raw_headers(self) -> None:
        """Pairs of a header's name and value are redacted like a mapping."""
        assert roundtrip([(b"authorization", b"abc"), ("Cookie", "a=b"), ("accept", "x")]) == [
            ["authorization", REDACTED],
            ["Cookie", REDACTED],
            ["accept", "x"],
        ]

    @pytest.mark.parametrize("kind", SECRETS)
    @pytest.mark.parametrize("around", AROUND)
    def test_a_secret_by_its_shape(self, kind: str, around: str) -> None:
        """What looks like an API key is cut out of any text, the rest stays."""
        result = roundtrip(around.format(SECRETS[kind]))
        assert result == around.format(REDACTED)

    @pytest.mark.parametrize("kind", SECRETS)
    def test_a_secret_anywhere(self, kind: str) -> None:
        """A key in bytes, mapping keys, reprs, errors, sets, messages and documents is found as well."""
        secret = SECRETS[kind]
        values = [
            secret.encode(), b"\xff " + secret.encode(), bytearray(secret.encode()), {secret: 1},
            {(1, secret): 1},
            {secret.encode(): 1}, types.SimpleNamespace(a=secret), ValueError(secret), {secret}, Node(secret),
            HumanMessage(secret), Document(secret), pathlib.PurePosixPath(f"a {secret}"),
            re.compile(secret),
            {"a": [{"b": (secret,)}]}, StringPromptValue(text=secret), collections.UserString(secret),
        ]  # fmt: skip
        for value in values:
            text = Encoder().dumps(value)
            for part in (secret, secret[-12:], base64.b64encode(b"\xff " + secret.encode()).decode()):
                assert part not in text, value

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("Authorization: Bearer abc123def", "Authorization: [redacted]"),
            ("say Bearer abc123def.", "say Bearer [redacted]"),
            (
                "Bearer abc123defbearer  def456ghi, Bearer a1b2c3Bearer d4e5f6Bearer",
                "Bearer [redacted]  [redacted], Bearer [redacted] [redacted]",
            ),
            ("curl -H 'Authorization: Basic dXNlcjpw' x", "curl -H 'Authorization: [redacted]' x"),
            ("postgres://user:p@ss#1@host/db", "postgres://[redacted]@host/db"),
            ("https://x.org/p?token=abc&n=1", "https://x.org/p?token=[redacted]&n=1"),
            ("DB_PASSWORD=hunter2\nN=1", "DB_PASSWORD=[redacted]\nN=1"),
            ("Cookie: sid=abc; b=c\nnext", "Cookie: [redacted]\nnext"),
            ('{"password": 12345, "n": 1}', '{"password": "[redacted]", "n": 1}'),
            ('{"credentials": {"user": "u"}, "n": 1}', '{"credentials": "[redacted]", "n": 1}'),
            ('{"password": "cut off', '{"password": "[redacted]'),
            ("Client(api_key='abc', n=1)", "Client(api_key='[redacted]', n=1)"),
        ],
    )
    def test_secrets_in_common_notations(self, text: str, kept: str) -> None:
        """Headers, URLs, environments, JSON and calls lose the secret only."""
        assert roundtrip(text) == kept

    @pytest.mark.parametrize(
        "text",
        [
            "the bearer of certificates", "Password: required", "token = read()", "f(token=token)",
            "if password == x:", "risk-taking-and-more-things-here", "pl_request_id_callback",
            "key: value: 7",
            "task-0123456789abcdef0123456789abcdef", "mail a@b.org, see http://x.org:80/a@b", "data:eyJ",
            "--- a ---", "hf_hub_download_and_more", '"password": ""',
        ],
    )  # fmt: skip
    def test_ordinary_text_stays(self, text: str) -> None:
        """Words, code and addresses that only resemble a secret stay as they are."""
        assert roundtrip(text) == text

    @pytest.mark.parametrize("kind", SECRETS)
    def test_no_half_of_a_secret_stays(self, kind: str) -> None:
        """A secret that the limit would cut in half is gone before the cut."""
        secret = SECRETS[kind]
        for limit in range(10, 60, 7):
            for before in range(0, 40, 9):
                text = roundtrip("." * before + " " + secret + " " + "." * 90, max_string=limit)
                assert secret[:8] not in text
                assert secret[-8:] not in text

    @pytest.mark.parametrize("first", [*SECRETS, "url", "header"])
    @pytest.mark.parametrize("between", ["", "\n"])
    def test_secrets_back_to_back(self, first: str, between: str) -> None:
        """Of two secrets one behind the other nothing of either stays, also in JSON, and in JSON in JSON."""
        kinds = {**SECRETS, "url": "https://ann:hunter2345@", "header": "Bearer abcdefghij0123456789"}
        for second in kinds:
            text = kinds[first] + between + kinds[second]
            for form in (text, json.dumps(text), json.dumps(json.dumps(text))):
                masked = Rules(()).mask(form)
                assert Rules((), piece=50).mask(form) == masked
                for secret in ("MIIEo" if kind == "pem" else kinds[kind][-8:-1] for kind in (first, second)):
                    assert secret not in masked, form

    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            ("ghp_0123456789abcdefghij-main", "[redacted]-main"),
            ("AKIAIOSFODNN7EXAMPLE.", "[redacted]."),
            ("backup-AKIAIOSFODNN7EXAMPLE-2024-01-01.tar.gz", "backup-[redacted]-2024-01-01.tar.gz"),
            ("see AKIAIOSFODNN7EXAMPLE_report_final.csv", "see [redacted]_report_final.csv"),
            ("AKIAIOSFODNN7EXAMPLErisk-assessment-of-a-task", "[redacted]risk-assessment-of-a-task"),
            ("AKIAIOSFODNN7EXAMPLEauthorization: Basic dXNlcjpw", "[redacted]authorization: [redacted]"),
            ("password=sk-abcdefghijklmnopqrstuv", "password=[redacted]"),
            (f"{SECRETS['pem']}xoxb-0123456789-abcdefgh{SECRETS['pem']}", "[redacted]" * 3),
            ("AKIAIOSFODNN7EXAMPLE" + "hf_0123456789abcdefxai-0123456789abcdef" * 40 + ".log", "[redacted].log"),
        ],
    )
    def test_what_is_directly_behind_a_secret(self, text: str, kept: str) -> None:
        """What is behind a secret without a break stays, unless it is a secret itself."""
        assert roundtrip(text) == kept

    @pytest.mark.parametrize("text", ["[redacted].example-host.internal", "Dear [redacted]_customer_since_2019"])
    def test_what_was_redacted_before(self, text: str) -> None:
        """A text that has our mark in it already, the user's own or ours, stays as it is."""
        assert roundtrip(text) == text
        assert Rules((), piece=20).mask(text) == text

    def test_extra_names_and_patterns(self) -> None:
        """More names and patterns add to the default, in data and in JSON text."""
        encoder = Encoder(extra=["Customer", "id", re.compile(r"\d{4}-\d{4}")])
        value = {"customer": "Ann", "ID": 7, "password": "p", "note": "card 1234-5678", "x": '{"id": "a"}'}
        assert encoder.jsonable(value) == {
            "customer": REDACTED,
            "ID": REDACTED,
            "password": REDACTED,
            "note": f"card {REDACTED}",
            "x": f'{{"id": "{REDACTED}"}}',
        }
        assert Encoder(extra="customer").jsonable({"customer": "Ann", "c": 1}) == {
            "customer": REDACTED,
            "c": 1,
        }

    def test_many_names_stay_few_in_memory(self) -> None:
        """The verdicts on names are remembered within a bound."""
        encoder = Encoder()
        for i in range(20):
            encoder.jsonable({f"name {i} {j}": 1 for j in range(1_000)})
        assert encoder._rules is not None
        assert len(encoder._rules.verdicts) <= 4_096


class TestOwnRedactor:
    """A redactor of the user's decides alone, and where it fails nothing leaks."""

    def test_it_sees_every_leaf_with_its_key(self) -> None:
        """Each text, number and boolean is shown once, with the nearest key above it."""
        seen: list[tuple[str, Any]] = []

        def look(key: str, value: Any) -> Any:
            seen.append((key, value))
            return value

        value = {"a": [1, {"b": True}], "n": None, "f": math.nan, "big": 2**70, "o": Node("x"), "y": b"z"}
        roundtrip(value, redact=look)
        assert seen == [
            ("a", 1),
            ("b", True),
            ("f", "NaN"),
            ("big", str(2**70)),
            ("name", "x"),
            ("y", "z"),
        ]
        seen.clear()
        roundtrip("top", redact=look)
        assert seen == [("", "top")]

    def test_it_replaces_the_default(self) -> None:
        """With a redactor, neither the default nor `extra` applies."""
        value = {"password": SECRETS["openai"], "customer": "Ann"}
        assert roundtrip(value, redact=lambda key, item: item, extra=["customer"]) == value

    def test_what_it_returns_is_made_safe(self) -> None:
        """What a redactor returns may be anything, and is not shown to it again."""
        returned = {"nan": math.nan, "s": "\ud800\0", "o": object(), "c": cyclic_list(), "long": "x" * 1_000}
        calls: list[Any] = []

        def replace(key: str, value: Any) -> Any:
            calls.append(value)
            return returned if value == "dict" else value + "\0" if isinstance(value, str) else math.inf

        result = roundtrip(["dict", "text", 1, True], redact=replace, max_string=300)
        assert len(calls) == 4
        assert result[0]["nan"] == "NaN"
        assert result[0]["s"] == "\ufffd\ufffd"
        assert result[0]["o"] == "<object>"
        assert len(result[0]["long"]) < 400
        assert result[1:] == ["text\ufffd", "Infinity", "Infinity"]

    @pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, RecursionError])
    def test_it_fails_closed(self, error: type[BaseException]) -> None:
        """Where a redactor raises, whatever it raises, the value is gone and the rest goes on."""

        def fail(key: str, value: Any) -> Any:
            if "hunter2" in str(value):
                raise error("hunter2")
            return value

        value = ["hunter2", {"a": "hunter2"}, b"\xffhunter2", types.SimpleNamespace(a="hunter2"), "kept"]
        text = Encoder(fail).dumps(value)
        assert "hunter2" not in text
        assert base64.b64encode(b"\xffhunter2").decode() not in text
        result = strict(text)
        assert result[0] == "[redaction failed]"
        assert result[-1] == "kept"


HOSTILE: dict[str, Any] = {
    "repr": BadRepr(), "exit": ExitRepr(), "class": BadClass(), "getattribute": BadGetattribute(),
    "metaclass": OfBadMeta(), "enum": Color.RED, "object": object(), "mapping": BadMapping(),
    "dict": BadDict(a=1),
}  # fmt: skip
texts = st.text(st.characters(codec=None), max_size=40)
keys = st.one_of(texts, st.integers(), st.floats(), st.none(), st.binary(max_size=9), st.tuples(st.integers(), texts))


class Plan(NamedTuple):
    """An object still to be built: hypothesis itself cannot handle the hostile ones."""

    kind: str
    inner: Any


plans = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), texts, st.binary(max_size=40),
        st.complex_numbers(), st.datetimes(), st.decimals(), st.uuids(),
        st.builds(Plan, st.sampled_from(sorted(HOSTILE)), st.none()),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5),
        st.builds(Plan, st.sampled_from(["node", "point", "namespace", "tuple"]), inner),
    ),
    max_leaves=20,
)  # fmt: skip


#: Values near what the default redaction looks for.
telling = st.recursive(
    st.one_of(
        st.none(), st.integers(-(2**64), 2**64), st.floats(), texts, st.sampled_from(sorted(SECRETS.values())),
        st.sampled_from(["password=hunter2", 'an "api_key": "abcdefgh"', "https://ann:pw@host/", "Bearer abc123def4"]),
        st.builds(HumanMessage, texts), st.builds(AIMessage, texts, name=texts),
        st.builds(lambda text: Document(text, metadata={"source": text}), texts),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["password", "token", "logprob", "name", "X-Api-Key", 1, True]), inner),
        st.tuples(st.sampled_from(["Authorization", "accept", b"cookie"]), inner),
    ),
    max_leaves=12,
)  # fmt: skip


#: Secrets longer than a look ahead.
LONG_SECRETS = {
    "jwt": "eyJ" + "hbGciOi" * 500 + ".eyJ" + "zdWIi" * 500 + ".dozjgNryP4J3jVmNHl0w5N",
    "bearer": "Bearer" + " " * 3_000 + "abcdefghij0123456789",
    "token": "xai-" + "abcdefg123" * 300,
    "pem": "-----BEGIN PRIVATE KEY-----" + "MIIEowIBAAKC\n" * 300 + "-----END PRIVATE KEY-----",
    "password": "password = '" + "hunter2 " * 500 + "'",
}
#: What a secret begins with, or what stands before one, and what is in it.
BEGINNINGS = [
    "sk-", "xai-", "GOCSPX-", "github_pat_", "ghp_", "pl_", "pl_live_", "pcsk_", "sk_live_", "lsv2_pt_", "eyJ", "AKIA",
    "AIza", "-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----", "://", "Bearer ", "password='", '"api_key": "',
    "token=", "api_key: ", "\\n", "%2F", "'", '"', "@", ":", "=", ".", " ", "\n", "é",
]  # fmt: skip
pieces_of_text = st.one_of(
    st.sampled_from([*SECRETS.values(), *LONG_SECRETS.values()]),
    st.sampled_from(BEGINNINGS),
    st.tuples(st.sampled_from(sorted(SECRETS.values())), st.integers(1, 60)).map(lambda cut: cut[0][: cut[1]]),
    st.tuples(st.sampled_from("a-_ .:=1A\\"), st.sampled_from([1, 7, 19, 40, 300, 1_500, 3_000])).map(
        lambda run: run[0] * run[1]
    ),
    st.text("abkx-_ .:=\"'\\\n1AJ/@%", max_size=30),
)


def built(plan: Any) -> Any:
    """Build the value that a plan describes."""
    if isinstance(plan, Plan):
        if plan.kind in HOSTILE:
            return HOSTILE[plan.kind]
        inner = built(plan.inner)
        return {
            "node": Node(inner, inner),
            "point": Point(inner, inner),
            "namespace": types.SimpleNamespace(a=inner),
            "tuple": (inner, 1),
        }[plan.kind]
    if isinstance(plan, list):
        return [built(item) for item in plan]
    if isinstance(plan, dict):
        return {key: built(item) for key, item in plan.items()}
    return plan


def size(value: Any) -> tuple[int, int, int]:
    """Return depth, longest container and longest text; keys up to 200 characters are never cut."""
    if isinstance(value, str):
        return 0, 0, len(value)
    if isinstance(value, dict):
        inner = [size(item) for item in value.values()] + [(0, 0, len(key)) for key in value if len(key) > 200]
    elif isinstance(value, list):
        inner = [size(item) for item in value]
    else:
        return 0, 0, 0
    depth, wide, long = ([0, *column] for column in zip(*inner, strict=True)) if inner else ([0], [0], [0])
    return 1 + max(depth), max(len(value), *wide), max(long)


class TestProperties:
    """What holds for every value that hypothesis can think of."""

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(plans)
    def test_always_strict_and_bounded(self, plan: Any) -> None:
        """Whatever the value, the result is strict JSON within the limits."""
        value = built(plan)
        result = roundtrip(value, max_string=30, max_depth=3, max_items=3)
        depth, wide, long = size(result)
        # Bytes become a dict of one level more and three entries; markers take a little more.
        assert depth <= 4
        assert wide <= 4
        assert long <= 30 + 40
        assert strict(Encoder().dumps(value)) == Encoder().jsonable(value)

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(plans, telling), st.sampled_from([(1_000_000, 32, 10_000), (30, 3, 3)]))
    def test_text_is_that_of_the_data(self, plan: Any, limits: tuple[int, int, int]) -> None:
        """JSON text, which is mostly made in a quicker way, holds just what the data holds."""
        longest, deepest, widest = limits
        encoder = Encoder(max_string=longest, max_depth=deepest, max_items=widest)
        value = built(plan)
        for dumps, data in (
            (encoder.dumps, encoder.jsonable),
            (encoder.dumps_shaped, encoder.shaped),
            (encoder.dumps_schema, encoder.schema),
        ):
            expected = data(value)
            assert [strict(dumps(value)), strict(dumps([value, value]))[:1]] == [expected, data([value, value])[:1]]
            assert strict(dumps(value)) == expected

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        plans,
        st.sampled_from(sorted(SECRETS)),
        st.sampled_from(["dict", "list", "text", "key", "bytes", "obj"]),
    )
    def test_planted_secrets_never_survive(self, plan: Any, kind: str, place: str) -> None:
        """A secret planted beside, in or under any value is nowhere in the result."""
        value = built(plan)
        secret = SECRETS[kind]
        planted = {
            "dict": {"v": value, "x": secret},
            "list": [value, [secret, value]],
            "text": f"{value if type(value) is str else ''} {secret}",
            "key": {secret: value},
            "bytes": [secret.encode() + b"\xff", value],
            "obj": Node(value if type(value) is str else "n", types.SimpleNamespace(s=secret)),
        }[place]
        for limit in (1_000_000, 25):
            text = Encoder(max_string=limit).dumps({"in": planted, "password": [secret, value]})
            assert secret not in text
            assert secret[-10:] not in text

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(pieces_of_text, max_size=20).map("".join), st.sampled_from([50, 211, 1_000, 4_000]))
    def test_a_text_in_pieces_is_redacted_as_a_whole(self, text: str, piece: int) -> None:
        """Long texts, which are looked at piece by piece, lose just what they would lose if looked at in one go."""
        assert Rules((), piece=piece).mask(text) == Rules((), piece=1_000_000).mask(text)

    @pytest.mark.parametrize(
        "secret",
        [*SECRETS.values(), *LONG_SECRETS.values()],
        ids=[*SECRETS, *(f"long {kind}" for kind in LONG_SECRETS)],
    )
    @pytest.mark.parametrize("filler", ["a ", "-", "= "])
    def test_no_border_of_pieces_cuts_a_secret(self, secret: str, filler: str) -> None:
        """Wherever in a long text a secret stands, it is gone."""
        whole, pieces = Rules((), piece=1_000_000), Rules((), piece=500)
        for before in range(400, 520, 3):
            text = (filler * 400)[:before] + " " + secret + " " + filler * 1_500
            masked = pieces.mask(text)
            assert masked == whole.mask(text)
            assert secret not in masked

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(plans)
    def test_a_failing_redactor_leaks_nothing(self, plan: Any) -> None:
        """With a redactor that always raises, no leaf of the value is kept."""

        def fail(key: str, value: Any) -> Any:
            raise ValueError(value)

        def leaves_of(item: Any) -> Iterator[Any]:
            if isinstance(item, dict):
                for key, inner in item.items():
                    if (key, inner) == ("type", "bytes") or (key == "length" and "type" in item):
                        continue
                    yield from leaves_of(inner)
            elif isinstance(item, list):
                for inner in item:
                    yield from leaves_of(inner)
            else:
                yield item

        for leaf in leaves_of(roundtrip(built(plan), redact=fail)):
            placeholder = isinstance(leaf, str) and leaf.startswith(("[", "<"))
            assert leaf is None or placeholder, leaf
