"""What an application sets holds, everywhere; a setting that can't hold is refused where it is made."""

from __future__ import annotations

import os
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from openai import BadRequestError

import pltrace
from pltrace import ConfigError, ExportResult, traced
from tests.support.http_double import HANG
from tests.support.programs import rows, run, stored
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ApiError, Reply, ScriptedOpenAI
from tests.support.traces import chat, spans


class Exporter:
    """An exporter that takes all."""

    def __init__(self, name: Any = "own") -> None:
        self.name = name

    def export(self, batch: Any) -> ExportResult:
        """Take a batch."""
        return ExportResult("delivered")

    def shutdown(self) -> None:
        """Do nothing."""


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"api_key": 5}, "api_key=5", "non-empty string"),
    ({"api_key": ""}, "api_key=''", "non-empty string"),
    ({"base_url": "api.promptlayer.com"}, "base_url='api.promptlayer.com'", "http:// or https://"),
    ({"base_url": "ftp://host"}, "base_url='ftp://host'", "http:// or https://"),
    ({"base_url": "http://"}, "base_url='http://'", "http:// or https://"),
    ({"base_url": "http://host:99999"}, "base_url='http://host:99999'", "http:// or https://"),
    ({"base_url": ""}, "base_url=''", "http:// or https://"),
    ({"base_url": 5}, "base_url=5", "http:// or https://"),
    ({"base_url": "http://host?x=1"}, "base_url='http://host?x=1'", "without spaces"),
    ({"base_url": "http://host#part"}, "base_url='http://host#part'", "without spaces"),
    ({"base_url": "http://ho st"}, "base_url='http://ho st'", "without spaces"),
    ({"base_url": "http://user:word@host"}, "base_url=", "without spaces, user"),
    ({"client": 5}, "client=5", "client of promptlayer"),
    ({"client": object()}, "client=", "client of promptlayer"),
    ({"store": "Memory"}, "store='Memory'", '"memory"'),
    ({"store": ":memory:"}, "store=':memory:'", '"memory"'),
    ({"store": "http://host"}, "store='http://host'", "a file path"),
    ({"store": "~nobody-of-that-name/x.db"}, "store='~nobody", "a file path"),
    ({"client": SimpleNamespace(api_key="k", base_url="nowhere")}, "base_url='nowhere'", "http:// or https://"),
    ({"store": 5}, "store=5", "a file path"),
    ({"store": ""}, "store=''", "a file path"),
    ({"store": "/"}, "store='/'", "this is a folder"),
    ({"exporters": 5}, "exporters=5", "list of exporters"),
    ({"exporters": "own"}, "exporters='own'", "list of exporters"),
    ({"exporters": Exporter()}, "exporters=", "list of exporters"),
    ({"exporters": [object()]}, "exporters=", "no name, export and shutdown"),
    ({"exporters": [Exporter]}, "exporters=", "class"),
    ({"exporters": [Exporter(5)]}, "name=5", "non-empty string"),
    ({"exporters": [Exporter("a"), Exporter("a")]}, "exporters=", "same name"),
    ({"exporters": [Exporter("promptlayer")], "api_key": "k"}, "exporters=", "same name"),
    ({"service": 5}, "service=5", "non-empty string"),
    ({"service": ""}, "service=''", "non-empty string"),
    ({"tags": "one"}, "tags='one'", "list or tuple"),
    ({"tags": 5}, "tags=5", "list or tuple"),
    ({"tags": ["a", 5]}, "tags=['a', 5]", "got 5"),
    ({"tags": [""]}, "tags=['']", "non-empty strings"),
    ({"metadata": "x"}, "metadata='x'", "dict with string keys"),
    ({"metadata": []}, "metadata=[]", "dict with string keys"),
    ({"metadata": {5: "x"}}, "metadata={5: 'x'}", "string keys"),
    ({"capture": "some"}, "capture='some'", 'True, False, "inputs" or "outputs"'),
    ({"capture": 2}, "capture=2", 'True, False, "inputs" or "outputs"'),
    ({"redact": 5}, "redact=5", "list of key names"),
    ({"redact": "password"}, "redact='password'", "list of key names"),
    ({"redact": ["a", 5]}, "redact=['a', 5]", "list of key names"),
    ({"sample": 1.5}, "sample=1.5", "0.0 to 1.0"),
    ({"sample": -0.1}, "sample=-0.1", "0.0 to 1.0"),
    ({"sample": float("nan")}, "sample=nan", "0.0 to 1.0"),
    ({"sample": "1"}, "sample='1'", "0.0 to 1.0"),
    ({"sample": True}, "sample=True", "0.0 to 1.0"),
    ({"enabled": 1}, "enabled=1", "True, False or None"),
    ({"enabled": "yes"}, "enabled='yes'", "True, False or None"),
    ({"libraries": ["mylib"]}, "libraries=['mylib']", "dict of package name"),
    ({"libraries": []}, "libraries=[]", "dict of package name"),
    ({"libraries": {5: {}}}, "libraries=5", "non-empty string"),
    ({"libraries": {"mylib.core": {}}}, "libraries['mylib.core']", "such as 'mylib'"),
    ({"libraries": {"my-lib": {}}}, "libraries['my-lib']", "such as 'my_lib'"),
    ({"libraries": {"mylib": False}}, "libraries['mylib']=False", "enabled, tags and capture"),
    ({"libraries": {"mylib": {"enable": False}}}, "libraries['mylib']", "enabled, tags and capture"),
    ({"libraries": {"mylib": {"enabled": 0}}}, "libraries['mylib']: enabled=0", "True or False"),
    ({"libraries": {"mylib": {"tags": "a"}}}, "libraries['mylib']: tags='a'", "list or tuple"),
    ({"libraries": {"mylib": {"capture": "no"}}}, "libraries['mylib']: capture='no'", "True, False"),
]


