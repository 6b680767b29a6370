"""Each file of `examples/` runs as a user would run it, in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.llm_server import LlamaServer
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import Reply, ScriptedOpenAI

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
#: Any use of the network would end here.
NOWHERE = "http://127.0.0.1:9"


def start(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with an empty home to its end."""
    left_out = ("OPENAI_", "PYTEST_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    quiet = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HOME": str(home)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**kept, **quiet, **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=90,
        check=False,
    )


def run(home: Path, *arguments: str | Path, **environment: str) -> str:
    """Run a Python program with an empty home; give what it printed, after it ended well and complained of nothing."""
    ended = start(home, *arguments, **environment)
    assert ended.returncode == 0, ended.stderr
    assert "pltrace" not in ended.stderr.replace(str(ROOT), "").replace(str(home), ""), ended.stderr
    return ended.stdout


def outline(shown: str) -> list[str]:
    """Give what `pltrace show` printed without what differs from run to run."""
    lines = shown[shown.index("trace ") :].splitlines()[1:]
    return [re.sub(r"  [\d.]+ (?:s|ms|µs)|request \d+", "", line).rstrip() for line in lines if "[" in line]


QUICKSTART = [
    "quickstart  [block]",
    "├─ answer  [function]",
    "│  ├─ RunnableSequence  [chain]",
    "│  │  ├─ ChatPromptTemplate  [prompt]",
    "│  │  └─ GenericFakeChatModel  [llm]  GenericFakeChatModel  41 → 12 tokens    #demo  #support",
    "│  ├─ order_status  [tool]",
    "│  └─ RunnableSequence  [chain]",
    "│     ├─ ChatPromptTemplate  [prompt]",
    "│     └─ GenericFakeChatModel  [llm]  GenericFakeChatModel  66 → 17 tokens    #demo  #support",
    "└─ shorten  [block]",
    "   └─ RunnableSequence  [chain]",
    "      ├─ ChatPromptTemplate  [prompt]",
    "      ├─ GenericFakeChatModel  [llm]  GenericFakeChatModel  30 → 5 tokens    #demo  #sms",
    "      └─ StrOutputParser  [parser]",
]


def test_every_example_has_its_test() -> None:
    """No example is left untried."""
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix} == {
        "chat_openai.py",
        "full_featured.py",  # test_examples_page.py
        "gpt4all_local.py",  # test_examples_page.py
        "quickstart.py",
    }


@pytest.mark.parametrize("name", ["chat_openai.py", "full_featured.py", "gpt4all_local.py"])
def test_the_way_of_pltrace_is_shorter(name: str) -> None:
    """Beside what PromptLayer's page showed, each example says the same in less code."""
    functions = {
        node.name: ast.Module([statement for statement in node.body if not _is_docstring(statement)], [])
        for node in ast.parse((EXAMPLES / name).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }

    assert len(ast.unparse(functions["with_traced"])) < len(ast.unparse(functions["drop_in"]))


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_quickstart_needs_nothing_and_shows_its_trace(tmp_path: Path) -> None:
    """With no key, no network and an empty home, the quickstart ends with the tree of what it did."""
    out = run(tmp_path, EXAMPLES / "quickstart.py", HTTP_PROXY=NOWHERE, HTTPS_PROXY=NOWHERE)

    assert "Shipped; arrives tomorrow.\n3 LLM calls, 171 tokens\n" in out
    assert outline(out) == QUICKSTART


def test_quickstart_leaves_a_trace_for_the_command_line(tmp_path: Path) -> None:
    """After it, `pltrace ls` and `pltrace show` find the trace, with a score asked for each request."""
    run(tmp_path, EXAMPLES / "quickstart.py")

    listed = run(tmp_path, "-m", "pltrace", "ls")
    spans = json.loads(run(tmp_path, "-m", "pltrace", "show", "latest", "--json"))["spans"]

    assert listed.count("quickstart") == 1
    calls = [span for span in spans if span["kind"] == "llm"]
    assert [call["request_tags"] for call in calls] == [["demo", "support"], ["demo", "support"], ["demo", "sms"]]
    for call in calls:
        (score,) = call["operations"]
        assert (score["kind"], json.loads(score["arguments"])) == ("score", {"score": 100, "score_name": "answered"})


def test_quickstart_delivers_when_there_is_a_key(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """The same program with a key delivers its LLM calls, their tags, user and scores."""
    out = run(
        tmp_path,
        EXAMPLES / "quickstart.py",
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
    )

    assert outline(out) == QUICKSTART
    logs = promptlayer.request_logs
    assert [log["tags"] for log in logs] == [["demo", "support"], ["demo", "support"], ["demo", "sms"]]
    assert {(log["metadata"]["user_id"], log["metadata"]["channel"]) for log in logs} == {("ada", "chat")}
    assert len(promptlayer.spans) == len(QUICKSTART)
    scored = {operation["request_id"] for operation in promptlayer.operations if operation["op"] == "score"}
    assert scored == {log["id"] for log in logs}
    assert all(str(log["id"]) in out for log in logs)


def test_chat_openai_delivers_in_both_ways(tmp_path: Path, promptlayer: PromptLayerServer, llm: ScriptedOpenAI) -> None:
    """The dead example works again: as it was but for one import, and with a block; both are logged, once each."""
    out = run(
        tmp_path,
        EXAMPLES / "chat_openai.py",
        OPENAI_API_KEY="none",
        OPENAI_BASE_URL=llm.base_url,
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
    )

    assert len(llm.bodies) == 2
    assert llm.bodies[0]["messages"] == llm.bodies[1]["messages"]
    first, second = promptlayer.request_logs
    assert first["tags"] == second["tags"] == ["chatopenai"]
    assert first["input"] == second["input"]
    assert [message["content"][0]["text"] for message in first["input"]["messages"]] == [
        "What comes after 1,2,3 ?",
        "Tell me another joke?",
    ]
    assert promptlayer.tree() == [("ChatOpenAI", []), ("joke", [("ChatOpenAI", [])])]
    assert out.endswith("delivered\n")


@pytest.mark.parametrize(
    ("name", "environment", "missing"),
    [
        ("chat_openai.py", {}, "OPENAI_API_KEY isn't set: this example asks a model of OpenAI's"),
        ("full_featured.py", {}, "OPENAI_API_KEY isn't set: this example asks a model of OpenAI's"),
        (
            "full_featured.py",
            {"OPENAI_API_KEY": "none"},
            "PROMPTLAYER_API_KEY isn't set: this example gets a prompt from PromptLayer's registry",
        ),
        (
            "gpt4all_local.py",
            {},
            "There is no file ./models/gpt4all-model.gguf: this example takes the path of a model, a GGUF file, as its "
            "argument",
        ),
    ],
)
def test_what_is_missing_is_said(name: str, environment: dict[str, str], missing: str, tmp_path: Path) -> None:
    """Without its key or model, an example says what it needs in one line, and fails."""
    if name == "gpt4all_local.py" and (find_spec("langchain_community") is None or find_spec("gpt4all") is None):
        pytest.skip("needs langchain-community and gpt4all: pip install 'pltrace[examples]'")
    ended = start(tmp_path, "-W", "ignore", EXAMPLES / name, **environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", missing + "\n")


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("chat_openai.py", "langchain_openai", "pip install langchain-openai"),
        ("full_featured.py", "langchain_openai", "pip install langchain-openai"),
        ("gpt4all_local.py", "gpt4all", 'pip install "pltrace[examples]"'),
    ],
)
def test_a_package_that_is_missing_is_said(name: str, module: str, remedy: str, tmp_path: Path) -> None:
    """Without a package that it needs, an example says in one line what to install, and fails."""
    program = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_path({str(EXAMPLES / name)!r})"
    ended = start(tmp_path, "-W", "ignore", "-c", program)
    told = f"{module} isn't installed: this example needs `{remedy}`\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", told)


