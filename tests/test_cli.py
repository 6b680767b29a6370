"""`pltrace ls` and `pltrace show` tell people and programs what was recorded."""

from __future__ import annotations

import json
import os
import py_compile
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from textwrap import dedent
from typing import Any
from zipfile import ZipFile

import pytest

from tests.support.programs import Ended, ended, module, run, stored, surroundings
from tests.support.promptlayer_server import PromptLayerServer

PROGRAM = r"""
import sys
import pltrace
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool

@tool
def weather(city: str) -> str:
    "The weather."
    return f"sunny in {city}"

pltrace.configure(store=sys.argv[1])
with pltrace.traced("first"):
    pass
try:
    with pltrace.traced("failing"):
        raise ValueError("it went wrong")
except ValueError:
    pass
with pltrace.traced("Grüße", tags=["greeting"], metadata={"k": 1}) as span:
    model = GenericFakeChatModel(messages=iter(["Good morning.\x1b[31m\x07\r\x9b1m\u202e"]))
    (RunnableLambda(lambda text: text) | model).invoke("Say\x1b]0;title\x07 hello\nplease")
    weather.invoke({"city": "Oslo"})
span.score(80)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a program recorded into."""
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "traces.db"
    program = run(PROGRAM, folder, path, PLTRACE_ENABLED="")
    assert (program.code, program.out, program.err) == (0, "", "")
    return path


@pytest.fixture(scope="module")
def traces(store: Path) -> list[dict[str, Any]]:
    """What `ls --json` prints of it."""
    return listed(store)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a name that would drive a terminal."""
    folder = tmp_path_factory.mktemp("hostile")
    run(
        "import pltrace, sys\npltrace.configure(store=sys.argv[1])\n"
        r"with pltrace.traced('a\x1b[2J\x9b1m\x07name\u202e\nnext', tags=['\x1b[1m']): pass",
        folder,
        folder / "traces.db",
    )
    return folder / "traces.db"


def listed(path: Path) -> list[dict[str, Any]]:
    """Gives what `ls --json` prints."""
    found: list[dict[str, Any]] = json.loads(done(module("ls", "--store", path, "--json")))
    return found


def done(program: Ended) -> str:
    """Gives what a command that went well printed."""
    assert (program.code, program.err) == (0, "")
    return program.out


def test_ls(store: Path, traces: list[dict[str, Any]]) -> None:
    """`ls` lists the latest traces first: id, status, counts and name."""
    head, *lines = done(module("ls", "--store", store)).splitlines()
    assert head.split() == ["TRACE", "STARTED", "DURATION", "STATUS", "SPANS", "LLM", "TOKENS", "DELIVERY", "NAME"]
    assert [line.split()[-1] for line in lines] == ["Grüße", "failing", "first"]
    assert " error " in lines[1]
    assert [line.split()[0] for line in lines] == [trace["trace_id"][:12] for trace in traces]


def test_ls_json(traces: list[dict[str, Any]]) -> None:
    """`ls --json` prints the same for programs."""
    latest, failing, first = traces
    assert (latest["name"], failing["name"], first["name"]) == ("Grüße", "failing", "first")
    assert (latest["spans"], latest["requests"], latest["status"]) == (5, 1, "ok")
    assert (failing["status"], first["requests"]) == ("error", 0)
    assert latest["started_at_ns"] < latest["ended_at_ns"]


def test_ls_number(store: Path) -> None:
    """`ls -n` bounds the list; a number below one is refused."""
    assert len(done(module("ls", "--store", store, "-n", 1)).splitlines()) == 2
    program = module("ls", "--store", store, "-n", 0)
    assert program.code == 2
    assert "expected a number from 1 on" in program.err


def test_show(store: Path, traces: list[dict[str, Any]]) -> None:
    """`show` prints a trace as a tree, with what went in and out of LLM calls and tools."""
    lines = done(module("show", "latest", "--store", store)).splitlines()
    assert lines[0] == f"trace {traces[0]['trace_id']}"
    assert lines[1].startswith("Grüße  [block]")
    text = "\n".join(lines)
    assert "├─ RunnableSequence  [chain]" in text
    assert "│  └─ GenericFakeChatModel  [llm]" in text
    assert "└─ weather  [tool]" in text
    assert "#greeting" in text
    assert "> sunny in Oslo" in text
    assert "hello please" in text
    assert "Good morning." in text


def test_show_an_error(store: Path, traces: list[dict[str, Any]]) -> None:
    """`show` says what went wrong."""
    out = done(module("show", traces[1]["trace_id"], "--store", store))
    assert "failing  [block]" in out
    assert "error  ValueError: it went wrong" in out


def test_show_json(store: Path, traces: list[dict[str, Any]]) -> None:
    """`show --json` prints all that is kept, for programs."""
    found = json.loads(done(module("show", "latest", "--store", store, "--json")))
    assert found["trace_id"] == traces[0]["trace_id"]
    by_name = {span["name"]: span for span in found["spans"]}
    assert found["spans"][0]["name"] == "Grüße"
    call, block = by_name["GenericFakeChatModel"], by_name["Grüße"]
    assert call["request_id"] > 0
    assert call["operations"][0]["kind"] == "score"
    assert call["output"]["messages"][0]["content"][0]["text"].startswith("Good morning.\x1b[31m")
    assert (block["tags"], block["metadata"], block["parent_id"]) == (["greeting"], {"k": 1}, None)


def test_show_by_a_beginning(store: Path, traces: list[dict[str, Any]]) -> None:
    """The first characters of a trace's id are enough if they are of one trace only."""
    trace_id = traces[2]["trace_id"]
    assert done(module("show", trace_id[:10], "--store", store)).startswith(f"trace {trace_id}\nfirst")
    program = module("show", "", "--store", store)
    assert (program.code, program.out) == (1, "")
    assert program.err == "pltrace: TRACE is empty: expected a trace id, its first characters, or `latest`\n"


