"""The example library, `examples/tracedlib`, passes its own tests, and is invisible until an application opts in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.programs import Ended, run, stored, surroundings

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tracedlib"

APPLICATION = """
import asyncio, threading
from langchain_core.language_models import FakeListChatModel
from tracedlib import Conversation, summarize, summarize_all, summarize_stream

model = FakeListChatModel(responses=["Short."])
assert summarize(model, "text") == "Short."
assert asyncio.run(summarize_all(model, ["one", "two"])) == ["Short."] * 2
assert "".join(summarize_stream(model, "text")) == "Short."
assert Conversation.about(model, "text").ask("Well?") == "Short."
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of the example, as if it was somebody's project."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__", ".*")))


def run_application(library: Path, source: str = APPLICATION, **environment: object) -> Ended:
    """Runs a program that uses the library."""
    path = os.pathsep.join(filter(None, [str(library), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        return run(source, library, **environment)


def test_its_own_tests_pass(library: Path) -> None:
    """A project that needs nothing but pltrace and pytest: its tests use the fixture, and pass."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "--strict-config"],
        cwd=library, env=surroundings(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    assert "7 passed" in ended.stdout


def test_invisible_until_the_application_opts_in(library: Path) -> None:
    """An application that knows nothing of pltrace gets no thread, no file and no word of it."""
    program = run_application(
        library,
        APPLICATION
        + """
import sys
assert not [thread.name for thread in threading.enumerate() if "pltrace" in thread.name]
assert not [name for name in ("promptlayer", "pltrace._store", "pltrace._handler") if name in sys.modules]
""",
        HOME=library,
    )
    assert (program.code, program.out, program.err) == (0, "", "")
    assert not (library / ".pltrace").exists()


def test_traced_when_the_application_opts_in(library: Path) -> None:
    """One variable in the environment, and all of the library's calls are recorded."""
    store = library / "traces.db"
    program = run_application(library, PLTRACE_ENABLED=1, PLTRACE_STORE=store)
    assert (program.code, program.out, program.err) == (0, "", "")
    assert [name for name in stored(store) if name.startswith("tracedlib.")] == [
        "tracedlib.summarize", "tracedlib.summarize_all", "tracedlib.summarize_stream",
        "tracedlib.Conversation.about", "tracedlib.answer", "tracedlib.Conversation.ask",
    ]  # fmt: skip
