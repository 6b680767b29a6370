"""Real servers and workers that fork, reload and recycle: whatever they do with their processes, all is delivered."""

from __future__ import annotations

import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.faults.support import all_delivered, deliver_rest
from tests.support.programs import rows, run, stored, surroundings
from tests.support.promptlayer_server import PromptLayerServer

#: A worker that hangs is killed by its server after so long.
GRACEFUL_S = 15

APPLICATION = """
import os
import pltrace
from langchain_core.language_models.fake_chat_models import FakeListChatModel

model = FakeListChatModel(responses=["Hello."])

@pltrace.traced("request")
def answer(path):
    model.invoke(path)
    return f"{os.getpid()}".encode()

with pltrace.traced("loading"):
    pass

def app(environ, start_response):
    body = answer(environ["PATH_INFO"])
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


def _needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; see the extra `faults`")


@contextmanager
def _serving(
    folder: Path, settings: dict[str, object], command: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a server of the application, whose command names its address as `ADDRESS`; give it, and its port."""
    (folder / "application.py").write_text(APPLICATION)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(
            [part.replace("ADDRESS", f"127.0.0.1:{port}") for part in command],
            env=surroundings(**settings), cwd=folder, stdout=log, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            _until_answered(server, port, log.name)
            yield server, port
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _gunicorn(*options: str) -> list[str]:
    return [
        sys.executable, "-m", "gunicorn", "application:app", "--bind", "ADDRESS", "--graceful-timeout", str(GRACEFUL_S),
        *options,
    ]  # fmt: skip


def _uwsgi(*options: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("uwsgi")), "--http-socket", "ADDRESS", "--wsgi-file", "application.py",
        "--callable", "app", "--home", sys.prefix, "--master",
        "--die-on-term", "--processes", "3", *options,
    ]  # fmt: skip


def _until_answered(server: subprocess.Popen[str], port: int, log: str) -> None:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        assert server.poll() is None, Path(log).read_text()
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"It didn't start: {Path(log).read_text()}")


def _ask(port: int, count: int, threads: int = 4) -> Counter[str]:
    """Send requests at the same time; count which process answered how many."""
    answered: Counter[str] = Counter()

    def ask() -> None:
        for number in range(count // threads):
            for _ in range(20):  # A worker may be on its way out.
                try:
                    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30.0)) as connection:
                        connection.request("GET", f"/{number}")
                        answered[connection.getresponse().read().decode()] += 1
                        break
                except OSError:
                    time.sleep(0.1)

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    return answered


def _stop(server: subprocess.Popen[str], how: signal.Signals) -> None:
    began = time.monotonic()
    server.send_signal(how)
    server.wait(60.0)
    # Past it, gunicorn kills its workers.
    assert time.monotonic() - began < GRACEFUL_S