@pytest.mark.parametrize("trace", ["ffffffffff", "%"])
def test_unknown_trace(store: Path, trace: str) -> None:
    """An unknown trace ends with code 1 and one line that says where to look."""
    program = module("show", trace, "--store", store)
    assert (program.code, program.out) == (1, "")
    (line,) = program.err.splitlines()
    assert repr(trace) in line
    assert str(store) in line
    assert "`pltrace ls`" in line


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["show", "latest"]])
def test_no_store_yet(tmp_path: Path, command: list[str]) -> None:
    """Before anything was traced, one line says so, and no file is made."""
    program = module(*command, "--store", tmp_path / "none" / "traces.db")
    assert (program.code, program.out) == (1, "")
    (line,) = program.err.splitlines()
    assert "nothing has been traced into it yet" in line
    assert not (tmp_path / "none").exists()


def test_no_trace_yet(tmp_path: Path) -> None:
    """A store with nothing in it is told as such."""
    path = tmp_path / "traces.db"
    run("import pltrace, sys\npltrace.configure(store=sys.argv[1])", tmp_path, path)
    assert done(module("ls", "--store", path)) == "No traces yet.\n"
    assert listed(path) == []
    assert "There is no trace 'latest'" in module("show", "latest", "--store", path).err


@pytest.mark.parametrize("place", ["memory", "off"])
def test_nothing_is_kept(place: str) -> None:
    """With a store that keeps nothing, the commands say why there is nothing to show."""
    program = module("ls", PLTRACE_STORE=place)
    assert (program.code, program.out) == (1, "")
    assert repr(place) in program.err
    assert "nothing is kept" in program.err


def test_store_of_the_environment(store: Path) -> None:
    """The store is that of `PLTRACE_STORE`, if none is given."""
    assert module("ls", PLTRACE_STORE=store).out == module("ls", "--store", store).out


def test_bad_environment() -> None:
    """A bad setting in the environment is told in one line, not in a traceback."""
    program = module("ls", PLTRACE_SAMPLE="7")
    assert (program.code, program.out) == (1, "")
    assert program.err.startswith("pltrace: PLTRACE_SAMPLE='7'")
    assert program.err.count("\n") == 1


def test_a_damaged_file(tmp_path: Path) -> None:
    """A file that is no store is told in one line, and left as it is."""
    path = tmp_path / "traces.db"
    path.write_bytes(b"This is no database. " * 500)
    program = module("ls", "--store", path)
    assert (program.code, program.out) == (1, "")
    assert program.err.startswith("pltrace: Can't read the store")
    assert program.err.count("\n") == 1
    assert path.read_bytes() == b"This is no database. " * 500


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "traces.db")
    return folder / "traces.db"


def _socket(folder: Path) -> Path:
    path = folder / "traces.db"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(path))  # A socket's path may have a hundred characters.
    return path


def _device(folder: Path) -> Path:
    return Path("/dev/zero")


