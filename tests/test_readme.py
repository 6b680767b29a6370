"""What the README says holds: its snippets run, its commands are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pltrace
from pltrace._cli import _parser
from pltrace._config import load
from pltrace._queries import latest_traces, matching_traces, trace_records
from pltrace.testing import CapturedSpans
from tests.support.programs import run
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[int, str]]:
    """Give the code blocks of one language, each with the number of lines before its first."""
    return [
        (README.count("\n", 0, found.start(2)), found[2]) for found in _BLOCK.finditer(README) if found[1] == language
    ]


def commands() -> list[str]:
    """Give every line of the shell blocks, without comments."""
    lines = [line.partition("  #")[0].strip() for _, block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_python_snippet_runs(promptlayer: PromptLayerServer, llm: ScriptedOpenAI, tmp_path: Path) -> None:
    """The snippets run one after the other, as the README says, and what they trace arrives at PromptLayer."""
    promptlayer.add_prompt("joke", "Tell me a joke about {topic}")
    # In a process of its own: under pytest, a key in the environment alone delivers nothing. Line numbers in a
    # traceback are the README's.
    program = (
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "snippets = " + repr(blocks("python")) + "\n"
        "for lines_before, snippet in snippets:\n"
        "    exec(compile('\\n' * lines_before + snippet, " + repr(str(ROOT / "README.md")) + ", 'exec'))\n"
    )

    ended = run(
        program,
        tmp_path,
        OPENAI_API_KEY="none",
        OPENAI_BASE_URL=llm.base_url,
        PROMPTLAYER_API_KEY=promptlayer.api_key,
        PROMPTLAYER_BASE_URL=promptlayer.url,
        PLTRACE_STORE=tmp_path / "traces.db",
    )

    assert ended.code == 0, ended.err
    assert "pltrace" not in ended.err.replace(str(ROOT), "").replace(str(tmp_path), ""), ended.err
    recorded = {trace.name for trace in latest_traces(tmp_path / "traces.db", 100)}
    assert {"joke", "morning", "nightly", "checked", "breakfast", "words", "stream", "Comedian.usual", "chat", "order",
            "in threads", "web", "from the registry"} <= recorded  # fmt: skip
    assert not promptlayer.duplicate_request_logs
    assert {"breakfast", "both", "Comedian.tell", "worker"} <= {span["name"] for span in promptlayer.spans.values()}
    tags = [tuple(log["tags"]) for log in promptlayer.request_logs]
    assert ("batch", "short") in tags
    assert ("production", "chatopenai") in tags
    assert [log["prompt_name"] for log in promptlayer.request_logs if log.get("prompt_name")] == ["joke"]
    assert "4000123412341234" not in str(promptlayer.request_logs)
    assert "ada@example.com" not in str(promptlayer.spans)
    assert {operation["op"] for operation in promptlayer.operations} >= {"score", "metadata", "prompt"}
    assert '"name": "joke"' in (tmp_path / "spans.jsonl").read_text()
    assert "HELLO. Hello." in ended.out


def test_a_snippet_with_a_private_block_keeps_nothing(
    llm: ScriptedOpenAI, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`capture=False`, as in the README's snippet, keeps neither prompt nor answer, whatever is inside."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", llm.base_url)
    (snippet,) = [text for _, text in blocks("python") if "capture=False" in text]
    names: dict[str, object] = {"__name__": "readme"}
    exec(blocks("python")[0][1].replace("pltrace.configure()", ""), names)

    exec(snippet.replace("sample=0.1", "sample=1.0"), names)

    assert pltrace.flush(10)
    (trace_id,) = matching_traces(local, "")
    records = trace_records(local, trace_id)
    assert [record["name"] for record in records][:2] == ["private", "rarely"]
    assert "secrets" not in str(records)
    assert "Hello" not in str(records)


def test_the_first_code_blocks_are_the_two_commands_that_set_all_up() -> None:
    """A newcomer's first two code blocks are one line each: to run the quickstart, and to run the tests."""
    first, second = [found[2] for found in _BLOCK.finditer(README)][:2]

    for command in (first, second):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e ")
    assert first.endswith("-e . && .venv/bin/python examples/quickstart.py\n")
    assert second.endswith("-e '.[test]' && .venv/bin/python -m pytest -n auto\n")


def test_the_commands_name_what_is_there() -> None:
    """Extras, files and subcommands in the README's shell lines exist."""
    text = "\n".join(commands())

    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= set(PROJECT["optional-dependencies"])
    for path in re.findall(r"(?<![\w/.])(?:examples/\S+\.py|\.ci/\w+)", README):
        assert (ROOT / path).is_file(), path
    assert PROJECT["scripts"] == {"pltrace": "pltrace._cli:main"}
    usage = _parser().format_help()
    for command in re.findall(
        r"pltrace (ls|show|\w+)\b(?= |$)", "\n".join(c for c in commands() if c[:8] == "pltrace ")
    ):
        assert command in usage


def test_the_environment_table_lists_every_variable() -> None:
    """The table of environment variables has those that the package reads, and no other."""
    section = README.partition("## Environment variables")[2].partition("\n## ")[0]
    told = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pltrace").rglob("*.py"))

    assert told == set(re.findall(r'"((?:PLTRACE|PROMPTLAYER)_[A-Z_]+)"', sources))


def test_the_defaults_are_as_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default address and store are those that the README names."""
    config = load()

    assert config.base_url in README
    assert "~/.pltrace/traces.db" in README
    assert config.store == tmp_path / ".pltrace" / "traces.db"


def test_every_public_name_has_its_line() -> None:
    """Each public function and class is mentioned."""
    errors = {name for name in pltrace.__all__ if name.endswith("Error") and name != "ConfigError"}

    assert [name for name in pltrace.__all__ if name not in README and name not in errors] == []


def test_the_changelog_is_the_last_section_and_knows_this_version() -> None:
    """The changelog ends the README, and its first entry is the version of the package."""
    sections = re.findall(r"^## (.+)$", README, re.MULTILINE)
    changelog = README.rpartition("\n## ")[2]

    assert sections[-1] == "Changelog"
    assert re.findall(r"^### \[(.+?)\]", changelog, re.MULTILINE)[0] == PROJECT["version"]


def test_the_snippets_test_passes(pltrace_spans: CapturedSpans, llm: ScriptedOpenAI) -> None:
    """The test that the README shows to library authors passes, with the fixture that it names."""
    snippets = [text for _, text in blocks("python")]
    names: dict[str, Any] = {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setenv("OPENAI_BASE_URL", llm.base_url)
        for snippet in (snippets[0], *[text for text in snippets if "greet" in text]):
            exec(snippet.replace("pltrace.configure()", ""), names)

    names["test_greet"](pltrace_spans)
    assert pltrace_spans.named("mylib.greet").status == "ok"