@pytest.mark.parametrize(("settings", "named", "allowed"), WRONG, ids=[named for _, named, _ in WRONG])
def test_wrong_argument(tmp_path: Path, settings: dict[str, Any], named: str, allowed: str) -> None:
    """A wrong argument raises a `ConfigError`, also a `ValueError`, naming it, its value, and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        pltrace.configure(**{"store": tmp_path / "traces.db", **settings})
    assert isinstance(caught.value, ValueError)
    assert named in str(caught.value)
    assert allowed in str(caught.value)


def test_no_such_argument() -> None:
    """A misspelt argument is refused by Python itself."""
    with pytest.raises(TypeError, match="apikey"):
        pltrace.configure(apikey="x")  # type: ignore[call-arg]


def test_a_wrong_argument_changes_nothing(local: Path) -> None:
    """What is on stays on, as it was, when a later `configure` is refused."""
    with pytest.raises(ConfigError):
        pltrace.configure(sample=7)
    with traced("still on"):
        pass
    assert [span["name"] for span in spans(local)] == ["still on"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tags": [], "metadata": {}, "libraries": {}, "exporters": []},
        {"tags": ("a",), "metadata": {"k": object()}, "capture": False, "sample": 0, "service": "app"},
        {"redact": re.compile}, {"redact": ["a", re.compile("b")]}, {"redact": {"a", "b"}},
        {"exporters": (Exporter(),)},
    ],
)  # fmt: skip
def test_right_arguments(tmp_path: Path, settings: dict[str, Any]) -> None:
    """All that is documented is taken."""
    pltrace.configure(store=tmp_path / "traces.db", **settings)
    assert pltrace.flush(5.0)


# Arguments and environment.


def test_tags_and_metadata_go_with_everything(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application's tags, from environment and argument, and its metadata are on every span."""
    monkeypatch.setenv("PLTRACE_TAGS", "from-env, both ,")
    pltrace.configure(store=local, tags=["both", "from-argument"], metadata={"region": "eu"})
    with traced("block", tags=["own"], metadata={"k": 1}):
        FakeListChatModel(responses=["x"]).invoke("Hi")
    block, call = spans(local)
    assert block["tags"] == ["from-env", "both", "from-argument", "own"]
    assert block["metadata"] == {"region": "eu", "k": 1}
    assert call["request_tags"] == ["from-env", "both", "from-argument", "own"]
    assert call["request_metadata"].items() >= {"region": "eu", "k": "1"}.items()


def test_settings_replace_each_other(local: Path) -> None:
    """A second `configure` replaces all settings of the first."""
    pltrace.configure(store=local, tags=["first"], capture=False)
    pltrace.configure(store=local, metadata={"second": True})
    with traced("block") as span:
        span.update(output=1)
    (block,) = spans(local)
    assert (block["tags"], block["metadata"]) == ([], {"second": True})