def _long_name(folder: Path) -> Path:
    return folder / ("n" * 300)


def _through_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "traces.db"


def _link_to_itself(folder: Path) -> Path:
    (folder / "traces.db").symlink_to("traces.db")
    return folder / "traces.db"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_pipe, "it is not a regular file"),
        (_socket, "it is not a regular file"),
        (_device, "it is not a regular file"),
        (_long_name, "File name too long"),
        (_through_a_file, "Not a directory"),
        (_link_to_itself, "Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize("command", [["ls"], ["show", "latest"], ["sync"]])
def test_no_place_for_a_store(tmp_path: Path, command: list[str], make: Callable[[Path], Path], reason: str) -> None:
    """A path where no store can be is told in one line, with the reason and the remedy; nothing is waited for."""
    path = make(tmp_path)
    program = module(
        *command, PLTRACE_STORE=path, PROMPTLAYER_API_KEY="pl_1", PROMPTLAYER_BASE_URL="http://127.0.0.1:9"
    )
    assert (program.code, program.out) == (1, "")
    assert program.err == f"pltrace: Can't use the store {str(path)!r}: {reason}; set another path with PLTRACE_STORE\n"


@pytest.mark.parametrize("make", [_pipe, _long_name])
def test_doctor_with_no_place_for_a_store(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """`doctor` says of such a path what is the matter with it, among all the rest."""
    path = make(tmp_path)
    found = json.loads(done(module("doctor", "--json", "--store", path)))
    assert found["store"]["path"] == str(path)
    assert "Can't use the store" in found["store"]["error"]


def test_a_folder_that_cannot_be_entered(tmp_path: Path) -> None:
    """A store in a folder that the user may not enter is told in one line."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0)
    program = run(
        """
        import os, sys
        from pltrace._cli import main
        if os.getuid() == 0:  # Who may enter any folder.
            os.setuid(65534)
        sys.exit(main(["ls", "--store", sys.argv[1]]))
        """,
        tmp_path,
        folder / "traces.db",
    )
    assert (program.code, program.out) == (1, "")
    assert "Permission denied; set another path" in program.err
    assert program.err.count("\n") == 1


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    """Where the current folder was deleted, a path that isn't absolute is told in one line."""
    program = run(
        """
        import os, sys
        from pltrace._cli import main
        os.mkdir(sys.argv[1])
        os.chdir(sys.argv[1])
        os.rmdir(sys.argv[1])
        sys.exit(main(["ls", "--store", "traces.db"]))
        """,
        tmp_path,
        tmp_path / "gone",
    )
    assert (program.code, program.out) == (1, "")
    assert program.err == "pltrace: store='traces.db': expected an absolute path: the current folder is gone\n"


@pytest.mark.parametrize("settings", ["", "PRAGMA application_id = 7; PRAGMA user_version = 2"])
def test_a_database_of_another_program(tmp_path: Path, settings: str) -> None:
    """Another program's database is told as such, whatever version it bears, and left as it is."""
    path = tmp_path / "customers.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"CREATE TABLE customers (x); {settings}")
    before = path.read_bytes()
    program = module("ls", "--store", path)
    assert (program.code, program.out) == (1, "")
    assert program.err == (
        f"pltrace: Can't read the store {str(path)!r}: it is a database of another program; set another path with "
        "PLTRACE_STORE\n"
    )
    assert path.read_bytes() == before


def test_a_store_of_a_newer_version(tmp_path: Path) -> None:
    """A store of a newer version is told in one line, with both versions and the remedy."""
    path = tmp_path / "traces.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE t (x); PRAGMA user_version = 99; PRAGMA application_id = 0x706C7472")
    program = module("ls", "--store", path)
    assert (program.code, program.out) == (1, "")
    assert "its schema version is 99 and this pltrace knows" in program.err
    assert "upgrade pltrace" in program.err


def test_an_empty_file(tmp_path: Path) -> None:
    """An empty file is a store that nothing has been traced into."""
    path = tmp_path / "traces.db"
    path.touch()
    program = module("ls", "--store", path)
    assert (program.code, program.out) == (1, "")
    assert "nothing has been traced into it yet" in program.err


def _control_characters(text: str) -> set[str]:
    return {character for character in text if not character.isprintable()} - {"\n"}


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["show", "latest"], ["show", "latest", "--json"]])
def test_no_control_characters(store: Path, hostile: Path, command: list[str]) -> None:
    """Neither a model's answer nor a name can drive the terminal that it is shown in."""
    assert _control_characters(done(module(*command, "--store", store))) == set()
    out = done(module(*command, "--store", hostile))
    assert _control_characters(out) == set()
    assert "name" in out


