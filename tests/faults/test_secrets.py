"""A secret that passes through traced code is in no file, no log and no request; what is kept is its owner's alone."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pltrace
from tests.faults.support import PRELUDE, balance, deliver_rest
from tests.support.http_double import Fault
from tests.support.programs import ended, run, start
from tests.support.promptlayer_server import PromptLayerServer

#: Put together where they are used, so that no file of a test holds one: what is planted, by where it is planted.
SECRETS = {
    "shape": "sk-" + "Zq7" * 8 + "PLANTED1",
    "name": "hunter2-PLANTED2-correct-horse",
    "url": "PLANTED3swordfish",
    "error": "sk-ant-" + "Xw9" * 8 + "PLANTED4",
    "bearer": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJQTEFOVEVENSJ9.PLANTED5" + "Ab3" * 8,
    "header": "PLANTED6-" + "Kd5" * 8,
    "score": "sk-proj-" + "Yt4" * 8 + "PLANTED7",
    "hidden": "a private text of PLANTED8",
}

PLANTS = """
import logging
from langchain_core.messages import HumanMessage, SystemMessage
logging.basicConfig(level=logging.DEBUG, filename=os.environ["LOG_FILE"])
S = json.loads(os.environ.pop("PLANTED"))
warm()

@traced
def login(user, password, **more):
    return {"session": {"api_key": S["name"]}, "url": f"postgres://admin:{S['url']}@db/prod"}

def plant(number):
    with traced(f"around {S['shape']}", tags=[S["shape"]], user=S["shape"], session=S["shape"],
                metadata={"note": f"the key is {S['shape']}", "password": S["name"], S["shape"]: 1}) as around:
        login("me", S["name"], headers={"Authorization": f"Bearer {S['bearer']}", "X-Api-Key": S["header"]})
        messages = [SystemMessage(f"Use {S['shape']}."), HumanMessage(f"Authorization: Bearer {S['bearer']}")]
        model().invoke(messages, config={"metadata": {"secret": S["name"]}, "tags": [S["shape"]]})
        around.update(output=[f"https://user:{S['url']}@host/", S["shape"].encode()], metadata={"token": S["name"]})
        for request in around.requests:
            request.add_metadata({"key": S["score"], "password": S["name"]})
        around.score(50, S["score"])
    with traced("fails"):
        try:
            with traced("raises"):
                raise ValueError(f"Incorrect API key provided: {S['error']}")
        except ValueError:
            pass
    with traced("hides", capture=False) as hides:
        login(S["hidden"], S["hidden"])
        model().invoke(S["hidden"])

for number in range(5):
    plant(number)
"""


def found_in(folder: Path, *texts: bytes) -> set[str]:
    """Gives where a planted secret is found: in which file under a folder, or in a text, and which."""
    places = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    places |= {f"text {number}": text for number, text in enumerate(texts)}
    return {
        f"{name} in {place}" for place, content in places.items() for name, secret in SECRETS.items()
        if secret.encode() in content
    }  # fmt: skip


@pytest.fixture
def traffic(promptlayer: PromptLayerServer) -> list[bytes]:
    """All that PromptLayer was sent: paths, headers and bodies."""
    sent: list[bytes] = []

    def keep(request: Any) -> Fault | None:
        sent.append(f"{request.target} {dict(request.headers)} ".encode() + request.body)
        return None

    promptlayer.faults.append(keep)
    return sent


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[set[str]]:
    """The modes that the files and folders of the store ever had, seen by looking all the time."""
    seen: set[str] = set()
    stop = threading.Event()
    folder = tmp_path / "store"

    def look() -> None:
        while not stop.is_set():
            for path in (folder, *(folder.iterdir() if folder.exists() else ())):
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue
                seen.add(f"{path.name.partition('.corrupt')[0]} {stat.S_IMODE(status.st_mode):o}")
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    yield seen
    stop.set()
    looking.join()


@pytest.mark.parametrize(
    "way",
    [
        "healthy",
        "killed",
        pytest.param("outage", marks=pytest.mark.slow),
        pytest.param("refused", marks=pytest.mark.slow),
    ],
)
def test_planted_secrets(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    traffic: list[bytes],
    store: Path,
    way: str,
) -> None:
    """Planted secrets are in no byte of store, log file, output or traffic, whatever happens to the process."""
    if way == "outage":
        promptlayer.stop()
    if way == "refused":
        promptlayer.poison(lambda name: name == "FakeListChatModel")
    source = PRELUDE + PLANTS
    if way == "killed":
        source += "\ntime.sleep(0.5)\nprint('planted', flush=True)\ntime.sleep(60)\n"
    log = tmp_path / "program.log"
    planted = {**settings, "PLANTED": json.dumps(SECRETS), "LOG_FILE": log}
    process = start(source, tmp_path, **planted)
    if way == "killed":
        assert process.stdout is not None
        assert process.stdout.readline() == "planted\n"
        os.kill(process.pid, signal.SIGKILL)
    program = ended(process)
    assert program.code == (-signal.SIGKILL if way == "killed" else 0), program.err
    output = (program.out + program.err).encode()
    assert found_in(tmp_path, output, *traffic) == set()
    promptlayer.start()
    deliver_rest(tmp_path, **settings)
    assert found_in(tmp_path, output, *traffic) == set()
    assert balance(store, 40).pending == 0
    # There is something in it: it isn't that nothing was looked at.
    assert any(b"Incorrect API key provided" in body for body in traffic)
    assert b"Incorrect API key provided" in b"".join(file.read_bytes() for file in store.parent.iterdir())


@pytest.mark.slow
def test_our_own_key(tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path) -> None:
    """The API key of PromptLayer is in no file, no log and no output, whether it is good or refused."""
    key = promptlayer.api_key
    for number, given in enumerate((key, "pl_" + "Wr0ng" * 6)):
        log = tmp_path / f"{number}.log"
        source = f"""