@pytest.mark.parametrize("store", ["same", "another"])
def test_settings_replaced_inside_a_block(
    deliver: Callable[..., None], promptlayer: PromptLayerServer, tmp_path: Path, store: str
) -> None:
    """What is open when `configure` replaces the settings is delivered under the new ones, with its ids and scores."""
    deliver()
    told: list[int] = []
    model = FakeListChatModel(responses=["answer"])
    with traced("outer", tags=["outer"], on_request=lambda request: told.append(int(request))) as outer:
        deliver(tags=["new"], **({} if store == "same" else {"store": tmp_path / "another.db"}))
        model.invoke("late")
        with traced("inner"):
            model.invoke("later")
        outer.score(90)
    assert pltrace.flush(10.0)
    assert sorted(span["name"] for span in promptlayer.spans.values()) == [
        "FakeListChatModel", "FakeListChatModel", "inner", "outer",
    ]  # fmt: skip
    ids = sorted(log["id"] for log in promptlayer.request_logs)
    assert sorted(told) == sorted(request.wait(10.0) or 0 for request in outer.requests) == ids
    assert sorted(score["request_id"] for score in promptlayer.operations) == ids


def test_who_waits_for_an_id_waits_on(deliver: Callable[..., None], promptlayer: PromptLayerServer) -> None:
    """Other settings for the same store lose no `on_request` and no handle that still waits for its id."""
    told: list[int] = []
    promptlayer.fault = HANG
    deliver()
    with traced("block", on_request=lambda request: told.append(int(request))) as span:
        FakeListChatModel(responses=["answer"]).invoke("hello")
    (request,) = span.requests
    deliver(tags=["new"])
    promptlayer.fault = None
    promptlayer.release()
    assert pltrace.flush(30.0)
    assert [request.wait(10.0)] == told == [log["id"] for log in promptlayer.request_logs]