@pytest.mark.parametrize("enabled", ["", "1"], ids=["off", "local"])
def test_chat_openai_without_a_key_says_so(tmp_path: Path, llm: ScriptedOpenAI, enabled: str) -> None:
    """Without PromptLayer's key it works too, and doesn't claim that anything was delivered."""
    out = run(
        tmp_path,
        EXAMPLES / "chat_openai.py",
        OPENAI_API_KEY="none",
        OPENAI_BASE_URL=llm.base_url,
        PLTRACE_ENABLED=enabled,
    )

    assert out == "not delivered: PROMPTLAYER_API_KEY isn't set\n"
    assert len(llm.bodies) == 2
    assert (tmp_path / ".pltrace").exists() is bool(enabled)


def test_chat_openai_works_with_a_real_model(
    tmp_path: Path, promptlayer: PromptLayerServer, llama: LlamaServer
) -> None:
    """It runs against another server that speaks OpenAI's protocol, here llama.cpp's own."""
    out = run(
        tmp_path,
        EXAMPLES / "chat_openai.py",
        OPENAI_API_KEY="none",
        OPENAI_BASE_URL=llama.url,
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
    )

    assert out.endswith("delivered\n")
    assert [log["status"] for log in promptlayer.request_logs] == ["SUCCESS", "SUCCESS"]
    assert all(log["output_tokens"] > 0 for log in promptlayer.request_logs)


def test_loading_promptlayer_in_the_background_disturbs_no_call(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """A program that scores its first calls goes on calling the model while promptlayer's client is being loaded."""
    program = tmp_path / "program.py"
    program.write_text(
        dedent("""
        import sys, time
        from langchain_openai import ChatOpenAI
        import pltrace

        model = ChatOpenAI(max_retries=0)
        with pltrace.traced("busy", on_request=lambda request: request.score(50)) as span:
            calls = 0
            while "promptlayer.promptlayer" not in sys.modules or calls < 100:
                model.invoke("Hi")
                calls += 1
        assert pltrace.flush(30)
        print("done")
        """)
    )
    with ScriptedOpenAI(Reply("Hello.")) as server:
        out = run(
            tmp_path,
            program,
            OPENAI_API_KEY="none",
            OPENAI_BASE_URL=server.base_url,
            PROMPTLAYER_API_KEY=promptlayer.api_key,
            PROMPTLAYER_BASE_URL=promptlayer.url,
        )

    assert out == "done\n"