_WORKERS = {
    "sync": ["--worker-class", "sync", "--preload"],
    "gthread": ["--worker-class", "gthread", "--threads", "4"],
    "gevent": ["--worker-class", "gevent"],
    "gevent, patched after the application was loaded": ["--worker-class", "gevent", "--preload"],
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("worker", _WORKERS)
@_needs("gunicorn", "gevent")
def test_gunicorn(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    worker: str,
) -> None:
    """What gunicorn's workers record is delivered, of every kind, loaded before or after the fork."""
    options = ["--workers", "3", *_WORKERS[worker]]
    with _serving(tmp_path, settings, _gunicorn(*options)) as (server, port):
        answered = _ask(port, 120)
        # While they run, not only when they end.
        promptlayer.wait_for(lambda: len(promptlayer.request_logs) == 120, 30.0)
        _stop(server, signal.SIGTERM)
    assert answered.total() == 120
    loadings = 1 if "--preload" in options else 3
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log
    all_delivered(promptlayer, store, 240 + loadings)


@_needs("gevent")
def test_gevent_closes_files_later(tmp_path: Path) -> None:
    """Where gevent closes a file only when its loop comes to it, a store is made at once, and what is recorded kept."""
    source = """
from gevent import monkey
monkey.patch_all()
import gevent
gevent.sleep(0)  # From now on there is a loop.
import sys
import time
import pltrace

began = time.monotonic()
for number in range(5):
    pltrace.configure(store=f"{sys.argv[1]}/{number}.db", enabled=True)
    with pltrace.traced("block"):
        pass
    assert pltrace.flush(5.0)
assert time.monotonic() - began < 5.0
"""
    done = run(source, tmp_path, tmp_path)
    assert (done.code, done.err) == (0, "")
    assert [stored(tmp_path / f"{number}.db") for number in range(5)] == [["block"]] * 5


_PATCHED = {
    "first": "from gevent import monkey; monkey.patch_all(); import pltrace",
    "after pltrace was loaded": "import pltrace._tracing; from gevent import monkey; monkey.patch_all()",
}


@pytest.mark.parametrize("patched", _PATCHED)
@_needs("gevent")
def test_gevent_delivers_in_time(tmp_path: Path, patched: str) -> None:
    """Threads of ours that use one store under gevent don't stand still in each other's way."""
    source = f"""
{_PATCHED[patched]}
import sys
import time
import gevent
import pltrace

class Exporter:
    def __init__(self, name):
        self.name, self.taken = name, 0

    def export(self, spans):
        self.taken += len(spans)
        return pltrace.ExportResult("delivered")

    def shutdown(self):
        pass

def record():
    for _ in range(5):
        with pltrace.traced("block"):
            gevent.sleep(0.01)

exporters = [Exporter(name) for name in "abcdefgh"]
pltrace.configure(store=sys.argv[1], exporters=exporters, enabled=True)
for number in range(1, 5):
    gevent.joinall([gevent.spawn(record) for _ in range(6)])
    deadline = time.monotonic() + 4.0
    while any(exporter.taken < number * 30 for exporter in exporters):
        assert time.monotonic() < deadline, [exporter.taken for exporter in exporters]
        gevent.sleep(0.01)
"""
    done = run(source, tmp_path, tmp_path / "traces.db")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("patched", _PATCHED)
@_needs("gevent")
def test_gevent_sends_each_score_once(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], patched: str
) -> None:
    """No score has to be sent again because its connection is another thread's."""
    source = f"""
{_PATCHED[patched]}
import pltrace
from langchain_core.language_models.fake_chat_models import FakeListChatModel

pltrace.configure()
with pltrace.traced("block") as span:
    for _ in range(8):
        FakeListChatModel(responses=["Hello."]).invoke("Hi!")
assert pltrace.flush(20.0)
for request in span.requests:
    request.score(1)
assert pltrace.flush(20.0)
"""
    done = run(source, tmp_path, **settings)
    assert (done.code, done.err) == (0, "")
    assert len([request for request in promptlayer.requests if "score" in request.path]) == 8
    assert len(promptlayer.operations) == 8


@pytest.mark.parametrize("patched", _PATCHED)
@_needs("gevent")
def test_gevent_goes_on_meanwhile(tmp_path: Path, patched: str) -> None:
    """While one greenlet waits for delivery, for a callback, for an id or for the disk, the others run."""
    source = f"""
{_PATCHED[patched]}
import sqlite3
import sys
import time
import gevent
import pltrace
from langchain_core.language_models.fake_chat_models import FakeListChatModel

sleep = monkey.get_original("time", "sleep")

class Slow:
    name = "slow"

    def export(self, spans):
        sleep(0.7)
        return pltrace.ExportResult("delivered")

    def shutdown(self):
        pass

def ticked(work):
    ticks = []
    def tick():
        while True:
            ticks.append(time.monotonic())
            gevent.sleep(0.01)
    ticking = gevent.spawn(tick)
    gevent.sleep(0)
    found = work()
    ticking.kill()
    assert ticks[-1] - ticks[0] > 0.4, ticks[-1] - ticks[0]
    assert len(ticks) > (ticks[-1] - ticks[0]) * 25, (work, len(ticks), ticks[-1] - ticks[0])
    return found

store = sys.argv[1]
model = FakeListChatModel(responses=["Hello."])
pltrace.configure(store=store, exporters=[Slow()], enabled=True)
with pltrace.traced("block", on_request=lambda request: sleep(0.7)) as span:
    model.invoke("Hi!")
assert ticked(lambda: pltrace.flush(5.0))

with sqlite3.connect(store, isolation_level=None) as other:
    other.execute("BEGIN IMMEDIATE")
    with pltrace.traced("block") as span:
        model.invoke("Hi!")
    (request,) = span.requests
    assert ticked(lambda: request.wait(0.7)) is None
    assert not ticked(lambda: pltrace.flush(0.7))
    other.execute("COMMIT")
other.close()
assert pltrace.flush(5.0)
assert request.id

"""
    done = run(source, tmp_path, tmp_path / "traces.db")
    assert (done.code, done.err) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(300)