import logging
logging.basicConfig(level=logging.DEBUG, filename={str(log)!r})
warm()
ask(1)
with traced("scored") as scored:
    model().invoke("Hi!")
    scored.score(50)
print(pltrace._runtime._active.config, pltrace._runtime._active.exporters)
pltrace.flush(5)
"""
        program = run(PRELUDE + source, tmp_path, **{**settings, "PROMPTLAYER_API_KEY": given})
        assert program.code == 0, program.err
        assert given not in program.out + program.err + log.read_text()
        for file in store.parent.iterdir():
            assert given.encode() not in file.read_bytes()


def test_a_redactor_that_raises(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], traffic: list[bytes], store: Path
) -> None:
    """Where a redactor raises, whatever it raises, no value is kept or sent, and every span is delivered."""
    source = """
import itertools
errors = itertools.cycle([ValueError("no"), SystemExit(3), MemoryError(), RecursionError(), KeyboardInterrupt()])

def redact(key, value):
    raise next(errors)

pltrace.configure(redact=redact)
model()
for number in range(10):
    with traced("around", metadata={"note": "PLANTED in metadata"}) as around:
        around.update(output={"text": "PLANTED in output"})
        model().invoke("PLANTED in prompt")
        around.score(5)
    try:
        with traced("raises"):
            raise ValueError("PLANTED in error")
    except ValueError:
        pass
"""
    program = run(PRELUDE + source, tmp_path, **settings)
    assert program.code == 0, program.err
    deliver_rest(tmp_path, **settings)
    assert balance(store, 30).delivered == 30
    kept = b"".join(file.read_bytes() for file in store.parent.iterdir())
    for place in (kept, program.err.encode(), *traffic):
        assert b"PLANTED" not in place


def test_private_from_the_first_byte(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, watched: set[str]
) -> None:
    """Under the most generous umask no file of the store is ever open to others, a damaged one set aside included."""
    source = "import os\nos.umask(0)\n" + PRELUDE + "warm()\ntimed(ask, 200)\n"
    assert run(source, tmp_path, **settings).code == 0
    for part in ("", "-wal", "-shm"):
        Path(f"{store}{part}").unlink(missing_ok=True)
    store.touch(0o600)
    store.write_bytes(b"This was a store once. " * 1000)
    assert run(source, tmp_path, **settings).code == 0
    assert any("corrupt" in file.name for file in store.parent.iterdir())
    folders = {entry for entry in watched if entry.startswith("store ")}
    assert folders == {"store 700"}
    assert watched - folders
    assert all(entry.endswith(" 600") for entry in watched - folders), watched


def test_what_is_handed_to_other_processes(store: Path) -> None:
    """A carrier says of tags, metadata, user and session what the store would: no secret leaves with a header."""
    key = "sk-proj-" + "a1B2" * 12
    pltrace.configure(store=store, enabled=True)
    with pltrace.traced("block", tags=["plain", key], metadata={"api_key": "hunter2", "kept": 1}, user=key):
        carrier = pltrace.inject()
    assert "hunter2" not in str(carrier)
    assert "a1B2" not in str(carrier)
    with pltrace.traced("elsewhere", parent=carrier) as span:
        assert span.tags[0] == "plain"
        assert span.metadata["kept"] == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_an_empty_file_that_was_made_for_it(store: Path) -> None:
    """A file that somebody made beforehand, readable by others, is made private before anything is in it."""
    store.parent.mkdir(exist_ok=True)
    store.touch(0o644)
    store.chmod(0o644)
    pltrace.configure(store=store, enabled=True)
    with pltrace.traced("block"):
        pass
    assert pltrace.flush(5.0)
    assert {oct(part.stat().st_mode & 0o777) for part in store.parent.glob(f"{store.name}*")} == {"0o600"}
