"""The pytest plugin works in a project that installs pltrace and does nothing else about it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.support.programs import run, surroundings
from tests.support.promptlayer_server import PromptLayerServer


class Project:
    """A fresh project with one module of tests, run by pytest in a process of its own."""

    def __init__(self, folder: Path, tests: str) -> None:
        self.folder = folder
        (folder / "pyproject.toml").write_text('[project]\nname = "fresh"\nversion = "1"\n')
        (folder / "test_fresh.py").write_text(dedent(tests))

    def run(self, *arguments: str, **environment: object) -> tuple[dict[str, int], str]:
        """Runs pytest; gives how many tests passed, failed, and so on, and what it printed."""
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", *arguments],
            cwd=self.folder,
            env=surroundings(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        last = ended.stdout.strip().splitlines()[-1]
        return {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (\w+)", last)}, (
            ended.stdout + ended.stderr
        )


def test_fixture_and_marker(tmp_path: Path) -> None:
    """Without any setting, `pltrace_spans` gives the spans of each test, and its marker says how."""
    counts, out = Project(
        tmp_path,
        """
        import asyncio

        import pytest
        from langchain_core.language_models.fake_chat_models import FakeListChatModel

        from pltrace import traced

        @traced("answer", tags=["t"])
        def answer(question):
            return FakeListChatModel(responses=["Hello."]).invoke(question).content

        def test_spans(pltrace_spans):
            assert answer("Hi") == "Hello."
            assert pltrace_spans.tree() == [["answer", ["FakeListChatModel"]]]
            assert pltrace_spans.named("answer").input == {"question": "Hi"}
            pltrace_spans.assert_requests(1, tags=["t"], status="SUCCESS")

        def test_each_has_its_own(pltrace_spans):
            assert pltrace_spans == []

        @pytest.mark.pltrace(deterministic=True, tags=["app"])
        def test_marker(pltrace_spans):
            answer("Hi")
            assert pltrace_spans.named("answer").id == f"{2:016x}"
            pltrace_spans.assert_requests(1, tags=["app", "t"])

        def test_async(pltrace_spans):
            async def main():
                async with traced("async"):
                    pass
            asyncio.run(main())
            pltrace_spans.named("async")

        def test_without_the_fixture():
            with traced("untraced") as span:
                assert not span
        """,
    ).run()
    assert counts == {"passed": 5}, out


def test_what_a_test_leaves_open_fails_it(tmp_path: Path) -> None:
    """A block that a test leaves open is an error of that test, by name, and of no other."""
    counts, out = Project(
        tmp_path,
        """
        from pltrace import traced

        def test_leaves(pltrace_spans):
            traced("forgotten").__enter__()

        def test_next(pltrace_spans):
            with traced("block"):
                pass
            assert pltrace_spans.tree() == [["block"]]
        """,
    ).run()
    assert counts == {"passed": 2, "error": 1}, out
    assert "ERROR at teardown of test_leaves" in out
    assert re.search(r"these blocks or calls are still open: \[<Span 'forgotten' block open", out)


def test_a_failed_assertion_points_at_the_test(tmp_path: Path) -> None:
    """What pytest shows is the test's line and the requests that there were; nothing of our own code."""
    counts, out = Project(
        tmp_path,
        """
        from langchain_core.language_models.fake_chat_models import FakeListChatModel
        from pltrace import traced

        def test_fails(pltrace_spans):
            with traced("block", tags=["draft"]):
                FakeListChatModel(responses=["Hello."]).invoke("Hi")
            pltrace_spans.assert_requests(1, tags=["final"])
        """,
    ).run()
    assert counts == {"failed": 1}, out
    assert '>       pltrace_spans.assert_requests(1, tags=["final"])' in out
    assert "expected 1 request of tags=['final'], and there are 0, among:" in out
    assert "FakeListChatModel: SUCCESS, tags ['draft'], metadata {}" in out
    assert "pltrace/testing.py" not in out


def test_what_tests_keep_to_the_end(tmp_path: Path) -> None:
    """A generator in the middle of a block, or a span, that a test keeps ends with the process and prints nothing."""
    counts, out = Project(
        tmp_path,
        """
        from pltrace import traced
        kept = []
        def steps():
            with traced("kept open"): yield 1
        class Client:
            def __init__(self, span): self.span = span
            def __del__(self): self.span.update(output="closed")
        def test_captured():
            from pltrace.testing import capture_spans  # Modules of ours are gone before this one.
            with capture_spans():
                kept.append(steps())
                assert next(kept[0]) == 1
                with traced("ended") as span: kept.append(Client(span))
        """,
    ).run("-q", PYTHONWARNINGS="ignore")
    assert counts["passed"] == 1
    assert out.endswith("s\n")  # As in `1 passed in 0.01s`.
    assert "pltrace" not in out


def test_a_wrong_marker_is_an_error_of_the_test(tmp_path: Path) -> None:
    """A setting of the marker that `capture_spans` refuses is named."""
    counts, out = Project(
        tmp_path,
        """
        import pytest

        @pytest.mark.pltrace(store="x.db")
        def test_setting(pltrace_spans):
            pass

        @pytest.mark.pltrace("deterministic")
        def test_without_a_name(pltrace_spans):
            pass
        """,
    ).run()
    assert counts == {"error": 2}, out
    assert "store: capture_spans keeps everything in memory" in out
    assert "capture_spans() takes 0 positional arguments but 1 was given" in out