@_needs("gunicorn")
def test_gunicorn_recycles_and_reloads(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """Workers that end after some requests, and a reload in the middle of all, lose nothing."""
    options = ["--workers", "3", "--max-requests", "12", "--preload"]
    with _serving(tmp_path, settings, _gunicorn(*options)) as (server, port):
        answered = _ask(port, 100)
        server.send_signal(signal.SIGHUP)
        answered += _ask(port, 100)
        _stop(server, signal.SIGTERM)
    assert len(answered) > 3
    deliver_rest(tmp_path, **settings)
    calls = rows(store, "SELECT count(*) AS count FROM spans WHERE kind = 'llm'")[0]["count"]
    # A request whose answer was cut off is sent again by the test.
    assert calls >= answered.total() == 200
    spans = rows(store, "SELECT count(*) AS count FROM spans")[0]["count"]
    all_delivered(promptlayer, store, spans)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGKILL])
@_needs("gunicorn")
def test_gunicorn_stops_at_once(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path, how: signal.Signals
) -> None:
    """A server that is stopped the hard way leaves on disk all that it answered."""
    promptlayer.stop()
    with _serving(tmp_path, settings, _gunicorn("--workers", "2")) as (server, port):
        answered = _ask(port, 100)
        time.sleep(0.5)  # Long ago, for a busy machine.
        if how is signal.SIGKILL:
            os.killpg(server.pid, how)
        else:
            server.send_signal(how)
        server.wait(60.0)
    assert answered.total() == 100
    promptlayer.start()
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 202)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [["--max-requests", "12"], ["--py-call-uwsgi-fork-hooks"]], ids=" ".join)
@_needs("uwsgidecorators")
def test_uwsgi(
    tmp_path: Path,
    promptlayer: PromptLayerServer,
    settings: dict[str, object],
    store: Path,
    options: list[str],
) -> None:
    """What uWSGI's workers record is delivered, though it forks them without telling Python."""
    with _serving(tmp_path, settings, _uwsgi("--enable-threads", *options)) as (server, port):
        answered = _ask(port, 120)
        # While they run, not only when they end.
        promptlayer.wait_for(lambda: len(promptlayer.request_logs) == 120, 30.0)
        _stop(server, signal.SIGTERM)
    assert answered.total() == 120
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 241)


TASKS = """
import os
import pltrace
from celery import Celery
from langchain_core.language_models.fake_chat_models import FakeListChatModel

folder = os.environ["TASKS_FOLDER"]
places = {"data_folder_in": folder + "/queue", "data_folder_out": folder + "/queue"}
app = Celery(broker="filesystem://")
app.conf.update(
    broker_transport_options={**places, "control_folder": folder + "/control", "store_processed": False},
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
)
model = FakeListChatModel(responses=["Hello."])

@app.task
@pltrace.traced("task")
def ask(carrier, number):
    with pltrace.traced("in the worker", parent=carrier):
        model.invoke(str(number))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@_needs("celery")
def test_celery_recycles_its_children(
    tmp_path: Path, promptlayer: PromptLayerServer, settings: dict[str, object], store: Path
) -> None:
    """Celery's prefork children, each good for a few tasks, deliver what they record, inside who sent the task."""
    (tmp_path / "tasks.py").write_text(TASKS)
    for name in ("queue", "control"):
        (tmp_path / name).mkdir()
    environment = surroundings(
        **settings, TASKS_FOLDER=tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), surroundings()["PYTHONPATH"]])
    )
    send = """
import pltrace, tasks
with pltrace.traced("sender"):
    for number in range(30):
        tasks.ask.delay(pltrace.inject(), number)
"""
    subprocess.run([sys.executable, "-c", send], env=environment, cwd=tmp_path, check=True, timeout=60.0)
    command = [
        "worker", "--pool", "prefork", "--concurrency", "3", "--max-tasks-per-child", "4", "--without-gossip",
        "--without-mingle", "--without-heartbeat", "--loglevel", "WARNING",
    ]  # fmt: skip
    with (tmp_path / "log").open("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tasks", *command],
            env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            promptlayer.wait_for(lambda: len(promptlayer.request_logs) == 30, 90.0)
            worker.send_signal(signal.SIGTERM)
            worker.wait(60.0)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
    deliver_rest(tmp_path, **settings)
    all_delivered(promptlayer, store, 1 + 3 * 30)
    traces = rows(store, "SELECT DISTINCT trace_id FROM spans WHERE kind = 'llm' OR name = 'sender'")
    assert len(traces) == 1