@pytest.mark.parametrize("command", [["ls"], ["show", "latest"], ["show", "latest", "--json"]])
def test_a_terminal_without_unicode(store: Path, command: list[str]) -> None:
    """Where the terminal can't show a character, something stands for it, and the command goes on."""
    out = done(module(*command, "--store", store, PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert out.isascii()
    assert out


@pytest.mark.parametrize("command", [["ls"], ["show", "latest"], ["show", "latest", "--json"]])
def test_a_reader_that_has_had_enough(store: Path, command: list[str]) -> None:
    """A reader that closes the pipe, such as `head`, ends the command quietly."""
    reading, writing = os.pipe()
    os.close(reading)
    program = subprocess.run(
        [sys.executable, "-m", "pltrace", *command, "--store", str(store)],
        env=surroundings(), stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False,
    )  # fmt: skip
    os.close(writing)
    assert program.stderr == b""
    assert program.returncode in (0, 141)


def test_while_a_program_records(tmp_path: Path) -> None:
    """The commands read beside a program that is recording, and see what it has recorded so far."""
    path = tmp_path / "traces.db"
    program = run(
        """
import subprocess, sys, pltrace
pltrace.configure(store=sys.argv[1])
with pltrace.traced("done"):
    pass
assert pltrace.flush()
with pltrace.traced("open"):
    with pltrace.traced("part"):
        pass
    assert pltrace.flush()
    print(subprocess.run([sys.executable, "-m", "pltrace", "show", "latest", "--store", sys.argv[1]],
                         capture_output=True, text=True, check=True).stdout.splitlines()[1])
""",
        tmp_path,
        path,
    )
    assert done(program).startswith("part  [block]")


def test_delivery_state(tmp_path: Path, promptlayer: PromptLayerServer) -> None:
    """`ls` and `show` say what is still to be delivered, and what was refused."""
    path = tmp_path / "traces.db"
    settings = {
        "PROMPTLAYER_API_KEY": promptlayer.api_key, "PROMPTLAYER_BASE_URL": promptlayer.url, "PLTRACE_STORE": path,
    }  # fmt: skip
    promptlayer.poison(lambda name: name == "poison")
    run("import pltrace\nwith pltrace.traced('poison'): pass\npltrace.flush(20)", tmp_path, **settings)
    promptlayer.stop()
    run("import pltrace\nwith pltrace.traced('waiting'): pass", tmp_path, **settings)
    _, waiting, poison = done(module("ls", PLTRACE_STORE=path)).splitlines()
    assert "1 pending" in waiting
    assert "1 quarantined" in poison
    shown = json.loads(done(module("show", poison.split()[0], "--json", PLTRACE_STORE=path)))
    delivery = shown["spans"][0]["delivery"]["promptlayer"]
    assert delivery["state"] == "quarantined"
    assert "422" in delivery["error"]


@pytest.mark.parametrize("arguments", [[], ["frob"], ["show"], ["ls", "--jso"]])
def test_wrong_usage(arguments: list[str]) -> None:
    """A wrong command line ends with code 2 and says what is expected."""
    program = module(*arguments)
    assert (program.code, program.out) == (2, "")
    assert "usage:" in program.err


def test_help() -> None:
    """`--help` names the commands."""
    out = done(module("--help"))
    assert "ls" in out
    assert "show" in out


# `pltrace run`.


def like_python(folder: Path, *arguments: object, code: int = 0, **environment: object) -> tuple[str, str]:
    """Runs a program with `pltrace run` and by itself, which it has to be like; gives what it printed, and the tree."""
    alone = ended_in(folder, sys.executable, *arguments, **environment)
    traced = ended_in(
        folder, sys.executable, "-m", "pltrace", "run", *arguments, PLTRACE_STORE=folder / "run.db", **environment
    )
    told, block, spans = traced.err.partition(f"{arguments[0] if arguments[0] != '-m' else arguments[1]}  [block]")
    assert (alone.code, alone.out, alone.err) == (traced.code, traced.out, told)
    assert traced.code == code
    return traced.out + told, block + spans


def ended_in(folder: Path, *command: object, **environment: object) -> Ended:
    """Runs a command in a folder to its end."""
    process = subprocess.Popen(
        [*map(str, command)], cwd=folder, env=surroundings(**environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    return ended(process)


def names(tree: str) -> list[str]:
    """Gives the names of a tree's spans, in order."""
    return [line.partition("  [")[0].lstrip("│├└─ ") for line in tree.splitlines() if "  [" in line]


#: Says of a program's main module what there is to say.
LOOKS_ROUND = """
import os, pickle, sys
class Mine: pass
print(__name__, __file__, __spec__ and __spec__.name, __package__, __builtins__, sorted(globals()))
print(type(__loader__).__name__, sys.argv, sys.path[0])
assert sys.modules["__main__"].Mine is type(pickle.loads(pickle.dumps(Mine())))
os.chdir("/")
assert os.path.isabs(__file__)
"""


@pytest.mark.parametrize(
    "arguments",
    [["app.py"], ["sub/../app.py", "-v", "x"], ["linked/tool.py"], ["sub"], ["-m", "app"], ["-m", "package", "x"],
     ["app.pyc"], ["app.pyz"]],
    ids=" ".join,
)  # fmt: skip
def test_run(tmp_path: Path, arguments: list[str]) -> None:
    """A program finds itself in the `__main__` that Python would give it, be it a script, a folder or a module."""
    folder = tmp_path / "real"
    for name in ("sub", "package", "linked"):
        (folder / name).mkdir(parents=True)
    (folder / "package" / "__init__.py").touch()
    for place in ("app.py", "sub/__main__.py", "package/__main__.py"):
        (folder / place).write_text(LOOKS_ROUND)
    with ZipFile(folder / "app.pyz", "w") as archive:
        archive.write(folder / "app.py", "__main__.py")
    (folder / "linked" / "tool.py").symlink_to("../app.py")
    py_compile.compile(str(folder / "app.py"), cfile=str(folder / "app.pyc"))
    _, tree = like_python(folder, *arguments)
    assert names(tree) == [arguments[arguments[0] == "-m"]]


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("raise ValueError('x')", 1, "ValueError: x"),
        ("def f(): 1 / 0\nf()", 1, "ZeroDivisionError"),
        ("def f(:", 1, "SyntaxError"),
        ("import sys\nsys.exit(7)", 7, ""),
        ("import sys\nsys.exit('no such thing')", 1, "no such thing"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        (
            """
            import os, signal, time
            signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job ignores it.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            """,
            -signal.SIGINT,
            "os.kill",
        ),
        (
            """
            import sys, traceback
            def hook(kind, error, trace):
                assert error.__traceback__ is trace is sys.last_traceback and sys.excepthook is hook
                print(kind.__name__, len(traceback.extract_tb(trace)), trace.tb_frame.f_code.co_name)
            sys.excepthook = hook
            def fail(): raise ValueError(1)
            fail()
            """,
            1,
            "ValueError 2 <module>",
        ),
        (
            """
            import pltrace
            pltrace.configure(sample=7)
            """,
            1,
            "ConfigError: sample=7",
        ),
    ],
)
def test_run_to_a_bad_end(tmp_path: Path, source: str, code: int, said: str) -> None:
    """A program's exception goes to its own hook, with its own frames alone, and the process ends as by Python."""
    (tmp_path / "app.py").write_text(dedent(source))
    printed, tree = like_python(tmp_path, "app.py", code=code)
    assert said in printed
    assert "error" in tree


def test_run_a_module_to_a_bad_end(tmp_path: Path) -> None:
    """Of a module's exception not even those frames are shown that `python -m` shows."""
    (tmp_path / "app.py").write_text("raise KeyboardInterrupt")
    traced = ended_in(tmp_path, sys.executable, "-m", "pltrace", "run", "-m", "app")
    assert traced.code == -signal.SIGINT
    head, place, _, error, tree = traced.err.splitlines()
    assert (head, error) == ("Traceback (most recent call last):", "KeyboardInterrupt")
    assert "app.py" in place
    assert names(tree) == ["app"]


@pytest.mark.parametrize(("arguments", "code"), [(["none.py"], 2), (["-m", "none"], 1), (["-m", "none.x"], 1)])
def test_run_nothing(tmp_path: Path, arguments: list[str], code: int) -> None:
    """A program that isn't there is told in Python's words."""
    printed, _ = like_python(tmp_path, *arguments, code=code)
    assert "none" in printed


def test_run_to_the_last(tmp_path: Path) -> None:
    """Threads that outlive the main module, and exit functions, find it as it was; the tree comes after them."""
    (tmp_path / "app.py").write_text(
        dedent(
            """
            from __future__ import annotations
            import atexit, pickle, threading, typing
            import pltrace
            class Job: pass
            class Out(typing.TypedDict): job: Job
            ended = threading.Event()
            def work():
                threading.main_thread().join()
                with pltrace.traced("in the thread"):
                    print(type(pickle.loads(pickle.dumps(Job()))), typing.get_type_hints(Out))
            @atexit.register
            @pltrace.traced
            def at_exit():
                print(pickle.dumps(Job()), pltrace.current_span().name)
            threading.Thread(target=work).start()
            pltrace.traced(print)("the main module ends")
            """
        )
    )
    traced = ended_in(tmp_path, sys.executable, "-m", "pltrace", "run", "app.py")
    printed = traced.out.splitlines()
    assert (traced.code, printed[0], len(printed)) == (0, "the main module ends", 3)
    assert "__main__.Job" in printed[1]
    assert printed[2].endswith(" at_exit")
    assert names(traced.err) == ["app.py", "print", "in the thread", "at_exit"]


@pytest.mark.parametrize(
    "ends",
    ["pltrace.shutdown()", "pltrace.flush()", "pltrace.configure(store='other.db')\nwith pltrace.traced('b'): pass"],
)
def test_run_a_program_that_ends_tracing(tmp_path: Path, ends: str) -> None:
    """The tree comes also where the program itself switches tracing off, or sets another store."""
    (tmp_path / "app.py").write_text(f"import pltrace\nwith pltrace.traced('a'): pass\n{ends}\n")
    _, tree = like_python(tmp_path, "app.py")
    assert names(tree)[0] == "app.py"
    assert names(tree)[-1] == ("b" if "'b'" in ends else "a")


def test_run_a_bad_environment(tmp_path: Path) -> None:
    """A bad setting in the environment is told in one line, and nothing is run."""
    (tmp_path / "app.py").write_text("print('run')")
    traced = ended_in(tmp_path, sys.executable, "-m", "pltrace", "run", "app.py", PLTRACE_SAMPLE="7")
    assert (traced.code, traced.out) == (1, "")
    assert traced.err.startswith("pltrace: PLTRACE_SAMPLE='7'")
    assert traced.err.count("\n") == 1


def test_run_a_program_that_forks(tmp_path: Path) -> None:
    """The child of a fork that comes to its end shows no tree, and records what it did into the parent's."""
    (tmp_path / "app.py").write_text(
        dedent(
            """
            import os, pltrace
            if (child := os.fork()) == 0:
                with pltrace.traced("child"): print("child", flush=True)
            else:
                os.waitpid(child, 0)
                with pltrace.traced("parent"): print("parent")
            """
        )
    )
    printed, tree = like_python(tmp_path, "app.py")
    assert printed == "child\nparent\n"
    assert names(tree) == ["app.py", "child", "parent"]


#: Starts another process in one of the ways there are, in another folder; it traces, and has its own trace.
STARTS = """
import multiprocessing, os, subprocess, sys
import pltrace
def work(number):
    with pltrace.traced(f"work {number}"):
        return number
if __name__ == "__main__":
    os.chdir("/")
    if os.environ.get("RUN_MAIN"):
        print(work(3))
    elif sys.argv[1] == "pool":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            print(pool.map(work, [1, 2]))
    else:
        subprocess.run([sys.executable, __file__], env={**os.environ, "RUN_MAIN": "1"}, check=True)
"""


@pytest.mark.parametrize(
    ("how", "environment", "recorded"),
    [
        ("pool", {}, {"app.py", "work 1", "work 2"}),
        ("itself", {}, {"app.py", "work 3"}),
        ("itself", {"PLTRACE_ENABLED": "0"}, {"app.py"}),
    ],
)
def test_run_a_program_that_starts_others(
    tmp_path: Path, how: str, environment: dict[str, str], recorded: set[str]
) -> None:
    """Processes that it starts are traced into the same store, unless the environment says no; it alone shows them."""
    (tmp_path / "app.py").write_text(STARTS)
    traced = ended_in(
        tmp_path, sys.executable, "-m", "pltrace", "run", "app.py", how, PLTRACE_STORE="run.db", **environment
    )
    assert traced.code == 0
    assert set(stored(tmp_path / "run.db")) == recorded
    assert names(traced.err) == (["app.py", "work 1", "work 2"] if how == "pool" else ["app.py"])
    assert "bound" not in traced.err