@pytest.mark.parametrize("stores", [1, 2], ids=["same", "another"])
def test_the_counts_stay_right_under_other_settings(tmp_path: Path, stores: int) -> None:
    """However often and quickly `configure` replaces the settings, each store counts what happened once."""
    paths = [tmp_path / f"{number}.db" for number in range(stores)]
    for number in range(10):
        pltrace.configure(enabled=True, store=paths[number % stores], tags=[str(number)])
        for _ in range(7):
            with traced("block"):
                FakeListChatModel(responses=["answer"]).invoke("hello")
        with traced("left out", sample=0.0):
            FakeListChatModel(responses=["answer"]).invoke("hello")
    pltrace.shutdown()
    for path in paths:
        names = stored(path)
        assert len(names) == 140 // stores
        counted = {row["reason"]: row["count"] for row in rows(path, "SELECT reason, count FROM counters")}
        assert counted == {"recorded": len(names), "runs_seen": 80 // stores, "sampled_out": 20 // stores}


def test_nothing_stays_of_former_settings(deliver: Callable[..., None], tmp_path: Path) -> None:
    """Each `configure` lets go of the threads and files of the one before, and `shutdown` of all."""
    for number in range(5):
        deliver(tags=[str(number)])
        with traced("block", on_request=print):
            FakeListChatModel(responses=["answer"]).invoke("hello")
        assert pltrace.flush(10.0)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("pltrace-")]
    pltrace.shutdown()
    for thread in threads:
        thread.join(10.0)
    names = [thread.name for thread in threads if not thread.is_alive()]
    assert len(set(names)) == len(names) == len(threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pltrace-")]
    if os.path.isdir("/proc/self/fd"):
        opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_arguments_win(tmp_path: Path, promptlayer: PromptLayerServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win over the environment, each by itself."""
    for name, value in {
        "PROMPTLAYER_API_KEY": "pl_wrong", "PROMPTLAYER_BASE_URL": "http://127.0.0.1:9", "PLTRACE_SERVICE": "env",
        "PLTRACE_STORE": "memory", "PLTRACE_CAPTURE": "false", "PLTRACE_SAMPLE": "0.0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    path = tmp_path / "traces.db"
    pltrace.configure(
        api_key=promptlayer.api_key, base_url=promptlayer.url + "/", service="argument", store=path, capture=True,
        sample=1.0,
    )  # fmt: skip
    assert _called() == {"value": "in"}
    assert pltrace.flush(10.0)
    (span,) = promptlayer.spans.values()
    assert span["resource"]["attributes"]["service.name"] == "argument"
    assert span["attributes"]["function_input"] == '{"value":"in"}'
    assert stored(path) == ["echo"]


def test_environment_holds(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """What no argument says is taken from the environment."""
    path = tmp_path / "from-env.db"
    program = run(
        "import pltrace\n@pltrace.traced\ndef echo(value): return value\necho('in')", tmp_path,
        PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url, PLTRACE_SERVICE="env",
        PLTRACE_STORE=path, PLTRACE_CAPTURE="inputs", PLTRACE_SAMPLE="1",
    )  # fmt: skip
    assert (program.code, program.err) == (0, "")
    (span,) = promptlayer.spans.values()
    assert span["resource"]["attributes"]["service.name"] == "env"
    assert "function_input" in span["attributes"]
    assert "function_output" not in span["attributes"]
    assert stored(path) == ["echo"]


def test_service_is_the_program(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """With nothing said, the service is named after the program."""
    run(
        "import pltrace\nwith pltrace.traced('block'): pass", tmp_path,
        PROMPTLAYER_API_KEY=promptlayer.api_key, PROMPTLAYER_BASE_URL=promptlayer.url,
    )  # fmt: skip
    (span,) = promptlayer.spans.values()
    assert span["resource"]["attributes"]["service.name"] == "program0"


def test_sample_of_the_environment(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`PLTRACE_SAMPLE=0` records nothing."""
    monkeypatch.setenv("PLTRACE_SAMPLE", "0")
    pltrace.configure(store=local)
    _called()
    assert spans(local) == []


@pytest.mark.parametrize("value", ["true", "False", "1", "0", "inputs", "OUTPUTS", ""])
def test_capture_words(local: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """`PLTRACE_CAPTURE` takes the words that people write; an empty variable is none."""
    monkeypatch.setenv("PLTRACE_CAPTURE", value)
    pltrace.configure(store=local)
    _called()
    (span,) = spans(local)
    assert (span["input"] is not None) == (value.lower() in ("true", "1", "inputs", ""))
    assert (span["output"] is not None) == (value.lower() in ("true", "1", "outputs", ""))


def test_client(promptlayer: PromptLayerServer, tmp_path: Path) -> None:
    """A `promptlayer` client of the application's own brings key and address, and scores go through it."""
    from promptlayer import PromptLayer

    client = PromptLayer(api_key=promptlayer.api_key, base_url=promptlayer.url)
    pltrace.configure(client=client, store=tmp_path / "traces.db")
    with traced("block") as span:
        FakeListChatModel(responses=["x"]).invoke("Hi")
    span.score(55)
    assert pltrace.flush(20.0)
    assert [operation["score"] for operation in promptlayer.operations] == [55]


def test_address_without_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PromptLayer's address with no key gets one warning that says what to set; spans stay in the store."""
    pltrace.configure(base_url="http://127.0.0.1:9", store=tmp_path / "traces.db")
    _called()
    _called()
    assert pltrace.flush(5.0)
    (warning,) = [entry.getMessage() for entry in caplog.records if entry.name == "pltrace"]
    assert "no API key" in warning
    assert "PROMPTLAYER_API_KEY" in warning
    assert "local store" in warning
    assert stored(tmp_path / "traces.db") == ["echo", "echo"]


def test_key_is_not_shown(deliver: Callable[..., None], promptlayer: PromptLayerServer, tmp_path: Path) -> None:
    """The API key is in no file of the store."""
    deliver()
    _called()
    assert pltrace.flush(10.0)
    for file in (tmp_path / "store").iterdir():
        assert promptlayer.api_key.encode() not in file.read_bytes()


# Capture.


@traced("echo")
def _echo(value: Any) -> Any:
    return {"value": value}


def _called() -> Any:
    return _echo("in")


@pytest.mark.parametrize(
    ("application", "block", "inputs", "outputs"),
    [
        (True, True, True, True), (True, "inputs", True, False), (True, "outputs", False, True),
        (True, False, False, False), (False, True, False, False), ("inputs", True, True, False),
        ("outputs", "inputs", False, False),
    ],
)  # fmt: skip
def test_capture_caps(local: Path, application: bool | str, block: bool | str, inputs: bool, outputs: bool) -> None:
    """The application's `capture` is the most that any block or call inside can keep, of LLM calls too."""
    pltrace.configure(store=local, capture=application)
    with traced("block", capture=block):
        _echo("secret-in")
        GenericFakeChatModel(messages=iter(["secret-out"])).invoke("secret-in")
    _, echo, call = spans(local)
    assert ("secret-in" in str(echo["input"]), echo["output"] is not None) == (inputs, outputs)
    assert ("secret-in" in str(call["input"]), "secret-out" in str(call["output"])) == (inputs, outputs)
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    assert (b"secret-in" in raw) == (inputs or outputs)  # What `_echo` answers holds what it was given.
    assert (b"secret-out" in raw) == outputs


@pytest.mark.parametrize("capture", ["inputs", "outputs"])
def test_capture_of_steps(local: Path, capture: str) -> None:
    """What a prompt template gives counts as an input, what a parser takes as an output, whatever runs around them."""
    chain = ChatPromptTemplate.from_template("the {what}") | GenericFakeChatModel(messages=iter(["an answer"]))
    with traced("block", capture=capture):
        (chain | StrOutputParser() | RunnableLambda(lambda text: f"{text} indeed")).invoke({"what": "question"})
    pltrace.flush()
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    assert (b"question" in raw, b"an answer" in raw) == (capture == "inputs", capture == "outputs")
    kept = {span["name"]: (span["input"] is not None, span["output"] is not None) for span in spans(local)}
    assert kept["ChatPromptTemplate"] == (capture == "inputs",) * 2
    assert kept["StrOutputParser"] == (capture == "outputs",) * 2
    assert kept["RunnableSequence"] == (capture == "inputs", capture == "outputs")


def test_what_is_given_is_kept(local: Path) -> None:
    """What `update` is told is kept, whatever is captured."""
    with traced("block", capture=False) as span:
        span.update(input="asked", output="answered")
    (block,) = spans(local)
    assert (block["input"], block["output"]) == ("asked", "answered")


@pytest.mark.parametrize("key", ["pl_secret\n", " pl_secret", "pl_secret\u20ac"])
def test_a_key_of_the_environment_is_checked(key: str, tmp_path: Path) -> None:
    """A key that can't stand in a header is refused where it is read, and never shown."""
    program = run("import pltrace\npltrace.configure(store='memory')", tmp_path, PROMPTLAYER_API_KEY=key)
    assert program.code == 1
    assert "ConfigError: PROMPTLAYER_API_KEY: expected printable ASCII" in program.err
    assert "pl_secret" not in program.err


# Redaction.

SECRET = {"password": "hunter2", "note": "nothing", "nested": [{"api_key": "k-123456"}], "text": "sk-" + "a1B2" * 10}


def test_default_redaction(local: Path) -> None:
    """Values under keys that name secrets, and texts shaped like API keys, never reach the disk."""
    _echo(SECRET)
    (span,) = spans(local)
    assert span["input"]["value"]["note"] == "nothing"
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    for secret in (b"hunter2", b"k-123456", b"a1B2a1B2"):
        assert secret not in raw


def test_redaction_extended(local: Path) -> None:
    """A list adds key names and patterns to the default redaction."""
    pltrace.configure(store=local, redact=["note", re.compile(r"\d{4}-\d{4}")])
    _echo({**SECRET, "card": "it is 1234-5678."})
    (span,) = spans(local)
    assert span["input"]["value"]["note"] != "nothing"
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    for secret in (b"hunter2", b"k-123456", b"a1B2a1B2", b"1234-5678"):
        assert secret not in raw
    assert "it is " in span["input"]["value"]["card"]


def test_redaction_replaced(local: Path) -> None:
    """A function replaces the default redaction, for every leaf value, with its key."""
    pltrace.configure(store=local, redact=lambda key, value: f"<{key}>" if key == "note" else value)
    _echo(SECRET)
    (span,) = spans(local)
    assert span["input"]["value"] == {**SECRET, "note": "<note>"}


def test_redaction_fails_closed(local: Path) -> None:
    """A redaction function that raises leaves a placeholder, never the value, and the span is kept."""

    def broken(key: str, value: Any) -> Any:
        raise RuntimeError("redaction is broken")

    pltrace.configure(store=local, redact=broken, tags=["secret-in"])
    with traced("block", user="secret-in", session="secret-in"):
        assert _echo("secret-in") == {"value": "secret-in"}
    assert [span["name"] for span in spans(local)] == ["block", "echo"]
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    assert b"secret-in" not in raw


def test_redaction_of_who_asks(deliver: Callable[..., None], promptlayer: PromptLayerServer) -> None:
    """What a function makes of user and session by their keys is all that is kept of them, in the request too."""
    deliver(redact=lambda key, value: f"<{key}>" if key in ("user", "session") else value)
    with ScriptedOpenAI() as llm, traced("block", user="secret-u", session="secret-s"):
        chat(llm).invoke("Hello?")
    assert pltrace.flush(10.0)
    (log,) = promptlayer.request_logs
    assert (log["metadata"]["user_id"], log["metadata"]["conversation_id"]) == ("<user>", "<session>")
    assert "secret" not in str(promptlayer.spans)


def test_names_that_are_no_text(local: Path, llm: ScriptedOpenAI) -> None:
    """Names that UTF-8 can't hold, as of a script or a model, cost no span, and what looks like a key in them goes."""
    pltrace.configure(store=local, service="caf\udce9")
    with traced("block"), pytest.raises(UnicodeEncodeError):
        chat(llm, model="m\ud800 sk-" + "a1B2" * 10).invoke("Hello?")
    _, call = spans(local)
    assert (call["service"], call["model"]) == ("caf\ufffd", "m\ufffd [redacted]")


def _refuse(key: str, value: Any) -> Any:
    raise RuntimeError("redaction is broken")


@pytest.mark.parametrize(
    "redact",
    [lambda key, value: "X", lambda key, value: None, lambda key, value: {"was": 1}, _refuse],
    ids=["changes all", "removes all", "gives objects", "raises"],
)
def test_redaction_keeps_the_shape(deliver: Callable[..., None], promptlayer: PromptLayerServer, redact: Any) -> None:
    """Whatever a redactor does to texts, PromptLayer gets valid requests: roles, types and tools keep their shape."""

    @tool
    def look_up(password: str, most: int = 3) -> str:
        """Look something up."""
        return "found"

    deliver(redact=redact)
    called = Reply("secret-out", tool_calls=[("look_up", {"password": "secret-in"})])
    with ScriptedOpenAI([Reply("secret-out"), called, ApiError(400, "secret-out")]) as llm:
        model = chat(llm).bind_tools([look_up])
        with traced("block", metadata={"note": "secret-in"}):
            asked = [SystemMessage("secret-in"), HumanMessage([{"type": "text", "text": "secret-in"}])]
            model.invoke(asked)
            model.invoke(asked)
            with pytest.raises(BadRequestError):
                model.invoke(asked)
    assert pltrace.flush(10.0)
    assert len(promptlayer.request_logs) == 3
    assert "secret" not in str(promptlayer.spans)
    for log in promptlayer.request_logs:
        assert [message["role"] for message in log["input"]["messages"]] == ["system", "user"]
        (offered,) = log["input"]["tools"]
        assert offered["function"]["parameters"]["properties"]["most"]["type"] == "integer"


# Libraries.


@pytest.fixture
def library() -> SimpleNamespace:
    """A library that decorates its functions, without knowing the application."""
    source = """
from contextlib import ExitStack
from langchain_core.runnables import RunnableLambda
from pltrace import traced

@traced("lib.function", tags=["of-library"])
def function(value):
    return model.invoke(value).content

@traced("lib.generator")
def generator():
    yield 1

class Class:
    @traced("lib.method")
    def method(self):
        return 2

@traced("lib.coroutine")
async def coroutine():
    return 3

declaration = traced("lib.declaration")

def blocks():
    with declaration as first, traced("lib.block") as second, ExitStack() as stack:
        third = stack.enter_context(traced("lib.stacked"))
        return [span.name for span in (first, second, third)]

async def async_block():
    async with traced("lib.async block"):
        return 4

runnable = traced(RunnableLambda(lambda number: number + 1, name="lib.runnable"))
named_runnable = traced("lib.named runnable")(RunnableLambda(lambda number: number + 1))

@traced("lib.outer")
def outer(callback):
    with traced("lib.around"):
        return callback()
"""
    names: dict[str, Any] = {"__name__": "mylib.core", "model": GenericFakeChatModel(messages=iter(["secret-out"]))}
    exec(source, names)
    return SimpleNamespace(**names)


async def _use(library: SimpleNamespace) -> None:
    assert library.function("secret-in") == "secret-out"
    assert list(library.generator()) == [1]
    assert library.Class().method() == 2
    assert await library.coroutine() == 3
    library.blocks()
    assert await library.async_block() == 4
    assert library.runnable.invoke(4) == 5
    assert library.named_runnable.invoke(5) == 6


async def test_library_switched_off(local: Path, library: SimpleNamespace) -> None:
    """A library that the application switched off records nothing of its own, with functions of any kind or blocks."""
    pltrace.configure(store=local, libraries={"mylib": {"enabled": False}})
    with traced("application"):
        await _use(library)
        _echo(1)
    names = [span["name"] for span in spans(local)]
    # What LangChain runs in it is the application's.
    assert names == ["application", "GenericFakeChatModel", "lib.runnable", "RunnableLambda", "echo"]


def test_a_block_switched_off_is_inert(local: Path, library: SimpleNamespace) -> None:
    """A block of a library that is switched off gives the span that does nothing, as while tracing is off."""
    pltrace.configure(store=local, libraries={"mylib": {"enabled": False}})
    assert library.blocks() == ["", "", ""]
    pltrace.configure(store=local)
    assert library.blocks() == ["lib.declaration", "lib.block", "lib.stacked"]


def test_a_declaration_is_of_the_library_that_made_it(local: Path, library: SimpleNamespace) -> None:
    """Who enters a declaration doesn't matter, nor does a pickle: it is governed by where it was made."""
    pltrace.configure(store=local, libraries={"mylib": {"enabled": False}})
    mine = traced("mine")
    theirs = pickle.loads(pickle.dumps(library.declaration))
    with mine as outer, library.declaration as span, theirs as copied, mine as inner:
        assert (bool(outer), bool(span), bool(copied), bool(inner)) == (True, False, False, True)
        library.outer(lambda: mine(_echo)(1))
        assert pltrace.current_span() is inner
    assert not pltrace.current_span()
    assert [span["name"] for span in spans(local)] == ["mine", "mine", "mine", "echo"]


def test_settings_that_change_inside_a_block(local: Path, library: SimpleNamespace) -> None:
    """A block that was entered before its library was switched off is left as any other."""
    with library.declaration as span:
        pltrace.configure(store=local, libraries={"mylib": {"enabled": False}})
        with traced("mine") as inner:
            assert inner.parent_id == span.id
    assert not pltrace.current_span()


def test_library_off_is_transparent(local: Path, library: SimpleNamespace) -> None:
    """Inside a library that is switched off the application's own spans go on, under the application's."""
    pltrace.configure(store=local, libraries={"mylib": {"enabled": False}})
    with traced("application") as application:
        library.outer(lambda: _echo(1))
    _, echo = spans(local)
    assert echo["parent_id"] == application.id


async def test_library_tags(local: Path, library: SimpleNamespace) -> None:
    """The application's tags for a library are on what it records and on the calls inside it, and nowhere else."""
    pltrace.configure(store=local, libraries={"mylib": {"tags": ["mine"]}})
    with traced("application"):
        await _use(library)
        _echo(1)
    tags = {span["name"]: span["tags"] for span in spans(local)}
    assert tags == {
        "application": [], "lib.function": ["of-library", "mine"], "GenericFakeChatModel": ["of-library", "mine"],
        "lib.generator": ["mine"], "lib.method": ["mine"], "lib.coroutine": ["mine"], "lib.declaration": ["mine"],
        "lib.block": ["mine"], "lib.stacked": ["mine"], "lib.async block": ["mine"], "lib.runnable": ["mine"],
        "lib.named runnable": ["mine"], "RunnableLambda": ["mine"], "echo": [],
    }  # fmt: skip


async def test_library_capture(local: Path, library: SimpleNamespace) -> None:
    """The application can keep a library from storing arguments, prompts and answers."""
    pltrace.configure(store=local, libraries={"mylib": {"capture": False}})
    await _use(library)
    _echo("application's own")
    assert spans(local)[-1]["input"] == {"value": "application's own"}
    raw = b"".join(file.read_bytes() for file in local.parent.iterdir())
    assert b"secret-in" not in raw
    assert b"secret-out" not in raw


async def test_other_libraries_are_left_alone(local: Path, library: SimpleNamespace) -> None:
    """A setting for one package doesn't touch another whose name begins so."""
    pltrace.configure(store=local, libraries={"my": {"enabled": False}, "mylibrary": {"enabled": False}})
    await _use(library)
    assert len([span for span in spans(local) if span["name"].startswith("lib.")]) == 11