def test_markers_add_up(tmp_path: Path) -> None:
    """Of the markers of a module, a class and a test all count; the closest wins where they say the same thing."""
    counts, out = Project(
        tmp_path,
        """
        import pytest
        from pltrace import traced

        pytestmark = pytest.mark.pltrace(deterministic=True, tags=["module"], metadata={"of": "module"})

        @pytest.mark.pltrace(tags=["class"])
        class TestClass:
            @pytest.mark.pltrace(metadata={"of": "test"})
            def test_it(self, pltrace_spans):
                with traced("block"):
                    pass
                (span,) = pltrace_spans
                assert (span.id, span.tags, span.metadata) == (f"{2:016x}", ("class",), {"of": "test"})
        """,
    ).run()
    assert counts == {"passed": 1}, out


def key_of(promptlayer: PromptLayerServer, home: Path) -> dict[str, object]:
    """Gives the environment of somebody who uses PromptLayer."""
    return {"HOME": home, "PROMPTLAYER_API_KEY": promptlayer.api_key, "PROMPTLAYER_BASE_URL": promptlayer.url}


USES_TRACING = """
    from langchain_core.language_models.fake_chat_models import FakeListChatModel

    import pltrace
    from pltrace import traced

    def use():
        with traced("block") as span:
            FakeListChatModel(responses=["Hello."]).invoke("Hi")
        assert pltrace.flush(10)
        return bool(span)

    imported = use()
"""


@pytest.mark.parametrize(
    ("arguments", "configure", "traced"),
    [
        pytest.param((), "", False, id="inert"),
        pytest.param((), "pltrace.configure()", True, id="on"),
        pytest.param(("-p", "no:pltrace"), "pltrace.configure()", True, id="without the plugin"),
        pytest.param(("-n", "1"), "pltrace.configure()", True, id="xdist"),
    ],
)
def test_nothing_leaves_the_machine(
    tmp_path: Path, promptlayer: PromptLayerServer, arguments: tuple[str, ...], configure: str, traced: bool
) -> None:
    """With a PromptLayer key in the environment nothing is sent under pytest, not even while tests are imported."""
    counts, out = Project(
        tmp_path,
        USES_TRACING
        + f"""
    def test_it():
        {configure}
        assert not imported
        assert use() is {traced}
        """,
    ).run(*arguments, **key_of(promptlayer, tmp_path))
    assert counts == {"passed": 1}, out
    assert promptlayer.requests == []


def test_nor_from_processes_that_tests_start(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """What tests, fixtures and the import of tests start as processes of their own sends nothing either."""
    program = tmp_path / "program.py"
    program.write_text(dedent(USES_TRACING))
    counts, out = Project(
        tmp_path,
        f"""
        import subprocess, sys
        import pytest

        def start():
            subprocess.run([sys.executable, {str(program)!r}], check=True)

        start()

        @pytest.fixture(scope="session")
        def started():
            start()

        def test_it(started):
            start()
        """,
    ).run(**key_of(promptlayer, tmp_path))
    assert counts == {"passed": 1}, out
    assert promptlayer.requests == []


def test_a_program_may_import_pytest(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """A program that imports pytest, or has run it, is no test: what it traces is delivered."""
    tests = tmp_path / "test_empty.py"
    tests.write_text("def test_empty(): pass")
    program = run(
        "import pytest, sys\nassert pytest.main(sys.argv[1:]) == 0\n" + dedent(USES_TRACING),
        tmp_path,
        *("-q", "-p", "no:cacheprovider", "-p", "no:langsmith_plugin", "--rootdir", tmp_path, tests),
        **key_of(promptlayer, tmp_path),
    )
    assert program.code == 0, program.err
    assert len(promptlayer.request_logs) == 1


def test_what_is_asked_for_is_sent(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """A key that the test itself gives is used: but not while spans are captured."""
    counts, out = Project(
        tmp_path,
        USES_TRACING
        + f"""
    def configure():
        pltrace.configure(api_key={promptlayer.api_key!r}, base_url={promptlayer.url!r}, store="memory")

    def test_captured(pltrace_spans):
        configure()
        assert use()
        pltrace_spans.assert_requests(1)

    def test_asked_for():
        configure()
        assert use()
        """,
    ).run(HOME=tmp_path)
    assert counts == {"passed": 2}, out
    assert len(promptlayer.request_logs) == 1


def test_the_plugin_costs_other_projects_nothing(tmp_path: Path) -> None:
    """Where no test asks for the fixture, pytest with the plugin loads neither LangChain nor SQLite for it."""
    counts, out = Project(
        tmp_path,
        """
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("pltrace")
            heavy = ("langchain_core", "promptlayer", "sqlite3", "pltrace.testing", "pltrace._store")
            assert [name for name in heavy if name in sys.modules] == []
        """,
    ).run("-p", "no:langsmith_plugin", "-p", "no:anyio", "-p", "no:hypothesispytest")
    assert counts == {"passed": 1}, out
