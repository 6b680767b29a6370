"""What the tests share: doubles over real HTTP, tracing into a store of the test's own, and a clean slate after it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before LangChain is imported: no test speaks to anyone but this machine.
os.environ.update(LANGSMITH_TRACING="false", NO_PROXY="127.0.0.1,localhost", no_proxy="127.0.0.1,localhost")

import pytest

import pltrace
from pltrace import _health, _runs
from pltrace._scope import Scope, attach, current
from tests.support.llm_server import LlamaServer
from tests.support.promptlayer_server import PromptLayerServer
from tests.support.scripted_llm import ScriptedOpenAI

_OUR_VARIABLES = (
    "PROMPTLAYER_API_KEY", "PROMPTLAYER_BASE_URL", "PLTRACE_ENABLED", "PLTRACE_STORE", "PLTRACE_TAGS",
    "PLTRACE_CAPTURE", "PLTRACE_SAMPLE", "PLTRACE_SERVICE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give each test an environment without our variables and a home of its own, and check what it leaves behind."""
    for name in _OUR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _health.counts.clear()
    yield
    left, roots, failures = current(), set(Scope.roots), _health.counts["internal_errors"]
    pltrace.shutdown(timeout=0.0)
    attach(None)
    Scope.roots.clear()
    _runs.open_runs.clear()
    assert left is None, "a scope was left behind"
    assert not roots, "a root scope was never left"
    assert not failures, "pltrace failed internally; see the log"


@pytest.fixture
def promptlayer() -> Iterator[PromptLayerServer]:
    """Run a strict PromptLayer; the test fails if it saw a body that breaks the published rules."""
    with PromptLayerServer() as server:
        yield server
        server.release()
        assert server.violations == []
        assert server.errors == []


@pytest.fixture
def llm() -> Iterator[ScriptedOpenAI]:
    """Run an OpenAI-compatible server that answers as it is told."""
    with ScriptedOpenAI() as server:
        yield server
        assert server.errors == []


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaServer]:
    """Run a real llama.cpp server with a tiny model of random weights."""
    with LlamaServer() as server:
        yield server


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Switch tracing on with no PromptLayer, into a store of the test's own; return its path."""
    path = tmp_path / "store" / "traces.db"
    pltrace.configure(store=path)
    return path


@pytest.fixture
def deliver(promptlayer: PromptLayerServer, tmp_path: Path) -> Callable[..., None]:
    """Return a function that switches tracing on with delivery to the test's PromptLayer; it takes more settings."""

    def configure(**settings: Any) -> None:
        defaults = {
            "api_key": promptlayer.api_key, "base_url": promptlayer.url, "store": tmp_path / "store" / "traces.db",
        }  # fmt: skip
        pltrace.configure(**{**defaults, **settings})

    return configure


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests measured."""
    figures = [
        f"{report.nodeid.partition('::')[2]}  {figure}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.when == "call"
        for name, figure in report.user_properties
        if name == "measured"
    ]
    if figures:
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.line(figure)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector doesn't run by itself, and so no finalizer in the middle of what is tested."""
    gc.collect()  # Other tests' garbage may complain.
    gc.disable()
    yield
    gc.enable()
